"""The models that a compressed folder is compared with: the fake-quant model it came from, and the unquantised base.

On the CPU the fake-quant forward itself has the compressed model's arithmetic. On a GPU its integers have, through the
dense INT8 kernel (docs/evaluation.md, level 4), and the forward itself, through the library, is a reference apart.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import rans_kernels
import torch
from rans_kernels.dense import Int8Embedding, Int8Linear
from rans_kernels.linear import CompressedEmbedding, CompressedLinear, CompressedWeight, TiedLinear
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.checkpoint import load_fake_quant, read_checkpoint
from qat.config import EvalConfig, QuantConfig, ScaleRule, from_plain
from qat.errors import UserError
from qat.model import load_model, load_tokenizer
from qat.quant import convert, prepare, quantized_modules, set_fake_quant
from qat.quant.modules import QATModule

Loader = Callable[[PreTrainedModel], Any]
"""Loads a reference onto the device of the compressed model, which it is given."""


def reference_loaders(
    config: EvalConfig, folder: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> dict[str, Loader]:
    """The models to compare with, each loaded when its turn comes: `fake_quant`, on a GPU `library`, `base`.

    Where modes are to be compared and there is no fake-quant model, `own` takes its place.

    Args:
        config: compressed, base, checkpoint and modes.
        folder: config.json of the compressed folder.
        device: of the compressed model.
        dtype: of its activations.

    Raises:
        UserError: nothing to compare with, no such base or checkpoint.
    """
    if config.base is None and config.checkpoint is None and not config.modes:
        raise UserError(
            "nothing to compare with: give base=... (the unquantised model), checkpoint=..., both, or modes=all"
        )
    made, stored = folder["quantization_config"], getattr(torch, folder.get("dtype") or "float32")
    # no base tells what was trained
    quant = made.get("quant") if made.get("step") is None else None
    base, checkpoint = config.base, config.checkpoint
    fake_quant: Callable[[], nn.Module] | None = None
    # a wrong path shows now, not after the first model has run
    if base is not None:
        load_tokenizer(base)
    if checkpoint is not None:
        read_checkpoint(checkpoint)
        fake_quant = lambda: _rounded(load_fake_quant(checkpoint), stored)  # noqa: E731
    elif base is not None and quant is not None:
        fake_quant = lambda: _rounded(_prepared(base, from_plain(QuantConfig, quant)), stored)  # noqa: E731
    loaders: dict[str, Loader] = {}
    if fake_quant is not None and device.type == "cpu":
        loaders["fake_quant"] = lambda compressed: in_dtype(fake_quant(), dtype)
    elif fake_quant is not None:
        loaders["fake_quant"] = lambda compressed: in_tile_order(to_int8(fake_quant(), dtype).to(device), compressed)
        loaders["library"] = lambda compressed: in_dtype(fake_quant(), dtype).to(device)
    if fake_quant is None and config.modes:
        loaders["own"] = lambda compressed: own_integers(config.compressed, device, dtype)
    if base is not None:
        loaders["base"] = lambda compressed: _on(device, load_model(base, dtype))
    return loaders


def _on(device: torch.device, model: Any) -> Any:
    return model.to(device)


def _prepared(base: Any, quant: QuantConfig) -> nn.Module:
    model = load_model(base)
    if quant.scale is ScaleRule.learned:
        # the step that nothing has learned, and not its logarithm, which rounds
        quant = replace(quant, scale=quant.init)
    # without quantisation all is stored as it is, or coded without loss
    return (prepare(model, quant) if quant.enabled else model).eval()


def _rounded(model: Any, stored: torch.dtype) -> Any:
    """Tensors that are not compressed rounded as export was told to store them; float32 changes nothing."""
    compressed = {id(module.weight) for module in quantized_modules(model).values()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in compressed and not name.endswith("weight_log2_scale"):
            parameter.data = parameter.data.to(stored).to(parameter.dtype)
    return model


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A fake-quant model in float32, its arithmetic moved to `dtype` without touching its integers and scales."""
    return model if dtype == torch.float32 else to_int8(model, dtype)


