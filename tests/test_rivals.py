"""Every way to merge, held to its paper: one number at a time, in float64, through `merge` alone."""
import copy, json, re
from functools import cache

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, BertForMaskedLM, BertModel, RobertaModel

from fisher_nodes import MaskFisher, Merged, merge
from fisher_nodes.engine.measure import linear_grams
from fisher_nodes.methods.regmean import Grams
from fisher_nodes.methods.method import METHODS
from fisher_nodes.engine.measure import parameter_fisher
from fisher_nodes.methods.full_fisher import ParameterFisher
from reference import examples, tiny
from test_masks_fisher import to_dataset
from test_purity import unchanged

SIZE, D, H = dict(vocab=30, positions=20, hidden=16, heads=4, intermediate=24), 16, 4
TASKS = 'alpha', 'beta', 'gamma'
UNEQUAL = dict(alpha=1, beta=.3, gamma=2.5)
VECTORS = 'task-arithmetic', 'ties', 'dare', 'wudi', 'actmat'
FITTED = {'regmean': 'gram', 'wudi': 'task vector', 'actmat': 'task vector'} # what weights linear layers, where the rest is averaged

# --- models and evidence --------------------------------------------------------------------

def noisy(model, seed, size):
    "Every number of the body moved by noise."
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.base_model.parameters(): p.add_(size*torch.randn(p.shape, generator=gen, dtype=torch.float64).to(p))
    return model

@cache
def _make(family, n, layers, dtype, positive, noise):
    "A base, and `n` models fine-tuned from it, with heads of 2, 3 and 2 labels; `positive` leaves no sum where terms cancel."
    base = tiny(family, 2, seed=9, layers=layers, **SIZE)
    if positive:
        with torch.no_grad():
            for p in base.base_model.parameters(): p.abs_().add_(1)
    models = {}
    for i, t in enumerate(TASKS[:n]):
        models[t] = tiny(family, 2+i%2, seed=i, layers=layers, **SIZE)
        models[t].base_model.load_state_dict(base.base_model.state_dict())
        noisy(models[t], 50+i, noise)
    return base.to(dtype), {t: m.to(dtype) for t, m in models.items()}

def make(family='bert', n=2, layers=2, dtype=torch.float64, positive=False, noise=.1, own=False):
    "As `_make`, which see; made once, for no merge may change them. A test that does takes its `own`."
    base, models = _make(family, n, layers, dtype, positive, noise)
    return copy.deepcopy((base, models)) if own else (base, dict(models))

def arrays(model): return {k: p.detach().double().numpy().copy() for k, p in model.base_model.named_parameters()}

def linear_weights(model):
    "Names of the weights of linear layers, known by their own names."
    return [k for k in arrays(model) if re.search(r'(query|key|value|dense)\.weight$', k)]

def make_mask_fishers(models, layers=2):
    gen = np.random.default_rng(0)
    rand = lambda *shape: torch.tensor(10**-gen.uniform(0, 4, shape))
    return {t: MaskFisher(heads=rand(layers, H), rows=rand(layers, 24), num_examples=8) for t in models}

def make_fishers(models, dtype=torch.float64, low=-9, high=-2):
    "Log-uniform; the default lies on both sides of the floor, and no two models have the same norm."
    gen = np.random.default_rng(1)
    return {t: ParameterFisher({k: torch.tensor(10**gen.uniform(low, high, v.shape)*(3+i)**3).to(dtype) for k, v in arrays(m).items()}, 8)
            for i, (t, m) in enumerate(models.items())}

def make_inputs(models, rows=40):
    "What the linear layers of each model saw: name -> `(rows, in)`, of correlated columns."
    gen = np.random.default_rng(2)
    def inputs(width): return gen.normal(size=(rows, width)) @ gen.normal(size=(width, width)) + gen.normal(size=width)
    return {t: {k: inputs(arrays(m)[k].shape[1])*(1+2*i) for k in linear_weights(m)} for i, (t, m) in enumerate(models.items())}

def make_grams(models, rows=40, dtype=torch.float64):
    return {t: Grams({k: torch.tensor(x.T @ x/8).to(dtype) for k, x in xs.items()}, 8) for t, xs in make_inputs(models, rows).items()}

EVIDENCE = {'mask-fisher': make_mask_fishers, 'fisher': make_fishers, 'regmean': make_grams}

def call(method, base, models, weights=None, fishers=None, **kw):
    "`merge`, with whatever the method needs made up."
    if method == 'layer-mean': method, kw = 'mask-fisher', dict(scheme='layer-mean') | kw
    if method in EVIDENCE: kw['fishers'] = fishers or EVIDENCE[method](models)
    if method in VECTORS: kw['base'] = base
    return merge(models, method=method, weights=weights, progress=False, **kw)

RUN = [m for m, o in METHODS.items() if o.runs_models] # test_residual.py, test_prodistill.py
ALL = [m for m in METHODS if m not in ('mask-fisher', *RUN)] + ['layer-mean']

def lambdas(models, weights): return [float((weights or {}).get(t, 1)) for t in models]

def same(merged, models, want, rtol=1e-8):
    "Every parameter of the body; integers come from the first model."
    first = next(iter(models.values())).base_model
    assert merged.body.state_dict().keys() == first.state_dict().keys()
    for k, p in merged.body.named_parameters():
        assert_close(p.detach().double(), torch.as_tensor(want[k]).double(), rtol=rtol, atol=0, msg=lambda m: f'{k}: {m}')
    for k, b in first.named_buffers(): assert_close(dict(merged.body.named_buffers())[k], b, rtol=0, atol=0)

def differ(a, b, by=1e-3):
    "Some parameter differs by more than `by` of its norm."
    a, b = arrays(a), arrays(b)
    return any(np.linalg.norm(a[k]-b[k]) > by*np.linalg.norm(b[k]) for k in a)

def equal_bits(a, b):
    "Same keys, types and bits."
    assert a.keys() == b.keys()
    for k in a: assert_close(a[k], b[k], rtol=0, atol=0, equal_nan=True, msg=lambda m: f'{k}: {m}')


# --- the papers, one number at a time -------------------------------------------------------

def each_number(bodies, one):
    "`one(name, place, numbers)` for every place of every parameter; `numbers` has one of each model."
    out = {}
    for name, first in bodies[0].items():
        out[name] = np.zeros_like(first)
        for place in np.ndindex(first.shape): out[name][place] = one(name, place, [b[name][place] for b in bodies])
    return out

def weighted(xs, ws): return sum(w*x for w, x in zip(ws, xs))/sum(ws)

def plain(models, lam):
    "The average of the models."
    return each_number([arrays(m) for m in models.values()], lambda name, place, xs: weighted(xs, lam))

def matena_raffel(models, lam, fishers, normalise=False, floor=1e-6):
    "Each number weighted by its own Fisher, of at least `floor`; a model's coefficient over the norm of all its Fishers."
    F = [{k: v.double().numpy() for k, v in f.values.items()} for f in fishers.values()]
    norms = [sum(float((v**2).sum()) for v in f.values())**.5 if normalise else 1. for f in F]
    def one(name, place, xs):
        return weighted(xs, [w/n*max(f[name][place], floor) for w, n, f in zip(lam, norms, F)])
    return each_number([arrays(m) for m in models.values()], one)

