"""The package is what the notebooks export, the notebooks are clean, and README.md is the index page."""
import ast
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import fisher_nodes

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
BIN = Path(sys.executable).parent

@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    "A copy of the project in which everything was exported and cleaned anew."
    new = tmp_path_factory.mktemp('copy')/'project'
    shutil.copytree(ROOT, new, ignore=shutil.ignore_patterns('.*', '_*[!y]', '*.egg-info'), symlinks=True)
    shutil.copytree(ROOT/'fisher_nodes', new/'fisher_nodes', dirs_exist_ok=True, ignore=shutil.ignore_patterns('__pycache__'))
    for tool in ('nbdev_export', 'nbdev_clean'):
        subprocess.run([BIN/tool], cwd=new, check=True, capture_output=True, env=os.environ | dict(PYTHONPATH=str(new)))
    return new

def differing(a, b, pattern):
    names = sorted({p.name for d in (a, b) for p in d.glob(pattern)})
    return [n for n in names if not ((a/n).exists() and (b/n).exists() and filecmp.cmp(a/n, b/n, shallow=False))]

def test_package_equals_notebooks(exported):
    assert differing(ROOT/'fisher_nodes', exported/'fisher_nodes', '*.py')==[], 'run `make export`'

def test_notebooks_are_clean(exported):
    assert differing(ROOT/'nbs', exported/'nbs', '*.ipynb')==[], 'run `make export`'

def code_cells(path):
    return [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_no_cell_mixes_imports_with_code(path):
    "nbdev runs every cell that has an import when it builds the site."
    for source in code_cells(path):
        if 'nbdev_export()' in source: continue
        kinds = {isinstance(o, (ast.Import, ast.ImportFrom)) for o in ast.parse(re.sub(r'^[%!].*', '', source, flags=re.M)).body}
        assert len(kinds)<2, source

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_skeleton(path):
    "A title cell with only a name and a line, stable cell ids, no paths of somebody's machine."
    text = path.read_text(encoding='utf-8')
    cells = json.loads(text)['cells']
    assert re.fullmatch(r'# [\w ]+\n\n> [^\n]+', ''.join(cells[0]['source']))
    assert len({c['id'] for c in cells})==len(cells)
    assert not re.search(r'/(home|root|work|Users|tmp)/', text)
    assert len(text)<2_000_000

def test_readme_is_the_index_page():
    sys.path.insert(0, str(ROOT/'tools'))
    from make_readme import readme
    assert (ROOT/'README.md').read_text(encoding='utf-8')==readme(), 'run `make readme`'

def test_every_public_name_has_one_home():
    "Links in the pages find a name by itself."
    homes = {}
    for path in sorted(Path(fisher_nodes.__file__).parent.glob('[!_]*.py')):
        for name in import_module(f'fisher_nodes.{path.stem}').__all__: homes.setdefault(name, []).append(path.stem)
    assert {k: v for k, v in homes.items() if len(v) > 1} == {}
