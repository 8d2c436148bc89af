"""`linear_grams` against one token after the other, from inputs worked out without a hook of the package."""
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from fisher_nodes.core.fisher import MaskFisher
from fisher_nodes.engine.measure import linear_grams
from fisher_nodes.methods.regmean import Grams
from fisher_nodes.methods.full_fisher import ParameterFisher
from reference import FAMILIES, collate, double, examples, logits, ragged_batches, single_rows, split, tiny
from test_masks_fisher import QUIET, to_dataset
from test_purity import MODES, breaking_data, unchanged, well_used

@contextmanager
def spied(model):
    "Linear layers of the body that note every input they see, by weight name."
    seen, before = {}, nn.Linear.forward
    names = {id(m): f'{k}.weight' for k, m in model.base_model.named_modules() if isinstance(m, nn.Linear)}
    def forward(self, x):
        if id(self) in names: seen.setdefault(names[id(self)], []).append(x.detach().clone())
        return before(self, x)
    nn.Linear.forward = forward
    try: yield seen
    finally: nn.Linear.forward = before

def truth(model, batches, strip=True):
    "The sum over an example's tokens of x·xᵀ, averaged over examples, in float64."
    model, sums, n = double(model), {}, 0
    for row in single_rows(batches, strip):
        n += 1
        with spied(model) as seen: logits(model, row)
        kept = row['attention_mask'][0].bool()
        for k, (x,) in seen.items():
            tokens = x[0][kept] if x.ndim == 3 else x
            sums[k] = sum((torch.outer(t, t) for t in tokens), sums.get(k, 0))
    return {k: v/n for k, v in sums.items()}

def same(values, want, rtol=1e-10):
    assert values.keys() == want.keys()
    for k, w in want.items(): assert_close(values[k].to(w), w, rtol=rtol, atol=0, msg=lambda m: f'{k}: {m}')

def norm_error(values, want): return max(((values[k].double()-w).norm()/w.norm()).item() for k, w in want.items())

def layers(family):
    "The weights that must be there."
    each = ('attention.self.query', 'attention.self.key', 'attention.self.value', 'attention.output.dense', 'intermediate.dense', 'output.dense')
    names = [f'encoder.layer.{i}.{o}.weight' for i in range(2) for o in each]
    return names + ['pooler.dense.weight']*(family == 'bert')

@pytest.mark.parametrize('attn', ['sdpa', 'eager'])
@pytest.mark.parametrize('sizes', [(3, 1, 4, 2), (10,), (1,)*10], ids=str)
def test_equals_brute_force(family, attn, sizes):
    model, batches = tiny(family, attn=attn), ragged_batches(family, sizes)
    grams = linear_grams(model, batches, **QUIET)
    same(grams.values, truth(model, batches))
    assert sorted(grams.values) == sorted(layers(family)) and grams.num_examples == 10
    assert all(v.dtype == torch.float64 and v.device.type == 'cpu' for v in grams.values.values())

@pytest.mark.parametrize('extra', [0, 7])
def test_padding_changes_nothing(family, extra):
    model = tiny(family)
    same(linear_grams(model, ragged_batches(family, extra=extra), **QUIET).values, truth(model, ragged_batches(family)))

def test_padding_taken_for_tokens_changes_every_layer_but_the_pooler(family):
    model, batches = tiny(family), ragged_batches(family)
    want, wrong = truth(model, batches), linear_grams(model, [{**b, 'attention_mask': torch.ones_like(b['attention_mask'])} for b in batches], **QUIET).values
    for k, w in want.items():
        if 'pooler' not in k: assert (wrong[k]-w).norm() > .1*w.norm(), k

def test_left_padding_is_used_as_given():
    model, batches = tiny('bert'), ragged_batches('bert', side='left')
    same(linear_grams(model, batches, **QUIET).values, truth(model, batches, strip=False))

@pytest.mark.parametrize('dtype', [torch.bool, torch.float64, torch.int32], ids=str)
def test_masks_of_other_types(family, dtype):
    model, batches = tiny(family), ragged_batches(family)
    given = [{**b, 'attention_mask': b['attention_mask'].to(dtype)} for b in batches]
    same(linear_grams(model, given, **QUIET).values, truth(model, batches))

def test_no_attention_mask_and_no_labels(family):
    model, batches = tiny(family), ragged_batches(family, lengths=(6,))
    same(linear_grams(model, [dict(input_ids=b['input_ids']) for b in batches], **QUIET).values, truth(model, batches))

def test_labels_are_not_read(family):
    model, batches = tiny(family), ragged_batches(family)
    odd = [{**b, 'labels': b['labels']+100} for b in batches]
    same(linear_grams(model, odd, **QUIET).values, truth(model, batches))

@pytest.mark.parametrize('batch_tokens', [None, 1, 12])
@pytest.mark.parametrize('labelled', [True, False])
def test_dataset(family, batch_tokens, labelled):
    model, data = tiny(family), to_dataset(examples(10))
    if not labelled: data = data.remove_columns('labels')
    grams = linear_grams(model, data, batch_tokens=batch_tokens, **QUIET)
    same(grams.values, truth(model, ragged_batches(family)))

def test_a_sample(family):
    model = tiny(family)
    grams = linear_grams(model, to_dataset(examples(10)), num_samples=4, seed=5, **QUIET)
    rows = [examples(10)[i] for i in torch.randperm(10, generator=torch.Generator().manual_seed(5))[:4].tolist()]
    same(grams.values, truth(model, [collate(rows, FAMILIES[family][2])]))
    assert grams.num_examples == grams.meta['num_examples'] == 4 and grams.meta['seed'] == 5

