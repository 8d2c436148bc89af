"""Data specs: every fault of a file or folder, and the Hub path against a local Hub cache."""
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, load_dataset
from pyarrow import parquet

from fisher_nodes.tasks.tasks import (
    GLUE, METRICS, PAPER_TASKS, Task, load_task, score_predictions, task_metric)

ROWS = [dict(text='profit rose', label=0), dict(text='wheat fell', label=1), dict(text='corn', label=1)]


def write(path, rows):
    if path.suffix == '.jsonl': path.write_text('\n'.join(map(json.dumps, rows)))
    elif path.suffix == '.csv': path.write_text('\n'.join(','.join(map(str, o)) for o in [rows[0], *map(dict.values, rows)]))
    else: parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize('kind', ['parquet', 'csv', 'jsonl'])
@pytest.mark.parametrize('labels,names,ids', [
    ([0, 1, 1], ('LABEL_0', 'LABEL_1'), [0, 1, 1]),
    (['no', 'yes', 'no'], ('no', 'yes'), [0, 1, 0]),
    (['b', 'a', 'c'], ('a', 'b', 'c'), [1, 0, 2]),
    ([.5, 1.25, 3.], (), [.5, 1.25, 3.])])
def test_files_of_all_kinds(tmp_path, kind, labels, names, ids):
    rows = [dict(idx=i, text=o['text'], label=label) for i, (o, label) in enumerate(zip(ROWS, labels))]
    ds, task = load_task(write(tmp_path/f'mine.{kind}', rows))
    assert (task.name, task.text, task.labels) == ('mine', ('text',), names)
    assert ds.column_names == ['text', 'label'] and list(ds['label']) == ids
    assert task.metrics == (('accuracy',) if names else ('pearson', 'spearmanr'))


@pytest.mark.parametrize('name,content,error,say', [
    ('a.txt', 'x', ValueError, 'a.txt: expected a file in .parquet, .csv, .tsv, .jsonl'),
    ('a.csv', None, FileNotFoundError, 'is not a file'),
    ('a.csv', 'text,kind\na,0\n', ValueError, "no column 'label' among ['text', 'kind']"),
    ('a.csv', 'id,label\n1,0\n2,1\n', ValueError, "it is not clear which columns are the text, among ['id', 'label']"),
    ('a.csv', 'a,b,c,label\nx,y,z,0\nx,y,z,1\n', ValueError, "not clear which columns are the text, among ['a', 'b', 'c', 'label']"),
    ('a.csv', 'text,label\na,0\nb,\nc,1\n', ValueError, "a.csv: column 'label' is empty in 1 rows, first in row 1"),
    ('a.csv', 'text,label\na,0\nb,-1\nc,1\n', ValueError, 'a.csv: row 1 has label -1, expected 0 to 1'),
    ('a.csv', 'text,label\na,0\nb,0\n', ValueError, "only one class, ['LABEL_0']"),
    ('a.csv', 'text,label\na,0\nb,123456\n', ValueError, 'would mean 123457 classes'),
    ('a.csv', 'text,label\na,0\nb,1,2\n', ValueError, 'a.csv cannot be read'),
    ('a.csv', 'text,label\n', ValueError, 'a.csv'),
    ('a.jsonl', '{"text": "a", "label": 0}\n{"text": ', ValueError, 'a.jsonl cannot be read'),
    ('a.jsonl', '{"text": "a", "label": [0]}\n', ValueError, 'labels must be integers, floats or strings'),
    ('a.jsonl', '{"text": "a", "label": 0}\n{"label": 1}\n', ValueError, "column 'text' is empty in 1 rows, first in row 1"),
    ('a.parquet', 'not parquet', ValueError, 'a.parquet cannot be read')])
def test_faulty_files(tmp_path, name, content, error, say):
    if content is not None: (tmp_path/name).write_text(content)
    with pytest.raises(error) as e: load_task(tmp_path/name)
    assert say in str(e.value) and '\n' not in str(e.value).strip()


def test_unknown_task_lists_known():
    with pytest.raises(ValueError, match="unknown task 'wnli'; known tasks: mnli, qqp, qnli, sst2, mrpc, rte, cola, stsb"):
        load_task('glue:wnli')


