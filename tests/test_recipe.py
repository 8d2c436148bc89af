"""A recipe does the same merge again, to the last byte, or says why not."""
import shutil
import warnings

import pytest
import yaml
from safetensors.torch import load_file, save_file

from fisher_nodes import Merged, mask_fisher, merge, read_recipe, run_recipe
from fisher_nodes.engine.models import load_model
from fisher_nodes.tasks.tasks import load_rows
from reference import tiny
from test_cli import save_model, save_rows

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    d = tmp_path_factory.mktemp('recipe')/'work'
    for i, t in enumerate('ab'):
        save_model(d/t, 2+i, seed=i)
        save_rows(d/f'{t}.csv', list(range(2+i))*4)
    save_model(d/'base', 2, seed=7)
    return d

@pytest.fixture
def here(made, tmp_path):
    shutil.copytree(made, tmp_path/'work')
    return tmp_path/'work'

def weights(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*.safetensors')}

def models(here): return {t: here/t for t in 'ab'}
def data(here): return {t: str(here/f'{t}.csv') for t in 'ab'}

CASES = dict(
    average=dict(method='average', weights=dict(a=1, b=.3)),
    data=dict(data=data, num_samples=6, seed=4),
    all_rows=dict(data=data, num_samples=None, labels='exact', max_length=8),
    released=dict(data=data, variant='released', num_samples=8),
    scheme=dict(data=data, scheme={'query': 'head', 'value': 'head'}, num_samples=4, max_length=dict(a=6, b=7)),
    regmean=dict(data=data, method='regmean', off_diagonal=.9, num_samples=8),
    heads=dict(data=data, method='average', refit_heads=.5, num_samples=12),
    masks_heads=dict(data=data, refit_heads=1., num_samples=12, labels='exact'),
    residual=dict(data=data, method='residual-regression', num_samples=12, seed=2),
    best=dict(data=data, method='best', refit_heads=.5, num_samples=12),
    ties=dict(method='ties', base=lambda here: here/'base'),
    dare=dict(method='dare', base=lambda here: here/'base', seed=5, density=.5))

def arguments(kw, here): return {k: v(here) if callable(v) else v for k, v in kw.items()}

@pytest.mark.parametrize('kw', CASES.values(), ids=CASES)
def test_repeats_to_the_last_byte(kw, here, tmp_path):
    merge(models(here), **arguments(kw, here), progress=False).save_pretrained(here/'out')
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='the merged weights differ')
        run_recipe(here/'out'/'recipe.yml', tmp_path/'deep'/'er'/'again', progress=False)
    again = tmp_path/'deep'/'er'/'again'
    assert weights(here/'out') and weights(again)==weights(here/'out')
    assert read_recipe(again/'recipe.yml')==read_recipe(here/'out'/'recipe.yml'), 'from another folder, the same sources'
    run_recipe(again/'recipe.yml', tmp_path/'thrice', progress=False)
    assert weights(tmp_path/'thrice')==weights(here/'out')

def test_fishers_from_files(here, tmp_path):
    for t in 'ab':
        mask_fisher(here/t, load_rows(here/f'{t}.csv', here/t)[0], num_samples=5, progress=False).save(here/f'{t}.safetensors')
    merge(models(here), {t: here/f'{t}.safetensors' for t in 'ab'}).save_pretrained(here/'out')
    run_recipe(here/'out'/'recipe.yml', tmp_path/'again')
    assert weights(tmp_path/'again')==weights(here/'out')

def test_a_spec_is_the_rows_it_names(here):
    rows = {t: load_rows(here/f'{t}.csv', here/t)[0] for t in 'ab'}
    a, b = (merge(models(here), data=o, num_samples=6, max_length=128, progress=False) for o in (data(here), rows))
    assert a.recipe['result']==b.recipe['result'] and b.recipe['data']==dict(a=None, b=None)

def test_the_project_can_be_moved(here, tmp_path):
    merge(models(here), data=data(here), num_samples=4, progress=False).save_pretrained(here/'out')
    moved = here.rename(tmp_path/'moved')
    run_recipe(moved/'out'/'recipe.yml', moved/'again', progress=False)
    assert weights(moved/'again')==weights(moved/'out')

def test_paths_are_seen_from_the_recipe_not_from_where_it_runs(here, tmp_path, monkeypatch):
    (tmp_path/'cwd').mkdir(); monkeypatch.chdir(tmp_path/'cwd')
    shutil.copytree(here/'b', 'a'); shutil.copy(here/'b.csv', 'a.csv')
    (here/'r.yml').write_text('models: {a: a, b: ./b}\ndata: {a: a.csv, b: b.csv}\nnum_samples: 4\n')
    run_recipe(here/'r.yml', 'out', progress=False)
    want = merge(models(here), data=data(here), num_samples=4, progress=False)
    assert Merged.from_pretrained('out').recipe['result']==want.recipe['result']

