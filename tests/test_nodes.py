"""Nodes along any axis, kinds by name: families that 0.1 merged wrongly or not at all, held to literal masks and to merges by hand."""
import copy
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForSequenceClassification, Phi3Config, Phi3ForSequenceClassification

from fisher_nodes import MaskFisher, linear_grams, mask_fisher, merge, merge_files
from fisher_nodes.core.families import FAMILIES, FFN, Attention, Family
from fisher_nodes.core.places import count_nodes, find_nodes, find_places
from reference import task_loss

SIZE = dict(vocab_size=60, num_labels=3, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LAYER = 'layers.{}.self_attn', 'layers.{}.mlp'
ROWS = dict(
    llama=Family((Attention(LAYER[0], 'q_proj', 'k_proj', 'v_proj', 'o_proj'), FFN(LAYER[1], 'up_proj', 'down_proj', gate='gate_proj'))),
    gpt2=Family((Attention('h.{}.attn', 'c_attn', 'c_attn', 'c_attn', 'c_proj'), FFN('h.{}.mlp', 'c_fc', 'c_proj'))),
    phi3=Family((Attention(LAYER[0], 'qkv_proj', 'qkv_proj', 'qkv_proj', 'o_proj'), FFN(LAYER[1], 'gate_up_proj', 'down_proj', gate='gate_up_proj'))))
H, G, D = 8, 2, 24 # query heads, key heads, neurons

def config(kind, **kw): return kind(hidden_size=32, num_hidden_layers=2, num_attention_heads=H, intermediate_size=D, **SIZE | kw)

MODELS = dict(
    llama=lambda: LlamaForSequenceClassification(config(LlamaConfig, num_key_value_heads=G, attention_bias=True, mlp_bias=True)),
    gpt2=lambda: GPT2ForSequenceClassification(GPT2Config(n_embd=32, n_layer=2, n_head=H, n_inner=D, n_positions=16, **SIZE)),
    phi3=lambda: Phi3ForSequenceClassification(config(Phi3Config, num_key_value_heads=G)))

@pytest.fixture(params=MODELS)
def family(request, monkeypatch):
    monkeypatch.setitem(FAMILIES, request.param, ROWS[request.param])
    return request.param

def make(family, seed=0):
    "A model whose every number is random, so that nothing holds by accident."
    model, gen = MODELS[family]().double().eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(.3*torch.randn(p.shape, generator=gen, dtype=torch.float64)+(p.ndim == 1))
    return model

def batches(seed=0):
    gen = torch.Generator().manual_seed(seed)
    def one(n, length):
        ids = torch.randint(3, 60, (n, length), generator=gen)
        mask = (torch.arange(length) < torch.randint(2, length+1, (n, 1), generator=gen)).long()
        return dict(input_ids=ids*mask, attention_mask=mask, labels=torch.randint(0, 3, (n,), generator=gen))
    return [one(n, t) for n, t in ((3, 7), (1, 4), (2, 9))]

def modules(model, family):
    "Of every layer: attention, FFN, and where the literal masks go."
    layers = model.transformer.h if family == 'gpt2' else model.model.layers
    return [(o.attn, o.mlp) if family == 'gpt2' else (o.self_attn, o.mlp) for o in layers]

@contextmanager
def masked(model, family):
    "Literal masks of ones: on heads, on what a key head's queries read, and on the rows of the FFN's first matrix before the bias."
    ones = partial(torch.ones, dtype=torch.float64, requires_grad=True)
    masks = [dict(head=ones(H), group=ones(H if family == 'gpt2' else G), row=ones(D)) for _ in range(2)]
    handles = []
    for (attention, ffn), m in zip(modules(model, family), masks):
        out = attention.c_proj if family == 'gpt2' else attention.o_proj
        def heads(mod, args, m=m):
            both = m['head'].view(len(m['group']), -1)*m['group'][:, None]
            return (args[0]*both.flatten().repeat_interleave(args[0].shape[-1]//H),)
        handles.append(out.register_forward_pre_hook(heads))
        up = dict(gpt2='c_fc', llama='up_proj', phi3='gate_up_proj')[family]
        def rows(mod, args, z, m=m):
            bias = 0 if mod.bias is None else mod.bias
            mask = m['row'] if z.shape[-1] == D else torch.cat([torch.ones(D, dtype=torch.float64), m['row']])
            return (z-bias)*mask+bias
        handles.append(getattr(ffn, up).register_forward_hook(rows))
    try: yield masks
    finally:
        for h in handles: h.remove()

def brute(model, family, data):
    "Mean of squared gradients, one example at a time, without padding."
    model, found, n = copy.deepcopy(model), [], 0
    for b in data:
        for i in range(len(b['labels'])):
            keep = b['attention_mask'][i].bool()
            row = {k: v[i:i+1] if v.ndim == 1 else v[i:i+1, keep] for k, v in b.items()}
            with masked(model, family) as masks:
                flat = [m[k] for m in masks for k in m]
                found.append(torch.autograd.grad(task_loss(model, row).sum(), flat))
            n += 1
    total = [sum(g.square() for g in gs)/n for gs in zip(*found)]
    return {k: torch.stack(total[i::3]) for i, k in enumerate(('head', 'group', 'row'))}

def test_fishers_against_literal_masks(family):
    model, data = make(family), batches()
    fisher, want = mask_fisher(model, data, progress=False), brute(model, family, data)
    kinds = ('head', 'row') if family == 'gpt2' else ('head', 'group', 'row')
    assert set(fisher.kinds) == set(kinds)
    for k in kinds: assert_close(fisher.kinds[k], want[k], rtol=1e-9, atol=0)

def test_squares_of_heads_are_not_the_groups(monkeypatch):
    "The diagonal approximation is another number, so it cannot pass for the right one."
    monkeypatch.setitem(FAMILIES, 'llama', ROWS['llama'])
    fisher = mask_fisher(make('llama'), batches(), progress=False)
    sums = fisher.heads.unflatten(1, (G, -1)).sum(-1)
    assert not torch.allclose(sums, fisher.kinds['group'], rtol=.05, atol=0)

def shares(fishers, kind, layer):
    F = torch.stack([f.kinds[kind][layer] for f in fishers])
    return F/F.sum(0)

def mean(a, b, w, axis=0): return torch.lerp(b, a, w.view([-1 if i == axis else 1 for i in range(a.ndim)]))

def by_hand(family, fishers, layer, name, a, b):
    "The merged parameter of one layer, written down role by role."
    half = torch.full((), .5, dtype=torch.float64)
    d = 32//H
    head, row = shares(fishers, 'head', layer)[0].repeat_interleave(d), shares(fishers, 'row', layer)[0]
    group = shares(fishers, 'group', layer)[0].repeat_interleave(d) if family != 'gpt2' else None
    axis = 1 if family == 'gpt2' and name.endswith('weight') else 0
    part = name.rsplit('.', 1)[0]
    if part == 'q_proj': return mean(a, b, head)
    if part == 'k_proj': return mean(a, b, group)
    if part in ('up_proj', 'gate_proj'): return mean(a, b, row)
    if part == 'c_fc': return mean(a, b, row, axis)
    if part == 'gate_up_proj': return mean(a, b, torch.cat([row, row]))
    if part == 'qkv_proj': return mean(a, b, torch.cat([head, group, torch.full((G*d,), .5).double()]))
    if part == 'c_attn': return mean(a, b, torch.cat([head, head, torch.full((H*d,), .5).double()]), axis)
    return torch.lerp(b, a, half)

def test_merges_by_hand(family):
    "Equation 5 for every parameter of every layer; what is outside of layers is the plain mean."
    models, data = dict(a=make(family, 1), b=make(family, 2)), batches()
    fishers = {t: mask_fisher(m, data, progress=False) for t, m in models.items()}
    merged = merge(models, fishers, progress=False)
    places = modules(merged['a'], family)
    for layer, (attention, ffn) in enumerate(places):
        for i, block in enumerate((attention, ffn)):
            a, b = (dict(modules(m, family)[layer][i].named_parameters()) for m in models.values())
            for name, p in block.named_parameters():
                want = by_hand(family, list(fishers.values()), layer, name, a[name], b[name])
                assert_close(p, want, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f'{layer} {n}: {m}')
    inside = {id(p) for pair in places for block in pair for p in block.parameters()}
    bodies = [dict(m.base_model.named_parameters()) for m in models.values()]
    for name, p in merged.body.named_parameters():
        if id(p) not in inside: assert_close(p, (bodies[0][name]+bodies[1][name])/2, rtol=1e-12, atol=1e-14)

def test_a_key_head_takes_its_own_fisher(monkeypatch):
    "0.1 gave the rows of one key head the shares of four query heads, one after the other."
    monkeypatch.setitem(FAMILIES, 'llama', ROWS['llama'])
    models = dict(a=make('llama', 1), b=make('llama', 2))
    heads = torch.rand(2, H, generator=torch.Generator().manual_seed(0)).double()
    def fisher(group): return MaskFisher(heads, torch.ones(2, D).double(), group=torch.tensor([group]*2).double())
    merged = merge(models, dict(a=fisher([1., 0.]), b=fisher([0., 1.])), progress=False)
    a, b = (m.model.layers[0].self_attn.k_proj.weight for m in models.values())
    k = merged.body.layers[0].self_attn.k_proj.weight
    assert torch.equal(k[:4], a[:4]) and torch.equal(k[4:], b[4:])

@pytest.mark.parametrize('method', ['average', 'mask-fisher', 'regmean'])
def test_files_merge_like_memory(family, method, tmp_path):
    models = {t: make(family, i).float() for i, t in enumerate('ab')}
    for t, m in models.items(): m.save_pretrained(tmp_path/t)
    folders = {t: tmp_path/t for t in models}
    measure = dict(average=None).get(method, mask_fisher if method == 'mask-fisher' else linear_grams)
    fishers = {t: measure(tmp_path/t if method == 'never' else m, batches(), progress=False) for t, m in models.items()} if measure else None
    merged = merge(folders, fishers, method=method, progress=False)
    out = merge_files(folders, fishers, method=method, out=tmp_path/'out', progress=False)
    from safetensors.torch import load_file
    files = load_file(out/'model.safetensors')
    for n, t in merged.body.state_dict().items():
        assert torch.equal(files[f'{merged.body.base_model_prefix}.{n}'], t), n

def test_regmean_fits_a_conv1d(monkeypatch):
    "The merged weight solves least squares, with the outputs of a `Conv1D` in its columns."
    monkeypatch.setitem(FAMILIES, 'gpt2', ROWS['gpt2'])
    models = dict(a=make('gpt2', 1), b=make('gpt2', 2))
    grams = {t: linear_grams(m, batches(i), progress=False) for i, (t, m) in enumerate(models.items())}
    merged = merge(models, grams, method='regmean', off_diagonal=.5, progress=False)
    assert 'gram' in merged.report['roles']['query']['weight']
    name = 'h.1.mlp.c_fc.weight'
    def shrunk(g): return g*.5+torch.diag(g.diagonal())*.5
    g = [shrunk(o.values[name]) for o in grams.values()]
    w = [m.transformer.state_dict()[name] for m in models.values()]
    want = torch.linalg.solve(g[0]+g[1], g[0]@w[0]+g[1]@w[1])
    assert_close(merged.body.state_dict()[name], want, rtol=1e-7, atol=1e-10)
    assert (want-(w[0]+w[1])/2).abs().max() > .01

@pytest.mark.parametrize('method', ['wudi', 'actmat'])
def test_task_vectors_of_a_conv1d_are_turned(method, monkeypatch):
    "A `Conv1D` has inputs in its rows; one with as many inputs as outputs would hide a wrong turn from the shapes."
    monkeypatch.setitem(FAMILIES, 'gpt2', ROWS['gpt2'])
    base, models = make('gpt2', 0), dict(a=make('gpt2', 1), b=make('gpt2', 2))
    merged = merge(models, base=base, method=method, progress=False)
    assert 'task vector' in merged.report['roles']['query']['weight']
    for name in ('h.1.mlp.c_fc.weight', 'h.0.attn.c_proj.weight'):
        start, *w = [m.transformer.state_dict()[name].T for m in (base, *models.values())]
        τ = [o-start for o in w]
        size = [o.norm() if method == 'wudi' else 1. for o in τ]
        tall, answers = torch.cat([o/n for o, n in zip(τ, size)]), torch.cat([o@o.T/n for o, n in zip(τ, size)])
        want = start.T+torch.linalg.lstsq(tall, answers, driver='gelsd').solution
        assert_close(merged.body.state_dict()[name], want, rtol=1e-6, atol=0)

class Odd(nn.Module):
    "A linear layer that torch does not know as one."
    def __init__(self, n, m):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(m, n).double()), None
    def forward(self, x): return x@self.weight.T

def odd(family):
    "A model without any linear layer that RegMean could measure."
    model = make(family)
    for m in list(model.base_model.modules()):
        for name, o in list(m.named_children()):
            if isinstance(o, nn.Linear): setattr(m, name, Odd(o.in_features, o.out_features))
    return model

def test_a_body_in_which_regmean_finds_nothing_is_refused(monkeypatch):
    "0.1 averaged it without a word."
    monkeypatch.setitem(FAMILIES, 'phi3', ROWS['phi3'])
    with pytest.raises(ValueError, match='Phi3Model has no linear layer, so that the merge would be the plain average'):
        linear_grams(odd('phi3'), batches(), progress=False)
    models = dict(a=odd('phi3'), b=odd('phi3'))
    with pytest.raises(ValueError, match='no linear layer'): merge(models, data=dict(a=batches(), b=batches()), method='regmean', progress=False)

WRONG = {
    'half the keys': (dict(k=6), "'layers.0.self_attn.k_proj' has 6 outputs, expected 4|heads of 4 in 32 columns and 6 key rows"),
    'queries': (dict(q=24), "q_proj' has 24 outputs, expected 32"),
    'values': (dict(v=16), "v_proj' has 16 outputs, expected 8"),
    'neurons': (dict(up=48), "up_proj' has 48 outputs, expected 24")}

@pytest.mark.parametrize('change,say', WRONG.values(), ids=WRONG)
def test_sizes_must_be_those_of_the_nodes(monkeypatch, change, say):
    "That a number divides is not enough."
    monkeypatch.setitem(FAMILIES, 'llama', ROWS['llama'])
    model = make('llama')
    for k, n in change.items():
        block = model.model.layers[0].mlp if k == 'up' else model.model.layers[0].self_attn
        setattr(block, f'{k}_proj', nn.Linear(32, n).double())
    with pytest.raises(ValueError, match=say): find_nodes(model)

def test_wrong_rows_of_the_table(monkeypatch):
    model = make('llama')
    def refused(row, say):
        monkeypatch.setitem(FAMILIES, 'llama', row)
        with pytest.raises(ValueError, match=say): find_places(model)
    attention, ffn = ROWS['llama'].blocks
    refused(Family((attention, FFN(LAYER[1], 'up_proj', 'down_proj'))), "'layers.0.mlp.gate_proj.weight' belongs to 0 parts")
    refused(Family((attention,)), "'layers.0.mlp.* belongs to 0 parts")
    refused(Family((Attention(LAYER[0], 'query', 'k_proj', 'v_proj', 'o_proj'), ffn)), "block 'layers.0.self_attn' is not as its family says")
    refused(Family((Attention('blocks.{}.attn', 'q', 'k', 'v', 'o'),)), 'has no blocks at')

def test_a_fisher_without_groups_is_refused(monkeypatch):
    monkeypatch.setitem(FAMILIES, 'llama', ROWS['llama'])
    models = dict(a=make('llama', 1), b=make('llama', 2))
    f = MaskFisher(torch.ones(2, H).double(), torch.ones(2, D).double())
    with pytest.raises(ValueError, match="no nodes of kind 'group'"): merge(models, dict(a=f, b=f), progress=False)

@pytest.mark.parametrize('scheme,say', [(dict(query='row'), 'weighted by row, but has nodes of kind'), (dict(qurey='head'), "role 'qurey'"),
                                        (dict(embeddings='head'), None)])
def test_schemes_that_cannot_be(family, scheme, say):
    models = {t: make(family, i) for i, t in enumerate('ab')}
    fishers = {t: mask_fisher(m, batches(), progress=False) for t, m in models.items()}
    if say is None: assert merge(models, fishers, scheme=scheme, progress=False).report['roles'] # no embeddings role in these rows
    else:
        with pytest.raises(ValueError, match=say): merge(models, fishers, scheme=scheme, progress=False)

def test_aliases_name_the_same_roles(family):
    models = {t: make(family, i) for i, t in enumerate('ab')}
    fishers = {t: mask_fisher(m, batches(), progress=False) for t, m in models.items()}
    a, b = (merge(models, fishers, scheme=s, progress=False).body.state_dict()
            for s in (dict(up='row', down='row', output='head'), dict(ffn_in='row', ffn_out='row', attention_output='head')))
    assert all(torch.equal(a[n], b[n]) for n in a)

def test_saved_groups_come_back(tmp_path, monkeypatch):
    monkeypatch.setitem(FAMILIES, 'llama', ROWS['llama'])
    fisher = mask_fisher(make('llama'), batches(), progress=False)
    fisher.save(tmp_path/'f.safetensors')
    again = MaskFisher.load(tmp_path/'f.safetensors')
    assert again.kinds.keys() == fisher.kinds.keys() == count_nodes(make('llama')).keys()
    for k, v in fisher.kinds.items(): assert torch.equal(again.kinds[k], v)
