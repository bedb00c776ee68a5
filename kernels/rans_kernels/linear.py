"""Modules whose weights stay compressed: CompressedLinear, CompressedEmbedding, and a head tied to the embedding.

On a GPU a linear layer multiplies straight from its tiles. On the CPU, and for look-ups, weights are decoded once
and kept; what is computed with INT8 is `dense.dequantize`, to the bit what the fake-quant training forward computes,
and with floats, which were coded without loss, what the uncompressed layer computes.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rans_kernels.dense import CastEmbedding, Float32Scale, Int8Linear, autocast, int8_linear, linear, look_up
from rans_kernels.format import LANES, ROW_WORDS, TileLayout
from rans_kernels.ops.coded import CodedWeight, backend_of
from rans_kernels.ops.rans_decode import rans_decode
from rans_kernels.ops.rans_linear import rans_linear

if TYPE_CHECKING:
    from rans_kernels.staging import DecodeAhead


class CompressedWeight(Float32Scale):
    """Buffers of one compressed weight, named as in the file, and what is derived from them on first use.

    Attributes:
        weight: the heads of the tiles, int32 [layout.head_rows, 32]; by its stock name, so that loaders which do not
        know the format stop at its shape. weight_words: int16 [word_rows, 8]. weight_offsets: int32 [tiles + 1].
        weight_freqs: int16 [256]. weight_scale: float32 [1, 1], [N, 1] or [N, ceil(K / group_size)]; of floats 1.
    """

    weight: Tensor
    weight_words: Tensor
    weight_offsets: Tensor
    weight_freqs: Tensor

    def __init__(self, layout: TileLayout, word_rows: int, scale_shape: tuple[int, int], group_size: int | None = None):
        """Args: layout: how it is coded. word_rows: of the words. scale_shape: of the scales. group_size: or None."""
        super().__init__()
        self.layout, self.group_size = layout, group_size
        self.register_buffer("weight", torch.zeros(layout.head_rows, LANES, dtype=torch.int32))
        self.register_buffer("weight_words", torch.zeros(word_rows, ROW_WORDS, dtype=torch.int16))
        self.register_buffer("weight_offsets", torch.zeros(layout.tiles + 1, dtype=torch.int32))
        self.register_buffer("weight_freqs", torch.zeros(256, dtype=torch.int16))
        self.register_buffer("weight_scale", torch.zeros(scale_shape, dtype=torch.float32))
        # derived, and dropped whenever the buffers move or change
        self._coded: CodedWeight | None = None
        self._decoded: Tensor | None = None

    def _apply(self, fn, recurse=True):
        self._coded = self._decoded = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self._coded = self._decoded = None
        super()._load_from_state_dict(*args, **kwargs)

    def prepare(self) -> CodedWeight:
        """Check the buffers and derive what the kernels need, once; `torch.compile` wants it done before.

        Raises:
            FormatError: offsets or table do not fit the layout: a decoder could leave heads or words.
        """
        if self._coded is None:
            self._coded = CodedWeight.check(
                self.weight, self.weight_words, self.weight_offsets, self.weight_freqs, self.layout
            )
            # alone in having another length in every layer, which would be compiled one by one
            torch._dynamo.maybe_mark_dynamic(self._coded.words, 0)
        return self._coded

    def decode(self) -> Tensor:
        """The weight, [N, K] in the dtype that was coded, on the buffers' device."""
        return rans_decode(self.prepare())

    @property
    def decoded(self) -> Tensor:
        """The weight, decoded on first use and kept."""
        if self._decoded is None:
            self._decoded = self.decode()
        return self._decoded

    @property
    def weight_int8(self) -> Tensor:
        """The integers, decoded on first use and kept.

        Raises:
            TypeError: the weights are floats.
        """
        if self.layout.is_float:
            raise TypeError(f"the weights are {self.layout.dtype}, coded without loss: there are no integers")
        return self.decoded

    @property
    def stored_bytes(self) -> int:
        """Everything stored for the weight."""
        buffers = (self.weight, self.weight_words, self.weight_offsets, self.weight_freqs, self.weight_scale)
        return sum(buffer.nbytes for buffer in buffers)

    @property
    def backend(self) -> str:
        """What a forward runs: cpu-int8 and the like (decoded once), gluon-fused, triton-fused, triton-decode."""
        if self.weight.device.type in ("cpu", "meta"):
            return f"cpu-{self.layout.dtype}"
        kernels = backend_of(self.weight.device)
        return f"{kernels}-decode" if self.layout.is_float and kernels == "triton" else f"{kernels}-fused"

    def extra_repr(self) -> str:
        """Shape, coding, size and backend, shown by print(model)."""
        (n, k), layout = self.layout.shape, self.layout
        bits = 8 * self.stored_bytes / max(1, n * k)
        lossless = f"{layout.dtype}, " if layout.is_float else ""
        fold = f"fold={layout.fold}, " if layout.fold > 1 else ""
        coding = f"{lossless}split={layout.split}, units={layout.units}, {fold}bits={bits:.2f}"
        return f"in_features={k}, out_features={n}, {coding}, backend={self.backend}"


