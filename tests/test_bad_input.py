"""Each mistake is refused by one clear line that names what was wrong, what was expected, what came; before any long work."""
import re, shutil
from contextlib import contextmanager

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import FNetConfig, FNetForSequenceClassification

from fisher_nodes import MaskFisher, Merged, mask_fisher, merge
from reference import examples, ragged_batches, task_loss, tiny
from test_masks_fisher import QUIET, to_dataset
from test_merge import make_fisher, make_fishers, make_models

@pytest.fixture
def family(): return 'bert'

@contextmanager
def refuses(*words):
    "A `ValueError` (or `TypeError`) whose message is one line and holds every one of `words`."
    with pytest.raises((ValueError, TypeError)) as caught: yield
    text = str(caught.value).strip()
    assert text and '\n' not in text, text
    for w in words: assert re.search(w, text), f'{w!r} is not in: {text}'

class Untouched:
    "Data that must not be read."
    def __iter__(self): raise AssertionError('the data was read before the mistake was found')

def never_run(model):
    def hook(*_): raise AssertionError('the model was run before the mistake was found')
    model.register_forward_pre_hook(hook)
    return model

def untouched(models): return {t: Untouched() for t in models}


# --- models that do not fit together ----------------------------------------------------------

MISMATCHES = {
    'family': (lambda: tiny('roberta', seed=1), ('bert', 'roberta')),
    'depth': (lambda: tiny(layers=3, seed=1), (r'\b2\b', r'\b3\b')),
    'width': (lambda: tiny(hidden=32, seed=1), (r'\b16\b', r'\b32\b')),
    'heads': (lambda: tiny(heads=2, seed=1), (r'\b4\b', r'\b2\b', 'head')),
    'intermediate': (lambda: tiny(intermediate=36, seed=1), (r'\b24\b', r'\b36\b')),
    'vocabulary': (lambda: tiny(vocab=61, seed=1), (r'\b60\b', r'\b61\b')),
    'positions': (lambda: tiny(positions=48, seed=1), (r'\b40\b', r'\b48\b')),
}

@pytest.mark.parametrize('other,words', MISMATCHES.values(), ids=MISMATCHES)
@pytest.mark.parametrize('method', ['average', 'mask-fisher'])
@pytest.mark.parametrize('place', [1, 2])
def test_models_that_do_not_fit(other, words, method, place):
    models = [tiny(), tiny(seed=5)]
    models.insert(place, other())
    models = {t: never_run(m) for t, m in zip(('alpha', 'beta', 'gamma'), models)}
    with refuses(('beta', 'gamma')[place-1], *words):
        merge(models, data=None if method == 'average' else untouched(models), method=method)

def test_an_unsupported_family_says_why_or_how_to_get_its_row():
    model = FNetForSequenceClassification(FNetConfig(hidden_size=16, num_hidden_layers=1, intermediate_size=24, vocab_size=60))
    with refuses('(?i)fnet', 'it has no attention'): mask_fisher(model, ragged_batches())
    model.config.model_type = 'unheard-of'
    with refuses('unheard-of', 'describe'): mask_fisher(model, ragged_batches())
    with refuses('unheard-of', 'describe'): merge({'a': model, 'b': model}, data={'a': Untouched(), 'b': Untouched()})

@pytest.mark.parametrize('model', [nn.Linear(2, 2), None, 3], ids=['module', 'None', 'int'])
def test_not_a_model(model):
    with refuses(type(model).__name__): mask_fisher(model, ragged_batches())
    with refuses('beta', type(model).__name__): merge({'alpha': tiny(), 'beta': model}, method='average')

@pytest.mark.parametrize('models', [{}, [], None], ids=str)
def test_no_models(models):
    with refuses('model'): merge(models, method='average')

@pytest.mark.parametrize('name', ['a/b', '..', '.', '', ' ', 'a\\b', '../up', 'nul\0', 3, None], ids=repr)
@pytest.mark.parametrize('method', ['average', 'mask-fisher'])
def test_bad_task_names(name, method):
    models = {'alpha': never_run(tiny()), name: never_run(tiny(seed=1))}
    with refuses(re.escape(repr(name)) + '|' + re.escape(str(name) or "''")):
        merge(models, data=None if method == 'average' else untouched(models), method=method)


# --- Fishers ----------------------------------------------------------------------------------

def edit(key, **kw):
    "Fishers with one of them made wrong by `kw` or `key`."
    def make(models):
        fishers = make_fishers(models)
        fishers['beta'] = make_fisher(1, **kw) if kw else key(fishers['beta'])
        return fishers
    return make

def put(name, index, value):
    def at(fisher):
        getattr(fisher, name)[index] = value
        return fisher
    return at

