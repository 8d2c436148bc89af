"""`mask_fisher` against one example at a time, and the identities that tie masks to weights."""
import copy
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.testing import assert_close
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from fisher_nodes import mask_fisher
from fisher_nodes.core import kernel, nodes as masks
from reference import (FAMILIES, brute_grads, brute_head_matrices, brute_mask_fisher, collate, examples, logits,
                       ragged_batches, released_mask_fisher, split, task_loss, tiny)

QUIET = dict(progress=False)

def same(fisher, want, rtol=1e-10):
    "Every element of both tensors, in the reference's own precision."
    for got, ref in zip((fisher.heads, fisher.rows), want): assert_close(got.to(ref), ref, rtol=rtol, atol=0)

def far(fisher, want, by=.05):
    "Some layer differs by more than `by` of its norm."
    return any(((a-b).norm(dim=1) > by*b.norm(dim=1)).any() for a, b in zip((fisher.heads, fisher.rows), want))

def norm_error(fisher, want):
    "The largest relative error in norm over the layers of both tensors."
    return max(((a.double()-b).norm(dim=1)/b.norm(dim=1)).max().item() for a, b in zip((fisher.heads, fisher.rows), want))

def to_dataset(rows, label='labels'):
    return Dataset.from_list([{**{k: v for k, v in r.items() if k != 'labels'}, label: r['labels'], 'idx': i}
                              for i, r in enumerate(rows)])


# --- the same numbers, however the examples come ----------------------------------------------

@pytest.mark.parametrize('attn', ['sdpa', 'eager'])
@pytest.mark.parametrize('sizes', [(3, 1, 4, 2), (1,)*10, (10,), (9, 1)], ids=str)
@pytest.mark.parametrize('estimator', ['empirical', 'exact'])
def test_equals_brute_force(family, attn, sizes, estimator):
    model, batches = tiny(family, attn=attn), ragged_batches(family, sizes)
    fisher = mask_fisher(model, batches, labels=estimator, **QUIET)
    same(fisher, brute_mask_fisher(model, batches, estimator))
    assert fisher.num_examples == 10
    assert fisher.heads.dtype == fisher.rows.dtype == torch.float64
    assert not fisher.heads.requires_grad and not fisher.rows.requires_grad

@pytest.mark.parametrize('attn', ['sdpa', 'eager'])
@pytest.mark.parametrize('sizes', [(3, 1, 4, 2), (10,)], ids=str)
def test_float32_equals_brute_force(family, attn, sizes):
    model, batches = tiny(family, attn=attn, dtype=torch.float32), ragged_batches(family, sizes)
    fisher, want = mask_fisher(model, batches, **QUIET), brute_mask_fisher(model, batches)
    assert fisher.heads.dtype == fisher.rows.dtype == torch.float32
    assert norm_error(fisher, want) < 1e-5
    same(fisher, [w.float() for w in want], rtol=1e-3)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_give_float32_fishers(family, dtype):
    model, batches = tiny(family, dtype=dtype), ragged_batches(family)
    fisher = mask_fisher(model, batches, **QUIET)
    assert fisher.heads.dtype == fisher.rows.dtype == torch.float32
    assert norm_error(fisher, brute_mask_fisher(model, batches)) < .1

@pytest.mark.parametrize('extra', [0, 7])
def test_padding_changes_nothing(family, extra):
    model = tiny(family)
    want = brute_mask_fisher(model, ragged_batches(family))
    same(mask_fisher(model, ragged_batches(family, extra=extra), **QUIET), want)

@pytest.mark.parametrize('sizes', [(3, 1, 4, 2), (10,)], ids=str)
def test_left_padding_is_used_as_given(sizes):
    "BERT's positions and pooler read the padding, so the truth is each row as it stands in the batch."
    model, batches = tiny('bert'), ragged_batches('bert', sizes, side='left')
    same(mask_fisher(model, batches, **QUIET), brute_mask_fisher(model, batches, strip=False))

@pytest.mark.parametrize('drop', ['attention_mask', None])
def test_rows_of_one_length(family, drop):
    model, batches = tiny(family), ragged_batches(family, lengths=(6,))
    given = [{k: v for k, v in b.items() if k != drop} for b in batches]
    same(mask_fisher(model, given, **QUIET), brute_mask_fisher(model, batches))

