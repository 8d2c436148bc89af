"""What is written comes back as it was, and plain `transformers` can read it."""
import json

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForSequenceClassification

from fisher_nodes import MaskFisher, Merged, mask_fisher, merge
from reference import body, ragged_batches, tiny
from test_masks_fisher import QUIET
from test_merge import make_fisher, make_fishers, make_models, hand, same_body

def inputs_of(family): return {k: v for k, v in ragged_batches(family, (5,))[0].items() if k != 'labels'}

def identical(a, b):
    assert a.keys() == b.keys()
    for k in a: assert_close(a[k], b[k], rtol=0, atol=0, msg=lambda m: f'{k}: {m}')

ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: .1}

def same_answers(a, b):
    "Logits of equal weights; older versions of torch may sum them in another order at another address."
    assert a.keys() == b.keys()
    for k in a: assert_close(a[k], b[k], rtol=ROUNDING[b[k].dtype], atol=ROUNDING[b[k].dtype]/100, msg=lambda m: f'{k}: {m}')

def realigned(*models):
    "Weights mapped from a file may start at odd addresses, which alone can move a last bit of a matrix product."
    for m in models:
        for p in m.parameters(): p.data = p.data.clone()
    return models[0]

def reload(folder):
    back = Merged.from_pretrained(folder)
    realigned(*back.values())
    return back


# --- MaskFisher -------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('kw', [{}, dict(variant='released'), dict(labels='exact', num_samples=4), dict(matrices='heads')], ids=str)
def test_mask_fisher(family, dtype, kw, tmp_path):
    fisher = mask_fisher(tiny(family, dtype=dtype), ragged_batches(family), **kw, **QUIET)
    fisher.save(tmp_path/'f.safetensors')
    back = MaskFisher.load(str(tmp_path/'f.safetensors'))
    assert vars(back).keys() == vars(fisher).keys() and back.meta == fisher.meta and back.num_examples == fisher.num_examples
    for k, v in vars(fisher).items():
        if isinstance(v, torch.Tensor): assert_close(vars(back)[k], v, rtol=0, atol=0)
    assert [p.name for p in tmp_path.iterdir()] == ['f.safetensors']
    with safe_open(tmp_path/'f.safetensors', 'pt') as f: assert {'heads', 'rows'} <= {k.split('.')[0] for k in f.keys()} and f.metadata()

def test_a_fisher_from_disk_merges_like_the_one_in_memory(family, tmp_path):
    models = make_models(family)
    fishers = {t: mask_fisher(m, ragged_batches(family, num_labels=2), **QUIET) for t, m in models.items()}
    for t, f in fishers.items(): f.save(tmp_path/t)
    loaded = {t: MaskFisher.load(tmp_path/t) for t in models}
    identical(merge(models, loaded).body.state_dict(), merge(models, fishers).body.state_dict())

def test_meta_keeps_its_types(tmp_path):
    meta = dict(text='ü"{}', n=3, x=.1, none=None, yes=True, deep=dict(list=[1, 2.5, 'a']))
    make_fisher(meta=meta).save(tmp_path/'f')
    assert MaskFisher.load(tmp_path/'f').meta == meta

