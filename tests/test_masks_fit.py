"""Masks that move, against masks that multiply literally and a Jacobian that knows nothing of hooks, in float64."""
from contextlib import ExitStack
from copy import deepcopy

import pytest
import torch
from torch.func import functional_call, jacrev
from torch.testing import assert_close

import zoo
from fisher_nodes.core.families import body_of
from fisher_nodes.core.places import find_nodes
from fisher_nodes.engine.measure import measure
from fisher_nodes.methods import masks as masking
from fisher_nodes.methods.calls import split_calls
from fisher_nodes.methods.masks import fit_masks, fold_masks, mask_step, own_norms, with_numbers

CLASSIFIERS = ['bert-classifier', 'modernbert-classifier', 'llama-classifier', 'bart-classifier', 't5-classifier']
DENSE = [n for n in zoo.ZOO if 'expert' not in n and zoo.ZOO[n][1] is not zoo.MIXTURE][::4]
SIZES = 5, 2

def drawn(body, seed=0, size=.3):
    g = torch.Generator().manual_seed(seed)
    return {o.name: 1+size*torch.randn(o.counts[o.kind], generator=g).double() for o in find_nodes(body)}

def near(model, seed=1, size=.05):
    "A body that is nearly a model's own."
    torch.manual_seed(seed)
    body = deepcopy(body_of(model))
    with torch.no_grad():
        for p in body.parameters(): p.add_(size*torch.randn_like(p))
    return body

def rows_of(name, model, n=sum(SIZES), seed=1):
    rows = zoo.examples(name, n, seed)
    return measure('calls', model, [zoo.collate(rows[:SIZES[0]]), zoo.collate(rows[SIZES[0]:])], progress=False)

