"""What the integers of a weight cost, and how well they use their range."""

import torch
from torch import Tensor

from qat.quant.convert import quantize_weight
from qat.quant.modules import QATModule
from qat.quant.scales import grid


def entropy(q: Tensor) -> float:
    """Empirical entropy of the integers, -sum p log2 p, in bits a weight; q: int8 of any shape."""
    # read as bytes: another name for each symbol, the same entropy
    counts = torch.bincount(q.reshape(-1).view(torch.uint8), minlength=256)
    p = counts[counts > 0].double() / q.numel()
    return float((p * -p.log2()).sum())


def clipped_fraction(q: Tensor, qmax: int) -> float:
    """Share of the weights at an end of the range, |q| == qmax; q: int8 of any shape."""
    return float((q.abs() == qmax).double().mean())


def weight_statistics(module: QATModule) -> dict[str, float]:
    """Figures to log of a fake-quantising layer.

    Returns:
        `entropy` (bits a weight), `clipped_fraction`, and `scale_p05`, `scale_p50`, `scale_p95` (percentiles of its
        scales, nearest rank).

    Raises:
        UserError: the weight is not finite.
    """
    q, scale = quantize_weight(module.weight, module.quant_config, module.log2_scale)
    qmax, _ = grid(module.quant_config)
    ranked = scale.flatten().sort().values
    percentiles = {f"scale_p{p:02d}": float(ranked[round(p / 100 * (len(ranked) - 1))]) for p in (5, 50, 95)}
    return {"entropy": entropy(q), "clipped_fraction": clipped_fraction(q, qmax), **percentiles}
