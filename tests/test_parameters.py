"""`parameter_fisher` against the gradient of one example after the other, by `torch.func` on a copy of the model."""
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call, grad
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from fisher_nodes.core.fisher import MaskFisher
from fisher_nodes.engine.measure import mask_fisher
from fisher_nodes.engine.measure import parameter_fisher
from fisher_nodes.methods.full_fisher import ParameterFisher
from reference import FAMILIES, collate, double, examples, logits, ragged_batches, single_rows, split, task_loss, tiny
from test_masks_fisher import QUIET, to_dataset
from test_purity import MODES, breaking_data, breaking_loss, unchanged, well_used

def classes(model, row):
    "Weights and labels: every class with its probability."
    p = logits(model, row).softmax(-1)[0].detach()
    return [(p[c], torch.tensor([c])) for c in range(len(p))]

def cross_entropies(forward, row):
    return cross_entropy(forward(**{k: v for k, v in row.items() if k != 'labels'}).logits, row['labels'], reduction='none')

def truth(model, batches, estimator='empirical', strip=True, loss=cross_entropies):
    "The mean over examples of the squared gradient of every parameter of the body, in float64."
    model, sums, rows = double(model), {}, list(single_rows(batches, strip))
    body = {k: p.detach() for k, p in model.base_model.named_parameters()}
    def total(params, row):
        state = {f'{model.base_model_prefix}.{k}': v for k, v in params.items()}
        return loss(lambda **kw: functional_call(model, state, kwargs=kw), row).sum()
    for row in rows:
        for w, y in [(1., row['labels'])] if estimator == 'empirical' else classes(model, row):
            for k, g in grad(total)(body, {**row, 'labels': y}).items(): sums[k] = sums.get(k, 0) + w*g.square()
    return {k: v/len(rows) for k, v in sums.items()}

def vanishes(name): return name.endswith('key.bias')

def same(values, want, rtol=1e-10):
    "Element by element, but for the bias of the key, whose gradient is nothing but rounding."
    assert values.keys() == want.keys()
    for k, w in want.items():
        got, scale = values[k].to(w), want[k.replace('key', 'query')].max()
        assert got.shape == w.shape
        if vanishes(k): assert got.max() < rtol*1e-12*scale, k
        else: assert_close(got, w, rtol=rtol, atol=0, msg=lambda m: f'{k}: {m}')

def norm_error(values, want):
    return max(((values[k].double()-w).norm()/w.norm()).item() for k, w in want.items() if not vanishes(k))

@pytest.fixture(params=[False, True], ids=['batched', 'one at a time'])
def alone(request): return dict(one_at_a_time=request.param)


# --- the same numbers, however the examples come ----------------------------------------------

def named(o):
    "An id that is the same in every process."
    return ','.join(f'{k}={getattr(v, "__name__", v)}' for k, v in o.items()) if isinstance(o, dict) else str(o)

@pytest.mark.parametrize('sizes', [(3, 1, 4, 2), (10,)], ids=str)
@pytest.mark.parametrize('estimator', ['empirical', 'exact'])
def test_equals_brute_force(family, alone, sizes, estimator):
    model, batches = tiny(family), ragged_batches(family, sizes)
    fisher = parameter_fisher(model, batches, labels=estimator, **alone, **QUIET)
    same(fisher.values, truth(model, batches, estimator))
    assert fisher.num_examples == 10 and list(fisher.values) == [k for k, _ in model.base_model.named_parameters()]
    assert all(v.dtype == torch.float64 and v.device.type == 'cpu' and not v.requires_grad for v in fisher.values.values())

@pytest.mark.parametrize('attn', ['sdpa', 'eager'])
def test_attention_implementations(family, alone, attn):
    model, batches = tiny(family, attn=attn), ragged_batches(family)
    same(parameter_fisher(model, batches, **alone, **QUIET).values, truth(model, batches))

def test_a_regression(family, alone):
    model, batches = tiny(family, num_labels=1), ragged_batches(family, num_labels=1)
    def squared(forward, row): return (forward(**{k: v for k, v in row.items() if k != 'labels'}).logits[:, 0]-row['labels']).square()
    same(parameter_fisher(model, batches, **alone, **QUIET).values, truth(model, batches, loss=squared))

def test_sampled_labels_are_those_of_the_mask_fisher(family, alone):
    "The same seed and row draw the same label for both."
    model, data, kw = tiny(family), to_dataset(examples(1)), dict(labels='sampled', seed=3, **QUIET)
    labelled = [[collate([{**examples(1)[0], 'labels': c}], FAMILIES[family][2])] for c in range(3)]
    heads = mask_fisher(model, data, **kw).heads
    drawn = [b for b in labelled if torch.allclose(mask_fisher(model, b, **QUIET).heads, heads, rtol=1e-9, atol=0)]
    assert len(drawn) == 1
    same(parameter_fisher(model, data, **kw, **alone).values, truth(model, drawn[0]))