@pytest.mark.parametrize('part', ['body', 'head'])
@pytest.mark.parametrize('accept', [False, True])
def test_another_source_under_the_same_name(part, accept, here):
    merge(models(here), method='average').save_pretrained(here/'out')
    state = load_file(here/'b'/'model.safetensors')
    name = dict(body='bert.encoder.layer.0.output.dense.bias', head='classifier.bias')[part]
    state[name][0] += 1
    save_file(state, here/'b'/'model.safetensors', dict(format='pt'))
    if accept: assert len(Merged.from_pretrained(run_recipe(here/'out'/'recipe.yml', here/'again', accept_changes=True)))==2
    else:
        with pytest.raises(ValueError, match=f"the {part} of 'b'.* is not what it was"): run_recipe(here/'out'/'recipe.yml', here/'again')
        assert not (here/'again').exists()

def test_another_base_under_the_same_name(here):
    merge(models(here), method='ties', base=here/'base').save_pretrained(here/'out')
    save_model(here/'base', 2, seed=8)
    with pytest.raises(ValueError, match='the base .* is not what it was'): run_recipe(here/'out'/'recipe.yml', here/'again')

def test_other_rows_under_the_same_name_are_warned_of(here):
    merge(models(here), data=data(here), num_samples=4, progress=False).save_pretrained(here/'out')
    save_rows(here/'a.csv', [1, 0, 0]*5)
    with pytest.warns(UserWarning, match='the merged weights differ from those of recipe.yml'): run_recipe(here/'out'/'recipe.yml', here/'again', progress=False)

NAMELESS = dict(
    model=(lambda here: dict(models=dict(a=tiny(vocab=12, positions=512), b=tiny(vocab=12, positions=512, seed=1)), method='average'), '`models` of \'a\', `models` of \'b\''),
    rows=(lambda here: dict(models=models(here), data=dict(a=data(here)['a'], b=[dict(input_ids=[[5, 6]], attention_mask=[[1, 1]], labels=[0])]), labels='empirical'), "`data` of 'b'"),
    base=(lambda here: dict(models=models(here), method='ties', base=tiny(vocab=12, positions=512)), '`base`'))

def as_batches(kw):
    import torch
    for t, o in (kw.get('data') or {}).items():
        if isinstance(o, list): kw['data'][t] = [{k: torch.tensor(v) for k, v in b.items()} for b in o]
    return kw

@pytest.mark.parametrize('make,words', NAMELESS.values(), ids=NAMELESS)
def test_what_has_no_name_is_said_and_refused(make, words, here):
    kw = as_batches(make(here))
    merge(kw.pop('models'), **kw, progress=False).save_pretrained(here/'out')
    text = (here/'out'/'recipe.yml').read_text()
    assert 'null  # in memory' in text and words in (here/'out'/'README.md').read_text()
    with pytest.raises(ValueError) as e: run_recipe(here/'out'/'recipe.yml', here/'again')
    assert words in str(e.value) and 'no name' in str(e.value) and not (here/'again').exists()

def test_a_loss_of_your_own_has_no_name(here):
    from torch.nn.functional import cross_entropy
    def loss(model, batch): return cross_entropy(model(batch['input_ids'], batch['attention_mask']).logits, batch['labels'], reduction='none')
    merge(models(here), data=data(here), loss=loss, num_samples=4, progress=False).save_pretrained(here/'out')
    with pytest.raises(ValueError, match='no name for `loss`'): run_recipe(here/'out'/'recipe.yml', here/'again')

def test_a_name_can_be_written_in(here):
    merge({t: load_model(o) for t, o in models(here).items()}, method='average').save_pretrained(here/'out')
    recipe = yaml.safe_load((here/'out'/'recipe.yml').read_text())
    for t in 'ab': recipe['models'][t]['model'] = f'../{t}'
    (here/'out'/'mine.yml').write_text(yaml.safe_dump(recipe))
    run_recipe(here/'out'/'mine.yml', here/'again')
    assert weights(here/'again')==weights(here/'out')

def test_where_it_goes_is_looked_at_first(here):
    merge(models(here), method='average').save_pretrained(here/'out')
    for t in 'ab': shutil.rmtree(here/t); (here/t).mkdir()
    with pytest.raises(ValueError, match='is not empty'): run_recipe(here/'out'/'recipe.yml', here/'out')

