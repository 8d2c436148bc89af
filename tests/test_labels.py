"""A head that counts its classes in another order is found, by name or by rows; a head that learned nothing is not blamed."""
import itertools
import json
import warnings
from copy import deepcopy

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from transformers import BertModel

from fisher_nodes.tasks.evaluation import evaluate, predict
from fisher_nodes.tasks.labels import (
    best_order, check_alignment, head_linear, judge_order, name_order, reorder_labels)
from fisher_nodes.tasks.tasks import GLUE, Task
from reference import collate, examples, split, tiny

MNLI = GLUE['mnli'].labels
ORDERS = {n: list(itertools.permutations(range(n))) for n in (2, 3)}
TASK = {2: 'rte', 3: 'mnli'}


def learned(family='bert', num_labels=3, dtype=torch.float32, right=.75, n=400):
    "A model and rows of which it is right about a share: its own answers are the labels, the rest is drawn."
    model, found = tiny(family, num_labels, dtype=dtype, std=.5), examples(n, num_labels)
    ds = Dataset.from_list([dict(input_ids=o['input_ids']) for o in found])
    with torch.no_grad(): head_linear(model).bias -= predict(model, ds, progress=False).mean(0)
    answers, rng = predict(model, ds, progress=False).argmax(-1).numpy(), np.random.default_rng(0)
    return model, ds.add_column('label', np.where(rng.random(n) < right, answers, rng.integers(0, num_labels, n)))


def named(model, *names):
    new = deepcopy(model)
    new.config.id2label, new.config.label2id = dict(enumerate(names)), {o: i for i, o in enumerate(names)}
    return new


def check(model, data, task='mnli', **kw): return check_alignment(model, data, task, progress=False, **kw)


# --- reordering -----------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize('order', ORDERS[3])
def test_reordered_logits_are_the_logits_reordered(family, order, dtype):
    model, ds = learned(family, dtype=dtype, n=20)
    before, logits = {k: v.clone() for k, v in model.state_dict().items()}, predict(model, ds, progress=False)
    new = reorder_labels(model, order)
    assert_close(predict(new, ds, progress=False), logits[:, list(order)], rtol=0, atol=0)
    assert new is not model and type(new) is type(model) and new.dtype == dtype
    for k, v in model.state_dict().items():
        assert torch.equal(v, before[k]) and v.data_ptr() != new.state_dict()[k].data_ptr()
    for (k, a), b in zip(new.base_model.state_dict().items(), model.base_model.state_dict().values()): assert torch.equal(a, b), k


def test_names_move_and_bare_names_stay(tmp_path):
    model = named(tiny(), 'contradiction', 'neutral', 'entailment')
    new = reorder_labels(model, (2, 0, 1))
    assert new.config.id2label == {0: 'entailment', 1: 'contradiction', 2: 'neutral'}
    assert new.config.label2id == dict(entailment=0, contradiction=1, neutral=2)
    assert model.config.id2label[0] == 'contradiction'
    bare = reorder_labels(tiny(), (2, 0, 1))
    assert bare.config.id2label == {i: f'LABEL_{i}' for i in range(3)}
    new.save_pretrained(tmp_path)
    again = reorder_labels(tmp_path, (1, 2, 0))
    assert again.config.id2label == model.config.id2label
    for a, b in zip(again.parameters(), model.parameters()): assert torch.equal(a, b)


def test_flags_are_copied_and_kept():
    model = tiny().train()
    model.bert.encoder.layer[0].eval().requires_grad_(False)
    def flags(m): return [o.training for o in m.modules()], [p.requires_grad for p in m.parameters()]
    before = flags(model)
    assert flags(reorder_labels(model, (0, 2, 1))) == before == flags(model)


@pytest.mark.parametrize('order', [(0, 1), (0, 1, 2, 3), (0, 0, 1), (1, 2, 3), (-1, 0, 1), (0., 1., 2.), 'abc', '012', 1, None, (), [[0], [1], [2]], {}])
def test_not_a_permutation(order):
    with pytest.raises(ValueError, match='`order` must hold each of 0 to 2 once, got '): reorder_labels(tiny(), order)


def test_numpy_and_torch_orders_will_do():
    for order in (np.array([2, 0, 1]), torch.tensor([2, 0, 1]).tolist(), iter([2, 0, 1])):
        assert torch.equal(reorder_labels(tiny(), order).classifier.weight, tiny().classifier.weight[[2, 0, 1]])


