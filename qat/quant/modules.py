"""Linear and embedding layers that compute with the fake-quantised value of a float master weight.

They hold the very Parameter of the layer they replace, so weights that were tied stay tied. They save the stock keys
`weight` and `bias`; a learned scale adds `weight_log2_scale`, owned by one of the layers that share a weight.
"""

from typing import Any, Self

import torch
from rans_kernels.dense import dequantize
from torch import Tensor, nn
from torch.nn import functional as F

from qat.config import QuantConfig, ScaleRule
from qat.quant.fake_quant import fake_quantize, quantize
from qat.quant.scales import grid, weight_scale
from qat.quant.shards import spread_as, whole


class QATModule(nn.Module):
    """What QATLinear and QATEmbedding have in common: a master weight [N, K] and how it is quantised."""

    weight: Tensor
    weight_log2_scale: nn.Parameter | None
    """float32 [R, G], see `weight_scale`; None unless this module owns a learned scale."""
    quant_config: QuantConfig
    fake_quant_enabled: bool
    """False computes with the master weight."""
    frozen: Tensor | None
    """int8 [N, K] to compute with in place of the rounded weight, see `freeze_integers`; in no state_dict."""
    price_slopes: Tensor | None
    """float32 [256], of a price whose gradient the backward adds, see `fake_quantize`; in no state_dict."""

    @property
    def log2_scale(self) -> nn.Parameter | None:
        """The learned scale in log2, this module's or the one of the module it shares its weight with."""
        return self._owner[0].weight_log2_scale if self._owner else self.weight_log2_scale

    def fake_quantized_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] to compute with, made in `dtype` without a float32 copy in between."""
        qmax, group_size = grid(self.quant_config)
        scale = weight_scale(self.weight, self.quant_config, self.log2_scale)
        frozen = self._owner[0].frozen if self._owner else self.frozen
        return fake_quantize(self.weight, scale, qmax, dtype, group_size, frozen, self.price_slopes)

    @torch.no_grad()
    def scale(self) -> Tensor:
        """The step of the integer grid, float32 [R, G], see `weight_scale`; whole where the layer is sharded."""
        if self.log2_scale is None:
            return weight_scale(whole(self.weight), self.quant_config)
        return weight_scale(self.weight, self.quant_config, whole(self.log2_scale))

    @torch.no_grad()
    def integers(self) -> Tensor:
        """The integers that the weight is rounded to: int8 [N, K]; whole where the layer is sharded."""
        return quantize(whole(self.weight), self.scale(), *grid(self.quant_config))

    def freeze_integers(self) -> None:
        """Keep the integers from now on, whatever becomes of the learned scale; again, it changes nothing.

        The weight gets gradients of 0, but an optimiser may still move it: call `settle` after every step. Of layers
        that share a weight, the one that owns the scale keeps the integers.
        """
        if not self._owner:
            self.frozen = self.integers()
            self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Put the weight where frozen integers and scale say, so that rounding it gives these integers."""
        if self.frozen is not None:
            settled = dequantize(self.frozen, self.scale(), self.weight.dtype, grid(self.quant_config)[1])
            self.weight.copy_(spread_as(settled, self.weight))

    @torch.no_grad()
    def reset_scale(self) -> None:
        """Start a learned scale, if this module owns one, from the weight as it is."""
        if self.weight_log2_scale is None:
            return
        value = weight_scale(self.weight, self.quant_config).log2()
        if self.weight_log2_scale.is_meta:
            self.weight_log2_scale = nn.Parameter(value)
        else:
            self.weight_log2_scale.copy_(value)

    def extra_repr(self) -> str:
        """The stock layer's, then bits, granularity and rule."""
        config = self.quant_config
        _, group_size = grid(config)
        granularity = config.granularity.value + (f"({group_size})" if group_size else "")
        off = "" if self.fake_quant_enabled else ", fake_quant=off"
        return f"{super().extra_repr()}, {config.bits} bits {granularity} {config.scale.value}{off}"

    def _adopt(self, module: nn.Module, config: QuantConfig, owner: "QATModule | None") -> Self:
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        self.quant_config, self.fake_quant_enabled = config, True
        # in a tuple, or the owner would be registered as a submodule
        self._owner = () if owner is None else (owner,)
        self.register_buffer("frozen", None, persistent=False)
        self.register_buffer("price_slopes", None, persistent=False)
        self.register_parameter("weight_log2_scale", None)
        if config.scale is ScaleRule.learned and owner is None:
            self.weight_log2_scale = nn.Parameter(weight_scale(self.weight, config).log2())
        return self.train(module.training)

    def _with_idle_scale(self, out: Tensor) -> Tensor:
        # a zero gradient for the scale while quantisation is off: DDP waits for one from every parameter
        if self.weight_log2_scale is None or not torch.is_grad_enabled():
            return out
        return out + 0 * self.weight_log2_scale.sum()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        # a stock checkpoint: start the scale from the weight just loaded
        if f"{prefix}weight_log2_scale" in missing and f"{prefix}weight" in state_dict:
            missing.remove(f"{prefix}weight_log2_scale")
            self.reset_scale()