def test_token_types_are_used():
    model, batches = tiny('bert'), ragged_batches('bert')
    typed = [{**b, 'token_type_ids': (b['input_ids'] % 2)*b['attention_mask']} for b in batches]
    fisher, plain = mask_fisher(model, typed, **QUIET), brute_mask_fisher(model, batches)
    same(fisher, brute_mask_fisher(model, typed))
    assert far(fisher, plain)

@pytest.mark.parametrize('seed', range(3))
def test_order_and_grouping_of_examples_do_not_matter(family, seed):
    model, rows, gen = tiny(family), examples(10), torch.Generator().manual_seed(seed)
    order = torch.randperm(10, generator=gen).tolist()
    sizes = [(4, 6), (1, 8, 1), (5, 2, 3)][seed]
    pad = FAMILIES[family][2]
    shuffled = [collate(g, pad) for g in split([rows[i] for i in order], sizes)]
    same(mask_fisher(model, shuffled, **QUIET), brute_mask_fisher(model, ragged_batches(family, (10,))))

def as_generator(batches): yield from batches

@pytest.mark.parametrize('wrap', [list, tuple, as_generator, lambda bs: [BatchEncoding(b) for b in bs],
                                  lambda bs: DataLoader(bs, batch_size=None)],
                         ids=['list', 'tuple', 'generator', 'BatchEncoding', 'DataLoader'])
def test_any_iterable_of_batches(family, wrap):
    model, batches = tiny(family), ragged_batches(family)
    same(mask_fisher(model, wrap(batches), **QUIET), brute_mask_fisher(model, batches))

@pytest.mark.parametrize('label', ['label', 'labels'])
@pytest.mark.parametrize('fmt', [None, 'torch'])
@pytest.mark.parametrize('batch_tokens', [None, 12, 10_000])
def test_dataset(family, label, fmt, batch_tokens):
    model, data = tiny(family), to_dataset(examples(10), label).with_format(fmt)
    fisher = mask_fisher(model, data, batch_tokens=batch_tokens, **QUIET)
    same(fisher, brute_mask_fisher(model, ragged_batches(family)))
    assert fisher.num_examples == 10

def test_longest_batch_budget_still_takes_every_example(family):
    "A budget smaller than one example means batches of one."
    model = tiny(family)
    fisher = mask_fisher(model, to_dataset(examples(10)), batch_tokens=1, **QUIET)
    same(fisher, brute_mask_fisher(model, ragged_batches(family)))

@pytest.mark.parametrize('training', [True, False])
def test_dropout_is_off_also_in_training_mode(family, training):
    model, batches = tiny(family), ragged_batches(family)
    same(mask_fisher(copy.deepcopy(model).train(training), batches, **QUIET), brute_mask_fisher(model, batches))

def test_frozen_parameters_change_nothing(family):
    model, batches = tiny(family), ragged_batches(family)
    want = brute_mask_fisher(model, batches)
    same(mask_fisher(model.requires_grad_(False), batches, **QUIET), want)


# --- how many examples, which ones ------------------------------------------------------------

@pytest.mark.parametrize('n', [1, 3, 5, 10, 99])
def test_num_samples_takes_the_first_of_an_iterable(family, n):
    model, batches = tiny(family), ragged_batches(family)
    fisher = mask_fisher(model, batches, num_samples=n, **QUIET)
    same(fisher, brute_mask_fisher(model, ragged_batches(family, (1,)*10)[:n]))
    assert fisher.num_examples == min(n, 10)

def test_dataset_is_sampled_without_replacement(family):
    "Nine of ten: what is missing from the sum is one whole example."
    model, data = tiny(family), to_dataset(examples(10))
    _, *squares = [g.square() for g in brute_grads(model, ragged_batches(family))]
    missing = set()
    for seed in range(4):
        fisher = mask_fisher(model, data, num_samples=9, seed=seed, **QUIET)
        assert fisher.num_examples == 9
        gaps = [s.sum(0)-9*f for s, f in zip(squares, (fisher.heads, fisher.rows))]
        hit = [i for i in range(10) if all(torch.allclose(gap, s[i], rtol=1e-6, atol=1e-12) for gap, s in zip(gaps, squares))]
        assert len(hit) == 1
        missing |= set(hit)
    assert len(missing) > 1

