"""Run notebooks top to bottom in a fresh interpreter each, and store their outputs.

python tools/run_notebooks.py [--slow] [nbs/core/01_nodes.ipynb ...]     # no name: all of them

Cells that carry a flag of `tst_flags` in settings.ini are left as they are, unless --slow lifts `slow`. Progress bars are not stored.
"""
import argparse
import copy
import os
import re
import subprocess
import sys
import time
from pathlib import Path

os.environ['TQDM_DISABLE'] = '1' # tqdm reads it when it is imported

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.process import extract_directives


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

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('notebooks', nargs='*', type=Path)
    parser.add_argument('--slow', action='store_true', help='run cells flagged `slow` too')
    args = parser.parse_args()
    cfg = get_config()
    files = args.notebooks or sorted(nbglob(as_path=True)) # in all folders
    if len(files)==1: return run(files[0].absolute(), set(cfg.tst_flags.split()) - ({'slow'} if args.slow else set()))
    for f in files:
        start = time.time()
        subprocess.run([sys.executable, __file__, str(f), *(['--slow'] if args.slow else [])], check=True, env=os.environ)
        print(f'{os.path.relpath(f, cfg.nbs_path)}: {time.time()-start:.0f} s', flush=True)

if __name__=='__main__': main()
