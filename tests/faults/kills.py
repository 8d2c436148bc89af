"""Every write, cut off before each of its file operations: killed, interrupted, out of space. Nothing may be lost.

    python tests/faults/kills.py --out FILE [--stride N] [--cases NAME …] [--ways WAY …] [--add]

A process that has everything imported is forked for each trial. In the child an audit hook counts the operations on
files, and the n-th does not happen: the process is killed there, or an exception is raised. Then the parent looks:
inputs and other people's files are as they were, an old or a new result is whole, at once or once the folder is put
right, and the same command, run again, completes. With `--add` the cases of FILE that are not run now stay in it, each
with the commit that it was run at."""
import argparse
import errno
import gc
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

os.environ.update(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', TOKENIZERS_PARALLELISM='false', HF_HUB_DISABLE_PROGRESS_BARS='1')
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import safetensors.torch
import torch
from datasets import Dataset
from transformers.utils import logging

import fisher_nodes.engine.importance as importance
import fisher_nodes.experiment.bench as timing
import fisher_nodes.tasks.finetuning as finetuning
from fisher_nodes import MaskFisher, Merged, merge, run_recipe
from fisher_nodes.app.cli import main as shell_main
from fisher_nodes.engine.files import CONVERTED, check_folder, describe_file, find_commit, read_list, versions, write_record
from fisher_nodes.engine.models import load_model
from fisher_nodes.experiment.checkpoints import kept_record
from fisher_nodes.experiment.results import ERRORS, load_bench, load_errors, load_results
from fisher_nodes.merging.run import merge_files
from fisher_nodes.merging.store import OpenFile
from hostile import make_grid, put_results, results, tokenizer
from reference import examples, tiny

WAYS = 'kill', 'interrupt', 'error', 'full'
MINE = {'notes.txt': 'years of work', '2024_Pooling/config.json': '{}', 'rte.safetensors': 'a Fisher, of another day', 'report-for-the-boss.png': 'a picture',
        '.mine.lock': 'of another program'}


# --- what is cut off --------------------------------------------------------------------------

SPACE = {'open', 'os.mkdir', 'os.link', 'os.pwrite', 'os.fsync', 'written', 'serialize'} # need room on the disk

class Cut:
    "Counts operations on files below a folder; the n-th does not happen."
    def __init__(self, root, way, n, reads=False): self.root, self.way, self.n, self.reads, self.count, self.before, self.done = str(root), way, n, reads, 0, '', False

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
            if not isinstance(path, (str, bytes)) or not (self.reads or flags & (os.O_WRONLY|os.O_RDWR|os.O_CREAT)): return
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

# --- what commands write ----------------------------------------------------------------------

def shell(*line):
    "A command as it is typed; an error where it fails."
    said = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(said): status = shell_main([str(o) for o in line])
    if status: raise SystemExit(said.getvalue() or status)

def marked(n):
    "A model that can be told from others by its bias."
    model = tiny(num_labels=2, seed=n, dtype=torch.float32)
    model.classifier.bias.data[0] = n
    return model

def make_pickles(here):
    "Two checkpoints from before safetensors; the first has a file more, which must not stay beside the second."
    for n in (1, 2):
        folder, model = here/'in'/f'm{n}', marked(n)
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder/'pytorch_model.bin')
        tokenizer().save_pretrained(folder)
    (here/'in'/'m1'/'vocab.txt').write_text('[PAD]')

def convert(here, n, *more): shell('convert', here/'in'/f'm{n}', '--out', here/'out', *more)

def as_listed(out, record):
    "`ValueError` unless all files are there that a record lists, as it describes them, and no other of a model."
    files = read_list(out/record)
    if not all(describe_file(out/n).items() <= o.items() for n, o in files.items()): raise ValueError('not as listed')
    if (out/'vocab.txt').exists() and 'vocab.txt' not in files: raise ValueError('a file of the earlier one')

def converted_of(here):
    as_listed(here/'out', CONVERTED)
    n = int(load_model(here/'out').classifier.bias[0])
    if not json.loads((here/'out'/CONVERTED).read_text())['model'].endswith(f'm{n}'): raise ValueError('the record of another')
    return n

def make_adapters(here):
    "A base, and an adapter of it for each task."
    from peft import LoraConfig, get_peft_model
    base = here/'in'/'base'
    marked(1).save_pretrained(base)
    tokenizer().save_pretrained(base)
    for i, t in enumerate(('rte', 'sst2')):
        torch.manual_seed(i)
        model = get_peft_model(load_model(base), LoraConfig(task_type='SEQ_CLS', r=2, target_modules=['query'], init_lora_weights=False))
        model.save_pretrained(here/'in'/f'{t}')

