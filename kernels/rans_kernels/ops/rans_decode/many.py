"""`rans_decode_many`: several weights in one launch, and the plan of it, which can be run again and again."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rans_kernels.ops.coded import CodedWeight, on_device
from rans_kernels.ops.rans_decode.op import fused_scale, rans_decode, rans_dequantize


def rans_decode_many(
    weights: Sequence[CodedWeight],
    scales: Sequence[Tensor] | None = None,
    dtype: torch.dtype = torch.int8,
    out: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """What `rans_decode` gives for every weight, or with scales `rans_dequantize`; on a GPU in one launch a split.

    Args:
        weights: on one device, of any shapes and splits.
        scales: float32 [1, 1] or [N, 1] of every weight, for weights in `dtype`; None for integers.
        dtype: int8 without scales, else that of the weights.
        out: contiguous [N, K] for every weight, or None.
    """
    plan = DecodePlan(weights, scales, dtype, out)
    plan.run()
    return plan.out


class DecodePlan:
    """Several weights and where they are decoded to. Running it allocates nothing and waits for nothing.

    Attributes:
        out: [N, K] of every weight; its own or those given. The plan keeps all tensors that its kernels address.
    """

    def __init__(
        self,
        weights: Sequence[CodedWeight],
        scales: Sequence[Tensor] | None = None,
        dtype: torch.dtype = torch.int8,
        out: Sequence[Tensor] | None = None,
    ):
        """Args: as `rans_decode_many`."""
        self.out = [w.heads.new_empty(w.layout.shape, dtype=dtype) for w in weights] if out is None else [*out]
        self.weights = [*weights]
        self.scales: list[Tensor | None] = [None] * len(weights) if scales is None else [*scales]
        self.launches: list[Callable[[], object]] = []
        groups: dict[Any, list[tuple[CodedWeight, Tensor | None, Tensor]]] = defaultdict(list)
        for weight, scale, target in zip(weights, self.scales, self.out, strict=True):
            if target.shape != weight.layout.shape or target.dtype is not dtype or not target.is_contiguous():
                raise ValueError(f"out is contiguous {dtype} {weight.layout.shape}, not {target.dtype} {target.shape}")
            coded = target.view(weight.layout.coded_shape)
            if weight.layout.tiles and fused_scale(weight, scale, dtype, None) and shares_launch(coded):
                groups[weight.layout.split, weight.layout.probability_bits].append((weight, scale, coded))
            elif scale is None:
                self.launches.append(partial(rans_decode, weight, target))
            else:
                self.launches.append(partial(rans_dequantize, weight, scale, dtype, None, target))
        if groups:
            from rans_kernels.ops.rans_decode.gluon import plan_launch

            with on_device(self.out[0]):
                self.launches += [plan_launch(group) for group in groups.values()]

    def run(self) -> None:
        """Decode into `out`, on the current stream."""
        if self.out:
            with on_device(self.out[0]):
                for launch in self.launches:
                    launch()


def shares_launch(out: Tensor) -> bool:
    """Whether the kernel writes to the buffer itself: rows are whole and aligned for 16-byte stores."""
    return out.shape[1] * out.element_size() % 16 == 0 and out.data_ptr() % 16 == 0
