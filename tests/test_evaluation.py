"""Scores do not depend on how rows are batched; every fault names its row; the model comes back as it was."""
import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from transformers import (BertConfig, BertForSequenceClassification, BertTokenizerFast, RobertaConfig,
                          RobertaForSequenceClassification)

from fisher_nodes.tasks.evaluation import default_task, evaluate, predict
from fisher_nodes.tasks.tasks import Task

SIZE = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=24, initializer_range=.5)
FAMILIES = dict(bert=(BertConfig, BertForSequenceClassification), roberta=(RobertaConfig, RobertaForSequenceClassification))


def make(family='bert', dtype=torch.float32, **kw):
    torch.manual_seed(0)
    config, model = FAMILIES[family]
    return model(config(**SIZE, **(kw or dict(num_labels=3)))).to(dtype)


def rows(n=23, labels=3):
    rng = np.random.default_rng(0)
    ids = [rng.integers(5, 40, rng.integers(1, 20)).tolist() for _ in range(n)]
    return Dataset.from_dict(dict(input_ids=ids, label=[i % labels for i in range(n)]))


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('batch_tokens', [1, 37, 10_000, None])
def test_order_and_padding_do_not_matter(family, dtype, batch_tokens):
    model, ds = make(family, dtype).eval(), rows()
    got = predict(model, ds, batch_tokens=batch_tokens, progress=False)
    with torch.no_grad(): want = torch.cat([model(input_ids=torch.tensor([o])).logits for o in ds['input_ids']])
    assert got.dtype == dtype
    assert_close(got, want, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-5 if dtype == torch.float32 else 0)


def test_bf16_close_to_float32():
    model, ds = make(), rows()
    got, want = [predict(model, ds, precision=o, progress=False) for o in ('bf16', None)]
    assert got.dtype == torch.float32
    assert 0 < (got-want).norm() < .05*want.norm()


def test_half_precision_weights_give_float32_logits():
    assert predict(make(dtype=torch.bfloat16), rows(), progress=False).dtype == torch.float32


@pytest.mark.parametrize('fail', [False, True])
def test_model_and_random_states_as_they_were(fail):
    model, ds = make(), rows(labels=4 if fail else 3)
    model.train()
    model.bert.encoder.layer[1].eval()
    model.bert.pooler.requires_grad_(False)
    before = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    values, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    if fail:
        with pytest.raises(ValueError): evaluate(model, ds, progress=False)
    else: evaluate(model, ds, progress=False)
    assert ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]) == before
    assert all(torch.equal(a, b) for a, b in zip(values, model.parameters())) and torch.equal(torch.get_rng_state(), state)
    assert not any(p.is_inference() for p in model.parameters()) and torch.is_grad_enabled()
    model(input_ids=torch.tensor([[5, 6]])).logits.sum().backward()


def test_dropout_is_off():
    model = make().train()
    assert torch.equal(predict(model, rows(), progress=False), predict(model, rows(), progress=False))


def own(ds, model, size, **drop):
    "Right-padded batches in the data's order."
    for i in range(0, len(ds), size):
        part = ds[i:i+size]
        x = torch.nn.utils.rnn.pad_sequence([torch.tensor(o) for o in part['input_ids']], batch_first=True)
        yield dict(input_ids=x, attention_mask=(x > 0).long(), labels=torch.tensor(part['label']))


@pytest.mark.parametrize('size', [1, 5, 23])
def test_own_batches_as_list_or_generator(size):
    model, ds = make(), rows()
    want = evaluate(model, ds, progress=False)
    assert evaluate(model, own(ds, model, size), progress=False) == want == evaluate(model, list(own(ds, model, size)), progress=False)


@pytest.mark.parametrize('change,say', [
    (dict(label=[0, 1, 7]), 'label 7 of row 2 is not a class number from 0 to 2'),
    (dict(label=[0, -1, 1]), 'label -1 of row 1'),
    (dict(label=[0, None, 1]), 'label None of row 1'),
    (dict(label=['0', '1', '2']), 'of row '),
    (dict(input_ids=[[5], [], [6]]), 'row 1 has 0 tokens'),
    (dict(input_ids=[[5], [6], [5]*60]), 'row 2 has 60 tokens')])
def test_faulty_rows_are_named(change, say):
    with pytest.raises(ValueError) as e:
        evaluate(make(), Dataset.from_dict(dict(input_ids=[[5], [6, 7], [8]], label=[0, 1, 2]) | change), progress=False)
    assert say in str(e.value)


@pytest.mark.parametrize('data', [[], iter([]), Dataset.from_dict(dict(input_ids=[], label=[]))])
def test_no_data(data):
    with pytest.raises(ValueError, match='no examples|empty'): evaluate(make(), data, progress=False)


def test_no_labels():
    ds = rows().remove_columns('label')
    assert predict(make(), ds, progress=False).shape == (23, 3)
    with pytest.raises(ValueError, match='no `labels` or `label` column'): evaluate(make(), ds, progress=False)
    batches = [{k: v for k, v in b.items() if k != 'labels'} for b in own(rows(), make(), 5)]
    assert predict(make(), batches, progress=False).shape == (23, 3)
    with pytest.raises(ValueError, match='no `labels`'): evaluate(make(), batches, progress=False)


