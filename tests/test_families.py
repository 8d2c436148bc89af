"""Every row of the table of families, on tiny models: compiled, read by hooks, and merged.

What it is held to is written here a second time: masks that really multiply, products of weights with their
gradients, and a loop over rows."""
import inspect
import re
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import zoo
from fisher_nodes.core.averaging import plan_shares, weighted_mean
from fisher_nodes.core.families import FAMILIES, FFN, REFUSED, Attention, Experts, body_of, find_family
from fisher_nodes.core.fisher import MaskFisher
from fisher_nodes.core.nodes import MaskGradients
from fisher_nodes.core.places import count_nodes, find_nodes, find_places
from fisher_nodes.core.schemes import PAPER

CASES = list(zoo.ZOO)
HEADS = ('head','cross')

def close(got, want, **kw):
    "Equal up to rounding, seen from the largest number."
    assert_close(got, want, rtol=1e-9, atol=1e-9*want.abs().max().item(), **kw)

def read(model, batch, ffn_mask='before', loss=zoo.losses):
    "Every example's mask gradients by hooks: kind -> layers."
    with MaskGradients(model, ffn_mask) as masks: return masks.per_example(loss(model, batch))

def of_blocks(blocks, found):
    "The same, block after block: kind -> gradients."
    layers = {k: iter(v) for k, v in found.items()}
    return [{k: next(layers[k]) for k in o.counts} for o in blocks]


# --- what is compiled -----------------------------------------------------------------------

def test_zoo_has_every_family():
    assert {o[0] for o in zoo.ZOO.values()} == set(FAMILIES)

@pytest.mark.parametrize('name', CASES)
def test_parameters_have_one_place_and_rows_one_node(name):
    model = zoo.build(name)
    body, places, counts = body_of(model), find_places(model), count_nodes(model)
    want = {n: p for n, p in body.named_parameters() if p.is_floating_point()}
    assert list(places) == list(want)
    for n, o in places.items():
        by_axis = {}
        for s in o.slices:
            if s.rows is None: continue
            by_axis.setdefault(s.axis, []).append(s.rows)
            assert s.nodes.max() < counts[s.kind][o.layer] and s.nodes.min() == 0
            assert s.nodes.shape[-1:] == s.rows.shape
        assert len(by_axis) <= 1, n
        for axis, rows in by_axis.items():
            assert len([s for s in o.slices if s.rows is None]) == 0, n
            axis = axis[-1] if isinstance(axis, tuple) else axis
            assert sorted(torch.cat(rows).tolist()) == list(range(want[n].shape[axis])), n

@pytest.mark.parametrize('name', CASES)
def test_nodes_have_rows_of_every_role(name):
    "A head has query, key and value rows and columns that read it; a neuron a row up and a column down."
    for block in find_nodes(zoo.build(name)):
        found = {}
        for slices in block.slices.values():
            for s in slices:
                if s.rows is not None: found.setdefault(s.role, set()).update(s.nodes.flatten().tolist())
        roles = ('query','key','value','attention_output') if block.kind in HEADS else ('ffn_in','ffn_out')
        assert set(roles) <= set(found)
        for role, nodes in found.items():
            shared = role in ('key','value') and len(block.counts) > 1
            assert nodes == set(range(list(block.counts.values())[shared])), (block.name, role)

HEADS_SAID = ('num_attention_heads','n_head','num_heads','n_heads','encoder_attention_heads')
KEYS_SAID = ('num_key_value_heads','num_kv_heads')

@pytest.mark.parametrize('name', CASES)
def test_heads_are_as_many_as_the_config_says(name):
    kind, options, _, _ = zoo.case(name)
    counts, config = count_nodes(zoo.build(name)), options.get('text_config', options)
    heads = next(config[k] for k in HEADS_SAID if k in config)
    first = counts['head'][0]
    assert first == (heads[0] if isinstance(heads, list) else heads)
    keys = next((config[k] for k in KEYS_SAID if k in config), 1 if config.get('multi_query') else first)
    assert counts.get('group', counts['head'])[0] == keys

