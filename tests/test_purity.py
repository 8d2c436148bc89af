"""Nothing of the caller's is changed: models, batches, random state, global settings; also after an exception."""
import copy, random
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader

from fisher_nodes import MaskFisher, Merged, mask_fisher, merge, parameter_fisher, predict
from fisher_nodes.engine.measure import linear_grams
from reference import FAMILIES, brute_mask_fisher, collate, examples, ragged_batches, task_loss, tiny
from test_masks_fisher import QUIET, same, to_dataset
from test_merge import make_fishers, make_models

def frozen(x):
    "A comparable copy of nested tensors, dicts and lists."
    if isinstance(x, torch.Tensor): return str(x.dtype), str(x.device), x.requires_grad, tuple(x.shape), x.detach().clone().tolist()
    if isinstance(x, dict): return {k: frozen(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)): return [frozen(v) for v in x]
    return copy.deepcopy(x)

def state_of(model):
    "All that a caller could notice on `model`."
    return dict(
        parameters={k: (id(p), p.data_ptr(), frozen(p), frozen(p.grad)) for k, p in model.named_parameters()},
        buffers={k: (b.data_ptr(), frozen(b)) for k, b in model.named_buffers()},
        modules={k: (id(m), m.training, sorted(vars(m))) for k, m in model.named_modules()},
        hooks={k: {h: [id(f) for f in v.values()] for h, v in vars(m).items() if 'hook' in h and isinstance(v, dict)}
               for k, m in model.named_modules()},
        config=model.config.to_dict(), attention=model.config._attn_implementation)

def state_of_the_world():
    return dict(
        torch=torch.get_rng_state().tolist(), numpy=[np.asarray(x).tolist() for x in np.random.get_state()],
        python=random.getstate(), dtype=torch.get_default_dtype(), grad=torch.is_grad_enabled(),
        inference=torch.is_inference_mode_enabled(), threads=torch.get_num_threads(), autocast=torch.is_autocast_enabled('cpu'),
        matmul=torch.get_float32_matmul_precision(), deterministic=torch.are_deterministic_algorithms_enabled(),
        global_hooks=len(torch.nn.modules.module._global_forward_hooks)+len(torch.nn.modules.module._global_forward_pre_hooks))

@contextmanager
def unchanged(*models, data=()):
    before = state_of_the_world(), [state_of(m) for m in models], frozen(data)
    try: yield
    finally:
        after = state_of_the_world(), [state_of(m) for m in models], frozen(data)
        for b, a in zip((before[0], *before[1]), (after[0], *after[1])):
            for k in b: assert a[k] == b[k], f'{k} changed'
        assert after[2] == before[2], 'data changed'

def well_used(model):
    "Partly training, partly frozen, with gradients and a hook of the caller's: each as odd as a caller may leave it."
    model.train()
    model.base_model.encoder.layer[0].eval()
    model.base_model.embeddings.requires_grad_(False)
    model.classifier.requires_grad_(False)
    for p in model.base_model.encoder.layer[1].parameters(): p.grad = torch.full_like(p, .5)
    model.base_model.encoder.layer[0].intermediate.dense.register_forward_hook(lambda mod, args, out: None)
    model.base_model.encoder.layer[1].attention.output.dense.register_forward_pre_hook(lambda mod, args: None)
    return model

MODES = dict(plain=nullcontext, no_grad=torch.no_grad, inference_mode=torch.inference_mode)

@pytest.fixture(params=MODES)
def mode(request): return MODES[request.param]

FISHERS = dict(paper={}, released=dict(variant='released'), exact=dict(labels='exact'), sampled=dict(labels='sampled'),
               own_loss=dict(loss=task_loss), matrices=dict(matrices='heads'), some=dict(num_samples=4))

