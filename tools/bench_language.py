"""Memory and time of language models: loading, measuring mask Fishers, merging from file to file.

Random bfloat16 models of Qwen3's layout and about a billion weights, in shards; every step in a process
of its own, whose peak of resident memory the system counts, mapped files included. 6.2 GB of disk. What was
found is kept beside the models, and an interrupted run goes on where it was:
  python tools/bench_language.py --make _language
  python tools/bench_language.py _language --out nbs/results/language/qwen3-1b.json
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

SIZE = dict(vocab_size=151_936, hidden_size=1536, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
            intermediate_size=4608, max_position_embeddings=4096)
LONG, SHORT = 512, 32 # tokens of a row
STEPS = { # name -> rows, tokens of each, of these a prompt, and whether layers run twice; None is no measuring
    'import': None, 'load': None,
    'measure': (4, SHORT, SHORT//2, False), 'measure the other': (4, SHORT, SHORT//2, False),
    'long row, short answer': (1, LONG, LONG-SHORT, False),
    'long row': (1, LONG, 0, False), 'long row, checkpointing': (1, LONG, 0, True),
    'merge': None, 'residual regression': (4, SHORT, 0, False)}

def make(folder, layers, width, vocabulary):
    "Two random models, written tensor by tensor."
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from fisher_nodes.merging.merged import plan_files
    from fisher_nodes.merging.store import make_file
    config = Qwen3Config(**SIZE | dict(hidden_size=width, intermediate_size=3*width, vocab_size=vocabulary),
                         num_hidden_layers=layers, tie_word_embeddings=True, dtype='bfloat16',
                         architectures=['Qwen3ForCausalLM'], pad_token_id=0, bos_token_id=1, eos_token_id=2)
    with torch.device('meta'): model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    for i in range(2):
        here, gen = folder/f'm{i}', torch.Generator().manual_seed(i)
        here.mkdir(parents=True)
        config.save_pretrained(here)
        tensors, files = plan_files(model, here, '500MB')
        for f, names in files.items():
            for o in make_file(here/f, {n: tensors[n] for n in names}).values():
                o[...] = torch.empty(o.shape).normal_(0, .02, generator=gen) if len(o.shape)>1 else torch.ones(o.shape)

def batch(config, rows, tokens, prompt, seed):
    "Random rows, all of a length."
    import torch
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, config.vocab_size, (rows, tokens), generator=gen)
    return dict(input_ids=ids, labels=torch.where(torch.arange(tokens)<max(1, prompt), -100, ids))

def status():
    "Peak and present of resident memory in bytes, and how much of that is no file."
    found = dict(re.findall(r'^(VmHWM|VmRSS|RssAnon):\s+(\d+)', Path('/proc/self/status').read_text(), re.M))
    return {k: 1024*int(v) for k, v in found.items()}

@contextmanager
def watching(found):
    "Note the most memory that was no file, looking twenty times a second."
    end = Event()
    def look():
        while not end.wait(.05): found['anonymous_peak'] = max(found.get('anonymous_peak', 0), status()['RssAnon'])
    thread = Thread(target=look, daemon=True)
    thread.start()
    try: yield
    finally:
        end.set()
        thread.join()

def measure(folder, which, how, seed):
    from fisher_nodes import mask_fisher
    from fisher_nodes.engine.fingerprints import hash_tensors
    from fisher_nodes.engine.models import load_model
    *shape, checkpointing = how
    model = load_model(folder/which)
    fisher = mask_fisher(model, [batch(model.config, *shape, seed)], checkpointing=checkpointing, progress=False)
    if shape[0]>1: fisher.save(folder/f'{which}.fisher')
    return dict(rows=shape[0], tokens=shape[0]*shape[1], labels=fisher.meta['num_choices'],
                checkpointing=checkpointing, numbers=hash_tensors(fisher.tensors()))

def merge(folder):
    from fisher_nodes import merge_files
    names = ('m0', 'm1')
    merge_files({o: folder/o for o in names}, {o: folder/f'{o}.fisher' for o in names}, out=folder/'out',
                max_shard_size='500MB', progress=False)
    files = list((folder/'out').glob('*.safetensors'))
    return dict(files=len(files), bytes=sum(o.stat().st_size for o in files))

def fit(folder, how, seed):
    "Both models into one by residual regression, saved as they are stored."
    from fisher_nodes import merge
    from fisher_nodes.engine.models import load_model
    config = load_model(folder/'m0').config
    data = {o: [batch(config, *how[:3], seed+i)] for i, o in enumerate(('m0', 'm1'))}
    merged = merge({o: folder/o for o in data}, data=data, method='residual-regression', refit_heads=0, copies=0, progress=False)
    merged.save_pretrained(folder/'fitted', max_shard_size='500MB')
    files = list((folder/'fitted').glob('*.safetensors'))
    return dict(tokens=how[0]*how[1], matrices=merged.report['averaged'].get('fit'), bytes=sum(o.stat().st_size for o in files))

def one(step, folder, seed):
    "One step in this process."
    import fisher_nodes.merging.run # noqa: F401
    import transformers.models.qwen3.modeling_qwen3 # noqa: F401
    from fisher_nodes.engine.models import load_model
    start, found, peak = time.perf_counter(), {}, {}
    with watching(peak):
        if step=='load': found = dict(dtype=str(load_model(folder/'m0').dtype))
        elif step=='merge': found = merge(folder)
        elif step=='residual regression': found = fit(folder, STEPS[step], seed)
        elif how:=STEPS[step]: found = measure(folder, 'm1' if 'other' in step else 'm0', how, seed)
    memory = status()
    return dict(what=step, seconds=time.perf_counter()-start, peak_bytes=memory['VmHWM'],
                anonymous_bytes=memory['RssAnon'], load=os.getloadavg()[0]) | peak | found

def in_process(a, step):
    "A step in a process of its own, unless it was done before."
    done = a.folder/f'{step}.json'
    if done.exists(): return json.loads(done.read_text())
    line = [sys.executable, __file__, str(a.folder), '--one', step, '--seed', str(a.seed)]
    ran = subprocess.run(line, capture_output=True, text=True)
    if ran.returncode: raise SystemExit(f'{step}: {ran.stderr[-2000:]}')
    found = ran.stdout.strip().splitlines()[-1]
    print(found, flush=True)
    done.write_text(found)
    return json.loads(found)

def about(folder):
    "What the models are."
    from safetensors import safe_open
    config, files = json.loads((folder/'m0'/'config.json').read_text()), sorted((folder/'m0').glob('*.safetensors'))
    numbers = 0
    for f in files:
        with safe_open(f, 'pt') as o:
            for k in o.keys():
                n = 1
                for d in o.get_slice(k).get_shape(): n *= d
                numbers += n
    sizes = {k: config[k] for k in (*SIZE, 'num_hidden_layers', 'tie_word_embeddings', 'dtype')}
    return dict(model='qwen3', config=sizes, parameters=numbers, input_bytes=sum(o.stat().st_size for o in files),
                input_files=len(files), largest_file=max(o.stat().st_size for o in files))

def parse():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('folder', nargs='?', type=Path)
    p.add_argument('--make', type=Path)
    p.add_argument('--layers', type=int, default=26)
    p.add_argument('--width', type=int, default=SIZE['hidden_size'])
    p.add_argument('--vocabulary', type=int, default=SIZE['vocab_size'])
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path)
    p.add_argument('--one', choices=STEPS, help='what to do in this process')
    a = p.parse_args()
    if not a.make and not (a.folder and (a.folder/'m0').exists()): p.error('no models; make some with --make')
    return a

def main():
    a = parse()
    if a.make: return make(a.make, a.layers, a.width, a.vocabulary)
    a.folder = a.folder.resolve()
    if a.one: return print(json.dumps(one(a.one, a.folder, a.seed)))
    for o in ('out', 'fitted'): shutil.rmtree(a.folder/o, ignore_errors=True)
    runs = [in_process(a, step) for step in STEPS]
    if a.out:
        import torch
        from fisher_nodes.engine.files import write_record
        write_record(a.out, runs=runs, seed=a.seed, device='cpu', threads=torch.get_num_threads(), **about(a.folder))

if __name__ == '__main__': main()