@pytest.mark.parametrize('seed', range(2))
def test_order_and_grouping_do_not_matter(family, seed):
    model, rows, gen = tiny(family), examples(10), torch.Generator().manual_seed(seed)
    order = torch.randperm(10, generator=gen).tolist()
    shuffled = [collate(g, FAMILIES[family][2]) for g in split([rows[i] for i in order], [(4, 6), (1, 8, 1)][seed])]
    same(linear_grams(model, shuffled, **QUIET).values, truth(model, ragged_batches(family)))

def test_float32(family):
    model, batches = tiny(family, dtype=torch.float32), ragged_batches(family)
    grams = linear_grams(model, batches, **QUIET)
    assert {v.dtype for v in grams.values.values()} == {torch.float32} and norm_error(grams.values, truth(model, batches)) < 1e-5

@pytest.mark.parametrize('dtype,precision', [(torch.bfloat16, None), (torch.float16, None), (torch.float32, 'bf16')], ids=str)
def test_half_precision_is_added_in_float32(family, dtype, precision):
    model, batches = tiny(family, dtype=dtype), ragged_batches(family)
    grams = linear_grams(model, batches, precision=precision, **QUIET)
    assert {v.dtype for v in grams.values.values()} == {torch.float32} and norm_error(grams.values, truth(model, batches)) < .05
    for k, v in linear_grams(model, ragged_batches(family, (8,)), precision=precision, **QUIET).values.items():
        assert (v != v.bfloat16().float()).double().mean() > .5, k

@pytest.mark.parametrize('mode', MODES)
def test_leaves_no_trace(family, mode):
    model = well_used(tiny(family))
    with MODES[mode]():
        batches = ragged_batches(family)
        with unchanged(model, data=batches): grams = linear_grams(model, batches, **QUIET)
    same(grams.values, truth(tiny(family), ragged_batches(family)))
    assert not any(v.is_inference() or v.requires_grad for v in grams.values.values())

def test_leaves_no_trace_after_an_exception(family):
    model, batches = well_used(tiny(family)), ragged_batches(family, (3, 1))
    with unchanged(model), pytest.raises(RuntimeError, match='boom'): linear_grams(model, breaking_data(batches), **QUIET)

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_round_trip(family, dtype, tmp_path):
    grams = linear_grams(tiny(family, dtype=dtype), ragged_batches(family), **QUIET)
    grams.save(tmp_path/'g.safetensors')
    back = Grams.load(str(tmp_path/'g.safetensors'))
    assert type(back) is Grams and back.meta == grams.meta and back.num_examples == 10
    same(back.values, grams.values, rtol=0)
    assert [p.name for p in tmp_path.iterdir()] == ['g.safetensors']

FILES = {
    'text': lambda p: p.write_text('hello'),
    'weights': lambda p: save_file({'pooler.dense.weight': torch.ones(2, 2)}, p),
    'masks': lambda p: MaskFisher(torch.ones(2, 4), torch.ones(2, 24), 8, {}).save(p),
    'parameters': lambda p: ParameterFisher({'pooler.dense.weight': torch.ones(2, 2)}).save(p),
}

@pytest.mark.parametrize('make', FILES.values(), ids=FILES)
def test_a_file_that_holds_no_grams(make, tmp_path):
    make(tmp_path/'f')
    with pytest.raises(ValueError, match='f is not a saved Grams'): Grams.load(tmp_path/'f')

def refused(match, model=None, data=None, **kw):
    with pytest.raises((ValueError, TypeError), match=match) as caught:
        linear_grams(tiny() if model is None else model, ragged_batches() if data is None else data, **kw, **QUIET)
    assert '\n' not in str(caught.value)

@pytest.mark.parametrize('kw,match', [
    (dict(precision='fp8'), "`precision` is 'fp8'"),
    (dict(num_samples=0), '`num_samples` must be a whole number of at least 1'),
    (dict(device='nowhere'), "no device 'nowhere'"),
    (dict(data=[]), '`data` is empty'),
    (dict(data=iter([])), '`data` is empty'),
    (dict(data=[3]), 'must be a dict of tensors'),
    (dict(data=[{**ragged_batches()[0], 'attention_mask': torch.ones(3, 1, 9, 9)}]), r'shape \(B, T\), got \(3, 1, 9, 9\)'),
    (dict(model=nn.Linear(2, 2)), 'Linear'),
], ids=lambda o: str(list(o)) if isinstance(o, dict) else '')
def test_wrong_input(kw, match): refused(match, **kw)

def test_a_model_without_a_head(family):
    model, batches = tiny(family), ragged_batches(family)
    want, got = linear_grams(model, batches, progress=False).values, linear_grams(model.base_model, batches, progress=False).values
    assert want.keys() == got.keys() and all(torch.equal(want[n], o) for n, o in got.items())

def test_a_row_whose_answer_is_not_a_number(family):
    model, batches = tiny(family), ragged_batches(family)
    with torch.no_grad(): model.base_model.embeddings.word_embeddings.weight[batches[1]['input_ids'][0, 0]] = torch.nan
    refused(r'row \d+: logits .* are not finite', model, batches)

def test_a_layer_that_sees_a_chunk_of_the_tokens():
    model = tiny('bert')
    for layer in model.bert.encoder.layer: layer.chunk_size_feed_forward = 2
    refused(r'intermediate.dense.weight. saw an input of shape \(2, 2, 16\)', model, ragged_batches('bert', (2,), lengths=(6, 4)))