def jin(models, lam, grams, off_diagonal=.9, anchor=0.):
    """(ΣλG̃)⁻¹ ΣλG̃W for the weight W, of shape (in, out), of every linear layer; the average of all else. An anchor adds
    γ times the mean size of an input to the left, and that times the average to the right."""
    out, first = plain(models, lam), next(iter(models.values()))
    for name in linear_weights(first):
        left, right = 0, 0
        for w, m, g in zip(lam, models.values(), grams.values()):
            G = g.values[name].double().numpy()
            G = np.array([[G[i, j]*(1 if i == j else off_diagonal) for j in range(len(G))] for i in range(len(G))])
            left, right = left + w*G, right + w*G @ arrays(m)[name].T
        pull = anchor*np.trace(left)/len(left)
        left, right = left + pull*np.eye(len(left)), right + pull*out[name].T
        out[name] = (np.linalg.inv(left) @ right).T
    return out

def ilharco(base, models, lam, scale):
    "Base plus `scale` times the sum of the task vectors."
    def one(name, place, xs):
        b, *xs = xs
        return b + scale*sum(w*(x-b) for w, x in zip(lam, xs))
    return each_number([arrays(base), *(arrays(m) for m in models.values())], one)

def task_vector(base, model):
    "All parameters of the body in one row."
    b, m = arrays(base), arrays(model)
    return np.concatenate([(m[k]-b[k]).ravel() for k in b])

def unflatten(row, like):
    out = {}
    for k, v in like.items(): out[k], row = row[:v.size].reshape(v.shape), row[v.size:]
    return out

def yadav(base, models, lam, keep, scale):
    "Trim every task vector to its `keep` largest numbers, elect a sign for each place, average those that have it."
    trimmed = []
    for m in models.values():
        tau = task_vector(base, m)
        for i in sorted(range(len(tau)), key=lambda i: -abs(tau[i]))[keep:]: tau[i] = 0
        trimmed.append(tau)
    merged = np.zeros(len(trimmed[0]))
    for p in range(len(merged)):
        sign = np.sign(sum(w*tau[p] for w, tau in zip(lam, trimmed)))
        agree = [(w, tau[p]) for w, tau in zip(lam, trimmed) if tau[p] != 0 and np.sign(tau[p]) == sign]
        if agree: merged[p] = weighted([x for _, x in agree], [w for w, _ in agree])
    start = arrays(base)
    return {k: start[k] + scale*v for k, v in unflatten(merged, start).items()}

def cheng(base, models, lam, normalise=True, ridge=0.):
    """Of all task vectors the smallest one that answers the rows of each as that one does, by a solver of least squares: no Gram
    matrix, and none inverted. What is noise in the precision of the models is cut off; a ridge is more rows, which ask for nothing."""
    out, start = plain(models, lam), arrays(base)
    eps = max(torch.finfo(torch.promote_types(p.dtype, torch.float32)).eps for m in (base, *models.values()) for p in m.base_model.parameters())
    for name in linear_weights(base):
        rows, answers = [], []
        for w, m in zip(lam, models.values()):
            tau = arrays(m)[name]-start[name]
            size = np.linalg.norm(tau) if normalise else 1.
            if size: rows.append(w**.5*tau/size); answers.append(w**.5*tau @ tau.T/size)
        width = start[name].shape[1]
        if not rows: out[name] = start[name]; continue
        tall, wide = np.concatenate(rows), np.concatenate(answers)
        if ridge: tall, wide = [np.concatenate([a, b]) for a, b in ((tall, (ridge*(tall**2).sum()/width)**.5*np.eye(width)), (wide, np.zeros((width, wide.shape[1]))))]
        out[name] = start[name]+np.linalg.lstsq(tall, wide, rcond=None if ridge else (width*eps)**.5)[0].T
    return out

def layer_mean(models, lam, fishers):
    "Queries and keys of a layer by the mean Fisher of its heads, its first FFN linear by that of its rows."
    def weight(f, name):
        if found := re.match(r'encoder\.layer\.(\d+)\.attention\.self\.(query|key)\.', name):
            return sum(f.heads[int(found[1])].tolist())/len(f.heads[int(found[1])])
        if found := re.match(r'encoder\.layer\.(\d+)\.intermediate\.', name):
            return sum(f.rows[int(found[1])].tolist())/len(f.rows[int(found[1])])
        return 1.
    weights = {name: [w*weight(f, name) for w, f in zip(lam, fishers.values())] for name in arrays(models['alpha'])}
    return each_number([arrays(m) for m in models.values()], lambda name, place, xs: weighted(xs, weights[name]))


# --- each method is its paper ---------------------------------------------------------------

two_or_three = pytest.mark.parametrize('n,weights', [(2, None), (2, UNEQUAL), (3, UNEQUAL)], ids=['two', 'two unequal', 'three unequal'])
any_weights = pytest.mark.parametrize('weights', [None, UNEQUAL], ids=['one', 'unequal'])

def some(weights, models): return weights and {t: weights[t] for t in models}

@two_or_three
def test_average(family, n, weights):
    base, models = make(family, n)
    weights = some(weights, models)
    same(call('average', base, models, weights), models, plain(models, lambdas(models, weights)))

@two_or_three
@pytest.mark.parametrize('options', [{}, dict(normalise=True), dict(floor=1e-4), dict(normalise=True, floor=0)], ids=str)
def test_fisher(family, n, weights, options):
    base, models = make(family, n)
    weights, fishers = some(weights, models), make_fishers(models)
    same(call('fisher', base, models, weights, fishers, **options), models,
         matena_raffel(models, lambdas(models, weights), fishers, **options))

def test_the_floor_and_the_norm_make_a_difference():
    base, models = make()
    got = {str(o): call('fisher', base, models, **o).body for o in ({}, dict(floor=0), dict(normalise=True), dict(normalise=True, floor=0))}
    bodies = list(got.values())
    assert all(differ(a, b) for i, a in enumerate(bodies) for b in bodies[:i])

def test_numbers_without_any_fisher_are_averaged_if_there_is_no_floor():
    base, models = make(n=3)
    fishers, name = make_fishers(models), 'encoder.layer.1.output.dense.bias'
    for f in fishers.values(): f.values[name][3:6] = 0
    merged, lam = call('fisher', base, models, UNEQUAL, fishers, floor=0), lambdas(models, UNEQUAL)
    assert_close(merged.body.get_parameter(name)[3:6].detach().numpy(), plain(models, lam)[name][3:6], rtol=1e-10, atol=0)
    assert merged.report['averaged'] == dict(zero_fisher_elements=3)

@two_or_three
@pytest.mark.parametrize('off_diagonal', [None, 1., 0.])
def test_regmean(family, n, weights, off_diagonal):
    base, models = make(family, n)
    options = {} if off_diagonal is None else dict(off_diagonal=off_diagonal)
    weights, grams = some(weights, models), make_grams(models)
    same(call('regmean', base, models, weights, grams, **options), models, jin(models, lambdas(models, weights), grams, **options))

