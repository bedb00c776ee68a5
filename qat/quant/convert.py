"""prepare a model for QAT, convert it to plain INT8 afterwards, and the integers that both ends agree on."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from rans_kernels.dense import Int8Embedding, Int8Linear
from torch import Tensor, nn

from qat.config import Granularity, QuantConfig, Rounding, ScaleRule
from qat.errors import UserError
from qat.quant.fake_quant import quantize
from qat.quant.modules import QATEmbedding, QATLinear, QATModule, is_conv1d
from qat.quant.scales import grid, weight_scale


def check_config(config: QuantConfig) -> None:
    """Raise UserError, naming the key, for a value that means nothing."""
    group_size = config.group_size
    problems = [
        (not 2 <= config.bits <= 8, f"quant.bits={config.bits} must be 2 to 8"),
        (group_size < 32 or group_size % 32, f"quant.group_size={group_size} must be a positive multiple of 32"),
        (config.init is ScaleRule.learned, "quant.init=learned must be absmax or std, where a learned scale starts"),
        (not config.k > 0, f"quant.k={config.k} must be positive"),
        (config.start_step < 0, f"quant.start_step={config.start_step} must not be negative"),
        (not 0 <= config.columns <= 1, f"quant.columns={config.columns} must be from 0 to 1"),
        (config.calibration_windows < 1, f"quant.calibration_windows={config.calibration_windows} must be at least 1"),
        (
            config.rounding is Rounding.gptq
            and (config.scale is not ScaleRule.learned or config.granularity is Granularity.per_group),
            "quant.rounding=gptq needs quant.scale=learned and one step a row or a layer",
        ),
    ]
    for wrong, message in problems:
        if wrong:
            raise UserError(message)


def prepare(model: nn.Module, config: QuantConfig) -> nn.Module:
    """Swap layers for fake-quantising ones, in place; they start switched on.

    Linear layers (nn.Linear and GPT-2's Conv1D themselves, no subclass) are chosen by the globs over their names. The
    output head and the input embedding, as `get_output_embeddings` and `get_input_embeddings` name them, are chosen by
    `lm_head` and `embeddings` alone, and with a tied weight either flag takes both. A second call with other globs
    prepares further layers in another way.

    Returns:
        `model`; only if it is itself one linear layer, that layer's replacement.

    Raises:
        UserError: a value of `config` means nothing, no layer is chosen, or head or embedding is of a class of its own.
    """
    check_config(config)
    chosen = _choose(model, config)
    prepared: dict[nn.Module, nn.Module] = {}
    owners: dict[Tensor, QATModule] = {}
    for module in chosen:
        owner = owners.get(module.weight)
        new: QATModule
        if isinstance(module, nn.Embedding):
            new = QATEmbedding.from_float(module, config, owner)
        else:
            new = QATLinear.from_float(module, config, owner)
        owners.setdefault(new.weight, new)
        prepared[module] = new
    return _swap(model, prepared)


@torch.no_grad()
def convert(model: nn.Module) -> nn.Module:
    """Swap the fake-quantising layers for `rans_kernels.dense` ones with the same values, in place; for inference.

    Layers that shared a weight share its integers.

    Returns:
        `model`; only if it is itself one layer, that layer's replacement.

    Raises:
        UserError: a weight is not finite; the message names it.
    """
    quantized: dict[Tensor, tuple[Tensor, Tensor]] = {}
    converted: dict[nn.Module, nn.Module] = {}
    for name, module in quantized_modules(model).items():
        weight, config = module.weight, module.quant_config
        if weight not in quantized:
            quantized[weight] = quantize_weight(weight, config, module.log2_scale, f"{name}.weight")
        q, scale = quantized[weight]
        _, group_size = grid(config)
        if isinstance(module, QATEmbedding):
            new: nn.Module = Int8Embedding(q, scale, weight.dtype, group_size)
        else:
            new = Int8Linear(q, scale, module.bias, group_size)
        converted[module] = new.train(module.training)
    return _swap(model, converted)


@torch.no_grad()
def quantize_weight(
    weight: Tensor, config: QuantConfig, log2_scale: Tensor | None = None, name: str = "weight"
) -> tuple[Tensor, Tensor]:
    """The integers and the scale that fake quantisation uses for `weight`.

    Args:
        weight: float [N, K].
        config: bits, granularity and scale rule.
        log2_scale: float [R, G], the trained `weight_log2_scale` of the learned rule; without it `init` applies.
        name: of the weight, for the error.

    Returns:
        int8 [N, K] in [-qmax, qmax], and the scale, float32 [1, 1], [N, 1] or [N, G].

    Raises:
        UserError: a value of `config` means nothing, or weight or scale is not finite.
    """
    check_config(config)
    qmax, group_size = grid(config)
    scale = weight_scale(weight, config, log2_scale)
    low, high = weight.aminmax()
    if not (low.isfinite() & high.isfinite() & scale.isfinite().all()):
        raise UserError(f"{name} or its scale has NaN or infinite values and cannot be quantised")
    return quantize(weight, scale, qmax, group_size), scale


def quantized_modules(model: nn.Module) -> dict[str, QATLinear | QATEmbedding]:
    """The fake-quantising layers by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QATLinear | QATEmbedding)}


