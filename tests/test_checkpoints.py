"""Sets of checkpoints: the paper's ids from a local Hub cache, folders, and six made in one call that can be resumed."""
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

import fisher_nodes.experiment.checkpoints
from fisher_nodes.experiment.checkpoints import (
    PAPER_CHECKPOINTS, RECIPES, check_tasks, find_checkpoints, finetune_glue)
from fisher_nodes.engine.models import load_model
from fisher_nodes.tasks.finetuning import finetune
from fisher_nodes.tasks.labels import reorder_labels
from fisher_nodes.tasks.tasks import GLUE, PAPER_TASKS, load_task

APPENDIX = {'bert-base': '''
- MNLI: JeremiahZ/bert-base-uncased-mnli
- QQP: textattack/bert-base-uncased-QQP
- QNLI: textattack/bert-base-uncased-QNLI
- SST2: textattack/bert-base-uncased-SST-2
- MRPC: textattack/bert-base-uncased-MRPC
- RTE: textattack/bert-base-uncased-RTE''', 'bert-large': '''
- MNLI: yoshitomo-matsubara/bert-large-uncased-mnli
- QQP: yoshitomo-matsubara/bert-large-uncased-qqp
- QNLI: yoshitomo-matsubara/bert-large-uncased-qnli
- SST2: yoshitomo-matsubara/bert-large-uncased-sst2
- MRPC: yoshitomo-matsubara/bert-large-uncased-mrpc
- RTE: yoshitomo-matsubara/bert-large-uncased-rte''', 'bert-tiny': '''
- MNLI: M-FAC/bert-tiny-finetuned-mnli
- QQP: M-FAC/bert-tiny-finetuned-qqp
- QNLI: M-FAC/bert-tiny-finetuned-qnli
- SST2: M-FAC/bert-tiny-finetuned-sst2
- MRPC: M-FAC/bert-tiny-finetuned-mrpc
- RTE: muhtasham/bert-tiny-finetuned-glue-rte''', 'roberta-base': '''
- MNLI: JeremiahZ/roberta-base-mnli
- QQP: JeremiahZ/roberta-base-qqp
- QNLI: JeremiahZ/roberta-base-qnli
- SST2: JeremiahZ/roberta-base-sst2
- MRPC: JeremiahZ/roberta-base-mrpc
- RTE: JeremiahZ/roberta-base-rte'''}

WORDS = '[PAD] [UNK] [CLS] [SEP] [MASK] one two three it rains again the sun shines'.split()
SIZE = dict(vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=16)
FAST = dict(epochs=1, batch_size=8, learning_rate=1e-2, progress=False)


def split(task, size, seed):
    "Rows whose last column says the class in a word."
    rng, task = random.Random(seed), GLUE[task]
    labels = [rng.randrange(len(task.labels)) for _ in range(size)]
    texts = [' '.join(rng.choices(WORDS[8:], k=3)) for _ in labels], [WORDS[5+o] for o in labels]
    return pa.table(dict(zip(task.text, texts[-len(task.text):]), label=labels))


def tokenizer_in(folder):
    (folder/'vocab.txt').write_text('\n'.join(WORDS))
    BertTokenizerFast.from_pretrained(folder).save_pretrained(folder)


@pytest.fixture(scope='module')
def glue(tmp_path_factory):
    root = tmp_path_factory.mktemp('glue')
    for name in PAPER_TASKS:
        (root/name).mkdir()
        parquet.write_table(split(name, 64, 0), root/name/'train.parquet')
        parquet.write_table(split(name, 16, 1), root/name/f'{GLUE[name].validation}.parquet')
    return root


@pytest.fixture(autouse=True)
def use_glue(glue, monkeypatch): monkeypatch.setenv('FISHER_NODES_GLUE', str(glue))


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp('base')/'tiny'
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZE)).save_pretrained(folder)
    tokenizer_in(folder)
    return folder


@pytest.fixture(scope='module')
def six(base, glue, tmp_path_factory):
    "All six tasks, made once; not to be written to."
    out = tmp_path_factory.mktemp('six')/'out'
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('FISHER_NODES_GLUE', str(glue))
        return out, finetune_glue(base, out, **FAST)


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{}')


# --- which ones -----------------------------------------------------------------------------

@pytest.mark.parametrize('name', APPENDIX)
def test_ids_of_the_appendix(name):
    ids = {o[0].lower(): o[1] for o in re.findall(r'- (\w+): (\S+)', APPENDIX[name])}
    assert PAPER_CHECKPOINTS[name] == ids == find_checkpoints(name) and tuple(find_checkpoints(name)) == PAPER_TASKS