@two_or_three
@pytest.mark.parametrize('anchor', [1e-3, 2.])
def test_an_anchored_regmean(family, n, weights, anchor):
    base, models = make(family, n)
    weights, grams = some(weights, models), make_grams(models)
    merged = call('regmean', base, models, weights, grams, anchor=anchor)
    same(merged, models, jin(models, lambdas(models, weights), grams, anchor=anchor))
    assert differ(merged.body, call('regmean', base, models, weights, grams).body, by=1e-5)

def test_an_anchor_does_what_the_scale_of_grams_does_not():
    "None is RegMean bit for bit; a common factor on all grams changes nothing; a large one is the average."
    base, models = make()
    grams = make_grams(models)
    scaled = {t: Grams({k: 7*v for k, v in g.values.items()}, 8) for t, g in grams.items()}
    equal_bits(call('regmean', base, models, None, grams, anchor=0.).body.state_dict(), call('regmean', base, models, None, grams).body.state_dict())
    same(call('regmean', base, models, None, scaled, anchor=.5), models, arrays(call('regmean', base, models, None, grams, anchor=.5).body))
    same(call('regmean', base, models, None, grams, anchor=1e12), models, plain(models, [1, 1]), rtol=1e-5)

def test_an_anchor_is_enough_for_fewer_tokens_than_inputs():
    base, models = make()
    grams = make_grams(models, rows=3)
    with pytest.raises(ValueError, match='cannot be inverted'): call('regmean', base, models, None, grams, off_diagonal=1.)
    same(call('regmean', base, models, None, grams, off_diagonal=1., anchor=1e-2), models, jin(models, [1, 1], grams, 1., 1e-2), rtol=1e-6)

@any_weights
def test_regmean_is_the_regression_it_is_named_after(weights):
    "Of all weights, the one whose outputs are closest to every model's on that model's own inputs."
    base, models = make(n=3)
    xs, lam = make_inputs(models), lambdas(models, weights)
    merged = arrays(call('regmean', base, models, weights, make_grams(models), off_diagonal=1.).body)
    for name in linear_weights(base):
        tall = np.concatenate([w**.5*xs[t][name] for w, t in zip(lam, models)])
        answers = np.concatenate([w**.5*xs[t][name] @ arrays(m)[name].T for w, (t, m) in zip(lam, models.items())])
        assert_close(merged[name], np.linalg.lstsq(tall, answers, rcond=None)[0].T, rtol=1e-6, atol=0)

@pytest.mark.parametrize('n,weights', [(1, None), (2, UNEQUAL), (3, UNEQUAL)], ids=['one', 'two', 'three'])
@pytest.mark.parametrize('ridge', [0., .3])
@pytest.mark.parametrize('method', ['wudi', 'actmat'])
def test_least_interference(family, method, n, weights, ridge):
    "One model has fewer rows than inputs in half its matrices, so that all of them can only be inverted in part."
    base, models = make(family, n)
    weights = some(weights, models)
    merged = call(method, base, models, weights, ridge=ridge)
    same(merged, models, cheng(base, models, lambdas(models, weights), method == 'wudi', ridge), rtol=1e-6)
    assert n == 1 or differ(merged.body, call('task-arithmetic', base, models, weights, scale=1/n).body)

@pytest.mark.parametrize('method', ['wudi', 'actmat'])
def test_what_no_task_vector_reads_stays_at_the_base(method):
    base, models = make(own=True)
    name, start = 'encoder.layer.0.output.dense.weight', arrays(base)
    with torch.no_grad():
        for m in models.values(): m.base_model.get_parameter(name)[:, 3] = base.base_model.get_parameter(name)[:, 3]
        models['beta'].base_model.get_parameter('pooler.dense.weight').copy_(base.base_model.get_parameter('pooler.dense.weight'))
    for ridge in (0., .3):
        merged = arrays(call(method, base, models, ridge=ridge).body)
        assert_close(merged[name][:, 3], start[name][:, 3], rtol=1e-9, atol=0)
    alone = arrays(call(method, base, models).body)['pooler.dense.weight']
    assert_close(alone, arrays(models['alpha'])['pooler.dense.weight'], rtol=1e-6, atol=0)

@pytest.mark.parametrize('method', ['wudi', 'actmat'])
def test_a_ridge_that_is_too_small_is_refused(method):
    "With fewer rows than inputs; the error names the matrix."
    base, models = make(n=1)
    refused(r'output\.dense\.weight: cannot be inverted with ridge=1e-30; give a larger one, or 0', method, base, models, ridge=1e-30)

def test_longer_task_vectors_weigh_more_unless_normalised():
    base, models = make(own=True)
    with torch.no_grad():
        for p, b in zip(models['alpha'].base_model.parameters(), base.base_model.parameters()): p.copy_(b+5*(p-b))
    def far(method):
        merged, own = arrays(call(method, base, models).body), arrays(models['alpha'])
        return [np.linalg.norm(merged[k]-own[k]) for k in linear_weights(base)]
    assert all(a < b for a, b in zip(far('actmat'), far('wudi')))

def test_inputs_that_no_model_sees_are_averaged():
    base, models = make()
    grams, name = make_grams(models), 'encoder.layer.0.intermediate.dense.weight'
    for g in grams.values(): g.values[name][5], g.values[name][:, 5] = 0, 0
    want = copy.deepcopy(grams)
    for g in want.values(): g.values[name][5, 5] = 1e-3    # any number that is the same for all
    weights = some(UNEQUAL, models)
    for off_diagonal in (.9, 1.):
        merged = call('regmean', base, models, weights, grams, off_diagonal=off_diagonal)
        same(merged, models, jin(models, lambdas(models, weights), want, off_diagonal))
        assert merged.report['averaged'] == dict(unused_inputs=1)

def test_fewer_tokens_than_inputs_are_enough_with_smaller_off_diagonals():
    base, models = make()
    grams = make_grams(models, rows=3)
    same(call('regmean', base, models, None, grams), models, jin(models, [1, 1], grams), rtol=1e-6)

@two_or_three
@pytest.mark.parametrize('scale', [None, 1.3])
def test_task_arithmetic(family, n, weights, scale):
    base, models = make(family, n)
    weights = some(weights, models)
    merged = call('task-arithmetic', base, models, weights, **({} if scale is None else dict(scale=scale)))
    same(merged, models, ilharco(base, models, lambdas(models, weights), scale or .4))

def total(model): return sum(v.size for v in arrays(model).values())

@two_or_three
@pytest.mark.parametrize('part,scale', [(.2, 1.), (.5, .7), (1., 1.)])
def test_ties(family, n, weights, part, scale):
    base, models = make(family, n)
    weights, keep = some(weights, models), round(part*total(base))
    merged = call('ties', base, models, weights, density=keep/total(base), scale=scale)
    same(merged, models, yadav(base, models, lambdas(models, weights), keep, scale))

@pytest.mark.parametrize('keep', [1, 29, 57, 1000])
def test_ties_keeps_as_many_as_asked(keep):
    "Of one model, everything that is kept is seen; no rounding of the share loses one."
    base, models = make(n=1, layers=1)
    moved = task_vector(base, call('ties', base, models, density=keep/total(base)).body)
    assert np.count_nonzero(moved) == keep

