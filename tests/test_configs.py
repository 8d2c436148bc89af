"""Models that compute different functions are not merged, whatever entry of a configuration says it.

The reference is the forward pass: an entry is changed, the weights stay, and two outputs are compared."""
import copy
import json

import pytest
import torch
import transformers as T
import zoo
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from fisher_nodes import merge, merge_files

FAMILIES = ['bert-classifier', 'roberta', 'esm', 'distilbert', 'deberta-v3', 'modernbert-classifier', 'llama-writer',
    'gemma2', 'gpt2-writer', 'gpt_neo', 'opt', 't5-writer', 'bart-writer', 'vit-classifier', 'clip', 'wav2vec2', 'mixtral']
TOLD_ELSEWHERE = {'tie_word_embeddings'} # by which parameters are one tensor
OF_THE_HEAD = {'classifier_activation'} # of ModernBERT's classifier, which stays its task's

def others(value):
    "Values that stand in the place of one."
    if isinstance(value, bool): return [not value]
    if isinstance(value, int): return [value+1, value-1]
    if isinstance(value, float): return [value*1.5 if value else .5]
    if isinstance(value, str): return ['relu', 'gelu', 'full_attention']
    if isinstance(value, list): return [value[1:]+value[:1]]
    return [3] if value is None else []

def changed(entries, path=()):
    "Every entry of a configuration, also in those inside it, with other values."
    for k, v in entries.items():
        if isinstance(v, dict) and k not in ('id2label', 'label2id'): yield from changed(v, (*path, k))
        elif k not in ('model_type', 'dtype'): yield from (((*path, k), o) for o in others(v))

def replaced(entries, path, value):
    entries, at = (o := copy.deepcopy(entries)), o
    for k in path[:-1]: at = at[k]
    at[path[-1]] = value
    return entries

def twin(name, model, entries):
    "The model of other entries with the same weights; None where there is none."
    kind, _, _, auto = zoo.case(name)
    try:
        config = CONFIG_MAPPING[kind].from_dict(entries)
        config._attn_implementation = config._experts_implementation = 'eager'
        cls = getattr(T, auto)
        other = (cls.from_config if auto.startswith('Auto') else cls)(config).double().eval()
        other.load_state_dict(model.state_dict())
        return other
    except Exception: return None

@torch.no_grad()
def outputs(model, batch):
    try: return [o for o in model(**batch).to_tuple() if torch.is_tensor(o)]
    except Exception: return None

@pytest.mark.parametrize('name', FAMILIES)
def test_whatever_changes_the_function_is_refused(name):
    model, batch, found = zoo.build(name), zoo.collate(zoo.examples(name)), []
    mine = outputs(model, batch)
    for path, value in changed(model.config.to_dict()):
        other = twin(name, model, replaced(model.config.to_dict(), path, value))
        theirs = other and outputs(other, batch)
        if theirs is None or path[-1] in TOLD_ELSEWHERE|OF_THE_HEAD: continue
        if len(mine)==len(theirs) and all(x.shape==y.shape and (x-y).abs().max()<1e-9 for x, y in zip(mine, theirs)): continue
        found.append(path[-1])
        with pytest.raises(ValueError, match='models cannot be merged: '): merge(dict(a=model, b=other), method='average')
    assert found # the walk reaches entries that matter

LLAMA = dict(model_type='llama', hidden_act='silu', vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=24, max_position_embeddings=40, pad_token_id=0, bos_token_id=1, eos_token_id=2)

def llama(**options): return T.LlamaForCausalLM(T.LlamaConfig(**{k: v for k, v in LLAMA.items() if k!='model_type'} | options))
def rope(**options): return dict(rope_parameters=dict(rope_type='default', rope_theta=1e4) | options)
def distilbert(**options): return T.DistilBertForSequenceClassification(T.DistilBertConfig(**zoo.ZOO['distilbert'][1] | options))
def gemma2(**options): return T.Gemma2ForCausalLM(T.Gemma2Config(**zoo.ZOO['gemma2'][1] | options))
def mixtral(**options): return T.MixtralForCausalLM(T.MixtralConfig(**zoo.MIXTURE | options))
def gpt2(**options): return T.GPT2LMHeadModel(T.GPT2Config(**zoo.GPT2 | options))
def clip(tower, **options): return T.CLIPModel(T.CLIPConfig(**zoo.TOWERS | {tower: zoo.TOWERS[tower] | options}))
def bert(cls=T.BertForSequenceClassification, **options): return cls(T.BertConfig(**zoo.BASE | options))