class QATLinear(QATModule, nn.Linear):
    """nn.Linear with a fake-quantised weight; made by `from_float`.

    Attributes:
        transposed: True in the place of a Conv1D, whose weight is [K, N]: here it is [N, K], as anybody's, and has the
            stock shape in the state_dict.
    """

    transposed = False

    @classmethod
    def from_float(cls, linear: nn.Module, config: QuantConfig, owner: QATModule | None = None) -> Self:
        """Share the Parameters of `linear`, but for the weight of a Conv1D, of which the transpose is a new one.

        Args:
            linear: the layer to replace, an nn.Linear or a Conv1D.
            config: bits, granularity and scale rule.
            owner: the module whose learned scale this one uses, where both hold the same weight.
        """
        transposed = is_conv1d(linear)
        plain: Any = _as_linear(linear) if transposed else linear
        new = cls(plain.in_features, plain.out_features, plain.bias is not None, device="meta")
        new.transposed = transposed
        return new._adopt(plain, config, owner)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.transposed:
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"].t()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if self.transposed and f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"].t()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]; under autocast the weight is made in the autocast dtype, else in its own."""
        if not self.fake_quant_enabled:
            return self._with_idle_scale(super().forward(x))
        device = x.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.weight.dtype
        return F.linear(x, self.fake_quantized_weight(dtype), self.bias)


class QATEmbedding(QATModule, nn.Embedding):
    """nn.Embedding, without max_norm and sparse gradients, with a fake-quantised table; made by `from_float`."""

    @classmethod
    def from_float(cls, embedding: nn.Embedding, config: QuantConfig, owner: QATModule | None = None) -> Self:
        """Share the Parameter of `embedding`; arguments as for `QATLinear.from_float`."""
        shape = embedding.num_embeddings, embedding.embedding_dim
        new = cls(*shape, embedding.padding_idx, scale_grad_by_freq=embedding.scale_grad_by_freq, device="meta")
        return new._adopt(embedding, config, owner)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [...] -> vectors [..., D] in the table's dtype, under autocast too."""
        if not self.fake_quant_enabled:
            return self._with_idle_scale(super().forward(ids))
        table = self.fake_quantized_weight(self.weight.dtype)
        return F.embedding(ids, table, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer of a weight [K, N]; by name: transformers is not imported."""
    return type(module).__name__ == "Conv1D"


def _as_linear(conv: Any) -> nn.Linear:
    linear = nn.Linear(conv.nx, conv.nf, device="meta").train(conv.training)
    weight = conv.weight
    linear.weight = nn.Parameter(weight.detach().t().contiguous(), requires_grad=weight.requires_grad)
    linear.bias = conv.bias
    return linear