def test_roles_are_those_of_the_body_where_the_body_is_the_whole():
    whole, body = [find_places(zoo.build(n)) for n in ('bert-masked-lm','bert')]
    for n, o in body.items():
        if 'pooler' not in n: assert whole[f'bert.{n}'].roles == o.roles, n


# --- which rows move which heads ------------------------------------------------------------

def heads_seen(model, batch, block):
    "What the masks of a block multiply, the first time that it is called."
    found = []
    handle = block.site.module.register_forward_pre_hook(lambda m, args: found.append(args[0].detach().clone()))
    try:
        with torch.no_grad(): zoo.losses(model, batch)
    finally: handle.remove()
    return found[0].flatten(0, -2)

def change(body, block, role, node, only=None):
    "Noise on the rows of a node with one role; on the first of them alone if `only`."
    gen, before = torch.Generator().manual_seed(5), {}
    for n, slices in block.slices.items():
        for s in slices:
            if s.role != role: continue
            p = body.get_parameter(n)
            before[p] = p.detach().clone()
            rows = s.rows[s.nodes == node][:only]
            lanes = p.detach().movedim(s.axis, 0)
            lanes[rows] += torch.randn(lanes[rows].shape, generator=gen, dtype=torch.float64)
            if only: return before
    return before

MIXED = {'olmo2': 'a norm over all heads', 'olmo3': 'a norm over all heads', 'deberta-talking': 'heads that mix'}