def test_ties_trims_the_whole_task_vector_and_not_each_tensor():
    "One tensor that moved ten times as far takes all of the share."
    base, models = make(n=1, layers=1, noise=.001, own=True)
    big = 'encoder.layer.0.intermediate.dense.weight'
    with torch.no_grad(): models['alpha'].base_model.get_parameter(big).add_(1.)
    keep = arrays(base)[big].size
    start, got = arrays(base), arrays(call('ties', base, models, density=keep/total(base)).body)
    assert [k for k in got if (got[k] != start[k]).any()] == [big] and (got[big] != start[big]).all()

def test_ties_defaults_are_the_papers():
    "The largest fifth, and the merged task vector as it is."
    base, models = make(n=3)
    tau = [task_vector(base, m) for m in models.values()]
    explicit = call('ties', base, models, density=.2, scale=1.)
    equal_bits(call('ties', base, models).body.state_dict(), explicit.body.state_dict())
    moved = task_vector(base, explicit.body)
    kept = [np.abs(t) >= np.quantile(np.abs(t), .8) for t in tau]
    assert abs(np.count_nonzero(moved)-np.count_nonzero(np.any(kept, 0))) <= len(tau)

def shifted(base, by, labels=2):
    "A model whose body is `base` moved by exact numbers, `by(name)` for each parameter."
    model = tiny('bert', labels, seed=1, layers=1, **SIZE)
    with torch.no_grad():
        for k, p in model.base_model.named_parameters(): p.copy_(base.base_model.get_parameter(k) + by(k))
    return model

def exact_base():
    base = tiny('bert', 2, seed=9, layers=1, **SIZE)
    with torch.no_grad():
        for p in base.base_model.parameters(): p.copy_((p*64).round()/64)
    return base

HAND = {  # shifts of three models, λ, the merged shift
    'majority of sizes, not of votes': ((.25, .25, -1.), (1, 1, 1), -1.),
    'all agree': ((.25, .5, .75), (1, 1, 1), .5),
    'one disagrees': ((.25, .75, -.5), (1, 1, 1), .5),
    'λ decides the sign': ((.25, .25, -1.), (4, 4, 1), .25),
    'λ weighs the mean': ((1., .25, -.5), (1, 2, 1), .5),
    'λ of zero does not vote': ((.25, .5, -4.), (1, 1, 0), .375),
    'no sign wins': ((.5, .5, -1.), (1, 1, 1), 0.),
    'a model that did not move is not in the mean': ((.5, 0., 1.), (1, 1, 1), .75),
}

@pytest.mark.parametrize('shifts,lam,want', HAND.values(), ids=HAND)
def test_ties_by_hand(shifts, lam, want):
    base = exact_base()
    models = {t: shifted(base, lambda _: s) for t, s in zip(TASKS, shifts)}
    merged = call('ties', base, models, dict(zip(TASKS, lam)), density=1.)
    same(merged, models, {k: v+want for k, v in arrays(base).items()}, rtol=1e-15)

def test_dare_of_density_one_is_task_arithmetic():
    base, models = make(n=3)
    want = ilharco(base, models, lambdas(models, UNEQUAL), .7)
    for seed in (0, 5): same(call('dare', base, models, UNEQUAL, density=1., scale=.7, seed=seed), models, want)

def test_dare_is_task_arithmetic_on_average():
    "Each number's mean over seeds, in its own standard errors: those of draws that know nothing of each other."
    base, models = make(n=3, layers=1)
    density, scale, seeds, lam = .5, .8, 40, lambdas(models, UNEQUAL)
    vectors = [w*task_vector(base, m) for w, m in zip(lam, models.values())]
    runs = [task_vector(base, call('dare', base, models, UNEQUAL, density=density, scale=scale, seed=s).body) for s in range(seeds)]
    deviation = scale*(sum(v**2 for v in vectors)*(1-density)/density)**.5
    z = (np.mean(runs, 0)-scale*sum(vectors))/deviation*seeds**.5
    assert abs(z.mean()) < .1 and .9 < (z**2).mean() < 1.1 and np.abs(z).max() < 5
    single = (np.var(runs, 0, ddof=1)/deviation**2).mean()
    assert .9 < single < 1.1

@pytest.mark.parametrize('density', [.1, .5, .9])
def test_dare_drops_or_scales_up(density):
    "Each number of the one model is dropped or divided by the density; the share that stays is the density."
    base, models = make(n=1, layers=2)
    tau, moved = task_vector(base, models['alpha']), task_vector(base, call('dare', base, models, density=density, scale=1.).body)
    kept = np.abs(moved) > 1e-12
    assert_close(moved[kept], tau[kept]/density, rtol=1e-6, atol=0)
    assert abs(kept.mean()-density) < 4*(density*(1-density)/len(tau))**.5
    for name, part in unflatten(kept, arrays(base)).items():
        assert abs(part.mean()-density) < 5*(density*(1-density)/part.size)**.5, name

def test_dare_draws_anew_for_every_parameter_and_model():
    base = exact_base()
    kept = {t: unflatten(task_vector(base, call('dare', base, {t: shifted(base, lambda _: 1.)}, density=.5, scale=1.).body) != 0, arrays(base))
            for t in TASKS}
    of_one = [v for k, v in kept['alpha'].items() if v.shape == (D, D)]
    assert len(of_one) >= 4
    for group in (of_one, [kept[t]['encoder.layer.0.intermediate.dense.weight'] for t in TASKS]):
        for i, a in enumerate(group):
            for b in group[:i]: assert .35 < (a == b).mean() < .65

def test_dare_by_seed():
    base, models = make()
    a, again, other = (call('dare', base, models, seed=s).body for s in (3, 3, 4))
    equal_bits(a.state_dict(), again.state_dict())
    assert differ(a, other)

@two_or_three
def test_layer_mean(family, n, weights):
    base, models = make(family, n)
    weights, fishers = some(weights, models), make_mask_fishers(models)
    same(call('layer-mean', base, models, weights, fishers), models, layer_mean(models, lambdas(models, weights), fishers))


# --- what must not matter -------------------------------------------------------------------

@pytest.mark.parametrize('method', ALL)
def test_order_of_models(method):
    base, models = make(n=3)
    turned = {t: models[t] for t in ('gamma', 'alpha', 'beta')}
    evidence = EVIDENCE.get('mask-fisher' if method == 'layer-mean' else method, lambda m: None)(models)
    want = arrays(call(method, base, models, UNEQUAL, evidence, seed=2).body)
    same(call(method, base, turned, UNEQUAL, evidence, seed=2), turned, want, rtol=1e-7)

@pytest.mark.parametrize('n', [1, 3])
@pytest.mark.parametrize('method', ALL)
def test_a_model_merged_with_itself(method, n):
    "Task vectors are added, so their sum is scaled back."
    base, models = make()
    models = dict.fromkeys(TASKS[:n], models['beta'])
    options = {'task-arithmetic': dict(scale=1/n), 'dare': dict(scale=1/n, density=1.), 'ties': dict(density=1.)}.get(method, {})
    same(call(method, base, models, **options), models, arrays(models['alpha']), rtol=1e-8)

