"""A method of somebody else's, as tutorials/05_own_method has it: the same in Python, from a shell, from a package and in the grid."""
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).parent/'fixtures'))

from fisher_nodes import GLUE, METHODS, Merged, merge, merge_files, merge_method, read_recipe, reproduce, run_recipe
from fisher_nodes.app.cli import import_methods, main
from make import TASKS, write_checkpoints, write_glue

SOURCE = '''from typing import Annotated

import torch
from annotated_types import Ge, Le
from fisher_nodes import Job, Rule, merge_method

@merge_method('median')
def median(job:Job, strength:Annotated[float, Ge(0), Le(1)]=1)->Rule:
    "The middle one of every number over the models."
    def combine(name, tensors):
        stack = torch.stack(list(tensors))
        return stack.mean(0).lerp(stack.median(0).values, strength)
    return Rule(combine, dict.fromkeys(job.names, 'median'))
'''
MODELS = [f'{t}=checkpoints/{t}' for t in TASKS]
GRID = dict(tasks=TASKS, methods=['average', 'median', 'ties'], group_sizes=[2, 3])

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Three tiny checkpoints, made-up rows of their tasks, and the file with the method."
    d = tmp_path_factory.mktemp('own')
    write_glue(d/'glue', GLUE)
    write_checkpoints(d, GLUE)
    (d/'mine.py').write_text(SOURCE)
    return d

@pytest.fixture(autouse=True)
def inside(made, monkeypatch):
    "Names are seen from the folder; no test leaves a method behind."
    monkeypatch.chdir(made)
    monkeypatch.setenv('FISHER_NODES_GLUE', str(made/'glue'))
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)

@pytest.fixture
def median(made): import_methods([str(made/'mine.py')])

def paths(made): return {t: made/'checkpoints'/t for t in TASKS}
def weights(folder): return {o.relative_to(folder).as_posix(): o.read_bytes() for o in folder.rglob('*.safetensors')}

def shell(*words, **env):
    "In a process of its own, which knows no method but the package's."
    line = [sys.executable, '-c', 'import sys; from fisher_nodes.app.cli import main; sys.exit(main())', *map(str, words)]
    return subprocess.run(line, env=os.environ | env, capture_output=True, text=True)

@pytest.fixture(scope='module')
def want(made, tmp_path_factory):
    "What `merge` makes of it."
    before, out = dict(METHODS), tmp_path_factory.mktemp('want')/'merged'
    import_methods([str(made/'mine.py')])
    merge(paths(made), method='median', progress=False).save_pretrained(out)
    METHODS.clear()
    METHODS.update(before)
    return out

def test_it_is_the_median(made, want, median):
    bodies = [AutoModelForSequenceClassification.from_pretrained(o).base_model.state_dict() for o in paths(made).values()]
    got, mean = Merged.from_pretrained(want), merge(paths(made), method='median', strength=0, progress=False)
    for n, t in got.body.state_dict().items():
        if not t.is_floating_point(): continue
        stack = torch.stack([o[n] for o in bodies])
        assert_close(t, stack.sort(0).values[1], rtol=0, atol=0)
        assert_close(mean.body.state_dict()[n], stack.mean(0), rtol=0, atol=0)
    assert got.report['method']=='median' and {o['weight'] for o in got.report['roles'].values()}=={'median'}

def test_files(made, want, median, tmp_path):
    merge_files(paths(made), method='median', out=tmp_path/'out', progress=False)
    assert weights(want) and weights(tmp_path/'out')==weights(want)

def test_shell(want, tmp_path):
    done = shell('merge', *MODELS, '--method', 'median', '--import', 'mine.py', '--out', tmp_path/'out', '--json')
    assert done.returncode==0, done.stderr
    assert list(json.loads(done.stdout)['tasks'])==list(TASKS) and weights(tmp_path/'out')==weights(want)

def test_import_of_a_module(want, tmp_path, monkeypatch):
    (tmp_path/'module_with_median.py').write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(['merge', *MODELS, '--method', 'median', '--import', 'module_with_median', '--out', str(tmp_path/'out')])==0
    assert weights(tmp_path/'out')==weights(want)

def package(folder, name='median_merge', source=SOURCE):
    "What pip would have installed: a module, and the folder that says what its entry points are."
    about = folder/f'{name}-1.0.dist-info'
    about.mkdir(parents=True)
    (folder/f'{name}.py').write_text(source)
    (about/'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n')
    (about/'entry_points.txt').write_text(f'[fisher_nodes.methods]\nanything = {name}\n')
    return str(folder)

def test_entry_point(want, tmp_path):
    "Installed is enough, and help names it."
    path = package(tmp_path/'site')
    done = shell('merge', *MODELS, '--method', 'median', '--out', tmp_path/'out', PYTHONPATH=path)
    assert done.returncode==0, done.stderr
    assert weights(tmp_path/'out')==weights(want)
    assert 'median' in shell('merge', '--help', PYTHONPATH=path).stdout

def test_recipe_repeats_with_the_import(want, tmp_path):
    done = shell('merge', want/'recipe.yml', '--import', 'mine.py', '--out', tmp_path/'again')
    assert done.returncode==0 and 'differ' not in done.stderr, done.stderr
    assert weights(tmp_path/'again')==weights(want)

