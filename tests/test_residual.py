"""Residual regression, for every family of the zoo, against references that know nothing of walks and sums.

The slow reference runs whole models, one example after the other, with hooks of torch alone, and solves stacked
least squares. Where a stream is read it knows for the layouts that it checks."""
from copy import deepcopy
from threading import Thread

import pytest
import torch
import transformers as T
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import zoo
from conftest import EVERY
from fisher_nodes import Merged, merge, merge_files
from fisher_nodes.core.checkpointing import find_layers
from fisher_nodes.core.families import body_of
from fisher_nodes.core.walk import Walk
from fisher_nodes.engine.files import OutputExistsError
from fisher_nodes.engine.guard import frozen_eval
from fisher_nodes.engine.measure import measure
from fisher_nodes.methods import residual
from fisher_nodes.methods.residual import Lane, fit_body, fitted_maps
from fisher_nodes.methods import agreement as agreeing
from fisher_nodes.methods.agreement import agreement
from fisher_nodes.merging import run
from fisher_nodes.merging.kept import average_is_nearer, keep_rows
from fisher_nodes.methods.calls import Calls
from fisher_nodes.methods.refit import kept_answers
from test_cli import save_model, save_rows

QUIET = dict(progress=False)
ALL = dict(method='residual-regression', **QUIET)
HOW = dict(refit_heads=0, copies=0, **ALL)
SHARED = {'albert', 'albert-groups', 'deberta-v3', 'deberta-v2-conv'} # layers or matrices that are used more than once
PARALLEL = {'cohere', 'cohere-norms', 'gptj', 'gpt_neox', 'falcon', 'falcon-one-key', 'phi', 'phi-norms', 'stablelm-norms'}
SIZES = (7, 2)
SOME = slice(0, None, 1 if EVERY else 3) # of the zoo: all in `make corner`

def sample(name):
    rows = zoo.examples(name, sum(SIZES))
    batches = [zoo.collate(rows[:SIZES[0]]), zoo.collate(rows[SIZES[0]:])]
    if zoo.case(name)[3] != 'AutoModelForSeq2SeqLM': return batches
    return [b | dict(labels=b['decoder_input_ids'].masked_fill(b['decoder_attention_mask'] == 0, -100)) for b in batches]

def scrambled(model, seed=1):
    "A copy whose matrices in layers are noise."
    torch.manual_seed(seed)
    new = deepcopy(model)
    with torch.no_grad():
        for n, m in fitted_maps(new).items():
            if any(n.startswith(f'{o}.') for o in find_layers(new)):
                for p in m.parameters(): p.copy_(torch.randn_like(p))
    return new

def lanes(models, new, rows):
    def walk(m, r): return Walk(body_of(m), find_layers(m), r.calls)
    return [Lane(walk(m, r), walk(new, r), r.masks, 1.) for m, r in zip(models, rows)]

@pytest.mark.parametrize('name', [n for n in zoo.ZOO if n not in SHARED][SOME])
def test_fitted_to_one_model_is_that_model(name):
    "From noise, layer by layer; where heads and neurons write side by side, from what merging begins with."
    model = zoo.build(name)
    rows = measure('calls', model, sample(name), **QUIET)
    new = scrambled(model) if name not in PARALLEL else deepcopy(model)
    own = fitted_maps(model)
    with torch.no_grad(), frozen_eval(model), frozen_eval(new):
        fitted, _ = fit_body(new, lanes([model]*2, new, [rows]*2), 1e-3)
    assert fitted
    inputs = grams_of(model, rows)
    for n in fitted:
        a, b = fitted_maps(new)[n], own[n]
        with torch.no_grad(): got, want = a(inputs[n]), b(inputs[n])
        assert_close(got, want, rtol=1e-5, atol=1e-6*want.abs().max().item(), msg=lambda m: f'{n}: {m}')

@pytest.mark.parametrize('name', list(zoo.ZOO)[SOME])
def test_a_model_agrees_with_itself(name):
    model = zoo.build(name)
    rows = measure('calls', model, sample(name), **QUIET)
    with frozen_eval(model): told, = agreement(model, rows, (body_of(model), None))
    assert told.layers and told.explained in (None, 1.) and told.kl in (None, 0.) and told.same in (None, 1.)
    assert all(o in (None, 1.) for o in told.layers)

def grams_of(model, rows):
    "What every matrix is given, without padding in families that see it side by side."
    found, handles = {}, []
    for n, m in fitted_maps(model).items(): handles.append(m.register_forward_pre_hook(lambda m, a, n=n: found.setdefault(n, []).append(a[0].flatten(0, -2))))
    with torch.no_grad(), frozen_eval(model):
        for o in rows.calls: body_of(model)(**o)
    for h in handles: h.remove()
    return {n: torch.cat(v) for n, v in found.items()}

