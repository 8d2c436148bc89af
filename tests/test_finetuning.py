"""Fine-tuning: nothing half-written, nothing of the caller's touched, heads replaced, every fault before any work."""
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from datasets import ClassLabel, Dataset
from torch.testing import assert_close
from transformers import (AutoModelForSequenceClassification, BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel,
                          BertTokenizerFast, RobertaConfig, RobertaForSequenceClassification, RobertaModel)

from fisher_nodes.tasks import finetuning
from fisher_nodes.tasks.finetuning import data_task, finetune, load_body, new_model
from fisher_nodes.tasks.tasks import GLUE, Task

SIZE = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=24)
ROBERTA = RobertaConfig(**SIZE)
TASK = Task('toy', ('text',), ('even', 'odd'))
FAST = dict(epochs=1, batch_size=8, progress=False)


def body(seed=0):
    torch.manual_seed(seed)
    return BertModel(BertConfig(**SIZE))


def rows(n=32, **change):
    rng = np.random.default_rng(0)
    ids = [rng.integers(5, 40, rng.integers(2, 12)).tolist() for _ in range(n)]
    return Dataset.from_dict(dict(input_ids=[[5+i % 2, *o] for i, o in enumerate(ids)], label=[i % 2 for i in range(n)]) | change)


def states(): return repr((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))


def files(folder): return sorted(o.relative_to(folder).as_posix() for o in folder.rglob('*'))


def test_files_record_and_reload(tmp_path):
    model = finetune(body(), rows(), TASK, out=tmp_path/'a'/'b', validation=rows(10), **FAST)
    assert files(tmp_path/'a'/'b') == ['config.json', 'finetune.json', 'model.safetensors']
    record = json.loads((tmp_path/'a'/'b'/'finetune.json').read_text())
    assert record['num_examples'] == 32 and record['base'] == 'BertModel' and set(record['scores']) == {'accuracy'}
    assert record['task']['labels'] == ['even', 'odd'] and len(record['losses']) == 1 and record['seconds'] > 0
    assert record['versions']['transformers'] == transformers.__version__
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path/'a'/'b')
    for a, b in zip(again.parameters(), model.parameters()): assert torch.equal(a, b)
    assert not model.training and all(p.grad is None and p.requires_grad for p in model.parameters())


def test_no_absolute_path_is_written(tmp_path):
    words = '[PAD] [UNK] [CLS] [SEP] [MASK] a b c'.split()
    (tmp_path/'vocab.txt').write_text('\n'.join(words))
    BertTokenizerFast.from_pretrained(tmp_path).save_pretrained(tmp_path)
    body().save_pretrained(tmp_path)
    raw = Dataset.from_dict(dict(text=['a b', 'c']*4, label=[0, 1]*4))
    finetune(tmp_path, raw, TASK, out=tmp_path/'out', **FAST)
    assert 'tokenizer.json' in files(tmp_path/'out')
    for file in (tmp_path/'out').glob('*.json'): assert str(tmp_path) not in file.read_text(), file.name
    assert json.loads((tmp_path/'out'/'finetune.json').read_text())['base'] == tmp_path.name
    finetune(tmp_path/'out', raw, GLUE['sst2'], out=tmp_path/'next', **FAST)
    assert json.loads((tmp_path/'next'/'config.json').read_text())['id2label'] == {'0': 'negative', '1': 'positive'}


def test_seed_decides_everything(tmp_path):
    torch.manual_seed(1)
    a = finetune(body(), rows(), TASK, out=tmp_path/'a', seed=3, **FAST)
    torch.rand(7)
    random.random()
    b = finetune(body(), rows(), TASK, out=tmp_path/'b', seed=3, **FAST)
    c = finetune(body(), rows(), TASK, out=tmp_path/'c', seed=4, **FAST)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.classifier.weight, c.classifier.weight)


def test_random_states_and_model_untouched(tmp_path):
    model = body().train()
    model.encoder.layer[0].eval().requires_grad_(False)
    flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    values, config, before = [p.clone() for p in model.parameters()], model.config.to_dict(), states()
    finetune(model, rows(), TASK, out=tmp_path/'a', **FAST)
    assert states() == before and model.config.to_dict() == config
    assert ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]) == flags
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(values, model.parameters()))


@pytest.mark.parametrize('start', [
    BertModel(BertConfig(**SIZE)), BertForMaskedLM(BertConfig(**SIZE)), BertForSequenceClassification(BertConfig(**SIZE, num_labels=3)),
    BertForSequenceClassification(BertConfig(**SIZE, num_labels=2)), RobertaModel(ROBERTA), RobertaForSequenceClassification(ROBERTA)])
def test_head_is_new_and_body_is_the_same(start, tmp_path):
    torch.manual_seed(5)
    new = new_model(start, GLUE['rte'])
    assert new.config.num_labels == 2 and new.config.label2id == dict(entailment=0, not_entailment=1)
    source = dict(start.base_model.named_parameters())
    for name, p in new.base_model.named_parameters():
        if name in source: assert torch.equal(p, source[name]) and p.data_ptr() != source[name].data_ptr()
        else: assert 'pooler' in name
    head = dict(start.named_parameters()).get('classifier.weight')
    if head is not None and head.shape == (2, 16): assert not torch.equal(head, new.classifier.weight)
    start.save_pretrained(tmp_path)
    torch.manual_seed(5)
    for (name, a), b in zip(new_model(tmp_path, GLUE['rte']).named_parameters(), new.parameters()):
        if 'pooler' not in name and 'classifier' not in name: assert_close(a, b, rtol=0, atol=0)


