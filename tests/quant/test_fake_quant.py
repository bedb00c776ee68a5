"""The arithmetic: integers in range, the grid's error, and gradients equal to those of the surrogate."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rans_kernels.dense import dequantize, expand_scale

from qat.quant import fake_quantize, quantize

QMAX = [2 ** (bits - 1) - 1 for bits in range(2, 9)]
SHAPES = [(1, 1), (3, 64), (5, 1), (63, 257)]


@st.composite
def cases(draw):
    """weight [N, K], scale, qmax, group_size: scales from far too small to far too large."""
    rows, columns = draw(st.sampled_from(SHAPES))
    group_size = draw(st.sampled_from([None, 32, 64]))
    shape = (rows, -(-columns // group_size)) if group_size else draw(st.sampled_from([(1, 1), (rows, 1)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    qmax = draw(st.sampled_from(QMAX))
    weight = torch.randn(rows, columns, generator=generator)
    scale = torch.exp(2 * torch.randn(shape, generator=generator)) / qmax
    return weight, scale, qmax, group_size


@given(cases())
@settings(max_examples=60, deadline=None)
def test_integers_stay_in_range_and_lie_within_half_a_step(case):
    weight, scale, qmax, group_size = case
    q = quantize(weight, scale, qmax, group_size)
    assert q.dtype is torch.int8
    assert q.abs().max() <= qmax
    step = expand_scale(scale, weight.shape[1], group_size)
    inside = weight.abs() <= step * qmax
    error = (weight - dequantize(q, scale, torch.float32, group_size)).abs()
    assert (error <= step * (0.5 + 1e-4))[inside].all()
    assert (q == weight.sign() * qmax)[~inside].all()


def test_ties_round_to_even():
    steps = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 127.5, -127.5]])
    expected = torch.tensor([[0, 2, 2, 0, -2, -2, 127, -127]], dtype=torch.int8)
    assert torch.equal(quantize(steps * 0.25, torch.tensor([[0.25]]), 127), expected)


@given(cases(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=60, deadline=None)
def test_forward_is_dequantized_integers_to_the_bit(case, dtype):
    weight, scale, qmax, group_size = case
    out = fake_quantize(weight, scale, qmax, dtype, group_size)
    expected = dequantize(quantize(weight, scale, qmax, group_size), scale, dtype, group_size)
    assert out.dtype is dtype
    # as integers: 0.0 and -0.0 differ too
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    assert torch.equal(out.view(bits), expected.view(bits))


@given(cases())
@settings(max_examples=30, deadline=None)
def test_fake_quantizing_twice_changes_nothing(case):
    weight, scale, qmax, group_size = case
    once = fake_quantize(weight, scale, qmax, torch.float32, group_size)
    assert torch.equal(fake_quantize(once, scale, qmax, torch.float32, group_size), once)


@given(cases())
@settings(max_examples=60, deadline=None)
def test_gradients_are_finite_differences_of_the_surrogate(case):
    weight, scale, qmax, group_size = case
    upstream = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def steps(w, s):
        return w / expand_scale(s, w.shape[1], group_size)

    # central differences need the clip on one side: drop the weights next to it
    w, s = weight.double(), scale.double()
    upstream[(steps(w, s).abs() - qmax).abs() < 1e-3 * qmax] = 0
    clipped = steps(w, s).clamp(-qmax, qmax)
    # and what float32 and float64 may round to different integers
    upstream[((clipped - clipped.round()).abs() - 0.5).abs() < 1e-4] = 0
    residual = clipped.round() - clipped

    def surrogate(w, s):
        return expand_scale(s, w.shape[1], group_size) * (steps(w, s).clamp(-qmax, qmax) + residual) * upstream

    h = 1e-6
    wanted_weight = (surrogate(w + h * expand_scale(s, w.shape[1], group_size), s) - surrogate(w, s)) / (
        h * expand_scale(s, w.shape[1], group_size)
    )
    # each weight sees one scale, so all scales can move at once
    per_weight = (surrogate(w, s * (1 + h)) - surrogate(w, s * (1 - h))) / (2 * h)

    def over_what_shares_a_scale(values):
        probe = torch.zeros_like(s, requires_grad=True)
        (expand_scale(probe, w.shape[1], group_size) * values).sum().backward()
        return probe.grad

    wanted_scale = over_what_shares_a_scale(per_weight) / s
    # q - w / s cancels in float32: what it loses is a share of the two, not of their difference
    lost = torch.finfo(torch.float32).eps * over_what_shares_a_scale((2 * clipped.abs() + 1) * upstream.abs())

    weight.requires_grad_()
    scale.requires_grad_()
    out = fake_quantize(weight, scale, qmax, torch.float32, group_size)
    out.backward(upstream.float())
    assert_close(weight.grad, wanted_weight, 1e-4)
    assert ((scale.grad - wanted_scale).abs() <= 1e-4 * wanted_scale.abs() + 4 * lost).all()


def assert_close(got, wanted, ratio):
    """Error norm at most `ratio` of the norm of `wanted`."""
    assert got.shape == wanted.shape
    assert (got.double() - wanted).norm() <= ratio * wanted.norm() + 1e-9


@pytest.mark.parametrize("bits", range(2, 9))
def test_weight_gradient_is_identity_up_to_the_clip_and_zero_beyond(bits):
    qmax = 2 ** (bits - 1) - 1
    weight = torch.tensor([[0.0, qmax - 0.4, qmax, qmax + 0.4, 5 * qmax, -qmax, -qmax - 0.4]], requires_grad=True)
    fake_quantize(weight, torch.ones(1, 1), qmax, torch.float32).sum().backward()
    assert torch.equal(weight.grad, torch.tensor([[1.0, 1, 1, 0, 0, 1, 0]]))


def test_backward_keeps_nothing_but_weight_and_scale():
    weight = torch.randn(63, 257, requires_grad=True)
    scale = torch.full((63, 1), 0.1, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        fake_quantize(weight, scale, 7, torch.bfloat16)
    assert kept == [weight.data_ptr(), scale.data_ptr()]


def test_frozen_integers_hold_whatever_the_weight_and_give_the_scale_its_gradient():
    torch.manual_seed(0)
    weight = torch.randn(5, 70, requires_grad=True)
    scale = torch.rand(5, 3).add(0.5).requires_grad_()
    frozen = torch.randint(-7, 8, (5, 70)).to(torch.int8)
    out = fake_quantize(weight, scale, 7, torch.float32, 32, frozen)
    expected = scale.detach().repeat_interleave(32, 1)[:, :70].requires_grad_()
    grad = torch.randn(5, 70)
    out.backward(grad)
    (frozen * expected).backward(grad)
    assert torch.equal(out, frozen * expected)
    assert weight.grad is not None and not weight.grad.any()
    per_group = torch.stack([part.sum(1) for part in expected.grad.split(32, 1)], 1)
    torch.testing.assert_close(scale.grad, per_group)


def test_weights_that_are_not_finite_look_no_price_up_out_of_bounds():
    weight = torch.tensor([[1.0, float("nan"), float("inf"), -float("inf")]], requires_grad=True)
    slopes = torch.arange(256.0)
    fake_quantize(weight, torch.ones(1, 1), 127, torch.float32, slopes=slopes).sum().backward()
    assert weight.grad[0, 0] == 1 + slopes[129]
