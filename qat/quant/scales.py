"""The scale of a weight matrix: which weights share one, and the rule it follows from them.

The dynamic rules (absmax, std) are recomputed at every forward and carry no gradient: they define the grid. A gradient
through absmax would hand the summed rounding error of a whole row to its one largest weight, and one through std would
let the loss buy a finer step with wider rows. Who wants a trained step takes the learned rule.
"""

import torch
from torch import Tensor

from qat.config import Granularity, QuantConfig, ScaleRule

MIN_SCALE = torch.finfo(torch.float32).tiny
"""The smallest normal number: an all-zero row gets it, so that no scale is 0 and w / scale is never 0 / 0."""

# below this share of the mean, the spread of a row is rounding noise
CONSTANT = 1e-6


def grid(config: QuantConfig) -> tuple[int, int | None]:
    """The largest integer 2^(bits - 1) - 1, and the columns that share a scale (None unless per_group)."""
    group_size = config.group_size if config.granularity is Granularity.per_group else None
    return 2 ** (config.bits - 1) - 1, group_size


def blocks(x: Tensor, rows: int, group_size: int | None) -> list[Tensor]:
    """Views [R, G, m, n] of x [N, K] whose last two axes share a scale; side by side along G they cover x.

    Args:
        x: [N, K].
        rows: R of the scale [R, G]: 1 per tensor, else N.
        group_size: columns that share a scale, or None. A shorter last group is a view of its own.
    """
    if group_size is None:
        # no -1: a process may hold no rows
        return [x.reshape(rows, 1, x.shape[0] // max(rows, 1), x.shape[1])]
    whole = x.shape[1] - x.shape[1] % group_size
    views = [x[:, :whole].unflatten(1, (-1, group_size)).unsqueeze(2)] if whole else []
    return views + ([x[:, None, None, whole:]] if whole < x.shape[1] else [])


def block_sums(x: Tensor, rows: int, group_size: int | None) -> Tensor:
    """Sums of x [N, K] over what shares a scale: [R, G]; arguments as for `blocks`."""
    sums = [block.sum((-2, -1)) for block in blocks(x, rows, group_size)]
    return sums[0] if len(sums) == 1 else torch.cat(sums, dim=1)


def weight_scale(weight: Tensor, config: QuantConfig, log2_scale: Tensor | None = None) -> Tensor:
    """Step of the integer grid.

    absmax: max|w| / qmax. std: k * sqrt(mean((w - mean(w))^2)), population and in float32; a constant row, which
    has no spread, takes absmax. learned: 2 ** log2_scale, differentiable.

    Args:
        weight: float [N, K].
        config: granularity and rule.
        log2_scale: float [R, G], for the learned rule; without it, its `init` rule gives the scale.

    Returns:
        float32 [1, 1], [N, 1] or [N, G]; normal numbers, but for a block with NaN or infinities, whose scale is not
        finite and makes its dequantised weights NaN.
    """
    if config.scale is not ScaleRule.learned:
        return _dynamic_scale(weight, config, config.scale)
    if log2_scale is None:
        return _dynamic_scale(weight, config, config.init)
    return torch.exp2(log2_scale.float()).clamp_min(MIN_SCALE)


def _dynamic_scale(weight: Tensor, config: QuantConfig, rule: ScaleRule) -> Tensor:
    qmax, group_size = grid(config)
    rows = 1 if config.granularity is Granularity.per_tensor else weight.shape[0]
    views = blocks(weight.detach().float(), rows, group_size)
    scales = [_std(view, qmax, config.k) if rule is ScaleRule.std else _absmax(view, qmax) for view in views]
    return torch.cat(scales, dim=1).clamp_min(MIN_SCALE)


def _absmax(block: Tensor, qmax: int) -> Tensor:
    return _reaching(block.abs().amax((-2, -1)), qmax)


def _std(block: Tensor, qmax: int, k: float) -> Tensor:
    mean = _mean(block)
    std = _mean((block - mean[..., None, None]).square()).sqrt()
    return torch.where(std > CONSTANT * mean.abs(), k * std, _reaching(mean.abs() + std, qmax))


def _mean(block: Tensor) -> Tensor:
    # rows first: one sum over everything would depend on the number of threads, and training and export may differ
    return block.mean(-1).mean(-1)


def _reaching(peak: Tensor, qmax: int) -> Tensor:
    # a hair up: rounding must not put the peak outside the range, where it would get no gradient
    return peak / qmax * (1 + 2**-22)
