"""Time of `merge_files` against reading the inputs and writing the output once, in interleaved rounds; and, in another run, its memory.

python tools/bench_streaming.py --make _large --models 6                  # random checkpoints of BERT-large's shape
python tools/bench_streaming.py --models 2 6 --rounds 5 _large --out nbs/results/merging/bert-large.json
                                                                              # floor and merge, a fresh process each
python tools/bench_streaming.py --models 2 --mergekit PYTHON _large       # and mergekit's `linear`, by its own Python
python tools/bench_streaming.py --make _huge --models 2 --layers 196      # 20 GB
python tools/bench_streaming.py --models 2 --rounds 2 --states disk watched --out nbs/results/merging/huge.json _huge
"""
import argparse, json, os, re, shutil, subprocess, sys, threading, time
from importlib import import_module
from pathlib import Path

def make(folder, models, layers):
    "Random float32 checkpoints; written tensor by tensor, so that they may be larger than memory."
    import torch
    from transformers import BertConfig, BertForSequenceClassification
    from fisher_nodes.merging.store import make_file
    config = BertConfig(hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16, intermediate_size=4096, num_labels=2)
    with torch.device('meta'): model = BertForSequenceClassification(config)
    for i in range(models):
        place, gen = folder/f'm{i}', torch.Generator().manual_seed(i)
        place.mkdir(parents=True)
        config.architectures = ['BertForSequenceClassification']
        config.save_pretrained(place)
        spots = make_file(place/'model.safetensors', model.state_dict())
        for o in spots.values(): o[...] = torch.randn(o.shape, generator=gen)*.02

def floor(models, out):
    "Read everything and write as much as a merge would."
    room = bytearray(1 << 22)
    out.mkdir()
    def files(m): return sorted(m.glob('*.safetensors'))
    for f in (f for m in models for f in files(m)):
        with open(f, 'rb', buffering=0) as o:
            while o.readinto(room): pass
    for f in files(models[0]):
        left = f.stat().st_size
        with open(out/f.name, 'wb', buffering=0) as o:
            while left: left -= o.write(memoryview(room)[:min(left, len(room))])

def merge(models, out, method):
    from fisher_nodes.merging.streaming import merge_files
    merge_files({f'm{i}': o for i, o in enumerate(models)}, method=method, out=out, progress=False)

def mergekit(models, out):
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    config = dict(merge_method='linear', dtype='float32', models=[dict(model=str(o), parameters=dict(weight=1.)) for o in models])
    run_merge(MergeConfiguration.model_validate(config), str(out), MergeOptions(copy_tokenizer=False, quiet=True))

def private():
    "Private and anonymous memory of this process, in bytes."
    found = re.findall(r'^(Private_Clean|Private_Dirty|Anonymous):\s+(\d+)', Path('/proc/self/smaps_rollup').read_text(), re.M)
    kb = {k: int(v) for k, v in found}
    return (kb['Private_Clean']+kb['Private_Dirty'])*1024, kb['Anonymous']*1024

def forget(models):
    "Take what is read out of the page cache, so that it comes from the disk."
    for f in (f for m in models for f in m.glob('*.safetensors')):
        with open(f, 'rb') as o: os.posix_fadvise(o.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

def one(what, models, out, method, state):
    "One run: its time, or its peak memory, since looking at memory takes time. As much as it writes was just freed, so that no run pays for pages that another had."
    for o in dict(merge=['fisher_nodes.merging.streaming', 'transformers.models.bert.modeling_bert'], mergekit=['mergekit.merge']).get(what, []): import_module(o)
    peak = [private()]
    def watch():
        while True: peak[0] = tuple(map(max, zip(peak[0], private()))); time.sleep(.02)
    floor(models, out); shutil.rmtree(out)
    if state == 'disk': forget(models)
    if state == 'watched': threading.Thread(target=watch, daemon=True).start()
    start, cpu = time.perf_counter(), time.process_time()
    dict(floor=floor, merge=lambda *a: merge(*a, method), mergekit=mergekit)[what](models, out)
    if state == 'watched': return dict(what=what, models=len(models), private_bytes=peak[0][0], anonymous_bytes=peak[0][1])
    return dict(what=what, models=len(models), inputs=state, seconds=time.perf_counter()-start, cpu_seconds=time.process_time()-cpu, load=os.getloadavg()[0])

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', nargs='?', type=Path); p.add_argument('--make', type=Path); p.add_argument('--layers', type=int, default=24)
    p.add_argument('--models', type=int, nargs='+', default=[2]); p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--method', default='average'); p.add_argument('--mergekit'); p.add_argument('--one'); p.add_argument('--out', type=Path)
    p.add_argument('--states', nargs='+', default=['page cache', 'disk', 'watched'], choices=['page cache', 'disk', 'watched'], help='of the runs')
    p.add_argument('--state', default='page cache', choices=['page cache', 'disk', 'watched'], help='of the run of --one: where its inputs are, or that its memory is watched')
    a = p.parse_args()
    if a.make: return make(a.make, a.models[0], a.layers)
    a.folder = a.folder.resolve()
    found, out = sorted(a.folder.glob('m*')), a.folder/'out'
    if not found: p.error(f'no checkpoints m0, m1, … in {a.folder}; make some with --make')
    if a.one: return print(json.dumps(one(a.one, [found[i%len(found)] for i in range(a.models[0])], out, a.method, a.state)))
    runs = []
    for n in a.models:
        for state in [o for o in a.states if o != 'watched']*a.rounds+[o for o in a.states if o == 'watched']:
            for what in ('floor', 'merge', *['mergekit']*bool(a.mergekit)):
                python = a.mergekit if what == 'mergekit' else sys.executable
                os.sync()
                done = subprocess.run([python, __file__, str(a.folder), '--models', str(n), '--method', a.method, '--one', what, '--state', state], capture_output=True, text=True)
                print(done.stdout.strip().splitlines()[-1] if done.returncode == 0 else done.stderr[-2000:], flush=True)
                if done.returncode == 0: runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
                shutil.rmtree(out, ignore_errors=True)
    if a.out:
        from fisher_nodes.engine.files import write_record
        write_record(a.out, runs=runs, method=a.method, layers=a.layers, input_bytes=sum(o.stat().st_size for o in (found[0]).glob('*.safetensors')))

if __name__ == '__main__': main()