def test_names():
    assert list(PAPER_CHECKPOINTS) == ['bert-tiny', 'bert-base', 'bert-large', 'roberta-base']
    assert list(find_checkpoints('bert-tiny', ('rte', 'qqp'))) == ['rte', 'qqp']
    found = find_checkpoints('bert-tiny')
    found.clear()
    assert len(PAPER_CHECKPOINTS['bert-tiny']) == 6


@pytest.mark.parametrize('where', ['bert-small', 'BERT-tiny', '', 'M-FAC/bert-tiny-finetuned-mnli', Path('bert-tiny')])
def test_unknown_set(where, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match='bert-tiny, bert-base, bert-large, roberta-base|has no model for'): find_checkpoints(where)


@pytest.mark.parametrize('tasks,say', [(['wnli'], "unknown task 'wnli'; expected some of mnli, qqp, qnli, sst2, mrpc, rte, cola, stsb"), (['rte', 'rte'], 'each once'),
                                       ([], 'one task or more'), ('mnil', "unknown task 'mnil'"), ([None], 'unknown task None'), (['MNLI'], "'MNLI'")])
def test_bad_tasks(tasks, say, base, tmp_path):
    for run in (lambda: check_tasks(tasks), lambda: find_checkpoints('bert-tiny', tasks), lambda: finetune_glue(base, tmp_path/'out', tasks=tasks)):
        with pytest.raises(ValueError, match=say): run()
    assert not (tmp_path/'out').exists()


def test_folders(tmp_path):
    for name in reversed(PAPER_TASKS): touch(tmp_path/name/'config.json')
    for o in ('results/mnli.json', 'README.md'): touch(tmp_path/o)
    (tmp_path/'empty').mkdir()
    assert find_checkpoints(tmp_path) == {o: str(tmp_path/o) for o in PAPER_TASKS} and tuple(find_checkpoints(tmp_path)) == PAPER_TASKS
    assert list(find_checkpoints(str(tmp_path), ['rte', 'mnli'])) == ['rte', 'mnli']
    shutil.rmtree(tmp_path/'qqp')
    with pytest.raises(ValueError, match='has no model for qqp, only for mnli, qnli'): find_checkpoints(tmp_path)
    assert 'qqp' not in find_checkpoints(tmp_path, [o for o in PAPER_TASKS if o != 'qqp'])
    for o in ('sst-2', 'wnli'): touch(tmp_path/o/'config.json')
    with pytest.raises(ValueError, match='holds models that are no task: sst-2, wnli; expected some of mnli'): find_checkpoints(tmp_path, ['mnli'])


def test_empty_folder_file_and_single_model(tmp_path):
    with pytest.raises(ValueError, match='only for nothing'): find_checkpoints(tmp_path)
    touch(tmp_path/'config.json')
    with pytest.raises(ValueError, match='is itself a model'): find_checkpoints(tmp_path)
    with pytest.raises(ValueError, match='is neither a folder nor one of'): find_checkpoints(tmp_path/'config.json')


# --- making them ----------------------------------------------------------------------------

def test_the_table():
    assert [*RECIPES] == [*GLUE]
    assert {k: tuple(v) for k, v in RECIPES.items()} == dict(mnli=(None, 2), qqp=(None, 1), qnli=(None, 1), sst2=(None, 1), mrpc=(None, 5), rte=('mnli', 5), cola=(None, 3), stsb=(None, 5))


def test_six_checkpoints(six, base):
    out, records = six
    assert tuple(records) == PAPER_TASKS and sorted(o.name for o in out.iterdir()) == sorted(PAPER_TASKS)
    for task, folder in find_checkpoints(out).items():
        record, model = records[task], load_model(folder)
        assert json.loads((out/task/'finetune.json').read_text()) == record
        assert record['base'] == ('mnli' if task == 'rte' else 'tiny') and record['epochs'] == 1 and record['num_examples'] == 64
        assert record['task']['name'] == task and set(record['scores']) == set(GLUE[task].metrics)
        assert list(model.config.id2label.values()) == list(GLUE[task].labels)


def test_rte_starts_from_mnli_and_the_same_by_hand(six, base, tmp_path):
    out, records = six
    data, valid = [load_task('glue:rte', o)[0] for o in ('train', 'validation')]
    for start, same in ((out/'mnli', True), (base, False)):
        model = finetune(start, data, 'rte', out=tmp_path/start.name, validation=valid, **FAST)
        pairs = list(zip(model.parameters(), load_model(out/'rte').parameters()))
        assert all(torch.equal(a, b) for a, b in pairs) is same
    by_hand = json.loads((tmp_path/'mnli'/'finetune.json').read_text())
    assert {k: v for k, v in by_hand.items() if k != 'seconds'} == {k: v for k, v in records['rte'].items() if k != 'seconds'}


