"""What reaches the model: columns, padding, and the families that share RoBERTa's layout."""
import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from transformers import (BertConfig, BertForSequenceClassification, CamembertConfig, CamembertForSequenceClassification,
                          XLMRobertaConfig, XLMRobertaForSequenceClassification)

from fisher_nodes import mask_fisher, merge
from fisher_nodes.engine import memory
from fisher_nodes.engine.batches import BATCH_TOKENS, make_batches, read_columns, row_lengths
from fisher_nodes.engine.text import max_positions, text_columns
from fisher_nodes.engine.memory import token_bytes
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
    ragged = ragged_batches('roberta')
    fisher, (heads, rows) = mask_fisher(models[0], ragged), brute_mask_fisher(models[0], ragged)
    assert_close(fisher.heads, heads, rtol=1e-10, atol=0)
    assert_close(fisher.rows, rows, rtol=1e-10, atol=0)
    assert len(merge(models, [fisher, mask_fisher(models[1], ragged)]))==2 and max_positions(models[0])==38

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

@pytest.mark.parametrize('kind', ['int8', 'int32', 'int64'])
@pytest.mark.parametrize('large', [False, True])
def test_columns_of_tokens_are_arrays(kind, large):
    "Of whole numbers of any size, taken in any order."
    from datasets import Features, Sequence, Value
    ids = [[5, 6, 7], [8], [9, 4]]
    feature = Sequence(Value(kind))
    if large:
        from datasets import LargeList
        feature = LargeList(Value(kind))
    ds = Dataset.from_dict(dict(input_ids=ids, label=[0, 1, 0]), features=Features(input_ids=feature, label=Value('int64')))
    found = read_columns(ds.select([2, 0, 1]))
    assert [o.tolist() for o in found['input_ids']] == [[9, 4], [5, 6, 7], [8]] and found['label'] == [0, 0, 1]
    assert all(o.dtype == 'int64' for o in found['input_ids'])

def test_what_is_missing_stays_missing():
    ds = Dataset.from_dict(dict(input_ids=[[5, 6], None], token_type_ids=[[0, None], [0]], label=[0, 1]))
    found = read_columns(ds)
    assert found['input_ids'] == [[5, 6], None] and found['token_type_ids'] == [[0, None], [0]]

@pytest.mark.parametrize('mask, length', [([1, 1, 0, 1, 0, 0], 4), ([1], 1), ([0, 0], 0), ([], 0), ([1, 1], 2)], ids=str)
def test_length_ends_at_the_last_token_attended_to(mask, length):
    for o in (mask, np.array(mask, int)): assert row_lengths(dict(input_ids=[o], attention_mask=[o])) == [length]

@pytest.mark.parametrize('attn', ['sdpa', 'eager'])
@pytest.mark.parametrize('autocast', [False, True])
def test_memory_is_not_estimated_below_what_autograd_keeps(attn, autocast):
    "A model of width 64, since in a narrow one small things weigh more."
    config = BertConfig(vocab_size=60, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256)
    config._attn_implementation = attn
    model, kept = BertForSequenceClassification(config).eval().requires_grad_(False), {}
    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    x = torch.randn(4, 40, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        out = model(inputs_embeds=x).logits
    for p in model.parameters(): kept.pop(p.untyped_storage().data_ptr(), None)
    assert out.requires_grad and 160*token_bytes(model, 40)/8 < sum(kept.values()) < 160*token_bytes(model, 40)

def test_budget_follows_free_memory(monkeypatch):
    "Never more than the constant, never less than one token."
    model = BertForSequenceClassification(BertConfig(**SIZE))
    monkeypatch.setattr(memory, 'free_memory', lambda device: free)
    monkeypatch.setattr(BertForSequenceClassification, 'device', torch.device('cuda'))
    for free, want in ((0, 1), (100*token_bytes(model), 100), (2**60, BATCH_TOKENS['cuda'])):
        assert memory.batch_budget(model) == want

def test_a_forward_that_hands_on_all_it_is_given_takes_what_its_parent_takes():
    class Passing(BertForSequenceClassification):
        def forward(self, *args, **kwargs): return super().forward(*args, **kwargs)
    torch.manual_seed(0)
    model = Passing(BertConfig(**SIZE)).double().eval()
    plain = BertForSequenceClassification(model.config).double().eval()
    plain.load_state_dict(model.state_dict())
    ds = Dataset.from_dict(dict(input_ids=[[5, 6, 7], [8, 9]], token_type_ids=[[0, 1, 1], [0, 1]], label=[0, 1], idx=[3, 4]))
    a, b = (mask_fisher(o, ds) for o in (model, plain))
    assert_close(a.heads, b.heads, rtol=0, atol=0)
    assert_close(a.rows, b.rows, rtol=0, atol=0)