two = 'models: {a: user/a, b: user/b}\n'
BAD = {
    'unknown key': (two+'methd: average', "no key 'methd'"), 'no models': ('seed: 1', '`models` is missing'), 'no mapping': ('models: [a]', '`models` must be a mapping'),
    'no task': ('models: {}', '`models` must be a mapping'), 'number for a task': ('models: {1: a}', 'must be a word, got 1'), 'number for a model': ('models: {a: 3}', "`models` of 'a'"),
    'unknown pin': ('models: {a: {model: x, sha: y}}', "`models` of 'a'"), 'pin without model': ('models: {a: {revision: y}}', "`models` of 'a'"),
    'method': (two+'method: soup', "`method` must be one of"), 'variant': (two+'variant: mine', '`variant`'), 'labels': (two+'labels: mine', '`labels`'),
    'precision': (two+'precision: fp8', '`precision`'), 'scheme type': (two+'scheme: 3', '`scheme`'), 'scheme name': (two+'data: {a: glue:rte, b: glue:rte}\nscheme: mine', 'mine'),
    'seed': (two+'seed: -1', '`seed`'), 'seed true': (two+'seed: true', '`seed`'), 'samples': (two+'num_samples: 0', '`num_samples`'), 'samples 1.5': (two+'num_samples: 1.5', '`num_samples`'),
    'weights missing': (two+'weights: {a: 1}', '`weights` must have an entry for each'), 'weights extra': (two+'weights: {a: 1, b: 1, c: 1}', '`weights`'),
    'weights negative': (two+'method: average\nweights: {a: 1, b: -1}', "`weights` of 'b'"), 'weights nan': (two+'weights: {a: 1, b: .nan}', "`weights` of 'b'"),
    'weights zero': (two+'method: average\nweights: {a: 0, b: 0}', 'all zero'), 'weights word': (two+'weights: {a: 1, b: one}', "`weights` of 'b'"),
    'glue': (two+'data: {a: glue:x, b: glue:rte}', "`data` of 'a'"), 'suffix': (two+'data: {a: x.txt, b: glue:rte}', "`data` of 'a'"), 'absent file': (two+'data: {a: x.csv, b: glue:rte}', 'x.csv is not there'),
    'absent folder': ('models: {a: ./x}\nmethod: average', "`models` of 'a'"), 'absent Fisher': (two+'fishers: {a: x, b: y}', "`fishers` of 'a'"),
    'needs data': (two, 'needs either'), 'both': (two+'data: {a: glue:rte, b: glue:rte}\nfishers: {a: ., b: .}', 'needs either'), 'no base': (two+'method: ties', 'needs `base`'),
    'useless base': (two+'method: average\nbase: user/c', 'takes no `base`'), 'option': (two+'method: average\noptions: {floor: 1}', 'floor'), 'options': (two+'options: 3', '`options`'),
    'length': (two+'max_length: long', '`max_length`'), 'length of': (two+'max_length: {a: 0}', "`max_length` of 'a'"), 'twice': (two+'seed: 1\nseed: 2', "'seed' stands twice"),
    'twice inside': ('models: {a: x, a: y}', "'a' stands twice"), 'no YAML': ('models: [', 'is not YAML'), 'no mapping at all': ('- a', 'not a recipe'), 'empty': ('', 'not a recipe'),
    'code': ('models: !!python/object/apply:os.system [ls]', 'is not YAML'), 'loss': (two+'loss: mine', '`loss`')}

@pytest.mark.parametrize('text,says', BAD.values(), ids=BAD)
def test_mistakes_are_named_before_anything_loads(text, says, tmp_path, monkeypatch):
    def load(*args, **kw): raise AssertionError('a model was loaded')
    monkeypatch.setattr('transformers.PreTrainedModel.from_pretrained', load)
    (tmp_path/'r.yml').write_text(text)
    with pytest.raises(ValueError) as e: run_recipe(tmp_path/'r.yml', tmp_path/'out')
    assert says in str(e.value) and 'r.yml' in str(e.value) and '\n' not in str(e.value), str(e.value)
    assert not (tmp_path/'out').exists()

def test_no_such_file(tmp_path):
    with pytest.raises(ValueError, match='is not a file'): read_recipe(tmp_path/'r.yml')

def test_a_recipe_on_the_hub_tells_no_path(here):
    merge(models(here), data=data(here), num_samples=4, progress=False).save_pretrained(here/'out', repo_id='me/two')
    assert str(here) not in (here/'out'/'recipe.yml').read_text() and '../' not in (here/'out'/'recipe.yml').read_text()
    with pytest.raises(ValueError, match="no name for `models` of 'a'"): run_recipe(here/'out'/'recipe.yml', here/'again')