def test_epochs_of_the_table(base, tmp_path):
    records = finetune_glue(base, tmp_path/'out', tasks=['mrpc', 'sst2'], num_samples=8, progress=False)
    assert {k: (o['epochs'], o['learning_rate'], o['batch_size'], o['num_examples'], o['precision']) for k, o in records.items()} == {
        'mrpc': (5, 1e-4, 64, 8, None), 'sst2': (1, 1e-4, 64, 8, None)}


def test_fewer_layers(base, tmp_path):
    finetune_glue(base, tmp_path/'out', tasks=['rte', 'mnli'], num_layers=1, **FAST)
    for task in ('mnli', 'rte'):
        assert load_model(tmp_path/'out'/task).config.num_hidden_layers == 1
        assert json.loads((tmp_path/'out'/task/'finetune.json').read_text())['num_layers'] == 1


def copy(six, tmp_path, *tasks):
    for task in tasks: shutil.copytree(six[0]/task, tmp_path/'out'/task)
    return tmp_path/'out'


def test_finished_tasks_are_kept(six, base, tmp_path, monkeypatch):
    made = []
    def noted(model, *args, **kwargs):
        made.append(Path(kwargs['out']).name)
        return finetune(model, *args, **kwargs)
    monkeypatch.setattr(fisher_nodes.experiment.checkpoints, 'finetune', noted)
    out = copy(six, tmp_path, 'mnli', 'qnli')
    (out/'sst2'/'.partial-4999999-x').mkdir(parents=True)
    records = finetune_glue(base, out, tasks=['rte', 'sst2', 'qnli', 'mnli'], **FAST)
    assert made == ['sst2', 'rte'] and list(records) == ['rte', 'sst2', 'qnli', 'mnli']
    assert records['qnli'] == six[1]['qnli'] and records['rte']['losses'] == six[1]['rte']['losses']
    made.clear()
    shutil.rmtree(out/'mnli'/'.x', ignore_errors=True)
    assert finetune_glue(base, out, tasks=['rte'], **FAST)['rte'] == records['rte'] and not made


def test_nothing_is_loaded_when_all_are_there(six, base, tmp_path):
    "Not even the base, so that a finished set can be passed on."
    out = copy(six, tmp_path, 'qqp')
    (tmp_path/'tiny').mkdir()
    assert finetune_glue(tmp_path/'tiny', out, tasks=['qqp'], **FAST) == dict(qqp=six[1]['qqp'])


@pytest.mark.parametrize('change,say', [
    (dict(seed=1), 'another seed: expected 1, found 0'), (dict(epochs=2), 'another epochs: expected 2, found 1'),
    (dict(epochs=None), 'another epochs: expected 5, found 1'), (dict(learning_rate=1e-4), 'another learning_rate: expected 0.0001, found 0.01'),
    (dict(batch_size=64), 'another batch_size: expected 64, found 8'), (dict(num_layers=1), 'another num_layers: expected 1, found None'),
    (dict(num_samples=9), 'another num_examples: expected 9, found 64'), (dict(precision='bf16'), "another precision: expected 'bf16', found None")])
def test_another_recipe(change, say, six, base, tmp_path):
    out = copy(six, tmp_path, 'mrpc')
    with pytest.raises(ValueError, match=say): finetune_glue(base, out, tasks=['sst2', 'mrpc'], **FAST | change)
    assert [o.name for o in out.iterdir()] == ['mrpc']


def test_another_base_or_other_rows(six, base, glue, tmp_path, monkeypatch):
    out = copy(six, tmp_path, 'mrpc')
    shutil.copytree(base, tmp_path/'other')
    with pytest.raises(ValueError, match="mrpc was made with another base: expected 'other', found 'tiny'"):
        finetune_glue(tmp_path/'other', out, tasks=['sst2', 'mrpc'], **FAST)
    shutil.copytree(glue, tmp_path/'glue')
    parquet.write_table(split('mrpc', 64, 7), tmp_path/'glue'/'mrpc'/'train.parquet')
    monkeypatch.setenv('FISHER_NODES_GLUE', str(tmp_path/'glue'))
    with pytest.raises(ValueError, match="another data: expected 'glue/mrpc/train#"): finetune_glue(base, out, tasks=['sst2', 'mrpc'], **FAST)
    assert [o.name for o in out.iterdir()] == ['mrpc']


