"""Time of `merge_files` against reading the inputs and writing the output once, and its memory.

Random checkpoints of BERT-large's shape; floor and merge in turns, a fresh process each; and mergekit's
`linear`, by its own Python:
  python tools/bench_streaming.py --make _large --models 6
  python tools/bench_streaming.py --models 2 6 --rounds 5 _large --out nbs/results/merging/bert-large.json
  python tools/bench_streaming.py --models 2 --mergekit PYTHON _large
20 GB:
  python tools/bench_streaming.py --make _huge --models 2 --layers 196
  python tools/bench_streaming.py --models 2 --rounds 2 --states disk watched _huge --out FILE
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

def make(folder, models, layers):
    "Random float32 checkpoints; written tensor by tensor, so that they may be larger than memory."
    import torch
    from transformers import BertConfig, BertForSequenceClassification
    from fisher_nodes.merging.store import make_file
    config = BertConfig(hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16,
                        intermediate_size=4096, num_labels=2)
    with torch.device('meta'): model = BertForSequenceClassification(config)
    for i in range(models):
        here, gen = folder/f'm{i}', torch.Generator().manual_seed(i)
        here.mkdir(parents=True)
        config.architectures = ['BertForSequenceClassification']
        config.save_pretrained(here)
        slots = make_file(here/'model.safetensors', model.state_dict())
        for o in slots.values(): o[...] = torch.randn(o.shape, generator=gen)*.02

def floor(models, out):
    "Read everything and write as much as a merge would."
    buffer = bytearray(1 << 22)
    out.mkdir()
    def files(m): return sorted(m.glob('*.safetensors'))
    for f in (f for m in models for f in files(m)):
        with open(f, 'rb', buffering=0) as o:
            while o.readinto(buffer): pass
    for f in files(models[0]):
        left = f.stat().st_size
        with open(out/f.name, 'wb', buffering=0) as o:
            while left: left -= o.write(memoryview(buffer)[:min(left, len(buffer))])

def merge(models, out, method):
    from fisher_nodes.merging.run import merge_files
    merge_files({f'm{i}': o for i, o in enumerate(models)}, method=method, out=out, progress=False)

def mergekit(models, out):
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    inputs = [dict(model=str(o), parameters=dict(weight=1.)) for o in models]
    config = MergeConfiguration.model_validate(dict(merge_method='linear', dtype='float32', models=inputs))
    run_merge(config, str(out), MergeOptions(copy_tokenizer=False, quiet=True))

def private():
    "Private and anonymous memory of this process, in bytes."
    text = Path('/proc/self/smaps_rollup').read_text()
    kb = {k: int(v) for k, v in re.findall(r'^(Private_Clean|Private_Dirty|Anonymous):\s+(\d+)', text, re.M)}
    return (kb['Private_Clean']+kb['Private_Dirty'])*1024, kb['Anonymous']*1024

def forget(models):
    "Take what is read out of the page cache, so that it comes from the disk."
    for f in (f for m in models for f in m.glob('*.safetensors')):
        with open(f, 'rb') as o: os.posix_fadvise(o.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

MODULES = dict(merge=['fisher_nodes.merging.run', 'transformers.models.bert.modeling_bert'],
               mergekit=['mergekit.merge'], floor=[])
STATES = ['page cache', 'disk', 'watched']

def watch(peak):
    "Keep the most memory seen."
    while True:
        peak[0] = tuple(map(max, zip(peak[0], private())))
        time.sleep(.02)

def one(what, models, out, method, state):
    """One run: its time, or its peak memory, since looking at memory takes time.
    As much as it writes was just freed, so that no run pays for pages that another had."""
    for o in MODULES[what]: import_module(o)
    peak = [private()]
    floor(models, out)
    shutil.rmtree(out)
    if state == 'disk': forget(models)
    if state == 'watched': threading.Thread(target=watch, args=[peak], daemon=True).start()
    start, cpu = time.perf_counter(), time.process_time()
    dict(floor=floor, merge=lambda *a: merge(*a, method), mergekit=mergekit)[what](models, out)
    took = dict(seconds=time.perf_counter()-start, cpu_seconds=time.process_time()-cpu)
    found = dict(what=what, models=len(models))
    if state == 'watched': return found | dict(private_bytes=peak[0][0], anonymous_bytes=peak[0][1])
    return found | dict(inputs=state) | took | dict(load=os.getloadavg()[0])

def in_process(a, what, n, state):
    "One run in a process of its own; None if it failed."
    python = a.mergekit if what == 'mergekit' else sys.executable
    options = ['--models', str(n), '--method', a.method, '--one', what, '--state', state]
    line = [python, __file__, str(a.folder), *options]
    os.sync()
    done = subprocess.run(line, capture_output=True, text=True)
    shutil.rmtree(a.folder/'out', ignore_errors=True)
    if done.returncode: return print(done.stderr[-2000:], flush=True)
    found = done.stdout.strip().splitlines()[-1]
    print(found, flush=True)
    return json.loads(found)

def parse():
    "The command line."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', nargs='?', type=Path)
    p.add_argument('--make', type=Path)
    p.add_argument('--layers', type=int, default=24)
    p.add_argument('--models', type=int, nargs='+', default=[2])
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--method', default='average')
    p.add_argument('--mergekit')
    p.add_argument('--out', type=Path)
    p.add_argument('--states', nargs='+', default=STATES, choices=STATES, help='of the runs')
    p.add_argument('--one', help='what to run in this process')
    p.add_argument('--state', default=STATES[0], choices=STATES,
                   help='of the run of --one: where its inputs are, or that its memory is watched')
    a = p.parse_args()
    if not a.make and not (a.folder and sorted(a.folder.glob('m*'))):
        p.error(f'no checkpoints m0, m1, … in {a.folder}; make some with --make')
    return a

def main():
    a = parse()
    if a.make: return make(a.make, a.models[0], a.layers)
    a.folder = a.folder.resolve()
    found = sorted(a.folder.glob('m*'))
    if a.one:
        models = [found[i % len(found)] for i in range(a.models[0])]
        return print(json.dumps(one(a.one, models, a.folder/'out', a.method, a.state)))
    states = [o for o in a.states if o != 'watched']*a.rounds + [o for o in a.states if o == 'watched']
    steps = ['floor', 'merge', *['mergekit']*bool(a.mergekit)]
    runs = [in_process(a, what, n, state) for n in a.models for state in states for what in steps]
    if a.out:
        from fisher_nodes.engine.files import write_record
        size = sum(o.stat().st_size for o in found[0].glob('*.safetensors'))
        write_record(a.out, runs=[o for o in runs if o], method=a.method, layers=a.layers, input_bytes=size)

if __name__ == '__main__': main()
