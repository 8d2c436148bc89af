"""The Fisher of every parameter and the Gram matrices, for every family of the zoo.

The slow references know nothing of the package but which part of a model is its body: autograd for one example
after the other, and a hook of torch that keeps what a layer is given. Examples come alone there, without padding."""
from dataclasses import replace

import pytest
from conftest import THIRD
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import zoo
from fisher_nodes import linear_grams, merge, parameter_fisher
from fisher_nodes.core.families import FAMILIES, body_of
from fisher_nodes.methods.full_fisher import can_batch
from fisher_nodes.methods.regmean import InputGrams

CASES = list(zoo.ZOO)
QUIET = dict(progress=False)
RTOL = {'gemma3_text': 1e-5} # its norms of queries and keys compute in float32
SIZES = (7, 2) # as many rows as the longest row has tokens, so that one cannot pass for the other

def sample(name):
    "Examples, and the same in padded batches."
    rows = zoo.examples(name, sum(SIZES))
    return rows, [zoo.collate(rows[:SIZES[0]]), zoo.collate(rows[SIZES[0]:])]

def fed(name, batch):
    "With labels where the model reads them; here they are the words of its decoder."
    if zoo.case(name)[3] != 'AutoModelForSeq2SeqLM': return batch
    return batch | dict(labels=batch['decoder_input_ids'].masked_fill(batch['decoder_attention_mask'] == 0, -100))

def grams_of(name, model, batches): return linear_grams(model, [fed(name, b) for b in batches], **QUIET)

def parameters(model): return {n: p for n, p in body_of(model).named_parameters() if p.is_floating_point()}

def squares(model, rows):
    "The mean over examples of the squared gradient of every parameter."
    body = parameters(model)
    sums, before = {n: torch.zeros_like(p) for n, p in body.items()}, [p.requires_grad for p in body.values()]
    for p in body.values(): p.requires_grad_() # some positions are fixed
    for i in range(len(rows)):
        loss = zoo.losses(model, zoo.alone(rows, i)).sum()
        for n, g in zip(body, torch.autograd.grad(loss, list(body.values()), allow_unused=True)):
            if g is not None: sums[n] += g.square()
    for p, asks in zip(body.values(), before): p.requires_grad_(asks)
    return {n: v/len(rows) for n, v in sums.items()}

def same_squares(got, want, rtol=1e-8):
    "Equal but for the rounding of gradients, which is as large as the largest of them is at its last digits."
    assert list(got) == list(want)
    largest = max(w.max() for w in want.values() if w.numel()).sqrt()
    for n, w in want.items():
        assert got[n].shape == w.shape and got[n].dtype == w.dtype
        far = (got[n].sqrt()-w.sqrt()).abs() > rtol/2*w.sqrt() + 1e-14*largest
        assert not far.any(), f'{n}: {got[n][far][:3].tolist()} for {w[far][:3].tolist()}'

@pytest.mark.parametrize('name', THIRD(CASES))
def test_full_fisher_is_autograd_one_example_after_the_other(name):
    model = zoo.build(name)
    rows, data = sample(name)
    want = squares(model, rows)
    assert sum(w.any().item() for w in want.values()) > len(want)/2
    fisher = parameter_fisher(model, data, loss=zoo.losses, **QUIET)
    same_squares(fisher.values, want, RTOL.get(name, 1e-8))
    assert fisher.num_examples == len(rows)
    if can_batch(model):
        alone = parameter_fisher(model, data, loss=zoo.losses, one_at_a_time=True, **QUIET)
        same_squares(alone.values, want, RTOL.get(name, 1e-8))

def test_what_is_measured_in_batches():
    "The families of most downloads are; whatever ties or bares a parameter is not."
    fast = {n for n in zoo.ZOO if can_batch(zoo.build(n))}
    assert fast >= {'bert-classifier', 'roberta', 'distilbert', 'albert-groups', 'modernbert', 'llama-writer', 'qwen3', 'gemma2', 'phi3',
                    'gpt2', 'gpt_neox', 'bloom', 'falcon-heads', 'esm'}
    assert not fast & {'bert-choices', 'bert-masked-lm', 'llama-tied', 'deberta-v2', 'longformer', 'mpnet', 't5', 'vit', 'clip', 'wav2vec2',
                       'mixtral', 'opt'}