@pytest.mark.parametrize('kw', FISHERS.values(), ids=FISHERS)
def test_mask_fisher_leaves_no_trace(family, mode, kw):
    model = well_used(tiny(family))
    with mode():
        batches = ragged_batches(family)
        with unchanged(model, data=batches): fisher = mask_fisher(model, batches, **kw, **QUIET)
    again = mask_fisher(tiny(family), ragged_batches(family), **kw, **QUIET)
    same(again, (fisher.heads, fisher.rows), rtol=1e-12)
    assert not fisher.heads.is_inference() and not fisher.rows.is_inference()

@pytest.mark.parametrize('num_samples', [None, 5])
def test_dataset_leaves_no_trace(family, mode, num_samples):
    model, data = well_used(tiny(family)), to_dataset(examples(10))
    columns, fmt = data[:], copy.deepcopy(data.format)
    with mode(), unchanged(model): mask_fisher(model, data, num_samples=num_samples, **QUIET)
    assert data[:] == columns and data.format == fmt

def test_a_shuffling_loader_draws_nothing_from_the_global_state(family):
    "Without care its seed and its order come out of torch's global generator."
    model, rows = well_used(tiny(family)), examples(10)
    loader = DataLoader(rows, batch_size=3, shuffle=True, collate_fn=lambda r: collate(r, FAMILIES[family][2]))
    with unchanged(model): fisher = mask_fisher(model, loader, **QUIET)
    same(fisher, brute_mask_fisher(model, ragged_batches(family)))

def test_a_loss_that_draws_changes_no_global_state(family):
    def noisy(model, batch): return task_loss(model, batch)+0*torch.rand(len(batch['labels']))
    model = tiny(family)
    with unchanged(model): mask_fisher(model, ragged_batches(family), loss=noisy, **QUIET)

def breaking_loss(model, batch):
    if len(batch['labels']) == 1: raise RuntimeError('boom')
    return task_loss(model, batch)

def breaking_data(batches):
    yield batches[0]
    raise RuntimeError('boom')

def interrupted(model, batch): raise KeyboardInterrupt('boom')

BREAKS = {
    'loss': lambda model, batches: mask_fisher(model, batches, loss=breaking_loss, **QUIET),
    'data': lambda model, batches: mask_fisher(model, breaking_data(batches), **QUIET),
    'interrupt': lambda model, batches: mask_fisher(model, batches, loss=interrupted, **QUIET),
    'released': lambda model, batches: mask_fisher(model, breaking_data(batches), variant='released', **QUIET),
    'merge': lambda model, batches: merge({'a': model, 'b': model}, data={'a': batches, 'b': breaking_data(batches)}),
}

@pytest.mark.parametrize('call', BREAKS.values(), ids=BREAKS)
def test_after_an_exception_too(family, mode, call):
    model = well_used(tiny(family))
    with mode():
        batches = ragged_batches(family)
        with unchanged(model, data=batches), pytest.raises((RuntimeError, KeyboardInterrupt), match='boom'): call(model, batches)
    same(mask_fisher(model, ragged_batches(family), **QUIET), brute_mask_fisher(tiny(family), ragged_batches(family)))

def test_a_bad_label_halfway_leaves_no_trace(family):
    model, batches = well_used(tiny(family)), ragged_batches(family)
    batches[2]['labels'][1] = 7
    with unchanged(model, data=batches), pytest.raises(ValueError): mask_fisher(model, batches, **QUIET)

MERGES = {
    'fishers': lambda models, family: merge(models, make_fishers(models)),
    'average': lambda models, family: merge(models, method='average'),
    'released': lambda models, family: merge(models, make_fishers(models), variant='released'),
    'data': lambda models, family: merge(models, data={t: ragged_batches(family, num_labels=2, seed=3) for t in models}),
    'dataset': lambda models, family: merge(models, data={t: to_dataset(examples(9, 2)) for t in models}, num_samples=4),
}

@pytest.mark.parametrize('call', MERGES.values(), ids=MERGES)
def test_merge_leaves_no_trace(family, mode, call):
    models = {t: well_used(m) for t, m in make_models(family).items()}
    with mode(), unchanged(*models.values()): merged = call(models, family)
    for m in merged.values():
        for name, p in m.named_parameters(): assert not p.is_inference() and p.grad is None, name
        assert all(not hooks for hooks in state_of(m)['hooks'].values() if any(hooks.values())), 'the hooks of an input came along'

