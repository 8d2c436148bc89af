"""Faults that were found by trying to break the package, each kept as a test."""
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch.testing import assert_close
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

from fisher_nodes import MaskFisher, Merged, ParameterFisher, evaluate, finetune, mask_fisher, merge
from fisher_nodes.engine.batches import Batch
from fisher_nodes.engine.text import text_columns
from fisher_nodes.core.averaging import node_shares
from fisher_nodes.engine.memory import halves
from fisher_nodes.merging.run import merge_files
from fisher_nodes.tasks.tasks import load_task
from reference import brute_mask_fisher, examples, ragged_batches, task_loss, tiny
from test_roundtrip import inputs_of

def pair(**kw): return dict(a=tiny(**kw), b=tiny(seed=1, **kw))

def test_overwrite_never_removes_what_is_not_an_earlier_merge(tmp_path):
    models = pair()
    for t, m in models.items(): m.save_pretrained(tmp_path/t)
    with pytest.raises(ValueError, match='not from an earlier merge'): merge(models, method='average').save_pretrained(tmp_path, overwrite=True)
    assert all((tmp_path/t/'model.safetensors').exists() for t in models)

def test_a_report_cannot_name_folders_elsewhere(tmp_path):
    (tmp_path/'precious').mkdir(); (tmp_path/'out').mkdir()
    (tmp_path/'out'/'merge_report.json').write_text(json.dumps(dict(tasks={'../precious': {}})))
    with pytest.raises(ValueError, match='not a merge report'): merge(pair(), method='average').save_pretrained(tmp_path/'out', overwrite=True)
    assert (tmp_path/'precious').exists()

@pytest.mark.parametrize('text', ['', '{}', '[]', '{"tasks": {}}'])
def test_a_broken_report_is_named(text, tmp_path):
    (tmp_path/'merge_report.json').write_text(text)
    with pytest.raises(ValueError, match='is not a merge report'): Merged.from_pretrained(tmp_path)

def test_one_folder_holds_one_result(tmp_path):
    merge(pair(), method='average').save_pretrained(tmp_path)
    rows = Dataset.from_list(examples(8, 2))
    finetune(tiny(num_labels=2, dtype=torch.float32), rows, out=tmp_path, epochs=1, overwrite=True, progress=False)
    assert not (tmp_path/'merge_report.json').exists()

@pytest.mark.parametrize('extra', [1, 2])
def test_a_loss_with_another_number_of_rows_is_refused(extra):
    def loss(model, batch): return task_loss(model, batch)*model(input_ids=torch.tensor([[5, 6, 7]]*extra)).logits.sum()
    with pytest.raises(ValueError, match='one example must be one row'): mask_fisher(tiny(), ragged_batches(), loss=loss, progress=False)

def test_a_mask_of_another_length_is_refused():
    rows = Dataset.from_list([{**e, 'attention_mask': e['attention_mask'][:-1]} for e in examples(4)])
    with pytest.raises(ValueError, match='row 0 has .* `input_ids` but'): mask_fisher(tiny(), rows)

def test_fp32_switches_autocast_off():
    model = tiny(dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16): got = mask_fisher(model, ragged_batches(), precision='fp32')
    assert_close(got.heads, mask_fisher(model, ragged_batches()).heads, rtol=1e-6, atol=0)

def test_shared_layers_are_refused():
    model = tiny()
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
    with pytest.raises(ValueError, match='share modules'): mask_fisher(model, ragged_batches())

def test_shares_do_not_overflow():
    F = torch.full((2, 3), 1e308, dtype=torch.float64)
    assert_close(node_shares(F, torch.full((2,), 1e308, dtype=torch.float64))[0], torch.full_like(F, .5), rtol=0, atol=0)

def test_multi_label_heads_need_a_label_for_each_class():
    model = tiny()
    model.config.problem_type = 'multi_label_classification'
    with pytest.raises(ValueError, match='labels of row 0 must be whole numbers in a list'): mask_fisher(model, ragged_batches())

def test_heads_follow_the_body_to_the_widest_dtype(tmp_path):
    merged = merge(dict(a=tiny(dtype=torch.float16), b=tiny(seed=1, dtype=torch.float32)), method='average')
    with torch.no_grad():
        before = merged.logits(**inputs_of('bert'))
        merged.save_pretrained(tmp_path)
        after = Merged.from_pretrained(tmp_path).logits(**inputs_of('bert'))
    for t in before: assert_close(after[t], before[t], rtol=1e-5, atol=1e-6)

