"""Every write, cut off before each of its file operations: killed, interrupted, out of space. Nothing may be lost.

    python tests/faults/kills.py --out FILE [--stride N] [--cases NAME …] [--ways WAY …]

A process that has everything imported is forked for each trial. In the child an audit hook counts the operations on
files, and the n-th does not happen: the process is killed there, or an exception is raised. Then the parent looks:
inputs and other people's files are as they were, an old or a new result is whole, at once or once the folder is put
right, and the same command, run again, completes."""
import argparse
import errno
import hashlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from unittest import mock

os.environ.update(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', HF_HUB_DISABLE_PROGRESS_BARS='1')
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import safetensors.torch
import torch
from datasets import Dataset
from transformers.utils import logging

import fisher_nodes.tasks.finetuning as finetuning
from fisher_nodes import MaskFisher, Merged, merge, run_recipe
from fisher_nodes.engine.files import check_folder, write_record
from fisher_nodes.engine.models import load_model
from fisher_nodes.experiment.checkpoints import kept_record
from fisher_nodes.merging.run import merge_files
from fisher_nodes.merging.store import OpenFile
from reference import examples, tiny

WAYS = 'kill', 'interrupt', 'error', 'full'
MINE = {'notes.txt': 'years of work', '2024_Pooling/config.json': '{}', 'rte.safetensors': 'a Fisher, of another day'}


# --- what is cut off --------------------------------------------------------------------------

SPACE = {'open', 'os.mkdir', 'os.link', 'os.pwrite', 'os.fsync', 'written', 'serialize'} # need room on the disk

class Cut:
    "Counts operations on files below a folder; the n-th does not happen."
    def __init__(self, root, way, n): self.root, self.way, self.n, self.count, self.before, self.done = str(root), way, n, 0, '', False

    def __call__(self, event, path=None, half=None):
        if self.done: return
        self.count += 1
        if self.n is None or self.count < self.n or self.count > self.n and self.way != 'full': return
        if half and os.path.exists(half): os.truncate(half, os.path.getsize(half)//2)
        if self.way == 'kill': os.kill(os.getpid(), signal.SIGKILL)
        if self.way == 'interrupt': raise KeyboardInterrupt
        if self.way == 'error' or event in SPACE: raise OSError(errno.ENOSPC, f'No space left on device ({event})')

    def audit(self, event, args):
        if event == 'open':
            path, _, flags = args
            if not isinstance(path, (str, bytes)) or not flags & (os.O_WRONLY|os.O_RDWR|os.O_CREAT): return
            if os.fsdecode(path).startswith(self.root): self('open')
        elif event in ('os.rename', 'os.remove', 'os.rmdir', 'os.mkdir', 'os.link', 'os.chmod', 'os.truncate'): self(event)

    def install(self):
        sys.addaudithook(self.audit)
        def wrapped(owner, name, event):
            real = getattr(owner, name)
            def call(*args, **kw):
                self(event)
                return real(*args, **kw)
            setattr(owner, name, call)
        for name in ('fsync', 'pwrite'): wrapped(os, name, f'os.{name}')
        wrapped(OpenFile, 'write', 'written')
        real = safetensors.torch.serialize_file
        def serialize(tensors, filename, *args, **kw): # not Python's, so no audit hook sees it
            self('serialize')
            real(tensors, filename, *args, **kw)
            self('serialize', half=filename)
        safetensors.torch.serialize_file = serialize


# --- what is written --------------------------------------------------------------------------

def models(here): return {t: here/'in'/t for t in ('rte', 'sst2')}

def fishers(here): return {t: here/'in'/f'{t}.fisher.safetensors' for t in ('rte', 'sst2')}

def make_inputs(here):
    for i, (t, folder) in enumerate(models(here).items()): tiny(num_labels=2, seed=i, dtype=torch.float32).save_pretrained(folder)
    for i, f in enumerate(fishers(here).values()): fisher(i).save(f)
    merge(models(here), fishers(here), weights=[1, 3], progress=False).save_pretrained(here/'in'/'made')

def fisher(n): return MaskFisher(torch.full((2, 4), 1.+n), torch.full((2, 24), 2.+n), num_examples=n)

def save(here, weights, **kw): merge(models(here), fishers(here), weights=weights, progress=False).save_pretrained(here/'out', **kw)

def files(here, weights, **kw): merge_files(models(here), fishers(here), weights=weights, out=here/'out', threads=1, progress=False, **kw)

def tune(here, seed, **kw):
    with mock.patch.object(finetuning, 'train_model', lambda *args, **kw: [0.]): finetuning.finetune(here/'in'/'rte', Dataset.from_list(examples(4, 2)), out=here/'out', seed=seed, device='cpu', progress=False, **kw)

def repeat(here, **kw): run_recipe(here/'in'/'made'/'recipe.yml', here/'out', progress=False, **kw)

def merged_of(here): return Merged.from_pretrained(here/'out').recipe['weights']['sst2']

def tuned_of(here):
    load_model(here/'out')
    return json.loads((here/'out'/'finetune.json').read_text())['seed']

def fisher_of(here): return MaskFisher.load(here/'out'/'f.safetensors').num_examples

def record_of(here): return json.loads((here/'out'/'r.json').read_text())['n']

def save_fisher(here, n):
    (here/'out').mkdir(exist_ok=True)
    fisher(n).save(here/'out'/'f.safetensors')

CASES = dict( # what makes the older result, the command, what tells which result is there, and what it tells of a new one
    merge_new=(None, lambda o: save(o, [1, 2]), merged_of, 2),
    merge_overwrite=(lambda o: save(o, [1, 1]), lambda o: save(o, [1, 2], overwrite=True), merged_of, 2),
    files_new=(None, lambda o: files(o, [1, 2]), merged_of, 2),
    files_overwrite=(lambda o: files(o, [1, 1]), lambda o: files(o, [1, 2], overwrite=True, max_shard_size='20KB'), merged_of, 2),
    finetune_new=(None, lambda o: tune(o, 2), tuned_of, 2),
    finetune_overwrite=(lambda o: tune(o, 1), lambda o: tune(o, 2, overwrite=True), tuned_of, 2),
    finetune_glue=(None, lambda o: None if kept_record(o/'out', dict(seed=2)) else tune(o, 2), tuned_of, 2),
    finetune_over_merge=(lambda o: save(o, [1, 1]), lambda o: tune(o, 2, overwrite=True), lambda o: (tuned_of if (o/'out'/'finetune.json').exists() else merged_of)(o), 2),
    recipe_new=(None, lambda o: repeat(o), merged_of, 3),
    recipe_overwrite=(lambda o: save(o, [1, 1]), lambda o: repeat(o, overwrite=True), merged_of, 3),
    fisher=(lambda o: save_fisher(o, 1), lambda o: save_fisher(o, 2), fisher_of, 2),
    record=(lambda o: write_record(o/'out'/'r.json', n=1), lambda o: write_record(o/'out'/'r.json', n=2), record_of, 2))


# --- trials -----------------------------------------------------------------------------------

def in_child(run):
    "The exit status of a function in a forked process: 0, 1 after an exception, -9 when killed."
    sys.stdout.flush(); sys.stderr.flush()
    if (pid := os.fork()) == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        for o in () if os.environ.get('LOUD') else (1, 2): os.dup2(quiet, o)
        try: code = int(run() or 0)
        except BaseException as e:
            print(type(e).__name__, e, flush=True)
            code = 1
        os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)

def contents(folder): return {o.relative_to(folder).as_posix(): hashlib.sha256(o.read_bytes()).hexdigest() for o in sorted(folder.rglob('*')) if o.is_file()}

def found(case, here):
    "Which result is there: what `CASES` says of it, or None where none is whole."
    try: return CASES[case][2](here)
    except (ValueError, OSError): return None

def set_up(case, here):
    "Inputs, the older result if there is to be one, and what other people have in the same folder."
    make_inputs(here)
    old = CASES[case][0]
    if not old: return
    old(here)
    for n, text in MINE.items():
        (here/'out'/n).parent.mkdir(exist_ok=True)
        (here/'out'/n).write_text(text)

def trial(case, way, n, template, here):
    "One cut: what went wrong, and whether the command came as far as the n-th operation."
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(template, here)
    command, new, wrong = CASES[case][1], CASES[case][3], []
    old, inputs = found(case, here), contents(here/'in')
    def cut():
        hook = Cut(here, way, n)
        hook.install()
        try: command(here)
        except BaseException: # an error is told, and what was there before is there now
            hook.done = True
            return 3 if old is None or found(case, here) in (old, new) else 4
        return 0 if hook.count < n else 5
    code = in_child(cut)
    def look(when):
        if contents(here/'in') != inputs: wrong.append(f'inputs changed {when}')
        gone = [o for o, text in MINE.items() if old is not None and not ((here/'out'/o).is_file() and (here/'out'/o).read_text() == text)]
        if gone: wrong.append(f'{gone} of others deleted {when}')
    look('by the cut')
    if code == 4: wrong.append('result lost at an error')
    if found(case, here) not in (old, new) and old is not None:
        shutil.copytree(here/'out', here/'copy')
        (here/'copy').rename(here/'away'), (here/'out').rename(here/'broken'), (here/'away').rename(here/'out')
        check_folder(here/'out', True)
        if found(case, here) not in (old, new): wrong.append('result lost')
        shutil.rmtree(here/'out'), (here/'broken').rename(here/'out')
    if code == 5: wrong += [] if found(case, here) == new else ['completed without a result'] # there is another way, such as a copy for a link
    elif code:
        if in_child(lambda: command(here)): wrong.append('run again, refused')
        elif found(case, here) != new: wrong.append('run again, no new result')
        hidden = [o.name for o in (here/'out').iterdir() if o.name.startswith('.')]
        if hidden: wrong.append(f'run again, {hidden} left')
        look('by the second run')
    return wrong, code != 0

def operations(case, template, here):
    "How many there are when nothing is cut off."
    shutil.copytree(template, here)
    told = here.with_name('count')
    def run():
        hook = Cut(here, 'kill', None)
        hook.install()
        CASES[case][1](here)
        hook.done = True
        told.write_text(str(hook.count))
    assert in_child(run) == 0, f'{case} fails by itself'
    return int(told.read_text())

def run_case(case, way, choose=lambda total: range(1, total+1), say=lambda *o: None):
    "Chosen operations of a case: counts, and what went wrong where."
    with tempfile.TemporaryDirectory() as d:
        template, here = Path(d).resolve()/'template', Path(d).resolve()/'work'
        set_up(case, here)
        here.rename(template)
        total = operations(case, template, here)
        chosen, wrong = list(choose(total)), {}
        for n in chosen:
            bad, reached = trial(case, way, n, template, here)
            if not reached: bad.append(f'operation {n} of {total} was not reached')
            if bad: wrong[n] = bad; say(case, way, n, bad)
    return dict(case=case, way=way, operations=total, trials=len(chosen), wrong=wrong)

KINDS = dict(lost='result lost', refused='run again', changed='inputs changed', deleted='of others deleted')

def summary(runs):
    "Counts over all trials."
    said = Counter(k for o in runs for bad in o['wrong'].values() for k, word in KINDS.items() if any(word in b for b in bad))
    return dict(trials=sum(o['trials'] for o in runs), **{k: said[k] for k in KINDS})

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', required=True)
    parser.add_argument('--stride', type=int, default=1)
    parser.add_argument('--cases', nargs='+', choices=CASES, default=list(CASES))
    parser.add_argument('--ways', nargs='+', choices=WAYS, default=list(WAYS))
    args, start, runs = parser.parse_args(), time.time(), []
    quiet()
    for case in args.cases:
        for way in args.ways:
            runs.append(run_case(case, way, lambda total: range(1, total+1, args.stride), lambda *o: print(*o, flush=True)))
            print(case, way, runs[-1]['trials'], f'{time.time()-start:.0f} s', flush=True)
    write_record(Path(args.out), **summary(runs), seconds=round(time.time()-start), runs=runs)
    print(json.dumps(summary(runs)))
    return int(any(o['wrong'] for o in runs))

def quiet():
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()

if __name__ == '__main__': sys.exit(main())