def test_the_start_of_rte(six, base, tmp_path):
    with pytest.raises(ValueError, match='rte starts from mnli, which is neither finished nor among'):
        finetune_glue(base, tmp_path/'out', tasks=['sst2', 'rte'], **FAST)
    assert not (tmp_path/'out').exists()
    out = copy(six, tmp_path, 'rte')
    for tasks in (['rte', 'mnli'], ['mnli']):
        with pytest.raises(ValueError, match='rte is finished but mnli, which it starts from, is not'): finetune_glue(base, out, tasks=tasks, **FAST)
    out = copy(six, tmp_path/'b', 'mnli')
    with pytest.raises(ValueError, match='mnli was made with another seed'): finetune_glue(base, out, tasks=['rte'], **FAST, seed=2)


def break_record(out): (out/'mrpc'/'finetune.json').write_text('{"seed"')
def other_files(out): touch(out/'sst2'/'notes.txt')
def a_file(out): touch(out/'sst2')


@pytest.mark.parametrize('change,say', [(break_record, 'finetune.json cannot be read'), (other_files, 'sst2 holds files but no finetune.json'),
                                        (a_file, 'sst2 holds files but no finetune.json')])
def test_what_is_in_the_way(change, say, six, base, tmp_path):
    out = copy(six, tmp_path, 'mrpc')
    change(out)
    with pytest.raises(ValueError, match=say): finetune_glue(base, out, tasks=['qqp', 'sst2', 'mrpc'], **FAST)
    assert not (out/'qqp').exists()


@pytest.mark.parametrize('split_file', ['train', 'validation'])
def test_missing_rows_before_any_training(split_file, base, glue, tmp_path, monkeypatch):
    shutil.copytree(glue, tmp_path/'glue')
    (tmp_path/'glue'/'qnli'/f'{split_file}.parquet').unlink()
    monkeypatch.setenv('FISHER_NODES_GLUE', str(tmp_path/'glue'))
    with pytest.raises(FileNotFoundError, match=f'{split_file}.parquet is not a file'):
        finetune_glue(base, tmp_path/'out', tasks=['sst2', 'qnli'], **FAST)
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('change,say', [
    (dict(num_layers=3), 'expected 1 to 2'), (dict(num_layers=0), 'expected 1 to 2'), (dict(num_samples=0), '`num_samples` must be a whole number of at least 1'),
    (dict(epochs=0), '`epochs` must be a finite number above 0, got 0'), (dict(learning_rate=-1.), '`learning_rate` must be a finite number above 0, got -1.0'), (dict(precision='fp8'), 'fp8'), (dict(device='nowhere'), "no device 'nowhere'")])
def test_bad_options(change, say, base, tmp_path):
    with pytest.raises(ValueError, match=say): finetune_glue(base, tmp_path/'out', tasks=['sst2', 'qnli'], **FAST | change)
    assert not list(tmp_path.glob('out/*'))


def test_bad_bases(base, tmp_path):
    def run(start): finetune_glue(start, tmp_path/'out', tasks=['sst2'], **FAST)
    with pytest.raises(ValueError, match='`base` must be a folder or a Hub id, got BertModel'): run(BertModel(BertConfig(**SIZE)))
    with pytest.raises(ValueError, match='cannot load .*nowhere'): run(tmp_path/'nowhere')
    BertModel(BertConfig(**SIZE)).save_pretrained(tmp_path/'bare')
    with pytest.raises(ValueError, match='bare has no tokenizer'): run(tmp_path/'bare')
    assert not (tmp_path/'out').exists()


# --- the Hub --------------------------------------------------------------------------------

def to_hub(cache, name, folder):
    "Put a model where the Hub's client keeps what it downloaded."
    repo = cache/f'models--{name.replace("/", "--")}'
    (repo/'refs').mkdir(parents=True)
    (repo/'refs'/'main').write_text('0'*40)
    shutil.copytree(folder, repo/'snapshots'/('0'*40))