def without(mapping, key): return {k: v for k, v in mapping.items() if k != key}

BAD_FISHERS = {
    'missing': (lambda ms: without(make_fishers(ms), 'beta'), ('beta',)),
    'extra': (lambda ms: {**make_fishers(ms), 'zeta': make_fisher()}, ('zeta',)),
    'heads': (edit(None, heads=2), ('beta', 'heads', r'\b4\b', r'\b2\b')),
    'rows': (edit(None, intermediate=25), ('beta', 'rows', r'\b24\b', r'\b25\b')),
    'layers': (edit(None, layers=3), ('beta', 'layers', r'\b2\b', r'\b3\b')),
    'negative': (edit(put('rows', (1, 3), -.25)), ('beta', 'rows', '-0.25')),
    'NaN': (edit(put('heads', (0, 1), float('nan'))), ('beta', 'heads', '(?i)nan')),
    'infinite': (edit(put('rows', (0, 0), float('inf'))), ('beta', 'rows', '(?i)inf')),
    'a tensor': (edit(lambda f: f.heads), ('beta', 'Tensor')),
    'a pair': (edit(lambda f: (f.heads, f.rows)), ('beta', 'tuple')),
    'a list too short': (lambda ms: list(make_fishers(ms).values())[:1], (r'\b1\b', r'\b2\b')),
}

@pytest.mark.parametrize('make,words', BAD_FISHERS.values(), ids=BAD_FISHERS)
@pytest.mark.parametrize('variant', ['paper', 'released'])
def test_bad_fishers(family, make, words, variant):
    models = make_models(family)
    fishers = make(models)
    if isinstance(fishers, list): models = list(models.values())
    with refuses(*words): merge(models, fishers, variant=variant)

@pytest.mark.parametrize('change', ['swapped', 'older'])
def test_fishers_of_another_model(family, change):
    models = make_models(family)
    fishers = {t: mask_fisher(m, ragged_batches(family, num_labels=2), **QUIET) for t, m in models.items()}
    merge(models, fishers)
    if change == 'swapped': fishers = dict(zip(models, reversed(fishers.values())))
    else:
        with torch.no_grad(): models['alpha'].base_model.encoder.layer[0].output.dense.weight.mul_(1.01)
    with refuses('alpha'): merge(models, fishers)

def test_fishers_of_two_variants(family):
    models = make_models(family)
    fishers = {t: mask_fisher(m, ragged_batches(family, num_labels=2), variant=v, **QUIET)
               for (t, m), v in zip(models.items(), ('paper', 'released'))}
    for variant in ('paper', 'released'):
        with refuses('paper', 'released', 'alpha|beta'): merge(models, fishers, variant=variant)

def test_neither_fishers_nor_data(family):
    with refuses('fishers', 'data'): merge(make_models(family))

@pytest.mark.parametrize('make,word', [(lambda d: without(d, 'beta'), 'beta'), (lambda d: {**d, 'zeta': Untouched()}, 'zeta')],
                         ids=['missing', 'extra'])
def test_data_of_other_tasks(family, make, word):
    models = {t: never_run(m) for t, m in make_models(family).items()}
    with refuses(word, 'data'): merge(models, data=make(untouched(models)))

@pytest.mark.parametrize('content', [b'', b'not a safetensors file', None], ids=['empty', 'text', 'other tensors'])
def test_not_a_fisher_file(content, tmp_path):
    from safetensors.torch import save_file
    path = tmp_path/'f.safetensors'
    if content is None: save_file({'weight': torch.ones(2)}, path)
    else: path.write_bytes(content)
    with refuses('f.safetensors'): MaskFisher.load(path)

def test_a_truncated_fisher_file(tmp_path):
    path = tmp_path/'f.safetensors'
    make_fisher().save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with refuses('f.safetensors'): MaskFisher.load(path)


# --- data -------------------------------------------------------------------------------------

def with_label(i, value): return [{**r, 'labels': value if j == i else r['labels']} for j, r in enumerate(examples(10))]

def relabel(value):
    "Batches of 3, 1, 4, 2 whose row 1 of batch 2 (example 5) has label `value`."
    batches = ragged_batches()
    batches[2]['labels'][1] = value
    return batches

@pytest.mark.parametrize('value', [3, 7, -1, -100])
@pytest.mark.parametrize('make', [relabel, lambda v: to_dataset(with_label(5, v)), lambda v: to_dataset(with_label(5, v), 'label')],
                         ids=['batches', 'labels', 'label'])
@pytest.mark.parametrize('variant', ['paper', 'released'])
def test_label_out_of_range(value, make, variant):
    data = make(value)
    with refuses(str(value), r'\b[23]\b', r'\b5\b|batch 2.*\b1\b'): mask_fisher(tiny(), data, variant=variant, **QUIET)

