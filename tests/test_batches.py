"""What reaches the model: columns, padding, and the families that share RoBERTa's layout."""
import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from transformers import (BertConfig, BertForSequenceClassification, CamembertConfig, CamembertForSequenceClassification,
                          XLMRobertaConfig, XLMRobertaForSequenceClassification)

from fisher_nodes import mask_fisher, merge
from fisher_nodes.batches import make_batches, max_positions, text_columns
from reference import brute_mask_fisher, ragged_batches

SIZE = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, max_position_embeddings=40)
RELATIVES = dict(xlm=(XLMRobertaConfig, XLMRobertaForSequenceClassification), camembert=(CamembertConfig, CamembertForSequenceClassification))

@pytest.mark.parametrize('config, cls', RELATIVES.values(), ids=RELATIVES)
def test_relatives_of_roberta(config, cls):
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(cls(config(**SIZE, num_labels=3, pad_token_id=1)).double().eval())
        for p in models[-1].parameters(): p.data += .2*torch.randn_like(p)
    batches = ragged_batches('roberta')
    fisher, (heads, rows) = mask_fisher(models[0], batches), brute_mask_fisher(models[0], batches)
    assert_close(fisher.heads, heads, rtol=1e-10, atol=0)
    assert_close(fisher.rows, rows, rtol=1e-10, atol=0)
    assert len(merge(models, [fisher, mask_fisher(models[1], batches)]))==2 and max_positions(models[0])==38

def test_words_for_labels_are_not_text():
    ds = Dataset.from_dict(dict(text=['a'], label=['good']))
    assert text_columns(ds)==['text']

@pytest.mark.parametrize('length', [2, 3])
def test_lists_of_labels_are_not_padded(length):
    "Also where they are as long as the rows."
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SIZE, num_labels=2, problem_type='regression')).double().eval()
    ids, labels = [[5, 6, 7][:length], [8, 9]], [[.5, -1.], [2., 0.]]
    ds = Dataset.from_dict(dict(input_ids=ids, labels=labels))
    own = [dict(input_ids=torch.tensor([i]), labels=torch.tensor([y])) for i, y in zip(ids, labels)]
    assert_close(mask_fisher(model, ds).heads, mask_fisher(model, own).heads, rtol=1e-10, atol=0)

def test_padding_to_the_longest_of_all_is_cut_back():
    model = BertForSequenceClassification(BertConfig(**SIZE))
    ids = [[5, 6, 0, 0, 0, 0], [5, 6, 7, 0, 0, 0]]
    ds = Dataset.from_dict(dict(input_ids=ids, attention_mask=[[int(o>0) for o in r] for r in ids], label=[0, 1]))
    (batch,) = make_batches(model, ds).batches
    assert batch.rows==[1, 0] and batch.inputs['input_ids'].shape==(2, 3)

def test_columns_may_be_tensors_or_arrays():
    model = BertForSequenceClassification(BertConfig(**SIZE))
    ds = Dataset.from_dict(dict(input_ids=[[5, 6], [7, 8]], label=[0, 1]))
    a, b = (mask_fisher(model, ds.with_format(o)).heads for o in ('torch', 'numpy'))
    assert_close(a, b, rtol=0, atol=0)