def to_int8(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A fake-quant model in float32 as plain INT8, all else in `dtype`."""
    converted = convert(model)
    for parameter in converted.parameters():
        parameter.data = parameter.data.to(dtype)
    for module in converted.modules():
        if isinstance(module, Int8Embedding):
            module.dtype = dtype
    return converted


def linear_layers(model: nn.Module) -> dict[str, CompressedLinear | TiedLinear]:
    """The layers that multiply by a compressed weight, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, CompressedLinear | TiedLinear)}


def weight_of(layer: CompressedLinear | TiedLinear) -> CompressedWeight:
    """What holds the weight that a layer multiplies by."""
    return layer._embedding[0] if isinstance(layer, TiedLinear) else layer


@torch.no_grad()
def round_once(model: Any) -> Any:
    """Put what a fake-quant model computes with in the place of its master weights: the same bits, much faster."""
    modules = [module for module in quantized_modules(model).values() if module.fake_quant_enabled]
    # of a weight that layers share before any of them is changed: what is rounded may round differently again
    rounded = {module.weight: module.fake_quantized_weight(module.weight.dtype).clone() for module in modules}
    for weight, value in rounded.items():
        weight.data = value
    set_fake_quant(model, False)
    return model


def in_tile_order(reference: nn.Module, compressed: nn.Module) -> nn.Module:
    """Let dense INT8 layers add up as the compressed ones of the same names do; changes `reference` in place.

    Floats coded without loss have no dense kernel of that order: such a layer is the compressed model's own, if its
    weight is the reference's to the bit.
    """
    for name, module in linear_layers(compressed).items():
        own: Any = reference.get_submodule(name)
        source = weight_of(module)
        if isinstance(own, Int8Linear):
            own.units, own.fold = source.layout.units, source.layout.fold
        elif source.layout.is_float and _same_floats(own, source):
            reference.set_submodule(name, module)
    return reference


def own_integers(folder: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The folder's own weights kept dense, a reference where it names no other: the same kernels without decoding.

    Raises:
        rans_kernels.format.FormatError: no compressed folder, or a damaged one.
    """
    model = rans_kernels.load(folder, device=device, dtype=dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, CompressedLinear) and not module.layout.is_float:
            model.set_submodule(name, module.to_int8())
    return model


def same_weights(reference: nn.Module, compressed: nn.Module) -> dict[str, Any]:
    """Whether every compressed weight holds the reference's integers and scales, or floats, to the bit.

    Args:
        reference: fake-quant, plain INT8 or plain.
        compressed: of the same architecture.

    Returns:
        modules, weights: how many were compared. unequal: names of modules that differ.
    """
    found: dict[str, Any] = {"modules": 0, "weights": 0, "unequal": []}
    for name, module in compressed.named_modules():
        if not isinstance(module, CompressedLinear | CompressedEmbedding):
            continue
        own: Any = reference.get_submodule(name)
        if own is module:
            same = True
        elif module.layout.is_float:
            same = _same_floats(own, module)
        else:
            integers, scale = _integers(own)
            same = torch.equal(integers, module.weight_int8) and torch.equal(scale, module.weight_scale)
        found["modules"] += 1
        found["weights"] += module.decoded.numel()
        found["unequal"] += [] if same else [name]
    return found


def _same_floats(module: nn.Module, coded: CompressedWeight) -> bool:
    # in the dtype that both compute in
    weight: Any = module.weight
    return torch.equal(weight, coded.decoded.to(weight.dtype))


def _integers(module: nn.Module) -> tuple[Tensor, Tensor]:
    if isinstance(module, QATModule):
        return module.integers(), module.scale()
    if isinstance(module, Int8Linear | Int8Embedding | CompressedWeight):
        return module.weight_int8, module.weight_scale
    # a layer that was never quantised has none
    return torch.empty(0), torch.empty(0)
