"""Symmetric fake quantisation with a straight-through estimator.

Forward, with s the scale and c = clamp(w / s, -qmax, qmax):

    q = round(c)        half to even
    w' = s * q

The gradients are those of the surrogate s * (c + r), in which r = round(c) - c is held constant:

    dw'/dw = 1 where |w / s| <= qmax, else 0
    dw'/ds = q - w / s where |w / s| <= qmax, else q, which is +-qmax      (LSQ, arXiv 1902.08153)

Only w, a leaf that lives anyway, and s are kept for the backward, which computes w / s again.

The backward reads all that the gradient of a price on w / s needs, so it can add that too. On its own it would be
passes over all weights, and a second gradient as large as they are.
"""

from typing import Any

import torch
from rans_kernels.dense import dequantize, expand_scale
from torch import Tensor

from qat.quant.scales import block_sums


def quantize(weight: Tensor, scale: Tensor, qmax: int, group_size: int | None = None) -> Tensor:
    """clamp(round(weight / scale), -qmax, qmax) in float32, ties to even.

    Args:
        weight: float [N, K].
        scale: float32 [1, 1], [N, 1] or [N, G], see `rans_kernels.dense.expand_scale`.
        qmax: largest integer, at most 127.
        group_size: columns that share a scale, or None.

    Returns:
        int8 [N, K]. Meaningless where the quotient is NaN.
    """
    return _steps(weight, scale, group_size).round_().clamp_(-qmax, qmax).to(torch.int8)


def fake_quantize(
    weight: Tensor,
    scale: Tensor,
    qmax: int,
    dtype: torch.dtype,
    group_size: int | None = None,
    frozen: Tensor | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """dequantize(quantize(weight)) in `dtype`, to the bit; gradients as the module says.

    Args:
        weight: float [N, K]; gets its gradient in its own dtype.
        scale: float32 [1, 1], [N, 1] or [N, G]; gets one, summed over what shares it, if it requires grad.
        qmax: largest integer, at most 127.
        dtype: of the result [N, K].
        group_size: columns that share a scale, or None.
        frozen: int8 [N, K] to compute with whatever the weight is, which then gets a gradient of 0.
        slopes: float32 [256], what a price rises by from every integer, -128 first, to the next; where |w / s| <= qmax
            its gradient is added to those of weight and scale, whatever the gradient of the result.
    """
    return _FakeQuantize.apply(weight, scale, qmax, dtype, group_size, frozen, slopes)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scale: Tensor,
        qmax: int,
        dtype: torch.dtype,
        group_size: int | None,
        frozen: Tensor | None,
        slopes: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(weight, scale, frozen, slopes)
        ctx.qmax, ctx.group_size = qmax, group_size
        q = quantize(weight, scale, qmax, group_size) if frozen is None else frozen
        return dequantize(q, scale, dtype, group_size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, frozen, slopes = ctx.saved_tensors
        # a small model's step is mostly launches: as few passes as there can be
        grad = grad.float()
        if frozen is None:
            steps = _steps(weight, scale, ctx.group_size)
            clipped = steps.clamp(-ctx.qmax, ctx.qmax)
            outside = steps != clipped
            grad_weight = grad.masked_fill(outside, 0)
            pull = None
            if slopes is not None:
                # in bounds whatever the weight: one that is not finite shall end as a loss that is not
                pull = slopes.take((clipped + 128).long().clamp_(0, 255)).masked_fill_(outside, 0)
                pull.div_(expand_scale(scale, weight.shape[1], ctx.group_size))
                grad_weight.add_(pull)
            grad_weight = grad_weight.to(weight.dtype)
            if not ctx.needs_input_grad[1]:
                return grad_weight, None, None, None, None, None, None
            slope = clipped.round_().sub_(steps.masked_fill_(outside, 0)).mul_(grad)
            if pull is not None:
                slope.addcmul_(steps, pull, value=-1)
        else:
            grad_weight, slope = torch.zeros_like(weight), grad * frozen
        return grad_weight, block_sums(slope, scale.shape[0], ctx.group_size), None, None, None, None, None


def _steps(weight: Tensor, scale: Tensor, group_size: int | None) -> Tensor:
    return weight.float() / expand_scale(scale, weight.shape[1], group_size)
