"""What a mutation once changed without any test noticing: each line here fails on the mutant it is named after."""
import hashlib
import importlib
import json
import random
import warnings
from collections import Counter
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from fisher_nodes import METHODS, MaskFisher, ModelReference, ParameterFisher, Rule, linear_grams, mask_fisher, merge, merge_files, parameter_fisher
from fisher_nodes.core import blocks, kernel
from fisher_nodes.core.averaging import Shares, _check_nodes, check_fisher, node_shares, plain_shares, weighted_mean
from fisher_nodes.core.blocks import Block, Blocks, cut, kth_smallest, row_shares
from fisher_nodes.core.families import FAMILIES
from fisher_nodes.core.places import Place, Site, Slice, count_nodes, find_places, split_roles
from fisher_nodes.core.fisher import ESTIMATORS, VARIANTS, draw_labels, list_variants, outer_each, square_each
from fisher_nodes.core.heads import choice_loss, head_of, is_regression, squared_error
from fisher_nodes.core.nodes import mask_sites, node_gradients
from fisher_nodes.core.schemes import SCHEMES, WHOLE, check_roles, get_scheme, weight_of
from fisher_nodes.engine.classes import are_bare, match_classes, model_labels, word_classes
from fisher_nodes.engine.devices import PRECISIONS, check_placed, find_device, running_device, to_device
from fisher_nodes.engine.files import OutputExistsError
from fisher_nodes.engine.fingerprints import hash_tensors, hash_weights
from fisher_nodes.engine.guard import frozen_eval, keep_rng
from fisher_nodes.engine.text import check_text, known_text, max_positions, pick_text, repeats, same_tokens, text_columns, text_limit, tokenize
from fisher_nodes.merging import merged as saving, run, skeletons, store
from fisher_nodes.merging.card import agreed_modules, check_scores, eval_results, kept_files, model_card, read_card, read_modules, read_report
from fisher_nodes.engine.hub import hub_name
from fisher_nodes.merging.merged import Merged, _auto_class, _load_tokenizers, _size_in_bytes, _widen, check_shard_size, plan_files
from fisher_nodes.merging.recipe import check_named, load_recipe, public_recipe, read_recipe, recipe_text, unnamed
from fisher_nodes.merging.record import _base_entry, _measuring, _name, _on_hub, describe_base, merge_recipe
from fisher_nodes.merging.request import MergeRequest, ask
from fisher_nodes.merging.run import CheckedBlocks, _check_present, _workers, check_alike, check_measured_on, load_base
from fisher_nodes.methods.dare import drop_elements, seeded
from fisher_nodes.methods.full_fisher import SquaredAlone, SquaredGradients, element_mean, fisher_norm
from fisher_nodes.methods.mask_fisher import MaskSquares
from fisher_nodes.methods import method
from fisher_nodes.methods.method import (
    STATISTICS, Job, MergeMethod, check_numbers, check_shapes, load_methods, mean_of_sums, merge_method, plain_value, statistic, widen)
from fisher_nodes.methods.regmean import InputGrams, gram, regression_mean, token_positions
from fisher_nodes.methods.released import fill_zeros, square_mean
from reference import brute_grads, ragged_batches, tiny
from fisher_nodes.methods.task_vectors import add_task_vectors
from fisher_nodes.methods.ties import trim_threshold
from safetensors.torch import load_file, save_file
from test_nodes import MODELS, ROWS
from torch.testing import assert_close
from transformers import BertForTokenClassification, AutoConfig, AutoModelForSequenceClassification, BertTokenizerFast, PretrainedConfig

QUIET = dict(progress=False)
WORDS = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', 'the', 'The', 'rains', 'cat']

def tokenizer(folder, words=WORDS, lower=True):
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'vocab.txt').write_text('\n'.join(words))
    return BertTokenizerFast(str(folder/'vocab.txt'), do_lower_case=lower)


# --- Equation 3 with weights of labels ----------------------------------------------------------

def products(weight, grads):
    "The sum over classes of p g gᵀ, divided by the number of examples, of every layer."
    return torch.einsum('n,nlh,nlk->lhk', weight, grads, grads)/weight.sum()

@pytest.mark.parametrize('labels', ['exact', 'empirical'])
def test_matrices_weight_every_class_by_its_probability(family, labels):
    model, batches = tiny(family), ragged_batches(family)
    found = mask_fisher(model, batches, labels=labels, matrices='all', **QUIET)
    weight, *grads = brute_grads(model, batches, labels)
    for got, g in zip((found.head_matrices, found.row_matrices), grads):
        want = products(weight, g)
        assert_close(got, want, rtol=1e-8, atol=1e-13*want.abs().max().item())
    assert_close(found.head_matrices.diagonal(dim1=1, dim2=2), found.heads, rtol=1e-12, atol=0)
    assert_close(found.row_matrices.diagonal(dim1=1, dim2=2), found.rows, rtol=1e-12, atol=0)

def test_matrices_are_measured_of_the_kinds_asked_for(family):
    kinds = {o: set(mask_fisher(tiny(family), ragged_batches(family), matrices=o, **QUIET).matrices) for o in (None, 'heads', 'all')}
    assert kinds == {None: set(), 'heads': {'head'}, 'all': {'head', 'row'}}

@pytest.mark.parametrize('kw', [dict(labels='exact'), dict(labels='sampled'), dict(matrices='heads'), dict(matrices='all')], ids=str)
@pytest.mark.parametrize('variant', ['released', 'batch-mean'])
def test_the_released_variant_knows_diagonals_and_true_labels_only(variant, kw):
    with pytest.raises(ValueError, match='knows true labels and diagonals only'): mask_fisher(tiny(), ragged_batches(), variant=variant, **kw)

@pytest.mark.parametrize('variant', ['paper', 'after-gelu', 'replacement'])
def test_the_other_variants_know_both(variant):
    found = mask_fisher(tiny(), ragged_batches(), variant=variant, labels='exact', matrices='heads', **QUIET)
    assert_close(found.head_matrices.diagonal(dim1=1, dim2=2), found.heads, rtol=1e-12, atol=0)


# --- precision ----------------------------------------------------------------------------------

@pytest.mark.skipif(torch.cuda.is_available(), reason='is about machines without CUDA')
def test_tf32_needs_cuda():
    with pytest.raises(ValueError, match="'tf32' needs a CUDA device, not cpu"): mask_fisher(tiny(dtype=torch.float32), ragged_batches(), precision='tf32')

@pytest.mark.parametrize('precision', ['fp32', 'tf32', 'bf16'])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_precision_needs_float32_weights(precision, dtype):
    with pytest.raises(ValueError, match=f'precision {precision!r} needs float32 weights; the model has {dtype}'):
        mask_fisher(tiny(dtype=dtype), ragged_batches(), precision=precision)

def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="`precision` is 'fp16'; expected None or one of"): mask_fisher(tiny(), ragged_batches(), precision='fp16')

def test_the_global_precision_comes_back_from_an_error():
    def loss(model, batch):
        seen.append(torch.get_float32_matmul_precision())
        raise KeyError('stop')
    seen, before = [], torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision('medium')
        with pytest.raises(KeyError): mask_fisher(tiny(dtype=torch.float32), ragged_batches(), loss=loss, precision='fp32', **QUIET)
        assert seen == ['highest'] and torch.get_float32_matmul_precision() == 'medium'
    finally: torch.set_float32_matmul_precision(before)


# --- tokenizers ---------------------------------------------------------------------------------

VOCABULARIES = {'a word more': [*WORDS, 'dog'], 'two words swapped': [*WORDS[:-2], 'cat', 'rains'], 'another word': [*WORDS[:-1], 'dog']}

@pytest.mark.parametrize('words', VOCABULARIES.values(), ids=list(VOCABULARIES))
def test_models_whose_tokenizers_number_words_differently_are_refused(tmp_path, words):
    for i, (t, w) in enumerate(dict(a=WORDS, b=words).items()):
        tiny(seed=i).save_pretrained(tmp_path/t)
        tokenizer(tmp_path/t, w).save_pretrained(tmp_path/t)
    folders = {t: tmp_path/t for t in 'ab'}
    with pytest.raises(ValueError, match='the tokenizers of .*a and .*b differ'): merge(folders, method='average', **QUIET)
    with pytest.raises(ValueError, match='the tokenizers of .*a and .*b differ'): merge_files(folders, method='average', out=tmp_path/'out', **QUIET)
    assert not (tmp_path/'out').exists()

def test_tokenizers_are_compared_by_words_and_by_what_they_do(tmp_path):
    one, low = tokenizer(tmp_path/'one'), tokenizer(tmp_path/'low')
    assert same_tokens(one, one) and same_tokens(one, low)
    assert not same_tokens(one, tokenizer(tmp_path/'case', lower=False))
    assert not same_tokens(one, tokenizer(tmp_path/'more', [*WORDS, 'never-in-a-probe']))
    narrow = tokenizer(tmp_path/'narrow', [*WORDS[:5], 'acg', 'ttg'])
    assert not same_tokens(narrow, tokenizer(tmp_path/'cased', [*WORDS[:5], 'acg', 'ttg'], lower=False))


# --- what comes back ----------------------------------------------------------------------------

def draws(): return random.random(), np.random.rand(), torch.rand(()).item()

@pytest.mark.parametrize('error', [False, True])
def test_all_three_random_states_come_back(error):
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    want = draws()
    random.setstate(states[0]); np.random.set_state(states[1]); torch.set_rng_state(states[2])
    try:
        with keep_rng():
            draws()
            if error: raise KeyError('stop')
    except KeyError: pass
    assert draws() == want

@pytest.mark.parametrize('initialized', [False, True])
def test_random_states_of_gpus_come_back_where_there_are_any(monkeypatch, initialized):
    state, given = object(), []
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: initialized)
    monkeypatch.setattr(torch.cuda, 'get_rng_state_all', lambda: state)
    monkeypatch.setattr(torch.cuda, 'set_rng_state_all', given.append)
    with keep_rng(): assert given == []
    assert given == [state]*initialized

def moves(monkeypatch, model, fail=False):
    "Where a model is moved to; stands in for a second device."
    seen = []
    def to(device):
        seen.append(str(device))
        if fail and len(seen) == 1: raise RuntimeError('out of memory')
        return model
    monkeypatch.setattr(model, 'to', to, raising=False)
    return seen

@pytest.mark.parametrize('error', [False, True])
def test_a_moved_model_returns(monkeypatch, error):
    model = torch.nn.Linear(2, 2)
    seen = moves(monkeypatch, model)
    try:
        with frozen_eval(model, 'elsewhere'):
            assert seen == ['elsewhere']
            if error: raise KeyError('stop')
    except KeyError: pass
    assert seen == ['elsewhere', 'cpu']

def test_a_model_that_did_not_fit_returns(monkeypatch):
    model = torch.nn.Linear(2, 2)
    seen = moves(monkeypatch, model, fail=True)
    with pytest.raises(RuntimeError, match='out of memory'):
        with frozen_eval(model, 'elsewhere'): pass
    assert seen == ['elsewhere', 'cpu'] and model.training and model.weight.requires_grad