@pytest.mark.parametrize('method', VECTORS)
def test_models_that_did_not_move_are_the_base(method):
    base, models = make(noise=0.)
    same(call(method, base, models), models, arrays(base), rtol=1e-15)

@pytest.mark.parametrize('method', ['average', 'fisher', 'regmean', 'ties', 'wudi', 'actmat', 'layer-mean'])
def test_only_ratios_of_weights_count(method):
    base, models = make(n=3)
    want = arrays(call(method, base, models, UNEQUAL).body)
    same(call(method, base, models, {t: 7*w for t, w in UNEQUAL.items()}), models, want)

@pytest.mark.parametrize('method', ['task-arithmetic', 'dare'])
def test_twice_the_weights_is_twice_the_scale(method):
    base, models = make(n=3)
    want = arrays(call(method, base, models, {t: 2*w for t, w in UNEQUAL.items()}, scale=.3).body)
    same(call(method, base, models, UNEQUAL, scale=.6), models, want)

@pytest.mark.parametrize('method', ALL)
def test_a_weight_of_zero_is_absence(method):
    base, models = make(n=3)
    evidence = EVIDENCE.get('mask-fisher' if method == 'layer-mean' else method, lambda m: None)(models)
    fewer = {t: models[t] for t in ('alpha', 'gamma')}
    want = call(method, base, fewer, dict(alpha=1, gamma=2), evidence and {t: evidence[t] for t in fewer})
    same(call(method, base, models, dict(alpha=1, beta=0, gamma=2), evidence), models, arrays(want.body))

@pytest.mark.parametrize('method,options', [('fisher', dict(floor=0)), ('regmean', {})])
@pytest.mark.parametrize('factor', [1e-12, 1e6])
def test_scale_of_all_evidence(method, options, factor):
    base, models = make()
    evidence = EVIDENCE[method](models)
    scaled = {t: type(f)({k: v*factor for k, v in f.values.items()}, 8) for t, f in evidence.items()}
    same(call(method, base, models, fishers=scaled, **options), models, arrays(call(method, base, models, fishers=evidence, **options).body))

def test_scale_of_one_fisher_does_not_matter_when_normalised():
    base, models = make()
    fishers = make_fishers(models, low=-4)     # above the floor, also after
    louder = fishers | dict(beta=ParameterFisher({k: v*50 for k, v in fishers['beta'].values.items()}, 8))
    merged = {n: [call('fisher', base, models, None, f, normalise=n).body for f in (fishers, louder)] for n in (True, False)}
    same(Merged(merged[True][1], {}, {}), models, arrays(merged[True][0]))
    assert differ(*merged[False])

@pytest.mark.parametrize('method', ['fisher', 'regmean', 'layer-mean'])
def test_equal_evidence_is_the_average(method):
    base, models = make(n=3)
    one = EVIDENCE['mask-fisher' if method == 'layer-mean' else method](models)['alpha']
    same(call(method, base, models, UNEQUAL, dict.fromkeys(models, one)), models, plain(models, lambdas(models, UNEQUAL)), rtol=1e-7)

@pytest.mark.parametrize('method', VECTORS)
def test_the_base_may_have_a_head_or_none_or_lie_on_disk(family, method, tmp_path):
    base, models = make(family)
    base.save_pretrained(tmp_path/'head'); base.base_model.save_pretrained(tmp_path/'body')
    want = arrays(call(method, base, models).body)
    for other in (base.base_model, tmp_path/'head', str(tmp_path/'body')): same(call(method, other, models), models, want, rtol=1e-15)

@pytest.mark.parametrize('method', VECTORS)
def test_the_head_of_the_base_does_not_count(method):
    base, models = make(own=True)
    want = arrays(call(method, base, models).body)
    with torch.no_grad(): base.classifier.weight.fill_(1e6)
    same(call(method, base, models), models, want, rtol=1e-15)


# --- heads, inputs, dtypes, folders ---------------------------------------------------------

@pytest.mark.parametrize('method', ALL)
def test_heads_and_inputs_stay_as_they_were(family, method):
    base, models = make(family, 3, own=True)
    base.train(); models['beta'].base_model.embeddings.requires_grad_(False)
    evidence = EVIDENCE.get('mask-fisher' if method == 'layer-mean' else method, lambda m: None)(models)
    parts = [vars(f) for f in (evidence or {}).values()]
    with unchanged(base, *models.values(), data=parts): merged = call(method, base, models, UNEQUAL, evidence)
    given = {p.untyped_storage().data_ptr() for m in (base, *models.values()) for p in m.parameters()}
    assert list(merged) == list(models)
    for t, m in merged.items():
        head = lambda m: {k: v for k, v in m.state_dict().items() if not k.startswith(m.base_model_prefix+'.')}
        equal_bits(head(m), head(models[t]))
        assert m.base_model is merged.body and m.config.num_labels == models[t].config.num_labels and not m.training
        assert all(p.requires_grad for p in m.parameters())
        assert not given & {p.untyped_storage().data_ptr() for p in m.parameters()}

UNITS = {torch.float32: 1e-5, torch.bfloat16: 2**-8*1.01}
dtypes = pytest.mark.parametrize('dtype', UNITS, ids=str)

def by_hand(method, base, models, lam, evidence):
    if method == 'average': return plain(models, lam)
    if method == 'fisher': return matena_raffel(models, lam, evidence)
    if method == 'regmean': return jin(models, lam, evidence)
    if method == 'layer-mean': return layer_mean(models, lam, evidence)
    if method in ('wudi', 'actmat'): return cheng(base, models, lam, method == 'wudi')
    if method == 'ties': return yadav(base, models, lam, total(base), 1.)
    return ilharco(base, models, lam, .4)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('method', ALL)
def test_models_elsewhere_than_base_and_evidence(method):
    base, models = make(own=True)
    want = arrays(call(method, base, models).body)
    merged = call(method, base, {t: m.cuda() for t, m in models.items()})
    assert {p.device.type for m in merged.values() for p in m.parameters()} == {'cuda'}
    for k, p in merged.body.named_parameters(): assert_close(p.detach().cpu().numpy(), want[k], rtol=1e-8, atol=0)

@dtypes
@pytest.mark.parametrize('method', ALL)
def test_dtype_is_kept_and_rounded_once(method, dtype):
    base, models = make(n=3, dtype=dtype, positive=True)
    evidence = EVIDENCE.get('mask-fisher' if method == 'layer-mean' else method, lambda m: None)(models)
    if method in ('fisher', 'regmean'):
        evidence = {t: type(f)({k: v.float() for k, v in f.values.items()}, 8) for t, f in evidence.items()}
    options = dict(density=1.) if method in ('ties', 'dare') else {}
    merged = call(method, base, models, UNEQUAL, evidence, **options)
    assert {v.dtype for m in merged.values() for v in m.state_dict().values() if v.is_floating_point()} == {dtype}
    same(merged, models, by_hand(method, base, models, lambdas(models, UNEQUAL), evidence), rtol=UNITS[dtype])