def test_a_dataset_with_a_bad_label_is_refused_before_the_model_runs():
    with refuses('7'): mask_fisher(never_run(tiny()), to_dataset(with_label(9, 7)), **QUIET)

def unlabelled(): return [{k: v for k, v in b.items() if k != 'labels'} for b in ragged_batches()]

NO_LABELS = dict(batches=unlabelled, Dataset=lambda: to_dataset(examples(4)).remove_columns('labels'))

@pytest.mark.parametrize('make', NO_LABELS.values(), ids=NO_LABELS)
@pytest.mark.parametrize('variant', ['paper', 'released'])
def test_labels_absent(make, variant):
    with refuses('label'): mask_fisher(never_run(tiny()), make(), variant=variant, **QUIET)

EMPTY = dict(list=lambda: [], generator=lambda: iter(()), Dataset=lambda: to_dataset(examples(1)).select([]),
             batch=lambda: [{k: v[:0] for k, v in ragged_batches()[0].items()}])

@pytest.mark.parametrize('make', EMPTY.values(), ids=EMPTY)
def test_no_examples(make):
    with refuses('(?i)empty|no example|no batch|at least|0 example'): mask_fisher(tiny(), make(), **QUIET)

@pytest.mark.parametrize('data', [None, 3, 'glue', [3], [torch.ones(2, 3)], [{'labels': torch.ones(2).long()}]], ids=str)
def test_not_data(data):
    with refuses(): mask_fisher(never_run(tiny()), data, **QUIET)

def test_raw_text_needs_a_tokenizer():
    with refuses('tokenizer'): mask_fisher(never_run(tiny()), Dataset.from_dict(dict(sentence=['a b', 'c'], label=[0, 1])), **QUIET)

def test_rows_and_labels_of_different_number():
    (batch,) = ragged_batches(sizes=(3,))
    with refuses(r'\b3\b', r'\b2\b'): mask_fisher(tiny(), [{**batch, 'labels': batch['labels'][:2]}], **QUIET)

@pytest.mark.parametrize('n', [0, -1, 2.5, '3'], ids=repr)
def test_bad_num_samples(family, n):
    with refuses('num_samples', re.escape(str(n))): mask_fisher(never_run(tiny()), Untouched(), num_samples=n, **QUIET)
    models = make_models(family)
    with refuses('num_samples', re.escape(str(n))): merge(models, data=untouched(models), num_samples=n)

def broken_at(value, row):
    "A loss that is `value` for the example of number `row`."
    seen = {}
    def number(ids, mask): return seen.setdefault(tuple(ids[mask.bool()].tolist()), len(seen))
    def loss(model, batch):
        out = task_loss(model, batch)
        bad = torch.tensor([number(*o) == row for o in zip(batch['input_ids'], batch['attention_mask'])])
        return torch.where(bad, out*value, out)
    return loss

@pytest.mark.parametrize('value', [float('nan'), float('inf')], ids=str)
@pytest.mark.parametrize('variant', ['paper', 'released'])
def test_a_loss_that_is_not_finite_names_the_example(value, variant):
    with refuses('(?i)finite|nan|inf', r'\b5\b|batch 2.*\b1\b'):
        mask_fisher(tiny(), ragged_batches(), loss=broken_at(value, 5), variant=variant, **QUIET)

def test_weights_that_are_not_finite(family):
    model = tiny()
    with torch.no_grad(): model.base_model.encoder.layer[0].output.dense.weight[0,0] = float('nan')
    with refuses('(?i)finite|nan'): mask_fisher(model, ragged_batches(), **QUIET)

def test_merging_weights_that_are_not_finite():
    model = tiny()
    with torch.no_grad(): model.base_model.encoder.layer[0].output.dense.weight[0,0] = float('nan')
    with refuses('beta', 'layer.0.output.dense.weight', '(?i)finite|nan'): merge({'alpha': tiny(), 'beta': model}, method='average')

BAD_LOSSES = {
    'scalar': (lambda m, b: task_loss(m, b).mean(), (r'\b3\b|\(B,\)', r'\(\)')),
    'column': (lambda m, b: task_loss(m, b)[:,None], (r'\b3\b|\(B,\)', r'\(3, 1\)')),
    'no tensor': (lambda m, b: 1., ('loss', 'float')),
    'no gradient': (lambda m, b: torch.ones(len(b['labels'])), ('loss',)),
}

@pytest.mark.parametrize('loss,words', BAD_LOSSES.values(), ids=BAD_LOSSES)
@pytest.mark.parametrize('variant', ['paper', 'released'])
def test_bad_losses(loss, words, variant):
    with refuses(*words): mask_fisher(tiny(), ragged_batches(), loss=loss, variant=variant, **QUIET)