def test_half_precision_start_trains_in_float32():
    assert new_model(body().to(torch.bfloat16), TASK).dtype == torch.float32


def test_regression_after_classification(tmp_path):
    start = BertForSequenceClassification(BertConfig(**SIZE, num_labels=3, problem_type='single_label_classification'))
    ds = rows(label=[i/10 for i in range(32)])
    model = finetune(start, ds, out=tmp_path/'a', validation=ds, **FAST)
    assert model.config.problem_type == 'regression' and model.config.num_labels == 1
    assert set(json.loads((tmp_path/'a'/'finetune.json').read_text())['scores']) == {'pearson', 'spearmanr'}


@pytest.mark.parametrize('change,say', [
    (dict(data=rows(label=[2]*32)), 'label 2 of row'), (dict(data=rows(0, input_ids=[], label=[])), 'empty'),
    (dict(data=[dict()]), 'must be a datasets.Dataset'), (dict(data=rows().remove_columns('label')), 'no `labels` or `label` column'),
    (dict(validation=rows(label=[0, 5]*16)), 'label 5 of row'), (dict(validation=rows().remove_columns('label')), 'no `labels`'),
    (dict(epochs=0), '`epochs` must be a finite number above 0, got 0'), (dict(batch_size=-1), '`batch_size` must be a whole number of at least 1, got -1'), (dict(num_samples=0), '`num_samples` must be a whole number of at least 1'),
    (dict(data=Dataset.from_dict(dict(text=['a'], label=[0]))), 'give `tokenizer=`'), (dict(task='rtx'), 'unknown task')])
def test_faults_leave_nothing(tmp_path, change, say):
    model = body()
    before = states()
    with pytest.raises(ValueError, match=say):
        finetune(**dict(model=model, data=rows(), task=TASK, out=tmp_path/'a', progress=False) | change)
    assert not (tmp_path/'a').exists() and states() == before


class Full(BertForSequenceClassification):
    "A model whose disk is full half-way."
    def save_pretrained(self, folder, **kw):
        super().save_pretrained(folder, **kw)
        raise OSError('disk full')


def test_failed_save_keeps_the_old_folder(tmp_path, monkeypatch):
    old = finetune(body(), rows(), TASK, out=tmp_path/'a', **FAST)
    before = {o: (tmp_path/'a'/o).read_bytes() for o in files(tmp_path/'a')}
    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, '_model_mapping', {BertConfig: Full})
    for out, overwrite in ((tmp_path/'a', True), (tmp_path/'b', False)):
        with pytest.raises(OSError, match='disk full'):
            finetune(old, rows(), TASK, out=out, overwrite=overwrite, **FAST)
    assert {o: (tmp_path/'a'/o).read_bytes() for o in files(tmp_path/'a')} == before
    assert not (tmp_path/'b').exists()


def test_destination_is_looked_at_first(tmp_path):
    (tmp_path/'a').mkdir()
    for o in ('a/mine.txt', 'file'): (tmp_path/o).write_text('x')
    with pytest.raises(FileExistsError, match=r'is not empty, it has mine.txt; pass overwrite=True'):
        finetune('no/such/model', rows(), TASK, out=tmp_path/'a')
    with pytest.raises(FileExistsError, match='is a file, not a folder'): finetune('no/such/model', rows(), TASK, out=tmp_path/'file', overwrite=True)
    (tmp_path/'empty').mkdir()
    finetune(body(), rows(), TASK, out=tmp_path/'empty', **FAST)


def test_overwrite_keeps_other_files_and_removes_old_weights(tmp_path):
    for o in ('mine.txt', 'model-00001-of-00002.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin'): (tmp_path/o).write_text('x')
    finetune(body(), rows(), TASK, out=tmp_path, overwrite=True, **FAST)
    assert files(tmp_path) == ['config.json', 'finetune.json', 'mine.txt', 'model.safetensors']


def test_work_stays_inside_out(tmp_path, monkeypatch):
    seen = []
    real = finetuning.train_model
    monkeypatch.chdir(tmp_path)
    def spy(model, rows, folder, *a, **kw):
        seen.append(folder)
        return real(model, rows, folder, *a, **kw)
    monkeypatch.setattr(finetuning, 'train_model', spy)
    finetune(body(), rows(), TASK, out='here', **FAST)
    assert Path(seen[0]).resolve().relative_to(tmp_path/'here').parts[0].startswith('.partial-')
    assert sorted(o.name for o in tmp_path.iterdir()) == ['here']


def test_num_samples_and_task_from_the_data(tmp_path):
    ds = rows().cast_column('label', ClassLabel(names=['a', 'b']))
    model = finetune(body(), ds, out=tmp_path/'a', num_samples=9, **FAST)
    assert model.config.id2label == {0: 'a', 1: 'b'} and json.loads((tmp_path/'a'/'finetune.json').read_text())['num_examples'] == 9
    with pytest.raises(ValueError, match='labels must be numbers'): data_task(rows(label=['x']*32))


def test_body_of_another_shape_is_refused():
    odd = BertModel(BertConfig(**SIZE))
    odd.encoder.layer.append(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match='does not fit'): new_model(odd, TASK)
    assert load_body(odd) is odd


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_on_gpu(tmp_path):
    model = finetune(body(), rows(), TASK, out=tmp_path/'a', device='cuda', **FAST)
    assert model.device.type == 'cuda'
