"""Run notebooks top to bottom in a fresh interpreter each, and store their outputs.

python tools/run_notebooks.py [--slow] [nbs/core/01_nodes.ipynb ...]             # no name: all of them
python tools/run_notebooks.py --check [--workers 2] [nbs/core/01_nodes.ipynb ...] # write nothing, fail where a cell shows what is not stored

`--check` is `nbdev_test`, two notebooks at a time and each in a process of its own, which also compares which cells show a value, a picture or text with which have it stored.
Cells that carry a flag of `tst_flags` in settings.ini are left as they are, unless --slow lifts `slow`. Progress bars are not stored.
"""
import argparse
import copy
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import time
from functools import partial
from importlib import import_module
from pathlib import Path

os.environ['TQDM_DISABLE'] = '1' # tqdm reads it when it is imported

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import extract_directives


LONG = '01_two','02_three','06_language','07_vision' # tutorials that train, which a commit does not run


OFTEN = ('matplotlib.pyplot', 'seaborn', 'sklearn.metrics', 'scipy.stats', 'fastcore.test', 'nbdev.showdoc', 'nbdev.export', 'evaluate',
         *(f'transformers.models.{o}.modeling_{o}' for o in ('bert', 'roberta', 'llama')), 'transformers.trainer', 'torch._dynamo',
         'matplotlib_inline.backend_inline') # what notebooks import

def is_left_out(cell, skip:set)->bool:
    "Whether this cell is prose, exports the package, or is not for running."
    if cell.cell_type!='code' or 'nbdev_export(' in cell.source: return True
    found = extract_directives(copy.deepcopy(cell), lang='python')
    return found.get('eval:', [''])[0].lower()=='false' or bool(skip & found.keys())

def is_bar(output)->bool:
    "Whether this output is a progress bar: one that is asked for by name is drawn in spite of TQDM_DISABLE."
    text = ''.join(output.get('text', ''))
    return output.get('name')=='stderr' and bool(re.search(r'\r|\d%\|', text))

def run(path:Path, skip:set):
    "Run one notebook in its own folder; nothing is written if a cell fails."
    nb = read_nb(path)
    for c in nb.cells:
        if not is_left_out(c, skip): c.outputs = [] # what prints nothing has none
    with working_directory(path.parent): CaptureShell(path).run_all(nb, exc_stop=True, preproc=lambda c: is_left_out(c, skip))
    for c in nb.cells:
        if c.cell_type=='code': c.outputs = [o for o in c.outputs if not is_bar(o)]
    write_nb(nb, path)

def shown(outputs)->set[str]: # of `value`, `picture` and `text`
    "What kinds of things a cell shows; warnings and progress bars aside."
    kinds = {k for o in outputs for k in o.get('data', {})}
    text = any(o.get('name')=='stdout' and ''.join(o.get('text', '')).strip() for o in outputs)
    found = dict(value=kinds, picture=any(k.startswith('image/') for k in kinds), text=text)
    return {k for k,v in found.items() if v}

def check(path:Path, skip:set)->bool: # whether all is well
    "Run one notebook, and compare what its cells show with what is stored; says what is wrong."
    nb, shell, start = read_nb(path), CaptureShell(path), time.time()
    stored = {c.id: shown(c.outputs) for c in nb.cells if not is_left_out(c, skip)}
    try:
        with working_directory(path.parent): shell.run_all(nb, exc_stop=True, preproc=lambda c: is_left_out(c, skip))
    except Exception: # of a cell
        print(shell.prettytb(fname=path), file=sys.stderr)
        return False
    wrong = [c for c in nb.cells if c.id in stored and shown(c.outputs)!=stored[c.id]]
    for c in wrong:
        has, should = [sorted(o) or 'nothing' for o in (stored[c.id], shown(c.outputs))]
        print(f'{path}: cell {c.id} shows {should}, stored is {has}; run `make notebooks`:\n{c.source}\n', file=sys.stderr)
    print(f'{path.name}: {time.time()-start:.0f} s', flush=True)
    return not wrong

def check_all(files:list, skip:set, workers:int)->list[bool]:
    "Check each notebook in a process of its own: what one registers, such as a statistic of its own class, no other may see."
    from run_notebooks import check as task # by a name that a process still knows when a notebook has become its `__main__`
    import fisher_nodes
    ours = [o.name for o in pkgutil.walk_packages(fisher_nodes.__path__, 'fisher_nodes.') if not o.ispkg]
    for o in (*ours, *OFTEN): import_module(o) # once, before they fork
    how = multiprocessing.get_context('fork' if 'fork' in multiprocessing.get_all_start_methods() else 'spawn')
    with how.Pool(min(workers, len(files)), maxtasksperchild=1) as pool: return pool.map(partial(task, skip=skip), files, chunksize=1)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('notebooks', nargs='*', type=Path)
    parser.add_argument('--slow', action='store_true', help='run cells flagged `slow` too')
    parser.add_argument('--check', action='store_true', help='write nothing; fail where a cell fails or shows what is not stored')
    parser.add_argument('--workers', type=int, default=2, help='notebooks that are checked at a time')
    args = parser.parse_args()
    cfg = get_config()
    skip = set(cfg.tst_flags.split()) - ({'slow'} if args.slow else set())
    files = args.notebooks or sorted(nbglob(as_path=True)) # in all folders
    if args.check and not args.notebooks and not os.environ.get('FISHER_NODES_EVERY'):
        print(f'left for FISHER_NODES_EVERY=1, since they take minutes: {", ".join(LONG)}', flush=True)
        files = [o for o in files if o.stem not in LONG]
    if args.check:
        os.environ.setdefault('HF_HUB_OFFLINE', '1') # names that are not there are not asked for again and again
        os.environ.setdefault('OMP_NUM_THREADS', '1') # of each worker, and of what it starts: two that share two cores are slower
        if all(check_all([o.absolute() for o in files], skip, args.workers)): return
        sys.exit('these notebooks failed, or show what is not stored')
    if len(files)==1: return run(files[0].absolute(), skip)
    for f in files:
        start = time.time()
        subprocess.run([sys.executable, __file__, str(f), *(['--slow'] if args.slow else [])], check=True, env=os.environ)
        print(f'{os.path.relpath(f, cfg.nbs_path)}: {time.time()-start:.0f} s', flush=True)

if __name__=='__main__': main()
