"""What a reader sees on a page is typed as it is printed, in a fresh interpreter, in a folder with what `make demo` leaves. Nothing that the
page hides helps: a name that only a hidden cell defines is a NameError. `_demo` is the small one of tools/small_demo.py."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EVERY
from demo_case import needs_demo, put_demo, weights

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = sorted(o.stem for o in (ROOT/'nbs'/'tutorials').glob('[!_.]*.ipynb'))
LONG = {'01_two': 'merges and compares from Python and from a shell, minutes', '02_three': 'fine-tunes a third model and merges by eight methods, minutes', '06_language': 'trains four language models, minutes',
        '07_vision': 'trains three vision models, a minute'}
HIDDEN = re.compile(r'^#\| *(hide|echo: *false|eval: *false|slow|cuda|notest)\b', re.M)

def cells(path):
    return [(c['cell_type'], ''.join(c['source'])) for c in json.loads(path.read_text(encoding='utf-8'))['cells']]

def page(name): return ROOT/'nbs'/'tutorials'/f'{name}.ipynb'

def visible(path):
    "The code that a reader sees, cell by cell."
    found = [source for kind,source in cells(path) if kind=='code' and not HIDDEN.search(source) and 'nbdev_export()' not in source]
    return [re.sub(r'^#\|.*\n?', '', o, flags=re.M) for o in found]

# Runs cells one after another in one namespace, and shows what a cell ends in, as a notebook does.
TYPE = '''
import ast, json, sys
here = dict(__name__='__main__')
for source in json.loads(sys.stdin.read()):
    *body, last = ast.parse(source).body
    if not isinstance(last, ast.Expr): body, last = [*body, last], None
    exec(compile(ast.Module(body, []), source, 'exec'), here)
    if last: print(repr(eval(compile(ast.Expression(last.value), source, 'eval'), here)))
'''

def run(command, folder, **kwargs):
    env = os.environ | dict(PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}')
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, **kwargs)
    assert not done.returncode, f'{done.stdout[-2000:]}\n{done.stderr[-4000:]}'
    return done.stdout

def type_cells(sources, folder):
    return run([sys.executable, '-W', 'ignore', '-c', TYPE], folder, input=json.dumps(sources))

def type_shell(text, folder):
    "The shell blocks of a page that are about the demo's folder."
    blocks = [o for o in re.findall(r'```sh\n(.*?)```', text, re.S) if '_demo' in o and 'make demo' not in o]
    return [run(['bash', '-euc', o], folder) for o in blocks]

def test_a_hidden_name_is_missed(tmp_path):
    with pytest.raises(AssertionError, match="NameError: name 'here' is not defined"): type_cells(['a = 1', 'here/"a"'], tmp_path)

def test_what_is_typed_is_what_is_seen():
    "Each tutorial has visible cells, and hidden ones that are left out."
    for name in TUTORIALS:
        seen, all_cells = visible(page(name)), cells(page(name))
        assert len(seen)>3 and not any('nbdev' in o for o in seen)
        assert len(seen)<sum(kind=='code' for kind,_ in all_cells)

@pytest.mark.parametrize('name', TUTORIALS)
def test_every_name_is_defined_in_what_is_seen(name, tmp_path):
    "By ruff, without running: also where typing takes minutes."
    (tmp_path/'page.py').write_text('\n\n'.join(visible(page(name))), encoding='utf-8')
    run([sys.executable, '-m', 'ruff', 'check', '--isolated', '--select', 'F821,F822,F823,E9', 'page.py'], tmp_path)

def prose(name): return '\n\n'.join(source for kind,source in cells(page(name)) if kind=='markdown')

def typed(name):
    skip = pytest.mark.skipif(not EVERY, reason=f'{LONG.get(name)}; FISHER_NODES_EVERY=1 types it')
    about = '\n'.join(visible(page(name)))
    return pytest.param(name, marks=[*[needs_demo]*('_demo' in about or 'app.demo' in about), *[skip]*(name in LONG)])

@pytest.mark.parametrize('name', [typed(o) for o in TUTORIALS])
def test_a_tutorial_can_be_typed(name, tmp_path):
    "Its visible cells, and then the shell lines that are about the demo's folder."
    sources = visible(page(name))
    if '_demo' in '\n'.join(sources): put_demo(tmp_path)
    assert type_cells(sources, tmp_path)
    type_shell(prose(name), tmp_path)

@needs_demo
@pytest.mark.skipif(not EVERY, reason='merges by every method that there is, minutes; FISHER_NODES_EVERY=1 types it')
def test_the_readme_can_be_typed(tmp_path):
    "Its ten lines and the same from a shell, which give one merge, and its recipe the same again."
    put_demo(tmp_path)
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    lines = re.findall(r'```python\n(.*?)```', text, re.S)
    assert any('_demo' in o for o in lines)
    type_cells(lines, tmp_path)
    type_shell(text, tmp_path)
    assert weights(tmp_path/'_both')==weights(tmp_path/'_shell')==weights(tmp_path/'_again')