def test_names_given_fix_the_integers(tmp_path):
    path = write(tmp_path/'a.csv', [dict(text='x', label='c'), dict(text='y', label='b')])
    assert list(load_task(path, labels=('a', 'b', 'c'))[0]['label']) == [2, 1]
    with pytest.raises(ValueError, match="label 'c' is not among"): load_task(path, labels=('a', 'b'))


def test_class_names_stored_in_parquet(tmp_path):
    features = Features(text=Value('string'), label=ClassLabel(names=['spam', 'ham']))
    Dataset.from_dict(dict(text=['a', 'b'], label=[1, 1]), features).to_parquet(tmp_path/'a.parquet')
    assert load_task(tmp_path/'a.parquet')[1].labels == ('spam', 'ham')


def test_pairs_are_read_in_the_order_of_their_meaning(tmp_path):
    rows = [dict(hypothesis='a', premise='b', label=0), dict(hypothesis='c', premise='d', label=1)]
    assert load_task(write(tmp_path/'a.jsonl', rows))[1].text == ('premise', 'hypothesis')


def test_same_file_same_fingerprint(tmp_path):
    path = write(tmp_path/'a.csv', ROWS)
    assert load_task(path)[0]._fingerprint == load_task(path)[0]._fingerprint


def glue_rows(task, labels):
    return [dict(**{c: f'{c} {i}' for c in task.text}, label=o, idx=i) for i, o in enumerate(labels)]


@pytest.mark.parametrize('name', GLUE)
def test_folder_for_every_task(tmp_path, monkeypatch, name):
    task = GLUE[name]
    labels = list(range(task.num_labels)) if task.labels else [0., 5.]
    (tmp_path/name).mkdir()
    write(tmp_path/name/f'{task.validation}.parquet', glue_rows(task, labels))
    monkeypatch.setenv('FISHER_NODES_GLUE', str(tmp_path))
    ds, found = load_task(f'glue:{name}', 'validation')
    assert found is task and list(ds['label']) == labels and ds.column_names == [*task.text, 'label']
    with pytest.raises(FileNotFoundError, match='FISHER_NODES_GLUE is set, but .*train.parquet is not a file'):
        load_task(f'glue:{name}')


def test_test_split_has_no_gold_labels(tmp_path, monkeypatch):
    (tmp_path/'rte').mkdir()
    write(tmp_path/'rte'/'test.parquet', glue_rows(GLUE['rte'], [-1, -1]))
    monkeypatch.setenv('FISHER_NODES_GLUE', str(tmp_path))
    with pytest.raises(ValueError, match=r'glue/rte: row 0 has label -1, expected 0 to 1 \(-1 marks'):
        load_task('glue:rte', 'test')


def test_folder_with_wrong_columns(tmp_path, monkeypatch):
    (tmp_path/'rte').mkdir()
    write(tmp_path/'rte'/'train.parquet', [dict(sentence='a', label=0)])
    monkeypatch.setenv('FISHER_NODES_GLUE', str(tmp_path))
    with pytest.raises(ValueError, match="glue/rte: no column 'sentence1' among"): load_task('glue:rte')


HUB = """
import json
from fisher_nodes.tasks.tasks import load_task
out = {}
for split in ('train', 'validation', 'test'):
    try:
        ds, task = load_task('glue:rte', split)
        out[split] = [ds.to_list(), ds.features['label'].names, ds.info.builder_name]
    except Exception as e: out[split] = f'{type(e).__name__}: {e}'
try: load_task('glue:mrpc')
except Exception as e: out['mrpc'] = type(e).__name__
print(json.dumps(out))
"""


def hub_cache(home):
    "What `load_dataset` leaves in its cache for `nyu-mll/glue`: made from a local folder, by `datasets` itself."
    features = Features(sentence1=Value('string'), sentence2=Value('string'),
                        label=ClassLabel(names=['entailment', 'not_entailment']), idx=Value('int32'))
    labels = dict(train=[0, 1, 1], validation=[1, 0], test=[-1, -1])
    splits = {k: Dataset.from_list(glue_rows(GLUE['rte'], v), features) for k, v in labels.items()}
    repo, cache = home/'repo', home/'prepared'
    (repo/'rte').mkdir(parents=True)
    for k, ds in DatasetDict(splits).items(): ds.to_parquet(repo/'rte'/f'{k}-00000-of-00001.parquet')
    files = {k: str(repo/'rte'/f'{k}-*.parquet') for k in labels}
    info, = {os.path.dirname(o['filename']) for v in load_dataset('parquet', 'rte', data_files=files, cache_dir=cache).values()
             for o in v.cache_files}
    target = home/'datasets'/'nyu-mll___glue'/'rte'/'0.0.0'/'bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c'
    target.mkdir(parents=True)
    for file in os.listdir(info):
        text = open(os.path.join(info, file), 'rb').read()
        if file == 'dataset_info.json': text = json.dumps(json.loads(text) | dict(config_name='rte', dataset_name='glue')).encode()
        (target/file.replace('parquet-', 'glue-')).write_bytes(text)