@pytest.mark.parametrize('name', CASES)
def test_rows_of_queries_and_keys_move_their_own_heads(name):
    "All rows of a node move no head but its own; one row moves all columns of them."
    if name in MIXED: pytest.skip(MIXED[name])
    model = zoo.build(name)
    body, batch = body_of(model), zoo.alone(zoo.examples(name), 0)
    for o in find_nodes(model):
        if o.kind not in HEADS: continue
        clean, counts = heads_seen(model, batch, o), list(o.counts.values())
        for role, only in [(r, k) for r in ('query','key') for k in (None, 1)]:
            nodes = counts[-1] if role == 'key' else counts[0]
            before = change(body, o, role, nodes-1, only)
            moved = (heads_seen(model, batch, o)-clean).abs().amax(0) > 1e-9*clean.abs().max()
            for p, old in before.items(): p.detach().copy_(old)
            own = torch.arange(nodes).repeat_interleave(len(moved)//nodes) == nodes-1
            assert (moved == own).all(), (o.name, role, only)


# --- mask gradients -------------------------------------------------------------------------

def literal(model, batch, site, columns, size, bias=None):
    "Gradient of masks of one example that really multiply at one site."
    masks = torch.ones(site.nodes, dtype=torch.float64, requires_grad=True)
    def masked(x):
        b = 0 if bias is None else bias
        m = torch.ones(x.shape[-1], dtype=x.dtype)
        m = m.index_put((columns,), masks.repeat_interleave(size))
        return (x-b)*m + b
    before, after = site.module.register_forward_pre_hook, site.module.register_forward_hook
    handle = (before(lambda m, args: (masked(args[0]), *args[1:])) if site.side == 'input' else
              after(lambda m, args, z: masked(z)))
    try: return torch.autograd.grad(zoo.losses(model, batch).sum(), masks)[0]
    finally: handle.remove()

def literal_experts(model, batch, block, role):
    "Gradient of masks on rows of the experts' matrices that go up, or on columns of those that go down."
    slices = [(n, s) for n, o in block.slices.items() for s in o if s.role == role]
    n, s = next(o for o in slices if not o[0].endswith('_bias'))
    weight = model.get_parameter(n).detach()
    masks = torch.ones(sum(block.counts.values()), dtype=torch.float64, requires_grad=True)
    full = torch.ones([weight.shape[i] for i in s.axis], dtype=torch.float64).index_put(
        (torch.arange(len(weight))[:,None], s.rows), masks[s.nodes])
    name, full = n.rpartition('.')[2], full.unsqueeze(3-s.axis[1])
    site = block.site.module
    parameter = site._parameters.pop(name)
    setattr(site, name, weight*full)
    try: return torch.autograd.grad(zoo.losses(model, batch).sum(), masks)[0]
    finally:
        delattr(site, name)
        site._parameters[name] = parameter

def all_literal(model, batch, ffn_mask):
    "Literal masks of all blocks, one pass a block."
    for o in find_nodes(model):
        site = o.site if ffn_mask == 'before' else o.after
        if site.experts:
            yield o, literal_experts(model, batch, o, 'ffn_in' if ffn_mask == 'before' else 'ffn_out')
            continue
        bias = site.module.bias if site.side == 'output' else None
        width = site.nodes*o.size
        columns = torch.arange(10**4)[site.columns or slice(None)][:width]
        yield o, literal(model, batch, site, columns, o.size, bias)

@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('ffn_mask', ['before','after'])
def test_masks_on_a_padded_batch_are_literal_masks_on_one_example(name, ffn_mask):
    model = zoo.build(name)
    rows = zoo.examples(name)
    found = of_blocks(find_nodes(model), read(model, zoo.collate(rows), ffn_mask))
    for (o, want), got in zip(all_literal(model, zoo.alone(rows, 1), ffn_mask), found):
        close(got[o.kind][1], want)
        assert want.abs().max() > 0

def value_masks(model, batch, block):
    "Gradient of masks on every key head's values, where values have a matrix of their own."
    modules = dict(body_of(model).named_modules(remove_duplicate=False))
    weights = [n for n, o in block.slices.items() if [s.role for s in o] == ['value'] and n.endswith('.weight')]
    paths = [n.rpartition('.')[0] for n in weights]
    if not paths: return None
    masks = torch.ones(list(block.counts.values())[-1], dtype=torch.float64, requires_grad=True)
    def masked(m, args, v): return (v.unflatten(-1, (len(masks),-1))*masks[:,None]).flatten(-2)
    handles = [modules[p].register_forward_hook(masked) for p in paths]
    try: return torch.autograd.grad(zoo.losses(model, batch).sum(), masks)[0]
    finally:
        for h in handles: h.remove()

@pytest.mark.parametrize('name', CASES)
def test_masks_of_key_heads_are_masks_on_values(name):
    model = zoo.build(name)
    rows = zoo.examples(name)
    blocks = find_nodes(model)
    found = of_blocks(blocks, read(model, zoo.collate(rows)))
    checked = 0
    for o, got in zip(blocks, found):
        if o.kind not in HEADS: continue
        want = value_masks(model, zoo.alone(rows, 1), o)
        if want is None: continue # fused: the identities below speak of the same masks
        close(list(got.values())[-1][1], want)
        checked += 1
    fused = any('value' in [s.role for s in o] and len(o) > 1 for b in blocks for o in b.slices.values())
    assert checked or fused


# --- identities -----------------------------------------------------------------------------

def inner(block, weights, grads, role, bias, more=0):
    "Weights of a role times their gradient, added up by node; `more` is what the model adds to a bias."
    counts = list(block.counts.values())
    total = torch.zeros(counts[-1] if role in ('key','value') else counts[0], dtype=torch.float64)
    for n, slices in block.slices.items():
        for s in slices:
            if s.role != role or s.rows is None: continue
            axes = s.axis if isinstance(s.axis, tuple) else (s.axis,)
            is_bias = weights[n].ndim == len(axes)
            if is_bias and not bias: continue
            x = ((weights[n]+more*is_bias)*grads[n]).movedim(axes, tuple(range(len(axes))))
            x = x.flatten(len(axes)).sum(-1) if x.ndim > len(axes) else x
            total.index_add_(0, s.nodes.flatten(), x[..., s.rows].flatten())
    return total

def check_identities(name, model):
    "What masks stand for, one example alone against a padded batch."
    rows = zoo.examples(name)
    weights = dict(body_of(model).named_parameters())
    for p in weights.values(): p.requires_grad_() # some positions are fixed
    loss = zoo.losses(model, zoo.alone(rows, 1)).sum()
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    grads = {n: torch.zeros_like(w) if g is None else g for (n, w), g in zip(weights.items(), found)}
    weights = {n: w.detach() for n, w in weights.items()}
    blocks = find_nodes(model)
    before, after = [of_blocks(blocks, read(model, zoo.collate(rows), o)) for o in ('before','after')]
    for o, b, a in zip(blocks, before, after):
        def product(role, bias=False, more=0): return inner(o, weights, grads, role, bias, more)
        if o.kind in HEADS:
            close(b[o.kind][1], product('attention_output'))
            close(list(b.values())[-1][1], product('value', bias=True))
            continue
        close(b[o.kind][1], product('ffn_in'))
        close(a[o.kind][1], product('ffn_out'))
        gated = any(s.role == 'gate' for p in o.slices.values() for s in p)
        more = zoo.ZOO[name][0] == 'gpt_oss' # which multiplies its gate by one more
        if gated: close(product('ffn_in', bias=True, more=more), product('ffn_out'))

@pytest.mark.parametrize('name', CASES)
def test_masks_are_weights_times_their_gradient(name): check_identities(name, zoo.build(name))

def changed(kind, **more): return lambda b: replace(b, **more) if isinstance(b, kind) else b
def turned(b): return replace(b, up=b.gate, gate=b.up) if isinstance(b, FFN) and b.gate else b
def exchanged(a, b): return changed(Attention, **{a: f'self.{b}', b: f'self.{a}'})

WRONG = {'gpt2 in groups': ('gpt2', changed(Attention, order='groups')),
         'phi3 in groups': ('phi3-grouped', changed(Attention, order='groups')),
         'neox in blocks': ('gpt_neox', changed(Attention, order='blocks')),
         'bloom in blocks': ('bloom', changed(Attention, order='blocks')),
         'falcon in blocks': ('falcon', changed(Attention, order='blocks')),
         'deberta in blocks': ('deberta', changed(Attention, order='blocks')),
         'phi3 up first': ('phi3', changed(FFN, first='up')),
         'phi3 row by row': ('phi3', changed(FFN, order='groups')),
         'modernbert up first': ('modernbert', changed(FFN, first='up')),
         'llama gate is up': ('llama', turned),
         'mt5 gate is up': ('mt5', turned),
         'bert query is value': ('bert', exchanged('query', 'value')),
         'bert key is value': ('bert', exchanged('key', 'value')),
         'deberta without positions': ('deberta', changed(Attention, also=())),
         'longformer without global': ('longformer', changed(Attention, also=())),
         'mixtral up first': ('mixtral', changed(Experts, first='up')),
         'mixtral row by row': ('mixtral', changed(Experts, order='groups')),
         'gpt_oss in blocks': ('gpt_oss', changed(Experts, order='blocks'))}

@pytest.mark.parametrize('case', WRONG)
def test_wrong_rows_are_caught(case, monkeypatch):
    name, change = WRONG[case]
    model, kind = zoo.build(name), zoo.ZOO[name][0]
    wrong = replace(FAMILIES[kind], blocks=tuple(map(change, FAMILIES[kind].blocks)))
    monkeypatch.setitem(FAMILIES, kind, wrong)
    with pytest.raises((AssertionError, ValueError)):
        find_places(model)
        check_identities(name, model)

@pytest.mark.parametrize('name', ['clip','siglip'])
def test_a_tower_that_the_loss_leaves_out_has_gradient_zero(name):
    model = zoo.build(name)
    rows = zoo.examples(name)
    def images(model, batch):
        return zoo.spread(model.vision_model(pixel_values=batch['pixel_values']).pooler_output, 4)
    def found(batch): return of_blocks(find_nodes(model), read(model, batch, loss=images))
    for o, got, want in zip(find_nodes(model), found(zoo.collate(rows)), found(zoo.alone(rows, 1))):
        close(got[o.kind][1], want[o.kind][0])
        assert (got[o.kind] == 0).all() == o.name.startswith('text_model.'), o.name

def test_a_tower_that_was_used_must_matter_to_the_loss():
    model = zoo.build('clip')
    def images(model, batch): return zoo.spread(model(**batch).image_embeds, 4)
    batch = zoo.collate(zoo.examples('clip'))
    with pytest.raises(ValueError, match='no gradient reached'): read(model, batch, loss=images)

def test_a_module_that_is_never_called_is_named():
    model = zoo.build('wav2vec2')
    attention, three = model.encoder.layers[1].attention, 'attn_weights, _ = self.attention' in inspect.getsource(type(model.encoder.layers[1]).forward)
    def forward(hidden_states, *args, **kw): # as WavLM uses the weight, without the module
        return torch.nn.functional.linear(hidden_states, attention.out_proj.weight), *[None]*(1+three)
    attention.forward = forward
    said = "the attention output of 'encoder.layers.1.attention' is never called; its heads cannot be read"
    with pytest.raises(ValueError, match=re.escape(said)):
        read(model, zoo.collate(zoo.examples('wav2vec2')))

@pytest.mark.parametrize('name', [n for n in REFUSED if n in zoo.CONFIG_MAPPING])
def test_refused_families_say_why(name):
    model = zoo.build('bert')
    model.config.model_type = name
    with pytest.raises(ValueError, match=f'{name!r} is not supported: '): find_family(model)


# --- merging --------------------------------------------------------------------------------

def made_up(model, seed):
    "A Fisher of the model's nodes."
    gen = torch.Generator().manual_seed(seed)
    kinds = {k: tuple(torch.rand(n, generator=gen, dtype=torch.float64)+.01 for n in layers)
             for k, layers in count_nodes(model).items()}
    return MaskFisher(kinds.pop('head'), kinds.pop('row'), **kinds)

def slow_merge(place, tensors, fishers, lambdas):
    "Equation 5 with the paper's mapping, row after row."
    out = sum(l*t for l, t in zip(lambdas, tensors))/sum(lambdas)
    for s in place.slices:
        if s.rows is None or s.role not in ('query','key','ffn_in','gate'): continue
        two = isinstance(s.axis, tuple)
        for e, nodes in enumerate(s.nodes if two else [s.nodes]):
            def part(t): return t[e].movedim(s.axis[1]-1, 0) if two else t.movedim(s.axis, 0)
            for row, node in zip(s.rows.tolist(), nodes.tolist()):
                w = [l*f.kinds[s.kind][place.layer][node] for l, f in zip(lambdas, fishers)]
                part(out)[row] = sum(a*part(t)[row] for a, t in zip(w, tensors))/sum(w)
    return out

@pytest.mark.parametrize('name', CASES)
def test_merge_is_equation_5_row_by_row(name):
    models = [zoo.build(name, seed) for seed in (0, 1)]
    states = [{n: p.detach() for n, p in body_of(m).named_parameters()} for m in models]
    places, lambdas = find_places(models[0]), [1., 2.]
    fishers = [made_up(m, i) for i, m in enumerate(models)]
    shapes = {n: p.shape for n, p in states[0].items()}
    plan = plan_shares(places, shapes, PAPER, fishers, torch.tensor(lambdas))
    weighted = 0
    for n, o in plan.items():
        tensors = [s[n] for s in states]
        got = weighted_mean(tensors, o.shares, axis=o.axis)
        if not got.numel(): continue # DINOv3 may have no register tokens
        close(got, slow_merge(places[n], tensors, fishers, lambdas))
        weighted += not torch.allclose(got, (tensors[0]+2*tensors[1])/3, rtol=1e-3)
    assert weighted >= 3 if name != 'gpt2' else 2


# --- experts --------------------------------------------------------------------------------

def test_experts_compute_as_before_afterwards_also_on_error():
    name = 'qwen3_moe'
    model = zoo.build(name)
    batch = zoo.collate(zoo.examples(name))
    plain = zoo.losses(model, batch)
    with MaskGradients(model):
        assert model.config._experts_implementation != 'eager'
        assert_close(zoo.losses(model, batch), plain, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match='mine'):
        with MaskGradients(model): raise RuntimeError('mine')
    assert model.config._experts_implementation == 'eager'
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

def test_an_expert_that_an_example_never_used_has_gradient_zero():
    name = 'mixtral'
    model = zoo.build(name)
    used, layer = [], model.layers[0].mlp
    layer.experts.register_forward_pre_hook(lambda m, args: used.append(args[1]))
    batch = zoo.collate([o | dict(input_ids=o['input_ids'][:1]) for o in zoo.examples(name)])
    found = read(model, batch)['row'][0].unflatten(1, (4,-1))
    assert used[0].shape == (3,2) # one token an example, two experts a token
    for i, experts in enumerate(used[0].tolist()):
        assert {e for e in range(4) if found[i,e].any()} == set(experts)