def end_modules(model: nn.Module) -> dict[str, QATLinear | QATEmbedding]:
    """Of `quantized_modules`, the input embedding and the output head."""
    ends = [_end(model, "get_input_embeddings"), _end(model, "get_output_embeddings")]
    return {name: module for name, module in quantized_modules(model).items() if module in ends}


def is_transposed(module: nn.Module) -> bool:
    """Whether the stock weight of a layer, plain or prepared, is [K, N]: that of a Conv1D."""
    return is_conv1d(module) or (isinstance(module, QATLinear) and module.transposed)


def exact_modules(model: nn.Module, ends_only: bool) -> dict[str, Any]:
    """The stock layers that are not quantised, by name: input embedding, output head, and unless `ends_only` the rest.

    Like `prepare` it takes linear layers of no subclass, and of the embeddings the input's alone. A head tied to an
    embedding of another class, as Gemma's, is left with it.
    """
    embedding, head = _end(model, "get_input_embeddings"), _end(model, "get_output_embeddings")
    plain = _is_plain(embedding, nn.Embedding)
    left = head if not plain and embedding is not None and head.weight is embedding.weight else None
    return {
        name: module
        for name, module in model.named_modules()
        if (module is embedding and plain)
        or (_is_linear(module) and module is not left and (module is head or not ends_only))
    }


def set_fake_quant(model: nn.Module, enabled: bool) -> None:
    """Compute with the quantised weights, or with the float masters."""
    for module in quantized_modules(model).values():
        module.fake_quant_enabled = enabled


def freeze(model: nn.Module) -> None:
    """Keep the integers of every quantised weight from now on, while learned scales go on."""
    for module in quantized_modules(model).values():
        module.freeze_integers()


def settle(model: nn.Module) -> None:
    """Put weights back to their frozen integers, after an optimiser has stepped."""
    for module in quantized_modules(model).values():
        module.settle()


def stock_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The float master weights under the keys of the model before `prepare`."""
    return {k: v for k, v in model.state_dict().items() if k.rpartition(".")[2] != "weight_log2_scale"}


def _choose(model: nn.Module, config: QuantConfig) -> list[Any]:
    """The layers to quantise; the embedding first, since it owns the scale of a tied weight."""
    embedding, head = _end(model, "get_input_embeddings"), _end(model, "get_output_embeddings")
    tied = embedding is not None and head is not None and embedding.weight is head.weight
    ends = [
        ("quant.embeddings", embedding, nn.Embedding, config.embeddings or (tied and config.lm_head)),
        ("quant.lm_head", head, nn.Linear, config.lm_head or (tied and config.embeddings)),
    ]
    chosen: list[Any] = []
    for key, module, kind, wanted in ends:
        if wanted and not _is_plain(module, kind):
            what = "names no such layer" if module is None else f"has a {type(module).__name__} of its own there"
            raise UserError(f"{key}=true needs a plain nn.{kind.__name__}, but the model {what}; set it to false")
        if wanted:
            chosen.append(module)
    linear = {n: m for n, m in model.named_modules() if _is_linear(m) and m is not head}
    chosen += [module for name, module in linear.items() if _matches(name, config)]
    if not chosen:
        names = ", ".join(list(linear)[:3]) or "none"
        raise UserError(
            f"no linear layer matches quant.include={config.include} without quant.exclude={config.exclude}"
            f" (the model's are called: {names}{', ...' if len(linear) > 3 else ''})"
        )
    return chosen


def _end(model: nn.Module, getter: str) -> Any:
    return getattr(model, getter)() if hasattr(model, getter) else None


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or is_conv1d(module)


def _is_plain(module: Any, kind: type[nn.Module]) -> bool:
    # a subclass does something more in its forward, which the swap would lose
    return type(module) is kind and not (getattr(module, "sparse", False) or getattr(module, "max_norm", None))


def _matches(name: str, config: QuantConfig) -> bool:
    included = any(fnmatchcase(name, pattern) for pattern in config.include)
    return included and not any(fnmatchcase(name, pattern) for pattern in config.exclude)


def _swap(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    # with duplicates: a layer used in two places has two names, and both must lead to its replacement
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if name and module in new:
            model.set_submodule(name, new[module])
    return new.get(model, model)
