"""Hugging Face integration: the quantizer that lets `from_pretrained` read compressed folders.

Before the weights are loaded, the linear layers and embeddings that config.json lists are replaced by modules whose
buffers have the names and shapes of the stored tensors; transformers then loads them like any others.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

# the leaf modules: this one is imported while transformers.quantizers itself is (rans_kernels/__init__.py)
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from rans_kernels.checkpoint import (
    BUFFERS,
    QUANT_METHOD,
    LayerEntry,
    check_buffers,
    open_shard,
    parse_layers,
    parse_tied,
    read_config,
    shard_of,
)
from rans_kernels.errors import DeviceError
from rans_kernels.format import FormatError
from rans_kernels.linear import CompressedEmbedding, CompressedLinear, CompressedWeight, TiedLinear
from rans_kernels.ops.coded import require_device
from rans_kernels.streaming import Streamer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@register_quantization_config(QUANT_METHOD)
class CodecConfig(QuantizationConfigMixin):
    """The `quantization_config` of a compressed folder, kept as it was read but for checksums of plain tensors."""

    def __init__(self, **kwargs: Any):
        """Args: kwargs: the block of config.json, see docs/format.md."""
        self.quant_method = kwargs.pop("quant_method", QUANT_METHOD)
        # what is not compressed may change, in dtype if nothing else, before it is saved again
        kwargs.pop("crc32", None)
        for key, value in kwargs.items():
            setattr(self, key, value)

    @property
    def layers_parsed(self) -> dict[str, LayerEntry]:
        """Entry of every compressed module."""
        return parse_layers(self.to_dict())

    @property
    def tied_heads(self) -> dict[str, str]:
        """Linear modules without a weight of their own, and the embedding whose weight they share."""
        return parse_tied(self.to_dict(), self.layers_parsed)


@register_quantizer(QUANT_METHOD)
class CodecQuantizer(HfQuantizer):
    """Swaps modules before loading, checks what was loaded after it."""

    requires_calibration = True

    def __init__(self, quantization_config: CodecConfig, **kwargs: Any):
        """Args: quantization_config: of the folder. kwargs: as HfQuantizer."""
        super().__init__(quantization_config, **kwargs)
        self.layers = quantization_config.layers_parsed
        self.tied = quantization_config.tied_heads
        self.is_streamed = False

    def validate_environment(self, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse devices that are not there or have no kernels, before weights are read.

        Raises:
            DeviceError: naming the first.
        """
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        for device in devices:
            # others are ways to choose: auto and the like, disk, tensor parallelism
            if isinstance(device, int | torch.device) or str(device).partition(":")[0] in ("cpu", "cuda", "mps", "xpu"):
                require_device(device)

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        for file in checkpoint_files or ():
            # transformers' own words on a shard that is cut do not name it
            with open_shard(Path(file)):
                pass
        for name, entry in self.layers.items():
            replace_module(model, name, module_for(entry), entry.stock_shape)
        for head, source in self.tied.items():
            replace_module(model, head, TiedLinear(model.get_submodule(source)))

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **kwargs: Any) -> None:
        for name, entry in self.layers.items():
            module: Any = model.get_submodule(name)
            if module.weight.is_meta:
                raise DeviceError(
                    f"{name} was offloaded, which compressed weights cannot be by accelerate: leave offload_buffers "
                    "out, or give rans_kernels.load a budget"
                )
            check_buffers(name, entry, {buffer: getattr(module, buffer) for buffer in BUFFERS})
            if isinstance(module, CompressedEmbedding):
                module.dtype = model.dtype
            if isinstance(module, CompressedWeight):
                module.prepare()

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """A loaded model can be saved again: its buffers are the stored tensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on top (rans_kernels/lora.py); weights stay as they are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`generate` may compile the model, unless its weights are streamed."""
        return not self.is_streamed


def module_for(entry: LayerEntry) -> CompressedWeight:
    """An empty module with the buffers of an entry."""
    if entry.kind == "embedding":
        return CompressedEmbedding(entry.layout, entry.word_rows, entry.scale_shape, entry.group_size)
    return CompressedLinear(entry.layout, entry.word_rows, entry.scale_shape, entry.group_size, entry.bias)


def replace_module(model: nn.Module, name: str, new: nn.Module, shape: tuple[int, int] | None = None) -> None:
    """Put a module in the place of another, whose weight has this shape unless it is None.

    Raises:
        FormatError: the model has none of that name, or of another shape.
    """
    parent, _, child = name.rpartition(".")
    try:
        old = model.get_submodule(name)
    except AttributeError as error:
        raise FormatError(f"config.json lists {name}, which a {type(model).__name__} does not have") from error
    found = tuple(getattr(old.weight, "shape", ()))
    if shape is not None and found != shape:
        raise FormatError(f"{name} is listed with shape {shape}, the model has {found}")
    setattr(model.get_submodule(parent), child, new)


def load(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    budget: float | None = None,
    offload: str = "host",
) -> "PreTrainedModel":
    """Load a compressed folder, in eval mode.

    Args:
        folder: written by export.
        device: where it goes.
        dtype: of activations and of what is not compressed; None takes the stored one.
        budget: GB (1e9 bytes) that weights may take there, the others are streamed (streaming.py); None is no limit.
        offload: where streamed weights wait: `host` or `disk`.

    Raises:
        FormatError: not such a folder, another version, a missing, truncated or altered file.
        DeviceError: the device is not there, or has no kernels.
        BudgetError: the budget is too small, or the device's memory.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(folder)
    require_device(device)
    config = read_config(folder)
    parse_layers(config["quantization_config"])
    for shard in set(shard_of(folder).values()):
        with open_shard(shard):
            pass
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype or "auto", local_files_only=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        reason = str(error).splitlines()[0]
        raise FormatError(
            f"the weights of {folder} do not fit its config.json, or are damaged ({reason}): codecllm verify says where"
        ) from error
    model, info = loaded
    for problem in ("missing", "unexpected", "mismatched"):
        if keys := sorted(map(str, info[f"{problem}_keys"])):
            more = f" and {len(keys) - 1} more" if keys[1:] else ""
            what = f"{problem} {keys[0]}{more}"
            raise FormatError(f"the weights of {folder} do not fit its config.json: {what}; copy or export it again")
    Streamer(model.eval(), math.inf if budget is None else budget, device, offload).enable()
    return model