def test_a_model_stays_where_no_device_is_asked_for(monkeypatch):
    model = torch.nn.Linear(2, 2)
    seen = moves(monkeypatch, model)
    with frozen_eval(model): assert not model.training and not model.weight.requires_grad
    assert seen == [] and model.training and model.weight.requires_grad


# --- formulas of core, each against a loop --------------------------------------------------------

def slow_shares(fishers, weights):
    "Shares of every node by the definition, a node at a time."
    columns = []
    for F in fishers.double().T.tolist():
        products = [w*f for w, f in zip(weights.tolist(), F)]
        products = products if sum(products) else weights.tolist()
        columns.append([p/sum(products) for p in products])
    return torch.tensor(columns, dtype=torch.float64).T

def test_shares_are_products_over_their_sum():
    F = torch.tensor([[1., 3., 0., 2.], [5., 0., 0., 4.], [2., 0., 0., 8.]])
    for weights in ([1., 1., 1.], [.5, 2., 3.], [0., 1., 4.]):
        got, empty = node_shares(F, torch.tensor(weights, dtype=torch.float64))
        assert_close(got, slow_shares(F, torch.tensor(weights, dtype=torch.float64)), rtol=1e-12, atol=0)
        assert empty == 1+(weights[0] == 0) and got.dtype == torch.float64 # node 1 has only the first model's Fisher
    assert_close(plain_shares(torch.tensor([1., 3.]).double()), torch.tensor([[.25], [.75]]).double(), rtol=1e-12, atol=0)

@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('axis', [0, 1, 2])
def test_shares_lie_along_any_axis(axis, dtype):
    gen = torch.Generator().manual_seed(0)
    tensors = [torch.randn(3, 4, 5, generator=gen).to(dtype) for _ in range(2)]
    shares = torch.rand(2, (3, 4, 5)[axis], generator=gen).double()
    got = weighted_mean(tensors, shares, axis=axis)
    wide = torch.promote_types(dtype, torch.float32)
    want = sum(t.to(wide).movedim(axis, -1)*w.to(wide) for t, w in zip(tensors, shares)).movedim(-1, axis)
    assert got.dtype == dtype
    assert_close(got, want.to(dtype), rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=f'2 shares for {(3, 4, 5)[axis]} rows'): weighted_mean(tensors, shares[:,:2], axis=axis)

@pytest.mark.parametrize('shape, models, rows', [((5000, 768), 1, 682), ((5000, 768), 8, 682), ((5000, 768), 16, 340), ((7, 1<<20), 1, 1),
                                                 ((9, 3), 2, 9), ((9, 10**7), 2, 4), ((2048,), 64, 2048)], ids=str)
def test_a_parameter_is_cut_into_rows(shape, models, rows):
    found = cut('w', shape, models)
    assert [o.rows for o in found] == [slice(i, min(i+rows, shape[0])) for i in range(0, shape[0], rows)]
    assert all(o == 'w' for o in found)

@pytest.mark.parametrize('shape', [(), (0, 3), (3, 0)], ids=str)
def test_what_has_no_rows_is_not_cut(shape): assert [(o, o.rows) for o in cut('w', shape)] == [('w', ...)]

def test_blocks_are_a_mapping_of_rows():
    state = Blocks(dict(w=torch.arange(12.).view(6, 2), b=torch.arange(6.)))
    assert list(state) == ['w', 'b'] and len(state) == 2 and 'w' in state and Block('w', slice(1)) in state and 'x' not in state
    assert torch.equal(state[Block('w', slice(2, 4))], torch.arange(4., 8.).view(2, 2)) and torch.equal(state['b'], torch.arange(6.))
    shares = torch.rand(2, 6)
    assert torch.equal(row_shares(shares, Block('w', slice(2, 4))), shares[:,2:4])
    assert row_shares(shares, 'w') is shares and row_shares(shares, Block('w', slice(2, 4)), axis=1) is shares
    assert row_shares(one := shares[:,:1], Block('w', slice(2, 4))) is one

@pytest.mark.parametrize('few', [1, 3, 1<<20])
def test_the_kth_smallest_is_that_of_sorting(few):
    gen = torch.Generator().manual_seed(0)
    numbers = torch.cat([torch.rand(40, generator=gen, dtype=torch.float64).pow(9), torch.zeros(3).double(), torch.full((5,), .5).double(),
                         torch.tensor([1e-300, 1e300, .5000000001, 1., 2.], dtype=torch.float64)])
    parts = numbers[torch.randperm(len(numbers), generator=gen)].split(7)
    for k in (0, 2, 3, 20, 40, 44, 48, len(numbers)-1): assert kth_smallest(lambda: parts, k, few) == numbers.sort().values[k].item()


# --- words and tables -----------------------------------------------------------------------------

def test_schemes_say_what_weights_a_role():
    table = get_scheme(dict(up='row', down='row', output='head', key='head_mean'))
    assert table == dict(ffn_in='row', ffn_out='row', attention_output='head', key='head_mean')
    assert get_scheme(None, 'released') is SCHEMES['released'] and get_scheme('average') == {}
    cases = [(Slice('ffn_in', 'row'), 'row'), (Slice('gate', 'row'), 'row'), (Slice('key', 'group'), 'head_mean'), (Slice('query', 'head'), 'one'),
             (Slice('attention_output'), 'one'), (Slice('attention_output', 'head'), 'head'), (Slice('ffn_out'), 'one')]
    for part, want in cases: assert weight_of(table, part) == want
    assert weight_of(dict(gate='one', ffn_in='row'), Slice('gate', 'row')) == 'one'
    assert weight_of(dict(key='head'), Slice('key', 'group')) == 'head'

@pytest.mark.parametrize('call, error, say', [
    (lambda: get_scheme('nonsense'), ValueError, "`scheme` is 'nonsense'; expected one of"),
    (lambda: get_scheme(3), TypeError, 'must be a name or a table from role to kind, got 3'),
    (lambda: get_scheme(dict(query='heads')), ValueError, "kind 'heads' of role 'query' is unknown"),
    (lambda: get_scheme(dict(query=['head'])), ValueError, 'of role .query. is unknown'),
    (lambda: check_roles(dict(query='head', ffn='row')), ValueError, "role 'ffn' of the scheme is unknown"),
    (lambda: weight_of(dict(query='row'), Slice('query', 'head')), ValueError, "'query' of the scheme is weighted by row, but has nodes of kind 'head'"),
    (lambda: weight_of(dict(pooler='head'), Slice('pooler')), ValueError, "weighted by head, but has nodes of kind None"),
    (lambda: split_roles(dict(a=2), 'rows'), ValueError, "`order` is 'rows'; expected 'blocks' or 'groups'"),
    (lambda: node_gradients(torch.ones(1, 2, 4), torch.ones(1, 2, 5), 2), ValueError, r'`x` is \(1, 2, 4\) but `grad` is \(1, 2, 5\)'),
    (lambda: node_gradients(torch.ones(1, 2, 4), torch.ones(1, 2, 4), 3), ValueError, '3 nodes do not share 4 columns evenly'),
    (lambda: mask_sites([], 'between'), ValueError, "`ffn_mask` is 'between'; expected one of"),
    (lambda: MaskFisher.from_tensors({'heads.0': torch.ones(2)}), ValueError, 'expected tensors `heads.0` and `rows.0`, got'),
    (lambda: find_device('meta'), ValueError, "'meta' holds no numbers"),
    (lambda: find_device('nonsense'), ValueError, "no device 'nonsense' here: expected cpu, cuda"),
    (lambda: check_text(['a', 'b', 'c']), ValueError, 'must name one column or two'),
    (lambda: check_text([]), ValueError, 'must name one column or two'),
    (lambda: check_text([1]), ValueError, 'must name one column or two'),
    (lambda: text_limit(tiny(), 0), ValueError, '`max_length` must be a whole number of at least 1, got 0'),
    (lambda: text_limit(tiny(), 2.), ValueError, '`max_length` must be a whole number'),
    (lambda: pick_text(dict(text='int64')), ValueError, "column 'text' is int64; expected text"),
    (lambda: pick_text(dict(a='string'), 'b'), ValueError, "column 'b' is not there; expected text"),
    (lambda: pick_text(dict(a='string', b='string')), ValueError, 'it is not clear which columns are the text'),
    (lambda: match_classes(['yes', 'no'], ['a', 'no']), ValueError, "the model has no 'a'"),
    (lambda: match_classes(['LABEL_0', 'LABEL_1'], ['a', 'b', 'c']), ValueError, '3 classes for 2 outputs'),
    (lambda: model_labels(['score'], [0, 1], ['no', 'yes']), ValueError, 'it predicts a number'),
], ids=lambda o: None)
def test_refused(call, error, say):
    with pytest.raises(error, match=say): call()

def test_classes_are_matched_by_name():
    assert match_classes(['No', 'Yes'], ['yes', 'no']) == [1, 0] and match_classes(['LABEL_0', 'LABEL_1'], ['b', 'a']) == [0, 1]
    assert match_classes(['b', 'a'], ['0', '1']) == [0, 1]
    assert are_bare(['LABEL_0', '1', 'label2']) and not are_bare(['LABEL_0', 'b'])
    assert word_classes(['No', 'Yes'], ['yes', 'maybe']) == dict(yes=1) and word_classes(['no', 'No', 'maybe'], ['No', 'no']) == dict(no=0, No=1)
    with pytest.warns(UserWarning, match='matched by name'): assert model_labels(['No', 'Yes'], [0, 1, -1, 2], ['yes', 'no']) == [1, 0, -1, -1]
    assert model_labels(['No', 'Yes'], [0, 1], ['no', 'yes']) == [0, 1] and model_labels(['No', 'Yes'], ['yes', 'what', 0]) == [1, 'what', 0]
    assert model_labels(['No', 'Yes'], ['yes', [0., 1.]]) == [1, [0., 1.]]
    assert model_labels(['No', 'Yes'], [1, 0]) == [1, 0] and model_labels(['score'], ['a']) == ['a']

def test_columns_of_text():
    assert known_text(['sentence2', 'sentence1', 'other']) == ['sentence1', 'sentence2'] and known_text(['Text_A', 'textB']) == ['Text_A', 'textB']
    assert known_text(['question', 'sentence']) == ['question', 'sentence'] and known_text(['text', 'title']) is None and known_text(['a']) is None
    assert repeats(['a', 'b', 'a'], [0, 1, 0]) and not repeats(['a', 'b'], [0, 1]) and not repeats(['a', 'b', 'c'], [0, 1, 0])
    assert not repeats(['a', 'a', 'a'], [0, 1, 0])
    kinds = dict(note='string', label_text='large_string', label='int64')
    assert pick_text(kinds) == ['note'] and pick_text(kinds, 'label_text') == ['label_text'] and pick_text(kinds, recorded=['label_text']) == ['label_text']
    assert pick_text(kinds, recorded=['gone']) == ['note'] and pick_text(dict(note='string', score='int64')) == ['note']
    words = dict(note=['x', 'y', 'z'], name=['a', 'b', 'a'])
    assert pick_text(dict(note='string', name='string'), labels=[0, 1, 0], read=words.get) == ['note']