def test_no_head():
    with pytest.raises(ValueError, match='BertModel has no head of 2 outputs'): reorder_labels(BertModel(tiny(num_labels=2).config), (1, 0))


# --- names ----------------------------------------------------------------------------------

@pytest.mark.parametrize('order', ORDERS[3])
def test_names_in_every_order(order):
    model = named(tiny(), *(MNLI[i].upper() for i in order))
    if order == (0, 1, 2):
        found = check(model, None)
        assert (found['decided_by'], found['aligned'], found['undecided'], found['num_examples']) == ('names', True, False, 0)
        return
    with pytest.raises(ValueError) as e: check(model, None)
    fits = name_order([MNLI[i] for i in order], MNLI)
    assert f'reorder_labels(model, {fits})' in str(e.value) and MNLI[order[0]] in str(e.value)
    assert check(reorder_labels(model, fits), None)['decided_by'] == 'names'


@pytest.mark.parametrize('names', [('LABEL_0', 'LABEL_1', 'LABEL_2'), ('LABEL_2', 'LABEL_1', 'LABEL_0'), ('0', '1', '2'), ('yes', 'maybe', 'no'),
                                   ('entailment', 'entailment', 'neutral')])
def test_names_that_do_not_tell(names):
    model, ds = learned()
    assert check(named(model, *names), ds)['decided_by'] == 'rows'
    with pytest.raises(ValueError, match='`data` must be a datasets.Dataset'): check(named(model, *names), None)


def test_bare_names_of_a_file_say_nothing_either():
    model, ds = learned(num_labels=2)
    task = Task('mine', ('text',), ('LABEL_0', 'LABEL_1'))
    assert check(model, ds, task)['decided_by'] == 'rows'
    with pytest.raises(ValueError, match='reorder_labels'): check(reorder_labels(model, (1, 0)), ds, task)


def test_heads_of_another_size():
    with pytest.raises(ValueError, match='task rte has 2 labels, but the model has 3'): check(tiny(), None, 'rte')
    with pytest.raises(ValueError, match='task mnli has 3 labels, but the model has 2'): check(tiny(num_labels=2), None)
    with pytest.raises(ValueError, match='is about classes, but the model predicts numbers'): check(tiny(num_labels=1), None)
    with pytest.raises(ValueError, match='is about numbers, but the model predicts classes'): check(tiny(), None, 'stsb')
    with pytest.raises(ValueError, match='unknown task'): check(tiny(), None, 'mnil')


def test_regression_has_no_order():
    found = check(tiny(num_labels=1), None, 'stsb')
    assert (found['decided_by'], found['aligned'], found['undecided']) == ('nothing', True, False)


# --- rows -----------------------------------------------------------------------------------

@pytest.mark.parametrize('num_labels', [2, 3])
def test_every_order_is_found(family, num_labels):
    model, ds = learned(family, num_labels)
    task, own = TASK[num_labels], check(model, ds, TASK[num_labels])
    assert own['aligned'] is True and own['best_order'] == list(range(num_labels)) and own['accuracy'] == own['best_accuracy'] > .7
    for order in ORDERS[num_labels][1:]:
        turned = reorder_labels(model, order)
        with pytest.raises(ValueError) as e: check(turned, ds, task)
        fits = tuple(int(i) for i in np.argsort(order))
        assert f'reorder_labels(model, {fits})' in str(e.value) and task in str(e.value) and type(model).__name__ in str(e.value)
        assert f'{own["accuracy"]:.3f} in the order {fits}' in str(e.value)
        assert check(reorder_labels(turned, fits), ds, task) == own


def test_finding_is_what_evaluate_says_and_goes_into_json():
    model, ds = learned()
    found = check(model, ds, num_samples=None)
    assert found['num_examples'] == 400
    assert found['accuracy'] == pytest.approx(evaluate(model, ds, 'mnli', progress=False)['accuracy'], rel=1e-12)
    assert json.loads(json.dumps(found)) == found


def test_seed_decides_the_sample():
    model, ds = learned()
    a, b, c = [check(model, ds, num_samples=64, seed=seed) for seed in (0, 0, 1)]
    assert a == b and a['margin'] != c['margin'] and a['num_examples'] == 64


