"""Two and three processes on the CPU: the numbers of one, the message of the one that failed, and never a hang."""
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import psutil
import pytest
import torch
from torch.testing import assert_close

from accelerate import dispatch_model

from fisher_nodes.app.cli import main
from fisher_nodes import MaskFisher, ParameterFisher, linear_grams, mask_fisher, parameter_fisher, predict
from conftest import SLOW
from test_cli import save_model
from processes_case import DTYPES, FAULTS, MEASURED, dataset, tensors, tiny

HERE = Path(__file__).parent
COUNTS = (2, *SLOW([3]))
NAMES = [f'{d}/{k}' for d in DTYPES for k in MEASURED if d != 'bfloat16' or k == 'data set']

def torchrun(count, *words, timeout=240):
    "Start processes and wait; what hangs is killed, with all its children."
    line = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', count, *words]
    env = os.environ | dict(OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1', CUDA_VISIBLE_DEVICES='')
    with subprocess.Popen([str(o) for o in line], cwd=HERE, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True) as p:
        try: said, _ = p.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            for o in [*psutil.Process(p.pid).children(recursive=True), p]: o.kill() # workers have sessions of their own
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

PARTS = dict.fromkeys(('bert.embeddings', 'bert.encoder.layer.0', 'bert.encoder.layer.1', 'bert.pooler', 'classifier'), 'cpu')

COMMAND = ['--no-python', sys.executable, '-c', 'import sys; from fisher_nodes.app.cli import main; sys.exit(main())']

def test_the_command_line(tmp_path):
    "The command prints and writes once, with the numbers of one process; a mistake is one line."
    save_model(tmp_path/"model")
    (tmp_path/'rows.csv').write_text('text,label\n' + ''.join(f'the sun shines {"often "*i},{i%2}\n' for i in range(7)))
    words = ['fisher', tmp_path/'model', '--data', tmp_path/'rows.csv', '--json', '--out']
    code, text = torchrun(2, *COMMAND, *words, tmp_path/'two.safetensors')
    assert code == 0 and text.count('"num_examples": 7') == 1, text[-2000:]
    assert main([str(o) for o in (*words, tmp_path/'one.safetensors')]) == 0
    one, two = (MaskFisher.load(tmp_path/f'{n}.safetensors') for n in ('one', 'two'))
    assert one.meta == two.meta
    assert_close(two.heads, one.heads, rtol=1e-5, atol=0)
    code, text = torchrun(2, *COMMAND, 'merge', f'a={tmp_path/"model"}', f'b={tmp_path/"model"}', '--method', 'average', '--json', '--out', tmp_path/'both')
    assert code == 0 and text.count('"wrote"') == 1 and (tmp_path/'both'/'merge_report.json').is_file(), text[-2000:]
    code, text = torchrun(2, *COMMAND, *words, tmp_path/'two.safetensors')
    assert code and text.count('exists; give --overwrite') == 1, text[-2000:]

def hooks(model): return {n: id(getattr(m, '_hf_hook', None)) for n, m in model.named_modules() if hasattr(m, '_hf_hook')}

@pytest.mark.parametrize('call', [mask_fisher, parameter_fisher, linear_grams])
@pytest.mark.parametrize('parts', [{'': 'cpu'}, PARTS], ids=['whole', 'by layer'])
def test_placed_model(call, parts):
    "The same numbers and meta data through Accelerate's hooks, which stay where they are, as do weights and their flags."
    placed, want = dispatch_model(tiny(), parts, force_hooks=True), call(tiny(), dataset(), progress=False)
    placed.base_model.pooler.requires_grad_(False)
    before = hooks(placed), [(p.data_ptr(), p.requires_grad) for p in placed.parameters()]
    got = call(placed, dataset(), progress=False)
    assert len(before[0]) >= len(parts) and before == (hooks(placed), [(p.data_ptr(), p.requires_grad) for p in placed.parameters()])
    assert got.meta == want.meta
    for k, v in tensors(want).items(): assert_close(tensors(got)[k], v, rtol=1e-12, atol=1e-15)

@pytest.mark.parametrize('call', [mask_fisher, parameter_fisher, linear_grams])
def test_offloaded_model_is_refused(call, tmp_path):
    away = dispatch_model(tiny(), PARTS | {'bert.encoder.layer.1': 'disk'}, offload_dir=tmp_path, force_hooks=True)
    before = hooks(away)
    with pytest.raises(ValueError, match='layer.1.attention.self.query.weight. are offloaded'): call(away, dataset(), progress=False)
    with pytest.raises(ValueError, match='would move all of it to cpu'): call(away, dataset(), device='cpu', progress=False)
    assert hooks(away) == before

def test_offloaded_model_predicts(tmp_path):
    away = dispatch_model(tiny(), PARTS | {'bert.encoder.layer.1': 'disk'}, offload_dir=tmp_path, force_hooks=True)
    assert_close(predict(away, dataset(), progress=False), predict(tiny(), dataset(), progress=False), rtol=1e-12, atol=0)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device beside the CPU')
@pytest.mark.parametrize('call', [mask_fisher, parameter_fisher, linear_grams])
def test_layers_on_two_devices(call):
    "Nothing is offloaded: one layer lives and computes on the CPU, the rest on the GPU."
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    model = tiny().to('cuda')
    second = model.base_model.encoder.layer[1].to('cpu')
    add_hook_to_module(second, AlignDevicesHook(execution_device='cpu', io_same_device=True))
    got, want = [call(m, dataset(), progress=False) for m in (model, tiny())]
    for k, v in tensors(want).items(): assert_close(tensors(got)[k], v, rtol=1e-9, atol=1e-13)