@pytest.mark.parametrize('kind, longest', [('bert', 40), ('roberta', 38)])
def test_the_longest_row(kind, longest):
    model = tiny(kind)
    assert max_positions(model) == longest == text_limit(model) == text_limit(model, 99) and text_limit(model, 1) == 1 and text_limit(model, 7) == 7


# --- jobs, rules and statistics -------------------------------------------------------------------

def job(**kw):
    states = dict(a=dict(w=torch.ones(4, 3), b=torch.ones(4)), b=dict(w=torch.ones(4, 3, dtype=torch.float64), b=torch.ones(4)))
    return Job(states, torch.ones(2), **kw)

def test_a_job_knows_types_and_shapes_without_reading():
    class Unread:
        shape, dtype = (4, 3), torch.float32
        def __getitem__(self, rows): raise AssertionError('it was read')
    there = job()
    assert there.names == ['w', 'b'] and there.dtype('w') == torch.float64 and there.dtype('b') == torch.float32
    assert there.shape('w') == (4, 3) and there.shape(Block('w', slice(1, 3))) == (2, 3) and there.shape(Block('b', slice(3, 9))) == (1,)
    assert there.seed == 0 and there.base is None and there.model is None and dict(there.statistics) == {}
    lazy = Job(dict(a=Blocks(dict(w=Unread()))), torch.ones(1))
    assert lazy.dtype('w') == torch.float32 and lazy.shape(Block('w', slice(0, 1))) == (1, 3)

def test_a_rule_is_given_whole_parameters_unless_it_says_otherwise():
    assert Rule(None, {}).takes_whole('w') and not Rule(None, {}, whole=()).takes_whole('w')
    assert Rule(None, {}, whole={'w'}).takes_whole('w') and not Rule(None, {}, whole={'w'}).takes_whole('b')
    assert not Rule(None, {}).once and Rule(None, {}).counts == {}

def test_values_are_compared_by_identity_where_they_hold_tensors():
    for make in (lambda: Slice('query', rows=torch.arange(3)), lambda: Shares('one', torch.ones(2, 3)), lambda: Place((Slice('query'),)),
                 lambda: Site(torch.nn.Identity(), 'input', 2), lambda: ParameterFisher(dict(w=torch.ones(2)))):
        a, b = make(), make()
        assert a == a and a != b and len({a, b}) == 2
    for o, field in ((Slice('query'), 'role'), (Shares('one', torch.ones(2, 1)), 'kind'), (Place(()), 'layer'), (job(), 'seed'), (Rule(None, {}), 'once'),
                     (Site(None, 'input', 2), 'nodes'), (METHODS['ties'], 'name'), (STATISTICS['grams'], 'name'), (VARIANTS['paper'], 'mean'),
                     (FAMILIES['bert'], 'blocks'), (FAMILIES['bert'].blocks[0], 'path'), (FAMILIES['bert'].blocks[1], 'path')):
        with pytest.raises(FrozenInstanceError): setattr(o, field, None)
    assert Slice('query').axis == Shares('one', None).axis == 0 and Place(()).layer is None

def test_methods_and_statistics_say_what_they_need():
    needs = {k: (o.statistic, o.needs_base, o.random) for k, o in METHODS.items() if o.rule.__module__.startswith('fisher_nodes')}
    assert needs == {'actmat': (None, True, False), 'average': (None, False, False), 'dare': (None, True, True), 'fisher': ('full-fisher', False, False),
                     'mask-fisher': ('mask-fisher', False, False), 'prodistill': ('calls', True, False), 'regmean': ('grams', False, False), 'residual-regression': ('calls', False, False), 'best': ('calls', False, False), 'chain-of-merges': ('calls', False, False), 'sequential-regmean': ('calls', False, False), 'task-arithmetic': (None, True, False),
                     'ties': (None, True, False), 'wudi': (None, True, False)}
    assert {k: METHODS[k].options for k in needs} == {
        'actmat': dict(ridge=0.), 'average': {}, 'dare': dict(density=.1, scale=.4), 'fisher': dict(normalise=False, floor=1e-6), 'mask-fisher': dict(scheme=None, variant='paper'),
        'prodistill': dict(coefficients='nodes', start=.3, epochs=50, learning_rate=.01), 'regmean': dict(off_diagonal=.9, anchor=0.), 'residual-regression': dict(ridge=.1, copies=3), 'best': dict(copies=3), 'chain-of-merges': dict(ridge=.1), 'sequential-regmean': dict(ridge=.1), 'task-arithmetic': dict(scale=.4), 'ties': dict(density=.2, scale=1.), 'wudi': dict(ridge=0.)}
    assert METHODS['ties'].evidence is None and METHODS['regmean'].evidence == 'grams'
    takes = {k: (o.takes, o.kind.__name__) for k, o in STATISTICS.items()}
    assert takes == {'calls': ((), 'Calls'), 'mask-fisher': (('variant', 'labels', 'loss', 'matrices', 'checkpointing'), 'MaskFisher'), 'grams': ((), 'Grams'),
                     'full-fisher': (('labels', 'loss', 'one_at_a_time'), 'ParameterFisher')}
    kinds = {k: (o.backward, o.alone, o.divide, o.budget) for k, o in dict(mask=MaskSquares, grams=InputGrams, full=SquaredGradients, one=SquaredAlone).items()}
    assert kinds == dict(mask=(True, False, False, 1), grams=(False, False, False, 1), full=(True, False, False, 4), one=(True, True, False, 1))

def test_variants_are_those_of_the_paper_and_of_its_code():
    what = {k: (o.ffn_mask, o.reduce.__name__, o.mean, o.replacement, o.batch_size, o.diagonal, o.ablation) for k, o in VARIANTS.items()}
    assert what == {'paper': ('before', 'square_each', True, False, None, False, False), 'released': ('after', 'square_mean', False, True, 32, True, False),
                    'batch-mean': ('before', 'square_mean', False, False, 32, True, True), 'after-gelu': ('after', 'square_each', True, False, None, False, True),
                    'replacement': ('before', 'square_each', True, True, None, False, True)}
    assert list_variants() == ['paper', 'released']

@pytest.mark.parametrize('option, value, say', [
    ('density', 0., '`density` is 0.0; expected a finite number above 0'), ('density', 1.5, '`density` is 1.5; expected a finite number of at most 1'),
    ('density', 'x', "`density` is 'x'; expected a finite number"), ('scale', float('nan'), 'expected a finite number'), ('scale', None, 'expected a finite number')])
def test_options_are_checked(option, value, say):
    with pytest.raises(ValueError, match=say): METHODS['ties'].check({option: value})
    assert METHODS['ties'].check({'density': np.float64(.5)}) == dict(density=.5, scale=1.)

def test_tensors_are_checked_against_a_model():
    want, fine = dict(w=(2, 3), b=(2,)), dict(w=torch.ones(2, 3), b=torch.ones(2))
    check_shapes('It', fine, want)
    for bad, say in ((dict(w=fine['w']), r"missing \['b'\], unknown \[\]"), (fine | dict(c=fine['b']), r"missing \[\], unknown \['c'\]"),
                     (fine | dict(b=torch.ones(2).long()), 'b: numbers of type torch.int64'), (fine | dict(b=torch.ones(3)), r'b: shape \(3,\), expected \(2,\)')):
        with pytest.raises(ValueError, match=say): check_shapes('It', bad, want)

def test_numbers_are_checked():
    gram = torch.tensor([[2., 1.], [1., 3.]])
    for v, squares in ((gram, gram.diagonal()), (gram, gram), (torch.zeros(2, 2), torch.zeros(2))): check_numbers('It', v, squares)
    nearly = torch.tensor([[2., 1.], [1.0029, 3.]])
    check_numbers('It', nearly, nearly.diagonal())
    for v in (torch.tensor([[2., 1.], [1.0031, 3.]]), torch.tensor([[2., 1.], [-1., 3.]])):
        with pytest.raises(ValueError, match='It: not symmetric'): check_numbers('It', v, v.diagonal())
    for x in (float('nan'), float('inf'), -1.):
        v = torch.tensor([1., x])
        with pytest.raises(ValueError, match=f'It: {x} is among the numbers'): check_numbers('It', v, v)
    check_numbers('It', torch.tensor([[1., -.5], [-.5, 1.]]), torch.tensor([1., 1.]))


# --- files ----------------------------------------------------------------------------------------

def small():
    gen = torch.Generator().manual_seed(0)
    whole = {f'{o}': torch.ones(3).to(o) for o in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bfloat16)}
    return whole | {'b.half': torch.randn(3, generator=gen).half(), 'a.wide': torch.randn(4, 3, generator=gen).double(), 'c.bits': torch.tensor([True, False]),
            'z.float': torch.randn(5, 2, generator=gen), 'a.float': torch.randn((), generator=gen), 'e.empty': torch.ones(0, 3)}

@pytest.mark.parametrize('most_open', [64, 0])
def test_a_file_is_what_safetensors_writes(tmp_path, monkeypatch, most_open):
    monkeypatch.setattr(store, 'MOST_OPEN', most_open)
    tensors = small()
    save_file(tensors, tmp_path/'want', dict(format='pt'))
    for n, slot in store.make_file(tmp_path/'got', tensors).items(): slot[...] = tensors[n]
    assert (tmp_path/'got').read_bytes() == (tmp_path/'want').read_bytes()
    slots = store.read_slots(tmp_path/'got')
    assert slots.keys() == tensors.keys()
    for n, t in tensors.items(): assert torch.equal(slots[n][...], t) and slots[n].dtype == slots[n].stored == t.dtype and slots[n].shape == tuple(t.shape)
    assert torch.equal(slots['z.float'][1:3], tensors['z.float'][1:3]) and torch.equal(slots['a.wide'][3:9], tensors['a.wide'][3:9])
    with pytest.raises(FileExistsError): store.make_file(tmp_path/'got', tensors)
    file = slots['z.float'].file
    file.close()
    assert file.raw is None if most_open == 0 else file.raw.closed

def test_rows_are_written_in_place(tmp_path):
    slot = store.make_file(tmp_path/'f', dict(a=torch.ones(2), w=torch.ones(4, 3)))['w']
    slot[...] = torch.zeros(4, 3)
    slot[1:3] = torch.arange(6.).view(3, 2).T.double()
    assert torch.equal(load_file(tmp_path/'f')['w'], torch.tensor([[0., 0, 0], [0, 2, 4], [1, 3, 5], [0, 0, 0]]))
    assert torch.equal(load_file(tmp_path/'f')['a'], torch.zeros(2)) and slot.path == tmp_path/'f'
    with pytest.raises(ValueError, match=r'expected shape \(2, 3\), got \(3, 3\)'): slot[1:3] = torch.ones(3, 3)