def adapted(here, n, *more):
    shell('merge', f'rte={here}/in/rte', f'sst2={here}/in/sst2', '--method', 'average', '--weights', 'rte=1', f'sst2={n}', '--merge-adapters', '--out', here/'out', *more)

def adapted_saved(here, n): merge({t: here/'in'/t for t in ('rte', 'sst2')}, method='average', weights=[1, n], merge_adapters=True, progress=False).save_pretrained(here/'out', overwrite=True)

def make_rows(here):
    "Two models and rows for them; the name of a file of rows says which."
    for n in (1, 2):
        marked(n).save_pretrained(here/'in'/f'm{n}')
        tokenizer().save_pretrained(here/'in'/f'm{n}')
        (here/'in'/f'rows{n}.csv').write_text('sentence,label\n'+'w1 w2,0\nw3,1\n'*n)

def score(here, n, *more): shell('evaluate', here/'in'/'m1', '--data', here/'in'/f'rows{n}.csv', '--out', here/'out'/'o.json', *more)

def scored_of(here):
    found = json.loads((here/'out'/'o.json').read_text())
    (name,) = found['scores'].keys() & found['data'].keys()
    return int(name[4])

def measured(here, n, *more): shell('fisher', here/'in'/'m1', '--data', here/'in'/'rows2.csv', '--num-samples', n, '--out', here/'out'/'f.safetensors', *more)

def timed(f):
    "A benchmark with everything but the clock."
    def turns(calls, rounds, device): return {k: [1.]*(rounds+1) for k in calls}
    def run(*args):
        with mock.patch.object(timing, 'take_turns', turns), mock.patch.object(timing, 'peak_flops', lambda *o: 1.): f(*args)
    return run

@timed
def bench(here, n, *more): shell('bench', here/'in'/'m1', '--data', here/'in'/'rows2.csv', '--num-samples', n, '--out', here/'out'/'o.json', *more)

@timed
def shapes(here, n, *more):
    with redirect_stdout(io.StringIO()): timing.run_bench_shapes(['--shape', 'toy', '--num-samples', str(n), '--compiled', '--out', str(here/'out'/'o.json'), *more])

def timed_of(here): return int(load_bench(here/'out').num_examples[0])

def make_results(here):
    for n in (1, 2): put_results(here/'in'/f'r{n}', results(f'number {n}', 3-n))

def tell(here, n, *more): shell('report', here/'in'/f'r{n}', '--out', here/'out', *more)

def told_of(here):
    "Which results a page shows; `ValueError` unless its pictures are there, whole, and no other."
    text = (here/'out'/'report.md').read_text()
    named = set(re.findall(r'\]\((.+?\.png)\)', text))
    if named != {o.name for o in (here/'out').glob('*.png')}-{*MINE}: raise ValueError('other pictures')
    if not all((here/'out'/o).read_bytes().endswith(b'IEND\xaeB`\x82') for o in named): raise ValueError('half a picture')
    return int(text[len('# number '):].split()[0])

def grid(here, samples):
    with mock.patch.dict(os.environ, FISHER_NODES_GLUE=str(here/'in'/'glue')):
        shell('reproduce', '--checkpoints', here/'in'/'models', '--tasks', 'sst2,rte', '--methods', 'average,mask-fisher', '--samples', samples, '--out', here/'out')

def first_grid(here):
    "A run, what it found put away."
    grid(here, '2')
    shutil.copytree(here/'out', here/'in'/'kept')

def grid_of(here):
    "1 for a whole run, 2 for one with more samples; `ValueError` unless every file is whole and the older ones are as they were."
    out, kept = here/'out', here/'in'/'kept'
    for o in kept.rglob('*.*') if kept.exists() else ():
        if o.read_bytes() != (out/o.relative_to(kept)).read_bytes(): raise ValueError(f'{o.name} is another')
    for o in (out/'cache').glob('*.safetensors'): MaskFisher.load(o)
    there = set(load_results(out).num_samples.dropna())
    if 4 in there and (out/ERRORS).exists() and len(load_errors(out)) == 2: return 2
    return int(there >= {2}) or None

