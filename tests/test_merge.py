"""`merge` against Eq. 5 written by hand."""
import pytest
import torch
from torch.testing import assert_close

from fisher_nodes import MaskFisher, mask_fisher, merge
from reference import body, eq5, examples, ragged_batches, tiny
from test_masks_fisher import to_dataset

NAMES = 'alpha', 'beta', 'gamma', 'delta', 'epsilon'

def make_models(family, n=2, **kw):
    return {t: tiny(family, seed=i, num_labels=2+i, **kw) for i, t in enumerate(NAMES[:n])}

def make_fisher(seed=0, layers=2, heads=4, intermediate=24, scale=1., dtype=torch.float64, **kw):
    "Random and log-uniform over four decades."
    gen = torch.Generator().manual_seed(100+seed)
    rand = lambda *shape: 10**(-4*torch.rand(*shape, generator=gen, dtype=torch.float64))
    return MaskFisher(heads=(rand(layers, heads)*scale).to(dtype), rows=(rand(layers, intermediate)*scale).to(dtype),
                      **{'num_examples': 8, 'meta': {}, **kw})

def make_fishers(models, **kw): return {t: make_fisher(i, **kw) for i, t in enumerate(models)}

def hand(models, fishers, lambdas=None, **kw):
    return eq5([body(m) for m in models.values()], [(f.heads, f.rows) for f in fishers.values()],
               [float((lambdas or {}).get(t, 1)) for t in models], 4, **kw)

def ones(models): return {t: MaskFisher(torch.ones(2, 4), torch.ones(2, 24), 1, {}) for t in models}

def same_body(merged, want, rtol=1e-12, atol=1e-15):
    "Every entry of the state dict; `atol` is the rounding left where terms of size .2 cancel."
    got = merged.body.state_dict()
    assert got.keys() == want.keys()
    for k, v in got.items():
        assert_close(v.to(want[k].dtype), want[k], rtol=rtol, atol=atol, msg=lambda m: f'{k}: {m}')


# --- Eq. 5 ------------------------------------------------------------------------------------

@pytest.mark.parametrize('n', [1, 2, 3, 5])
@pytest.mark.parametrize('weights', [None, dict(alpha=1, beta=.5, gamma=3, delta=1e-3, epsilon=7)], ids=['one', 'lambda'])
def test_equals_eq5(family, n, weights):
    models = make_models(family, n)
    fishers, lambdas = make_fishers(models), weights and {t: weights[t] for t in models}
    same_body(merge(models, fishers, weights=lambdas), hand(models, fishers, lambdas))

SCHEMES = {'paper': {}, 'with-value': dict(by_head=('query', 'key', 'value')), 'heads': dict(by_row=()),
           'rows': dict(by_head=()), 'average': dict(by_head=(), by_row=())}

@pytest.mark.parametrize('scheme', SCHEMES)
def test_named_schemes(family, scheme):
    models = make_models(family)
    fishers = make_fishers(models)
    same_body(merge(models, fishers, scheme=scheme), hand(models, fishers, **SCHEMES[scheme]))

@pytest.mark.parametrize('n', [1, 2, 3, 5])
@pytest.mark.parametrize('weights', [None, dict(alpha=1, beta=.5, gamma=3, delta=1e-3, epsilon=7)], ids=['one', 'lambda'])
def test_average_is_eq5_with_fisher_one(family, n, weights):
    models, lambdas = make_models(family, n), None
    if weights: lambdas = {t: weights[t] for t in models}
    same_body(merge(models, method='average', weights=lambdas), hand(models, ones(models), lambdas))

def test_fisher_measured_by_merge_is_the_one_measured_by_hand(family):
    models = make_models(family, 2)
    data = {t: to_dataset(examples(20, m.config.num_labels, seed=i)) for i, (t, m) in enumerate(models.items())}
    fishers = {t: mask_fisher(m, data[t], num_samples=12, seed=5, progress=False) for t, m in models.items()}
    want = hand(models, fishers)
    same_body(merge(models, data=data, num_samples=12, seed=5), want)
    same_body(merge(models, fishers), want)

def test_float32_fishers_of_float64_models(family):
    models = make_models(family)
    fishers = make_fishers(models, dtype=torch.float32)
    same_body(merge(models, fishers), hand(models, fishers))