def test_a_file_that_ends_too_early(tmp_path):
    save_file(dict(w=torch.ones(4, 3)), tmp_path/'f')
    slot = store.read_slots(tmp_path/'f')['w']
    with open(tmp_path/'f', 'r+b') as f: f.truncate((tmp_path/'f').stat().st_size-4)
    assert torch.equal(slot[:3], torch.ones(3, 3))
    with pytest.raises(ValueError, match='f ends too early; was it changed'): slot[...]

def test_a_parameter_has_one_name(tmp_path):
    tensors = {'bert.w': torch.ones(1), 'x': torch.ones(2), 'bert.n.LayerNorm.gamma': torch.ones(3), 'n.LayerNorm.beta': torch.ones(5), 'two': torch.ones(4), 'bert.two': torch.ones(4)}
    save_file(tensors, tmp_path/'f')
    slots = store.read_slots(tmp_path/'f')
    def find(name): return store.find_slot(slots, name, 'bert.', torch.float64)
    assert (find('w').shape, find('x').shape, find('n.LayerNorm.weight').shape, find('n.LayerNorm.bias').shape) == ((1,), (2,), (3,), (5,)) and find('x')[...].dtype == torch.float64
    assert find('two').start == slots['bert.two'].start
    with pytest.raises(ValueError, match='gone is not in'): find('gone')
    save_file(tensors | {'n.LayerNorm.weight': torch.ones(3)}, tmp_path/'g')
    with pytest.raises(ValueError, match='has both .*; which is meant'): store.find_slot(store.read_slots(tmp_path/'g'), 'n.LayerNorm.weight', 'bert.', torch.float32)

def test_a_type_that_is_not_known_is_named(tmp_path):
    save_file(dict(w=torch.ones(2, dtype=torch.float8_e4m3fn)), tmp_path/'f')
    slots = store.read_slots(tmp_path/'f')
    with pytest.raises(ValueError, match='w in .* is of a type that is not known'): store.find_slot(slots, 'w', 'bert.', torch.float32)
    with pytest.raises(ValueError, match='a tensor of a type that is not known'): slots['w'][...]


# --- losses, labels, moments ------------------------------------------------------------------------

@pytest.mark.parametrize('kind, outputs, want', [(None, 1, True), (None, 2, False), ('regression', 3, True), ('single_label_classification', 1, False)])
def test_what_is_a_regression(kind, outputs, want):
    model = tiny(num_labels=outputs)
    model.config.problem_type = kind
    assert is_regression(model) is want

def test_losses_of_every_example():
    gen = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(4, 3, generator=gen), torch.tensor([0, 2, 1, 1])
    want = [(-x[y]+x.exp().sum().log()).item() for x, y in zip(logits.double(), labels)]
    assert_close(choice_loss(logits[:,None], labels[:,None]).double(), torch.tensor(want).double(), rtol=1e-5, atol=0)
    assert choice_loss(logits[:,None].half(), labels[:,None]).dtype == torch.float32
    several = tiny(num_labels=3)
    several.config.problem_type = 'regression'
    targets = torch.randn(4, 3, generator=gen)
    assert_close(head_of(several).loss(logits, targets), torch.stack([sum((x-y)**2)/3 for x, y in zip(logits, targets)]), rtol=1e-5, atol=0)
    assert head_of(several).loss is squared_error

def test_labels_are_drawn_by_row_and_seed():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    def slow(p, row, seed):
        u, below = random.Random(f'{seed} {row}').random(), 0.
        for c, o in enumerate(p):
            below += o
            if u <= below: return c
    for rows, seed in ((range(50), 0), (range(100, 150), 7)):
        assert draw_labels(logits[:,None], torch.ones(50, 1).bool(), rows, seed)[:,0].tolist() == [slow(p, r, seed) for p, r in zip(logits.double().softmax(1).tolist(), rows)]

def test_sums_over_examples():
    gen = torch.Generator().manual_seed(0)
    g, w = torch.randn(5, 3, generator=gen), torch.rand(5, generator=gen)
    squares = sum(a.double()*b.double()**2 for a, b in zip(w, g))
    outer = sum(a.double()*torch.outer(b, b).double() for a, b in zip(w.double(), g.double()))
    assert_close(square_each(g, w), squares, rtol=1e-12, atol=0)
    assert_close(outer_each(g, w), outer, rtol=1e-12, atol=0)
    assert_close(square_mean(g, w), (sum(g.double())/5)**2, rtol=1e-12, atol=0)

def test_a_fisher_tells_its_nodes():
    f = MaskFisher(torch.ones(2, 4), torch.ones(2, 6), 7, group=torch.ones(2, 1))
    assert repr(f) == 'MaskFisher(8 of kind head, 12 of kind row, 2 of kind group; 7 examples)' and len(f) == 2 and f.meta == {} and f.matrices == {}
    assert f.head_matrices is None and f.row_matrices is None and [o.shape for o in f.layer(1)] == [(4,), (6,)]
    assert list(f.tensors()) == ['heads.0', 'heads.1', 'rows.0', 'rows.1', 'group.0', 'group.1']
    uneven = MaskFisher.from_tensors({'heads.0': torch.ones(2), 'heads.1': torch.ones(3), 'rows.0': torch.ones(4), 'rows.1': torch.ones(4),
                                      'head_matrices.0': torch.ones(2, 2), 'head_matrices.1': torch.ones(3, 3)}, num_examples=3, meta=dict(a=1))
    assert [len(o) for o in uneven.heads] == [2, 3] and uneven.rows.shape == (2, 4) and uneven.num_examples == 3 and uneven.meta == dict(a=1)
    assert uneven.row_matrices is None and MaskFisher.from_tensors({'heads.0': torch.ones(2), 'rows.0': torch.ones(4)}).matrices == {}
    assert [len(o) for o in uneven.head_matrices] == [2, 3] and MaskFisher(f.heads, f.rows).num_examples == 0

def test_zeros_are_filled_where_no_model_has_any():
    a, b = (MaskFisher(torch.tensor([[0., 0, x]]), torch.tensor([[0., x]]), 3, dict(a=x)) for x in (2., 0.))
    c, d = fill_zeros([a, b])
    assert c.heads[0].tolist() == [1, 1, 2] and d.heads[0].tolist() == [1, 1, 0] and c.rows[0].tolist() == [1, 2] and d.rows[0].tolist() == [1, 0]
    assert a.heads.tolist() == [[0, 0, 2]] and (c.num_examples, c.meta, d.meta) == (3, dict(a=2.), dict(a=0.)) and fill_zeros([]) == []

def test_grams_leave_padding_out():
    x, mask = torch.arange(12.).view(2, 3, 2), torch.tensor([[1, 1, 0], [1, 0, 0]])
    kept = token_positions(mask)
    assert kept.tolist() == [0, 1, 3] and token_positions(None) is None and token_positions(torch.ones(2, 3)) is None
    want = sum(torch.outer(v, v) for v in (x[0,0], x[0,1], x[1,0]))
    assert torch.equal(gram(x, kept), want) and torch.equal(gram(x), sum(torch.outer(v, v) for v in x.flatten(0, 1)))
    assert torch.equal(gram(x[:,0], kept), sum(torch.outer(v, v) for v in x[:,0])) and gram(x.half()).dtype == torch.float32
    with pytest.raises(ValueError, match=r'must have shape \(B, T\), got \(2, 3, 1\)'): token_positions(mask[...,None])

def test_a_regression_mean_solves_the_normal_equations():
    gen = torch.Generator().manual_seed(0)
    Ws = [torch.randn(3, 4, generator=gen, dtype=torch.float64) for _ in range(2)]
    Xs = [torch.randn(9, 4, generator=gen, dtype=torch.float64)*torch.tensor([1., 2., 0., .5]) for _ in range(2)]
    Gs, weights = [x.T @ x for x in Xs], torch.tensor([1., 3.], dtype=torch.float64)
    got, unused = regression_mean(Ws, lambda: Gs, weights, .8)
    used = [0, 1, 3]
    small = [torch.diag(g.diagonal())*.2+.8*g for g in Gs]
    A = sum(w*s for w, s in zip(weights, small))[used][:,used]
    B = sum(w*s[used][:,used] @ W.T[used] for w, s, W in zip(weights, small, Ws))
    assert unused == 1
    assert_close(got.T[used], torch.linalg.solve(A, B), rtol=1e-9, atol=0)
    assert_close(got[:,2], (Ws[0][:,2]+3*Ws[1][:,2])/4, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match='w: the sum of the grams cannot be inverted with off_diagonal=1.0'):
        regression_mean(Ws, lambda: [torch.ones(4, 4).double()]*2, weights, 1., 'w')

def test_an_element_mean_with_a_floor():
    ts, Fs = [torch.tensor([1., 1., 1.]), torch.tensor([5., 5., 5.])], [torch.tensor([3., 0., 0.]), torch.tensor([1., 2., 0.])]
    got, empty = element_mean(ts, Fs, torch.tensor([1., 2.]), 0.)
    assert_close(got, torch.tensor([(3+10)/5, 5., 11/3]), rtol=1e-6, atol=0)
    assert empty == 1
    got, empty = element_mean(ts, Fs, torch.tensor([1., 2.]), .5)
    assert_close(got, torch.tensor([(3+10)/5, (.5+20)/4.5, (.5+5)/1.5]), rtol=1e-6, atol=0)
    assert empty == 0 and fisher_norm(dict(a=torch.tensor([3.]), b=torch.tensor([[0., 4.]]))) == 5.


# --- other families, other devices ------------------------------------------------------------------

@pytest.mark.parametrize('name', MODELS)
def test_nodes_of_families_that_lie_otherwise(monkeypatch, name):
    monkeypatch.setitem(FAMILIES, name, ROWS[name])
    model, shared = MODELS[name](), {} if name == 'gpt2' else dict(group=[2, 2])
    assert count_nodes(model) == dict(head=[8, 8], row=[24, 24]) | shared
    places, state = find_places(model), model.base_model.state_dict()
    assert places.keys() == {n for n, t in state.items() if t.is_floating_point()}
    for n, o in places.items():
        rows = [s.rows for s in o.slices if s.rows is not None]
        if rows: assert torch.cat(rows).sort().values.tolist() == list(range(state[n].shape[o.slices[0].axis])), n
    layers = {o.layer for n, o in places.items() if '.0.' in n}, {o.layer for n, o in places.items() if '.1.' in n}
    assert layers == ({0}, {1}) and all(o.layer is None for n, o in places.items() if not {'0', '1'} & set(n.split('.')))

@pytest.mark.parametrize('labels', ESTIMATORS)
def test_weights_lie_beside_the_losses(labels):
    "The meta device stands in for a GPU."
    logits, y = torch.ones(2, 1, 3, device='meta'), torch.zeros(2, 1, device='meta').long()
    for weights, losses in ESTIMATORS[labels](choice_loss, logits, y, [0, 1], 0): assert weights.device.type == losses.device.type == 'meta'

