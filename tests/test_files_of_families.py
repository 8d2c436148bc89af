"""Files against names, for every family of the zoo: what merging reads from files is what transformers loads from them."""
import json
import warnings

import pytest
from conftest import THIRD
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file

import zoo
from fisher_nodes import Merged, merge, merge_files
from fisher_nodes.core.families import body_state
from fisher_nodes.engine.models import as_reference
from fisher_nodes.merging.skeletons import open_model
from test_families import made_up

QUIET = dict(progress=False)
APART = {'nomic_bert', 'gte', 'jina_embeddings_v3', 'mixtral', 'qwen3_moe', 'qwen3_moe-some', 'dinov2-gated'} # tensors in other pieces
RENAMED = {'esm', 'vit', 'deit', 'beit', 'dinov2', 'dinov3_vit', 'swin', 'audio-spectrogram-transformer'}
OLD = Version(transformers.__version__) < Version('5.20') # which converts less, and gpt-oss even where names are the same
if OLD: APART, RENAMED = APART-{'dinov2-gated'} | {'gpt_oss'}, set()
new_only = pytest.mark.skipif(OLD, reason=f'transformers {transformers.__version__} renames, ties and keeps buffers otherwise')
LAYOUTS = {(o[0], str(o[1]), zoo.case(n)[3]): n for n, o in reversed(zoo.ZOO.items())}
CASES = [n for n in zoo.ZOO if n in LAYOUTS.values()]
AUTO = [n for n in zoo.ZOO if zoo.case(n)[3].startswith('Auto')]

def kind(name): return zoo.ZOO[name][0]

def filled(model, seed):
    "Numbers by chance, float32."
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn(p.shape, generator=gen)*.2)
    return model.float().eval()

def classifier(name, seed, **more):
    if kind(name) not in zoo.CONFIG_MAPPING: pytest.skip(f'transformers {transformers.__version__} has no {kind(name)!r}')
    config = zoo.CONFIG_MAPPING[kind(name)](**zoo.ZOO[name][1] | dict(num_labels=3) | more)
    return filled(transformers.AutoModelForSequenceClassification.from_config(config), seed)

def saved(models, folder):
    for t, m in models.items(): m.save_pretrained(folder/t)
    return {t: folder/t for t in models}

def refused(name, match, call, *args, **kw):
    with pytest.raises(ValueError, match=match) as caught: call(*args, **kw)
    assert '\n' not in str(caught.value), name

def weights(folder): return {o.relative_to(folder).as_posix(): load_file(o) for o in folder.rglob('*.safetensors')}

def same(a, b):
    assert a.keys() == b.keys()
    for n in a: assert a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]), n

OTHERWISE = "files of family '{}' hold its tensors otherwise than the model does: .* use `merge`"


# --- what is read -----------------------------------------------------------------------------

def opened(folder, name): return open_model(as_reference(folder), getattr(transformers, zoo.case(name)[3]))

@pytest.mark.parametrize('name', AUTO)
def test_what_is_opened_is_what_is_loaded(name, tmp_path):
    model = zoo.build(name).float()
    model.save_pretrained(tmp_path/'a')
    others = set(dict(model.named_parameters()))-set(load_file(tmp_path/'a'/'model.safetensors'))
    assert bool(others) == (name in APART-{'gpt_oss'} or kind(name) in RENAMED)
    if name in APART:
        refused(name, OTHERWISE.format(kind(name)), opened, tmp_path/'a', name)
    else: same({n: o[...] for n, o in opened(tmp_path/'a', name).body.tensors.items()}, body_state(model))

@pytest.mark.parametrize('name', AUTO)
def test_files_with_the_names_of_the_model_are_opened(name, tmp_path):
    "As a merge writes them; transformers loads them too."
    model = zoo.build(name).float()
    model.save_pretrained(tmp_path/'a')
    tied = {n for n, _ in model.named_parameters(remove_duplicate=False)}-set(dict(model.named_parameters()))
    state = {n: t.contiguous() for n, t in model.state_dict().items() if n not in tied}
    save_file(state, tmp_path/'a'/'model.safetensors', dict(format='pt'))
    loaded = getattr(transformers, zoo.case(name)[3]).from_pretrained(tmp_path/'a')
    same(loaded.state_dict(), model.state_dict())
    if OLD and name == 'gpt_oss': return refused(name, OTHERWISE.format(name), opened, tmp_path/'a', name)
    same({n: o[...] for n, o in opened(tmp_path/'a', name).body.tensors.items()}, body_state(model))

@new_only
def test_a_tensor_under_two_names_that_become_one_is_refused(tmp_path):
    model = zoo.build('vit').float()
    model.save_pretrained(tmp_path/'a')
    file = tmp_path/'a'/'model.safetensors'
    found = load_file(file)
    old = 'encoder.layer.0.attention.attention.query.weight'
    save_file(found | {'layers.0.attention.q_proj.weight': found[old].clone()}, file, dict(format='pt'))
    refused('vit', f'has both .*{old}.*; which is meant', opened, tmp_path/'a', 'vit')