def test_own_batches_and_text():
    model, ds = learned()
    rows = [dict(input_ids=o['input_ids'], attention_mask=[1]*len(o['input_ids']), labels=o['label']) for o in ds]
    batches = [collate(o) for o in split(rows, (3, 100, 50))]
    assert check(model, batches, num_samples=None)['accuracy'] == check(model, ds, num_samples=None)['accuracy']
    assert check(model, batches, num_samples=120)['num_examples'] == 120
    with pytest.raises(ValueError, match='tokenise it or give `tokenizer=`'):
        check(model, Dataset.from_dict(dict(text=['a'], label=[0])))


def test_model_and_random_states_as_they_were():
    model, ds = learned()
    model.train().bert.pooler.eval().requires_grad_(False)
    def state(): return ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()], torch.get_rng_state().tolist(),
                         repr(np.random.get_state()), repr(model.config))
    before = state()
    check(model, ds)
    with pytest.raises(ValueError): check(reorder_labels(model, (1, 2, 0)), ds)
    assert state() == before


@pytest.mark.parametrize('bad,say', [
    (dict(num_samples=0), '`num_samples` must be a whole number of at least 1'), (dict(num_samples=2.5), '`num_samples` must be a whole number of at least 1'),
    (dict(device='nowhere'), "no device 'nowhere'")])
def test_bad_options(bad, say):
    model, ds = learned(n=20)
    with pytest.raises(ValueError, match=say): check(model, ds, **bad)


@pytest.mark.parametrize('change,say', [
    (lambda ds: ds.select([]), '`data` is empty'), (lambda ds: ds.remove_columns('label'), 'no `labels` or `label` column'),
    (lambda ds: ds.remove_columns('label').add_column('label', [3]*20), 'label 3 of row'),
    (lambda ds: ds.remove_columns('label').add_column('label', [-1]*20), 'label -1 of row')])
def test_bad_rows(change, say):
    model, ds = learned(n=20)
    with pytest.raises(ValueError, match=say): check(model, change(ds))


# --- chance ---------------------------------------------------------------------------------

@pytest.mark.parametrize('answer', [0, 1, 2])
@pytest.mark.parametrize('shares', [(.6, .3, .1), (.33, .67, 0), (.01, .01, .98)])
def test_a_head_with_one_answer_is_not_blamed(answer, shares):
    labels = np.random.default_rng(0).choice(3, 256, p=shares)
    found = judge_order(labels, np.full(256, answer), 3)
    assert found['undecided'] and found['aligned'] is None


@pytest.mark.parametrize('num_labels', [2, 3])
def test_guesses_are_undecided_and_warn_once(num_labels):
    model, ds = learned(num_labels=num_labels, right=0., n=256)
    ds = ds.remove_columns('label').add_column('label', np.random.default_rng(10).integers(0, num_labels, 256))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        found = check(model, ds, TASK[num_labels])
    assert found['undecided'] and len(caught) == 1 and caught[0].filename == __file__
    assert 'do not tell in which order its outputs' in str(caught[0].message)


def test_no_warning_where_the_rows_tell(recwarn):
    check(*learned())
    assert not [o for o in recwarn if 'do not tell' in str(o.message)]


@pytest.mark.parametrize('n', [1, 2, 3, 4])
def test_four_rows_blame_nobody(n):
    assert judge_order(np.arange(n) % 2, (np.arange(n)+1) % 2, 2)['undecided']


@pytest.mark.parametrize('shares', [(.5, .5), (.9, .1), (.4, .3, .3), (.8, .1, .1)])
def test_guessing_is_blamed_and_praised_as_rarely_as_promised(shares):
    rng, n, clear = np.random.default_rng(1), len(shares), 0
    for _ in range(1000):
        found = judge_order(rng.choice(n, 256, p=shares), rng.choice(n, 256, p=rng.dirichlet([1]*n)), n)
        clear += not found['undecided'] and not found['aligned']
    assert clear <= .035*1000