@pytest.fixture(scope='module')
def cache(tmp_path_factory, base, glue):
    "Six tiny BERTs as the paper's bert-tiny: random ones, an SST-2 that learned its task, an MNLI that did so with other classes."
    root = tmp_path_factory.mktemp('hub')
    learned = dict(epochs=32, batch_size=8, learning_rate=5e-3, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('FISHER_NODES_GLUE', str(glue))
        trained = {task: finetune(base, load_task(f'glue:{task}')[0], task, out=root/task, **learned) for task in ('mnli', 'sst2')}
    trained['mnli'] = reorder_labels(trained['mnli'], (2, 0, 1))
    for task, name in PAPER_CHECKPOINTS['bert-tiny'].items():
        torch.manual_seed(1)
        model = trained.get(task) or BertForSequenceClassification(BertConfig(**SIZE, num_labels=GLUE[task].num_labels))
        model.config.id2label = {i: f'LABEL_{i}' for i in range(GLUE[task].num_labels)}
        model.config.label2id = {v: k for k, v in model.config.id2label.items()}
        model.save_pretrained(root/'six'/task)
        tokenizer_in(root/'six'/task)
        to_hub(root/'cache', name, root/'six'/task)
    model.config.save_pretrained(root/'pickle')
    torch.save(model.state_dict(), root/'pickle'/'pytorch_model.bin')
    to_hub(root/'cache', PAPER_CHECKPOINTS['bert-base']['rte'], root/'pickle')
    return root


def in_a_process(cache, glue, code):
    "Run code with the cache and no network; what it prints as JSON."
    env = os.environ | dict(HF_HOME=str(cache), HF_HUB_CACHE=str(cache/'cache'), HF_HUB_OFFLINE='1', FISHER_NODES_GLUE=str(glue),
                            PYTHONPATH=str(Path(fisher_nodes.__file__).parents[1]), PYTHONWARNINGS='ignore')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, cwd=cache)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


LOOK = '''
import json
from fisher_nodes.experiment.checkpoints import find_checkpoints
from fisher_nodes.tasks.evaluation import evaluate
from fisher_nodes.tasks.labels import check_alignment, reorder_labels
from fisher_nodes.tasks.tasks import load_task
from fisher_nodes import merge
from transformers import AutoTokenizer
found = {}
ids = find_checkpoints('bert-tiny')
for task,name in ids.items():
    data = load_task(f'glue:{task}')[0]
    try: found[task] = check_alignment(name, data, task, num_samples=64, progress=False)
    except ValueError as e: found[task] = str(e)
rows, tokenizer = load_task('glue:mnli', 'validation')[0], AutoTokenizer.from_pretrained(ids['mnli'])
found['as it stands'] = evaluate(ids['mnli'], rows, 'mnli', progress=False)['accuracy']
found['reordered'] = evaluate(reorder_labels(ids['mnli'], (1, 2, 0)), rows, 'mnli', tokenizer=tokenizer, progress=False)['accuracy']
merged = merge(ids, method='average')
found['merged'] = {task: m.config.num_labels for task,m in merged.items()}
print(json.dumps(found))
'''


def test_the_paper_from_a_hub_cache(cache, glue):
    "Ids are loaded, a learned head is recognised, one with other classes is refused, four that learned nothing are undecided."
    found = in_a_process(cache, glue, LOOK)
    assert found['sst2']['aligned'] is True and found['sst2']['accuracy'] > .9
    assert 'M-FAC/bert-tiny-finetuned-mnli does not count the classes of mnli as' in found['mnli'] and 'reorder_labels(model, (1, 2, 0))' in found['mnli']
    assert found['as it stands'] < .2 and found['reordered'] > .9
    assert all(found[task]['undecided'] for task in ('qqp', 'qnli', 'mrpc', 'rte'))
    assert found['merged'] == {task: GLUE[task].num_labels for task in PAPER_TASKS}


FAIL = '''
import json
from fisher_nodes.engine.models import load_model
said = []
for name in NAMES:
    try: load_model(name)
    except ValueError as e: said.append(str(e))
print(json.dumps(said))
'''


def test_what_the_cache_does_not_have(cache, glue):
    "An id that is not there, and one with a pickle in place of safetensors: both named, nothing else taken for them."
    names = [PAPER_CHECKPOINTS['bert-base'][o] for o in ('mnli', 'rte')]
    absent, pickle = in_a_process(cache, glue, FAIL.replace('NAMES', repr(names)))
    assert absent.startswith(f'cannot load {names[0]}: ')
    assert pickle.startswith(f'cannot load {names[1]}: ') and 'safetensors' in pickle


def test_pickles_in_a_folder(cache):
    with pytest.raises(ValueError, match='cannot load .*pickle: .*safetensors'): load_model(cache/'pickle')


def test_the_set_itself_is_a_folder_too(cache):
    assert tuple(find_checkpoints(cache/'six')) == PAPER_TASKS