# --- what is written --------------------------------------------------------------------------

@pytest.mark.parametrize('name', THIRD(CASES, 1))
def test_merged_from_files_is_merged_in_memory_or_refused(name, tmp_path):
    models = {t: filled(zoo.build(name), i) for i, t in enumerate('ab')}
    folders, fishers = saved(models, tmp_path), {t: made_up(m, i) for i, (t, m) in enumerate(models.items())}
    given = folders, fishers
    if name in APART:
        refused(name, OTHERWISE.format(kind(name)), merge_files, *given, out=tmp_path/'out', **QUIET)
        assert not (tmp_path/'out').exists()
        return
    merge_files(*given, out=tmp_path/'out', **QUIET)
    merged = merge(*given, **QUIET)
    merged.save_pretrained(tmp_path/'want')
    want = weights(tmp_path/'want')
    assert want.keys() == weights(tmp_path/'out').keys()
    for o, found in weights(tmp_path/'out').items(): same(found, want[o])
    again = Merged.from_pretrained(tmp_path/'out')
    for t, m in merged.items(): same(again[t].state_dict(), m.state_dict())
    plain = type(models['b']).from_pretrained(tmp_path/'out'/'b')
    same(plain.state_dict(), merged['b'].state_dict())


# --- one tensor, two names --------------------------------------------------------------------

def writer(seed, tied): return filled(zoo.build('llama-tied' if tied else 'llama-writer'), seed)

def test_models_of_which_one_ties_are_refused():
    pair = dict(a=writer(0, True), b=writer(1, False))
    said = "model.embed_tokens.weight and lm_head.weight are one tensor in 'a', but two in 'b'"
    refused('llama', said, merge, pair, method='average', **QUIET)
    refused('llama', said, merge, dict(b=pair['b'], a=pair['a']), method='average', **QUIET)

def test_a_config_that_says_otherwise_is_not_believed():
    pair = dict(a=writer(0, True), b=writer(1, False))
    pair['b'].config.tie_word_embeddings = True
    refused('llama', 'are one tensor in', merge, pair, method='average', **QUIET)

@pytest.mark.parametrize('tied', [True, False])
def test_what_was_tied_is_tied_when_merged_saved_and_loaded(tied, tmp_path):
    models = {t: writer(i, tied) for i, t in enumerate('ab')}
    merged = merge(models, method='average', **QUIET)
    merged.save_pretrained(tmp_path/'m')
    for m in (merged['a'], Merged.from_pretrained(tmp_path/'m')['b'], transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'m'/'b')):
        assert (m.lm_head.weight is m.model.embed_tokens.weight) == tied
        mean = sum(o.lm_head.weight.detach() for o in models.values())/2
        assert torch.equal(m.lm_head.weight.detach(), mean)

@new_only
@pytest.mark.parametrize('equal', [True, False])
def test_files_with_both_names_of_one_tensor(equal, tmp_path):
    "transformers ties them if they are equal."
    model = writer(0, True)
    model.save_pretrained(tmp_path/'a')
    file = tmp_path/'a'/'model.safetensors'
    found = load_file(file)
    save_file(found | {'lm_head.weight': found['model.embed_tokens.weight']+(not equal)}, file, dict(format='pt'))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'a')
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == equal
    if equal: same({n: o[...] for n, o in opened(tmp_path/'a', 'llama-tied').body.tensors.items()}, body_state(loaded))
    else: refused('llama', 'other numbers in model.embed_tokens.weight than in lm_head.weight, which are one tensor by its config.json',
                  opened, tmp_path/'a', 'llama-tied')


# --- buffers ----------------------------------------------------------------------------------

def esm(seed): return classifier('esm', seed)

@new_only
def test_a_buffer_that_differs_is_refused_by_name(tmp_path):
    models = dict(a=esm(0), b=esm(1))
    models['b'].esm.rotary_embeddings.inv_freq[1] += .1
    said = "the buffer rotary_embeddings.inv_freq is not the same in 'a' and 'b'"
    refused('esm', said, merge, models, method='average', **QUIET)
    refused('esm', said, merge_files, saved(models, tmp_path), method='average', out=tmp_path/'out', **QUIET)
    assert not (tmp_path/'out').exists()

@new_only
def test_a_buffer_that_was_rounded_is_the_same():
    models = dict(a=esm(0), b=esm(1).bfloat16())
    merged = merge(models, method='average', **QUIET)
    assert torch.equal(merged.body.rotary_embeddings.inv_freq, models['a'].esm.rotary_embeddings.inv_freq)

def test_a_buffer_that_is_not_saved_is_not_looked_at():
    models = dict(a=classifier('llama', 0), b=classifier('llama', 1))
    models['b'].model.rotary_emb.inv_freq[1] += .1
    merged = merge(models, method='average', **QUIET)
    assert torch.equal(merged.body.rotary_emb.inv_freq, models['a'].model.rotary_emb.inv_freq)


# --- what stands beside -----------------------------------------------------------------------

