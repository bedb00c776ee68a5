"""INT8 fake quantisation: `prepare` a model, train it, `convert` it."""

from qat.quant.convert import (
    check_config,
    convert,
    end_modules,
    exact_modules,
    freeze,
    is_transposed,
    prepare,
    quantize_weight,
    quantized_modules,
    set_fake_quant,
    settle,
    stock_state_dict,
)
from qat.quant.fake_quant import fake_quantize, quantize
from qat.quant.modules import QATEmbedding, QATLinear
from qat.quant.rate import clipped_fraction, distinct_weights, entropy, weight_statistics
from qat.quant.scales import grid, weight_scale

__all__ = [
    "QATEmbedding",
    "QATLinear",
    "check_config",
    "clipped_fraction",
    "convert",
    "distinct_weights",
    "end_modules",
    "entropy",
    "exact_modules",
    "fake_quantize",
    "freeze",
    "grid",
    "is_transposed",
    "prepare",
    "quantize",
    "quantize_weight",
    "quantized_modules",
    "set_fake_quant",
    "settle",
    "stock_state_dict",
    "weight_scale",
    "weight_statistics",
]