def test_tied_weights_are_saved_once(tmp_path):
    cfg = BertConfig(vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24)
    models = {t: BertForMaskedLM(cfg).eval() for t in 'ab'}
    merged = merge(models, method='average')
    merged.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(): assert_close(AutoModelForMaskedLM.from_pretrained(tmp_path/'a')(ids).logits, merged['a'](ids).logits)

def test_ragged_layers_are_not_written_where_nobody_could_read_them(tmp_path):
    models = pair()
    for m in models.values():
        m.bert.encoder.layer[1].intermediate.dense = torch.nn.Linear(16, 12).double()
        m.bert.encoder.layer[1].output.dense = torch.nn.Linear(12, 16).double()
    merged = merge(models, {t: mask_fisher(m, ragged_batches()) for t, m in models.items()})
    with pytest.raises(ValueError, match='layer.1.* have other widths'): merged.save_pretrained(tmp_path/'out')
    assert not (tmp_path/'out').exists()

def test_a_model_made_in_inference_mode_is_named():
    with torch.inference_mode(): model = tiny()
    with pytest.raises(ValueError, match='inference_mode'): mask_fisher(model, ragged_batches())

@pytest.mark.parametrize('dtype', [torch.int32, torch.bool])
def test_labels_of_any_integer_type(dtype):
    model, batches = tiny(num_labels=2), ragged_batches(num_labels=2)
    narrow = [{**b, 'labels': b['labels'].to(dtype)} for b in batches]
    assert_close(mask_fisher(model, narrow).heads, mask_fisher(model, batches).heads, rtol=0, atol=0)

def test_a_body_has_no_logits():
    with pytest.raises(ValueError, match='has no task head'): mask_fisher(tiny().bert, ragged_batches())
    merged = merge(dict(a=tiny().bert, b=tiny(seed=1).bert), method='average')
    with pytest.raises(ValueError, match='have no task head'): merged.logits(**inputs_of('bert'))

@pytest.mark.parametrize('name', ['README.md', 'tokenizer.json', 'vocab.txt'])
def test_names_of_files_are_refused_early(name):
    with pytest.raises(ValueError, match='looks like a file'): merge({name: tiny(), 'b': tiny(seed=1)}, method='average')