@pytest.mark.parametrize('a,b,said', [
    (llama(**rope()), llama(**rope(rope_theta=5e5)), "rope_parameters.rope_theta is 10000.0 in 'a' but 500000.0 in 'b'"),
    (llama(), llama(**rope(rope_type='linear', factor=2.)), "rope_parameters.rope_type is 'default' in 'a' but 'linear' in 'b'"),
    (llama(), llama(rms_norm_eps=.1), "rms_norm_eps is 1e-06 in 'a' but 0.1 in 'b'"),
    (gemma2(), gemma2(attn_logit_softcapping=None), "attn_logit_softcapping is 50.0 in 'a' but None in 'b'"),
    (gpt2(), gpt2(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is False in 'a' but True in 'b'"),
    (distilbert(), distilbert(activation='relu'), "activation is 'gelu' in 'a' but 'relu' in 'b'"),
    (clip('vision_config'), clip('vision_config', num_attention_heads=4), "vision_config.num_attention_heads is 2 in 'a' but 4 in 'b'"),
    (clip('text_config'), clip('text_config', eos_token_id=3), "text_config.eos_token_id is 2 in 'a' but 3 in 'b'")])
def test_the_entry_the_values_and_the_tasks_are_named_in_memory_and_from_files(a, b, said, tmp_path):
    for name, model in dict(a=a, b=b).items(): model.save_pretrained(tmp_path/name)
    def refused(): return pytest.raises(ValueError, match=f'^models cannot be merged: {said}$'.replace('(', r'\('))
    with refused(): merge(dict(a=a, b=b), method='average')
    with refused(): merge_files({o: str(tmp_path/o) for o in 'ab'}, out=tmp_path/'out', method='average')

@pytest.mark.parametrize('a,b', [
    (bert(), bert(hidden_dropout_prob=.5, initializer_range=1., use_cache=False, eos_token_id=9, num_labels=5,
                  problem_type='multi_label_classification', dtype='float32', transformers_version='4.1', classifier_dropout=.2)),
    (bert(), bert(finetuning_task='rte', notes='of the user', num_choices=3)), # of one alone, or unknown
    (bert(notes=1, _num_labels=2), bert(notes=2, _num_labels=3)), # read by nothing
    (llama(eos_token_id=2), llama(eos_token_id=[2, 3], attention_dropout=.1, pretraining_tp=2)),
    (clip('vision_config'), clip('vision_config', attention_dropout=.1, initializer_range=.5)),
    (mixtral(), mixtral(router_aux_loss_coef=.5, output_router_logits=True))])
def test_what_changes_no_function_may_differ(a, b):
    assert set(merge(dict(a=a, b=b), method='average'))=={'a', 'b'}

def test_an_entry_that_the_class_does_not_know_counts_if_its_code_reads_it():
    a, b = [zoo.build('deberta-v3') for _ in range(2)]
    b.config.position_buckets = 9
    with pytest.raises(ValueError, match="position_buckets is 8 in 'a' but 9 in 'b'"): merge(dict(a=a, b=b), method='average')
    del a.config.position_buckets, b.config.position_buckets
    a.config.notes, b.config.notes = 1, 2
    merge(dict(a=a, b=b), method='average')

def test_older_names_are_the_newer_ones(tmp_path):
    llama(**rope(rope_type='linear', rope_theta=5e3, factor=2.)).save_pretrained(tmp_path/'a')
    llama(**rope()).save_pretrained(tmp_path/'b')
    old = LLAMA | dict(architectures=['LlamaForCausalLM'], rope_theta=5e3, rope_scaling=dict(type='linear', factor=2.))
    (tmp_path/'b/config.json').write_text(json.dumps(old))
    merge_files({o: str(tmp_path/o) for o in 'ab'}, out=tmp_path/'out', method='average')
    merge({o: str(tmp_path/o) for o in 'ab'}, method='average')

def test_a_base_may_have_another_head_and_no_other_function():
    models = dict(a=bert(num_labels=3), b=bert(num_labels=5))
    base = bert(T.BertForMaskedLM, hidden_dropout_prob=.5, id2label={0: 'x'}, label2id={'x': 0})
    base.bert.pooler = copy.deepcopy(models['a'].bert.pooler)
    merge(models, base=base, method='task-arithmetic')
    base.config.layer_norm_eps = .1
    with pytest.raises(ValueError, match="`base` does not fit: .*layer_norm_eps is 0.1 in 'base' but 1e-12 in "):
        merge(models, base=base, method='task-arithmetic')

@pytest.mark.parametrize('name', FAMILIES)
def test_a_model_that_was_saved_and_loaded_is_the_same(name, tmp_path):
    model = zoo.build(name)
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path)
    assert set(merge(dict(a=model, b=other), method='average'))=={'a', 'b'}