@pytest.mark.parametrize('method', VECTORS)
@pytest.mark.parametrize('other', [torch.float64, torch.bfloat16], ids=str)
def test_a_base_of_another_dtype(method, other):
    "The result has the dtype of the models."
    base, models = make(dtype=torch.float32, positive=True, own=True)
    base = base.to(other)
    options = dict(density=1.) if method in ('ties', 'dare') else {}
    merged = call(method, base, models, **options)
    assert merged.body.dtype == torch.float32
    same(merged, models, by_hand(method, base, models, [1, 1], None), rtol=1e-5)

@pytest.mark.parametrize('family,dtype', [('bert', torch.float64), ('bert', torch.bfloat16), ('roberta', torch.float32)], ids=str)
@pytest.mark.parametrize('method', ALL)
def test_saved_and_loaded(family, method, dtype, tmp_path):
    base, models = make(family, 2, layers=1, dtype=dtype)
    kw = dict(fishers=make_mask_fishers(models, 1)) if method == 'layer-mean' else {}
    merged = call(method, base, models, dict(alpha=1, beta=.3), **kw)
    merged.save_pretrained(tmp_path/'out')
    back = Merged.from_pretrained(tmp_path/'out')
    assert list(back) == list(models) and back.report == json.loads(json.dumps(merged.report))
    for t in models:
        found, info = AutoModelForSequenceClassification.from_pretrained(tmp_path/'out'/t, dtype='auto', output_loading_info=True)
        assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
        for m in (found, back[t]): equal_bits(m.state_dict(), merged[t].state_dict())
        assert found.config.num_labels == models[t].config.num_labels


# --- reports --------------------------------------------------------------------------------

GRAM = {'query', 'key', 'value', 'attention_output', 'ffn_in', 'ffn_out', 'pooler'}

@pytest.mark.parametrize('method', ALL)
def test_the_report_names_how_every_role_is_weighted(method):
    base, models = make()
    report = call(method, base, models, dict(alpha=1, beta=.5)).report
    roles = {k: v['weight'] for k, v in report['roles'].items()}
    assert roles.keys() >= {'embeddings', 'attention_norm', 'ffn_norm', *GRAM-{'pooler'}}
    def want(role):
        if method == 'layer-mean': return {'query': 'head_mean', 'key': 'head_mean', 'ffn_in': 'row_mean'}.get(role, 'one')
        if method in FITTED: return f'{FITTED[method]} and one' if role in GRAM else 'one'
        return {'average': 'one', 'fisher': 'parameter'}.get(method, 'task vector')
    assert roles == {k: want(k) for k in roles}
    assert sum(v['elements'] for v in report['roles'].values()) == total(base) and not report['copied']
    assert sum(v['tensors'] for v in report['roles'].values()) == len(arrays(base))
    assert report['method'] == ('mask-fisher' if method == 'layer-mean' else method)
    assert [v['weight'] for v in report['tasks'].values()] == [1, .5]
    assert (report['base'] is not None) == (method in VECTORS)

OPTIONS = [('fisher', dict(normalise=True, floor=1e-4)), ('regmean', dict(off_diagonal=.99, anchor=.1)), ('task-arithmetic', dict(scale=.7)),
           ('ties', dict(density=.3, scale=.8)), ('dare', dict(density=.4, scale=.6)), ('wudi', dict(ridge=.1)), ('actmat', dict(ridge=.1))]

@pytest.mark.parametrize('method,options', OPTIONS, ids=lambda x: x if isinstance(x, str) else '')
def test_the_report_names_all_options_given_or_not(method, options):
    base, models = make()
    assert call(method, base, models, **options).report['options'] == options
    first = dict(list(options.items())[:1])
    defaults = dict(normalise=False, floor=1e-6, ridge=0., anchor=0., off_diagonal=.9, density={'ties': .2, 'dare': .1}.get(method),
                    scale=1. if method == 'ties' else .4)
    assert call(method, base, models, **first).report['options'] == {k: first.get(k, defaults[k]) for k in options}

def test_what_dare_dropped_can_be_drawn_again_from_the_report():
    base, models = make()
    reports = [json.dumps(call('dare', base, models, seed=s).report, sort_keys=True) for s in (3, 4)]
    assert reports[0] != reports[1] and '"seed": 3' in reports[0]


# --- measured by `merge` --------------------------------------------------------------------

def make_data(models): return {t: to_dataset(examples(9, m.config.num_labels, seed=i, vocab=30)) for i, (t, m) in enumerate(models.items())}

@pytest.mark.parametrize('method,measure,how', [('fisher', parameter_fisher, {}), ('fisher', parameter_fisher, dict(labels='exact')),
                                                ('regmean', linear_grams, {})], ids=['fisher', 'fisher exact', 'regmean'])
def test_data_is_the_same_as_measuring_first(family, method, measure, how):
    base, models = make(family)
    data, weights = make_data(models), some(UNEQUAL, models)
    found = {t: measure(m, data[t], num_samples=6, seed=3, progress=False, **how) for t, m in models.items()}
    with unchanged(*models.values()):
        merged = merge(models, data=data, method=method, weights=weights, num_samples=6, seed=3, progress=False, **how)
    given = call(method, base, models, weights, found)
    equal_bits(merged.body.state_dict(), given.body.state_dict())
    assert all(v['fisher']['num_examples'] == 6 for v in merged.report['tasks'].values())
    reference = matena_raffel if method == 'fisher' else jin
    same(merged, models, reference(models, lambdas(models, weights), found), rtol=1e-6)

@pytest.mark.parametrize('method,measure', [('fisher', parameter_fisher), ('regmean', linear_grams)])
def test_evidence_from_disk(method, measure, tmp_path):
    base, models = make()
    found = {t: measure(m, make_data(models)[t], progress=False) for t, m in models.items()}
    for t, f in found.items(): f.save(tmp_path/t)
    loaded = {t: type(f).load(tmp_path/t) for t, f in found.items()}
    equal_bits(call(method, base, models, None, loaded).body.state_dict(), call(method, base, models, None, found).body.state_dict())

def test_regmean_needs_no_labels():
    base, models = make()
    data = make_data(models)
    merged = [merge(models, data=d, method='regmean', progress=False).body.state_dict()
              for d in (data, {t: d.remove_columns('labels') for t, d in data.items()})]
    equal_bits(*merged)


# --- wrong input ----------------------------------------------------------------------------

def refused(match, method, base, models, error=ValueError, **kw):
    "An error, and everything as it was."
    given = [m for m in (base, *models.values()) if isinstance(m, torch.nn.Module)]
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in given]
    with pytest.raises(error, match=match): call(method, base, models, **kw)
    for m, b in zip(given, before): equal_bits(m.state_dict(), b)

@pytest.mark.parametrize('method', ALL)
def test_unknown_option(method, option='densty'):
    name = 'mask-fisher' if method == 'layer-mean' else method
    refused(f"(?s)'{name}'.*{option}", method, *make(layers=2), **{option: .5})

@pytest.mark.parametrize('method,option', [('average', 'scale'), ('fisher', 'density'), ('regmean', 'floor'), ('task-arithmetic', 'density'),
                                           ('ties', 'off_diagonal'), ('dare', 'normalise'), ('fisher', 'scheme')])
