"""Gradients through compressed layers are those of the plain layers with the same weights."""

import pytest
import torch
from rans_kernels.dense import int8_linear
from rans_kernels.format import Split, TileLayout
from rans_kernels.ops.rans_linear import rans_linear

from tests.kernels.test_ops import coded_weight

LAYOUTS = [TileLayout((33, 200), Split(4, 1), 2), TileLayout((32, 200), Split(4, 1), 3, fold=8)]


def gradients(multiply, x, bias, seed=1):
    """Of x and bias, for a random gradient of the result."""
    x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    y = multiply(x, bias)
    return torch.autograd.grad(y, (x, bias), torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(200,), (3, 200), (2, 0, 200), (2, 3, 200)])
@pytest.mark.parametrize("group_size", [None, 64])
def test_gradients_of_the_operator_are_those_of_the_integers(layout, shape, group_size):
    coded, w = coded_weight(layout)
    n = layout.shape[0]
    scale = torch.rand(n, 1 if group_size is None else 4)
    x, bias = torch.randn(shape), torch.randn(n)
    found = gradients(lambda x, b: rans_linear(x, coded, scale, b, group_size), x, bias)
    expected = gradients(lambda x, b: int8_linear(x, w, scale, b, group_size), x, bias)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, expected, strict=True))
    assert found[0].abs().sum() > 0 or not x.numel()


def test_the_operator_passes_torchs_own_checks():
    coded, _ = coded_weight()
    arguments = (coded.heads, coded.words, coded.offsets, coded.table, torch.rand(33, 1), torch.randn(33))
    x = torch.randn(3, 200, requires_grad=True)
    operator = torch.ops.rans_kernels.rans_linear
    # aot dispatch: what torch.compile does with the gradient
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(operator, (x, *arguments, coded.numbers, None), test_utils=checks)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 40, 300])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_on_a_gpu(rows, dtype, compiled):
    from rans_kernels.ops.coded import CodedWeight

    coded, w = coded_weight()
    arrays = (coded.heads, coded.words, coded.offsets, coded.table)
    coded = CodedWeight.check(*(array.cuda() for array in arrays), coded.layout)
    scale = torch.rand(33, 1, device="cuda")
    x, bias = torch.randn(rows, 200, device="cuda", dtype=dtype), torch.randn(33, device="cuda")
    multiply = torch.compile(rans_linear) if compiled else rans_linear
    found = gradients(lambda x, b: multiply(x, coded, scale, b), x, bias)
    expected = gradients(lambda x, b: int8_linear(x, w.cuda(), scale, b), x, bias)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).float().norm() <= 0.01 * b.float().norm()
