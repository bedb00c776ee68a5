"""Plain INT8 weights: the arithmetic that every path of the project agrees on, and the dense modules built on it.

The weight a layer computes with is `dequantize(q, scale, dtype)`: float32 product of integer and scale, then one
cast. The fake-quant training forward, the converted dense model and the CPU path of the compressed model all call
this function, so that on one backend they agree to the bit.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def expand_scale(scale: Tensor, columns: int, group_size: int | None = None) -> Tensor:
    """Scale that broadcasts against a weight [N, columns].

    Args:
        scale: [1, 1] per tensor, [N, 1] per channel, or [N, ceil(columns / group_size)] per group.
        columns: K, the input features.
        group_size: columns that share a scale; None for the first two. The last group may be shorter.
    """
    if group_size is None:
        return scale
    # no repeat_interleave and slice: inductor's c++ of torch 2.13 leaves a ragged last group unwritten
    return scale.index_select(1, torch.arange(columns, device=scale.device) // group_size)


def dequantize(q: Tensor, scale: Tensor, dtype: torch.dtype, group_size: int | None = None) -> Tensor:
    """q * scale in float32, cast to `dtype`.

    Args:
        q: integers [N, K] in any dtype.
        scale: float [1, 1], [N, 1] or [N, G], see `expand_scale`.
        dtype: of the result [N, K].
        group_size: columns that share a scale, or None.
    """
    scale = expand_scale(scale.to(torch.float32), q.shape[1], group_size)
    if torch.compiler.is_compiling():
        # out of place: dynamo of torch 2.11 loses the gradient of an autograd.Function that returns what it wrote over
        weight = q.to(torch.float32) * scale
    else:
        # in place on the copy: a second [N, K] in float32 costs as much time as the product
        weight = q.to(torch.float32, copy=True).mul_(scale)
    # no cast that does nothing: as the last step of an autograd.Function it loses the gradient in dynamo of torch 2.11
    return weight if dtype is torch.float32 else weight.to(dtype)


def look_up(ids: Tensor, q: Tensor, scale: Tensor, dtype: torch.dtype, group_size: int | None = None) -> Tensor:
    """Rows of an embedding, dequantised after they are looked up.

    Args:
        ids: integers [...].
        q: int8 [V, D].
        scale: float32, see `expand_scale`.
        dtype: of the result [..., D].
        group_size: columns that share a scale, or None.
    """
    flat = ids.reshape(-1)
    rows = dequantize(q[flat], scale if scale.shape[0] == 1 else scale[flat], dtype, group_size)
    return rows.reshape(*ids.shape, q.shape[1])


def int8_linear(
    x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None = None, group_size: int | None = None
) -> Tensor:
    """Multiply by an INT8 weight dequantised in x's dtype: x [..., K] -> [..., N].

    Args:
        x: [..., K], a float dtype.
        q: int8 [N, K].
        scale: float32, see `expand_scale`.
        bias: [N] or None, cast to x's dtype.
        group_size: columns that share a scale, or None.
    """
    return linear(x, dequantize(q, scale, x.dtype, group_size), bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K] times weight [N, K] of x's dtype, plus the bias cast to it."""
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def autocast(x: Tensor) -> Tensor:
    """x as torch's own linear layer takes it: in the dtype of autocast, where that is on."""
    device = x.device.type
    # what is no float is left to complain of; float64 is left alone, as torch does
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype is not torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x


class Float32Scale(nn.Module):
    """A module whose `weight_scale` stays in float32, whatever `half()`, `to(dtype)` and the like ask of the rest."""

    weight_scale: Tensor

    def _apply(self, fn, recurse=True):
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype is not torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        return self


class CastEmbedding(Float32Scale):
    """An embedding whose vectors, of `dtype`, follow such a cast."""

    dtype: torch.dtype

    def _apply(self, fn, recurse=True):
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)


class Int8Linear(Float32Scale):
    """Linear layer with INT8 weights kept dense: what `convert` gives, and the reference of the compressed layer."""

    weight_int8: Tensor

    def __init__(
        self,
        q: Tensor,
        scale: Tensor,
        bias: Tensor | None = None,
        group_size: int | None = None,
        units: int | None = None,
        fold: int = 1,
    ):
        """Make the layer.

        Args:
            q: int8 [N, K].
            scale: float32, see `expand_scale`.
            bias: [N] or None.
            group_size: columns that share a scale, or None.
            units: of a tile (format.TileLayout): on a GPU, small batches are then multiplied in the order of a
                weight coded in such tiles, to the bit; None leaves it to the library.
            fold: of that weight (format.TileLayout).
        """
        super().__init__()
        self.out_features, self.in_features = q.shape
        self.group_size, self.units, self.fold = group_size, units, fold
        self.register_buffer("weight_int8", q)
        self.register_buffer("weight_scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype, or that of autocast."""
        x = autocast(x)
        if self.units is not None and x.device.type != "cpu":
            from rans_kernels.ops.int8_linear import int8_linear_tiled

            q, scale = self.weight_int8, self.weight_scale
            return int8_linear_tiled(x, q, scale, self.bias, self.units, self.group_size, self.fold)
        return int8_linear(x, self.weight_int8, self.weight_scale, self.bias, self.group_size)

    def extra_repr(self) -> str:
        """Shape, shown by print(model)."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Embedding(CastEmbedding):
    """Embedding with INT8 rows, looked up and then dequantised."""

    weight_int8: Tensor

    def __init__(self, q: Tensor, scale: Tensor, dtype: torch.dtype, group_size: int | None = None):
        """Args: q: int8 [V, D]. scale: float32, see `expand_scale`. dtype: of the output. group_size: or None."""
        super().__init__()
        self.num_embeddings, self.embedding_dim = q.shape
        self.dtype, self.group_size = dtype, group_size
        self.register_buffer("weight_int8", q)
        self.register_buffer("weight_scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [...] -> vectors [..., D]."""
        return look_up(ids, self.weight_int8, self.weight_scale, self.dtype, self.group_size)

    def extra_repr(self) -> str:
        """Shape, shown by print(model)."""
        return f"{self.num_embeddings}, {self.embedding_dim}"