@pytest.mark.parametrize('name', ['mpnet', 'deberta-v2', 'deberta-v3', 'longformer', 'opt', 'whisper', 'swin'])
def test_a_batch_of_what_lies_otherwise_is_wrong_or_refused(name, monkeypatch):
    "Were these rows of the table to promise what others do."
    model = zoo.build(name)
    rows, data = sample(name)
    monkeypatch.setitem(FAMILIES, model.config.model_type, replace(FAMILIES[model.config.model_type], batched=True))
    assert can_batch(model)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        same_squares(parameter_fisher(model, data, loss=zoo.losses, **QUIET).values, squares(model, rows))

def test_a_weight_that_is_used_without_its_module_is_named():
    model = zoo.build('bloom')
    for m in model.modules():
        if hasattr(m, 'pretraining_tp'): m.pretraining_tp, m.slow_but_exact = 2, True
    rows, data = sample('bloom')
    with pytest.raises(ValueError, match="'h.0.self_attention.dense' is used without being called; give `one_at_a_time=True`"):
        parameter_fisher(model, data, loss=zoo.losses, **QUIET)
    assert not any(p.grad_fn or p.grad is not None for p in model.parameters())
    same_squares(parameter_fisher(model, data, loss=zoo.losses, one_at_a_time=True, **QUIET).values, squares(model, rows))

def test_a_module_that_is_left_out_has_no_fisher():
    model = zoo.build('bert')
    def first_layer(model, batch):
        hidden = model.embeddings(batch['input_ids'])
        return zoo.spread(model.encoder.layer[0](hidden), 2, batch['attention_mask'])
    found = parameter_fisher(model, [zoo.alone(zoo.examples('bert'), i) for i in range(2)], loss=first_layer, **QUIET).values
    assert {n for n, v in found.items() if not v.any()} == {n for n in found if 'layer.1' in n or 'pooler' in n}


# --- Gram matrices ----------------------------------------------------------------------------

def multiplies(m): return isinstance(m, (nn.Linear, Conv1D)) and type(m).__name__ != 'NonDynamicallyQuantizableLinear'

def linears(model):
    "Weight -> the layers that have it, of all that only multiply: no table of words, no output of torch's own attention."
    owners = {n: [] for n in parameters(model)}
    names = {id(p): n for n, p in parameters(model).items()}
    for m in model.modules():
        for p in m.parameters(recurse=False):
            if id(p) in names: owners[names[id(p)]].append(m)
    return {n: ms for n, ms in owners.items() if n.endswith('weight') and all(map(multiplies, ms))}

def seen(model, batch):
    "What every linear layer is given: weight -> rows."
    found = {}
    def keep(name): return lambda m, args: found.setdefault(name, []).append(args[0].detach().flatten(0, -2))
    handles = [m.register_forward_pre_hook(keep(n)) for n, ms in linears(model).items() for m in ms]
    try:
        with torch.no_grad(): zoo.losses(model, batch)
    finally:
        for h in handles: h.remove()
    return found