def test_recipe_without_the_import(want, tmp_path, capsys):
    assert main(['merge', str(want/'recipe.yml'), '--out', str(tmp_path/'again')])==2
    said = capsys.readouterr().err
    assert all(o in said for o in ('recipe.yml', '`method`', "'median'", "'average'"))
    assert said.count('\n')==1 and not (tmp_path/'again').exists()

def test_recipe_keeps_options(made, median, tmp_path):
    mixed = merge(paths(made), method='median', strength=.25, progress=False)
    mixed.save_pretrained(tmp_path/'out')
    assert read_recipe(tmp_path/'out'/'recipe.yml').options==dict(strength=.25)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='the merged weights differ')
        run_recipe(tmp_path/'out'/'recipe.yml', tmp_path/'again', progress=False)
    assert weights(tmp_path/'again')==weights(tmp_path/'out')
    assert main(['merge', *MODELS, '--method', 'median', '--options', 'strength=0.25', '--out', str(tmp_path/'shell')])==0
    assert weights(tmp_path/'shell')==weights(tmp_path/'out')

WRONG = {'strength=2': '`strength` is 2; expected a finite number of at most 1', 'strength=-1': 'of at least 0', 'strength=much': "'much'",
         'strength=NaN': 'a finite number', 'strenght=1': "takes no ['strenght']; its options are ['strength']; did you mean 'strength'?",
         'variant=released': 'released'}

@pytest.mark.parametrize('given,say', WRONG.items())
def test_wrong_option(given, say, made, median, tmp_path, capsys):
    name, _, text = given.partition('=')
    value = {'2': 2, '-1': -1, 'NaN': float('nan'), '1': 1}.get(text, text)
    for call in (merge, lambda *a, **k: merge_files(*a, out=tmp_path/'out', **k)):
        with pytest.raises(ValueError) as e: call(paths(made), method='median', progress=False, **{name: value})
        assert say in str(e.value)
    line = [f'--{name}', text] if name=='variant' else ['--options', given]
    assert main(['merge', *MODELS, '--method', 'median', *line, '--out', str(tmp_path/'out')])==2
    said = capsys.readouterr().err
    assert say in said and said.count('\n')==1 and not (tmp_path/'out').exists()

def test_what_it_does_not_take(made, median):
    with pytest.raises(ValueError, match='measures nothing'): merge(paths(made), data=dict.fromkeys(TASKS, 'glue:rte'), method='median')
    with pytest.raises(ValueError, match='takes no `base`'): merge(paths(made), base=made/'base', method='median')

@pytest.mark.parametrize('name', ['average', 'mask-fisher'])
def test_a_name_that_is_taken(name, made, tmp_path, capsys):
    before = METHODS[name]
    with pytest.raises(ValueError, match=f"there is a method '{name}' already"): merge_method(name)(lambda job: None)
    (tmp_path/'mine.py').write_text(SOURCE.replace("'median')\ndef", f"'{name}')\ndef"))
    assert main(['merge', *MODELS, '--method', name, '--import', str(tmp_path/'mine.py'), '--out', str(tmp_path/'out')])==2
    assert f'there is a method {name!r} already' in capsys.readouterr().err
    assert METHODS[name] is before and not (tmp_path/'out').exists()

def test_the_same_method_twice(made):
    "A cell that is run again, or a file that is named twice, is no clash."
    import_methods([str(made/'mine.py')]*2)
    assert METHODS['median'].options==dict(strength=1)

def test_a_file_that_is_not_there(tmp_path, capsys):
    assert main(['merge', *MODELS, '--method', 'median', '--import', 'gone.py', '--out', str(tmp_path/'out')])==2
    assert '--import: gone.py is not a file' in capsys.readouterr().err and not (tmp_path/'out').exists()

def scores(out): return {o.name: {g: v['scores'] for g, v in json.loads(o.read_text())['groups'].items()} for o in sorted(out.glob('*-k*.json'))}

def test_grid(made, median, tmp_path):
    "In Python and from a shell; each score is that of the merge."
    from fisher_nodes import evaluate, load_task
    from fisher_nodes.experiment.results import load_results
    out = reproduce(made/'checkpoints', tmp_path/'results', base=made/'base', **GRID)
    found = scores(out)
    assert set(found)=={f'{n}-k{k}.json' for n in GRID['methods'] for k in (2, 3)}
    merged = merge({t: paths(made)[t] for t in ('qnli', 'rte')}, method='median', progress=False)
    rows, task = load_task('glue:rte', 'validation')
    want = evaluate(merged['rte'], rows, task, tokenizer=merged.tokenizer, progress=False)
    assert found['median-k2.json']['qnli+rte']['rte']==want
    assert set(load_results(out)['name'])==set(GRID['methods'])
    done = shell('reproduce', '--checkpoints', 'checkpoints', '--tasks', ','.join(TASKS), '--methods', ','.join(GRID['methods']),
                 '--group-sizes', '2,3', '--base', 'base', '--import', 'mine.py', '--out', tmp_path/'shell')
    assert done.returncode==0, done.stderr
    assert scores(tmp_path/'shell')==found

def test_grid_without_the_import(tmp_path, capsys):
    assert main(['reproduce', '--checkpoints', 'checkpoints', '--methods', 'average,median', '--out', str(tmp_path/'out')])==2
    assert "unknown method 'median'; expected some of" in capsys.readouterr().err