# --- options ----------------------------------------------------------------------------------

BAD_WEIGHTS = {
    'negative': (dict(alpha=1, beta=-.5), ('beta', '-0.5')),
    'NaN': (dict(alpha=1, beta=float('nan')), ('beta', 'nan')),
    'infinite': (dict(alpha=1, beta=float('inf')), ('beta', 'inf')),
    'text': (dict(alpha=1, beta='2'), ('beta', "2")),
    'missing': (dict(alpha=1), ('beta',)),
    'extra': (dict(alpha=1, beta=1, zeta=1), ('zeta',)),
    'all zero': (dict(alpha=0, beta=0), ('weight', '0')),
    'list too short': ([1.], (r'\b1\b', r'\b2\b')),
}

@pytest.mark.parametrize('weights,words', BAD_WEIGHTS.values(), ids=BAD_WEIGHTS)
@pytest.mark.parametrize('method', ['average', 'mask-fisher'])
def test_bad_weights(family, weights, words, method):
    models = {t: never_run(m) for t, m in make_models(family).items()}
    with refuses(*words): merge(models, data=None if method == 'average' else untouched(models), method=method, weights=weights)

UNKNOWN = dict(method=('average', 'mask-fisher'), variant=('paper', 'released'), scheme=('paper', 'with-value'))

@pytest.mark.parametrize('option', UNKNOWN)
def test_unknown_options_of_merge(family, option):
    models = {t: never_run(m) for t, m in make_models(family).items()}
    with refuses('nonsense', option, *UNKNOWN[option]): merge(models, data=untouched(models), **{option: 'nonsense'})

@pytest.mark.parametrize('option,known', [('variant', ('paper', 'released')), ('labels', ('empirical', 'exact', 'sampled')),
                                          ('precision', ('fp32|float32', 'bf16|bfloat16')), ('matrices', ('heads',)), ('device', ())])
def test_unknown_options_of_mask_fisher(option, known):
    with refuses('nonsense', option, *known): mask_fisher(never_run(tiny()), Untouched(), **{option: 'nonsense'}, **QUIET)

@pytest.mark.parametrize('call', [lambda: mask_fisher(tiny(), ragged_batches(), num_sample=3),
                                  lambda: merge({'a': tiny()}, method='average', lambdas={})], ids=['mask_fisher', 'merge'])
def test_a_misspelled_argument(call):
    with refuses('num_sample|lambdas'): call()


# --- folders ----------------------------------------------------------------------------------

def listing(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}

@pytest.mark.parametrize('overwrite', [False, True])
def test_a_folder_with_other_files_is_left_alone(family, overwrite, tmp_path):
    "`overwrite` replaces a merge, never someone's documents."
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'thesis.tex').write_text('years of work')
    before = listing(tmp_path)
    merged = merge(make_models(family), method='average')
    if overwrite:
        try: merged.save_pretrained(tmp_path/'out', overwrite=True)
        except ValueError: pass
        assert listing(tmp_path)['out/thesis.tex'] == b'years of work'
    else:
        with refuses('out', 'overwrite'): merged.save_pretrained(tmp_path/'out')
        assert listing(tmp_path) == before

def test_a_file_where_the_folder_should_be(family, tmp_path):
    (tmp_path/'out').write_text('mine')
    with refuses('out'): merge(make_models(family), method='average').save_pretrained(tmp_path/'out')
    assert listing(tmp_path) == {'out': b'mine'}

def test_an_empty_folder_is_fine(family, tmp_path):
    (tmp_path/'out').mkdir()
    merge(make_models(family), method='average').save_pretrained(tmp_path/'out')
    assert list(Merged.from_pretrained(tmp_path/'out')) == ['alpha', 'beta']

@pytest.mark.parametrize('make', [lambda p: None, lambda p: p.mkdir(), lambda p: tiny().save_pretrained(p)], ids=['absent', 'empty', 'a model'])
def test_not_a_merge(make, tmp_path):
    make(tmp_path/'in')
    with refuses('in'): Merged.from_pretrained(tmp_path/'in')

def test_a_task_whose_folder_is_gone(family, tmp_path):
    merge(make_models(family), method='average').save_pretrained(tmp_path/'out')
    shutil.rmtree(tmp_path/'out'/'beta')
    with refuses('beta'): Merged.from_pretrained(tmp_path/'out')

def test_nodes_come_by_layer():
    for odd in (torch.ones(8), torch.ones(()), 'ab', [1., 2.], torch.ones(2, 4, 1)):
        with pytest.raises(TypeError, match='`heads` must be a tensor of shape .layers, nodes.'): MaskFisher(odd, torch.ones(2, 24))