def test_sampling_is_seeded(family):
    model, data = tiny(family), to_dataset(examples(30))
    draw = lambda seed: mask_fisher(model, data, num_samples=8, seed=seed, **QUIET).rows
    assert_close(draw(0), draw(0), rtol=0, atol=0)
    assert not torch.equal(draw(0), draw(1))

def test_global_seed_has_no_say(family):
    model, data = tiny(family), to_dataset(examples(30))
    def draw(seed):
        torch.manual_seed(seed)
        return mask_fisher(model, data, num_samples=8, labels='sampled', **QUIET).rows
    assert_close(draw(0), draw(1), rtol=0, atol=0)


# --- estimators and losses --------------------------------------------------------------------

@pytest.mark.parametrize('estimator', ['exact', 'sampled'])
def test_the_models_own_labels_need_none(family, estimator):
    model, batches = tiny(family), ragged_batches(family)
    bare = [{k: v for k, v in b.items() if k != 'labels'} for b in batches]
    a, b = (mask_fisher(model, d, labels=estimator, **QUIET) for d in (batches, bare))
    same(a, (b.heads, b.rows), rtol=0)

def test_sampled_is_seeded_and_converges_to_exact(family):
    "4,000 copies of one example, each with a label of its own."
    model, batch = tiny(family), ragged_batches(family, (1,))[0]
    copies = [{k: v.repeat_interleave(1000, 0) for k, v in batch.items()}]*4
    draw = lambda seed: mask_fisher(model, copies, labels='sampled', seed=seed, **QUIET)
    exact = brute_mask_fisher(model, [batch], 'exact')
    assert norm_error(draw(0), exact) < .1
    assert norm_error(draw(1), exact) < .1
    same(draw(0), (draw(0).heads, draw(0).rows), rtol=0)
    assert not torch.equal(draw(0).rows, draw(1).rows)
    assert far(mask_fisher(model, [batch], **QUIET), exact, by=.1)

def smoothed(model, batch):
    return F.cross_entropy(logits(model, batch), batch['labels'], reduction='none', label_smoothing=.1)*2

def margin(model, batch):
    "Looks at the hidden states too, so it runs the model its own way."
    out = model(input_ids=batch['input_ids'], attention_mask=batch['attention_mask'], output_hidden_states=True)
    return out.hidden_states[-1][:,0].square().sum(-1) + out.logits[:,0]

@pytest.mark.parametrize('loss', [smoothed, margin])
@pytest.mark.parametrize('sizes', [(3, 1, 4, 2), (10,)], ids=str)
def test_a_loss_of_ones_own(family, loss, sizes):
    model, batches = tiny(family), ragged_batches(family, sizes)
    same(mask_fisher(model, batches, loss=loss, **QUIET), brute_mask_fisher(model, batches, loss=loss))

@pytest.mark.parametrize('as_data', [lambda f, bs: bs, lambda f, bs: to_dataset(examples(10, 1), 'label')],
                         ids=['batches', 'Dataset'])
def test_regression(family, as_data):
    model, batches = tiny(family, num_labels=1), ragged_batches(family, num_labels=1)
    batches = [{**b, 'labels': b['labels'].double()} for b in batches]
    fisher = mask_fisher(model, as_data(family, batches), **QUIET)
    same(fisher, brute_mask_fisher(model, batches), rtol=1e-5 if as_data(family, batches) is not batches else 1e-10)

def test_squaring_the_batch_mean_is_another_number(family):
    model, batches = tiny(family), ragged_batches(family)
    paper, released = mask_fisher(model, batches, **QUIET), released_mask_fisher(model, batches)
    assert far(paper, released, by=.5)
    assert far(paper, [r/len(batches) for r in released], by=.05)

def test_batch_mean_can_be_zero_where_the_fisher_is_not():
    "Two classes, p = 1/2, one example under either label: the gradients cancel, their squares do not."
    model, (batch,) = tiny('bert', num_labels=2), ragged_batches('bert', (1,))
    with torch.no_grad(): model.classifier.bias -= logits(model, batch)[0]
    pair = {k: v.repeat_interleave(2, 0) for k, v in batch.items()} | dict(labels=torch.tensor([0, 1]))
    assert_close(logits(model, batch).softmax(-1), torch.full((1, 2), .5).double(), rtol=1e-12, atol=0)
    paper, released = (mask_fisher(model, [pair], variant=v, **QUIET) for v in ('paper', 'released'))
    assert released.heads.max() < 1e-20 < 1e-6 < paper.heads.max()