def test_a_loss_that_leaves_a_layer_out():
    def loss(model, batch):
        inputs = {k: v for k, v in batch.items() if k != 'labels'}
        return model(**inputs, output_hidden_states=True).hidden_states[1].sum((1, 2))
    with pytest.raises(ValueError, match='no gradient reached layer 1: do the losses depend on the whole body'):
        mask_fisher(tiny(), ragged_batches(), loss=loss, **QUIET)

def test_the_kernel_is_used_where_it_agrees(monkeypatch):
    monkeypatch.setattr(kernel, '_agrees', lambda device: True)
    assert kernel.best_sums.__wrapped__(torch.device('cuda')) is kernel.fused_sums
    assert kernel.best_sums.__wrapped__(torch.device('cpu')) is kernel.plain_sums

RULES = {'average': (True, 0, {'one': 39}), 'dare': (False, 0, {'task vector': 39}), 'fisher': (False, 0, {'parameter': 39}), 'ties': (False, 0, {'task vector': 39}),
         'mask-fisher': (True, 0, {'head': 8, 'row': 4, 'one': 27}), 'regmean': (True, 13, {'gram': 13, 'one': 26}), 'task-arithmetic': (False, 0, {'task vector': 39})}

@pytest.mark.parametrize('name', RULES)
def test_rules_say_how_they_are_run(name):
    model, o = tiny(), METHODS[name]
    measured = {None: None, 'mask-fisher': mask_fisher, 'full-fisher': parameter_fisher, 'grams': linear_grams}[o.statistic]
    found = dict(a=measured(model, ragged_batches(sizes=(2,)), **QUIET)) if measured else {}
    body = dict(model.base_model.named_parameters())
    rule = o.rule(Job(dict(a=body), torch.ones(1).double(), found, body, model=model))
    assert (rule.once, len(rule.whole), dict(Counter(rule.kinds.values()))) == RULES[name]
    assert rule.counts == dict(fisher=dict(zero_fisher_elements=0), regmean=dict(unused_inputs=0)).get(name, rule.counts)
    assert {*rule.whole} == {k for k, v in rule.kinds.items() if v == 'gram'}

@pytest.mark.parametrize('method', ['dare', 'ties', 'task-arithmetic', 'average'])
def test_blocks_of_rows_give_what_whole_parameters_give(method):
    gen = torch.Generator().manual_seed(0)
    states = {t: Blocks(dict(w=torch.randn(8, 5, generator=gen))) for t in 'ab'}
    rule = METHODS[method].rule(Job(states, torch.tensor([1., 2.]).double(), base=Blocks(dict(w=torch.zeros(8, 5))), seed=3))
    def part(n): return rule.combine(n, [s[n] for s in states.values()])
    whole, parts = part('w'), [part(Block('w', slice(i, i+2))) for i in (0, 2, 4, 6)]
    assert torch.equal(torch.cat(parts), whole) and not torch.equal(parts[0], parts[1])

def test_dare_keeps_what_was_drawn():
    v = torch.arange(1., 41.).view(8, 5)
    got = drop_elements(v, .3, seeded('3 a w'))
    drawn = torch.rand(8, 5, generator=torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(b'3 a w').digest()[:7], 'big')), dtype=torch.float64)
    assert_close(got.double(), torch.where(drawn < .3, v.double()/.3, 0.), rtol=1e-6, atol=0)

def test_rows_inside_the_body_are_those_of_the_batch():
    def loss(model, batch):
        h = model.base_model(**{k: v for k, v in batch.items() if k != 'labels'}).last_hidden_state
        return model.base_model.encoder.layer[0].intermediate.dense(h.repeat(2, 1, 1)).sum((1, 2))[:len(h)]
    with pytest.raises(ValueError, match="3 examples, but 'encoder.layer.0.intermediate.dense' saw 6 rows; one example must be one row"):
        parameter_fisher(tiny(), ragged_batches(), loss=loss, **QUIET)

def test_a_new_batch_forgets_an_unfinished_one():
    model, (batch,) = tiny(), ragged_batches(sizes=(3,))
    with MaskSquares(model) as found:
        model(**{k: v for k, v in batch.items() if k != 'labels'})
        assert len(found.masks.leaves) == 1
        found.begin(3)
        assert found.masks.leaves == [] and found.part == {}

def test_options_are_taken_as_they_are():
    for bad in (dict(density='0.5'), dict(scale=True), dict(nonsense=1)):
        with pytest.raises(ValueError): METHODS['ties'].check(bad)
    def rule(job, where:torch.device=torch.device('cpu')): return None
    assert MergeMethod('mine', rule).check(dict(where=torch.device('meta'))) == dict(where=torch.device('meta'))
    assert plain_value(np.int64(3)) == 3 and type(plain_value(np.int64(3))) is int and plain_value('a') == 'a'
    assert (widen(torch.ones(2).half()).dtype, widen(torch.ones(2).double()).dtype, widen(torch.ones(2).int()).dtype) == (torch.float32, torch.float64, torch.int32)
    sums = dict(w=torch.tensor([6., 9.]).double())
    assert mean_of_sums(sums, 3, torch.float16)['w'].tolist() == [2, 3] and sums == {}

def test_schemes_are_these_tables():
    paper, heads = dict(query='head', key='head', ffn_in='row'), dict(query='head', key='head')
    assert dict(SCHEMES) == {
        'paper': paper, 'with-value': paper | dict(value='head'), 'heads': heads, 'rows': dict(ffn_in='row'), 'average': {},
        'layer-mean': dict(query='head_mean', key='head_mean', ffn_in='row_mean'),
        'released': paper | dict(value='head_mean', attention_output='head_mean', attention_norm='head_mean', ffn_out='row_mean', ffn_norm='row_mean',
                                 embeddings='universal', pooler='universal')}
    f = MaskFisher(torch.tensor([[1., 3.], [2., 6.]]), torch.tensor([[1., 1., 4.], [3., 3., 3.]]))
    assert {k: [w(f, i).tolist() for i in (0, 1)] for k, w in WHOLE.items()} == dict(
        one=[[1], [1]], head_mean=[[2], [4]], row_mean=[[2], [3]], universal=[[5.5], [5.5]])

def test_one_model_may_be_merged_by_grams():
    model, gs = tiny(), linear_grams(tiny(), ragged_batches(), **QUIET)
    rule = METHODS['regmean'].rule(Job(dict(a=dict(model.base_model.named_parameters())), torch.ones(1).double(), dict(a=gs), model=model))
    name = 'encoder.layer.0.output.dense.weight'
    want = model.base_model.get_parameter(name)
    assert_close(rule.combine(name, [want]), want.detach(), rtol=1e-6, atol=1e-9)

def test_a_threshold_is_found_by_blocks_too(monkeypatch):
    monkeypatch.setattr(blocks, 'BLOCK', 64)
    gen = torch.Generator().manual_seed(0)
    state, base = ({'w': torch.randn(1024, 2, generator=gen), 'b': torch.randn(3, generator=gen)} for _ in range(2))
    assert len(cut('w', (1024, 2))) == 4
    sizes = torch.cat([(state[k].double()-base[k].double()).abs().flatten() for k in state]).sort(descending=True).values
    for density in (.2, 1., 1e-9):
        want = sizes[max(1, round(density*len(sizes)))-1].item()
        assert trim_threshold(state, base, density) == trim_threshold(Blocks(state), Blocks(base), density) == want

def test_task_vectors_are_scaled_by_four_tenths():
    assert_close(add_task_vectors(torch.ones(2), [torch.full((2,), 3.), torch.full((2,), 2.)], torch.tensor([1., 2.])), torch.full((2,), 1+.4*(2+2)), rtol=1e-6, atol=0)

def test_a_forward_that_was_replaced_is_refused_unless_it_is_meant():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    def forward(x): return x
    forward._torchdynamo_orig_callable = model[0].forward
    model[0].forward = forward
    with pytest.raises(ValueError, match="`forward` of '0' was replaced by a compiled one"):
        with frozen_eval(model): pass
    with frozen_eval(model, compiled=True): assert not model.training

def test_where_a_model_runs():
    model = tiny()
    assert running_device(model) == running_device(model, 'cpu') == torch.device('cpu')
    with pytest.raises(ValueError, match='holds no numbers'): running_device(model, 'meta')
    before = torch.get_float32_matmul_precision()
    for name, want in (('fp32', 'highest'), ('tf32', 'high'), ('bf16', before)):
        with PRECISIONS[name](torch.device('cpu')):
            assert torch.get_float32_matmul_precision() == want and torch.is_autocast_enabled('cpu') == (name == 'bf16')
    assert torch.get_float32_matmul_precision() == before

def test_labels_in_the_models_order_are_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert model_labels(['No', 'Yes'], [0, 1, 5], ['no', 'yes']) == [0, 1, 5]

@pytest.mark.parametrize('label', ['label', 'labels', None])
def test_text_is_found_beside_any_column_of_labels(label):
    rows = dict(story=['x', 'y', 'z'], name=['a', 'b', 'a']) | ({label: [0, 1, 0]} if label else {})
    if label: assert text_columns(Dataset.from_dict(rows)) == ['story']
    else:
        with pytest.raises(ValueError, match='it is not clear'): text_columns(Dataset.from_dict(rows))

def test_text_is_cut_where_it_is_asked_for(tmp_path):
    one, texts = tokenizer(tmp_path), [['the cat rains the cat', 'rains']]
    assert [len(o) for o in tokenize(texts, one, 4)['input_ids']] == [4, 3] and [len(o) for o in tokenize(texts, one)['input_ids']] == [7, 3]

@pytest.mark.parametrize('scores, say', [
    ({}, 'must be a mapping from task to metrics'), (3, 'must be a mapping from task to metrics'), (dict(c=dict(acc=1.)), "has 'c', which is not among the tasks"),
    (dict(a={}), 'must be a finite number for each metric'), (dict(a=dict(acc=float('inf'))), 'must be a finite number'), (dict(a=dict(acc=float('nan'))), 'must be a finite'),
    (dict(a=dict(acc='1')), 'must be a finite number'), (dict(a=3), 'must be a finite number')], ids=str)
def test_scores_are_numbers_of_tasks(scores, say):
    with pytest.raises(ValueError, match=say): check_scores(scores, ['a', 'b'])

def test_a_card_tells_scores_and_use():
    report = merge([tiny(), tiny(seed=1)], method='average').report | dict(scores=check_scores(dict(task0=dict(acc=.25)), ['task0', 'task1']))
    text = str(model_card(report, None, 'me/it'))
    assert 'acc 0.25' in text and 'pipeline_tag: feature-extraction' in text and 'No recipe was recorded.' in text and '# Merged: task0, task1' in text
    assert 'feature-extraction' in str(model_card(report, None, 'me/it', 'AutoModel')) and 'AutoTokenizer' not in str(model_card(report, None, 'x', tokenizer=False))