class CompressedLinear(CompressedWeight):
    """Linear layer that computes from compressed weights."""

    def __init__(
        self,
        layout: TileLayout,
        word_rows: int,
        scale_shape: tuple[int, int],
        group_size: int | None = None,
        bias: bool = False,
    ):
        """As CompressedWeight; bias: whether there is one."""
        super().__init__(layout, word_rows, scale_shape, group_size)
        self.out_features, self.in_features = layout.shape
        self.bias = nn.Parameter(torch.zeros(self.out_features), requires_grad=False) if bias else None
        self.ahead: DecodeAhead | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype, or that of autocast."""
        x = autocast(x)
        if self.ahead is not None and self.ahead.takes(self, x):
            return self.ahead.multiply(self, x)
        return linear_from(self, x, self.bias)

    def to_int8(self) -> Int8Linear:
        """The same layer with its integers kept dense: equal results to the bit, on the CPU and in the GPU kernels.

        Raises:
            TypeError: the weights are floats.
        """
        layout = self.layout
        return Int8Linear(self.weight_int8, self.weight_scale, self.bias, self.group_size, layout.units, layout.fold)


class CompressedEmbedding(CastEmbedding, CompressedWeight):
    """Embedding whose rows are looked up in INT8, or in the floats that were coded, decoded once."""

    def __init__(self, layout: TileLayout, word_rows: int, scale_shape: tuple[int, int], group_size: int | None = None):
        """As CompressedWeight. Vectors come out in the default dtype of the time of construction."""
        super().__init__(layout, word_rows, scale_shape, group_size)
        self.num_embeddings, self.embedding_dim = layout.shape
        self.dtype = torch.get_default_dtype()

    @property
    def backend(self) -> str:
        """Always decoded once."""
        return f"{self.weight.device.type}-{self.layout.dtype}"

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [...] -> vectors [..., D]."""
        if self.layout.is_float:
            return F.embedding(ids, self.decoded).to(self.dtype)
        return look_up(ids, self.decoded, self.weight_scale, self.dtype, self.group_size)


class TiedLinear(nn.Module):
    """Output head that shares the compressed weight of the embedding."""

    def __init__(self, embedding: nn.Module):
        """Args: embedding: the CompressedEmbedding that holds the weight; it stays out of this module's state."""
        super().__init__()
        if not isinstance(embedding, CompressedEmbedding):
            raise TypeError(f"a head is tied to a CompressedEmbedding, not to a {type(embedding).__name__}")
        # in a tuple, lest it becomes a submodule
        self._embedding = (embedding,)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., V] in x's dtype, or that of autocast."""
        return linear_from(self._embedding[0], autocast(x), None)

    def extra_repr(self) -> str:
        """Shows what it is tied to."""
        return f"tied, {self._embedding[0].extra_repr()}"


def linear_from(weight: CompressedWeight, x: Tensor, bias: Tensor | None) -> Tensor:
    """x @ W.T + bias on the device of the weight.

    Raises:
        TypeError: x is no float, as after a cast to the dtype of the stored tensors.
    """
    if not x.is_floating_point():
        raise TypeError(f"activations of a compressed layer are floats, got {x.dtype}")
    if x.device.type == "cpu" and weight.layout.is_float:
        return linear(x, weight.decoded.to(x.dtype), bias)
    if x.device.type == "cpu":
        return int8_linear(x, weight.decoded, weight.weight_scale, bias, weight.group_size)
    return rans_linear(x, weight.prepare(), weight.weight_scale, bias, weight.group_size)
