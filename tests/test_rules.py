"""What a rule gives is looked at, whoever wrote it: numbers, in the parameter's shape and type, in memory of their own."""
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from fisher_nodes import METHODS, Rule, merge, merge_files, merge_method
from reference import tiny

@pytest.fixture
def models(): return {t: tiny(seed=i, dtype=torch.float32) for i, t in enumerate('ab')}

@pytest.fixture
def mine(request):
    "A registered method `mine` that combines as the test says."
    def register(combine):
        def mine_rule(job): return Rule(lambda name, tensors: combine(list(tensors)), dict.fromkeys(job.names, 'mine'))
        merge_method('mine')(mine_rule)
    yield register
    METHODS.pop('mine', None)

def both(models, folder):
    "The error of `merge`, and that of `merge_files`."
    for t, m in models.items(): m.save_pretrained(folder/t)
    with pytest.raises(ValueError) as a: merge(models, method='mine', progress=False)
    with pytest.raises(ValueError) as b: merge_files({t: folder/t for t in models}, method='mine', out=folder/'out', progress=False)
    assert not (folder/'out').exists()
    return str(a.value), str(b.value)

WRONG = {'a row': lambda ts: ts[0][:1], 'a number': lambda ts: ts[0].mean(), 'an axis more': lambda ts: ts[0][None], 'nothing': lambda ts: None,
         'bits': lambda ts: ts[0] > 0, 'whole numbers': lambda ts: ts[0].long(), 'numpy': lambda ts: ts[0].numpy()}

@pytest.mark.parametrize('how', WRONG)
def test_what_is_not_the_parameter_is_refused(mine, models, tmp_path, how):
    mine(WRONG[how])
    for said in both(models, tmp_path): assert 'the rule gave' in said and 'expected floating-point numbers of shape' in said and '\n' not in said

def test_a_wider_type_is_stored_as_the_models_have_it(mine, models, tmp_path):
    mine(lambda ts: torch.stack([t.double() for t in ts]).mean(0))
    for t, m in models.items(): m.save_pretrained(tmp_path/t)
    merge({t: tmp_path/t for t in models}, method='mine', progress=False).save_pretrained(tmp_path/'memory')
    merge_files({t: tmp_path/t for t in models}, method='mine', out=tmp_path/'files', progress=False)
    a, b = (load_file(tmp_path/o/'model.safetensors') for o in ('memory', 'files'))
    assert all(t.dtype == torch.float32 and torch.equal(t, b[n]) for n, t in a.items())
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path/'memory'/'a').dtype == torch.float32

def test_the_result_shares_no_memory_with_a_model(mine, models):
    mine(lambda ts: ts[0])
    merged = merge(models, method='mine', progress=False)
    before = models['a'].base_model.embeddings.word_embeddings.weight.clone()
    with torch.no_grad(): merged.body.embeddings.word_embeddings.weight.mul_(2)
    assert torch.equal(models['a'].base_model.embeddings.word_embeddings.weight, before)

def no_job(model): return None
def no_default(job, a:float): return None
def no_type(job, a=1.): return None
def taken_word(job, seed:int=0): return None

@pytest.mark.parametrize('f,say', [(no_job, 'must be `job`'), (no_default, 'needs a type and a default'), (no_type, 'needs a type and a default'),
                                   (taken_word, "cannot have an option 'seed'")], ids=['job', 'default', 'type', 'word'])
def test_what_cannot_be_a_method_is_not_registered(f, say):
    with pytest.raises(ValueError, match=say): merge_method('mine')(f)
    assert 'mine' not in METHODS

def test_another_function_does_not_take_a_name():
    def ties_rule(job): "Something else."
    with pytest.raises(ValueError, match="there is a method 'ties' already"): merge_method('ties')(ties_rule)

def test_an_option_is_given_once(models):
    base = tiny(seed=9, dtype=torch.float32)
    for kw, say in ((dict(options=dict(variant='released')), 'stands beside `options`'), (dict(density=.1, options=dict(density=.9)), "'density' is given twice")):
        with pytest.raises(ValueError, match=say): merge(models, method='ties' if 'density' in kw else 'mask-fisher', base=base if 'density' in kw else None, **kw)

@pytest.mark.parametrize('kw', [dict(data={}), dict(num_samples=3), dict(labels='exact'), dict(result='x')], ids=lambda k: next(iter(k)))
def test_files_measure_nothing(tmp_path, kw):
    with pytest.raises(ValueError, match='`merge_files` measures nothing; it takes no'): merge_files(dict(a='x', b='y'), method='average', out=tmp_path/'o', **kw)

def test_files_of_several_types_load_as_transformers_says(models, tmp_path):
    "No type in the config, and embeddings in another than the rest."
    import json
    from safetensors.torch import save_file
    for t, m in models.items():
        m.save_pretrained(tmp_path/t)
        state = load_file(tmp_path/t/'model.safetensors')
        save_file({n: v.bfloat16() if 'embeddings' in n else v for n, v in state.items()}, tmp_path/t/'model.safetensors', dict(format='pt'))
        config = json.loads((tmp_path/t/'config.json').read_text())
        (tmp_path/t/'config.json').write_text(json.dumps({k: v for k, v in config.items() if k not in ('dtype', 'torch_dtype')}))
    folders = {t: tmp_path/t for t in models}
    merge(folders, method='average', progress=False).save_pretrained(tmp_path/'memory')
    merge_files(folders, method='average', out=tmp_path/'files', progress=False)
    assert (tmp_path/'memory'/'model.safetensors').read_bytes() == (tmp_path/'files'/'model.safetensors').read_bytes()