def make_pair(here):
    "Two models, a merge of them, and rows: files of the first kind are all of class 0, of the second of class 1."
    make_rows(here)
    for n in (1, 2): (here/'in'/f'all{n}.csv').write_text('sentence,label\n'+''.join(f'w{i} w{i+1},{n-1}\n' for i in range(8)))

COMPARED = {1: 'average', 2: 'regmean'}

def compared(here, n, *more):
    data = [f'{t}={here}/in/all1.csv' for t in 'ab']
    shell('compare', f'a={here}/in/m1', f'b={here}/in/m2', '--data', *data, '--methods', COMPARED[n], '--num-samples', 2, *more)

def winner(here, n, *more): compared(here, n, '--save', here/'out', *more)

def tabled(here, n, *more): compared(here, n, '--out', here/'out', *more)

def winner_of(here): return {v: k for k, v in COMPARED.items()}[Merged.from_pretrained(here/'out').recipe['method']]

def tabled_of(here):
    as_listed(here/'out', 'compare.json')
    return {v: k for k, v in COMPARED.items()}[json.loads((here/'out'/'compare.json').read_text())['winner']]

def carded(here, n):
    if not (here/'out').exists(): merge({t: here/'in'/f'm{i}' for t, i in zip('ab', (1, 2))}, method='average', progress=False).save_pretrained(here/'out')
    shell('evaluate', here/'out', '--alone', '--update-card', '--data', *[f'{t}={here}/in/all{n}.csv' for t in 'ab'])

def carded_of(here):
    "Which rows the scores are of; `ValueError` where the folder is not whole, or its card is of neither."
    found = Merged.from_pretrained(here/'out').report['scores']['a']['accuracy']
    as_listed(here/'out', 'merge_report.json')
    if not re.search(r'accuracy [01] ', (here/'out'/'README.md').read_text()): raise ValueError('no card with scores')
    return 1 if found == 1 else 2

