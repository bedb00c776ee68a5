"""Layer-wise rounding that lets the columns still to come make up for the error of those already rounded.

For a layer y = W x with H = E[x x^T], rounding column i of W to s q_i leaves e_i = (w_i - s q_i) / U_ii, where U is
the upper Cholesky factor of the inverse, H^-1 = U^T U, and the columns after it become w_j - e_i U_ij. That is the
GPTQ recursion (Frantar et al., arXiv 2210.17323). The grid is the caller's, and one step may serve a whole row, so
that the integers can be entropy-coded: Huffman-GPTQ in the words of WaterSIC (arXiv 2603.04956).
"""

import torch
from torch import Tensor

from qat.errors import UserError

BLOCK = 128
"""Columns whose errors are handed on together: a matrix product in place of so many outer products."""
DAMPING = 0.01
"""Of the mean of the Hessian's diagonal, added to it; ten times more at a time where that does not suffice."""


@torch.no_grad()
def compensate(weight: Tensor, hessian: Tensor, scale: Tensor, qmax: int) -> Tensor:
    """What every column has become by the time it is rounded to a given grid, columns of much input first.

    Args:
        weight: float [N, K].
        hessian: float [K, K], the second moment of the layer's inputs up to a factor.
        scale: float32 [1, 1] or [N, 1], the step of a row.
        qmax: largest integer, at most 127.

    Returns:
        float32 [N, K], in steps.

    Raises:
        UserError: the Hessian has no Cholesky factor, however damped: NaN, infinities, or no second moment at all.
    """
    # stable: equal columns keep their order on every machine
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order]).float()
    # in steps, so that rounding a column is few small kernels
    rest, columns = (weight.float() / scale)[:, order], weight.shape[1]
    for first in range(0, columns, BLOCK):
        block = slice(first, min(first + BLOCK, columns))
        inside, errors = factor[block, block], torch.empty_like(rest[:, block])
        for i in range(errors.shape[1]):
            column, error = rest[:, first + i], errors[:, i]
            torch.div(column - column.round().clamp_(-qmax, qmax), inside[i, i], out=error)
            rest[:, first + i + 1 : block.stop].addr_(error, inside[i, i + 1 :], alpha=-1)
        rest[:, block.stop :] -= errors @ factor[block, block.stop :]
    return rest[:, order.argsort()]


def gptq(weight: Tensor, hessian: Tensor, scale: Tensor, qmax: int) -> Tensor:
    """Integers of a weight on a given grid, int8 [N, K]: those of rounding to nearest where the Hessian is diagonal.

    Arguments and errors as `compensate`.
    """
    return compensate(weight, hessian, scale, qmax).round_().clamp_(-qmax, qmax).to(torch.int8)


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper U with U^T U = (H + d I)^-1 in float64, d the smallest damping that makes H + d I positive definite.

    Raises:
        UserError: none does.
    """
    h = hessian.double()
    # a layer that has seen only zeros: every rounding is as good
    mean = h.diagonal().mean().item() or 1.0
    for damping in (DAMPING * 10**i for i in range(4)):
        damped = h + damping * mean * torch.eye(len(h), dtype=h.dtype, device=h.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed and lower.isfinite().all():
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
    raise UserError(
        f"a Hessian of {len(h)} columns has no Cholesky factor even when damped by {damping:g} of its mean diagonal: "
        "are the calibration activations finite?"
    )