def test_option_of_another_method(method, option): refused(f"(?s)'{method}'.*{option}", method, *make(), **{option: 'paper'})

BAD_OPTIONS = {
    'ties': [dict(density=d) for d in (0, 2, -.1, 1.0001, float('nan'), '0.2', None)] + [dict(scale=s) for s in (float('nan'), float('inf'), '1')],
    'dare': [dict(density=d) for d in (0, 2, -.1, 1.0001, float('nan'), '0.2', None)] + [dict(scale=s) for s in (float('nan'), float('inf'), '1')],
    'task-arithmetic': [dict(scale=s) for s in (float('nan'), float('inf'), '1', None)],
    'regmean': [dict(off_diagonal=o) for o in (-.1, 1.1, float('nan'), '0.9', None)] + [dict(anchor=o) for o in (-.1, float('nan'), float('inf'), '0', None)],
    'wudi': [dict(ridge=o) for o in (-.1, float('nan'), float('inf'), '0', None)],
    'fisher': [dict(floor=f) for f in (-1e-6, float('nan'), float('inf'), '0', None)],
}

@pytest.mark.parametrize('method,options', [(m, o) for m, os in BAD_OPTIONS.items() for o in os], ids=str)
def test_options_out_of_range(method, options):
    (name, value), = options.items()
    refused(rf'(?s){name}.*{value}', method, *make(), error=(ValueError, TypeError), **options)

@pytest.mark.parametrize('method', VECTORS)
def test_no_base(method): refused(f"'{method}'.*`base`", method, None, make()[1])

@pytest.mark.parametrize('method', [m for m in METHODS if m not in (*VECTORS, *RUN)])
def test_a_base_that_is_not_needed(method):
    base, models = make()
    kw = dict(fishers=EVIDENCE[method](models)) if method in EVIDENCE else {}
    with pytest.raises(ValueError, match=f"'{method}'.*`base`"): merge(models, method=method, base=base, **kw)

@pytest.mark.parametrize('method', VECTORS)
@pytest.mark.parametrize('change,name', [(dict(vocab=31), 'word_embeddings'), (dict(intermediate=28), 'layer.0.intermediate'),
                                         (dict(layers=1), r'encoder\.layer\.1'), (dict(hidden=20), 'embeddings'), (dict(positions=19), 'position')], ids=str)
def test_a_base_of_another_shape(family, method, change, name):
    other = tiny(family, 2, seed=9, **{**SIZE, 'layers': 2, **change})
    refused(rf'`?base`?.*{name}', method, other, make(family)[1])

def test_a_base_whose_heads_are_cut_otherwise():
    "The same shapes mean something else with another number of heads."
    refused('(?s)base.*num_attention_heads', 'task-arithmetic', tiny('bert', 2, seed=9, layers=2, **{**SIZE, 'heads': 2}), make()[1])

def test_a_base_of_more_layers():
    refused('(?s)base', 'task-arithmetic', tiny('bert', 2, seed=9, layers=3, **SIZE), make()[1])

def test_a_base_of_another_family():
    refused('(?s)base', 'task-arithmetic', tiny('roberta', 2, seed=9, layers=2, **SIZE), make()[1])

def test_a_family_whose_names_and_shapes_are_the_same():
    refused('(?s)base.*(model_type|bert)', 'task-arithmetic', tiny('bert', 2, seed=9, layers=2, **SIZE), make('roberta')[1])

@pytest.mark.parametrize('method', VECTORS)
def test_a_base_without_a_pooler_is_not_made_up(method, tmp_path):
    "transformers would fill in a random one."
    base, models = make()
    bare = BertForMaskedLM(base.config).double()
    bare.bert.load_state_dict(base.bert.state_dict(), strict=False)
    bare.save_pretrained(tmp_path/'mlm')
    no_pooler = BertModel(base.config, add_pooling_layer=False).double()
    no_pooler.save_pretrained(tmp_path/'body')
    for other in (tmp_path/'mlm', str(tmp_path/'body'), bare, no_pooler): refused('`base`.*pooler', method, other, models)

@pytest.mark.parametrize('method', VECTORS)
@pytest.mark.parametrize('where', ['memory', 'disk'])
def test_a_pooler_that_the_models_do_not_have_is_left_out(method, where, tmp_path):
    "RoBERTa's body has one by itself, and none below a classifier."
    base, models = make('roberta')
    body = RobertaModel(base.config).double()
    assert not body.load_state_dict(base.base_model.state_dict(), strict=False).unexpected_keys and body.pooler is not None
    if where == 'disk': body.save_pretrained(tmp_path)
    want = arrays(call(method, base, models).body)
    same(call(method, body if where == 'memory' else tmp_path, models), models, want)

def test_loading_a_base_draws_nothing(tmp_path):
    "A pooler that is missing and not needed is made by transformers at random, from the caller's random state."
    base, models = make('roberta')
    base.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    call('task-arithmetic', tmp_path, models)
    assert torch.equal(torch.get_rng_state(), state)

def test_a_base_without_a_pooler_will_do_where_models_have_none(tmp_path):
    base, models = make('roberta')
    base.base_model.save_pretrained(tmp_path)
    same(call('task-arithmetic', tmp_path, models), models, ilharco(base, models, [1, 1], .4))

@pytest.mark.parametrize('base', ['no/such/folder', 3, {}, torch.zeros(2)], ids=lambda o: type(o).__name__)
def test_a_base_that_is_no_model(base):
    with pytest.raises((ValueError, TypeError, OSError)): call('task-arithmetic', base, make()[1])

@pytest.mark.parametrize('method', ['task-arithmetic', 'ties'])
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_base_that_is_not_finite(method, value):
    base, models = make(own=True)
    with torch.no_grad(): base.base_model.encoder.layer[1].output.dense.bias[2] = value
    refused(r'encoder\.layer\.1\.output\.dense\.bias', method, base, models, density=1.) if method == 'ties' else \
        refused(r'encoder\.layer\.1\.output\.dense\.bias', method, base, models)

@pytest.mark.parametrize('method,wrong', [(m, w) for m in EVIDENCE for w in EVIDENCE if m != w])
def test_evidence_of_another_kind(method, wrong):
    base, models = make()
    kinds = {'mask-fisher': 'MaskFisher', 'fisher': 'ParameterFisher', 'regmean': 'Grams'}
    refused(f"(?s)'alpha'.*{kinds[wrong]}", method, base, models, error=(TypeError, ValueError), fishers=EVIDENCE[wrong](models))

@pytest.mark.parametrize('method', ['average', *VECTORS])
def test_evidence_that_is_not_needed(method):
    base, models = make()
    before = dict(base=base) if method in VECTORS else {}
    for kw in (dict(fishers=make_fishers(models)), dict(data=make_data(models))):
        with pytest.raises(ValueError, match=f"'{method}'"): merge(models, method=method, **before, **kw)

@pytest.mark.parametrize('method', EVIDENCE)
def test_no_evidence_or_twice(method):
    base, models = make()
    for kw in ({}, dict(fishers=EVIDENCE[method](models), data=make_data(models))):
        with pytest.raises(ValueError, match=f"'{method}'.*`fishers`.*`data`"): merge(models, method=method, **kw)