def test_sizes_of_files():
    for size in (1, '1KB', '2GB'): check_shard_size(size)
    for size in (0, -1, True, 'much', None, 1.5):
        with pytest.raises(ValueError, match='max_shard_size'): check_shard_size(size)

def folders(root):
    for i, t in enumerate(('a', 'bé', 'base')): tiny(seed=i, dtype=torch.float32).save_pretrained(root/t)
    return dict(a=root/'a', b=root/'bé')

def test_a_recipe_says_what_was_merged(tmp_path):
    models = folders(tmp_path)
    merged = merge(models, method='ties', base=tmp_path/'base', weights=dict(a=1, b=2), density=.3, seed=5, **QUIET)
    recipe = dict(merged.recipe)
    assert set(recipe.pop('versions')) == {'fisher_nodes', 'torch', 'transformers'} and len(recipe.pop('result')) > 8
    def entry(folder, seed, **kw): return dict(model=str(folder), weight_hash=hash_weights(tiny(seed=seed, dtype=torch.float32)), **kw)
    heads = {t: recipe['models'][t]['head_hash'] for t in 'ab'}
    assert len(set(heads.values())) == 2
    assert recipe == dict(models={t: entry(o, i, head_hash=heads[t]) for i, (t, o) in enumerate(models.items())}, base=entry(tmp_path/'base', 2), method='ties',
                          weights=dict(a=1., b=2.), seed=5, options=dict(density=.3, scale=1.))
    with pytest.raises(OutputExistsError, match="the model of 'base'"): merged.save_pretrained(tmp_path/'base', overwrite=True)
    merged.save_pretrained(tmp_path/'out')
    text, card = (tmp_path/'out'/'recipe.yml').read_text(), (tmp_path/'out'/'README.md').read_text()
    assert 'model: ../bé\n' in text and text.index('models:') < text.index('base:') < text.index('method: ties') and 'changed after' not in text+card
    with torch.no_grad(): merged.body.embeddings.word_embeddings.weight.add_(1)
    merged.save_pretrained(tmp_path/'more')
    assert all('changed after merging' in (tmp_path/'more'/o).read_text() for o in ('recipe.yml', 'README.md'))

def test_a_mask_has_no_options_beside_variant_and_scheme(family):
    models = [tiny(family), tiny(family, seed=1)]
    merged = merge(models, [mask_fisher(m, ragged_batches(family), **QUIET) for m in models], **QUIET)
    assert 'options' not in merged.recipe and merged.recipe['variant'] == 'paper' and merged.recipe['weights'] == dict(task0=1., task1=1.)
    assert merged.report['zero_fisher'] == dict(heads=0, rows=0) and merged.report['copied'] == [n for n in merged.body.state_dict() if 'ids' in n]

def test_a_head_of_more_digits_keeps_them():
    wide, narrow = (dict(w=torch.nn.Parameter(torch.ones(2).to(o))) for o in (torch.float64, torch.float16))
    for o in (wide, narrow): _widen(o, torch.float32)
    assert (wide['w'].dtype, narrow['w'].dtype) == (torch.float64, torch.float32)

@pytest.mark.parametrize('name', ['a/b/c', 'a//b', '-x', ''])
def test_a_name_that_the_hub_cannot_have(name):
    with pytest.raises(ValueError): hub_name(None, name)

def test_fishers_of_two_estimators_are_refused():
    models = [tiny(), tiny(seed=1)]
    fishers = [mask_fisher(m, ragged_batches(), labels=o, **QUIET) for m, o in zip(models, ('exact', 'empirical'))]
    with pytest.raises(ValueError, match='the Fishers differ in estimator'): merge(models, fishers, **QUIET)
    merged = merge(models, [mask_fisher(m, ragged_batches(), **QUIET) for m in models], scheme='with-value', **QUIET)
    assert merged.report['options']['scheme'] == dict(SCHEMES['with-value']) and merged.report['roles']['value']['weight'] == 'head'

@pytest.mark.parametrize('run', [merge, merge_files])
def test_pinned_weights_are_looked_at(tmp_path, run):
    models, out = folders(tmp_path), {} if run is merge else dict(out=tmp_path/'out')
    for pins in (dict(weight_hash='0'*64), dict(head_hash='0'*64)):
        with pytest.raises(ValueError, match="0000"): run(models | dict(a=ModelReference(str(models['a']), **pins)), method='average', **out, **QUIET)
    with pytest.raises(ValueError, match="0000"):
        run(models, method='ties', base=ModelReference(str(tmp_path/'base'), weight_hash='0'*64), **out, **QUIET)

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64], ids=str)
def test_files_keep_their_type(tmp_path, dtype):
    for i, t in enumerate('ab'): tiny(seed=i, dtype=dtype).save_pretrained(tmp_path/t)
    merge_files({t: tmp_path/t for t in 'ab'}, method='average', out=tmp_path/'out', **QUIET)
    assert {t.dtype for t in load_file(tmp_path/'out'/'model.safetensors').values()} == {dtype}

@pytest.mark.parametrize('kw, error', [(dict(max_length=0), ValueError), (dict(max_length=2.), ValueError), (dict(max_length=True), ValueError), (dict(tokenizer=3), TypeError)], ids=str)
def test_how_rows_are_read_is_checked(kw, error, tmp_path):
    rows = ragged_batches()
    with pytest.raises(error, match='must be|expected'): ask([tiny(), tiny()], data=[rows, rows], **kw)
    assert ask([tiny()], data=[rows], max_length=1, tokenizer=(one := tokenizer(tmp_path))).tokenizer is one
    with pytest.raises(ValueError, match='differ in capitals only'): ask(dict(A=tiny(), a=tiny()), method='average')


# --- what merging reads, names and keeps ------------------------------------------------------------

def test_a_card_says_what_a_model_is_used_for():
    report = merge([tiny(), tiny(seed=1)], method='average').report
    uses = {o: model_card(report, None, 'me/it', o).data.pipeline_tag for o in ('AutoModelForSequenceClassification', 'AutoModel', 'BertForMaskedLM')}
    assert uses == dict(AutoModelForSequenceClassification='feature-extraction', AutoModel='feature-extraction', BertForMaskedLM=None) # of the root, a body alone
    assert model_card(report, None, 'me/it', 'AutoModelForMaskedLM').data.pipeline_tag == 'fill-mask' and model_card(report, None, 'me/it', 'AutoModelForImageClassification').data.pipeline_tag == 'image-feature-extraction'
    scored = model_card(report | dict(scores=dict(task0=dict(acc=.5))), None, 'a/b/it')
    assert scored.data.model_name == 'it' and 'model_name' not in str(model_card(report, None, 'me/it'))

def test_only_some_models_are_of_sentence_transformers(tmp_path):
    for t in 'ab': tiny().config.save_pretrained(tmp_path/t)
    modules = [dict(type='sentence_transformers.models.Transformer', path='')]
    (tmp_path/'b'/'modules.json').write_text(json.dumps(modules))
    a, b = (AutoConfig.from_pretrained(tmp_path/t) for t in 'ab')
    assert read_modules(a) is None and read_modules(b) == {'modules.json': modules}
    assert agreed_modules(dict(a=a)) is None and agreed_modules(dict(a=a, b=b)) == dict(files={'modules.json': modules})

def test_names_that_a_recipe_can_have(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'here').mkdir()
    assert _name('here') == _name(Path('here')) == str((tmp_path/'here').resolve()) and _name('someone/model') == 'someone/model'
    assert _name(None) is _name(torch.ones(1)) is None and _on_hub('someone/model') and not _on_hub('/here') and not _on_hub(None)

def test_a_request_takes_values_as_they_are():
    models = dict(a=tiny(), b=tiny(seed=1))
    assert MergeRequest(models=models, method='average', weights=dict(a=1, b=.5)).weights == dict(a=1, b=.5)
    for bad in (dict(weights=dict(a=float('inf'), b=1)), dict(weights=dict(a='1', b=1)), dict(num_samples='3'), dict(nonsense=1)):
        with pytest.raises(ValueError): MergeRequest(models=models, method='average', **bad)
    assert all(o.description for o in MergeRequest.model_fields.values())

def test_merge_hands_on_all_that_it_is_given(monkeypatch):
    monkeypatch.setattr(run, 'merge_loaded', lambda *given: given)
    how = dict(num_samples=3, max_length=4, text='b', label='y', labels='exact', precision='fp32', loss=lambda model, batch: None)
    request, *rest = run.merge([tiny()], data=[ragged_batches()], device='cpu', progress=False, checkpointing=True, seed=5, refit_heads=.5, work='w', **how)
    assert {k: getattr(request, k) for k in how} == how and (request.seed, request.refit_heads, *rest) == (5, .5, 'cpu', False, True, 'w')

def test_a_statistic_in_files_is_checked_as_it_is_read():
    def blocks(**tensors): return CheckedBlocks(tensors, 'a', STATISTICS['full-fisher'])
    tensors = dict(w=torch.rand(4, 3), none=torch.ones(0, 3), one=torch.rand(()))
    found = blocks(**tensors)
    assert torch.equal(found[Block('w', slice(0, 2))], tensors['w'][:2]) and torch.equal(found[Block('w', slice(3, 4))], tensors['w'][3:])
    assert found['none'].shape == (0, 3) and found.fingerprint() == found.fingerprint() == blocks(**tensors).fingerprint() == hash_tensors(tensors)
    for x in (float('nan'), float('inf'), -1.):
        with pytest.raises(ValueError, match=f'{x} is among the numbers'): blocks(w=torch.tensor([1., x]))['w']
    with pytest.raises(ValueError, match='not symmetric'): CheckedBlocks(dict(w=torch.tensor([[2., 1.], [0., 3.]])), 'a', STATISTICS['grams'])['w']

@pytest.mark.parametrize('way', ['open_plain', 'open_skeleton'])
def test_the_commit_that_was_fetched_is_noted(tmp_path, monkeypatch, way):
    folder = tmp_path/('c'*40)
    tiny(dtype=torch.float32).save_pretrained(folder)
    monkeypatch.setattr(skeletons, 'fetch_model', lambda reference: str(folder))
    found = getattr(skeletons, way)(ModelReference('someone/model', 'main'), AutoModelForSequenceClassification)
    assert (found.model.config._name_or_path, found.model.config._commit_hash) == ('someone/model', folder.name)

def test_a_model_has_the_type_of_its_floats():
    def dtype(*stored, **said): return skeletons._dtype_of(PretrainedConfig(**said), {str(i): SimpleNamespace(stored=o) for i, o in enumerate(stored)})
    assert dtype(torch.int64, torch.bfloat16, None, torch.bfloat16) == torch.bfloat16 and dtype(torch.bfloat16, torch.float32) is dtype(torch.int64) is None
    assert dtype(torch.bfloat16, dtype=torch.float16) == torch.float16

