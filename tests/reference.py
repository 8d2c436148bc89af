"""Slow and obvious versions of what `fisher_nodes` computes, and tiny models to try them on.

Nothing here imports the package: these are the numbers it is held to."""
import copy, re
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from transformers import (BertConfig, BertForSequenceClassification, RobertaConfig,
                          RobertaForSequenceClassification)

FAMILIES = {'bert': (BertConfig, BertForSequenceClassification, 0),
            'roberta': (RobertaConfig, RobertaForSequenceClassification, 1)}


# --- tiny models and data -------------------------------------------------------------------

def tiny(family='bert', num_labels=3, seed=0, attn='sdpa', dtype=torch.float64, layers=2, hidden=16,
         heads=4, intermediate=24, vocab=60, positions=40, std=.2):
    "A `family` classifier whose every weight, bias and LayerNorm is random; dropout is on in training mode."
    config, cls, pad = FAMILIES[family]
    cfg = config(num_labels=num_labels, num_hidden_layers=layers, hidden_size=hidden, num_attention_heads=heads,
                 intermediate_size=intermediate, vocab_size=vocab, max_position_embeddings=positions,
                 pad_token_id=pad, attn_implementation=attn)
    model, gen = cls(cfg), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=gen)*std + ('LayerNorm.weight' in name))
    return model.to(dtype).eval()

def examples(n=10, num_labels=3, seed=0, vocab=60, lengths=(3, 9, 5, 12, 4, 7)):
    "`n` tokenised examples of unequal lengths; `num_labels=1` gives float targets."
    gen = torch.Generator().manual_seed(seed)
    def one(i):
        ids = torch.randint(4, vocab, (lengths[i%len(lengths)],), generator=gen).tolist()
        label = (torch.randn((), generator=gen).item() if num_labels == 1
                 else torch.randint(num_labels, (), generator=gen).item())
        return dict(input_ids=ids, attention_mask=[1]*len(ids), labels=label)
    return [one(i) for i in range(n)]

def collate(rows, pad=0, side='right', extra=0):
    "One padded batch; `extra` columns of padding beyond the longest row."
    width = max(len(r['input_ids']) for r in rows) + extra
    def padded(key, value):
        fill = lambda r: [value]*(width-len(r[key]))
        return torch.tensor([r[key]+fill(r) if side == 'right' else fill(r)+r[key] for r in rows])
    return dict(input_ids=padded('input_ids', pad), attention_mask=padded('attention_mask', 0),
                labels=torch.tensor([r['labels'] for r in rows]))

def split(rows, sizes):
    "`rows` cut into groups of `sizes`, the last group taking what is left."
    rows, groups = list(rows), []
    for s in sizes: groups, rows = [*groups, rows[:s]], rows[s:]
    return [g for g in [*groups, rows] if g]

def ragged_batches(family='bert', sizes=(3, 1, 4, 2), num_labels=3, seed=0, side='right', extra=0, **kw):
    "Batches of unequal size, of examples of unequal length."
    rows = examples(sum(sizes), num_labels, seed, **kw)
    return [collate(g, FAMILIES[family][2], side, extra) for g in split(rows, sizes)]


# --- Fisher of the masks --------------------------------------------------------------------

@contextmanager
def masked(model, site):
    "`model` with real masks of ones: yields `heads (L,H)` and `rows (L,D)`; rows stand `before` bias and GELU or `after`."
    cfg, like = model.config, dict(dtype=model.dtype, requires_grad=True)
    heads = torch.ones(cfg.num_hidden_layers, cfg.num_attention_heads, **like)
    rows = torch.ones(cfg.num_hidden_layers, cfg.intermediate_size, **like)
    def hook(i, layer):
        head_dim = cfg.hidden_size//cfg.num_attention_heads
        yield layer.attention.output.dense.register_forward_pre_hook(
            lambda mod, args: (args[0]*heads[i].repeat_interleave(head_dim),))
        yield (layer.intermediate.dense.register_forward_hook(
                   lambda mod, args, z: (z-mod.bias)*rows[i]+mod.bias) if site == 'before' else
               layer.output.dense.register_forward_pre_hook(lambda mod, args: (args[0]*rows[i],)))
    handles = [h for i, layer in enumerate(model.base_model.encoder.layer) for h in hook(i, layer)]
    try: yield heads, rows
    finally:
        for h in handles: h.remove()

def logits(model, batch): return model(**{k: v for k, v in batch.items() if k != 'labels'}).logits

def task_loss(model, batch):
    "Each row's cross-entropy, or squared error for a model of one output."
    out = logits(model, batch)
    if model.config.num_labels == 1: return (out.squeeze(-1)-batch['labels']).square()
    return F.cross_entropy(out, batch['labels'], reduction='none')