@pytest.mark.parametrize('name', sorted(SHARED))
def test_what_is_used_more_than_once_is_refused(name):
    model = zoo.build(name)
    with pytest.raises(ValueError, match='is used more than once in a forward pass'): merge(dict(a=model, b=model), data=dict(a=sample(name), b=sample(name)), **HOW)


# --- by hand, and through the front door ----------------------------------------------------

SMALL = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
RIDGE = .1

def tiny(kind, seed, dtype=torch.float64):
    torch.manual_seed(0)
    if kind == 'bert': model = T.BertForSequenceClassification(T.BertConfig(**SMALL))
    elif kind == 'granite': model = T.GraniteForCausalLM(T.GraniteConfig(**SMALL, num_key_value_heads=2, residual_multiplier=.22, pad_token_id=0))
    else: model = T.LlamaForCausalLM(T.LlamaConfig(**SMALL, num_key_value_heads=2, pad_token_id=0))
    for i in (0, seed):
        torch.manual_seed(100+i)
        for p in model.parameters(): p.data += .1*torch.randn_like(p)
    return model.to(dtype).eval()

def texts(seed, n=12):
    "Two tasks of different words."
    g, words = torch.Generator().manual_seed(seed), dict(a=(3, 25), b=(25, 50))
    def row(t, k): return torch.randint(*words[t], (k,), generator=g).tolist()
    return {t: [row(t, k) for k in (7, 4, 6, 3)*(n//4)] for t in words}

def as_data(rows, **more): return {t: Dataset.from_dict(dict(input_ids=o) | {k: v[t] for k, v in more.items()}) for t, o in rows.items()}

def seen(model, name, ids, before):
    "What a module is given, or gives, for one row."
    found, m = [], model.get_submodule(name)
    h = m.register_forward_pre_hook(lambda m, a: found.append(a[0])) if before else m.register_forward_hook(lambda m, a, o: found.append(o[0] if isinstance(o, tuple) else o))
    with torch.no_grad(): model(torch.tensor([ids]))
    h.remove()
    return found[0][0]

# matrix, where its stream is read (a module and whether before it; None asks for the owner's outputs), factor on what is written
READ = {
    'bert': [('bert.encoder.layer.1.attention.self.key', None, 1), ('bert.encoder.layer.1.attention.output.dense', ('bert.encoder.layer.1.attention.output.LayerNorm', True), 1),
             ('bert.encoder.layer.1.intermediate.dense', None, 1), ('bert.encoder.layer.0.output.dense', ('bert.encoder.layer.0.output.LayerNorm', True), 1)],
    'llama': [('model.layers.1.self_attn.v_proj', None, 1), ('model.layers.1.self_attn.o_proj', ('model.layers.1.post_attention_layernorm', True), 1),
              ('model.layers.0.mlp.gate_proj', None, 1), ('model.layers.1.mlp.down_proj', ('model.layers.1', False), 1)],
    'granite': [('model.layers.0.mlp.up_proj', None, 1), ('model.layers.1.self_attn.o_proj', ('model.layers.1.post_attention_layernorm', True), .22),
                ('model.layers.0.mlp.down_proj', ('model.layers.0', False), .22)]}

def slow(models, merged, rows, weights, name, read, factor):
    "One matrix by least squares on everything stacked."
    parts = []
    for t, m in models.items():
        x, y = [], []
        for ids in rows[t]:
            x.append(seen(merged[t], name, ids, True))
            if read is None: y.append(seen(m, name, ids, False))
            else: y.append(seen(merged[t], name, ids, False)+(seen(m, *read[:1], ids, read[1])-seen(merged[t], *read[:1], ids, read[1]))/factor)
        x, y, own = torch.cat(x), torch.cat(y), m.get_submodule(name)
        w = own.weight
        if own.bias is not None: x, w = torch.cat([x, torch.ones(len(x), 1)], 1), torch.cat([w, own.bias[:,None]], 1)
        pull = (RIDGE*x.square().sum(0)).sqrt().diag()
        parts.append([(weights[t]/len(x))**.5*o for o in (torch.cat([x, pull]), torch.cat([y, pull @ w.T]))])
    return torch.linalg.lstsq(*[torch.cat(o) for o in zip(*parts)]).solution.T

@pytest.mark.parametrize('kind', READ)
def test_matrices_are_stacked_least_squares(kind):
    models, rows, weights = {t: tiny(kind, i) for i, t in enumerate('ab', 1)}, texts(1), dict(a=1., b=3.)
    merged = merge(models, data=as_data(rows), weights=weights, ridge=RIDGE, **HOW)
    for name, read, factor in READ[kind]:
        m = merged['a'].get_submodule(name)
        got = m.weight if m.bias is None else torch.cat([m.weight, m.bias[:,None]], 1)
        want = slow(models, merged, rows, weights, name, read, factor)
        assert_close(got.detach(), want.detach(), rtol=1e-5, atol=1e-7*want.abs().max().item(), msg=lambda m: f'{name}: {m}')
        if read: # what its owner gave is another thing to ask for
            wrong = slow(models, merged, rows, weights, name, None, 1)
            assert (wrong-want).norm() > 1e-3*want.norm(), name

def body(merged): return {n: p.detach() for n, p in merged.body.named_parameters()}
def same(a, b, rtol=0.):
    for n, p in body(a).items(): assert_close(body(b)[n], p, rtol=rtol, atol=rtol*p.abs().max().item(), msg=lambda m: f'{n}: {m}')

@pytest.fixture(scope='module')
def two(): return {t: tiny('bert', i) for i, t in enumerate('ab', 1)}

def test_order_and_labels_and_batches_do_not_matter(two):
    rows = texts(1)
    data = as_data(rows, label=dict(a=[0, 1]*6, b=[1, 0]*6))
    first = merge(two, data=data, **HOW)
    same(first, merge(two, data=as_data(rows, label=dict(a=[1, 0]*6, b=[1, 1]*6)), **HOW))
    same(first, merge(two, data=as_data(rows), **HOW))
    same(first, merge({t: two[t] for t in 'ba'}, data={t: data[t] for t in 'ba'}, **HOW), rtol=1e-8)
    own = {t: [dict(input_ids=torch.tensor([o])) for o in v] for t, v in rows.items()}
    same(first, merge(two, data=own, **HOW), rtol=1e-8)

def test_rows_measured_before_give_the_same(two, tmp_path):
    data = as_data(texts(1))
    found = {t: measure('calls', m, data[t], num_samples=8, **QUIET) for t, m in two.items()}
    for t, o in found.items(): o.save(tmp_path/f'{t}.safetensors')
    same(merge(two, data=data, num_samples=8, **HOW), merge(two, found, **HOW))
    same(merge(two, found, **HOW), merge(two, {t: tmp_path/f'{t}.safetensors' for t in two}, **HOW))
    with pytest.raises(ValueError, match='measured on other weights'): merge(two, dict(a=found['b'], b=found['a']), **HOW)

def test_models_stay_as_they_are(two):
    before = {t: {n: p.clone() for n, p in m.state_dict().items()} for t, m in two.items()}
    two['a'].train()
    merge(two, data=as_data(texts(1)), **HOW)
    assert two['a'].training and not any(m._forward_hooks or m._forward_pre_hooks or 'forward' in vars(m) for o in two.values() for m in o.modules())
    two['a'].eval()
    for t, m in two.items():
        assert all(p.requires_grad for p in m.parameters())
        for n, p in m.state_dict().items(): assert_close(p, before[t][n], rtol=0, atol=0)

def test_on_a_device_that_is_named(two):
    data = as_data(texts(1))
    same(merge(two, data=data, **HOW), merge(two, data=data, device='cpu', **HOW))

def test_a_share_of_zero_leaves_a_task_out(two):
    data = as_data(texts(1))
    without = merge(two, data=data, weights=dict(a=2., b=0.), **HOW)
    for n, p in two['a'].bert.named_parameters(): assert_close(without.body.get_parameter(n), p, rtol=1e-7, atol=1e-8)

def test_half_precision_is_fitted_in_float32():
    models = {t: tiny('llama', i, torch.bfloat16) for i, t in enumerate('ab', 1)}
    wide = {t: tiny('llama', i, torch.bfloat16).float() for i, t in enumerate('ab', 1)}
    data = as_data(texts(1))
    a, b = merge(models, data=data, **HOW), merge(wide, data=data, **HOW)
    for n, p in body(a).items():
        assert p.dtype == torch.bfloat16
        assert (p.float()-body(b)[n]).norm() <= .02*body(b)[n].norm(), n

@pytest.mark.parametrize('kind', ['bert', 'llama'])
def test_a_second_sweep_changes_nothing(kind):
    "What a layer is fitted to depends on the layers below it, and not on what stands in it or above."
    models = {t: tiny(kind, i, torch.float64) for i, t in enumerate('ab', 1)}
    rows = {t: measure('calls', models[t], o, **QUIET) for t, o in as_data(texts(1)).items()}
    new = deepcopy(models['a'])
    with torch.no_grad(): fit_body(new, lanes(list(models.values()), new, list(rows.values())), .1)
    first = {n: p.clone() for n, p in body_of(new).named_parameters()}
    with torch.no_grad(): fit_body(new, lanes(list(models.values()), new, list(rows.values())), .1)
    for n, p in body_of(new).named_parameters(): assert_close(p, first[n], rtol=1e-6, atol=1e-9*first[n].norm().item())

@pytest.mark.parametrize('kind', ['bert', 'llama'])
def test_only_the_layer_at_hand_is_in_float32(kind, monkeypatch):
    "The others, and what was fitted, have the type of the models; what is outside of layers is small and stays float32."
    models = {t: tiny(kind, i, torch.bfloat16) for i, t in enumerate('ab', 1)}
    seen, fit = [], residual.fit_stage
    def look(stage, *args):
        walk = stage.lanes[0].new
        inside = {id(p) for o in walk.layers.values() for p in o.parameters()}
        assert all(p.dtype == torch.float32 for p in walk.body.parameters() if id(p) not in inside)
        wide = [n for n, o in walk.layers.items() if any(p.dtype == torch.float32 for p in o.parameters())]
        assert not any(p.dtype == torch.bfloat16 for n in wide for p in walk.layers[n].parameters())
        seen.append(wide)
        return fit(stage, *args)
    monkeypatch.setattr(residual, 'fit_stage', look)
    merged = merge(models, data=as_data(texts(1)), **HOW)
    assert seen == [[o] for o in find_layers(models['a'])] + [[]]*(len(seen)-2) and len(seen) >= 2
    assert all(p.dtype == torch.bfloat16 for p in merged.body.parameters())
    assert all(p.dtype == torch.bfloat16 for m in models.values() for p in m.parameters())

@pytest.mark.parametrize('room', [0, 3000])
def test_little_room_is_the_same_merge(room, two, monkeypatch):
    "What owners gave is asked for again where there is no room to keep it."
    data = as_data(texts(1))
    whole, passes, wanted = merge(two, data=data, **HOW), [], residual._wanted
    monkeypatch.setattr(residual, '_wanted', lambda *args: passes.append(args[2]) or wanted(*args))
    merge(two, data=data, **HOW)
    once = len(passes)
    monkeypatch.setattr(residual, 'ROOM', room)
    same(merge(two, data=data, **HOW), whole)
    assert len(passes)-once > once

def test_a_precision_that_would_have_no_effect(two):
    with pytest.raises(ValueError, match="fits in float32 or better; `precision` 'bf16' would have no effect"):
        merge(two, data=as_data(texts(1)), precision='bf16', **HOW)

def test_goes_on_where_it_was_interrupted(two, tmp_path, monkeypatch):
    "After a stop in the second layer the first is taken from the folder, and the result is the same to the bit."
    data, work, fitted = as_data(texts(1)), tmp_path/'work', []
    whole = merge(two, data=data, **HOW)
    fit = residual.fit_stage
    def stops(stage, *args):
        if fitted: raise KeyboardInterrupt
        fitted.append(stage.path)
        return fit(stage, *args)
    monkeypatch.setattr(residual, 'fit_stage', stops)
    with pytest.raises(KeyboardInterrupt): merge(two, data=data, work=work, **HOW)
    assert [o.name for o in work.iterdir() if o.suffix == '.safetensors'] == ['fit.encoder.layer.0.safetensors']
    later = []
    monkeypatch.setattr(residual, 'fit_stage', lambda stage, *args: later.append(stage.path) or fit(stage, *args))
    same(merge(two, data=data, work=work, **HOW), whole)
    assert (fitted, later) == (['encoder.layer.0'], ['encoder.layer.1', ''])
    same(merge(two, data=data, work=work, **HOW), whole)
    with pytest.raises(ValueError, match='is of another merge: other models, rows, options or versions'): merge(two, data=as_data(texts(2)), work=work, **HOW)
    with pytest.raises(ValueError, match="`work` keeps the layers that a method fits; 'average' fits none"): merge(two, method='average', work=work, **QUIET)

@pytest.mark.parametrize('where', ['x', 'x/in', '.'])
def test_fitted_layers_lie_in_no_sources_folder(tmp_path, where):
    "Nor in one that holds it; where the rows are they may."
    for i, t in enumerate('xy'): save_model(tmp_path/t, seed=i)
    (tmp_path/'rows').mkdir()
    for t in 'xy': save_rows(tmp_path/'rows'/f'{t}.csv', [0, 1]*4)
    how = dict(data={t: str(tmp_path/'rows'/f'{t}.csv') for t in 'xy'}, method='residual-regression', num_samples=4, refit_heads=0., **QUIET)
    models, before = {t: str(tmp_path/t) for t in 'xy'}, sorted(tmp_path.rglob('*'))
    with pytest.raises(OutputExistsError, match="is, holds or lies in the model of 'x'"): merge(models, work=tmp_path/where, **how)
    assert sorted(tmp_path.rglob('*')) == before
    merge(models, work=tmp_path/'rows', **how)
    assert [*(tmp_path/'rows').glob('fit.*.safetensors')]

@pytest.mark.parametrize('wrong, said', [
    (dict(ridge=0), '`ridge` is 0; expected a finite number above 0'), (dict(ridge=-1.), '`ridge` is -1.0; expected a finite number above 0'),
    (dict(labels='exact'), "reads no labels, so they cannot be 'exact'"), (dict(data=None), 'needs either `fishers` or `data`'),
    (dict(scheme='paper'), r"takes no \['scheme'\]")])
def test_wrong_input(two, wrong, said):
    with pytest.raises(ValueError, match=said): merge(two, **(dict(data=as_data(texts(1))) | HOW | wrong))

def test_from_files_to_files_is_refused(two, tmp_path):
    for t, m in two.items():
        m.save_pretrained(tmp_path/t)
        measure('calls', m, as_data(texts(1))[t], **QUIET).save(tmp_path/f'{t}.rows')
    with pytest.raises(ValueError, match='runs the models, so they must be in memory'):
        merge_files({t: tmp_path/t for t in two}, {t: tmp_path/f'{t}.rows' for t in two}, out=tmp_path/'out', **ALL)
    assert not (tmp_path/'out').exists()

def test_tasks_that_use_different_layers_are_refused():
    torch.manual_seed(0)
    model = T.CLIPModel(T.CLIPConfig(text_config=dict(vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=20),
        vision_config=dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4), projection_dim=8)).eval()
    def rows(**o): return Calls({f'0.{k}': v for k, v in o.items()}, 1)
    both = rows(input_ids=torch.tensor([[5, 6, 49407 % 60]]), pixel_values=torch.rand(1, 3, 8, 8))
    assert merge(dict(a=model, b=model), dict(a=both, b=both), **HOW)


# --- heads ------------------------------------------------------------------------------------

def answer(model, ids):
    with torch.no_grad(): return model(torch.tensor([ids])).logits[0]

def slow_head(F, E):
    "By the normal equations."
    f, e = F-F.mean(0), E-E.mean(0)
    move = torch.linalg.solve(f.T @ f+.1*f.square().sum()/len(f)*torch.eye(16, dtype=f.dtype), f.T @ e).T
    return move, E.mean(0)-move @ F.mean(0)

def test_heads_are_fitted_on_all_rows_and_compared_on_others_than_the_body(two):
    "The body is that of the other rows alone; heads by the normal equations; what is said of a row, by heads fitted without it."
    rows = {t: sorted(v, key=len, reverse=True) for t, v in texts(1, 64).items()}
    data = {t: [dict(input_ids=torch.tensor([o])) for o in v] for t, v in rows.items()} # every fourth is kept
    merged = merge(two, data=data, **HOW | dict(refit_heads=.25))
    first = {t: [o for i, o in enumerate(v) if i % 4 != 3] for t, v in data.items()}
    alone = merge(two, data=first, **HOW)
    same(alone, merged)
    told = merged.report['agreement']
    for t, m in two.items():
        with torch.no_grad(): F = torch.cat([alone.body(torch.tensor([o])).pooler_output for o in rows[t]])
        Y, W, b = torch.stack([answer(m, o) for o in rows[t]]), m.classifier.weight.detach(), m.classifier.bias.detach()
        E, kept = Y-F @ W.T-b, torch.arange(len(F)) % 4 == 3
        fold = torch.where(kept, (kept.cumsum(0)-1) % 4, -1)
        assert told[t]['moved'] and told[t]['rows'] == kept.sum()
        (move, shift), got = slow_head(F, E), merged[t].classifier
        assert_close(got.weight.detach(), W+move, rtol=1e-7, atol=1e-9)
        assert_close(got.bias.detach(), b+shift, rtol=1e-7, atol=1e-9)
        said = torch.stack([f @ (W+w).T+b+v for f, k in zip(F[kept], fold[kept].tolist()) for w, v in [slow_head(F[fold!=k], E[fold!=k])]])
        Y = Y[kept]
        p, q = Y.log_softmax(-1), said.log_softmax(-1)
        assert_close(torch.tensor(told[t]['merged']['kl']), (p.exp()*(p-q)).sum(1).mean(), rtol=1e-6, atol=1e-12, check_dtype=False)
        assert told[t]['merged']['same'] == (p.argmax(1) == q.argmax(1)).double().mean().item()
        assert_close(told[t]['merged']['explained'], (1-(said-Y).square().sum()/(Y-Y.mean(0)).square().sum()).item(), rtol=1e-6, atol=0)
    assert 'agreement' not in alone.report

def test_heads_are_saved_and_loaded_and_written_down(two, tmp_path):
    for t, m in two.items(): m.save_pretrained(tmp_path/t)
    folders = {t: tmp_path/t for t in two}
    merged = merge(folders, data=as_data(texts(1)), **ALL)
    assert not torch.equal(merged['a'].classifier.weight, two['a'].classifier.weight)
    merged.save_pretrained(tmp_path/'out')
    again = Merged.from_pretrained(tmp_path/'out')
    for t in two:
        for n, p in merged[t].state_dict().items(): assert_close(again[t].state_dict()[n], p, rtol=0, atol=0)
    plain = T.AutoModelForSequenceClassification.from_pretrained(tmp_path/'out'/'b')
    assert_close(plain.classifier.weight, merged['b'].classifier.weight.to(plain.dtype), rtol=0, atol=0)
    assert merged.recipe['options'] == dict(ridge=.1, copies=3) and 'refit_heads' not in merged.recipe
    assert again.report['agreement'] == merged.report['agreement']

def test_a_model_merged_with_itself_keeps_its_head(two):
    merged = merge(dict(a=two['a'], b=two['a']), data={t: as_data(texts(1))['a'] for t in 'ab'}, **ALL)
    for n, p in two['a'].state_dict().items(): assert_close(merged['b'].state_dict()[n], p, rtol=1e-6, atol=1e-8)

@pytest.mark.parametrize('cls', ['BertForTokenClassification', 'BertForQuestionAnswering', 'BertForMultipleChoice', 'BertForMaskedLM', 'BertModel', 'RobertaForSequenceClassification', 'LlamaForSequenceClassification', 'LlamaForTokenClassification',
                                 'DistilBertForSequenceClassification', 'GPT2ForSequenceClassification'])
def test_heads_of_every_kind(cls):
    "Fitted where each text, or each token, is answered; left alone elsewhere."
    made = getattr(T, cls)
    sizes = dict(distilbert=dict(vocab_size=50, dim=16, n_layers=2, n_heads=4, hidden_dim=24), gpt2=dict(vocab_size=50, n_embd=16, n_layer=2, n_head=4, pad_token_id=0))
    kind = made.config_class.model_type
    def build(seed):
        torch.manual_seed(seed)
        return made(made.config_class(**sizes.get(kind, SMALL | (dict(pad_token_id=0) if kind == 'llama' else {})))).double().eval()
    models, rows = dict(a=build(1), b=build(2)), texts(1, 64)
    if cls == 'BertForMultipleChoice': data = {t: [dict(input_ids=torch.tensor(v)[None]) for v in (([5, 6, 7], [8, 9, 10]), ([11, 12, 13], [14, 15, 16]))*4] for t in rows}
    else: data = as_data(rows)
    merged = merge(models, data=data, **ALL)
    told = merged.report['agreement']
    assert all((o['merged']['kl'] is None) == (cls in ('BertModel', 'BertForMultipleChoice')) for o in told.values())
    if cls in ('BertForMultipleChoice', 'BertForMaskedLM', 'BertModel'):
        assert not any(o['moved'] for o in told.values())
        return
    own = {n: p for n, p in models['a'].named_parameters() if not torch.equal(p, merged['a'].get_parameter(n))}
    heads = {n for n in own if 'bert.' not in n and 'transformer.' not in n and not n.startswith('model.') and 'roberta.' not in n}
    assert heads and all(('classifier' in n or 'score' in n or 'qa_outputs' in n) and n.count('dense') == 0 for n in heads)

def test_too_few_rows_for_heads(two):
    data = as_data({t: v[:1] for t, v in texts(1).items()})
    with pytest.raises(ValueError, match="'a' has one row, so that none can be kept apart; give more, or leave heads alone: 0 for `refit_heads`"): merge(two, data=data, **ALL)
    with pytest.raises(ValueError, match='`refit_heads` is 2; expected a finite number of at most 1'): merge(two, data=data, **ALL | dict(refit_heads=2))
    with pytest.raises(ValueError, match='`refit_heads` is 1, which leaves no rows to fit the body to'): merge(two, data=data, **ALL | dict(refit_heads=1))

def test_a_head_without_a_bias_is_not_centred():
    "What it then lacks is least squares as it is; a centred fit without its bias can be worse than none."
    def build(seed):
        torch.manual_seed(0)
        model = T.GPT2ForSequenceClassification(T.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4, pad_token_id=0, num_labels=3))
        torch.manual_seed(seed)
        for p in model.parameters(): p.data += .05*torch.randn_like(p)
        return model.double().eval()
    models, rows = dict(a=build(1), b=build(2)), texts(1, 40)
    merged = merge(models, data={t: [dict(input_ids=torch.tensor([o])) for o in v] for t, v in rows.items()}, method='average', refit_heads=1., **QUIET)
    for t, m in models.items():
        with torch.no_grad(): F = torch.stack([merged.body(torch.tensor([o])).last_hidden_state[0, -1] for o in rows[t]])
        W = m.score.weight.detach()
        E = torch.stack([answer(m, o) for o in rows[t]])-F @ W.T
        pull = (.1*F.square().sum()/len(F))*torch.eye(16).double()
        move = torch.linalg.solve(F.T @ F+pull, F.T @ E).T
        assert_close(merged[t].score.weight.detach(), W+move, rtol=1e-7, atol=1e-9)
        assert (E-F @ move.T).square().sum() < E.square().sum()

def test_the_token_that_answers_in_half_precision():
    "Earlier tokens may say the same; the last of the row is meant, on whichever side the padding is."
    out, mask = torch.tensor([[[1.], [2.], [2.], [5.]], [[2.], [3.], [2.], [2.]]]), torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]).bool()
    found = kept_answers(out, torch.tensor([[2.], [2.]]), mask)
    assert found.nonzero().tolist() == [[0, 2], [1, 3]]