@pytest.mark.parametrize('method,measure', [('fisher', parameter_fisher), ('regmean', linear_grams)])
def test_evidence_of_other_weights(method, measure):
    base, models = make(own=True)
    found = {t: measure(m, make_data(models)[t], progress=False) for t, m in models.items()}
    refused("(?s)'(alpha|beta)'.*other weights", method, base, models, fishers=dict(alpha=found['beta'], beta=found['alpha']))
    noisy(models['beta'], 3, 1e-6)
    refused("(?s)'beta'.*other weights", method, base, models, fishers=found)

@pytest.mark.parametrize('value,word', [(float('nan'), ''), (float('inf'), ''), (-1e-3, ''), (-1e-3, '-0.001')])
def test_a_fisher_that_is_no_fisher(value, word):
    "The error names task and parameter, and what came."
    base, models = make()
    fishers, name = make_fishers(models), 'encoder.layer.1.attention.output.LayerNorm.weight'
    fishers['beta'].values[name][3] = value
    refused(rf"(?s)'beta'.*{re.escape(name)}.*{word}", 'fisher', base, models, fishers=fishers)

def spoil(values, name, how):
    G = values[name]
    if how == 'nan': G[2, 3] = G[3, 2] = float('nan')
    if how == 'inf': G[2, 2] = float('inf')
    if how == 'negative': G[4, 4] = -1.
    if how == 'not symmetric': G[2, 3] += 10*G.abs().max()
    if how == 'not a gram': G[2, 3] = G[3, 2] = 10*G.abs().max()   # |x·y| is at most |x||y|

@pytest.mark.parametrize('how', ['nan', 'inf', 'negative', 'not symmetric', 'not a gram'])
def test_grams_that_are_no_grams(how):
    base, models = make()
    grams, name = make_grams(models), 'encoder.layer.1.attention.self.key.weight'
    spoil(grams['beta'].values, name, how)
    task = "'beta'.*" if how in ('nan', 'inf', 'negative') else ''
    refused(rf"(?s){task}{re.escape(name)}", 'regmean', base, models, fishers=grams)

@pytest.mark.parametrize('method', ['fisher', 'regmean'])
@pytest.mark.parametrize('how', ['missing', 'extra', 'shape', 'empty', 'one for another', 'flat'])
def test_evidence_that_does_not_fit(method, how):
    base, models = make()
    found, name = EVIDENCE[method](models), 'encoder.layer.0.intermediate.dense.weight'
    values = found['beta'].values
    if how == 'missing': del values[name]
    if how == 'extra': values['classifier.weight'] = torch.ones(3, D)
    if how == 'shape': values[name] = values[name][:-1]
    if how == 'empty': values.clear()
    if how == 'one for another': values[name] = values[name][None]
    if how == 'flat': values[name] = values[name].sum(-1, keepdim=True)
    word = {'extra': 'classifier.weight', 'empty': 'layer|embeddings'}.get(how, re.escape(name))
    refused(f"(?s)'beta'.*({word})", method, base, models, fishers=found)

@pytest.mark.parametrize('method', ['fisher', 'regmean'])
def test_evidence_of_other_tasks(method):
    base, models = make()
    found = EVIDENCE[method](models)
    refused('beta', method, base, models, fishers=dict(alpha=found['alpha']))
    refused('zeta', method, base, models, fishers=found | dict(zeta=found['alpha']))

def test_fishers_of_two_estimators():
    base, models = make()
    data = make_data(models)
    found = {t: parameter_fisher(m, data[t], labels=l, progress=False) for (t, m), l in zip(models.items(), ('empirical', 'exact'))}
    refused('(?s)estimator.*exact', 'fisher', base, models, fishers=found)

def test_too_few_tokens_for_a_regression():
    base, models = make()
    refused(r'encoder\.layer\.0\.attention\.self\.query\.weight', 'regmean', base, models, fishers=make_grams(models, rows=3), off_diagonal=1.)

@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=str)
def test_rounding_does_not_make_up_for_a_missing_token(dtype):
    "One token fewer than inputs: whether the last pivot comes out above or below zero is chance."
    base, models = make(layers=1)
    name, full = 'encoder.layer.0.attention.self.key.weight', make_grams(models)
    def one(seed):
        gen = np.random.default_rng(seed)
        for t, rows in zip(models, (8, D-1-8)):
            x = gen.normal(size=(rows, D))
            full[t].values[name] = torch.tensor(x.T @ x).to(dtype)
        try: call('regmean', base, models, None, full, off_diagonal=1.)
        except ValueError as e: return name in str(e)
        return False
    assert [s for s in range(8) if not one(s)] == []

def test_one_input_too_few_for_a_regression():
    "Every layer but one has enough; that one is named, and what to do."
    base, models = make()
    grams, name = make_grams(models), 'encoder.layer.1.output.dense.weight'
    for t in models: grams[t].values[name] = make_grams(models, rows=8)[t].values[name]
    refused(rf'(?s){re.escape(name)}.*off_diagonal', 'regmean', base, models, fishers=grams, off_diagonal=1.)

@pytest.mark.parametrize('t', ['alpha', 'beta'])
def test_a_fisher_of_nothing_but_zeros_has_no_norm(t):
    base, models = make()
    fishers = make_fishers(models)
    for v in fishers[t].values.values(): v.zero_()
    refused(f"(?s)'?{t}", 'fisher', base, models, fishers=fishers, normalise=True)
    same(call('fisher', base, models, None, fishers), models, matena_raffel(models, [1, 1], fishers))

@pytest.mark.parametrize('n', [0, -3])
@pytest.mark.parametrize('method', ['fisher', 'regmean'])
def test_bad_num_samples(method, n):
    models = make()[1]
    with pytest.raises(ValueError, match='num_samples'): merge(models, data=make_data(models), method=method, num_samples=n)

@pytest.mark.parametrize('method', ['fisher', 'regmean'])
def test_the_task_whose_data_is_wrong_is_named(method):
    models = make()[1]
    data = make_data(models)
    data['beta'] = data['beta'].remove_columns('input_ids')
    with pytest.raises(ValueError, match="'beta'"): merge(models, data=data, method=method)

@pytest.mark.parametrize('method', ALL)
def test_models_that_do_not_fit(method):
    base, models = make()
    other = models | dict(beta=tiny('bert', 3, seed=1, layers=1, **SIZE))
    kw = dict(fishers=EVIDENCE['mask-fisher' if method == 'layer-mean' else method](models)) if method in (*EVIDENCE, 'layer-mean') else {}
    refused("(?s)num_hidden_layers.*'beta'", method, base, other, **kw)

@pytest.mark.parametrize('method', [m for m in ALL if m != 'dare'])
def test_a_model_that_is_not_finite(method):
    base, models = make(own=True)
    with torch.no_grad(): models['beta'].base_model.encoder.layer[1].intermediate.dense.weight[2, 5] = float('nan')
    refused(r'encoder\.layer\.1\.intermediate\.dense\.weight', method, base, models)
