"""Timing the Fisher step: what is written, what is refused. How fast anything is, is no matter of tests."""
import json

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification

from fisher_nodes.bench import STEPS, bench, take_turns
from fisher_nodes.cli import main
from test_cli import save_model, save_rows

@pytest.fixture
def toy():
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24))
    return model, Dataset.from_list([dict(input_ids=torch.randint(1, 50, (n,)).tolist(), label=n % 2) for n in range(3, 15)])

def test_every_step_is_timed_every_round(toy):
    found = bench(*toy, num_samples=5, rounds=2)
    assert [o['what'] for o in found['steps']] == list(STEPS) and found['num_examples'] == 5
    assert all(len(o['rounds']) == 2 and min(o['rounds']) <= o['seconds'] <= max(o['rounds']) for o in found['steps'])

def test_more_samples_than_rows_are_all_rows(toy): assert bench(*toy, num_samples=100, rounds=1, steps=['grams (RegMean)'])['num_examples'] == 12

def test_the_model_comes_back_as_it_was(toy):
    model, before = toy[0].train(), {k: v.clone() for k, v in toy[0].state_dict().items()}
    bench(*toy, num_samples=4, rounds=1)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

@pytest.mark.parametrize('say,kw', [("unknown step 'soup'", dict(steps=['soup'])), ('expected at least 1', dict(rounds=0)),
                                    ('no device', dict(device='nowhere')), ('precision', dict(precision='fp8', rounds=1))])
def test_bad_input(toy, say, kw):
    with pytest.raises(ValueError, match=say): bench(*toy, **kw)

def test_steps_take_turns():
    calls = []
    take_turns(dict(a=lambda: calls.append('a'), b=lambda: calls.append('b')), 3, torch.device('cpu'))
    assert ''.join(calls) == 'ab'*4

def test_command_line(tmp_path, capsys):
    save_model(tmp_path/'x'); save_rows(tmp_path/'x.csv', [0, 1]*6)
    line = f'bench {tmp_path}/x --data {tmp_path}/x.csv --num-samples 4 --rounds 1 --out {tmp_path}/cost.json'.split()
    assert main(line) == 0
    found = json.loads((tmp_path/'cost.json').read_text())
    assert {'steps', 'model', 'num_examples', 'device', 'precision', 'threads', 'versions', 'machine', 'commit', 'date'} <= found.keys()
    assert main(line) == 2 and '--overwrite' in capsys.readouterr().err