def test_merge_leaves_the_fishers_alone(family):
    models = make_models(family)
    fishers = make_fishers(models)
    for f in fishers.values(): f.rows[0], f.meta['mine'] = 0, [1]
    before = {t: frozen(vars(f)) for t, f in fishers.items()}
    for variant in ('paper', 'released'): merge(models, fishers, variant=variant)
    assert {t: frozen(vars(f)) for t, f in fishers.items()} == before

def test_using_and_saving_a_merge_leaves_no_trace(family, mode, tmp_path):
    merged = merge(make_models(family), method='average')
    for m in (merged.body, *merged.values()): m.save_pretrained(tmp_path/'first')  # transformers notes the class in the config
    batch = {k: v for k, v in ragged_batches(family)[0].items() if k != 'labels'}
    with mode(), unchanged(*merged.values(), data=batch):
        merged.logits(**batch)
        merged.save_pretrained(tmp_path/'out')
        Merged.from_pretrained(tmp_path/'out')

def test_importing_changes_nothing():
    "In a fresh interpreter, whose state is its own."
    import subprocess, sys
    code = '''
import torch, random, numpy as np, os, warnings
def world(): return (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), torch.get_default_dtype(),
                     torch.is_grad_enabled(), torch.get_float32_matmul_precision(), torch.get_num_threads(), dict(os.environ))
import transformers
before = world()
import fisher_nodes
assert world() == before
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

def compiled(model):
    for layer in model.base_model.encoder.layer: layer.compile(backend='eager')
    return model

@pytest.mark.parametrize('measure', [mask_fisher, partial(mask_fisher, variant='released'), parameter_fisher, linear_grams],
                         ids=['masks', 'released', 'parameters', 'grams'])
def test_compiled_layers_are_measured_like_any(measure):
    "Compiled code keeps the hooks that it saw first, or none; so the same model is measured twice, and after it has run."
    batches, plain, fast = ragged_batches(), tiny(), compiled(tiny())
    numbers = lambda found: torch.cat([o.flatten() for o in ((*found.heads, *found.rows) if isinstance(found, MaskFisher) else found.values.values())])
    want = numbers(measure(plain, batches, progress=False))
    fast(**batches[0])
    for _ in range(2): assert_close(numbers(measure(fast, batches, progress=False)), want, rtol=1e-12, atol=0)
    with torch.no_grad(): assert_close(fast(**batches[0]).logits, plain(**batches[0]).logits, rtol=1e-12, atol=0)
    assert all(layer._compiled_call_impl is not None for layer in fast.base_model.encoder.layer)

def test_a_compiled_forward_is_refused_and_compiled_models_predict_compiled():
    calls, model = [], tiny()
    model.bert.encoder.layer[1].forward = torch.compile(model.bert.encoder.layer[1].forward, backend='eager')
    with pytest.raises(ValueError, match="`forward` of 'bert.encoder.layer.1' was replaced"): mask_fisher(model, ragged_batches())
    def backend(graph, inputs): calls.append(graph); return graph
    model = tiny(); model.compile(backend=backend)
    predict(model, ragged_batches(), progress=False)
    assert calls

def test_threads_measure_compiled_and_other_models_at_once():
    "Nothing that is compiled stays switched off, or on, for somebody else."
    batches, models = ragged_batches(sizes=(3, 1, 4, 2)*3), [tiny(), compiled(tiny())]
    want = torch.cat([o.flatten() for o in parameter_fisher(tiny(), batches, progress=False).values.values()])
    with ThreadPoolExecutor(2) as pool: found = list(pool.map(lambda m: parameter_fisher(m, batches, progress=False), models))
    for f in found: assert_close(torch.cat([o.flatten() for o in f.values.values()]), want, rtol=1e-12, atol=0)
