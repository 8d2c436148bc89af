"""The grid: whole runs on three tiny tasks, killed and continued, corrupt and foreign files, wrong input."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import combinations

import pandas as pd
import pytest
import torch
from torch.testing import assert_close
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, RobertaConfig, RobertaForSequenceClassification

from fisher_nodes import MaskFisher, evaluate, mask_fisher, merge, reproduce
from fisher_nodes.app.cli import main
from fisher_nodes.engine.models import load_model
from fisher_nodes.experiment.grid import (
    ABLATIONS, ENTRIES, Cell, Entry, find_entry, load_checkpoint, plan_cells, relative_error)
from fisher_nodes.experiment.results import load_results
from fisher_nodes.methods.method import METHODS
from fisher_nodes.tasks.tasks import GLUE, load_task
from conftest import SLOW
from test_processes import torchrun

WORDS = '[PAD] [UNK] [CLS] [SEP] [MASK] good fine bad dull the film was plot rather'.split()
TASKS = ('qnli', 'sst2', 'rte')
ALL = [*ENTRIES, *ABLATIONS]

def write_rows(root, task, split, n, rng):
    path = root/task.name/f'{split}.parquet'
    path.parent.mkdir(parents=True, exist_ok=True)
    label = lambda i: i % task.num_labels if task.labels else i % 11/2
    row = lambda i: {c: ' '.join(rng.choices(WORDS[5:], k=rng.randint(2, 9))) for c in task.text} | dict(label=label(i))
    pd.DataFrame([row(i) for i in range(n)]).to_parquet(path)

def save_model(folder, task, seed, kind=BertForSequenceClassification, **change):
    torch.manual_seed(seed)
    names = dict(id2label=dict(enumerate(task.labels)), label2id={o: i for i, o in enumerate(task.labels)}) if task.labels else dict(num_labels=1)
    size = dict(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, initializer_range=.6)
    config = RobertaConfig if kind is RobertaForSequenceClassification else BertConfig
    kind(config(**size | names | change)).save_pretrained(folder)

def make_checkpoints(rows, models):
    "A model for each task, and rows in GLUE's columns."
    words = models.parent/'words'
    words.mkdir(parents=True); (words/'vocab.txt').write_text('\n'.join(WORDS))
    tokenizer, rng = BertTokenizerFast.from_pretrained(words), random.Random(0)
    for i, name in enumerate(TASKS):
        task = GLUE[name]
        for split, n in ((task.train, 40), (task.validation, 20)): write_rows(rows, task, split, n, rng)
        save_model(models/name, task, i); tokenizer.save_pretrained(models/name)
    return tokenizer

@pytest.fixture(scope='module')
def here(tmp_path_factory):
    "Three checkpoints and a base, and rows in GLUE's columns."
    d = tmp_path_factory.mktemp('grid')
    tokenizer = make_checkpoints(d/'glue', d/'models')
    save_model(d/'base', GLUE['rte'], 9); tokenizer.save_pretrained(d/'base')
    return d

@pytest.fixture(autouse=True)
def glue(here, monkeypatch): monkeypatch.setenv('FISHER_NODES_GLUE', str(here/'glue'))

def scores(out): return {o.name: {k: v['scores'] for k, v in json.loads(o.read_text())['groups'].items()} for o in sorted(out.glob('*-k*.json'))}

SOME = ['average', 'dare', 'mask-fisher', 'mask-fisher-released', 'mask-fisher-exact', 'fisher-exact']
GRID = dict(tasks=TASKS, methods=SOME, samples=[8, 16], seeds=[2, 1], group_sizes=[2, 3])

@pytest.fixture(scope='module')
def whole(here, tmp_path_factory):
    "A run that nothing interrupted."
    before = os.environ.get('FISHER_NODES_GLUE')
    os.environ['FISHER_NODES_GLUE'] = str(here/'glue')
    try: yield reproduce(here/'models', tmp_path_factory.mktemp('whole'), base=here/'base', **GRID)
    finally: os.environ.pop('FISHER_NODES_GLUE') if before is None else os.environ.update(FISHER_NODES_GLUE=before)

def test_every_cell_is_there_and_complete(whole):
    cells = plan_cells(SOME, GRID['samples'], GRID['seeds'], GRID['group_sizes'])
    assert {o.file for o in cells} == set(scores(whole))
    for c in cells:
        record = json.loads((whole/c.file).read_text())
        assert set(record['groups']) == {'+'.join(g) for g in combinations(TASKS, c.group_size)}
        measured = c.num_samples is not None
        assert measured == c.name.startswith(('mask-fisher', 'fisher'))
        assert record['num_examples'] == ({t: c.num_samples for t in TASKS} if measured else {})
        assert record['versions'] and record['commit'] is not False and record['seed'] == c.seed

def test_every_entry_runs(here, tmp_path):
    out = reproduce(here/'models', tmp_path, base=here/'base', tasks=TASKS[:2], methods=ALL, samples=[8])
    assert len(scores(out)) == len(ALL)
    assert len({str(o) for n, o in scores(out).items()}) > 1

def test_scores_are_those_of_the_public_functions(here, whole):
    models = {t: load_model(here/'models'/t) for t in ('qnli', 'rte')}
    rows = {t: load_checkpoint(here/'models'/t, t) for t in models}
    fishers = {t: mask_fisher(m, load_task(f'glue:{t}')[0], num_samples=8, seed=1, tokenizer=rows[t].tokenizer, max_length=128) for t, m in models.items()}
    merged = merge(models, fishers)
    want = {t: evaluate(merged[t], load_task(f'glue:{t}', 'validation')[0], t, tokenizer=rows[t].tokenizer) for t in models}
    assert scores(whole)['mask-fisher-k2-n8-s1.json']['qnli+rte'] == want

def test_own_scores_and_majority(here, whole):
    own = json.loads((whole/'own.json').read_text())
    for t in TASKS:
        rows, task = load_task(f'glue:{t}', 'validation')
        assert own['models'][t]['scores'] == evaluate(here/'models'/t, rows, task)
        assert own['models'][t]['majority'] == max(rows['label'].count(c) for c in (0, 1))/20 if isinstance(rows['label'], list) else True
        assert (own['models'][t]['rows'], own['models'][t]['train_rows']) == (20, 40)

def test_errors_are_against_the_largest_sample(here, whole):
    found = json.loads((whole/'fisher_error.json').read_text())['errors']
    assert {o['reference'] for o in found} == {16} and {o['num_samples'] for o in found} == {8}
    assert {(o['variant'], o['labels']) for o in found} >= {('paper', 'empirical'), ('released', 'empirical'), ('paper', 'exact')}
    c = load_checkpoint(here/'models'/'rte', 'rte')
    a, b = (mask_fisher(c.model, c.train, num_samples=n, seed=0, tokenizer=c.tokenizer, max_length=128) for n in (8, 16))
    one = next(o for o in found if (o['task'], o['variant'], o['labels'], o['seed']) == ('rte', 'paper', 'empirical', 0))
    x, y = a.heads.double().flatten(), b.heads.double().flatten()
    x, y = x/x.mean(), y/y.mean()
    assert_close(one['heads'], ((x-y).square().sum().sqrt()/y.square().sum().sqrt()).item(), rtol=1e-6, atol=0)
    assert relative_error(a.rows, a.rows) == (0., 1.) or relative_error(a.rows, a.rows)[0] == 0

def run(here, out, *more, **kw):
    line = ['reproduce', '--checkpoints', here/'models', '--tasks', ','.join(TASKS), '--methods', ','.join(SOME), '--samples', '8,16',
            '--seeds', '2,1', '--group-sizes', '2,3', '--base', here/'base', '--out', out, *more]
    env = os.environ | dict(FISHER_NODES_GLUE=str(here/'glue'))
    return subprocess.Popen([sys.executable, '-c', 'from fisher_nodes.app.cli import main; main()', *map(str, line)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kw)

def test_killed_and_continued_gives_identical_results(here, whole, tmp_path):
    first = run(here, tmp_path)
    deadline = time.time()+60
    while len(list(tmp_path.glob('*-k*.json')))<3 and time.time()<deadline and first.poll() is None: time.sleep(.01)
    first.send_signal(signal.SIGKILL); first.wait()
    done = len(list(tmp_path.glob('*-k*.json')))
    assert 3 <= done < len(scores(whole))
    assert main(['reproduce', '--checkpoints', str(here/'models'), '--tasks', ','.join(TASKS), '--methods', ','.join(SOME), '--samples', '8,16',
                 '--seeds', '2,1', '--group-sizes', '2,3', '--base', str(here/'base'), '--out', str(tmp_path)]) == 0
    assert scores(tmp_path) == scores(whole)
    for a in whole.glob('cache/MaskFisher-*'):
        x, y = MaskFisher.load(a), MaskFisher.load(tmp_path/'cache'/a.name)
        assert_close(x.heads, y.heads, rtol=0, atol=0); assert_close(x.rows, y.rows, rtol=0, atol=0)

def test_a_finished_run_measures_and_merges_nothing(here, whole):
    before = {o: o.stat().st_mtime_ns for o in whole.rglob('*') if o.is_file() and o.name != 'fisher_error.json'}
    reproduce(here/'models', whole, base=here/'base', **GRID)
    assert before == {o: o.stat().st_mtime_ns for o in before}

@pytest.mark.parametrize('damage', [lambda s: s[:len(s)//2], lambda s: '', lambda s: '[1, 2]', lambda s: s.replace('"groups"', '"gruops"')])
def test_corrupt_file_is_named_and_made_again(here, tmp_path, capsys, damage):
    kw = dict(tasks=TASKS, methods=['mask-fisher'], samples=[8])
    out = reproduce(here/'models', tmp_path, **kw)
    file, cached = out/'mask-fisher-k2-n8-s0.json', sorted((out/'cache').iterdir())[0]
    want = scores(out)
    file.write_text(damage(file.read_text())); cached.write_bytes(cached.read_bytes()[:100])
    capsys.readouterr()
    reproduce(here/'models', tmp_path, **kw)
    said = ''.join(capsys.readouterr())
    assert file.name in said and cached.name in said and 'corrupt' in said
    assert scores(out) == want

@pytest.mark.parametrize('damage', ['{', '[]', '{"models": 3}'])
def test_corrupt_own_scores_are_made_again(here, tmp_path, capsys, damage):
    out = reproduce(here/'models', tmp_path, tasks=TASKS, methods=['average'])
    want = json.loads((out/'own.json').read_text())['models']
    (out/'own.json').write_text(damage)
    reproduce(here/'models', tmp_path, tasks=TASKS, methods=['average'])
    assert 'own.json' in ''.join(capsys.readouterr())
    assert json.loads((out/'own.json').read_text())['models'] == want

def test_other_weights_or_rows_do_not_mix(here, tmp_path):
    kw = dict(tasks=TASKS, methods=['average'])
    reproduce(here/'models', tmp_path/'out', **kw)
    with pytest.raises(ValueError, match='another'): reproduce(here/'models', tmp_path/'out', limit=10, **kw)
    with pytest.raises(ValueError, match='precision'): reproduce(here/'models', tmp_path/'out', precision='bf16', **kw)
    for i, t in enumerate(TASKS):
        save_model(tmp_path/'models'/t, GLUE[t], 50+i)
        BertTokenizerFast.from_pretrained(here/'words').save_pretrained(tmp_path/'models'/t)
    with pytest.raises(ValueError, match='other models'): reproduce(tmp_path/'models', tmp_path/'out', **kw)

def test_limit_takes_the_same_rows_for_all(here, tmp_path):
    out = reproduce(here/'models', tmp_path, tasks=TASKS, methods=['average'], limit=7)
    own = json.loads((out/'own.json').read_text())
    assert own['limit'] == 7 and all(o['rows'] == 7 for o in own['models'].values())
    assert load_checkpoint(here/'models'/'rte', 'rte', 7).validation[:] == load_checkpoint(here/'models'/'rte', 'rte', 7).validation[:]

def test_roberta_and_bf16(here, tmp_path):
    for i, t in enumerate(TASKS[:2]):
        save_model(tmp_path/'models'/t, GLUE[t], i, RobertaForSequenceClassification, pad_token_id=0)
        BertTokenizerFast.from_pretrained(here/'words').save_pretrained(tmp_path/'models'/t)
    out = reproduce(tmp_path/'models', tmp_path/'out', tasks=TASKS[:2], methods=['average', 'mask-fisher', 'regmean'], samples=[8], precision='bf16')
    assert all(json.loads((out/o).read_text())['precision'] == 'bf16' for o in scores(out))

BAD = {
    'unknown method \'soup\'': dict(methods=['soup']),
    'need `base`': dict(methods=['average', 'ties']),
    'groups of 4 models': dict(group_sizes=[4]),
    'groups of 1 models': dict(group_sizes=[1]),
    'at least 1': dict(samples=[0]),
    'one number of seeds': dict(samples=[8, 16, 32], seeds=[1, 2]),
    "label order for 'mnli'": dict(label_orders=dict(mnli=[1, 0, 2])),
}

@pytest.mark.parametrize('say', BAD)
def test_bad_input_is_refused_before_any_work(here, tmp_path, say):
    with pytest.raises(ValueError, match=say): reproduce(here/'models', tmp_path/'out', **dict(tasks=TASKS) | BAD[say])
    assert not (tmp_path/'out').exists()

def test_bad_lines_are_answered_with_one(here, tmp_path, capsys):
    for line in (f'--checkpoints {tmp_path}/none', f'--checkpoints {here}/models', f'--checkpoints {here}/models --tasks sst2,nope',
                 f'--checkpoints {here}/models --tasks {",".join(TASKS)} --label-order rte=0,0', f'--checkpoints {here}/models --tasks rte,sst2 --label-order rte'):
        assert main(f'reproduce {line} --out {tmp_path}/out'.split()) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1].split('\r')[-1]
        assert said.startswith('fisher-nodes reproduce:'), said

def test_a_head_that_calls_its_classes_otherwise_is_refused_by_name(here, tmp_path):
    for t in TASKS[:2]:
        save_model(tmp_path/'models'/t, GLUE[t], 0, id2label=dict(enumerate(reversed(GLUE[t].labels))),
                   label2id={o: i for i, o in enumerate(reversed(GLUE[t].labels))})
        BertTokenizerFast.from_pretrained(here/'words').save_pretrained(tmp_path/'models'/t)
    with pytest.raises(ValueError, match='qnli'): reproduce(tmp_path/'models', tmp_path/'out', tasks=TASKS[:2])
    out = reproduce(tmp_path/'models', tmp_path/'out2', tasks=TASKS[:2], methods=['average'], label_orders=dict(qnli=[1, 0], sst2=[1, 0]))
    assert len(scores(out)) == 1

@pytest.fixture
def mine(monkeypatch):
    "A method that a user registered."
    monkeypatch.setitem(METHODS, 'mine', METHODS['task-arithmetic'])

def test_a_registered_method_runs(here, tmp_path, mine):
    assert find_entry('mine') == Entry('mine')
    with pytest.raises(ValueError, match=r"\['mine'\] need `base`"): continued(here, tmp_path, methods=['mine'])
    found = scores(continued(here, tmp_path, methods=['mine', 'task-arithmetic'], base=here/'base'))
    assert found['mine-k2.json'] == found['task-arithmetic-k2.json'] and len(found) == 2

def test_a_measured_method_has_samples(monkeypatch):
    monkeypatch.setitem(METHODS, 'mine', METHODS['regmean'])
    assert [o.file for o in plan_cells(['mine'], [8], [2])] == ['mine-k2-n8-s0.json', 'mine-k2-n8-s1.json']

def test_ablations_are_taken_but_not_listed(here, tmp_path):
    with pytest.raises(ValueError, match='expected some of') as e: plan_cells(['soup'])
    assert not [o for o in ABLATIONS if o in str(e.value)] and all(o in str(e.value) for o in ENTRIES)
    out = continued(here, tmp_path, methods=list(ABLATIONS)[:1], samples=[8])
    record = json.loads((out/'change-batch-mean-k2-n8-s0.json').read_text())
    assert record['merge']['variant'] == 'batch-mean' and record['schema'] == 1

def test_a_file_of_version_01_is_continued_and_one_of_a_later_version_refused(here, tmp_path):
    before = scores(continued(here, tmp_path))
    file = tmp_path/'out'/'average-k2.json'
    record = json.loads(file.read_text())
    del record['schema'], record['groups']['qnli+rte']
    file.write_text(json.dumps(record))
    assert scores(continued(here, tmp_path)) == before
    file.write_text(json.dumps(record | dict(schema=2)))
    with pytest.raises(ValueError, match='average-k2.json has schema 2, but this version reads 1'): continued(here, tmp_path)

def test_file_names():
    assert Cell('dare', 3, None, 2).file == 'dare-k3-s2.json'
    assert Cell('average', 2).file == 'average-k2.json'

def continued(here, tmp_path, monkeypatch=None, **kw):
    "A second run into the folder of a first one."
    return reproduce(kw.pop('models', here/'models'), tmp_path/'out', **dict(tasks=TASKS, methods=['average']) | kw)

def copy_models(here, tmp_path):
    import shutil
    shutil.copytree(here/'models', tmp_path/'models')
    return tmp_path/'models'

def test_another_base_does_not_mix(here, tmp_path):
    save_model(tmp_path/'base2', GLUE['rte'], 77)
    continued(here, tmp_path, methods=['task-arithmetic'], base=here/'base')
    with pytest.raises(ValueError, match='base is'): continued(here, tmp_path, methods=['task-arithmetic'], base=tmp_path/'base2')

def test_another_head_does_not_mix(here, tmp_path):
    models = copy_models(here, tmp_path)
    continued(here, tmp_path, models=models)
    model = load_model(models/'rte')
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(models/'rte')
    with pytest.raises(ValueError, match='other models'): continued(here, tmp_path, models=models)

def test_another_label_order_does_not_mix(here, tmp_path):
    models = copy_models(here, tmp_path)
    for t in TASKS: save_model(models/t, GLUE[t], 5, id2label={0: 'LABEL_0', 1: 'LABEL_1'}, label2id=dict(LABEL_0=0, LABEL_1=1))
    continued(here, tmp_path, models=models)
    with pytest.raises(ValueError, match='label order'): continued(here, tmp_path, models=models, label_orders=dict(rte=[1, 0]))

@pytest.mark.parametrize('split', ['train', 'validation'])
def test_other_rows_do_not_mix(here, tmp_path, monkeypatch, split):
    import shutil
    shutil.copytree(here/'glue', tmp_path/'glue'); monkeypatch.setenv('FISHER_NODES_GLUE', str(tmp_path/'glue'))
    continued(here, tmp_path)
    write_rows(tmp_path/'glue', GLUE['rte'], split, 24, random.Random(9))
    with pytest.raises(ValueError, match='other rows'): continued(here, tmp_path)

def test_the_order_of_tasks_is_no_matter(here, tmp_path):
    before = scores(continued(here, tmp_path))
    assert scores(continued(here, tmp_path, tasks=TASKS[::-1])) == before and set(before['average-k2.json']) == {'qnli+sst2', 'qnli+rte', 'sst2+rte'}

def test_a_corrupt_cache_does_not_stop_later_runs(here, tmp_path, capsys):
    out = continued(here, tmp_path, methods=['mask-fisher'], samples=[8, 16])
    cached = sorted((out/'cache').iterdir())[0]
    cached.write_bytes(cached.read_bytes()[:50])
    continued(here, tmp_path)
    assert cached.name in ''.join(capsys.readouterr())

@pytest.mark.parametrize('text', ['{"name": "mask', '{"foo": 1}', '[]', '{"steps": [], "groups": {}}'])
def test_strange_files_in_the_folder_are_left_alone(here, tmp_path, text):
    (tmp_path/'out').mkdir(); (tmp_path/'out'/'cost-k2.json').write_text(text)
    continued(here, tmp_path, methods=['mask-fisher'], samples=[8])
    assert (tmp_path/'out'/'cost-k2.json').read_text() == text

@pytest.mark.parametrize('groups', [[], None, {'qnli+sst2': None}, {'qnli+sst2': {'scores': {'qnli': {'accuracy': 1}}}}])
def test_malformed_groups_are_made_again(here, tmp_path, groups):
    out = continued(here, tmp_path)
    want, file = scores(out), out/'average-k2.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(groups=groups)))
    assert scores(continued(here, tmp_path)) == want

@pytest.mark.parametrize('models', [[], {'rte': {}}, {'rte': 3}])
def test_malformed_own_scores(here, tmp_path, models):
    out = continued(here, tmp_path)
    (out/'own.json').write_text(json.dumps(json.loads((out/'own.json').read_text()) | dict(models=models)))
    if models: pytest.raises(ValueError, continued, here, tmp_path)
    else: continued(here, tmp_path)

@pytest.mark.parametrize('say,kw', [('limit', dict(limit=0)), ('limit', dict(limit=-3)), ('no device', dict(device='gpu')), ('nope', dict(methods=['ties'], base='/nope')),
                                    ('nothing to do', dict(methods=[])), ('nothing to do', dict(samples=[])), ('nothing to do', dict(group_sizes=[]))])
def test_more_bad_input_is_refused_before_any_work(here, tmp_path, say, kw):
    with pytest.raises(ValueError, match=say): continued(here, tmp_path, **kw)
    assert not (tmp_path/'out').exists()

def run_processes(count, here, out, logs, fault=(), **change):
    logs.mkdir(exist_ok=True)
    kwargs = dict(checkpoints=str(here/'models'), base=str(here/'base'), **GRID) | change
    return torchrun(count, 'grid_case.py', out, logs, json.dumps(kwargs), *fault)

def work(logs): return {int(o.stem): [tuple(json.loads(line)) for line in o.read_text().splitlines()] for o in sorted(logs.glob('*.jsonl'))}

@pytest.mark.parametrize('count', [2, *SLOW([3])])
def test_processes_divide_the_files(here, whole, tmp_path, count):
    code, said = run_processes(count, here, tmp_path/'out', tmp_path/'logs')
    assert code == 0, said[-3000:]
    assert scores(tmp_path/'out') == scores(whole)
    for name in ('own.json', 'fisher_error.json'):
        a, b = [json.loads((o/name).read_text()) for o in (whole, tmp_path/'out')]
        for k in ('models', 'errors'): assert a.get(k) == b.get(k)
    assert {o.name for o in (whole/'cache').iterdir()} == {o.name for o in (tmp_path/'out'/'cache').iterdir()}
    done = work(tmp_path/'logs')
    for kind in ('merge', 'measure'):
        all_of = [o for r in done for o in done[r] if o[0] == kind]
        assert len(all_of) == len(set(all_of)) and all(any(o[0] == kind for o in done[r]) for r in range(count))
    assert sum(o[0] == 'evaluate' for r in done for o in done[r]) == len(TASKS)+sum(len(g.split('+')) for f in scores(whole).values() for g in f)
    files = [{o[1] for o in done[r] if o[0] == 'merge'} for r in range(count)]
    assert not set.intersection(*files[:2]) and max(map(len, files))-min(map(len, files)) <= 1

@pytest.mark.parametrize('fault', ['merge', *SLOW(['measure'])])
def test_failure_of_a_process_is_everybodys_and_the_run_goes_on_later(here, whole, tmp_path, fault):
    out, logs = tmp_path/'out', tmp_path/'logs'
    code, said = run_processes(2, here, out, logs, [fault])
    assert code != 0 and [(logs/f'error-{r}').read_text() for r in (0, 1)] == ['the disk is full']*2, said[-3000:]
    first = {o for r, v in work(logs).items() for o in v if o[0] != 'evaluate'}
    code, said = run_processes(3, here, out, tmp_path/'more')
    assert code == 0, said[-3000:]
    assert scores(out) == scores(whole)
    assert not first & {o for v in work(tmp_path/'more').values() for o in v if o[0] != 'evaluate'}

def test_correlations_are_scores_too(here, tmp_path, monkeypatch):
    "CoLA and STS-B beside a task that goes by accuracy; models one folder deeper."
    tasks, rng = ('rte', 'cola', 'stsb'), random.Random(1)
    tokenizer = BertTokenizerFast.from_pretrained(here/'words')
    for i, t in enumerate(tasks):
        for split, n in ((GLUE[t].train, 40), (GLUE[t].validation, 20)): write_rows(tmp_path/'glue', GLUE[t], split, n, rng)
        save_model(tmp_path/'models'/t/'lr1e-05', GLUE[t], i); tokenizer.save_pretrained(tmp_path/'models'/t/'lr1e-05')
    monkeypatch.setenv('FISHER_NODES_GLUE', str(tmp_path/'glue'))
    out = reproduce(tmp_path/'models', tmp_path/'out', tasks=tasks, methods=['average', 'mask-fisher', 'residual-regression'], samples=[16])
    own = json.loads((out/'own.json').read_text())['models']
    assert [*own['cola']['scores'], *own['stsb']['scores']] == ['matthews_correlation', 'pearson', 'spearmanr']
    assert own['cola']['majority'] == own['stsb']['majority'] == 0 < own['rte']['majority']
    models = {t: load_model(tmp_path/'models'/t/'lr1e-05') for t in ('cola', 'stsb')}
    merged, found = merge(models, method='average'), json.loads((out/'average-k2.json').read_text())['groups']['cola+stsb']
    for t in models:
        rows = load_checkpoint(tmp_path/'models'/t/'lr1e-05', t)
        want = evaluate(merged[t], load_task(f'glue:{t}', 'validation')[0], t, tokenizer=rows.tokenizer)
        assert_close(found['scores'][t], want, rtol=1e-9, atol=0)
        encoded = [rows.tokenizer(*texts, return_tensors='pt') for texts in zip(*(load_task(f'glue:{t}', 'validation')[0][c][:] for c in GLUE[t].text))]
        with torch.no_grad(): a, b = (torch.cat([m(**o).logits for o in encoded]).double() for m in (models[t], merged[t]))
        kl = torch.nn.functional.kl_div(b.log_softmax(1), a.log_softmax(1), log_target=True, reduction='batchmean') if t == 'cola' else ((a-b)**2).mean()/2
        assert_close(found['kl'][t], kl.item(), rtol=1e-4, atol=0)
    for t in own: own[t]['scores'] = {k: abs(v) for k, v in own[t]['scores'].items()} # random models, which a report would refuse
    (out/'own.json').write_text(json.dumps(json.loads((out/'own.json').read_text()) | dict(models=own)))
    table = load_results(out)
    row = table.query("name=='average' and group=='cola+stsb' and task=='stsb'")
    assert_close(row.normalised.item(), 100*found['scores']['stsb']['pearson']/own['stsb']['scores']['pearson'], rtol=1e-12, atol=0)
