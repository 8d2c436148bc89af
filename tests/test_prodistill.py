"""Coefficients trained layer by layer, against a reference that knows BERT by heart.

The slow reference has its own layer in plain torch, its own Adam, one example after the other without padding, and lays
coefficients by the names of parameters. It knows nothing of walks, places and modules."""
from copy import deepcopy

import pytest
import torch
import transformers as T
from torch.nn import functional as F
from torch.testing import assert_close

import zoo
from fisher_nodes import merge, merge_files
from fisher_nodes.engine.measure import measure
from test_residual import SMALL, sample, texts

HOW = dict(method='prodistill', progress=False, start=.3, epochs=2, learning_rate=.02)
H, D, LAYERS = 4, 16, 2

def tiny(seed, size=.15):
    torch.manual_seed(0)
    model = T.BertForSequenceClassification(T.BertConfig(**SMALL)).double()
    for p in model.parameters(): p.data += .1*torch.randn_like(p)
    torch.manual_seed(seed)
    for p in model.parameters(): p.data += size*torch.randn_like(p)
    return model.eval()

def padded(rows): # of unequal length, five and then the rest
    def batch(o):
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(r) for r in o], batch_first=True)
        return dict(input_ids=ids, attention_mask=(torch.arange(ids.shape[1]) < torch.tensor([[len(r)] for r in o])).long())
    return [batch(rows[:5]), batch(rows[5:])]

def body(m): return {n: p.detach() for n, p in (m.bert if hasattr(m, 'bert') else m).named_parameters()}

# --- the slow way ------------------------------------------------------------------------------