@pytest.mark.parametrize('extra', [0, 7])
def test_padding_changes_nothing(family, alone, extra):
    model = tiny(family)
    same(parameter_fisher(model, ragged_batches(family, extra=extra), **alone, **QUIET).values, truth(model, ragged_batches(family)))

def test_left_padding_is_used_as_given(alone):
    model, batches = tiny('bert'), ragged_batches('bert', side='left')
    same(parameter_fisher(model, batches, **alone, **QUIET).values, truth(model, batches, strip=False))

def test_no_attention_mask(family, alone):
    model, batches = tiny(family), ragged_batches(family, lengths=(6,))
    given = [{k: v for k, v in b.items() if k != 'attention_mask'} for b in batches]
    same(parameter_fisher(model, given, **alone, **QUIET).values, truth(model, batches))

def test_padding_tokens_that_are_attended_to(alone):
    "Torch never trains the row of the padding token: its gradient is zero, also where it is read."
    model, batches = tiny('bert'), ragged_batches('bert')
    given = [{**b, 'attention_mask': torch.ones_like(b['input_ids'])} for b in batches]
    fisher = parameter_fisher(model, given, **alone, **QUIET).values
    same(fisher, truth(model, given, strip=False))
    assert (fisher['embeddings.word_embeddings.weight'][0] == 0).all()

def test_token_types_and_positions_of_the_caller(alone):
    model, batches = tiny('bert'), ragged_batches('bert')
    typed = [{**b, 'token_type_ids': (b['input_ids'] % 2)*b['attention_mask']} for b in batches]
    same(parameter_fisher(model, typed, **alone, **QUIET).values, truth(model, typed))
    backwards = [{**b, 'position_ids': torch.arange(b['input_ids'].shape[1]).flip(0).expand_as(b['input_ids'])} for b in batches]
    shared = [{**b, 'position_ids': b['position_ids'][:1]} for b in backwards]
    for given in (backwards, shared):
        same(parameter_fisher(model, given, **alone, **QUIET).values, truth(model, backwards))

def test_repeated_tokens_are_one_parameter(family, alone):
    "One word throughout an example, and the same word in the next one."
    model, rows = tiny(family), examples(6)
    for r, word in zip(rows, (5, 5, 7, 9, 9, 9)): r['input_ids'] = [word]*len(r['input_ids'])
    batches = [collate(g, FAMILIES[family][2]) for g in split(rows, (4, 2))]
    fisher = parameter_fisher(model, batches, **alone, **QUIET).values
    same(fisher, truth(model, batches))
    seen = fisher['embeddings.word_embeddings.weight'].ne(0).any(1).nonzero().flatten()
    assert seen.tolist() == [5, 7, 9]

@pytest.mark.parametrize('seed', range(2))
def test_order_and_grouping_do_not_matter(family, alone, seed):
    model, rows, gen = tiny(family), examples(10), torch.Generator().manual_seed(seed)
    order = torch.randperm(10, generator=gen).tolist()
    shuffled = [collate(g, FAMILIES[family][2]) for g in split([rows[i] for i in order], [(4, 6), (1, 8, 1)][seed])]
    same(parameter_fisher(model, shuffled, **alone, **QUIET).values, truth(model, ragged_batches(family)))

@pytest.mark.parametrize('batch_tokens', [None, 1, 12, 10_000])
def test_dataset(family, alone, batch_tokens):
    model, data = tiny(family), to_dataset(examples(10))
    fisher = parameter_fisher(model, data, batch_tokens=batch_tokens, **alone, **QUIET)
    same(fisher.values, truth(model, ragged_batches(family)))

def test_examples_expanded_in_parts(family, monkeypatch):
    "Memory for two examples, for less than one, or for all."
    from fisher_nodes.methods import full_fisher as parameters
    model, batches = tiny(family), ragged_batches(family)
    for budget in (1, 2*16*16, 10**9):
        monkeypatch.setitem(parameters.EXPAND, 'cpu', budget)
        same(parameter_fisher(model, batches, **QUIET).values, truth(model, batches))

