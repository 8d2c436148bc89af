"Padding at either side, and labels that stand on it: what a row means does not depend on where it lies."
import math
import re
import warnings
import pytest
import torch
import transformers as T
from datasets import Dataset
from torch.testing import assert_close
from fisher_nodes import evaluate, mask_fisher, parameter_fisher, predict

QUIET = dict(progress=False)
IDS = [[5,6,7,8,9,10], [11,12,13], [14,15,16,17]]
SIZE = dict(vocab_size=55, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)

def writer(kind, **more):
    torch.manual_seed(0)
    if kind=='gpt2': model = T.GPT2LMHeadModel(T.GPT2Config(vocab_size=55, n_embd=16, n_layer=2, n_head=4, n_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    elif kind=='llama': model = T.LlamaForCausalLM(T.LlamaConfig(**SIZE))
    else: model = T.Qwen3ForCausalLM(T.Qwen3Config(**SIZE, num_key_value_heads=2, head_dim=4))
    with torch.no_grad():
        for p in model.parameters(): p.add_(.3*torch.randn_like(p))
    return model.double().eval()

def padded(rows, side, fill=0):
    width = max(map(len, rows))
    return [[fill]*(width-len(o))+list(o) if side=='left' else list(o)+[fill]*(width-len(o)) for o in rows]

def columns(side, **labels):
    found = dict(input_ids=padded(IDS, side), attention_mask=padded([[1]*len(o) for o in IDS], side))
    return found | {k: padded(v, side, -100) for k, v in labels.items()}

def as_batch(o): return [{k: torch.tensor(v) for k, v in o.items()}]
def close(a, b, rtol=1e-6):
    assert a.kinds.keys()==b.kinds.keys()
    for k, layers in a.kinds.items():
        for x, y in zip(layers, b.kinds[k], strict=True): assert_close(x, y, rtol=rtol, atol=rtol*y.abs().max().item())

@pytest.mark.parametrize('kind', ['gpt2', 'llama', 'qwen3'])
@pytest.mark.parametrize('side', ['left', 'right'])
@pytest.mark.parametrize('own', [False, True], ids=['tokens', 'labels'])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_a_writer_predicts_nothing_from_padding(kind, side, own, checkpointing):
    "The first token of a row has no place before it, wherever the row lies."
    model, how = writer(kind), dict(checkpointing=checkpointing, **QUIET)
    alone = mask_fisher(model, Dataset.from_dict(dict(input_ids=IDS)), **how)
    assert alone.meta.get('num_choices', sum(len(o)-1 for o in IDS))==sum(len(o)-1 for o in IDS)
    given = columns(side, **(dict(labels=IDS) if own else {}))
    close(mask_fisher(model, Dataset.from_dict(given), **how), alone)
    if own: close(mask_fisher(model, as_batch(given), **how), alone)

@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
def test_perplexity_and_full_fisher_by_hand(kind):
    model, left = writer(kind), Dataset.from_dict(columns('left'))
    with torch.no_grad():
        losses = [torch.nn.functional.cross_entropy(model(torch.tensor([o])).logits[0,:-1], torch.tensor(o[1:]), reduction='none') for o in IDS]
    assert math.isclose(evaluate(model, left, **QUIET)['perplexity'], math.exp(torch.cat(losses).mean()), rel_tol=1e-5)
    want = parameter_fisher(model, Dataset.from_dict(dict(input_ids=IDS)), **QUIET).values
    for k, v in parameter_fisher(model, left, **QUIET).values.items(): assert_close(v, want[k], rtol=1e-6, atol=1e-6*want[k].abs().max().item())

def test_a_data_set_of_gpt2_with_padding_at_the_start():
    torch.manual_seed(0)
    model = T.GPT2ForSequenceClassification(T.GPT2Config(vocab_size=55, n_embd=16, n_layer=2, n_head=4, n_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_labels=2)).double().eval()
    want = torch.cat([predict(model, Dataset.from_dict(dict(input_ids=[o])), **QUIET) for o in IDS])
    assert_close(predict(model, Dataset.from_dict(columns('left')), **QUIET), want, rtol=1e-9, atol=0)

def tagger():
    torch.manual_seed(0)
    return T.BertForTokenClassification(T.BertConfig(**SIZE, num_labels=3)).eval()

@pytest.mark.parametrize('make', [writer, lambda _: tagger(), lambda _: T.BertForMaskedLM(T.BertConfig(**SIZE)).eval()], ids=['writer', 'tagger', 'masked'])
@pytest.mark.parametrize('batched', [False, True])
def test_labels_on_padding_are_refused_by_row(make, batched):
    "What `labels = input_ids.copy()` gives after padding to a length."
    model = make('llama')
    given = columns('right') | dict(labels=padded([[1]*len(o) for o in IDS], 'right'))
    data = as_batch(given) if batched else Dataset.from_dict(given)
    said = 'row (1 has 3|2 has 2) labels where its `attention_mask` is 0; expected -100 there'
    with pytest.raises(ValueError, match=said): mask_fisher(model, data, **QUIET)
    if not batched:
        with pytest.raises(ValueError, match=said): evaluate(model, data, **QUIET)

def test_answers_padded_with_the_padding_token():
    torch.manual_seed(0)
    model = T.T5ForConditionalGeneration(T.T5Config(vocab_size=55, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, pad_token_id=0, decoder_start_token_id=0, eos_token_id=3)).eval()
    def data(last): return Dataset.from_dict(dict(input_ids=[[5,6,7], [8,9,10,11]], labels=[[12,13,14,3], [17,3]+last]))
    with pytest.raises(ValueError, match='the labels of row 1 end in padding, token 0; expected -100 there'): mask_fisher(model, data([0,0]), **QUIET)
    close(mask_fisher(model, data([-100]*2), **QUIET), mask_fisher(model, data([]), **QUIET))

@pytest.mark.parametrize('kind, warned', [('bert', True), ('llama', False), ('roberta', False)])
def test_a_model_that_counts_padding_says_so(kind, warned):
    torch.manual_seed(0)
    made = dict(bert=(T.BertForSequenceClassification, T.BertConfig), llama=(T.LlamaForSequenceClassification, T.LlamaConfig), roberta=(T.RobertaForSequenceClassification, T.RobertaConfig))
    cls, config = made[kind]
    model = cls(config(**SIZE, num_labels=2)).eval()
    for data in (Dataset.from_dict(columns('left')), as_batch(columns('left'))):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter('always')
            predict(model, data, **QUIET)
        assert warned==any(re.search('row [12] begins with padding, and a bert counts places', str(o.message)) for o in found)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        predict(model, Dataset.from_dict(columns('right')), **QUIET)