@pytest.mark.parametrize('dtype,unit', [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float32, 2**-24)], ids=str)
@pytest.mark.parametrize('method', ['mask-fisher', 'average'])
@pytest.mark.parametrize('n', [2, 5])
def test_half_precision_is_rounded_once(family, dtype, unit, method, n):
    "Computed in float32 at least, stored as it came: within one rounding (`unit`), plus float32's own noise."
    models = make_models(family, n, dtype=dtype)
    fishers = make_fishers(models, dtype=torch.float32) if method == 'mask-fisher' else None
    merged = merge(models, fishers, method=method)
    assert {v.dtype for v in merged.body.state_dict().values() if v.is_floating_point()} == {dtype}
    want = {k: v.double() if v.is_floating_point() else v for k, v in hand(models, fishers or ones(models)).items()}
    same_body(merged, want, rtol=unit*1.01 if unit > 1e-6 else 1e-6, atol=3e-7)


# --- invariants -------------------------------------------------------------------------------

def test_order_of_models_does_not_matter(family):
    models = make_models(family, 5)
    fishers, order = make_fishers(models), [3, 0, 4, 2, 1]
    turned = {NAMES[i]: models[NAMES[i]] for i in order}
    same_body(merge(turned, fishers), merge(models, fishers).body.state_dict(), rtol=1e-13)

@pytest.mark.parametrize('scale', [1e-25, 1e-8, 3., 1e12])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
def test_scale_of_fishers_does_not_matter(family, scale, dtype):
    models = make_models(family, 3)
    small = make_fishers(models, scale=scale, dtype=dtype)
    same_body(merge(models, small), hand(models, make_fishers(models)), rtol=1e-12 if dtype == torch.float64 else 1e-6,
              atol=1e-15 if dtype == torch.float64 else 1e-7)

def test_scale_of_lambdas_does_not_matter(family):
    models = make_models(family, 3)
    fishers = make_fishers(models)
    sevens = merge(models, fishers, weights=dict.fromkeys(models, 7))
    same_body(sevens, merge(models, fishers).body.state_dict())

def test_scale_of_one_fisher_does_matter(family):
    models = make_models(family, 2)
    fishers, louder = make_fishers(models), make_fishers(models)
    louder['alpha'].heads.mul_(100)
    key = 'encoder.layer.0.attention.self.query.weight'
    a, b = (merge(models, f).body.state_dict()[key] for f in (fishers, louder))
    assert (a-b).norm() > .05*a.norm()

def test_equal_fishers_are_the_plain_mean(family):
    models = make_models(family, 3)
    same = dict.fromkeys(models, make_fisher(0))
    same_body(merge(models, same), merge(models, method='average').body.state_dict())

@pytest.mark.parametrize('n', [1, 2, 3])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_model_merged_with_itself_is_itself(family, n, dtype):
    models = dict.fromkeys(NAMES[:n], tiny(family, dtype=dtype))
    rtol = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 0}[dtype]
    same_body(merge(models, make_fishers(models, dtype=torch.float32)), body(models['alpha']), rtol=rtol, atol=0)

def test_lambda_zero_leaves_the_other_model(family):
    models = make_models(family)
    same_body(merge(models, make_fishers(models), weights=dict(alpha=0, beta=1)), body(models['beta']), rtol=1e-14)

def test_only_query_key_and_first_linear_are_weighted(family):
    models = make_models(family)
    weighted, plain = (merge(models, *f, method=m).body.state_dict() for f, m in
                       (([make_fishers(models)], 'mask-fisher'), ([], 'average')))
    differ = {k.split('.', 3)[-1] for k in plain if not torch.allclose(plain[k].double(), weighted[k].double(), rtol=1e-12, atol=1e-14)}
    assert differ == {f'{part}.{kind}' for kind in ('weight', 'bias') for part in
                      ('attention.self.query', 'attention.self.key', 'intermediate.dense')}


# --- zero Fishers -----------------------------------------------------------------------------

def with_zeros(fishers, nodes=3):
    "The first `nodes` rows of layer 1 and head 2 of layer 0 are zero in every model, row 9 in the first alone."
    for f in fishers.values(): f.rows[1,:nodes], f.heads[0,2] = 0, 0
    next(iter(fishers.values())).rows[1,9] = 0
    return fishers

def numbers(report):
    "Every number in a nested report, under the name that leads to it."
    if isinstance(report, dict): return {f'{k}.{kk}': v for k, sub in report.items() for kk, v in numbers(sub).items()}
    return {'': report} if isinstance(report, int) and not isinstance(report, bool) else {}