def test_the_same_rows_as_the_mask_fisher(family, alone):
    model, data = tiny(family), to_dataset(examples(10))
    fisher, masks = parameter_fisher(model, data, num_samples=4, seed=5, **alone, **QUIET), mask_fisher(model, data, num_samples=4, seed=5, **QUIET)
    assert fisher.num_examples == masks.num_examples == 4
    rows = [examples(10)[i] for i in torch.randperm(10, generator=torch.Generator().manual_seed(5))[:4].tolist()]
    same(fisher.values, truth(model, [collate(rows, FAMILIES[family][2])]))
    assert {k: fisher.meta[k] for k in ('model', 'weight_hash', 'data', 'seed', 'num_examples')} == {
        k: masks.meta[k] for k in ('model', 'weight_hash', 'data', 'seed', 'num_examples')}

def test_masks_are_bounded_by_parameters(family):
    "For one example a head's mask gradient is <v,dL/dv> over its value rows and bias v, so its square is at most |v|² times their Fisher."
    model, data = tiny(family), to_dataset(examples(1))
    fisher, masks = parameter_fisher(model, data, **QUIET).values, mask_fisher(model, data, **QUIET)
    for i, layer in enumerate(model.base_model.encoder.layer):
        v, f = layer.attention.self.value, [fisher[f'encoder.layer.{i}.attention.self.value.{k}'] for k in ('weight', 'bias')]
        w = (v.weight.square().sum(1)+v.bias.square()).view(4, -1).sum(1)
        assert (masks.heads[i] <= w*(f[0].sum(1)+f[1]).view(4, -1).sum(1)).all()


# --- precision --------------------------------------------------------------------------------

@pytest.mark.parametrize('estimator', ['empirical', 'exact'])
def test_float32(family, alone, estimator):
    "Rounding of a float32 model: 1e-5 of each tensor's norm."
    model, batches = tiny(family, dtype=torch.float32), ragged_batches(family)
    fisher = parameter_fisher(model, batches, labels=estimator, **alone, **QUIET)
    assert {v.dtype for v in fisher.values.values()} == {torch.float32}
    assert norm_error(fisher.values, truth(model, batches, estimator)) < 1e-5

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_give_float32(family, alone, dtype):
    model, batches = tiny(family, dtype=dtype), ragged_batches(family)
    fisher = parameter_fisher(model, batches, **alone, **QUIET)
    assert {v.dtype for v in fisher.values.values()} == {torch.float32}
    assert norm_error(fisher.values, truth(model, batches)) < .2

def test_autocast(family):
    "The matrix products of the model run in bfloat16; those of the Fisher do not."
    model, batches = tiny(family, dtype=torch.float32), ragged_batches(family)
    fisher = parameter_fisher(model, batches, precision='bf16', **QUIET)
    assert 1e-6 < norm_error(fisher.values, truth(model, batches)) < .2
    assert {v.dtype for v in fisher.values.values()} == {torch.float32} and fisher.meta['precision'] == 'bf16'
    for k, v in parameter_fisher(model, ragged_batches(family, (8,)), precision='bf16', **QUIET).values.items():
        if k.endswith(('dense.weight', 'query.weight')): assert (v != v.bfloat16().float()).double().mean() > .9, k


# --- a loss of the caller's -------------------------------------------------------------------

def test_own_loss(family, alone):
    model, batches = tiny(family), ragged_batches(family)
    fisher = parameter_fisher(model, batches, loss=task_loss, **alone, **QUIET)
    same(fisher.values, truth(model, batches))

def consistency(model, batch):
    "A loss of two passes with different inputs: the rows of the batch, and the rows without their first word."
    short = {k: v[:, 1:] if v.ndim == 2 else v for k, v in batch.items()}
    return task_loss(model, batch)*task_loss(model, short)

def test_a_loss_of_two_passes(family, alone):
    "Both passes' gradients of an example belong into one square."
    model, batches = tiny(family), ragged_batches(family, lengths=(6, 4))
    def both(forward, row): return cross_entropies(forward, row)*cross_entropies(forward, {k: v[:, 1:] if v.ndim == 2 else v for k, v in row.items()})
    same(parameter_fisher(model, batches, loss=consistency, **alone, **QUIET).values, truth(model, batches, loss=both))

def test_a_pass_that_the_loss_ignores(family, alone):
    model, batches = tiny(family), ragged_batches(family)
    def wasteful(model, batch):
        logits(model, batch)
        return task_loss(model, batch)
    same(parameter_fisher(model, batches, loss=wasteful, **alone, **QUIET).values, truth(model, batches))

