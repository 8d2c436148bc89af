"""The same merges by mergekit, by sentence-transformers and by fisher_nodes: do they agree, and what do they take?

    make plugins && .plugins/bin/python tools/compare_mergekit.py BASE ONE TWO --out nbs/results/mergekit.json

BASE, ONE and TWO are folders: a body, and two classifiers fine-tuned from it with heads of one size. Each timing is a process of its own.
"""
import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from statistics import median
from unittest.mock import patch

os.environ.update(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false')

import torch

WEIGHTS = [1., .5]
QUIET = dict(progress=False)

# --- agreement --------------------------------------------------------------------------------

def body(model):
    from fisher_nodes.core.families import body_of
    return {n: p.detach() for n, p in body_of(model).named_parameters()}

def theirs(models, method, base=None, **parameters):
    "mergekit's merge of bodies in memory."
    import_module('fisher_nodes.plugins.mergekit') # registers our method
    from mergekit.merge_methods import merge_state_dicts
    states = {t: body(m) for t, m in models.items()} | ({} if base is None else {'base': body(base)})
    return merge_state_dicts(states, method, base=None if base is None else 'base', parameters=parameters)

def ours(models, method, **options):
    from fisher_nodes import merge
    return body(merge(models, method=method, weights=WEIGHTS, **options, **QUIET)['a'])

def largest(x, y, but={}):
    "The largest difference in any tensor, but for some of its numbers, as a share of the largest number in it."
    def gap(n): return (x[n]-y[n]).abs().masked_fill(but.get(n, torch.zeros_like(y[n]).bool()), 0).max()
    return max((gap(n)/y[n].abs().max().clamp_min(1e-30)).item() for n in y)

def other_signs(models, base):
    "The numbers for which the weighted sum of task vectors has another sign in float32 than in float64."
    def total(n, b, dtype): return sum(w*(body(m)[n].to(dtype)-b.to(dtype)) for m, w in zip(models.values(), WEIGHTS))
    return {n: (total(n, b, torch.float32)>=0)!=(total(n, b, torch.float64)>0) for n, b in body(base).items()}

def trimmed_by_tensor(models, base, density, scale):
    "Our TIES, but with the elements to keep chosen in each tensor by itself, as mergekit does."
    from fisher_nodes.methods.ties import elect_and_mean
    out, λ = {}, torch.tensor(WEIGHTS, dtype=torch.float64)
    for n, b in body(base).items():
        vectors = [body(m)[n].double()-b.double() for m in models.values()]
        def trim(v):
            keep = torch.zeros(v.numel(), dtype=torch.bool)
            keep[v.abs().flatten().float().argsort(descending=True)[:max(1, int(density*v.numel()))]] = True
            return v*keep.view_as(v)
        out[n] = (b.double()+scale*elect_and_mean([trim(v) for v in vectors], λ)).to(b.dtype)
    return out

def same_masks(models, base, density, seed):
    "A stand-in for `torch.bernoulli` that gives the masks which our DARE draws, in the order in which mergekit asks."
    from fisher_nodes.methods.dare import seeded
    asked = ((t, n, p) for n, p in body(base).items() for t in models)
    def bernoulli(like):
        t, n, p = next(asked)
        assert like.shape==p.shape
        return (torch.rand(p.shape, generator=seeded(f'{seed} {t} {n}'), dtype=torch.float64)<density).to(like.dtype)
    return patch.object(torch, 'bernoulli', bernoulli)

def agreements(models, base, files, fishers):
    "Theirs, which has importance files, against ours, and each convention that differs: name -> largest difference."
    out, w = {}, dict(weight=WEIGHTS)
    out['linear'] = largest(theirs(models, 'linear', **w), ours(models, 'average'))
    out['linear, normalize: false'] = largest(theirs(models, 'linear', normalize=False, weight=[o/sum(WEIGHTS) for o in WEIGHTS]), ours(models, 'average'))
    out['task_arithmetic'] = largest(theirs(models, 'task_arithmetic', base, **w, **{'lambda': .4}), ours(models, 'task-arithmetic', base=base, scale=.4))
    out['task_arithmetic, normalize: true'] = largest(theirs(models, 'task_arithmetic', base, **w, normalize=True, **{'lambda': .4*sum(WEIGHTS)}), ours(models, 'task-arithmetic', base=base, scale=.4))
    whole = theirs(models, 'ties', base, **w, density=1.), ours(models, 'ties', base=base, density=1.)
    out['ties, density 1'] = largest(*whole, but=other_signs(models, base))
    out['ties, density 1, signs of sums near 0 included'] = largest(*whole)
    their_ties = theirs(models, 'ties', base, **w, density=.2)
    out['ties, density 0.2, trimmed in each tensor'] = largest(their_ties, trimmed_by_tensor(models, base, .2, 1.))
    out['ties, density 0.2, as each does it'] = largest(their_ties, ours(models, 'ties', base=base, density=.2))
    def dare(**more):
        with same_masks(models, base, .5, 3): return theirs(models, 'dare_linear', base, **w, density=.5, **more)
    our_dare = ours(models, 'dare', base=base, density=.5, scale=.4, seed=3)
    out['dare_linear, same masks, 1/density'] = largest(dare(rescale=False, **{'lambda': .4/.5}), our_dare)
    out['dare_linear, same masks, as each does it'] = largest(dare(**{'lambda': .4}), our_dare)
    out['mask_fisher'] = largest(theirs(models, 'mask_fisher', importance=list(map(str, files.values())), **w), ours(models, 'mask-fisher', fishers=fishers))
    return out

# --- cost -------------------------------------------------------------------------------------

def run_theirs(method, base, folders, out):
    import yaml
    from fisher_nodes.plugins.mergekit import run_config
    parameters = dict(ties=dict(density=.2)).get(method, {})
    asked = dict(merge_method=method, models=[dict(model=o, parameters=dict(weight=w) | parameters) for o, w in zip(folders, WEIGHTS)])
    if method=='ties': asked['base_model'] = base
    config = Path(out).with_suffix('.yml')
    config.write_text(yaml.safe_dump(asked))
    return lambda: run_config(config, out)

def run_sentence(method, base, folders, out):
    from sentence_transformers import CrossEncoder
    import_module('fisher_nodes.plugins.mergekit')
    more = dict(ties=dict(density=.2), mask_fisher=dict(importance=folders)).get(method, {})
    how = dict(base_model=base) if method=='ties' else {}
    return lambda: CrossEncoder.merge(folders, method=method, parameters=dict(weight=WEIGHTS) | more, **how).save_pretrained(out)

NAMES = dict(linear='average', ties='ties', mask_fisher='mask-fisher')

def options(method, base):
    more = dict(ties=dict(base=base, density=.2), mask_fisher=dict(fishers='beside')).get(method, {})
    return dict(method=NAMES[method], weights=WEIGHTS) | more | QUIET

def run_memory(method, base, folders, out):
    from fisher_nodes import merge
    return lambda: merge(dict(zip('ab', folders)), **options(method, base)).save_pretrained(out)

def run_files(method, base, folders, out):
    from fisher_nodes import merge_files
    return lambda: merge_files(dict(zip('ab', folders)), out=out, threads=1, **options(method, base))

TOOLS = {'mergekit': run_theirs, 'sentence-transformers': run_sentence, 'merge': run_memory, 'merge_files': run_files}

def digest(folder):
    "A hash of the merged body, by names without what stands before it."
    from safetensors import safe_open
    found = {}
    for file in sorted(Path(folder).glob('model*.safetensors')):
        with safe_open(file, 'pt') as f: found |= {n.split('bert.')[-1]: hashlib.sha256(f.get_tensor(n).contiguous().numpy().tobytes()).hexdigest() for n in f.keys()}
    lines = sorted(f'{n} {o}\n' for n, o in found.items() if not n.startswith('classifier'))
    return hashlib.sha256(''.join(lines).encode()).hexdigest()[:16]

def held():
    "The most that this process has held; `getrusage` would count what its parent did."
    line = next(o for o in Path('/proc/self/status').read_text().splitlines() if o.startswith('VmHWM'))
    return int(line.split()[1])*1024

def one(tool, method, base, folders):
    "Seconds and memory of one merge, in this process, which has done nothing else."
    with tempfile.TemporaryDirectory() as d:
        run = TOOLS[tool](method, base, folders, f'{d}/out')
        idle, before, start = held(), resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        run()
        seconds, after = time.perf_counter()-start, resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime+after.ru_stime-before.ru_utime-before.ru_stime
        found = dict(seconds=seconds, cpu_seconds=cpu, peak_bytes=held(), idle_bytes=idle, bits=digest(f'{d}/out'))
    return found

def costs(base, folders, rounds):
    rows = []
    for method in NAMES:
        for tool in TOOLS:
            runs = []
            for _ in range(rounds):
                done = subprocess.run([sys.executable, __file__, base, *folders, '--one', tool, method], capture_output=True, text=True)
                assert not done.returncode, done.stderr[-2000:]
                runs.append(json.loads(done.stdout.splitlines()[-1]))
            assert len({o['bits'] for o in runs})==1, 'a merge that gives other bits each time'
            rows.append(dict(tool=tool, method=method, bits=runs[0]['bits']) | {k: median(o[k] for o in runs) for k in runs[0] if k!='bits'})
            print(rows[-1], file=sys.stderr)
    return rows

# --- both -------------------------------------------------------------------------------------

def with_head(base, like, folder):
    "A base with a head, since mergekit and sentence-transformers merge heads, too."
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(like)
    AutoModelForSequenceClassification.from_pretrained(base, config=config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(like).save_pretrained(folder)
    return str(folder)

def copied(folder, to, fisher, labels):
    "A checkpoint with what was measured of it beside, and its head's labels by number, since others refuse heads that name them otherwise."
    import shutil
    shutil.copytree(folder, to)
    about = json.loads((to/'config.json').read_text())
    about |= dict(id2label={str(i): f'LABEL_{i}' for i in range(labels)}, label2id={f'LABEL_{i}': i for i in range(labels)})
    for k in ('problem_type', '_name_or_path'): about.pop(k, None)
    (to/'config.json').write_text(json.dumps(about))
    fisher.save(to/'mask-fisher.safetensors')
    return str(to)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for o in ('base', 'one', 'two'): parser.add_argument(o)
    parser.add_argument('--out', type=Path)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--one', nargs=2, dest='single', help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.single: return print(json.dumps(one(*args.single, args.base, [args.one, args.two])))
    from transformers import AutoModelForSequenceClassification
    from fisher_nodes import mask_fisher
    from fisher_nodes.engine.files import write_record
    with tempfile.TemporaryDirectory() as d:
        folders, base = {}, None
        for t, o in zip('ab', (args.one, args.two)):
            model = AutoModelForSequenceClassification.from_pretrained(o)
            gen = torch.Generator().manual_seed(ord(t))
            ids = torch.randint(1000, 20000, (16, 24), generator=gen)
            batch = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=torch.arange(16)%model.num_labels)
            folders[t] = copied(o, Path(d)/t, mask_fisher(model, [batch], **QUIET), model.num_labels)
            base = base or with_head(args.base, folders[t], Path(d)/'base')
        models = {t: AutoModelForSequenceClassification.from_pretrained(o) for t, o in folders.items()}
        start = AutoModelForSequenceClassification.from_pretrained(base)
        fishers = {t: Path(o)/'mask-fisher.safetensors' for t, o in folders.items()}
        found = agreements(models, start, fishers, fishers)
        about = dict(models=[Path(args.one).name, Path(args.two).name], parameters=sum(p.numel() for p in body(start).values()),
                     libraries={o: version(o) for o in ('mergekit', 'sentence-transformers')}, rounds=args.rounds)
        write_record(args.out, agreement=found, cost=costs(base, list(folders.values()), args.rounds), **about)

if __name__=='__main__': main()