@pytest.mark.parametrize('sizes', [(3, 1, 4, 2), (10,)], ids=str)
def test_head_matrices(family, sizes):
    model, batches = tiny(family), ragged_batches(family, sizes)
    fisher = mask_fisher(model, batches, matrices='heads', **QUIET)
    want = brute_head_matrices(model, batches)
    assert_close(fisher.head_matrices, want, rtol=1e-9, atol=1e-12*want.abs().max())
    assert_close(fisher.head_matrices.diagonal(dim1=1, dim2=2), fisher.heads, rtol=1e-12, atol=0)


# --- the object -------------------------------------------------------------------------------

def test_layer_and_meta(family):
    fisher = mask_fisher(tiny(family, layers=3), ragged_batches(family), num_samples=5, seed=3, **QUIET)
    assert (fisher.heads.shape, fisher.rows.shape) == ((3, 4), (3, 24))
    for i in range(3):
        for got, want in zip(fisher.layer(i), (fisher.heads[i], fisher.rows[i])): assert_close(got, want, rtol=0, atol=0)
    assert fisher.meta['weight_hash'] and fisher.meta['variant'] == 'paper' and fisher.meta['seed'] == 3

def test_weight_hash_follows_the_body_alone(family):
    digest = lambda model: mask_fisher(model, ragged_batches(family, (2,)), **QUIET).meta['weight_hash']
    a, b = tiny(family), tiny(family)
    assert digest(a) == digest(b)
    with torch.no_grad(): next(b.classifier.parameters()).add_(1)
    assert digest(a) == digest(b)
    with torch.no_grad(): b.base_model.encoder.layer[1].output.dense.bias[3] += 1e-9
    assert digest(a) != digest(b)


# --- mask gradients are weight gradients ------------------------------------------------------

def weight_grads(model, batch, of):
    "`Σ w·∂L/∂w` per node of each layer, from a plain backward pass over one example."
    model = copy.deepcopy(model)
    task_loss(model, batch).sum().backward()
    by_head = lambda x: x.view(model.config.num_attention_heads, -1).sum(1)
    return torch.stack([of(layer, lambda p: (p*p.grad).detach(), by_head) for layer in model.base_model.encoder.layer])

IDENTITIES = {
    'value': ('heads', 'paper', lambda l, d, by: by(d(l.attention.self.value.weight).sum(1)+d(l.attention.self.value.bias))),
    'attention output': ('heads', 'paper', lambda l, d, by: by(d(l.attention.output.dense.weight).sum(0))),
    'released heads': ('heads', 'released', lambda l, d, by: by(d(l.attention.output.dense.weight).sum(0))),
    'first linear, no bias': ('rows', 'paper', lambda l, d, by: d(l.intermediate.dense.weight).sum(1)),
    'second linear': ('rows', 'released', lambda l, d, by: d(l.output.dense.weight).sum(0)),
}
NOT_IDENTITIES = {
    'query': ('heads', 'paper', lambda l, d, by: by(d(l.attention.self.query.weight).sum(1)+d(l.attention.self.query.bias))),
    'key': ('heads', 'paper', lambda l, d, by: by(d(l.attention.self.key.weight).sum(1)+d(l.attention.self.key.bias))),
    'first linear and bias': ('rows', 'paper', lambda l, d, by: d(l.intermediate.dense.weight).sum(1)+d(l.intermediate.dense.bias)),
    'mask after GELU': ('rows', 'paper', lambda l, d, by: d(l.output.dense.weight).sum(0)),
}
BRUTE = {'paper': brute_mask_fisher, 'released': released_mask_fisher}

