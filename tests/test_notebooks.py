"""The package is what the notebooks export, the notebooks are clean, README.md is the index page, and the stub names what is public."""
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
NBS = ROOT/'nbs'
NOTEBOOKS = sorted(o for o in NBS.rglob('*.ipynb') if not re.search(r'(^|/)[_.]', o.relative_to(NBS).as_posix()))
BIN = Path(sys.executable).parent

def page(path): return path.relative_to(NBS).with_suffix('').as_posix()

each_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=page)

@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    "A copy of the project in which everything was exported and cleaned anew."
    new = tmp_path_factory.mktemp('copy')/'project'
    shutil.copytree(ROOT, new, ignore=shutil.ignore_patterns('.*', '_*[!y]', '*.egg-info'), symlinks=True)
    shutil.copytree(ROOT/'fisher_nodes', new/'fisher_nodes', dirs_exist_ok=True, ignore=shutil.ignore_patterns('__pycache__'))
    for o in (new/'fisher_nodes').rglob('[!_]*.py'): o.unlink() # a module whose notebook is gone is not written anew
    for tool in ('nbdev_export', 'nbdev_clean'):
        subprocess.run([BIN/tool], cwd=new, check=True, capture_output=True, env=os.environ | dict(PYTHONPATH=str(new)))
    return new

def differing(a, b, pattern):
    names = sorted({p.relative_to(d).as_posix() for d in (a, b) for p in d.rglob(pattern)})
    return [n for n in names if not ((a/n).exists() and (b/n).exists() and filecmp.cmp(a/n, b/n, shallow=False))]

def test_package_equals_notebooks(exported):
    assert differing(ROOT/'fisher_nodes', exported/'fisher_nodes', '*.py')==[], 'run `make export`'

def test_notebooks_are_clean(exported):
    assert differing(NBS, exported/'nbs', '*.ipynb')==[], 'run `make export`'

def test_stub_names_what_is_public():
    sys.path.insert(0, str(ROOT/'tools'))
    from make_stub import STUB, stub
    assert STUB.read_text(encoding='utf-8')==stub(), 'run `make export`'

def test_public_names_are_where_the_package_says():
    "The stub is right if they are."
    for module,names in fisher_nodes._PLACES.items():
        for name in names: assert getattr(fisher_nodes, name) is getattr(import_module(f'fisher_nodes.{module}'), name)

def test_the_package_is_installed_whole():
    "Every folder of modules is a package of the wheel, with the stub and the mark that it is typed."
    code = 'from setuptools import find_packages; print(*find_packages(include=["fisher_nodes", "fisher_nodes.*"]))'
    found = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert set(found)=={'.'.join(o.parent.relative_to(ROOT).parts) for o in (ROOT/'fisher_nodes').rglob('*.py')}
    assert (ROOT/'fisher_nodes'/'py.typed').exists()

def code_cells(path):
    return [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type']=='code']

@each_notebook
def test_no_cell_mixes_imports_with_code(path):
    "nbdev runs every cell that has an import when it builds the site."
    for source in code_cells(path):
        if 'nbdev_export()' in source: continue
        kinds = {isinstance(o, (ast.Import, ast.ImportFrom)) for o in ast.parse(re.sub(r'^[%!].*', '', source, flags=re.M)).body}
        assert len(kinds)<2, source

@each_notebook
def test_skeleton(path):
    "A title cell with only a name and a line, in the report with the word that folds code too; stable cell ids, no paths of somebody's machine."
    text = path.read_text(encoding='utf-8')
    cells = json.loads(text)['cells']
    more = '\n\n- code-fold: true' if page(path).startswith('report/') else ''
    assert re.fullmatch(r'# [\w ]+\n\n> [^\n]+'+more, ''.join(cells[0]['source']))
    assert len({c['id'] for c in cells})==len(cells)
    assert not re.search(r'/(home|root|work|Users|tmp)/', text)
    assert len(text)<2_000_000

# What a cell may end in that shows nothing. Whatever else is called there has an output.
SILENT = {'test_eq', 'assert_close', 'refused', 'same', 'check_labels', 'check_rows', 'load_methods', 'disable_progress_bars',
    '.disable_progress_bar', '.set_verbosity_error', '.setLevel', '.set_option', '.set_float32_matmul_precision', '.simplefilter',
    '.cleanup', '.chdir', '.save', '.save_pretrained', '.update'}

def name_of(call):
    if isinstance(call.func, ast.Attribute): return f'.{call.func.attr}'
    return call.func.id if isinstance(call.func, ast.Name) else 'a call'

def run_at_once(node):
    "A statement and what is in it, but for the bodies of functions and what is printed elsewhere."
    if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)): return
    if isinstance(node, ast.With) and any('redirect_stdout' in ast.unparse(o) for o in node.items): return
    yield node
    for o in ast.iter_child_nodes(node): yield from run_at_once(o)