def test_non_finite_logits_name_the_row():
    model = make()
    with torch.no_grad(): model.bert.embeddings.word_embeddings.weight[39] = torch.nan
    ds = Dataset.from_dict(dict(input_ids=[[5, 6], [7, 8, 9], [10, 39]], label=[0, 1, 2]))
    with pytest.raises(ValueError, match=r'row 2: logits \[nan, nan, nan\] are not finite'): evaluate(model, ds, progress=False)


def test_regression():
    model, ds = make(num_labels=1), rows().remove_columns('label')
    y = predict(model, ds, progress=False).squeeze(-1).double()
    ds = ds.add_column('label', (3*y+1).tolist())
    assert evaluate(model, ds, progress=False) == dict(pearson=pytest.approx(1, rel=1e-6))
    assert set(evaluate(model, ds, 'stsb', progress=False)) == {'pearson', 'spearmanr'}
    with pytest.raises(ValueError, match='label nan of row 4'):
        evaluate(model, ds.remove_columns('label').add_column('label', [float('nan') if i == 4 else 0. for i in range(23)]), progress=False)


@pytest.mark.parametrize('task,labels,say', [
    ('rte', 3, 'has 2 labels, but the model has 3'), ('mnli', 2, 'has 3 labels, but the model has 2'),
    ('stsb', 3, 'about numbers, but the model predicts classes'), ('rte', 1, 'about classes, but the model predicts numbers'),
    (Task('t', (), ('a', 'b', 'c', 'd')), 3, 'has 4 labels, but the model has 3'), ('rtee', 2, 'unknown task')])
def test_task_and_head_must_agree(task, labels, say):
    with pytest.raises(ValueError, match=say): default_task(make(num_labels=labels), task)


def test_label_order_must_agree():
    names = dict(id2label={0: 'NOT_ENTAILMENT', 1: 'ENTAILMENT'})
    with pytest.raises(ValueError, match='orders its labels'): evaluate(make(**names), rows(labels=2), 'rte', progress=False)
    assert default_task(make(id2label={0: 'ENTAILMENT', 1: 'NOT_ENTAILMENT'}), 'rte').name == 'rte'


def test_more_than_ten_classes_keep_their_order():
    names = [f'c{i}' for i in range(12)]
    default_task(make(id2label=dict(enumerate(names))), Task('t', (), tuple(names)))


def test_folder_brings_its_tokenizer(tmp_path):
    words = '[PAD] [UNK] [CLS] [SEP] [MASK] a b c d e'.split()
    (tmp_path/'vocab.txt').write_text('\n'.join(words))
    BertTokenizerFast.from_pretrained(tmp_path).save_pretrained(tmp_path)
    model = make()
    model.save_pretrained(tmp_path)
    raw = Dataset.from_dict(dict(text=['a b', 'c', 'd e a'], label=[0, 1, 2]))
    ids = Dataset.from_dict(dict(input_ids=[[2, 5, 6, 3], [2, 7, 3], [2, 8, 9, 5, 3]], label=[0, 1, 2]))
    assert_close(predict(tmp_path, raw, progress=False), predict(model, ids, progress=False), rtol=1e-6, atol=0)
    assert evaluate(str(tmp_path), raw, progress=False) == evaluate(model, ids, progress=False)
    with pytest.raises(ValueError, match='give `tokenizer=`'): evaluate(model, raw, progress=False)


def test_folder_without_tokenizer(tmp_path):
    make().save_pretrained(tmp_path)
    assert predict(tmp_path, rows(), progress=False).shape == (23, 3)
    with pytest.raises(ValueError, match='has no tokenizer; give `tokenizer=`'):
        predict(tmp_path, Dataset.from_dict(dict(text=['a'])), progress=False)


def test_body_without_head():
    with pytest.raises(ValueError, match='BertModel has no task head'): predict(make().bert, rows(), progress=False)


def test_folder_without_head(tmp_path):
    make().bert.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='BertModel has no task head; .*is it fine-tuned'):
        evaluate(tmp_path, rows(), progress=False)


def test_pickled_weights_are_not_loaded(tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path/'pytorch_model.bin')
    (tmp_path/'model.safetensors').unlink()
    with pytest.raises(ValueError): predict(tmp_path, rows(), progress=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('precision,rtol', [('fp32', 1e-3), ('tf32', 1e-2), ('bf16', 5e-2)])
def test_on_gpu(precision, rtol):
    model, ds = make(), rows()
    want = predict(model, ds, progress=False)
    got = predict(model, ds, device='cuda', precision=precision, progress=False)
    assert model.device.type == 'cpu' and (got-want).abs().max() < rtol*want.abs().max()


@pytest.mark.parametrize('own', [None, 37])
def test_padding_share(monkeypatch, own):
    "Rows of unequal length are batched within a quarter of the Fisher step's budget, or within the caller's."
    from fisher_nodes.tasks import evaluation
    shapes, run = [], evaluation.batch_logits
    monkeypatch.setattr(evaluation, 'batch_logits', lambda m, x, head: (shapes.append(tuple(x.inputs['attention_mask'].shape)), run(m, x, head))[1])
    ds = rows(400)
    predict(make(), ds, batch_tokens=own, progress=False)
    cells, tokens = sum(a*b for a, b in shapes), sum(map(len, ds['input_ids']))
    assert max(a*b for a, b in shapes) <= (own or 2**12//4) and sum(a for a, _ in shapes) == 400
    assert 1-tokens/cells < .2