@pytest.mark.parametrize('fisher', ['package', 'reference'])
@pytest.mark.parametrize('name', [*IDENTITIES, *NOT_IDENTITIES])
def test_identity(family, fisher, name):
    model, (batch,) = tiny(family), ragged_batches(family, (1,), lengths=(9,))
    kind, variant, of = (IDENTITIES | NOT_IDENTITIES)[name]
    got = (getattr(mask_fisher(model, [batch], variant=variant, **QUIET), kind) if fisher == 'package'
           else dict(zip(('heads', 'rows'), BRUTE[variant](model, [batch])))[kind])
    want = weight_grads(model, batch, of).square()
    if name in IDENTITIES: assert_close(got, want, rtol=1e-9, atol=0)
    else: assert ((got-want).norm(dim=1) > .05*want.norm(dim=1)).all()


# --- sums over tokens, and batches too large for the memory ------------------------------------

SHAPES = [(1, 1, 1), (3, 17, 130), (2, 33, 256)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

def sums_are_right(sums, dtype, shape, bias):
    "Against float64; the gradient comes transposed, as some attention code gives it."
    torch.manual_seed(0)
    x, grad = torch.randn(shape).to(dtype), torch.randn(shape[0], shape[2], shape[1]).to(dtype).mT
    bias = torch.randn(shape[2]).to(dtype) if bias else None
    terms = (x.double()-(0 if bias is None else bias.double()))*grad.double()
    got, eps = sums(x, grad, bias), torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert ((got-terms.sum(1)).abs() <= 8*eps*(terms.abs().sum(1)+1)).all()

@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('chunk', [1, 5000, 2**18])
def test_sums_over_tokens(monkeypatch, chunk, dtype, shape, bias):
    monkeypatch.setitem(masks.CHUNK, 'cpu', chunk)
    sums_are_right(masks.plain_sums, dtype, shape, bias)

def test_a_kernel_that_does_not_work_is_not_used(monkeypatch):
    "Its reason is given once, and the plain sums do the work."
    monkeypatch.setattr(kernel, '_agrees', lambda device: 1/0)
    kernel.best_sums.cache_clear()
    with pytest.warns(UserWarning, match='ZeroDivisionError: division by zero'):
        assert kernel.best_sums(torch.device('cuda')) is masks.plain_sums
    kernel.best_sums.cache_clear()

@contextmanager
def crowded(model, tokens, after=0):
    "A module that runs out of memory, in the forward pass, or in the backward pass after `after` others."
    seen, failed = [], []
    def fail(size):
        failed.append(size)
        raise torch.cuda.OutOfMemoryError(f'{size} tokens')
    def backward(size, grad):
        seen.append(size)
        if size > tokens and len(seen) % (after+1) == 0: fail(size)
    def forward(module, args, out):
        size = out.shape[0]*out.shape[1]
        if after and out.requires_grad: out.register_hook(lambda grad: backward(size, grad))
        elif size > tokens: fail(size)
    handle = model.base_model.encoder.layer[1].register_forward_hook(
        lambda m, args, out: forward(m, args, out if isinstance(out, torch.Tensor) else out[0]))
    try: yield failed
    finally: handle.remove()

@pytest.mark.parametrize('sizes', [(3, 1, 4, 2), (10,), (1, 9)], ids=str)
@pytest.mark.parametrize('estimator, after', [('empirical', 0), ('empirical', 1), ('exact', 0), ('exact', 1)])
def test_too_large_for_the_memory_loses_nothing(family, estimator, after, sizes):
    "Also when it fails at the second of three classes, the first one already measured."
    model, batches = tiny(family), ragged_batches(family, sizes)
    want = mask_fisher(model, batches, labels=estimator, matrices='all', **QUIET)
    with crowded(model, 24, after) as failed:
        got = mask_fisher(model, batches, labels=estimator, matrices='all', **QUIET)
    assert bool(failed) or (after and estimator == 'empirical')
    same(got, (want.heads, want.rows))
    assert got.num_examples == 10
    scale = want.row_matrices.abs().max()
    assert_close(got.row_matrices, want.row_matrices, rtol=1e-9, atol=1e-12*scale)

def test_one_example_that_does_not_fit_is_an_error(family):
    model = tiny(family)
    with crowded(model, 2), pytest.raises(torch.cuda.OutOfMemoryError): mask_fisher(model, ragged_batches(family), **QUIET)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

def test_a_batch_whose_mean_is_squared_is_never_cut():
    model, batches = tiny('bert'), ragged_batches('bert', (10,))
    with crowded(model, 24), pytest.raises(torch.cuda.OutOfMemoryError): mask_fisher(model, batches, variant='released', **QUIET)