@pytest.mark.parametrize('num_labels,accuracy', [(2, .65), (3, .5)])
def test_a_weak_head_is_still_found(num_labels, accuracy):
    "What bert-tiny reaches on RTE and a poor model on MNLI, on 256 rows."
    rng, found = np.random.default_rng(0), 0
    share = (accuracy-1/num_labels)/(1-1/num_labels)
    for _ in range(200):
        labels = rng.integers(0, num_labels, 256)
        answers = np.where(rng.random(256) < share, (labels+1) % num_labels, rng.integers(0, num_labels, 256))
        found += judge_order(labels, answers, num_labels)['aligned'] is False
    assert found > .95*200


def balanced(shares, order): return sum(shares[c, o] for c, o in enumerate(order))


@pytest.mark.parametrize('n,seed', itertools.product((2, 3, 4, 5), range(20)))
def test_best_orders_against_all_permutations(n, seed):
    shares = np.random.default_rng(seed).integers(0, 30, (n, n))/30
    orders = list(itertools.permutations(range(n)))
    best = max(balanced(shares, o) for o in orders)
    assert balanced(shares, best_order(shares)) == pytest.approx(best, rel=1e-12)
    for order in orders[::7]:
        other = best_order(shares, but=order)
        best = max(balanced(shares, o) for o in orders if o != order)
        assert balanced(shares, other) == pytest.approx(best, rel=1e-12)
        assert other != order and sorted(other) == list(range(n))


def test_two_orders_that_fit_alike():
    model, ds = learned(n=400)
    answers = predict(model, ds, progress=False).argmax(-1).numpy()
    labels = np.where(answers == 1, 0, np.random.default_rng(0).choice([1, 2], 400))
    with pytest.raises(ValueError, match=r'in the order \(1, [02], [02]\), and \(1, [02], [02]\) is about as good; to use'):
        check(model, ds.remove_columns('label').add_column('label', labels), num_samples=None)


def test_finding_is_a_loop_over_rows():
    "Accuracies, and the margin in accuracy averaged over classes, whatever the order of the rows."
    rng = np.random.default_rng(0)
    labels, answers = rng.choice(3, 50, p=[.5, .4, .1]), rng.integers(0, 3, 50)
    found, own = judge_order(labels, answers, 3), (0, 1, 2)
    pairs = list(zip(labels.tolist(), answers.tolist()))
    def fair(order): return np.mean([np.mean([order[y] == o for y, o in pairs if y == c]) for c in own])
    ranked = sorted(ORDERS[3], key=fair, reverse=True)
    assert tuple(found['best_order']) == ranked[0] and tuple(found['next_order']) == ranked[1]
    assert found['lead'] == pytest.approx(fair(ranked[0])-fair(ranked[1]), rel=1e-12)
    assert found['margin'] == pytest.approx(fair(own)-fair(ranked[ranked[0] == own]), rel=1e-12)
    assert found['accuracy'] == pytest.approx(np.mean([y == o for y, o in pairs]), rel=1e-12)
    assert found['best_accuracy'] == pytest.approx(np.mean([ranked[0][y] == o for y, o in pairs]), rel=1e-12)
    assert found['clear_margin'] == pytest.approx(2/(3*np.bincount(labels).min())**.5, rel=1e-12)
    shuffle = rng.permutation(50)
    assert judge_order(labels[shuffle], answers[shuffle], 3) == found


def test_classes_that_do_not_occur_and_many_classes():
    labels, answers = np.array([0, 1]*20), np.array([1, 0]*20)
    found = judge_order(labels, answers, 4)
    assert found['undecided'] and found['aligned'] is None and found['best_order'] == [1, 0, 2, 3]
    assert judge_order(labels, answers, 2)['aligned'] is False
    for n in (2, 3, 5): assert judge_order(np.arange(300) % n, np.arange(300) % n, n)['aligned'] is True
    labels = np.arange(600) % 60
    assert judge_order(labels, labels, 60)['undecided'] and judge_order(labels, (labels+7) % 60, 60)['aligned'] is False
    assert judge_order(labels, (labels+7) % 60, 60)['best_order'] == np.roll(np.arange(60), -7).tolist()


def test_every_wrong_class_is_found_among_ten():
    "Two of many classes exchanged, in rows that the rest of the head answers well."
    labels = np.arange(4000) % 10
    turned = np.array([0, 1, 5, 3, 4, 2, 6, 7, 8, 9])
    found = judge_order(labels, turned[labels], 10)
    assert found['aligned'] is False and found['best_order'] == turned.tolist()