@pytest.mark.parametrize('x', [float('nan'), float('inf'), -1.])
def test_the_first_node_that_is_no_number_is_named(x):
    _check_nodes('a', 'head', 1, torch.tensor([0., 1., 2.]), 3)
    with pytest.raises(ValueError, match=f"Fisher of 'a', head of layer 1: node 1 is {x}, expected a finite number"): _check_nodes('a', 'head', 1, torch.tensor([1., x, -2.]), 3)
    with pytest.raises(ValueError, match=r'shape \(3,\), expected \(2,\)'): _check_nodes('a', 'head', 1, torch.ones(3), 2)

def test_a_card_tells_of_glue_and_of_examples():
    report = merge([tiny(), tiny(seed=1)], [mask_fisher(tiny(seed=i), ragged_batches(), **QUIET) for i in (0, 1)], **QUIET).report
    recipe = dict(models=dict(task0='a', task1='b'), data=dict(task0='glue:rte', task1='own.csv'))
    scored = report | dict(scores=dict(task0=dict(acc=.5), task1=dict(f1=.25)))
    told = [(o.task_type, o.metric_type, o.metric_value, o.dataset_type, o.dataset_name, o.dataset_config) for o in eval_results(scored, recipe)]
    assert told == [('text-classification', 'acc', .5, 'nyu-mll/glue', 'GLUE rte', 'rte'), ('text-classification', 'f1', .25, 'task1', 'task1', None)]
    card = model_card(scored, recipe, 'me/it')
    assert card.data.datasets == ['nyu-mll/glue'] and model_card(report, None, 'me/it').data.datasets is None
    n = report['tasks']['task0']['fisher']['num_examples']
    assert n > 1 and f'| 1 | {n} | acc 0.5 |' in card.text and '`fisher-nodes merge recipe.yml --out DIR`' in card.text and 'has no name' not in card.text
    assert 'has no name for `models` of' in model_card(report, dict(models=dict(task0=None)), 'me/it').text

def test_sizes_of_files_in_bytes(tmp_path):
    assert [_size_in_bytes(o) for o in (7, '2KB', '3MB', '15GB')] == [7, 2000, 3_000_000, 15_000_000_000]
    body = tiny().base_model
    size = sum(t.numel()*t.element_size() for t in body.state_dict().values())
    assert list(plan_files(body, tmp_path, size)[1]) == ['model.safetensors'] and list(tmp_path.iterdir()) == []
    assert len(plan_files(body, tmp_path, size-1)[1]) > 1 and [o.name for o in tmp_path.iterdir()] == ['model.safetensors.index.json']

def test_what_a_merged_model_is_made_of(tmp_path):
    body, several = tiny().base_model, dict(a=1, b=2)
    assert Merged(body, dict(a=body, b=body), {}, several).tokenizers == several and Merged(body, dict(a=body, b=body), {}, several).tokenizer is None
    assert Merged(body, dict(a=body), {}, several).tokenizer is several and Merged(body, dict(a=body), {}, 3).tokenizers == dict(a=3)
    merged = merge([tiny(), tiny(seed=1)], method='average', **QUIET)
    merged.recipe = None
    merged.save_pretrained(tmp_path/'out')
    assert not (tmp_path/'out'/'recipe.yml').exists() and 'No recipe was recorded.' in (tmp_path/'out'/'README.md').read_text()
    assert _auto_class(merged) == 'AutoModelForSequenceClassification'
    tagger = BertForTokenClassification(merged.body.config)
    assert _auto_class(dict(a=tagger, b=tagger)) == 'AutoModelForTokenClassification' and _auto_class(dict(merged, b=tagger)) == 'AutoModel'

def test_tokenizers_of_a_folder(tmp_path):
    tiny().config.save_pretrained(tmp_path)
    for t in 'ab': tiny().config.save_pretrained(tmp_path/t)
    assert _load_tokenizers(tmp_path, ['a', 'b']) is None
    tokenizer(tmp_path/'own').save_pretrained(tmp_path/'a')
    found = _load_tokenizers(tmp_path, ['a', 'b'])
    assert list(found) == ['a', 'b'] and found['b'] is None and 'rains' in found['a'].get_vocab()

def test_a_recipe_as_text(tmp_path, monkeypatch):
    here = tmp_path/'in'
    recipe = dict(models=dict(a=str(here/'a'), b=dict(model=str(tmp_path/'bé'), weight_hash='x'), c='someone/model'), fishers=dict(a=str(here/'a.safetensors')), seed=3)
    near = public_recipe(recipe, here)
    assert near == dict(models=dict(a='./a', b=dict(model='../bé', weight_hash='x'), c='someone/model'), fishers=dict(a='./a.safetensors'), seed=3)
    assert public_recipe(recipe, None)['models'] == dict(a=None, b=dict(model=None, weight_hash='x'), c='someone/model')
    here.mkdir()
    (here/'r.yml').write_text(recipe_text(near), encoding='utf-8')
    assert load_recipe(here/'r.yml') == recipe and '../bé' in (here/'r.yml').read_text(encoding='utf-8')
    check_named(here/'r.yml')
    gone = dict(models=dict(a=None, b='x'), fishers=dict(a=dict(file=None)), base=None, seed=None)
    assert unnamed(gone) == ["`models` of 'a'", "`fishers` of 'a'", '`base`'] and 'a: null  # in memory' in recipe_text(gone) and 'seed: null\n' in recipe_text(gone)
    (here/'r.yml').write_text(recipe_text(gone))
    with pytest.raises(ValueError, match='r.yml: this recipe has no name for'): check_named(here/'r.yml')

@pytest.mark.parametrize('text, say', [('models: 3', "`models`.* a mapping from task to value"), ('models: [a]', "a mapping from task to value"), ('- a', 'r.yml is not a recipe'),
                                       ('models: {3: a}', 'a task must be a word, got 3'), (f'models: {{a: {"x"*300}}}', '`models` of .a.*a folder or Hub id')], ids=lambda o: None)
def test_a_recipe_that_is_none(tmp_path, text, say):
    (tmp_path/'r.yml').write_text(text)
    with pytest.raises(ValueError, match=say): load_recipe(tmp_path/'r.yml')

def test_where_a_base_is_from(tmp_path):
    tiny().save_pretrained(tmp_path/'base')
    known, none = dict(base='base', base_source=dict(hub=False, revision=None, card=None)), dict(base=None, base_source=None)
    assert describe_base(None) == describe_base(tiny().base_model.state_dict()) == none and describe_base(tmp_path/'base').keys() == known.keys()
    assert describe_base(tmp_path/'base')['base_source'] == known['base_source'] == describe_base(tiny())['base_source']
    assert _base_entry('someone/model', 'h', dict(revision='c')) == dict(model='someone/model', weight_hash='h', revision='c')
    assert _base_entry('someone/model', 'h', dict(revision=None)) == dict(model='someone/model', weight_hash='h')
    assert _base_entry(tmp_path/'base', 'h', dict(revision='c')) == dict(model=str((tmp_path/'base').resolve()), weight_hash='h')
    assert _base_entry(tiny(), 'h', None) == dict(model=None, weight_hash='h')

def test_bodies_without_heads_have_no_fingerprint_of_one():
    merged = merge(dict(a=tiny().base_model, b=tiny(seed=1).base_model), method='average', **QUIET)
    assert all(set(o) == {'model', 'weight_hash'} for o in merged.recipe['models'].values())

def test_statistics_belong_to_their_models():
    for known, have in ((None, 'a'), ('a', None), ('a', 'a')): check_measured_on('It', dict(weight_hash=known), have)
    with pytest.raises(ValueError, match=r'It was measured on other weights \(a\) than its model has \(b\)'): check_measured_on('It', dict(weight_hash='a'), 'b')
    def found(*variants): return {str(i): SimpleNamespace(meta=dict(variant=o)) for i, o in enumerate(variants)}
    for variant in ('paper', None): check_alike(found('paper', 'paper'), variant)
    check_alike({'a': SimpleNamespace(meta={})}, 'paper')
    check_alike(found('released'), None)
    with pytest.raises(ValueError, match="the Fishers are of variant 'released', the merge is 'paper'"): check_alike(found('released', 'released'), 'paper')
    with pytest.raises(ValueError, match='the Fishers differ in variant'): check_alike(found('released', 'paper'), None)

def test_weights_are_in_memory_and_whole(tmp_path):
    _check_present('It', dict(w=torch.ones(1)))
    with pytest.raises(ValueError, match="It: the weights of 'w' are not in memory"): _check_present('It', dict(v=torch.ones(1), w=torch.ones(1, device='meta')))
    model = tiny(dtype=torch.float32)
    model.save_pretrained(tmp_path/'base')
    file = tmp_path/'base'/'model.safetensors'
    body = {k: v for k, v in load_file(file).items() if 'layer.1.output.dense.bias' not in k}
    save_file(body, file, dict(format='pt'))
    with pytest.raises(ValueError, match="`base` does not fit the models: encoder.layer.1.output.dense.bias is missing, expected"): load_base(tmp_path/'base', model)
    with pytest.raises(TypeError, match='`base` must be a model, .*got int'): load_base(3, model)

def test_every_thread_has_one_of_torchs():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with _workers(2) as work: assert list(work(lambda _: torch.get_num_threads(), range(3))) == [1, 1, 1]
        with _workers(1) as work: assert work is map and torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)

def test_all_data_are_looked_at_before_any_is_measured(monkeypatch):
    models = [tiny(), tiny(seed=1)]
    monkeypatch.setattr(run, 'measure', lambda *args, **kw: pytest.fail('it was measured'))
    with pytest.raises(ValueError, match="data of 'task1': "): merge(models, data=[ragged_batches(), [dict(labels=torch.zeros(2).long())]], **QUIET)

def test_every_page_of_methods_is_imported(monkeypatch):
    seen = []
    def note(name): return seen.append(name) or importlib.import_module(name)
    monkeypatch.setattr(method, 'import_module', note)
    load_methods.__wrapped__()
    assert {f'fisher_nodes.methods.{o}' for o in ('average', 'dare', 'full_fisher', 'mask_fisher', 'regmean', 'released', 'task_vectors', 'ties')} <= {*seen}
    assert list(METHODS) == sorted(METHODS)

def test_a_method_is_what_was_registered(monkeypatch):
    monkeypatch.setitem(METHODS, 'mine', None)
    def rule(job, scale:float=1.): "One."
    def other(job): "Another."
    assert merge_method('mine')(rule) is merge_method('mine')(rule) is METHODS['mine'].rule is rule
    with pytest.raises(ValueError, match="there is a method 'mine' already"): merge_method('mine')(other)
    for bad, say in ((lambda task: None, "must be `job`, got 'task'"), (lambda job, seed=0: None, "cannot have an option 'seed'"), (lambda job, x=3: None, "option 'x' .* needs a type")):
        with pytest.raises(ValueError, match=say): merge_method('another')(bad)
    assert 'another' not in METHODS
    monkeypatch.setitem(STATISTICS, 'mine', None)
    assert statistic('mine', kind=MaskFisher, what='It')(rule) is STATISTICS['mine'].collect is rule