@pytest.mark.parametrize('weights', [None, dict(alpha=1, beta=.5, gamma=3)], ids=['one', 'lambda'])
def test_nodes_without_fisher_are_averaged_and_counted(family, weights):
    models = make_models(family, 3)
    fishers = with_zeros(make_fishers(models))
    before = {t: (f.heads.clone(), f.rows.clone()) for t, f in fishers.items()}
    merged = merge(models, fishers, weights=weights)
    same_body(merged, hand(models, fishers, weights))
    zeros = {k: v for k, v in numbers(merged.report).items() if 'zero' in k.lower()}
    assert set(zeros.values()) & {4} or {1, 3} <= set(zeros.values()), zeros
    for t, f in fishers.items():
        for got, want in zip((f.heads, f.rows), before[t]): assert_close(got, want, rtol=0, atol=0)

def test_all_zero_fishers_are_the_plain_mean(family):
    models = make_models(family)
    same_body(merge(models, make_fishers(models, scale=0)), merge(models, method='average').body.state_dict())

def test_no_zero_is_reported_where_there_is_none(family):
    models = make_models(family)
    assert not any(v for k, v in numbers(merge(models, make_fishers(models)).report).items() if 'zero' in k.lower())

def test_a_zero_lambda_on_the_only_fisher_is_no_division_by_zero(family):
    "beta alone counts, and has no Fisher for some nodes: those are beta's."
    models = make_models(family)
    fishers = make_fishers(models)
    fishers['beta'].rows[1,4] = 0
    merged = merge(models, fishers, weights=dict(alpha=0, beta=2))
    same_body(merged, body(models['beta']), rtol=1e-14)


# --- what comes back --------------------------------------------------------------------------

def test_merged_is_a_mapping_of_models_with_one_body_and_their_own_heads(family):
    models = make_models(family, 3)
    merged = merge(models, make_fishers(models))
    assert list(merged) == list(models) and len(merged) == 3 and 'alpha' in merged and 'zeta' not in merged
    for t, m in merged.items():
        assert m.base_model is merged.body and m.config.num_labels == models[t].config.num_labels and not m.training
        own = lambda model: {k: v for k, v in model.state_dict().items() if not k.startswith(model.base_model_prefix)}
        assert own(m).keys() == own(models[t]).keys()
        for k, v in own(m).items(): assert_close(v, own(models[t])[k], rtol=0, atol=0)
    with pytest.raises(KeyError): merged['zeta']

def test_nothing_is_shared_with_the_models_that_were_merged(family):
    models = make_models(family, 2)
    ptrs = lambda ms: {p.untyped_storage().data_ptr() for m in ms for p in m.parameters()}
    for kw in (dict(fishers=make_fishers(models)), dict(method='average')):
        assert not ptrs(models.values()) & ptrs(merge(models, **kw).values())
    alone = {'alpha': models['alpha']}
    assert not ptrs(alone.values()) & ptrs(merge(alone, method='average').values())

def test_logits_of_every_task_from_one_body_pass(family):
    models, (batch,) = make_models(family, 3), ragged_batches(family, (4,))
    merged, calls = merge(models, make_fishers(models)), []
    inputs = {k: v for k, v in batch.items() if k != 'labels'}
    want = {t: m(**inputs).logits for t, m in merged.items()}
    merged.body.register_forward_hook(lambda *_: calls.append(1))
    got = merged.logits(**inputs)
    assert list(got) == list(models) and len(calls) == 1
    for t in models: assert_close(got[t], want[t], rtol=1e-12, atol=1e-14)

def test_a_list_of_models_is_given_names(family):
    models = make_models(family)
    merged = merge(list(models.values()), list(make_fishers(models).values()))
    assert len(merged) == 2 and all(isinstance(t, str) and t for t in merged)
    same_body(merged, hand(models, make_fishers(models)))

def test_the_report_names_the_method_and_the_tasks(family):
    models = make_models(family)
    text = repr(merge(models, make_fishers(models), weights=dict(alpha=1, beta=.5)).report)
    for word in ('mask-fisher', 'alpha', 'beta', '0.5'): assert word in text

def test_a_merge_can_be_merged_again(family):
    models = make_models(family, 3)
    pair = merge({t: models[t] for t in NAMES[:2]}, method='average')
    again = merge({'alpha': pair['alpha'], 'gamma': models['gamma']}, method='average', weights=dict(alpha=2, gamma=1))
    same_body(again, hand(models, ones(models)))