def real(name, x, batch):
    "Without the tokens up to a multiple of four that Longformer adds by itself."
    if name != 'longformer': return x
    n = batch['input_ids'].shape[1]
    return x[:n] if len(x) == -(-n//4)*4 else x

def products(name, model, rows):
    "The mean over examples of the outer products of all inputs, one input after the other."
    sums = {n: torch.zeros(ms[0].weight.shape[0 if isinstance(ms[0], Conv1D) else 1], dtype=torch.float64).diag()
            for n, ms in linears(model).items()}
    for i in range(len(rows)):
        batch = zoo.alone(rows, i)
        for n, xs in seen(model, batch).items():
            for x in torch.cat([real(name, x, batch) for x in xs]): sums[n] += torch.outer(x, x)
    return {n: v/len(rows) for n, v in sums.items()}

def same_products(got, want, rtol=1e-8):
    "Equal up to rounding, seen from the size of both inputs."
    assert list(got) == list(want)
    for n, w in want.items():
        d = w.diagonal().sqrt()
        far = (got[n]-w).abs() > rtol*torch.outer(d, d)
        assert not far.any(), f'{n}: {got[n][far][:3].tolist()} for {w[far][:3].tolist()}'

@pytest.mark.parametrize('name', THIRD(CASES, 1))
def test_grams_are_products_of_inputs_one_example_after_the_other(name):
    model = zoo.build(name)
    rows, data = sample(name)
    want = products(name, model, rows)
    grams = grams_of(name, model, data)
    same_products(grams.values, want)
    assert grams.num_examples == len(rows) and any(w.any() for w in want.values())
    fisher = squares(model, rows[:1])
    for n, w in want.items(): assert w.any() or not fisher[n].any(), n # without inputs, without influence

@pytest.mark.parametrize('name', ['deberta-v2', 'longformer', 'opt', 't5', 'whisper'])
def test_a_batch_of_other_things_than_tokens_is_wrong_or_refused(name, monkeypatch):
    model = zoo.build(name)
    rows, data = sample(name)
    monkeypatch.setitem(FAMILIES, model.config.model_type, replace(FAMILIES[model.config.model_type], batched=True))
    with pytest.raises((AssertionError, ValueError)):
        same_products(grams_of(name, model, data).values, products(name, model, rows))

def test_padding_counted_as_tokens_is_another_matrix():
    model = zoo.build('t5')
    rows, data = sample('t5')
    unmasked = [{k: torch.ones_like(v) if k.endswith('mask') else v for k, v in b.items()} for b in data]
    with pytest.raises(AssertionError):
        same_products(linear_grams(model, unmasked, **QUIET).values, products('t5', model, rows))

def refused(match, name, batch):
    with pytest.raises(ValueError, match=match) as caught: linear_grams(zoo.build(name), [batch], **QUIET)
    assert '\n' not in str(caught.value)

def test_padding_before_the_end_is_refused_by_row():
    batch = zoo.collate(zoo.examples('opt'))
    refused('row 1 has padding before its end; in this family it must come last', 'opt', {k: v.flip(1) for k, v in batch.items()})

def test_a_padded_decoder_needs_a_mask():
    batch = zoo.collate(zoo.examples('t5'))
    del batch['decoder_attention_mask']
    refused('row 0 has padding in `decoder_input_ids`, and there is no `decoder_attention_mask`', 't5', batch)

def test_labels_say_where_a_decoder_ends():
    "Twice as long for a model that makes its decoder's words from labels."
    model = zoo.build('t5-writer')
    model.config.decoder_start_token_id = 0
    rows = [dict(input_ids=r['input_ids'], labels=r['decoder_input_ids']) for r in zoo.examples('t5-writer')]
    batch, want = zoo.collate(rows), {}
    batch['labels'] = torch.nn.utils.rnn.pad_sequence([r['labels'] for r in rows], True, -100)
    for r in rows:
        one = linear_grams(model, [zoo.collate([r])], **QUIET)
        for n, v in one.values.items(): want[n] = want.get(n, 0) + v/len(rows)
    same_products(linear_grams(model, [batch], **QUIET).values, want)

@pytest.mark.parametrize('name', ['bert', 'mpnet'])
def test_texts_of_pairs_are_looked_at_one_by_one(name):
    "As many tokens in both, and padding elsewhere."
    model, rows = zoo.build(name), zoo.examples(name)
    first, second = zoo.collate(rows), zoo.collate(rows[1:]+rows[:1])
    want = products(name, model, rows)
    both = first | {f'{k}_2': v for k, v in second.items()}
    same_products(linear_grams(model, [both], **QUIET).values, {n: 2*w for n, w in want.items()})

def test_pixels_are_not_cut_by_a_mask_of_as_many_tokens_as_colours():
    model, rows = zoo.build('clip'), zoo.examples('clip')
    batch = zoo.collate([r | dict(input_ids=r['input_ids'][-4:]) for r in rows])
    batch['input_ids'], batch['attention_mask'] = batch['input_ids'][:,-3:], torch.tensor([[1, 1, 0]]*3)
    batch['input_ids'][:,1] = 2
    short = {k: v[:,:2] if v.ndim == 2 else v for k, v in batch.items()}
    same_products(linear_grams(model, [batch], **QUIET).values, linear_grams(model, [short], **QUIET).values)

def test_nothing_found_is_refused():
    batch, model = zoo.collate(zoo.examples('bert')), zoo.build('bert')
    with pytest.raises(ValueError, match='no linear layer of the body was called'): InputGrams(model).fields(3, torch.float64)
    with pytest.raises(ValueError, match='the losses do not depend on the body'):
        parameter_fisher(model, [batch], loss=lambda m, b: torch.zeros(3), **QUIET)

def test_inputs_that_are_no_numbers_are_named():
    model = zoo.build('vit')
    batch = zoo.collate(zoo.examples('vit'))
    batch['pixel_values'][1,0,0,0] = torch.nan
    with pytest.raises(ValueError, match=r'the inputs of \S*layer\S*\.q(uery|_proj)\.weight are not finite'):
        linear_grams(model, [batch], **QUIET)


# --- merged -----------------------------------------------------------------------------------

@pytest.mark.parametrize('name', THIRD(CASES, 2))
def test_merged_with_itself_is_itself(name):
    model = zoo.build(name)
    data = [zoo.collate(zoo.examples(name))]
    fisher = parameter_fisher(model, data, loss=zoo.losses, **QUIET)
    for found, method in ((grams_of(name, model, data), 'regmean'), (fisher, 'fisher')):
        merged = merge(dict(a=model, b=model), dict(a=found, b=found), method=method, weights=[1., 3.], **QUIET)
        for n, p in parameters(merged.body).items():
            want = parameters(model)[n]
            assert ((p-want).abs() <= 1e-10*want.abs().max()).all() if p.numel() else True, (method, n)

def least_squares(tensors, grams, turned):
    "Solved at once, with all that is off the diagonal."
    W = [t if turned else t.T for t in tensors]
    out = torch.linalg.solve(sum(grams), sum(g@w for g, w in zip(grams, W)))
    return out if turned else out.T

@pytest.mark.parametrize('name', ['gpt2', 'falcon', 'bart', 'deberta-v2', 'swin', 'wav2vec2', 'qwen3_moe-some', 'llama-tied', 'siglip'])
def test_regmean_solves_for_every_linear_layer_and_averages_the_rest(name):
    models = {t: zoo.build(name, seed) for seed, t in enumerate('ab')}
    data = [zoo.collate(zoo.examples(name, 40))]
    grams = {t: grams_of(name, m, data) for t, m in models.items()}
    merged = merge(models, grams, method='regmean', off_diagonal=.9, **QUIET)
    fitted, bodies = 0, [parameters(m) for m in models.values()]
    layers = linears(models['a'])
    for n, p in parameters(merged.body).items():
        both, mean = [b[n].detach() for b in bodies], (bodies[0][n]+bodies[1][n]).detach()/2
        if n not in layers:
            torch.testing.assert_close(p.detach(), mean, rtol=1e-12, atol=1e-15)
            continue
        turned = isinstance(layers[n][0], Conv1D)
        G = [.9*g.values[n] + .1*g.values[n].diagonal().diag() for g in grams.values()]
        if sum(G).diagonal().min() == 0: continue # an input that is never used
        torch.testing.assert_close(p.detach(), least_squares(both, G, turned), rtol=1e-6, atol=1e-9)
        fitted += ((p-mean).norm() > .01*mean.norm()).item()
    assert fitted > len(layers)/2
    assert merged.report['averaged'].get('averaged_experts') == (2 if 'moe' in name else None)

@pytest.mark.parametrize('name', [o for o in CASES if zoo.ZOO[o][1].get('experts_implementation')])
def test_experts_in_float64_are_not_grouped(name):
    model, batches = zoo.build(name), sample(name)[1]
    def loss(model, inputs): return zoo.losses(model, inputs)
    def found(how):
        model.set_experts_implementation(how)
        got = parameter_fisher(model, batches, loss=loss, **QUIET), linear_grams(model, batches, **QUIET)
        assert model.config._experts_implementation == how
        return got
    try: grouped = found('grouped_mm')
    except ImportError as e: pytest.skip(f'there is no grouped product here: {e}')
    for x, y in zip(grouped, found('eager')): # the former is what transformers chooses
        assert x.values.keys() == y.values.keys()
        for n in y.values: torch.testing.assert_close(x.values[n], y.values[n], rtol=0, atol=0)