def test_what_no_loss_reaches_is_zero(alone):
    "A loss on the first layer's hidden states: the second layer and the pooler have nothing to do with it."
    model, batches = tiny('bert'), ragged_batches('bert')
    def early(model, batch):
        return model(**{k: v for k, v in batch.items() if k != 'labels'}, output_hidden_states=True).hidden_states[1][:, 0].square().sum(1)
    fisher = parameter_fisher(model, batches, loss=early, **alone, **QUIET).values
    for k, v in fisher.items():
        if k.startswith(('encoder.layer.1.', 'pooler')): assert (v == 0).all(), k
        elif not vanishes(k): assert v.max() > 0, k

def test_chunked_feed_forward(alone):
    "A layer that is called for one chunk of the tokens after the other."
    model, batches = tiny('bert'), ragged_batches('bert', lengths=(6, 4, 2))
    want = truth(model, batches)
    for layer in model.bert.encoder.layer: layer.chunk_size_feed_forward = 2
    same(parameter_fisher(model, batches, **alone, **QUIET).values, want)


# --- the wrong versions -----------------------------------------------------------------------

def test_the_square_of_the_mean_is_something_else(family):
    model, (batch,) = tiny(family), ragged_batches(family, (10,))
    fisher = parameter_fisher(model, [batch], **QUIET).values
    wrong = torch.autograd.grad(task_loss(model, batch).mean(), list(model.base_model.parameters()))
    for (k, v), g in zip(fisher.items(), wrong):
        if not vanishes(k): assert (v-10*g.square()).norm() > .03*v.norm(), k


# --- nothing of the caller's is changed -------------------------------------------------------

@pytest.mark.parametrize('kw', [{}, dict(labels='exact'), dict(labels='sampled'), dict(loss=task_loss), dict(num_samples=4)], ids=named)
@pytest.mark.parametrize('mode', MODES)
def test_leaves_no_trace(family, alone, mode, kw):
    model = well_used(tiny(family))
    with MODES[mode]():
        batches = ragged_batches(family)
        with unchanged(model, data=batches): fisher = parameter_fisher(model, batches, **kw, **alone, **QUIET)
    again = parameter_fisher(tiny(family), ragged_batches(family), **kw, **alone, **QUIET)
    same(fisher.values, again.values)
    assert not any(v.is_inference() for v in fisher.values.values())

@pytest.mark.parametrize('how', ['loss', 'data'])
def test_leaves_no_trace_after_an_exception(family, alone, how):
    model, batches = well_used(tiny(family)), ragged_batches(family, (3, 1))
    with unchanged(model), pytest.raises(RuntimeError, match='boom'):
        if how == 'loss': parameter_fisher(model, batches, loss=breaking_loss, **alone, **QUIET)
        else: parameter_fisher(model, breaking_data(batches), **alone, **QUIET)

def test_twice_is_the_same(family, alone):
    model, batches = tiny(family), ragged_batches(family)
    first, second = [parameter_fisher(model, batches, **alone, **QUIET).values for _ in range(2)]
    for k in first: assert_close(first[k], second[k], rtol=0, atol=0)


# --- files ------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_round_trip(family, alone, dtype, tmp_path):
    fisher = parameter_fisher(tiny(family, dtype=dtype), ragged_batches(family), **alone, **QUIET)
    fisher.save(tmp_path/'f.safetensors')
    back = ParameterFisher.load(str(tmp_path/'f.safetensors'))
    assert type(back) is ParameterFisher and back.meta == fisher.meta and back.num_examples == 10 and back.values.keys() == fisher.values.keys()
    for k, v in fisher.values.items(): assert_close(back.values[k], v, rtol=0, atol=0)
    assert [p.name for p in tmp_path.iterdir()] == ['f.safetensors']

def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError): ParameterFisher({'a': torch.ones(1)}).save(tmp_path/'no'/'f')

FILES = {
    'text': lambda p: p.write_text('hello'),
    'empty': lambda p: p.write_bytes(b''),
    'weights': lambda p: save_file({'embeddings.word_embeddings.weight': torch.ones(2, 2)}, p),
    'masks': lambda p: MaskFisher(torch.ones(2, 4), torch.ones(2, 24), 8, {}).save(p),
    'no count': lambda p: save_file({'a': torch.ones(1)}, p, dict(kind='ParameterFisher', meta=json.dumps({}))),
    'cut short': lambda p: (ParameterFisher({'a': torch.ones(9)}).save(p), p.write_bytes(p.read_bytes()[:-8])),
}

@pytest.mark.parametrize('make', FILES.values(), ids=FILES)
def test_a_file_that_is_no_parameter_fisher(make, tmp_path):
    make(tmp_path/'f')
    with pytest.raises(ValueError, match='f is not a saved ParameterFisher'): ParameterFisher.load(tmp_path/'f')