def test_of_several_labels_each_has_its_own_mean():
    "Their differences explain nothing, and as many labels as tokens are no tokens."
    def build(seed):
        torch.manual_seed(seed)
        model = T.BertForSequenceClassification(T.BertConfig(**SMALL, num_labels=7, problem_type='multi_label_classification')).double().eval()
        model.classifier.bias.data = torch.linspace(-6, 6, 7).double()
        return model
    a, b = build(1), build(2)
    ids = torch.tensor(texts(1, 12)['a'][0])[None].repeat(6, 1)+torch.arange(6)[:,None]
    mask = torch.arange(7)[None] < torch.tensor([7, 6, 5, 7, 4, 7])[:,None]
    rows = Calls({'0.input_ids': ids*mask, '0.attention_mask': mask.long(), '0.*': mask}, 6)
    told, = agreement(a, rows, (b.bert, None))
    own = deepcopy(a)
    own.bert = b.bert
    with torch.no_grad(): x, y = (m(input_ids=ids*mask, attention_mask=mask.long()).logits for m in (a, own))
    assert_close(told.explained, (1-(y-x).square().sum()/(x-x.mean(0)).square().sum()).item(), rtol=1e-9, atol=0)
    p, q = x.sigmoid(), y.sigmoid()
    assert_close(told.kl, (p*(p/q).log()+(1-p)*((1-p)/(1-q)).log()).mean().item(), rtol=1e-6, atol=0)
    assert told.same == ((x > 0) == (y > 0)).double().mean().item()