def mask_grads(model, batch, loss, site='before'):
    "Gradient of the batch's mean loss with respect to the shared masks."
    with torch.enable_grad(), masked(model, site) as masks:
        return torch.autograd.grad(loss(model, batch).mean(), masks)

def single_rows(batches, strip=True):
    "Every example as a batch of one, its padding stripped."
    for batch in batches:
        for n in range(len(batch['input_ids'])):
            keep = batch['attention_mask'][n].bool() if strip else slice(None)
            yield {k: v[n:n+1] if v.ndim == 1 else v[n:n+1, keep] for k, v in batch.items()}

def double(model): return copy.deepcopy(model).double().eval()

def brute_grads(model, batches, estimator='empirical', loss=task_loss, strip=True, site='before'):
    "Weight `(M,)`, head gradients `(M,L,H)` and row gradients `(M,L,D)`; the weights of each example sum to 1."
    model, found = double(model), []
    for row in single_rows(batches, strip):
        if estimator == 'empirical': found.append((torch.ones(()).double(), *mask_grads(model, row, loss, site)))
        else:
            p = logits(model, row).softmax(-1)[0].detach()
            for c in range(len(p)):
                found.append((p[c], *mask_grads(model, {**row, 'labels': torch.tensor([c])}, loss, site)))
    return [torch.stack(x) for x in zip(*found)]

def brute_mask_fisher(model, batches, estimator='empirical', **kw):
    "Eq. 4, one example at a time: `(heads (L,H), rows (L,D))` in float64."
    weight, *grads = brute_grads(model, batches, estimator, **kw)
    return tuple((weight[:,None,None]*g.square()).sum(0)/weight.sum() for g in grads)

def brute_head_matrices(model, batches, **kw):
    "Eq. 3, the block of each layer's heads: `(L,H,H)`."
    weight, heads, _ = brute_grads(model, batches, **kw)
    return torch.einsum('n,nlh,nlk->lhk', weight, heads, heads)/weight.sum()

def released_mask_fisher(model, batches, loss=task_loss):
    "The released code's Fisher: the gradient of each batch's mean loss, squared and summed over batches."
    model = double(model)
    grads = [mask_grads(model, b, loss, 'after') for b in batches]
    return tuple(sum(g.square() for g in gs) for gs in zip(*grads))


# --- merging --------------------------------------------------------------------------------

def body(model): return model.base_model.state_dict()

def weighted(states, name, weights, lambdas):
    "Parameter `name` averaged row by row; `weights[j]` has one weight per row; all zero means plain average."
    out = torch.empty(states[0][name].shape, dtype=torch.float64)
    for r in range(len(out)):
        w = [lam*F[r].item() for lam, F in zip(lambdas, weights)]
        if sum(w) == 0: w = lambdas
        out[r] = sum(wj*s[name][r].double() for wj, s in zip(w, states))/sum(w)
    return out

def parameters(states):
    return [k for k, v in states[0].items() if v.is_floating_point()]

def eq5(states, fishers, lambdas, num_heads, by_head=('query', 'key'), by_row=('intermediate',)):
    "Eq. 5 in float64, by default with the paper's mapping; `fishers` are `(heads, rows)` pairs; integer buffers from the first state."
    merged = dict(states[0])
    for name in parameters(states):
        size = len(states[0][name])
        found = re.fullmatch(r'encoder\.layer\.(\d+)\.(?:attention\.self\.)?(query|key|value|intermediate)\b.*', name)
        def weight(heads, rows):
            if found and found[2] in by_head: return heads[int(found[1])].double().repeat_interleave(size//num_heads)
            if found and found[2] in by_row: return rows[int(found[1])].double()
            return torch.ones(size).double()
        merged[name] = weighted(states, name, [weight(*f) for f in fishers], lambdas)
    return merged

def released_merge(states, fishers, num_heads):
    "The released code's merge (`use_universal`): every parameter is weighted, nodes that are zero in all models count 1."
    nodes = [torch.stack([f[k].double() for f in fishers]) for k in (0, 1)]
    heads, rows = [torch.where((n == 0).all(0), 1., n) for n in nodes]             # (M,L,H), (M,L,D)
    merged = dict(states[0])
    for name in parameters(states):
        size = len(states[0][name])
        layer = re.match(r'encoder\.layer\.(\d+)\.', name)
        def weight(heads, rows):
            if not layer: return (heads.mean(1)+rows.mean(1)).mean().repeat(size)  # embeddings, pooler
            h, r = heads[int(layer[1])], rows[int(layer[1])]
            if 'query' in name or 'key' in name: return h.repeat_interleave(size//num_heads)
            if 'attention' in name: return h.mean().repeat(size)                   # value, output, LayerNorm
            if 'intermediate' in name: return r
            return r.mean().repeat(size)                                           # output, LayerNorm
        merged[name] = weighted(states, name, list(map(weight, heads, rows)), [1.]*len(states))
    return merged
