"""Products by a folded weight: the kernels multiply by its coded matrix, which has F rows of W in each of its own.

They are given every row of x F times, once for each place in a coded row and zeros elsewhere. Zeros add nothing, so
sums are those of one row of W, in an order that depends on the layout alone.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def multiplies_folded(fold: int, scale: Tensor, bias: Tensor | None, group_size: int | None) -> bool:
    """Whether a kernel can multiply by the coded matrix: folded, its rows have neither a scale nor a bias of their own.

    Args:
        fold: rows of the weight in one of the coded matrix.
        scale: of the weight.
        bias: of the layer, or None.
        group_size: columns that share a scale, or None.
    """
    return fold == 1 or (scale.numel() == 1 and bias is None and group_size is None)


def multiply_folded(multiply: Callable[[Tensor], Tensor], x: Tensor, fold: int, most: int) -> Tensor:
    """x [M, K] times a weight [N, K], from products by its coded matrix.

    Args:
        multiply: by the coded matrix, [R, F K] -> [R, N / F].
        x: to multiply.
        fold: F.
        most: rows R, if not a single one of x is more, that have one order of the sums.
    """
    if fold == 1:
        return multiply(x)
    parts = [gather_rows(multiply(place_rows(part, fold)), fold) for part in x.split(max(1, most // fold))]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def place_rows(x: Tensor, fold: int) -> Tensor:
    """The rows to multiply by the coded matrix: x [M, K] -> [F M, F K], row f M + m has x[m] in columns f K on."""
    m, k = x.shape
    placed = x.new_zeros(fold, m, fold, k)
    placed.diagonal(dim1=0, dim2=2).copy_(x[:, :, None])
    return placed.view(fold * m, fold * k)


def gather_rows(y: Tensor, fold: int) -> Tensor:
    """The product from that of the placed rows: [F M, N / F] -> [M, N]."""
    return y.view(fold, -1, y.shape[1]).permute(1, 2, 0).flatten(1)