def test_a_model_by_its_folder(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    got = mask_fisher(str(tmp_path), ragged_batches())
    assert_close(got.heads, brute_mask_fisher(model, ragged_batches())[0], rtol=1e-5, atol=0)

def test_fishers_compare_by_identity_and_missing_folders_are_named(tmp_path):
    f = MaskFisher(torch.ones(2, 4), torch.ones(2, 24))
    assert f==f and f!=MaskFisher(f.heads, f.rows)
    with pytest.raises(FileNotFoundError, match='folder does not exist'): f.save(tmp_path/'no'/'f.safetensors')
    with pytest.raises(FileNotFoundError, match='is not a file'): MaskFisher.load(tmp_path)

@pytest.mark.parametrize('seed', ['x', 1.5, -1, True, 2**32, None])
def test_a_seed_is_a_whole_number(seed):
    said = '`seed` .*a whole number from 0'
    with pytest.raises(ValueError, match=said): merge(pair(), method='dare', base=tiny(), seed=seed)
    with pytest.raises(ValueError, match=said): mask_fisher(tiny(), Dataset.from_list(examples()), num_samples=4, seed=seed)

@pytest.mark.parametrize('length', ['x', 1.5, 0])
def test_a_length_is_a_whole_number(length):
    rows = Dataset.from_dict(dict(text=['a', 'b'], label=[0, 1]))
    with pytest.raises(ValueError, match='`max_length` must be a whole number of at least 1'): mask_fisher(tiny(), rows, tokenizer=lambda *a, **k: 0, max_length=length)

@pytest.mark.parametrize('name', ['id', 'guid', 'IDX'])
def test_what_numbers_rows_is_no_text(tmp_path, name):
    rows = {name: ['a1', 'a2'], 'text': ['good', 'bad'], 'label': [1, 0]}
    assert text_columns(Dataset.from_dict(rows)) == ['text']
    Dataset.from_dict(rows).to_csv(tmp_path/'x.csv')
    assert load_task(tmp_path/'x.csv')[1].text == ('text',)

def test_positions_that_all_rows_share_stay_whole():
    batch = Batch([0, 1, 2], dict(input_ids=torch.ones(3, 5), position_ids=torch.arange(5)[None], labels=torch.tensor([0, 1, 0]), scale=torch.tensor(2.)))
    a, b = halves(batch)
    assert a.inputs['position_ids'].shape == b.inputs['position_ids'].shape == (1, 5) and b.inputs['labels'].shape == (1,) and a.inputs['scale'] == 2

@pytest.mark.parametrize('about', [{}, dict(num_examples='x', meta='{}'), dict(num_examples='3', meta='{'), dict(num_examples='3'), dict(num_examples='3', meta='null'), dict(num_examples='3', meta='[]')])
@pytest.mark.parametrize('kind', [MaskFisher, ParameterFisher])
def test_a_fisher_with_bad_metadata_is_named(tmp_path, kind, about):
    save_file({'heads.0': torch.ones(1, 2), 'rows.0': torch.ones(1, 2)}, tmp_path/'f.safetensors', about | dict(kind='ParameterFisher'))
    with pytest.raises(ValueError, match=f'f.safetensors is not a saved {kind.__name__}: its metadata'): kind.load(tmp_path/'f.safetensors')

def test_a_file_that_is_missing_is_named_with_its_task(tmp_path):
    with pytest.raises(ValueError, match="data of 'b': .*no.csv is not a file"):
        merge(pair(), data=dict(a=Dataset.from_list(examples()), b=str(tmp_path/'no.csv')))

@pytest.mark.parametrize('text', ['not json', '[]', '{}', '{"metadata": {}, "weight_map": 3}', '{"metadata": {}, "weight_map": {"a": 1}}', '{"metadata": {}, "weight_map": {}}',
                                  '{"metadata": {}, "weight_map": {"a": "../model.safetensors"}}', '{"weight_map": {"a": "model-1.safetensors"}}', b'\xff\xfe{}'])
@pytest.mark.parametrize('how', ['merge', 'merge_files', 'evaluate'])
def test_an_index_that_is_none_is_named(text, how, tmp_path):
    for t, m in pair().items(): m.save_pretrained(tmp_path/t, max_shard_size='4KB')
    (tmp_path/'b'/'model.safetensors.index.json').write_bytes(text if isinstance(text, bytes) else text.encode())
    folders = {t: tmp_path/t for t in 'ab'}
    with pytest.raises(ValueError, match='b.model.safetensors.index.json is not an index of weights'):
        if how == 'merge': merge(folders, method='average')
        elif how == 'merge_files': merge_files(folders, method='average', out=tmp_path/'out')
        else: evaluate(tmp_path/'b', ragged_batches())
    assert not (tmp_path/'out').exists()

def test_weights_that_are_not_in_memory_are_named():
    with pytest.raises(ValueError, match="model of 'b': the weights of 'bert.* are not in memory"):
        merge(dict(a=tiny(), b=tiny().to('meta')), method='average')
    with pytest.raises(ValueError, match='`base`: the weights of .* are not in memory'): merge(pair(), method='task-arithmetic', base=tiny().to('meta'))

def test_what_cannot_be_saved_is_refused_before_merging():
    with pytest.raises(TypeError, match='`tokenizer` must be a tokenizer of transformers, got str'): merge(pair(), method='average', tokenizer='x')
    with pytest.raises(ValueError, match='80 bytes at most'): merge(dict(zip(['a'+'\U00020000'*20, 'b'], pair().values())), method='average')

def test_options_may_be_numbers_of_numpy(tmp_path):
    merged = merge(pair(), method='task-arithmetic', base=tiny(seed=2), scale=np.float32(.5))
    merged.save_pretrained(tmp_path)
    assert_close(merged.body.state_dict(), merge(pair(), method='task-arithmetic', base=tiny(seed=2), scale=.5).body.state_dict(), rtol=0, atol=0)

def test_an_index_that_is_not_read_is_not_looked_at(tmp_path):
    "Nor are shards in a folder of their own refused."
    model = tiny(num_labels=2)
    model.save_pretrained(tmp_path/'a')
    (tmp_path/'a'/'model.safetensors.index.json').write_text('junk')
    model.save_pretrained(tmp_path/'b', max_shard_size='4KB')
    (tmp_path/'b'/'parts').mkdir()
    for o in list((tmp_path/'b').glob('*.safetensors')): o.rename(o.parent/'parts'/o.name)
    index = tmp_path/'b'/'model.safetensors.index.json'
    table = json.loads(index.read_text())
    index.write_text(json.dumps(table | dict(weight_map={k: f'parts/{v}' for k, v in table['weight_map'].items()})))
    merge_files({t: tmp_path/t for t in 'ab'}, method='average', out=tmp_path/'out')
    assert (tmp_path/'out'/'model.safetensors').is_file()

def test_a_config_comes_back_as_it_was():
    "transformers notes the kind of problem in it when a loss of its own is asked for."
    model = tiny()
    before = model.config.to_dict()
    mask_fisher(model, ragged_batches(), loss=lambda m, b: 0*m(**b).loss+m(b['input_ids'], b['attention_mask']).logits[:,0], progress=False)
    assert model.config.to_dict() == before and model.config.problem_type is None