def test_what_a_check_says_is_what_a_caller_reads():
    with pytest.raises(ValueError, match='^`weights` must be finite, not negative and not all zero, got'): ask([tiny(), tiny()], method='average', weights=[0, 0])
    with pytest.raises(ValueError, match='^`label` is 3; expected the name of a column, or one for each task$'): ask([tiny()], data=[ragged_batches()], label=3)
    assert method.in_shell('`weights` and `max_length=`, not `nothing`') == '--weights and --max-length, not `nothing`' and method.in_shell('r.yml: `weights`') == 'r.yml: `weights`'

def test_what_is_sent_to_the_hub(monkeypatch):
    calls = []
    class Api:
        def __init__(self, token=None): self.token = token
        def whoami(self): return dict(name='me')
        def create_repo(self, name, **kw): calls.append((name, kw))
        def create_branch(self, name, **kw): calls.append((name, kw))
        def create_commit(self, name, files, **kw): return calls.append((name, {o.path_in_repo for o in files}, kw)) or SimpleNamespace(commit_url='url')
    monkeypatch.setattr(saving, 'HfApi', Api)
    merged = merge(dict(a=tiny(), b=tiny(seed=1)), method='average', **QUIET)
    files = {'README.md', 'config.json', 'merge_report.json', 'model.safetensors', 'recipe.yml'}
    files |= {f'{t}/{o}' for t in 'ab' for o in ('config.json', 'model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors', 'model.safetensors.index.json')}
    repo = dict(private=True, exist_ok=True)
    for how, branch in ((dict(), []), (dict(revision='next'), [('me/two', dict(branch='next', exist_ok=True))]), (dict(revision='next', create_pr=True), [])):
        calls.clear()
        assert merged.push_to_hub('two', private=True, token='good', **how) == 'url'
        assert calls == [('me/two', repo), *branch, ('me/two', files, dict(commit_message='Merge a, b', revision=None, create_pr=False) | how)]
    assert merged.push_to_hub('you/two', token='good', commit_message='Again') == 'url' and calls[-1][0] == 'you/two' and calls[-1][2]['commit_message'] == 'Again'

@pytest.mark.parametrize('places, device, say', [({}, None, None), ({}, 'cpu', None), (dict(a=0, b=0), 'cpu', None), (dict(a=0, b='cpu'), None, None),
                                                 (dict(a=0, b='cpu'), 'cuda', "the model is placed on .'0', 'cpu'.; `device` would move all of it to cuda")])
def test_a_model_on_several_devices_stays_there(places, device, say):
    model = torch.nn.Linear(2, 2)
    model.hf_device_map = places
    if say is None: check_placed(model, device)
    else:
        with pytest.raises(ValueError, match=say): check_placed(model, device)
    with pytest.raises(ValueError, match="the weights of 'weight' are offloaded"): check_placed(torch.nn.Linear(2, 2, device='meta'))

def test_what_is_no_tensor_stays_where_it_is():
    with torch.inference_mode(): made = torch.ones(2)
    assert to_device('a', torch.device('cpu')) == 'a' and not to_device(made, torch.device('cpu')).is_inference()

def test_a_report_names_files_of_sentence_transformers_only(tmp_path):
    report, file = merge([tiny(), tiny(seed=1)], method='average', **QUIET).report, tmp_path/'merge_report.json'
    for names in ([], ['modules.json', '1_Pooling/config.json', 'sentence_bert_config.json'], ['../x'], ['x/modules.json']):
        files = dict.fromkeys(names, {})
        file.write_text(json.dumps(report | dict(sentence_transformers=dict(files=files))))
        if not {'../x', 'x/modules.json'} & {*names}: assert kept_files(read_report(file)) == files
        else:
            with pytest.raises(ValueError, match=f"merge_report.json is not a merge report: '{names[0]}' is not a file of sentence-transformers"): read_report(file)
    file.write_text(json.dumps(report | dict(seed='x')))
    with pytest.raises(ValueError, match='is not a merge report: `seed` must be a whole number'): read_report(file)

def test_what_a_card_states(tmp_path):
    tiny().config.save_pretrained(tmp_path)
    config, card = AutoConfig.from_pretrained(tmp_path), tmp_path/'README.md'
    assert read_card(config) is None
    for text, want in (('# no metadata', {}), ('---\n\n---\n', {}), ('---\nlicense: mit\nlanguage: [de, en]\nother: x\n---\n', dict(license='mit', language=['de', 'en']))):
        card.write_text(text)
        assert read_card(config) == want
    card.write_text('---\n- a\n---\n')
    assert read_card(config) == dict(error='its metadata are no mapping, but list')

def test_which_modules_can_be_kept(tmp_path):
    tiny().config.save_pretrained(tmp_path)
    config, kind = AutoConfig.from_pretrained(tmp_path), 'sentence_transformers.models.'
    def read(*modules):
        (tmp_path/'modules.json').write_text(json.dumps(modules))
        return read_modules(config)
    first, pooling = dict(type=f'{kind}Transformer', path=''), dict(type=f'{kind}Pooling', path='1_Pooling')
    (tmp_path/'1_Pooling').mkdir()
    for name in ('1_Pooling/config.json', 'sentence_bert_config.json'): (tmp_path/name).write_text('{"a": 1}')
    assert read(first, pooling) == {'modules.json': [first, pooling], 'sentence_bert_config.json': dict(a=1), '1_Pooling/config.json': dict(a=1)}
    for bad, say in ((['x'], 'not a list of modules'), ([first, dict(type=f'{kind}Dense', path='2_Dense')], 'has weights or code of its own'),
                     ([dict(type='mine.Pooling', path='')], 'has weights or code of its own'), ([first, first], "is in ''"), ([pooling], "is in '1_Pooling'")):
        with pytest.raises(ValueError, match=say): read(*bad)

@pytest.mark.parametrize('text, say', [('method: average', '`models` is missing'), ('models: {a: b}\nmade: up', "there is no key 'made'"), ('models: {a: ./gone}\nmethod: average', 'gone is not there'),
                                       ('models: {a: b}\nmethod: average\ntokenizer: mine', '`tokenizer` must be a tokenizer of transformers, got str; a recipe has none'),
                                       ('models: {a: b}\nmethod: average\nfishers: {a: {hash: x}}', '`fishers` of .a. must be a file, or a mapping')])
def test_a_recipe_that_asks_for_what_cannot_be(tmp_path, text, say):
    file = tmp_path/'r.yml'
    file.write_text(text)
    with pytest.raises(ValueError, match=f'^r.yml: .*{say}'): read_recipe(file)
    file.write_text('models: {a: b}\nmethod: average\ntokenizer: null\nseed: 4')
    assert read_recipe(file).tokenizer is None and read_recipe(file).seed == 4

def test_a_recipe_has_what_was_asked():
    model, state = tiny(), tiny(seed=1).base_model.state_dict()
    def written(origin=None, **asked): return merge_recipe(ask(dict(a=model), **asked), dict(a=model), dict(a=7), {'a': 'h', None: 'b'}, origin)
    common = {'models', 'method', 'weights', 'seed', 'versions'}
    assert written(method='average').keys() == common
    found = written(method='ties', base=state, density=.5, seed=2)
    assert found['base'] == dict(model=None, weight_hash='b') and found['options'] == dict(density=.5, scale=1.) and found.keys() == common | {'base', 'options'} and found['seed'] == 2
    found = written(data=['rows.csv'], text='b', scheme='rows', labels='exact', tokenizer=SimpleNamespace(get_vocab=dict), loss=lambda model, batch: None)
    assert found.keys() == common | {'variant', 'scheme', 'data', 'num_samples', 'labels', 'precision', 'max_length', 'text', 'loss', 'tokenizer'}
    assert (found['scheme'], found['data'], found['max_length'], found['text'], found['loss'], found['tokenizer']) == ('rows', dict(a='rows.csv'), dict(a=7), 'b', None, None)
    assert _measuring(ask(dict(a=model), data=['rows.csv']), dict(a=None)) == dict(num_samples=128, labels='empirical', precision=None)

def test_a_task_finds_its_head_among_many_files(tmp_path):
    merged = merge(dict(a=tiny(), b=tiny(seed=1)), method='average', **QUIET)
    merged.save_pretrained(tmp_path/'out', max_shard_size='9KB')
    where = json.loads((tmp_path/'out'/'a'/'model.safetensors.index.json').read_text())['weight_map']
    assert len(set(where.values())) > 3 and where.keys() == merged['a'].state_dict().keys()
    for file in set(where.values()): assert {k for k, v in where.items() if v == file} == load_file(tmp_path/'out'/'a'/file).keys()

def test_models_are_opened_as_they_are_stored(tmp_path):
    tiny(dtype=torch.float16).save_pretrained(tmp_path/'half')
    config = tmp_path/'half'/'config.json'
    config.write_text(json.dumps(json.loads(config.read_text()) | {'dtype': 'float32'}))
    found = skeletons.open_plain(ModelReference(str(tmp_path/'half')), AutoModelForSequenceClassification)
    assert {o.dtype for o in found.body.tensors.values()} == {torch.float32} and {o.stored for o in found.body.tensors.values()} == {torch.float16}
    tiny().base_model.save_pretrained(tmp_path/'bare')
    bare = skeletons.open_stored('a', tmp_path/'bare')
    assert type(bare.model).__name__ == 'BertModel' and {*bare.body.tensors} == {*found.body.tensors}
    (tmp_path/'bare'/'config.json').write_text(config.read_text())
    with pytest.raises(ValueError, match='has no weights for classifier.bias, classifier.weight; is it fine-tuned'): skeletons.open_stored('a', tmp_path/'bare')
    asked = []
    class Auto:
        @staticmethod
        def from_config(config, **kw): return asked.append(kw) or AutoModelForSequenceClassification.from_config(config)
    skeletons.open_plain(ModelReference(str(tmp_path/'half')), Auto)
    assert asked == [dict(trust_remote_code=False)]

def test_a_fisher_has_the_kinds_and_layers_of_its_model():
    fisher, nodes = MaskFisher(torch.ones(2, 4), torch.ones(2, 6)), dict(head=[4, 4], row=[6, 6])
    check_fisher('a', fisher, nodes)
    for more in (dict(head=[4]*3, row=[6]*3), dict(head=[4, 4], row=[6]*3)):
        with pytest.raises(ValueError, match="Fisher of 'a' has 2 layers of heads and 2 of rows; the model has"): check_fisher('a', fisher, more)
    with pytest.raises(ValueError, match="Fisher of 'a' has no nodes of kind 'group'"): check_fisher('a', fisher, nodes | dict(group=[2, 2]))

def test_roles_of_a_fused_matrix():
    def rows(order, groups=1): return {k: v.tolist() for k, v in split_roles(dict(a=4, b=2), order, groups).items()}
    assert rows('blocks') == rows('groups') == dict(a=[0, 1, 2, 3], b=[4, 5]) and rows('groups', 2) == dict(a=[0, 1, 3, 4], b=[2, 5])