def test_other_readers_refuse_it(tmp_path):
    ParameterFisher({'a': torch.ones(1)}).save(tmp_path/'f')
    with pytest.raises(ValueError, match='not a saved MaskFisher'): MaskFisher.load(tmp_path/'f')
    with pytest.raises(FileNotFoundError): ParameterFisher.load(tmp_path/'g')


# --- wrong input ------------------------------------------------------------------------------

class Unread:
    def __iter__(self): raise AssertionError('the data was read before the mistake was found')

def refused(match, model=None, data=None, **kw):
    with pytest.raises((ValueError, TypeError), match=match) as caught:
        parameter_fisher(tiny() if model is None else model, Unread() if data is None else data, **kw, **QUIET)
    assert '\n' not in str(caught.value)

@pytest.mark.parametrize('kw,match', [
    (dict(labels='true'), "`labels` is 'true'; expected one of .*empirical.*exact.*sampled"),
    (dict(precision='fp8'), "`precision` is 'fp8'"),
    (dict(precision='bf16'), 'float32 weights; the model has torch.float64'),
    (dict(num_samples=0), '`num_samples` must be a whole number of at least 1'),
    (dict(labels='exact', loss=task_loss), "labels='exact' needs the built-in loss"),
    (dict(device='nowhere'), "no device 'nowhere'"),
], ids=lambda o: named(o) if isinstance(o, dict) else '')
def test_wrong_choices(alone, kw, match): refused(match, **kw, **alone)

@pytest.mark.parametrize('data', [[], iter([]), to_dataset(examples(1)).select([])], ids=['list', 'iterator', 'dataset'])
def test_empty_data(alone, data): refused('`data` is empty', data=data, **alone)

def test_wrong_data(alone):
    third = examples(10)[3]['input_ids'][0]
    refused('label 7 of row 0', data=[{**ragged_batches(sizes=(1,))[0], 'labels': torch.tensor([7])}], **alone)
    refused('must be a dict of tensors', data=[3], **alone)
    refused('expected one loss each', data=ragged_batches(), loss=lambda m, b: task_loss(m, b).mean(), **alone)
    refused('the loss of row 3 is inf', data=ragged_batches(), loss=lambda m, b: task_loss(m, b)/(b['input_ids'][:, 0] != third), **alone)
    refused('do not depend on the body', data=ragged_batches(), loss=lambda m, b: torch.zeros(len(b['labels'])), **alone)

def test_a_model_without_a_head(family, alone):
    refused('Model has no task head', tiny(family).base_model, ragged_batches(family), **alone)

def test_not_a_model(alone):
    refused('Linear', nn.Linear(2, 2), **alone)

def test_rows_that_are_no_examples():
    "A loss that shows the model its rows twice at once."
    def doubled(model, batch): return task_loss(model, {k: torch.cat([v, v]) for k, v in batch.items()})[:len(batch['labels'])]
    refused('one example must be one row', data=ragged_batches(sizes=(3,)), loss=doubled)

class Scaled(nn.Module):
    def __init__(self): super().__init__(); self.weight = nn.Parameter(torch.ones(16).double()); self.bias = nn.Parameter(torch.ones(16).double())
    def forward(self, x): return x*self.weight+self.bias

def test_a_module_of_another_kind(family, alone):
    "Whatever it computes from an example's own numbers."
    model, batches = tiny(family), ragged_batches(family)
    model.base_model.encoder.layer[1].output.LayerNorm = Scaled()
    same(parameter_fisher(model, batches, **alone, **QUIET).values, truth(model, batches))

def test_a_parameter_without_a_role(family, alone):
    model = tiny(family)
    model.base_model.encoder.layer[0].extra = nn.Linear(2, 2)
    refused("'encoder.layer.0.extra.weight' belongs to 0 parts", model, **alone)

def tie_layers(model):
    layers = model.base_model.encoder.layer
    layers[1].output = layers[0].output

def tie_matrices(model):
    self = model.base_model.encoder.layer[0].attention.self
    self.key.weight = self.query.weight

def tie_head(model):
    last = model.classifier if isinstance(model.classifier, nn.Linear) else model.classifier.out_proj
    last.weight = model.base_model.encoder.layer[0].attention.self.query.weight

@pytest.mark.parametrize('tie', [tie_layers, tie_matrices, tie_head], ids=lambda o: o.__name__)
def test_tied_parameters_and_shared_modules(family, alone, tie):
    "One tensor has one gradient, the sum of what all its places have, whether it was asked to go one by one or not."
    model, batches = tiny(family, num_labels=16), ragged_batches(family)
    tie(model)
    same(parameter_fisher(model, batches, **alone, **QUIET).values, truth(model, batches))
