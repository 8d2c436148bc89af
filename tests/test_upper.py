"""Bodies of several tasks with something of their own, one number at a time in float64."""
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from fisher_nodes.methods.upper import emr_states, twin_states
from test_rivals import make

def states(n=3, dtype=torch.float64, **kw):
    base, models = make(n=n, dtype=dtype, **kw)
    def body(m): return {k: p.detach() for k, p in m.base_model.named_parameters()}
    return body(base), {t: body(m) for t, m in models.items()}

def vectors(base, found): return [{k: (v.double()-base[k].double()).numpy() for k, v in s.items()} for s in found.values()]

def slow_emr(base, found):
    taus, elected = vectors(base, found), {}
    for k in base:
        elected[k] = np.zeros(base[k].shape)
        for place in np.ndindex(*base[k].shape):
            xs = [t[k][place] for t in taus]
            sign = np.sign(sum(xs))
            elected[k][place] = sign*max([abs(x) for x in xs if x*sign > 0], default=0.)
    out = []
    for t in taus:
        kept = {k: np.where(t[k]*elected[k] > 0, elected[k], 0.) for k in base}
        factor = sum(np.abs(v).sum() for v in t.values())/sum(np.abs(v).sum() for v in kept.values())
        out.append({k: base[k].double().numpy()+factor*v for k, v in kept.items()})
    return out

def slow_twin(base, found, share, scale):
    taus, out, numbers = vectors(base, found), [], []
    for t in taus:
        out.append({}); numbers.append(0)
        for k, b in base.items():
            shared = b.double().numpy()+scale*sum(o[k] for o in taus)
            part = b.double().numpy()+t[k]-shared
            if part.ndim == 2:
                values, axes = np.linalg.eigh(part.T @ part) # smallest first
                r = max(1, int(share*min(part.shape)))
                part = sum(np.outer(part @ v, v) for v in axes.T[-r:])
                numbers[-1] += r*sum(part.shape)
            else: numbers[-1] += part.size
            out[-1][k] = shared+part
    return out, numbers

def same(got, want, rtol=1e-8):
    assert len(got.states) == len(want)
    for s, w in zip(got.states.values(), want):
        assert list(s) == list(w)
        for k, v in s.items(): assert_close(v.double().numpy(), w[k], rtol=rtol, atol=0, msg=lambda m: f'{k}: {m}')

@pytest.mark.parametrize('n', [1, 3])
def test_emr(n):
    base, found = states(n)
    got, size = emr_states(found, base), sum(v.numel() for v in base.values())
    same(got, slow_emr(base, found))
    assert got.extra_bits == {t: size+64 for t in found}
    if n == 1: same(got, [{k: v.numpy() for k, v in s.items()} for s in found.values()])

@pytest.mark.parametrize('share,scale', [(.1, .3), (.5, 1/3), (1., .3)])
def test_twin(share, scale):
    base, found = states()
    got, (want, numbers) = twin_states(found, base, share, scale), slow_twin(base, found, share, scale)
    same(got, want, rtol=1e-6)
    assert list(got.extra_bits.values()) == [64*o for o in numbers]
    if share == 1: same(got, [{k: v.numpy() for k, v in s.items()} for s in found.values()])

def test_the_more_is_kept_the_nearer_a_task_is_to_its_own_model():
    base, found = states()
    def far(o): return sum(float((o.states['alpha'][k]-v).square().sum()) for k, v in found['alpha'].items())
    gaps = [far(twin_states(found, base, share)) for share in (.1, .3, .6, 1.)]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 100*gaps[-1]

def test_tensors_of_more_axes_are_folded():
    g = torch.Generator().manual_seed(0)
    base, found = [dict(w=torch.zeros(4, 3, 2).double()), dict(a=dict(w=torch.randn(4, 3, 2, generator=g).double()))]
    flat = twin_states(dict(a=dict(w=found['a']['w'].flatten(1))), dict(w=base['w'].flatten(1)), .5)
    got = twin_states(found, base, .5)
    assert_close(got.states['a']['w'].flatten(1), flat.states['a']['w'], rtol=0, atol=0)
    assert got.extra_bits == flat.extra_bits == dict(a=2*(4+6)*64)

@pytest.mark.parametrize('make_states', [emr_states, twin_states])
def test_types_are_kept_and_rounded_once(make_states):
    base, found = states(dtype=torch.bfloat16)
    got = make_states(found, base)
    assert {v.dtype for s in got.states.values() for v in s.values()} == {torch.bfloat16}
    want = slow_emr(base, found) if make_states is emr_states else slow_twin(base, found, .1, .3)[0]
    for s, w in zip(got.states.values(), want):
        for k, v in s.items(): assert_close(v, torch.tensor(w[k]).bfloat16(), rtol=2**-7, atol=0)

def without(d, k): return {n: v for n, v in d.items() if n != k}

@pytest.mark.parametrize('make_states', [emr_states, twin_states])
@pytest.mark.parametrize('spoil,said', [
    (lambda b, s, k: (b, {}), 'states` is empty'),
    (lambda b, s, k: (b, s | dict(beta=without(s['beta'], k))), r"state of 'beta' does not fit the model: missing \['pooler"),
    (lambda b, s, k: (without(b, k), s), r"state of 'alpha' does not fit .*unknown \['pooler"),
    (lambda b, s, k: (b, s | dict(beta=s['beta'] | {k: torch.zeros(3)})), r"state of 'beta', pooler\.dense\.bias: shape \(3,\), expected \(16,\)"),
    (lambda b, s, k: (b, s | dict(beta=s['beta'] | {k: s['beta'][k]*float('nan')})), r"state of 'beta', pooler\.dense\.bias: not all numbers are finite"),
    (lambda b, s, k: (b | {k: b[k]/0}, s), r'`base`, pooler\.dense\.bias: not all numbers are finite')])
def test_wrong_states(make_states, spoil, said):
    base, found = spoil(*states(2), 'pooler.dense.bias')
    with pytest.raises(ValueError, match=said): make_states(found, base)

@pytest.mark.parametrize('options', [dict(rank_share=0), dict(rank_share=1.01), dict(rank_share='all'), dict(scale=float('nan'))], ids=str)
def test_wrong_options(options):
    (name, value), = options.items()
    with pytest.raises(ValueError, match=f'`{name}` must be .*got .*{value}'): twin_states(*states(2)[::-1], **options)