def test_a_head_whose_last_layer_does_not_answer_stays(two):
    class AuxForSequenceClassification(T.BertForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            self.aux = torch.nn.Linear(16, 2)
        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            out = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            self.aux(out.logits.new_zeros(1, 16))
            return out
    models = {}
    for t, m in two.items():
        models[t] = AuxForSequenceClassification(m.config).double().eval()
        models[t].load_state_dict(m.state_dict(), strict=False)
    data = as_data(texts(1, 64))
    merged, plain = (merge(o, data=data, method='average', refit_heads=.5, **QUIET) for o in (models, two))
    for n in ('weight', 'bias'):
        assert_close(merged['a'].classifier.get_parameter(n), plain['a'].classifier.get_parameter(n), rtol=0, atol=0)
        assert_close(merged['a'].aux.get_parameter(n), models['a'].aux.get_parameter(n), rtol=0, atol=0)

def test_one_row_moves_no_head(two):
    how = dict(method='average', refit_heads=1., **QUIET)
    def moved(n): return merge(two, data=as_data({t: v[:n] for t, v in texts(1).items()}), **how)
    told = (merged := moved(1)).report['agreement']['a']
    assert told['rows'] == 1 and not told['moved'] and torch.equal(merged['a'].classifier.weight, two['a'].classifier.weight)
    assert moved(2).report['agreement']['a']['moved']
    kept = merge(two, data=as_data({t: v[:4] for t, v in texts(1).items()}), **how | dict(refit_heads=.25)).report['agreement']['a']
    assert kept['rows'] == 1 and kept['moved'] # by the three others

def test_numbers_of_rows_are_told(two):
    merged = merge(two, data=as_data(texts(1, 32)), **ALL)
    assert merged.report['tasks']['a']['fisher']['num_examples'] == 28 and merged.report['agreement']['a']['rows'] == 4

def test_rows_from_generators(two):
    rows = texts(1)
    def make(t): return (dict(input_ids=torch.tensor([o])) for o in rows[t])
    a = merge(two, data={t: make(t) for t in two}, method='regmean', refit_heads=1., **QUIET)
    b = merge(two, data={t: list(make(t)) for t in two}, method='regmean', refit_heads=1., **QUIET)
    same(a, b)
    assert_close(a['b'].classifier.weight, b['b'].classifier.weight, rtol=0, atol=0)

def test_layers_of_another_model_or_damaged_ones_are_refused(two, tmp_path):
    data, work = as_data(texts(1)), tmp_path/'work'
    merge(two, data=data, work=work, **HOW)
    relu = {t: T.BertForSequenceClassification(T.BertConfig(**SMALL, hidden_act='relu')).double().eval() for t in two}
    for t, m in relu.items(): m.load_state_dict(two[t].state_dict())
    with pytest.raises(ValueError, match='is of another merge'): merge(relu, data=data, work=work, **HOW)
    path = next(work.glob('*layer.0*'))
    found = load_file(path)
    with safe_open(path, 'pt') as f: about = f.metadata()
    for wrong in (found | {'unused': found['unused']+1}, {k: v for k, v in found.items() if 'query.weight' not in k}):
        save_file(wrong, path, about)
        with pytest.raises(ValueError, match='is damaged, or was changed; remove it'): merge(two, data=data, work=work, **HOW)
    (tmp_path/'file').touch()
    with pytest.raises(NotADirectoryError, match='is a file; expected a folder'): merge(two, data=data, work=tmp_path/'file', **HOW)

def test_two_threads_that_share_models(two):
    "Whichever task comes first in either, both end."
    data = as_data(texts(1))
    def go(tasks):
        for _ in range(6): merge({t: two[t] for t in tasks}, data={t: data[t] for t in tasks}, **HOW)
    threads = [Thread(target=go, args=(o,), daemon=True) for o in ('ab', 'ba')]
    for o in threads: o.start()
    for o in threads: o.join(60)
    assert not any(o.is_alive() for o in threads)

def test_answers_in_pieces_are_the_same(monkeypatch):
    "As for a vocabulary that is large."
    a, b = tiny('llama', 1), tiny('llama', 2)
    rows = measure('calls', a, as_data(texts(1))['a'], **QUIET)
    whole, = agreement(a, rows, (b, None))
    monkeypatch.setattr(agreeing, 'PIECE', 100)
    parts, = agreement(a, rows, (b, None))
    assert whole.same == parts.same and 0 < whole.same < 1
    for k in ('kl', 'explained'): assert_close(getattr(parts, k), getattr(whole, k), rtol=1e-12, atol=0)

def test_best_gives_way_where_the_average_is_nearer(monkeypatch):
    "On the same texts for all tasks, what is fitted may be farther from the own models than the average; `best` looks, and says so."
    models = {t: tiny('bert', i) for i, t in enumerate('ab', 1)}
    data = as_data(texts(1, 40))
    best = dict(data=data, method='best', **QUIET)
    assert merge(models, **best).report['chosen']['method'] == 'residual-regression'
    monkeypatch.setattr(run, 'average_is_nearer', lambda agreed: True)
    with pytest.warns(UserWarning, match="method 'best' averages: on rows that were kept apart"): found = merge(models, **best)
    plain = merge(models, method='average', **QUIET)
    same(found, plain)
    told = found.report['agreement']['a']
    assert found.report['chosen']['method'] == 'average' and found.report['method'] == 'best' and told['rows'] == 6
    assert not torch.equal(found['a'].classifier.weight, models['a'].classifier.weight)

def test_copies_go_by_the_row(two):
    "Not by its batch, its place or its padding; labels and the order of models are nothing to them."
    rows = texts(1, 12)
    how = HOW | dict(copies=3)
    first = merge(two, data=as_data(rows), **how)
    same(first, merge(two, data=as_data(rows, label=dict(a=[1, 0]*6, b=[1, 1]*6)), **how))
    same(first, merge({t: two[t] for t in 'ba'}, data={t: as_data(rows)[t] for t in 'ba'}, **how), rtol=1e-8)
    alone = {t: [dict(input_ids=torch.tensor([o])) for o in v[::-1]] for t, v in rows.items()}
    same(first, merge(two, data=alone, **how), rtol=1e-7)
    assert not torch.equal(first.body.encoder.layer[0].output.dense.weight, merge(two, data=as_data(rows), **HOW).body.encoder.layer[0].output.dense.weight)

@pytest.mark.parametrize('n', [2, 6, 49, 98, 103])
def test_one_row_at_least_is_kept(n):
    rows = {'a': Calls({'0.input_ids': torch.arange(1, 1+2*n).view(n, 2)}, n)}
    rest, kept = keep_rows(rows, 1e-3, True)
    assert (rest['a'].num_examples, kept['a'].num_examples) == (n-1, 1)

def test_which_is_nearer():
    def task(merged, average, rows=12): return dict(merged=merged, average=average, rows=rows)
    def said(same, explained=.5, layers=(.1,)): return dict(same=same, explained=explained, layers=list(layers))
    assert average_is_nearer(dict(a=task(said(.8), said(.9)))) and not average_is_nearer(dict(a=task(said(.9), said(.8))))
    assert not average_is_nearer(dict(a=task(said(1.), said(1.))))
    assert average_is_nearer(dict(a=task(said(None, .3), said(None, .4)))) and not average_is_nearer(dict(a=task(said(None, None, (.9, .5)), said(None, None, (.9, .4)))))
    assert not average_is_nearer(dict(a=task(said(.8), said(.9), 11))), 'too few to tell'
    assert not average_is_nearer({}) and not average_is_nearer(dict(a=task(said(None, None, (None,)), said(None, None, (None,)))))
    both = dict(a=task(said(.7), said(.9)), b=task(said(.9), said(.8)))
    assert average_is_nearer(both) and not average_is_nearer(both | dict(c=task(said(.95), said(.5))))