BESIDE = {'preprocessor_config.json': '{"image_mean": [0.5, 0.4, 0.3]}\n', 'processor_config.json': '{ "audio": {"rate": 16000}}',
          'chat_template.jinja': '{% for m in messages %}{{ m }} ü\n{% endfor %}'}

def written(folder):
    found = {n: folder/n for n in (*BESIDE, 'generation_config.json')}
    return {n: o.read_text(encoding='utf-8') for n, o in found.items() if o.is_file()}

def with_files(folders, **change):
    for t, o in folders.items():
        for n, text in (BESIDE | change.get(t, {})).items(): (o/n).write_text(text, encoding='utf-8')
    return folders

@pytest.mark.parametrize('name', ['bert-classifier', 'layoutlmv3'])
def test_files_of_sources_are_carried_along(name, tmp_path):
    folders = with_files(saved({t: classifier(name, i) for i, t in enumerate('ab')}, tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        merged = merge(folders, method='average', **QUIET)
        merged.save_pretrained(tmp_path/'m')
        merge_files(folders, method='average', out=tmp_path/'f', **QUIET)
        Merged.from_pretrained(tmp_path/'m').save_pretrained(tmp_path/'again')
    for o in ('m', 'f', 'again'):
        for place in ('.', 'a', 'b'): assert written(tmp_path/o/place) == BESIDE
    assert written(tmp_path/'a') == BESIDE

def test_files_that_differ_are_those_of_the_first_with_a_word(tmp_path):
    other = {'preprocessor_config.json': '{"image_mean": [0.5, 0.5, 0.5]}'}
    folders = with_files(saved({t: classifier('bert', i) for i, t in enumerate('abc')}, tmp_path), b=other)
    (folders['c']/'preprocessor_config.json').unlink()
    said = "preprocessor_config.json is not the same in 'a' and 'b'; the merged body has that of 'a', and the folder of each task its own"
    for i, call in enumerate((lambda o: merge(folders, method='average', **QUIET).save_pretrained(o),
                              lambda o: merge_files(folders, method='average', out=o, **QUIET))):
        with pytest.warns(UserWarning, match=said): call(tmp_path/f'out{i}')
        for place in ('.', 'a', 'c'): assert written(tmp_path/f'out{i}'/place) == BESIDE
        assert written(tmp_path/f'out{i}'/'b') == BESIDE|other

def test_a_source_without_files_leaves_none(tmp_path):
    folders = saved({t: classifier('bert', i) for i, t in enumerate('ab')}, tmp_path)
    merge(folders, method='average', **QUIET).save_pretrained(tmp_path/'m')
    assert written(tmp_path/'m') == written(tmp_path/'m'/'a') == {} and 'beside' not in json.loads((tmp_path/'m'/'merge_report.json').read_text())

def test_how_a_model_writes_is_carried_along(tmp_path):
    models = {t: writer(i, True) for i, t in enumerate('ab')}
    for m in models.values(): m.generation_config.update(num_beams=3, top_k=7, do_sample=True)
    merge(models, method='average', **QUIET).save_pretrained(tmp_path/'m')
    for o in ('.', 'a', 'b'):
        assert transformers.GenerationConfig.from_pretrained(tmp_path/'m'/o).to_diff_dict() == models['a'].generation_config.to_diff_dict()
    assert Merged.from_pretrained(tmp_path/'m')['b'].generation_config.num_beams == 3
    models['b'].generation_config.num_beams = 4
    with pytest.warns(UserWarning, match="generation_config.json is not the same in 'a' and 'b'"): merged = merge(models, method='average', **QUIET)
    assert merged['b'].generation_config.num_beams == 3

def test_how_a_model_writes_is_opened_with_it(tmp_path):
    model = writer(0, True)
    model.generation_config.num_beams = 3
    model.save_pretrained(tmp_path/'a')
    assert opened(tmp_path/'a', 'llama-tied').model.generation_config.num_beams == 3

@pytest.mark.parametrize('beside,said', [({'a': {'../x': 'y'}}, "'../x' is not a file beside a model"), ({'..': {}}, "'..' is not a file beside a model"),
                                         ({'a': {'chat_template.jinja': 3}}, 'beside')])
def test_a_report_cannot_name_other_files(beside, said, tmp_path):
    merge(saved({t: classifier('bert', i) for i, t in enumerate('ab')}, tmp_path), method='average', **QUIET).save_pretrained(tmp_path/'m')
    report = tmp_path/'m'/'merge_report.json'
    report.write_text(json.dumps(json.loads(report.read_text()) | dict(beside=beside)))
    refused('bert', f'is not a merge report: .*{said}', Merged.from_pretrained, tmp_path/'m')

def test_a_file_that_is_no_json_is_named(tmp_path):
    folders = with_files(saved({t: classifier('bert', i) for i, t in enumerate('ab')}, tmp_path), b={'processor_config.json': '{'})
    refused('bert', 'b/processor_config.json is not JSON', merge, folders, method='average', **QUIET)
