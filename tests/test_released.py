"""`variant='released'` against what the authors' code computes."""
import numpy as np
import pytest
import torch

from fisher_nodes import mask_fisher, merge
from reference import FAMILIES, body, collate, examples, ragged_batches, released_mask_fisher, released_merge, split, tiny
from test_masks_fisher import QUIET, far, same, to_dataset
from test_merge import make_fishers, make_models, same_body, with_zeros

def released(models, fishers):
    return released_merge([body(m) for m in models.values()], [(f.heads, f.rows) for f in fishers.values()], 4)

@pytest.mark.parametrize('attn', ['sdpa', 'eager'])
@pytest.mark.parametrize('sizes', [(3, 1, 4, 2), (1,)*10, (10,)], ids=str)
@pytest.mark.parametrize('dtype,rtol', [(torch.float64, 1e-10), (torch.float32, 1e-3)], ids=str)
def test_fisher_equals_released(family, attn, sizes, dtype, rtol):
    model, batches = tiny(family, attn=attn, dtype=dtype), ragged_batches(family, sizes)
    fisher = mask_fisher(model, batches, variant='released', **QUIET)
    want = [w.to(dtype) for w in released_mask_fisher(model, batches)]
    same(fisher, want, rtol=rtol)
    for got, ref in zip((fisher.heads, fisher.rows), want):
        assert ((got-ref).norm(dim=1) <= 1e-5*ref.norm(dim=1)).all()
    assert fisher.num_examples == 10 and fisher.meta['variant'] == 'released'

def test_released_depends_on_the_grouping(family):
    "What makes it the wrong estimator: the same ten examples, other batches, other numbers."
    model = tiny(family)
    fisher = mask_fisher(model, ragged_batches(family, (5, 5)), variant='released', **QUIET)
    assert far(fisher, released_mask_fisher(model, ragged_batches(family, (3, 1, 4, 2))))

def test_released_cuts_the_last_batch(family):
    "Seven of ten examples: the mean of the third batch is over three."
    model = tiny(family)
    fisher = mask_fisher(model, ragged_batches(family, (3, 1, 4, 2)), num_samples=7, variant='released', **QUIET)
    cut = ragged_batches(family, (3, 1, 4, 2))[:3]
    cut[2] = {k: v[:3] for k, v in cut[2].items()}
    same(fisher, released_mask_fisher(model, cut))

@pytest.mark.parametrize('num_samples,seed', [(None, 0), (37, 1)])
def test_released_samples_a_dataset_with_replacement(family, num_samples, seed):
    "As `set_seed(seed); np.random.choice(len(data), n)` does, even for all; then 32 a batch, in the order drawn."
    model, rows = tiny(family), examples(40)
    drawn = np.random.RandomState(seed).choice(40, num_samples or 40)
    fisher = mask_fisher(model, to_dataset(rows), num_samples=num_samples, seed=seed, variant='released', **QUIET)
    pad = FAMILIES[family][2]
    same(fisher, released_mask_fisher(model, [collate(g, pad) for g in split([rows[i] for i in drawn], (32, 32))]))

@pytest.mark.parametrize('n', [1, 2, 3])
@pytest.mark.parametrize('zeros', [False, True])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=str)
def test_merge_equals_released(family, n, zeros, dtype):
    models = make_models(family, n, dtype=dtype)
    fishers = make_fishers(models, dtype=dtype)
    if zeros: fishers = with_zeros(fishers)
    before = {t: (f.heads.clone(), f.rows.clone()) for t, f in fishers.items()}
    merged = merge(models, fishers, variant='released')
    tight = dtype == torch.float64
    want = {k: v.to(dtype) if v.is_floating_point() else v for k, v in released(models, fishers).items()}
    same_body(merged, want, rtol=1e-12 if tight else 1e-6, atol=1e-15 if tight else 1e-7)
    for t, f in fishers.items(): assert torch.equal(f.heads, before[t][0]) and torch.equal(f.rows, before[t][1])

def test_merge_of_measured_released_fishers(family):
    models = make_models(family)
    data = {t: ragged_batches(family, num_labels=m.config.num_labels, seed=i) for i, (t, m) in enumerate(models.items())}
    pairs = [released_mask_fisher(m, data[t]) for t, m in models.items()]
    want = released_merge([body(m) for m in models.values()], pairs, 4)
    same_body(merge(models, data=data, variant='released'), want, rtol=1e-9)
    fishers = {t: mask_fisher(m, data[t], variant='released', **QUIET) for t, m in models.items()}
    same_body(merge(models, fishers, variant='released'), want, rtol=1e-9)

def test_released_does_not_depend_on_the_order_of_models(family):
    models = make_models(family, 3)
    fishers = make_fishers(models)
    turned = dict(reversed(models.items()))
    same_body(merge(turned, fishers, variant='released'), merge(models, fishers, variant='released').body.state_dict(), rtol=1e-13)

def test_the_two_variants_differ_everywhere_but_where_they_agree(family):
    models = make_models(family)
    fishers = make_fishers(models)
    paper, rel = (merge(models, fishers, variant=v).body.state_dict() for v in ('paper', 'released'))
    agree = {k for k in paper if torch.allclose(paper[k].double(), rel[k].double(), rtol=1e-12, atol=1e-14)}
    assert all(any(w in k for w in ('query', 'key', 'intermediate')) for k in agree if paper[k].is_floating_point())
    assert len(agree) >= 12