@pytest.mark.parametrize('existing', [False, True])
def test_a_failed_save_leaves_the_folder_as_it_was(existing, tmp_path):
    path = tmp_path/'f.safetensors'
    if existing: make_fisher().save(path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises((TypeError, ValueError)): make_fisher(meta=dict(thing=object())).save(path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before

def test_saving_again_replaces(tmp_path):
    make_fisher(0).save(tmp_path/'f')
    make_fisher(1).save(tmp_path/'f')
    assert_close(MaskFisher.load(tmp_path/'f').rows, make_fisher(1).rows, rtol=0, atol=0)


# --- Merged -----------------------------------------------------------------------------------

@pytest.fixture(params=[torch.float32, torch.float64, torch.bfloat16], ids=str)
def dtype(request): return request.param

@pytest.fixture
def saved(family, dtype, tmp_path):
    models = make_models(family, 3, dtype=dtype)
    merged = merge(models, make_fishers(models, dtype=torch.float32))
    merged.save_pretrained(tmp_path/'out')
    return merged, tmp_path/'out'

def test_merged_comes_back_exactly(family, saved):
    merged, out = saved
    back = reload(out)
    assert list(back) == list(merged)
    identical(body(back['alpha']), merged.body.state_dict())
    same_answers(back.logits(**inputs_of(family)), merged.logits(**inputs_of(family)))
    for t in merged:
        assert back[t].base_model is back.body and not back[t].training
        identical(back[t].state_dict(), merged[t].state_dict())
    assert json.loads(json.dumps(back.report)) == json.loads(json.dumps(merged.report))

def test_plain_transformers_reads_every_task(family, dtype, saved):
    merged, out = saved
    for t in merged:
        model, info = AutoModelForSequenceClassification.from_pretrained(out/t, dtype=dtype, output_loading_info=True)
        assert not info['missing_keys'] and not info['unexpected_keys']
        assert type(model) is type(merged[t]) and model.config.num_labels == merged[t].config.num_labels
        identical(model.state_dict(), merged[t].state_dict())
        same_answers({t: realigned(model.eval())(**inputs_of(family)).logits}, {t: merged[t](**inputs_of(family)).logits})

def test_plain_transformers_reads_the_body(dtype, saved):
    merged, out = saved
    loaded = AutoModel.from_pretrained(out, dtype=dtype).state_dict()
    for k, v in merged.body.state_dict().items(): assert_close(loaded[k], v, rtol=0, atol=0)

def test_the_dtype_on_disk_is_the_models_own(dtype, saved):
    _, out = saved
    assert {p.dtype for m in Merged.from_pretrained(out).values() for p in m.parameters()} == {dtype}

def test_only_plain_files_on_disk(saved):
    _, out = saved
    files = [p for p in out.rglob('*') if p.is_file()]
    assert {p.suffix for p in files} <= {'.safetensors', '.json', '.md', '.yml'}, files
    assert (out/'README.md').exists() and {'alpha', 'beta', 'gamma'} == {p.name for p in out.iterdir() if p.is_dir()}

def test_the_folder_can_be_moved(family, saved, tmp_path):
    merged, out = saved
    moved = out.rename(tmp_path/'elsewhere')
    same_answers(reload(moved).logits(**inputs_of(family)), merged.logits(**inputs_of(family)))
    AutoModelForSequenceClassification.from_pretrained(moved/'beta')

def storages(models):
    return {s.data_ptr(): s.nbytes() for m in models for s in (p.untyped_storage() for p in m.parameters())}

def test_one_body_in_memory(family, saved):
    merged, out = saved
    for m in (merged, Merged.from_pretrained(out)):
        heads = sum(p.nbytes for t in m.values() for n, p in t.named_parameters() if not n.startswith(t.base_model_prefix))
        assert sum(storages(m.values()).values()) == heads + sum(p.nbytes for p in m.body.parameters())

def test_a_reloaded_merge_can_be_merged_again(family, tmp_path):
    models = make_models(family, 3)
    merge({t: models[t] for t in ('alpha', 'beta')}, method='average').save_pretrained(tmp_path/'pair')
    pair = Merged.from_pretrained(tmp_path/'pair')
    again = dict(alpha=pair['alpha'], gamma=models['gamma'])
    fishers = make_fishers(again)
    same_body(merge(again, fishers), hand(again, fishers))
    from_disk = dict(alpha=tmp_path/'pair'/'alpha', beta=str(tmp_path/'pair'/'beta'))
    same_body(merge(from_disk, method='average'), body(pair['alpha']), rtol=1e-14)
    same_body(merge(pair, method='average'), body(pair['alpha']), rtol=1e-14)

def test_what_is_saved_does_not_follow_later_changes(family, tmp_path):
    merged = merge(make_models(family), method='average')
    merged.save_pretrained(tmp_path/'out')
    with torch.no_grad():
        want = merged.logits(**inputs_of(family))
        for p in merged.body.parameters(): p.zero_()
    same_answers(reload(tmp_path/'out').logits(**inputs_of(family)), want)

@pytest.mark.parametrize('overwrite', [False, True])
def test_a_folder_in_use_is_replaced_only_when_asked(family, overwrite, tmp_path):
    first, second = (merge(make_models(family, n), method='average') for n in (3, 2))
    first.save_pretrained(tmp_path/'out')
    if overwrite: second.save_pretrained(tmp_path/'out', overwrite=True)
    else:
        with pytest.raises(ValueError): second.save_pretrained(tmp_path/'out')
    back = Merged.from_pretrained(tmp_path/'out')
    assert list(back) == list(second if overwrite else first)
    identical(body(back['alpha']), (second if overwrite else first).body.state_dict())