def promised(source):
    "What a cell shows, as its source has it: a value at its end, a picture that has words or a caption, what it prints."
    body = ast.parse(re.sub(r'^[%!].*', '', source, flags=re.M)).body
    last = body[-1].value if body and isinstance(body[-1], ast.Expr) else None
    silent = last is None or isinstance(last, ast.Call) and name_of(last) in SILENT | {'print'}
    prints = any(isinstance(o, ast.Call) and ast.unparse(o.func)=='print' for node in body for o in run_at_once(node))
    return {k for k,v in dict(value=not silent, picture='#| fig-' in source, text=prints).items() if v}

def stored(outputs):
    "What of it is there; a picture is a value too, and so is text that something else printed."
    kinds = {k for o in outputs for k in o.get('data', {})}
    text = any(o.get('name')=='stdout' for o in outputs)
    picture = any(k.startswith('image/') for k in kinds)
    return {k for k,v in dict(value=kinds or text, picture=picture, text=text).items() if v}

@each_notebook
def test_what_a_cell_shows_is_stored(path):
    "By its source, also where it is not run on every commit; `tools/run_notebooks.py --check` compares with what a run gives."
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        if cell['cell_type']!='code': continue
        source, outputs = ''.join(cell['source']), cell['outputs']
        assert not any(o.get('name')=='stderr' and '\r' in ''.join(o['text']) for o in outputs), source
        if 'nbdev_export()' in source or re.search(r'^#\| *eval: *false', source, re.M): continue
        assert promised(source)<=stored(outputs), f'run `make notebooks`: {source}'

@pytest.mark.parametrize('path', [o for o in NOTEBOOKS if page(o).startswith(('core/', 'methods/'))], ids=page)
def test_source_is_shown(path):
    "On the pages of the method the reader sees what is exported; imports aside."
    hidden = []
    for source in code_cells(path):
        if not re.search(r'^#\| *(export|exporti)$', source, re.M): continue
        if any(not isinstance(o, (ast.Import, ast.ImportFrom)) for o in ast.parse(source).body): hidden.append(source[:100])
    assert hidden==[], 'flag these cells `#| exports`'

def test_lines_fit_a_page():
    "What is exported is held to it by ruff; a reader's cells are no wider."
    lines = {page(o): [line for source in code_cells(o) for line in source.splitlines()] for o in NOTEBOOKS}
    wide = {o: sum(len(line)>110 and not line.startswith('#|') for line in found) for o,found in lines.items()}
    assert {o: n for o,n in wide.items() if n}=={}

def test_page_names_are_unique_in_their_folder():
    "The number before a name orders pages, it does not tell them apart; nor do capital letters."
    names = [re.sub(r'[^/]*$', lambda m: re.sub(r'^\d+[a-z0-9]*_', '', m[0].lower()), page(o)) for o in NOTEBOOKS]
    assert sorted(names)==sorted(set(names))

def test_a_page_exports_the_module_of_its_name():
    "One notebook, one module, one page: core/01_nodes.ipynb is fisher_nodes.core.nodes."
    wrong = {}
    for path in NOTEBOOKS:
        found = [m[1] for s in code_cells(path) for m in re.finditer(r'^#\| *default_exp (\S+)', s, re.M)]
        named = re.sub(r'(^|/)\d+[a-z0-9]*_', r'\1', page(path)).replace('/', '.')
        if found not in ([], [named]): wrong[page(path)] = found
    assert wrong=={}

def test_links_in_the_readme_lead_somewhere():
    "From the root of the project, where GitHub and PyPI show it."
    sys.path.insert(0, str(ROOT/'tools'))
    from make_readme import moved
    text = '[a](core/00_families.ipynb#sec-x) ![b](images/b.png) [c](../LICENSE) [d](https://x.org/a) [e](#e) `[f](f)`'
    assert moved(text)=='[a](nbs/core/00_families.ipynb#sec-x) ![b](nbs/images/b.png) [c](LICENSE) [d](https://x.org/a) [e](#e) `[f](f)`'
    links = re.findall(r'\]\((?!https?:|#)([^)#]*)', (ROOT/'README.md').read_text(encoding='utf-8'))
    assert links and [o for o in links if not (ROOT/o).exists()]==[]

def test_readme_is_the_index_page():
    sys.path.insert(0, str(ROOT/'tools'))
    from make_readme import readme
    assert (ROOT/'README.md').read_text(encoding='utf-8')==readme(), 'run `make readme`'

def test_every_public_name_has_one_home():
    "Links in the pages find a name by itself."
    homes, package = {}, Path(fisher_nodes.__file__).parent
    for path in sorted(package.rglob('[!_]*.py')):
        module = '.'.join(path.relative_to(package.parent).with_suffix('').parts)
        for name in import_module(module).__all__: homes.setdefault(name, []).append(module)
    assert {k: v for k, v in homes.items() if len(v) > 1} == {}