def layer(P, h):
    "One example of shape (T, d) through a layer of BERT."
    def lin(n): return h @ P[n+'.weight'].T+P[n+'.bias']
    q, k, v = [lin(f'attention.self.{o}').view(-1, H, D//H).transpose(0, 1) for o in ('query', 'key', 'value')]
    seen = ((q @ k.mT/(D//H)**.5).softmax(-1) @ v).transpose(0, 1).reshape(-1, D)
    def norm(x, n): return F.layer_norm(x, (D,), P[n+'.weight'], P[n+'.bias'], 1e-12)
    h = norm(h+seen @ P['attention.output.dense.weight'].T+P['attention.output.dense.bias'], 'attention.output.LayerNorm')
    z = F.gelu(lin('intermediate.dense'))
    return norm(h+z @ P['output.dense.weight'].T+P['output.dense.bias'], 'output.LayerNorm')

def coefficient(name, by): # which one, and how it lies
    if by == 'elements': return name, lambda c: c
    for o in ('query', 'key', 'value'):
        if name == f'attention.self.{o}.weight': return 'heads', lambda c: c.repeat_interleave(D//H)[:, None]
        if name == f'attention.self.{o}.bias': return 'heads', lambda c: c.repeat_interleave(D//H)
    if name == 'attention.output.dense.weight': return 'heads', lambda c: c.repeat_interleave(D//H)[None]
    if name == 'intermediate.dense.weight': return 'rows', lambda c: c[:, None]
    if name == 'intermediate.dense.bias': return 'rows', lambda c: c
    if name == 'output.dense.weight': return 'rows', lambda c: c[None]
    return name, lambda c: c

def slow(base, models, rows, weights, by):
    start, own = body(base), {t: body(m) for t, m in models.items()}
    out = {n: b+.3*sum(weights[t]*(own[t][n]-b) for t in models) for n, b in start.items()}
    first = deepcopy(base)
    first.bert.load_state_dict({**base.bert.state_dict(), **out})
    def embedded(m, r):
        with torch.no_grad(): return m.bert.embeddings(torch.tensor([r]))[0]
    new, old = [{t: [embedded(m if m else models[t], r) for r in rows[t]] for t in models} for m in (first, None)]
    sizes = dict(heads=H, rows=SMALL['intermediate_size'])
    for l in range(LAYERS):
        at = f'encoder.layer.{l}.'
        names = [n.removeprefix(at) for n in start if n.startswith(at)]
        want = {t: [layer({n: own[t][at+n] for n in names}, h) for h in old[t]] for t in models}
        c = {(t, coefficient(n, by)[0]): None for t in models for n in names}
        for t, key in c: c[t, key] = torch.full(start[at+key].shape if by == 'elements' else (sizes.get(key, 1),), .3*weights[t]).double()
        m, v, step = {k: 0*x for k, x in c.items()}, {k: 0*x for k, x in c.items()}, 0
        def mixed(c): return {n: start[at+n]+sum((o := coefficient(n, by))[1](c[t, o[0]])*(own[t][at+n]-start[at+n]) for t in models) for n in names}
        for _ in range(HOW['epochs']):
            for part in (slice(0, 5), slice(5, None)):
                for t in models:
                    live = {k: x.clone().requires_grad_() for k, x in c.items()}
                    P = mixed(live)
                    sum(weights[t]*((layer(P, h)-y)**2).sum() for h, y in zip(new[t][part], want[t][part])).backward()
                    step += 1
                    for k, x in live.items():
                        m[k], v[k] = .9*m[k]+.1*x.grad, .999*v[k]+.001*x.grad**2
                        c[k] = c[k]-HOW['learning_rate']*(m[k]/(1-.9**step))/((v[k]/(1-.999**step)).sqrt()+1e-8)
        P = mixed(c)
        out |= {at+n: P[n] for n in names}
        new, old = {t: [layer(P, h) for h in new[t]] for t in models}, want
    return out

@pytest.fixture(scope='module')
def three(): return tiny(9, 0.), {t: tiny(i) for i, t in enumerate('ab', 1)}, {t: o[:8] for t, o in texts(1).items()}

@pytest.mark.parametrize('by', ['nodes', 'elements'])
def test_layers_are_trained_as_the_slow_way_does(three, by):
    base, models, rows = three
    weights = dict(a=1., b=2.)
    merged = merge(models, base=base, data={t: padded(o) for t, o in rows.items()}, weights=weights, coefficients=by, **HOW)
    want, found = slow(base, models, rows, weights, by), body(merged.body)
    assert found.keys() == want.keys()
    for n, p in found.items(): assert_close(p, want[n], rtol=1e-6, atol=0, msg=lambda m: f'{n}: {m}')
    assert merged.report['averaged'] == dict(trained_tensors=32)
    moved = merge(models, base=base, method='task-arithmetic', scale=.3, weights=weights, progress=False)
    assert all((found[n]-p).norm() > 1e-3*p.norm() for n, p in body(moved.body).items() if 'layer.' in n and n.endswith('dense.weight'))

def test_a_weight_of_zero_is_absence(three):
    base, models, rows = three
    data = {t: padded(o) for t, o in rows.items()}
    fewer = merge(models, base=base, data=data, **HOW)
    more = merge(models | dict(c=tiny(3)), base=base, data=data | dict(c=data['a']), weights=dict(a=1, b=1, c=0), **HOW)
    for (n, p), q in zip(body(fewer.body).items(), body(more.body).values()): assert_close(q, p, rtol=0, atol=0, msg=lambda m: f'{n}: {m}')

FAMILIES = ['gpt2', 'llama', 't5'] # columns, key heads and gates, two stacks

@pytest.mark.parametrize('name', FAMILIES)
def test_other_families_come_nearer_to_their_owners(name):
    "Each layer's output on its owner's rows, from which nothing but coefficients was trained."
    base = zoo.build(name)
    models = {}
    for i, t in enumerate('ab'):
        models[t] = deepcopy(base)
        torch.manual_seed(i)
        for p in models[t].base_model.parameters():
            if p.is_floating_point(): p.data += .1*torch.randn_like(p)
    data = dict(a=sample(name), b=sample(name))
    how = dict(base=base, progress=False)
    found = [merge(models, data=data, method='prodistill', epochs=3, **how), merge(models, method='task-arithmetic', scale=.3, **how)]
    def far(merged):
        gaps = []
        with torch.no_grad():
            for t, m in models.items():
                for o in data[t]: gaps.append((out(merged[t], o)-out(m, o)).square().mean())
        return torch.stack(gaps).mean()
    def out(m, o):
        found = m(**o, output_hidden_states=True)
        return found['decoder_hidden_states' if 'decoder_hidden_states' in found else 'hidden_states'][-1].double()
    assert far(found[0]) < .97*far(found[1])

# --- wrong input ---------------------------------------------------------------------------------

def test_what_is_missing_is_refused(three, tmp_path):
    base, models, rows = three
    data = {t: padded(o) for t, o in rows.items()}
    with pytest.raises(ValueError, match="'prodistill'.*`base`"): merge(models, data=data, **HOW)
    with pytest.raises(ValueError, match="'prodistill'.*`data`"): merge(models, base=base, **HOW)
    for t, m in models.items():
        m.save_pretrained(tmp_path/t)
        measure('calls', m, data[t], progress=False).save(tmp_path/f'{t}.rows')
    with pytest.raises(ValueError, match='runs the models, so they must be in memory'):
        merge_files({t: tmp_path/t for t in models}, {t: tmp_path/f'{t}.rows' for t in models}, base=base, out=tmp_path/'out', **HOW)

@pytest.mark.parametrize('options', [dict(coefficients='rows'), dict(start=0.), dict(epochs=0), dict(epochs=1.5), dict(learning_rate=-1.), dict(learning_rate=float('nan'))], ids=str)
def test_options_out_of_range(three, options):
    base, models, rows = three
    (name, value), = options.items()
    with pytest.raises(ValueError, match=rf'`{name}` is .*{value}.*expected'):
        merge(models, base=base, data={t: padded(o) for t, o in rows.items()}, **{**HOW, **options})

def test_layers_that_are_used_twice_are_refused():
    model = zoo.build('albert')
    with pytest.raises(ValueError, match='is used more than once'):
        merge(dict(a=model, b=model), base=model, data=dict(a=sample('albert'), b=sample('albert')), **HOW)