@pytest.mark.parametrize('name', [*CLASSIFIERS, *DENSE])
def test_folded_masks_do_what_masks_do(name):
    model = zoo.build(name).eval()
    found, batch = drawn(model), zoo.collate(zoo.examples(name, 3))
    blocks = [o for o in find_nodes(model) if not o.site.experts]
    if len(blocks) < len(found): pytest.skip('experts are compared number by number')
    def multiply(o):
        def hook(_, args):
            m = found[o.name]
            return (args[0]*m.repeat_interleave(args[0].shape[-1]//len(m)), *args[1:])
        return o.after.module.register_forward_pre_hook(hook)
    with torch.no_grad(), ExitStack() as stack:
        before = zoo.losses(model, batch)
        with with_numbers(model, fold_masks(model, found)): folded = zoo.losses(model, batch)
        assert torch.equal(zoo.losses(model, batch), before)
        for o in blocks: stack.callback(multiply(o).remove)
        assert_close(folded, zoo.losses(model, batch), rtol=1e-9, atol=0)
    assert not torch.allclose(folded, before)

@pytest.mark.parametrize('name', ['mixtral', 'gpt_oss'])
def test_neurons_of_experts(name):
    if name not in zoo.ZOO: pytest.skip('no such case')
    model = zoo.build(name)
    o = next(o for o in find_nodes(model) if o.site.experts)
    m = drawn(model)[o.name]
    (n, got), = fold_masks(model, {o.name: m}).items()
    p = body_of(model).get_parameter(n)
    E, axis = len(p), 1 if o.site.module.is_transposed else 2
    for e in range(E):
        for r in range(p.shape[axis]):
            assert_close(got[e].select(axis-1, r), p[e].select(axis-1, r)*m[e*p.shape[axis]+r], rtol=1e-14, atol=0)

def slow_logits(model, body, call, names, sizes):
    "Logits as a function of all masks, which multiply columns."
    whole, readers = deepcopy(model), {o.name: masking._reader(o) for o in find_nodes(body)}
    setattr(whole, whole.base_model_prefix, body)
    prefix = f'{whole.base_model_prefix}.'
    def logits(every):
        put = {}
        for name, m in zip(names, every.split(sizes)):
            n, part = readers[name]
            t = m.repeat_interleave(len(part.rows)//len(m))
            put[prefix+n] = body.get_parameter(n)*(t[:,None] if part.axis == 0 else t)
        return functional_call(whole, put, kwargs=call).logits
    return logits

@pytest.mark.parametrize('name', CLASSIFIERS)
def test_a_step_is_that_of_the_jacobian(name):
    model = zoo.build(name).eval().requires_grad_(False)
    body, calls = near(model).eval(), rows_of(name, model)
    task = masking._Task(model, calls, refit=False)
    got, own, said = masking._gradients(task, body, None)
    names, sizes = list(got), [g.shape[2] for g in got.values()]
    I, s, n = 0, 0, 0
    for call in calls.calls: # padded, as they are
        whole = slow_logits(model, body, call, names, sizes)
        ones = torch.ones(sum(sizes), dtype=torch.float64)
        J, q = jacrev(whole)(ones), whole(ones).softmax(1)
        p = model(**call).logits.softmax(1)
        for k in range(len(q)):
            I = I+J[k].T @ (q[k].diag()-torch.outer(q[k], q[k])) @ J[k]
            s, n = s+J[k].T @ (q[k]-p[k]), n+1
    I, s = I/n, s/n
    step = torch.cat([*masking._step(got, own, said, .1, True).values()])
    def far(a, b): return float((a-b).norm()/b.norm()) # norms of some families compute in float32
    assert far(step, -torch.linalg.solve(I+.1*I.trace()*torch.eye(len(I)).double(), s)) < 1e-6
    each, at = masking._step(got, own, said, .1, False), 0
    for k, size in zip(names, sizes):
        b = slice(at, at := at+size)
        assert far(each[k], -torch.linalg.solve(I[b,b]+.1*I[b,b].trace()*torch.eye(size).double(), s[b])) < 1e-6
    assert far(torch.cat([*each.values()]), step) > .1

def test_a_block_is_what_matrices_measure():
    "Heads alone: neurons have their masks elsewhere in the paper."
    model = zoo.build('bert-classifier').eval().requires_grad_(False)
    body, batches = near(model).eval(), [zoo.collate(zoo.examples('bert-classifier', 6))]
    got, _, q = masking._gradients(masking._Task(model, measure('calls', model, batches, progress=False), False), body, None)
    whole = deepcopy(model)
    whole.bert = body
    fisher = measure('mask-fisher', whole, batches, labels='exact', matrices='heads', progress=False)
    heads = [g for n, g in got.items() if n.endswith('attention')]
    for g, want in zip(heads, fisher.head_matrices, strict=True):
        assert_close(torch.einsum('nc,nci,ncj->ij', q, g, g)/len(g), want, rtol=1e-9, atol=0)

def test_nothing_moves_on_the_own_body():
    name = 'bert-classifier'
    model = zoo.build(name).eval()
    found = fit_masks(model, body_of(model), rows_of(name, model), rows_of(name, model, seed=2))
    assert found.dampings == [] and all((m == 1).all() for m in found.masks.values())

@pytest.mark.parametrize('refit', [True, False])
def test_what_is_said_is_what_the_folded_body_says(refit):
    "And a body, its modes and its gradients are as they were."
    name = 'modernbert-classifier'
    model = zoo.build(name).eval()
    body = deepcopy(body_of(model))
    for n, p in fold_masks(model, drawn(model)).items(): body.get_parameter(n).data.copy_(p)
    before = {n: p.clone() for n, p in body.named_parameters()}
    kept = rows_of(name, model, 24, seed=2)
    found = fit_masks(model, body, rows_of(name, model, 60), kept, refit=refit)
    assert found.dampings and found.kl == sorted(found.kl, reverse=True) and (found.refit is not None) == refit
    for n, p in body.named_parameters(): assert torch.equal(p, before[n]) and p.requires_grad
    for n, p in fold_masks(body, found.masks).items(): body.get_parameter(n).data.copy_(p)
    got, refitted = masking._apart(masking._Task(model, kept, refit), body)
    assert_close(got, found.kl[-1], rtol=1e-9, atol=0)
    if refit:
        for a, b in zip(refitted.folds, found.refit.folds): assert_close(a.fe, b.fe, rtol=1e-9, atol=1e-12)

def test_batches_do_not_matter():
    name = 'llama-classifier'
    model = zoo.build(name).eval()
    body, rows = near(model, size=.2).eval(), zoo.examples(name, 7)
    def fit(cut):
        batches = [zoo.collate(rows[:cut]), zoo.collate(rows[cut:])]
        return fit_masks(model, body, measure('calls', model, batches, progress=False), rows_of(name, model, seed=2))
    a, b = fit(2), fit(6)
    assert a.dampings == b.dampings
    for n, m in a.masks.items(): assert_close(m, b.masks[n], rtol=1e-7, atol=0)

def test_a_step_of_nothing(): assert (mask_step(torch.zeros(2, 2, 3), torch.ones(2, 2), torch.ones(2, 2), 1.) == 0).all()

@pytest.mark.parametrize('name,said', [('bert-choices', 'BertForMultipleChoice is a multiple choice'),
    ('bert-masked-lm', 'BertForMaskedLM is a masked language model'), ('bert', 'BertModel is a model without a head')])
def test_what_does_not_choose_a_class_is_refused(name, said):
    model = zoo.build(name).eval()
    rows = measure('calls', zoo.build('bert-classifier'), [zoo.collate(zoo.examples('bert-classifier', 4))], progress=False)
    with pytest.raises(ValueError, match=f'masks are fitted to answers that are one choice among classes; {said}'):
        fit_masks(model, body_of(model), *split_calls(rows, .5))

@pytest.mark.parametrize('train,how,said', [(False, dict(dampings=()), r'`dampings` must be numbers above 0, got \[\]'),
    (False, dict(dampings=[.1, -1]), r'`dampings` must be numbers above 0, got \[0.1, -1\]'),
    (True, {}, r'BertModel is in training mode; call its `eval\(\)` first')])
def test_what_cannot_be_fitted(train, how, said):
    name = 'bert-classifier'
    model = zoo.build(name).eval()
    rows = rows_of(name, model)
    with pytest.raises(ValueError, match=said): fit_masks(model, deepcopy(body_of(model)).train(train), rows, rows, **how)

def test_wrong_numbers():
    model = zoo.build('bert')
    with pytest.raises(ValueError, match="the body has no parameter 'x'"):
        with with_numbers(model, dict(x=torch.ones(1))): pass
    with pytest.raises(ValueError, match=r"the body has no block 'x'; it has \['encoder"): fold_masks(model, dict(x=torch.ones(1)))

def test_own_numbers_are_back_after_an_error():
    model = zoo.build('bert').requires_grad_(False)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(KeyError):
        with with_numbers(model, own_norms(zoo.build('bert', seed=3))):
            assert not torch.equal(model.pooler.dense.bias, before['pooler.dense.bias'])
            raise KeyError
    for n, p in model.named_parameters(): assert torch.equal(p, before[n])