def make_sealed(here):
    "Two models, a pair of keys, and a signed merge."
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric import ec
    make_inputs(here)
    key = ec.generate_private_key(ec.SECP256R1())
    (here/'in'/'key.pem').write_bytes(key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    (here/'in'/'key.pub').write_bytes(key.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    sealed(here, 1, to='in/signed')

def sealed(here, n, *more, to='out'):
    given = [f'{t}={o}' for t, o in models(here).items()]
    shell('merge', *given, '--fisher', *[f'{t}={o}' for t, o in fishers(here).items()], '--weights', 'rte=1', f'sst2={n}', '--bom', '--sign', here/'in'/'key.pem', '--out', here/to, *more)

def sealed_of(here):
    "`ValueError` unless list, bill and signature are of the merge that is there; what others have beside it was not signed."
    from model_signing import verifying
    from fisher_nodes.merging.bom import bom_differences
    out, n = here/'out', merged_of(here)
    as_listed(out, 'merge_report.json')
    if bom_differences(json.loads((out/'bom.cdx.json').read_text()), json.loads((out/'merge_report.json').read_text())): raise ValueError('the bill of another')
    verifying.Config().use_elliptic_key_verifier(public_key=here/'in'/'key.pub').set_ignore_unsigned_files(True).verify(out, out/'model.sig')
    return n

def verified(here):
    "A check, which writes nothing; what it said is written down here."
    shell('verify', here/'in'/'signed', '--key', here/'in'/'key.pub', '--inputs', here/'in')
    (here/'out').mkdir(exist_ok=True)
    (here/'out'/'said').write_text('2')

def verified_of(here): return int((here/'out'/'said').read_text() or 0)

def make_mergekit(here):
    "Two models, and two files of what is asked, with other weights."
    make_rows(here)
    for n in (1, 2):
        lines = [f'  - model: {here}/in/m{i}\n    parameters: {{weight: {w}}}' for i, w in ((1, 1), (2, n))]
        (here/'in'/f'{n}.yml').write_text('merge_method: linear\nmodels:\n'+'\n'.join(lines)+'\n')

def kitted(here, n, *more):
    with mock.patch.dict(os.environ, TQDM_DISABLE='1'): shell('mergekit', here/'in'/f'{n}.yml', here/'out', *more)

def kitted_of(here):
    as_listed(here/'out', 'mergekit.json')
    n = int(json.loads((here/'out'/'mergekit.json').read_text())['config'][0])
    if round(load_model(here/'out').classifier.bias[0].item(), 4) != round((1+2*n)/(1+n), 4): raise ValueError('the record of another')
    return n

class Shop:
    "Stands for the Hub: a commit is there whole or not at all, in a folder."
    def __init__(self, here): self.here = here
    def create_commit(self, name, parts, **kw):
        (self.here/'hub').mkdir(exist_ok=True)
        for o in parts: shutil.copyfile(o.path_or_fileobj, self.here/'hub'/'coming')
        os.replace(self.here/'hub'/'coming', self.here/'hub'/parts[0].path_in_repo)
        return mock.Mock(commit_url='commit')

def pushed(here, n, *more):
    with mock.patch.object(importance, 'HfApi', lambda **kw: Shop(here)), mock.patch.object(importance, 'find_repository', lambda api, name: name), \
            mock.patch.object(tempfile, 'tempdir', str(here)):
        measured(here, n, '--push-to', 'me/m1', *more)

def pushed_of(here):
    "What is here, once the same is there; else the older one."
    there = here/'hub'/'mask-fisher.safetensors'
    return min(fisher_of(here), MaskFisher.load(there).num_examples)

INPUTS = dict(sealed=make_sealed, verified=make_sealed, mergekit=make_mergekit, pushed=make_rows, winner=make_pair, tabled=make_pair, carded=make_pair, convert=make_pickles, adapters=make_adapters, evaluate=make_rows, measure=make_rows, bench=make_rows, shapes=make_rows, report=make_results, reproduce=lambda o: make_grid(o/'in'))

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
    record=(lambda o: write_record(o/'out'/'r.json', n=1), lambda o: write_record(o/'out'/'r.json', n=2), record_of, 2),
    convert_new=(None, lambda o: convert(o, 2), converted_of, 2),
    convert_overwrite=(lambda o: convert(o, 1), lambda o: convert(o, 2, '--overwrite'), converted_of, 2),
    adapters_new=(None, lambda o: adapted(o, 2), merged_of, 2),
    adapters_overwrite=(lambda o: adapted(o, 1), lambda o: adapted_saved(o, 2), merged_of, 2),
    report_new=(None, lambda o: tell(o, 2), told_of, 2),
    report_overwrite=(lambda o: tell(o, 1), lambda o: tell(o, 2, '--overwrite'), told_of, 2),
    evaluate_new=(None, lambda o: score(o, 2), scored_of, 2),
    evaluate_overwrite=(lambda o: score(o, 1), lambda o: score(o, 2, '--overwrite'), scored_of, 2),
    winner_new=(None, lambda o: winner(o, 2), winner_of, 2),
    winner_overwrite=(lambda o: winner(o, 1), lambda o: winner(o, 2, '--overwrite'), winner_of, 2),
    tabled_new=(None, lambda o: tabled(o, 2), tabled_of, 2),
    tabled_overwrite=(lambda o: tabled(o, 1), lambda o: tabled(o, 2, '--overwrite'), tabled_of, 2),
    carded_again=(lambda o: carded(o, 1), lambda o: carded(o, 2), carded_of, 2),
    sealed_new=(None, lambda o: sealed(o, 2), sealed_of, 2),
    sealed_overwrite=(lambda o: sealed(o, 1), lambda o: sealed(o, 2, '--overwrite'), sealed_of, 2),
    verified_reads=(None, verified, verified_of, 2),
    mergekit_new=(None, lambda o: kitted(o, 2), kitted_of, 2),
    mergekit_overwrite=(lambda o: kitted(o, 1), lambda o: kitted(o, 2, '--overwrite'), kitted_of, 2),
    pushed_new=(None, lambda o: pushed(o, 2), pushed_of, 2),
    pushed_overwrite=(lambda o: pushed(o, 1), lambda o: pushed(o, 2, '--overwrite'), pushed_of, 2),
    measure_new=(None, lambda o: measured(o, 2), fisher_of, 2),
    measure_overwrite=(lambda o: measured(o, 1), lambda o: measured(o, 2, '--overwrite'), fisher_of, 2),
    bench_new=(None, lambda o: bench(o, 2), timed_of, 2),
    bench_overwrite=(lambda o: bench(o, 1), lambda o: bench(o, 2, '--overwrite'), timed_of, 2),
    shapes_new=(None, lambda o: shapes(o, 2), timed_of, 2),
    shapes_again=(lambda o: shapes(o, 1), lambda o: shapes(o, 2), timed_of, 2),
    reproduce_new=(None, lambda o: grid(o, '2'), grid_of, 1),
    reproduce_more=(first_grid, lambda o: grid(o, '2,4'), grid_of, 2))

READS = {'verified_reads'} # what writes nothing is cut off at each file that it opens
NEEDS = dict(sealed='model_signing', verified='model_signing', mergekit='mergekit') # what `make plugins` installs

def can_run(case): return find_spec(NEEDS.get(case.partition('_')[0], 'torch')) is not None


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
    INPUTS.get(case.partition('_')[0], make_inputs)(here)
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
        hook = Cut(here, way, n, case in READS)
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
        hidden = [o.name for o in (here/'out').rglob('.*') if o.name not in MINE]
        if hidden: wrong.append(f'run again, {hidden} left')
        look('by the second run')
    return wrong, code != 0

def operations(case, template, here):
    "How many there are when nothing is cut off."
    shutil.copytree(template, here)
    CASES[case][1](here) # once in this process, so that no trial imports anything
    shutil.rmtree(here)
    shutil.copytree(template, here)
    told = here.with_name('count')
    def run():
        hook = Cut(here, 'kill', None, case in READS)
        hook.install()
        CASES[case][1](here)
        hook.done = True
        told.write_text(str(hook.count))
    assert in_child(run) == 0, f'{case} fails by itself'
    return int(told.read_text())

@contextmanager
def prepared(case):
    "What all trials of a case begin with, where they work, and how many operations there are."
    with tempfile.TemporaryDirectory() as d:
        template, here = Path(d).resolve()/'template', Path(d).resolve()/'work'
        set_up(case, here)
        here.rename(template)
        total = operations(case, template, here)
        gc.freeze() # or children copy what they only look at
        try: yield template, here, total
        finally: gc.unfreeze()

def run_way(case, way, ready, choose=lambda total: range(1, total+1), say=lambda *o: None):
    "Chosen operations of a prepared case: counts, and what went wrong where."
    template, here, total = ready
    chosen, wrong = list(choose(total)), {}
    for n in chosen:
        bad, reached = trial(case, way, n, template, here)
        if not reached: bad.append(f'operation {n} of {total} was not reached')
        if bad: wrong[n] = bad; say(case, way, n, bad)
    return dict(case=case, way=way, operations=total, trials=len(chosen), wrong=wrong, commit=find_commit())

def run_case(case, way, *args):
    with prepared(case) as ready: return run_way(case, way, ready, *args)

KINDS = dict(lost='result lost', refused='run again', changed='inputs changed', deleted='of others deleted')

def summary(runs):
    "Counts over all trials."
    said = Counter(k for o in runs for bad in o['wrong'].values() for k, word in KINDS.items() if any(word in b for b in bad))
    return dict(trials=sum(o['trials'] for o in runs), **{k: said[k] for k in KINDS})

def earlier(path, now):
    "The runs of a record that are not run now, each with its commit, and the seconds of all; `ValueError` for other versions."
    said = json.loads(path.read_text())
    if said['versions'] != versions(): raise ValueError(f'{path} has versions {said["versions"]}, here are {versions()}')
    return [o | dict(commit=o.get('commit', said['commit'])) for o in said['runs'] if (o['case'], o['way']) not in now], said['seconds']

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', required=True)
    parser.add_argument('--stride', type=int, default=1)
    parser.add_argument('--cases', nargs='+', choices=CASES, default=list(CASES))
    parser.add_argument('--ways', nargs='+', choices=WAYS, default=list(WAYS))
    parser.add_argument('--add', action='store_true', help='keep the other cases of FILE')
    args, start, runs = parser.parse_args(), time.time(), []
    quiet()
    for case in [o for o in args.cases if not can_run(o)]: print(f'{case} is left out: it needs {NEEDS[case.partition("_")[0]]}, see `make plugins`')
    for case in filter(can_run, args.cases):
        with prepared(case) as ready:
            for i, way in enumerate(args.ways):
                chosen = lambda total: range(1+i*args.stride//len(args.ways), total+1, args.stride) # each way begins elsewhere
                runs.append(run_way(case, way, ready, chosen, lambda *o: print(*o, flush=True)))
                print(case, way, runs[-1]['trials'], f'{time.time()-start:.0f} s', flush=True)
    kept, seconds = earlier(Path(args.out), {(o['case'], o['way']) for o in runs}) if args.add else ([], 0)
    write_record(Path(args.out), **summary(kept+runs), seconds=seconds+round(time.time()-start), runs=kept+runs)
    print(json.dumps(summary(kept+runs)))
    return int(any(o['wrong'] for o in runs))

def quiet():
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()

if __name__ == '__main__': sys.exit(main())
