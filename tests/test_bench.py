"""Timing the Fisher step: what is written, what is refused. How fast anything is, is no matter of tests."""
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForSequenceClassification

from torch.utils.flop_counter import FlopCounterMode

import fisher_nodes.experiment.bench as timing
from fisher_nodes.engine.batches import Batch
from fisher_nodes.experiment.bench import (
    ROW_STEPS, SHAPE_STEPS, bare_pass, bench, bench_shapes, pass_flops, take_turns)
from fisher_nodes.experiment.bench import run_bench_shapes
from fisher_nodes.app.cli import main
from fisher_nodes.experiment.results import load_bench
from reference import ragged_batches, tiny
from test_cli import save_model, save_rows

@pytest.fixture
def toy():
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24))
    return model, Dataset.from_list([dict(input_ids=torch.randint(1, 50, (n,)).tolist(), label=n % 2) for n in range(3, 15)])

def test_every_step_is_timed_every_round(toy):
    found = bench(*toy, num_samples=5, rounds=2)
    assert [o['what'] for o in found['steps']] == list(ROW_STEPS) and found['num_examples'] == 5
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
    save_model(tmp_path/'x')
    save_rows(tmp_path/'x.csv', [0, 1]*6)
    line = f'bench {tmp_path}/x --data {tmp_path}/x.csv --num-samples 4 --rounds 1 --out {tmp_path}/cost.json'.split()
    assert main(line) == 0
    found = json.loads((tmp_path/'cost.json').read_text())
    assert {'steps', 'model', 'num_examples', 'device', 'precision', 'threads', 'versions', 'machine', 'commit', 'date'} <= found.keys()
    assert main(line) == 2 and '--overwrite' in capsys.readouterr().err

def test_shares_and_work(toy):
    "The floor's share of itself is one, and every step has its own."
    found = bench(*toy, num_samples=12, rounds=2)
    assert found['steps'][0]['what'] == 'floor' and found['steps'][0]['floor_share'] == 1
    assert all(o['floor_share'] > 0 for o in found['steps'])
    assert found['tokens'] == sum(range(3, 15)) <= found['padded_tokens'] and found['flops'] == pass_flops(toy[0], range(3, 15))
    assert [o['what'] for o in found['steps'] if 'flops_per_second' in o] == ['floor', 'mask Fisher']

def test_without_the_floor_there_is_no_share(toy):
    (only,) = bench(*toy, num_samples=4, rounds=1, steps=['mask Fisher'])['steps']
    assert only['floor_share'] is None and only['flops_per_second'] > 0

@pytest.mark.parametrize('layers', [1, 3])
@pytest.mark.parametrize('length', [1, 7])
def test_counted_operations(family, layers, length):
    "One more layer, and one more token, cost what torch counts; heads and poolers are the same in both."
    def count(layers, length):
        model = tiny(family, attn='eager', layers=layers)
        batch = {k: v for k, v in ragged_batches(family, (3,), lengths=(length,))[0].items() if k != 'attention_mask'}
        with FlopCounterMode(display=False) as counter: bare_pass(model, [Batch([0, 1, 2], batch)])
        return counter.get_total_flops(), pass_flops(model, [length]*3)
    (a, x), (b, y) = count(layers, length), count(layers+1, length+2)
    assert b-a == y-x > 0

def test_floor_takes_no_gradient_below_the_first_mask(family):
    "Nor of any weight; and no hook stays."
    model, seen = tiny(family), []
    for name in ('query', 'key', 'value'):
        at = model.base_model.encoder.layer[0].attention.self.get_submodule(name)
        at.register_full_backward_hook(lambda *_: seen.append(name))
    bare_pass(model, [Batch(list(range(len(b['labels']))), b) for b in ragged_batches(family)])
    assert not seen and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())

def test_shapes(tmp_path, capsys):
    "Every step at every precision, then the pair of floor and masks as one thing varies."
    run_bench_shapes(['--shape', 'toy', '--num-samples', '33', '--rounds', '1', '--out', str(tmp_path/'deep'/'a.json')])
    found = json.loads((tmp_path/'deep'/'a.json').read_text())
    first = [o for o in found['steps'] if o['varies'] == 'precision']
    assert [o['what'] for o in first] == list(SHAPE_STEPS) and [o['num_examples'] for o in first] == [33, 33, 33, 33, 5, 33, 33]
    assert ['floor_share' in o for o in first] == [True]*3+[False]*4
    assert 'mask Fisher' in capsys.readouterr().out and len(load_bench(tmp_path/'deep')) == len(found['steps'])
    assert all(o['warm_up'] > 0 and len(o['rounds']) == (9 if o['varies'] == 'nothing' else 1) for o in found['steps'])
    depths = [o['layers'] for o in found['steps'] if o['varies'] == 'depth']
    assert depths == [1, 1, 2, 2]
    assert [(o['what'], o['num_examples']) for o in found['steps'] if o['varies'] == 'host'] == [('batches', 16*33), ('mask Fisher from rows', 16*33)]

def test_shapes_replace_timings_only(tmp_path, monkeypatch, capsys):
    "Before anything is timed."
    def found(*args): return dict(steps=[dict(what='floor', varies='nothing', precision=None, examples_per_second=1., floor_share=1., flops_per_second=1., peak_flops_per_second=1.)])
    monkeypatch.setattr(timing, 'bench_shapes', found)
    mine = tmp_path/'notes.txt'
    for text in ('my words', '{"a": 1}'):
        mine.write_text(text)
        with pytest.raises(SystemExit): timing.run_bench_shapes(['--out', str(mine)])
        assert mine.read_text() == text and 'holds no timings' in capsys.readouterr().err
    for _ in range(2): timing.run_bench_shapes(['--out', str(tmp_path/'new'/'a.json')])
    assert len(json.loads((tmp_path/'new'/'a.json').read_text())['steps']) == 1

def test_the_committed_shapes_have_the_rows_that_are_made():
    "In their order, and with no key that is not made; compiled layers come on top."
    found, keys = bench_shapes('toy', num_samples=4, rounds=1)['steps'], ('varies', 'what', 'labels', 'examples')
    def rows(steps): return [tuple(o[k] for k in keys) for o in steps if o['varies'] not in ('depth', 'compiled')]
    for path in Path(__file__).parents[1].joinpath('nbs', 'results', 'shapes').glob('*-cpu.json'):
        committed = json.loads(path.read_text())['steps']
        assert sorted(rows(committed)) == sorted(rows(found))
        made = {rows([o])[0]: o.keys() for o in found if rows([o])}
        assert all(o.keys() <= made[k] for o in committed for k in rows([o]))

@pytest.mark.parametrize('say, kw', [("`shape` is 'cube'", dict(shape='cube')), ('no device', dict(shape='toy', device='nowhere')),
                                     ('needs a CUDA device', dict(shape='toy', precisions=['tf32']))])
def test_bad_shapes(say, kw):
    with pytest.raises(ValueError, match=say): bench_shapes(num_samples=2, rounds=1, **kw)
