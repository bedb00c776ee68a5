"""GPTQ at any shape: on the grid, nearest where nothing can be made up for, better elsewhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.errors import UserError
from qat.ptq import gptq
from qat.ptq.layerwise import inverse_factor
from qat.quant import quantize

COLUMNS = [1, 63, 128, 257]


def case(rows, columns, seed=0, correlated=True):
    """A weight, inputs [T, K] and steps of half a standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    inputs = torch.randn(4 * columns + 8, columns, generator=generator)
    if correlated:
        # a common part, and some columns far louder than others
        inputs = (inputs + 2 * torch.randn(len(inputs), 1, generator=generator)) * torch.linspace(0.1, 3, columns)
    return weight, inputs, 0.5 * weight.square().mean(1, keepdim=True).sqrt()


def output_error(inputs, weight, q, scale):
    return (inputs @ (weight - q * scale).T).square().mean().item()


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("qmax", [7, 127])
def test_a_diagonal_hessian_leaves_nothing_to_make_up_for(columns, qmax):
    weight, inputs, scale = case(5, columns)
    hessian = torch.diag(inputs.square().mean(0))
    assert torch.equal(gptq(weight, hessian, scale, qmax), quantize(weight, scale, qmax))


@pytest.mark.parametrize("columns", COLUMNS[1:])
def test_the_outputs_are_closer_than_those_of_rounding_to_nearest(columns):
    weight, inputs, scale = case(9, columns)
    ours = gptq(weight, inputs.T @ inputs / len(inputs), scale, 127)
    nearest = quantize(weight, scale, 127)
    assert output_error(inputs, weight, ours, scale) < 0.7 * output_error(inputs, weight, nearest, scale)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 6), st.integers(2, 140), st.integers(0, 1000))
def test_any_shape_stays_on_the_grid_and_does_the_same_again(rows, columns, seed):
    weight, inputs, scale = case(rows, columns, seed)
    before, hessian = weight.clone(), inputs.T @ inputs
    q = gptq(weight, hessian, scale, 3)
    assert q.shape == weight.shape and q.dtype == torch.int8 and q.abs().max() <= 3
    assert torch.equal(q, gptq(weight, hessian, scale, 3))
    assert torch.equal(weight, before)


def test_blocks_change_only_the_order_of_sums(monkeypatch):
    weight, inputs, scale = case(4, 257)
    hessian = inputs.T @ inputs / len(inputs)
    blocked = gptq(weight, hessian, scale, 127)
    monkeypatch.setattr("qat.ptq.layerwise.BLOCK", 1000)
    # a weight that lies between two integers may fall to either side, and takes others with it
    assert (blocked == gptq(weight, hessian, scale, 127)).float().mean() > 0.97


def test_a_factor_is_that_of_the_damped_inverse():
    _, inputs, _ = case(1, 63)
    hessian = (inputs.T @ inputs).double()
    upper = inverse_factor(hessian)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(63, dtype=torch.float64)
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(63, dtype=torch.float64))
    assert torch.equal(upper, upper.triu())


@pytest.mark.parametrize("hessian", [torch.zeros(7, 7), torch.ones(7, 7), torch.diag(torch.tensor([1.0] + 6 * [0.0]))])
def test_singular_hessians_are_damped(hessian):
    weight, _, scale = case(3, 7)
    assert gptq(weight, hessian, scale, 127).abs().max() < 127


def test_more_damping_where_little_does_not_suffice():
    # not positive definite: an eigenvalue of -0.05 times the mean of the diagonal
    basis = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    hessian = basis @ torch.diag(torch.tensor([-0.05, 1, 1, 1, 1, 1], dtype=torch.float64)) @ basis.T
    assert inverse_factor(hessian).isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value):
    weight, _, scale = case(3, 7)
    hessian = torch.eye(7)
    hessian[2, 2] = value
    with pytest.raises(UserError, match="7 columns"):
        gptq(weight, hessian, scale, 127)
