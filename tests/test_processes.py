"""Two and three processes on the CPU: the numbers of one, the message of the one that failed, and never a hang."""
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from fisher_nodes import MaskFisher, ParameterFisher
from processes_case import DTYPES, FAULTS, MEASURED, tensors, tiny

HERE = Path(__file__).parent
COUNTS = (2, 3)
NAMES = [f'{d}/{k}' for d in DTYPES for k in MEASURED if d != 'bfloat16' or k == 'data set']

def torchrun(count, *words, timeout=240):
    "Start processes and wait; what hangs is killed, with all its children."
    line = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', count, *words]
    env = os.environ | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', CUDA_VISIBLE_DEVICES='')
    with subprocess.Popen([str(o) for o in line], cwd=HERE, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True) as p:
        try: said, _ = p.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(p.pid, 9)
            pytest.fail(f'{words} hung; it said {p.communicate()[0][-2000:]}')
    return p.returncode, said

@pytest.fixture(scope='module', params=COUNTS, ids=lambda n: f'{n} processes')
def launched(request, tmp_path_factory):
    "One launch that does everything: `(number of processes, folder)`."
    out = tmp_path_factory.mktemp('processes')
    code, said = torchrun(request.param, 'processes_case.py', out, 'main')
    assert code == 0, said[-3000:]
    return request.param, out

@cache
def read(out, rank): return torch.load(out/f'found-{rank}.pt', weights_only=False)

def said(launched): return [json.loads((launched[1]/f'said-{r}.json').read_text()) for r in range(launched[0])]

@cache
def alone_here(name):
    torch.set_num_threads(1)
    dtype, case = name.split('/', 1)
    return MEASURED[case](tiny(dtype=DTYPES[dtype]))

@pytest.mark.parametrize('name', NAMES)
def test_same_numbers_as_one_process(launched, name):
    "1e-12 of the largest number in float64, and 1e-6 where results are float32."
    count, out = launched
    want, parts = alone_here(name), [read(out, r)[name] for r in range(count)]
    assert all(o['num_examples'] == want.num_examples for o in parts)
    assert all(o['meta'] == want.meta for o in parts)
    rtol = 1e-12 if name.startswith('float64') else 1e-6
    for k, v in tensors(want).items():
        for o in parts:
            assert o['tensors'][k].dtype == v.dtype
            assert_close(o['tensors'][k], v, rtol=rtol if 'gram' not in name and 'matri' not in k else 0, atol=rtol*v.abs().max().item() if 'gram' in name or 'matri' in k else 0)
            assert torch.equal(o['tensors'][k], parts[0]['tensors'][k])

def test_every_process_works(launched):
    "The shares are dealt in turns, and what is shared arrives."
    count, _ = launched
    for r, o in enumerate(said(launched)):
        assert o['place'] == [r, count] and o['main'] == (r == 0)
        assert o['share'] == list(range(7))[r::count] and o['exchange'] == list(range(count)) and o['from_main'] == 'from 0'

def test_one_process_writes(launched):
    count, out = launched
    assert all(o['wrote'] == ['saved-parameters.safetensors', 'saved.safetensors'] for o in said(launched))
    want = alone_here('float64/data set')
    for path in [out/'saved.safetensors', *(out/f'alone-{r}.safetensors' for r in range(count))]:
        found = MaskFisher.load(path)
        assert_close(found.heads, want.heads, rtol=1e-12, atol=0)
        assert found.meta == want.meta and found.num_examples == 23
    assert ParameterFisher.load(out/'saved-parameters.safetensors').num_examples == 23

def test_alone_asks_nobody(launched):
    assert [o['alone'] for o in said(launched)] == [[True, r+1] for r in range(launched[0])]

SAYS = {
    'bad label': ('ValueError', 'label 9 of row 7 is not'),
    'nan': ('ValueError', 'the loss of row 4 is nan'),
    'nan, parameters': ('ValueError', 'the loss of row 4 is nan'),
    'nan, grams': ('ValueError', 'row 4: logits [nan'),
    'one fails': ('KeyError', 'gone'),
    'one fails strangely': (None, '1 and 2'),
    'no examples': ('ValueError', 'no examples'),
    'bad choice': ('ValueError', "`labels` is 'nope'"),
    'other seed': ('ValueError', 'different `seed`'),
    'other model': ('ValueError', 'different `model`'),
    'other rows': ('ValueError', 'different `data`'),
    'other batches in a list': ('ValueError', 'different `data`'),
    'other batches': ('ValueError', 'saw different batches'),
    'fewer batches': ('ValueError', 'saw different batches'),
    'other function': ('ValueError', 'different `function`'),
    'prepared loader': ('ValueError', 'divided already'),
    'wrapped model': ('ValueError', 'unwrap_model')}

@pytest.mark.parametrize('fault', FAULTS)
def test_a_failure_is_everybodys(launched, fault):
    kind, words = SAYS[fault]
    for o in said(launched):
        got = o['faults'][fault]
        assert got is not None and words in got[1] and kind in (None, got[0]), (o['place'], got)

def test_work_goes_on_after_failures(launched): assert all(o['afterwards'] == 23 for o in said(launched))

def test_a_process_that_ends(tmp_path):
    code, text = torchrun(3, 'processes_case.py', tmp_path, 'one_ends', timeout=90)
    assert code != 0
    for path in tmp_path.glob('ends-*.json'): # the launcher may end the others before they notice
        assert 'another process did not come' in json.loads(path.read_text())[1]

def test_a_process_that_does_not_come(tmp_path):
    code, text = torchrun(2, 'processes_case.py', tmp_path, 'only_main', timeout=90)
    assert code == 0, text[-2000:]
    kind, words = json.loads((tmp_path/'missing-0.json').read_text())
    assert kind == 'RuntimeError' and 'another process did not come' in words and 'alone' in words
