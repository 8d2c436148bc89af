"""The Triton kernel against the plain sums, on a CPU in Triton's interpreter: a process of its own, since the interpreter is chosen once.

`make test` runs it as `TRITON_INTERPRET=1 pytest -n 0 tests/kernel`; on a machine with a GPU, without that variable, the kernel itself is tested.
"""
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from fisher_nodes.core.kernel import best_sums, fused_sums
from fisher_nodes.core.nodes import plain_sums

INTERPRETED, GPU = os.environ.get('TRITON_INTERPRET')=='1', torch.cuda.is_available()
DEVICE = 'cpu' if INTERPRETED else 'cuda'
pytestmark = [
    pytest.mark.skipif(find_spec('triton') is None, reason='Triton is not installed; there are builds for Linux, where `make test` installs it'),
    pytest.mark.skipif(not INTERPRETED and not GPU, reason='no GPU, and TRITON_INTERPRET is not 1')]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1), (3, 17, 130), (2, 33, 256), (2, 16, 128)] # the kernel goes by 16 tokens and 128 columns

def numbers(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

def fused(x, grad, bias=None):
    "On the device of this run."
    return fused_sums(*(o if o is None else o.to(DEVICE) for o in (x, grad, bias))).cpu()

def agrees(x, grad, bias=None):
    "As close to the sums in float64 as an order of adding may be, and to the plain sums twice that; nothing is changed."
    before = [o.clone() for o in (x, grad)]
    got, plain = fused(x, grad, bias), plain_sums(x, grad, bias)
    terms = (x.double() - (0 if bias is None else bias.double()))*grad.double()
    close = 8*torch.finfo(plain.dtype).eps*(terms.abs().sum(1)+1)
    assert got.dtype==plain.dtype and got.shape==plain.shape
    assert ((got-terms.sum(1)).abs()<=close).all() and ((got-plain).abs()<=2*close).all()
    assert all(map(torch.equal, before, (x, grad)))

@pytest.mark.parametrize('bias', [True, False], ids=['bias','none'])
@pytest.mark.parametrize('shape', SHAPES, ids=str)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_sums(dtype, shape, bias):
    agrees(numbers(shape, dtype), numbers(shape, dtype, 1), numbers(shape[-1:], dtype, 2) if bias else None)

LAYOUTS = {
    'transposed': lambda o: o.mT.contiguous().mT, # columns are far apart
    'heads first': lambda o: o.view(3, 17, 2, 65).transpose(1, 2).contiguous().transpose(1, 2).flatten(2),
    'tokens first': lambda o: o.transpose(0, 1).contiguous().transpose(0, 1),
    'every second column': lambda o: o.repeat_interleave(2, -1)[..., ::2],
    'a part of wider rows': lambda o: torch.cat([o, o, o], -1)[..., 130:260],
    'one example for all': lambda o: o[:1].expand(3, -1, -1)}

@pytest.mark.parametrize('of', ['x', 'grad', 'both'])
@pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout, of):
    "Inputs come as attention code leaves them: any strides give the same sums."
    x, grad, bias = numbers((3, 17, 130), torch.float32), numbers((3, 17, 130), torch.float32, 1), numbers((130,), torch.float32, 2)
    agrees(layout(x) if of!='grad' else x, layout(grad) if of!='x' else grad, bias)

def test_a_bias_with_strides():
    x, grad, bias = numbers((3, 17, 130), torch.float32), numbers((3, 17, 130), torch.float32, 1), numbers((260,), torch.float32, 2)[::2]
    agrees(x, grad, bias)

def test_no_tokens_is_zero():
    x = torch.empty(3, 0, 130)
    assert torch.equal(fused(x, x, torch.ones(130)), torch.zeros(3, 130))

def test_small_numbers_are_added_in_float32():
    "Ten thousand tokens whose sum a half of 16 bits would lose, and products that only float32 holds."
    x = torch.full((1, 10_000, 3), 1e-3, dtype=torch.float16)
    torch.testing.assert_close(fused(x, x), (x.float()**2).sum(1), rtol=1e-5, atol=0)

def test_whole_numbers_are_exact():
    x = (torch.arange(2*3*5)%7-3.).view(2, 3, 5)
    assert torch.equal(fused(x, x.flip(0), x[0,0]), plain_sums(x, x.flip(0), x[0,0]))

def test_a_cpu_takes_the_plain_sums():
    assert best_sums(torch.device('cpu')) is plain_sums

def test_triton_is_imported_where_it_is_used():
    "A machine without it imports the module all the same."
    code = 'import sys; sys.modules["triton"] = None; from fisher_nodes.core.kernel import fused_sums, plain_sums; print("ok")'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout=='ok\n'
