"""A model of any family as one uses it: measured, merged in memory and from files, saved, loaded, answered."""
import pytest
import torch
from datasets import Dataset
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForSequenceClassification, CONFIG_MAPPING

from fisher_nodes import Merged, evaluate, mask_fisher, merge, merge_files
from reference import examples

SMALL = dict(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, max_position_embeddings=40, pad_token_id=0,
             bos_token_id=1, eos_token_id=2, num_labels=3)
CASES = { # model type -> what its config says otherwise
    'distilbert': dict(dim=16, hidden_dim=24, n_heads=4, n_layers=2), 'electra': dict(embedding_size=8), 'albert': dict(embedding_size=8), 'mpnet': {},
    'deberta-v2': dict(relative_attention=True, pos_att_type=['c2p', 'p2c'], position_buckets=8), 'modernbert': dict(global_attn_every_n_layers=1, local_attention=128, cls_token_id=3, sep_token_id=2),
    'llama': dict(num_key_value_heads=2), 'qwen2': dict(num_key_value_heads=2), 'qwen3': dict(num_key_value_heads=2, head_dim=8), 'gemma2': dict(num_key_value_heads=2, head_dim=4),
    'gpt2': dict(n_embd=16, n_layer=2, n_head=4, n_positions=40), 'gpt_neox': {}, 'phi': {}, 'mistral': dict(num_key_value_heads=2)}

def made(kind, seed):
    config = AutoConfig.for_model(kind, **SMALL | CASES[kind])
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config)
    for p in model.parameters(): p.data += .2*torch.randn_like(p)
    return model.float().eval()

def known(kind):
    if kind not in CONFIG_MAPPING: pytest.skip(f'this transformers has no {kind}')

@pytest.mark.parametrize('kind', CASES)
def test_the_same_in_memory_and_from_files(kind, tmp_path):
    known(kind)
    models, rows = {t: made(kind, i) for i, t in enumerate('ab')}, Dataset.from_list(examples(8))
    for t, m in models.items(): m.save_pretrained(tmp_path/t)
    merged = merge(models, data=dict.fromkeys(models, rows), num_samples=None, progress=False)
    merged.save_pretrained(tmp_path/'merged')
    again = Merged.from_pretrained(tmp_path/'merged')
    fishers = {t: mask_fisher(m, rows, progress=False) for t, m in models.items()}
    merge_files({t: tmp_path/t for t in models}, fishers, out=tmp_path/'files', progress=False)
    batch = {k: torch.tensor([examples(1)[0][k]]) for k in ('input_ids', 'attention_mask')}
    for t, m in merged.items():
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path/'merged'/t).eval()
        filed = AutoModelForSequenceClassification.from_pretrained(tmp_path/'files'/t).eval()
        with torch.no_grad(): want, *got = [o(**batch).logits for o in (m, again[t], plain, filed)]
        for o in got: assert_close(o, want, rtol=1e-5, atol=1e-6) # with another implementation of attention
        for o in (again[t], plain, filed): assert all(torch.equal(p, o.get_parameter(n)) for n, p in m.named_parameters())
        assert 0 <= evaluate(m, rows)['accuracy'] <= 1

@pytest.mark.parametrize('kind', CASES)
def test_equal_models_stay_what_they_are(kind):
    known(kind)
    model, rows = made(kind, 0), Dataset.from_list(examples(6))
    merged = merge(dict(a=model, b=model), data=dict(a=rows, b=rows), num_samples=None, progress=False)
    for n, p in model.named_parameters(): assert_close(merged['a'].get_parameter(n), p, rtol=1e-6, atol=1e-7)