def test_hub_path_offline(tmp_path):
    "Without the folder, rows come through `load_dataset('nyu-mll/glue', …)`, here from its cache, offline."
    hub_cache(tmp_path)
    env = {k: v for k, v in os.environ.items() if k != 'FISHER_NODES_GLUE'}
    env |= dict(HF_HOME=str(tmp_path), HF_DATASETS_CACHE=str(tmp_path/'datasets'), HF_HUB_OFFLINE='1', HF_DATASETS_OFFLINE='1')
    run = subprocess.run([sys.executable, '-c', HUB], env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    out = json.loads(run.stdout.splitlines()[-1])
    rows, names, builder = out['train']
    assert rows == [dict(sentence1=f'sentence1 {i}', sentence2=f'sentence2 {i}', label=o) for i, o in enumerate([0, 1, 1])]
    assert names == ['entailment', 'not_entailment'] and builder == 'glue/rte'
    assert [o['label'] for o in out['validation'][0]] == [1, 0]
    assert out['test'].startswith('ValueError: glue/rte: row 0 has label -1')
    assert out['mrpc'] == 'ValueError'  # not in the cache: no other data set stands in


@pytest.mark.parametrize('name', METRICS)
def test_metrics_against_formulas(name):
    rng = np.random.default_rng(0)
    p, r = rng.integers(0, 2, 50), rng.integers(0, 2, 50)
    tp, fp, fn, tn = [int(o.sum()) for o in (p & r, p & ~r & 1, ~p & r & 1, 1-(p | r))]
    rank = dict(accuracy=(tp+tn)/50, f1=2*tp/(2*tp+fp+fn))
    want = rank.get(name, np.corrcoef(p, r)[0, 1])  # phi, Pearson and Spearman agree on two values
    np.testing.assert_allclose(METRICS[name](p, r), want, rtol=1e-12)


@pytest.mark.parametrize('name,want', [('matthews_correlation', 0.), ('pearson', 0.), ('spearmanr', 0.)])
def test_constant_predictions_score_zero(name, want):
    assert METRICS[name](np.ones(4), np.array([0., 1., 0., 1.])) == want


def test_constant_references_are_refused():
    with pytest.raises(ValueError, match='all references are 1.0'): score_predictions('stsb', [0., 1.], [1., 1.])


def test_score_draws_no_random_number_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    state = np.random.get_state()[1].tolist()
    metric = task_metric(Task('t', ('text',), ('a', 'b'), ('accuracy', 'f1')))
    assert metric.compute(predictions=[1, 0], references=[1, 1]) == dict(accuracy=.5, f1=pytest.approx(2/3, rel=1e-12))
    assert np.random.get_state()[1].tolist() == state
    assert metric.data_dir == '' and metric.cache_file_name is None


def test_score_wants_as_many_of_both():
    for p, r in (([0], [0, 1]), ([], [])):
        with pytest.raises(ValueError, match='predictions for'): score_predictions('rte', p, r)


def test_six_tasks_of_the_paper():
    assert PAPER_TASKS == ('mnli', 'qqp', 'qnli', 'sst2', 'mrpc', 'rte') and GLUE['mnli'].validation == 'validation_matched'
    assert {GLUE[o].max_length for o in PAPER_TASKS} == {64, 128}


@pytest.mark.skipif('FISHER_NODES_GLUE' not in os.environ, reason='needs the real GLUE rows: set FISHER_NODES_GLUE to their folder')
@pytest.mark.parametrize('name,n', [('mnli', 9815), ('qnli', 5463), ('sst2', 872), ('mrpc', 408), ('rte', 277)])
def test_real_validation_sets(name, n):
    assert len(load_task(f'glue:{name}', 'validation')[0]) == n
