"""A plugin of vLLM: `quantization_config` and linear layers of compressed folders. Never run under a real vLLM.

vLLM imports this module by its entry point (pyproject.toml). What it fuses, as query, key and value, is coded in parts,
each with its own table and length: the parts are stored one after another until all are loaded, and multiplied one by
one. Limits: docs/interop.md.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from rans_kernels.checkpoint import BUFFERS, QUANT_METHOD, LayerEntry, check_buffers, parse_layers
from rans_kernels.linear import CompressedLinear, linear_from

QKV = {"q": 0, "k": 1, "v": 2}
"""Numbers of what vLLM calls by letters; of other fused layers it gives the number."""


def register() -> None:
    """What the entry point names; that this module was imported is all it takes."""


@register_quantization_config(QUANT_METHOD)
class CodecVllmConfig(QuantizationConfig):
    """Which layers are compressed, and how."""

    def __init__(self, layers: dict[str, LayerEntry]):
        """Args: layers: entry of every compressed module.

        Raises:
            ValueError: embeddings are compressed, or weights of Conv1D.
        """
        super().__init__()
        self.layers = layers
        for name, entry in layers.items():
            if entry.kind != "linear" or entry.transposed:
                what = "an embedding" if entry.kind != "linear" else "a Conv1D"
                raise ValueError(f"{name} is {what}, which vLLM cannot have compressed: export without it")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CodecVllmConfig":
        """Of the block of config.json; FormatError as `parse_layers`."""
        return cls(parse_layers(config))

    @classmethod
    def get_name(cls) -> str:
        """As config.json has it."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """What the fused kernels multiply."""
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: it is in config.json."""
        return []

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """How vLLM is to make and run a layer.

        Raises:
            ValueError: of a fused layer only a part is compressed, or the output head is.
        """
        if isinstance(layer, VocabParallelEmbedding) and prefix in self.layers:
            raise ValueError(f"{prefix} is compressed, which vLLM cannot have: export with quant.lm_head=false")
        if not isinstance(layer, LinearBase):
            return None
        names = self.parts(prefix)
        coded = [name for name in names if name in self.layers]
        if not coded:
            return UnquantizedLinearMethod()
        if coded != names:
            missing = next(name for name in names if name not in self.layers)
            raise ValueError(f"vLLM fuses {prefix}, of which {missing} is not compressed: export all parts or none")
        return CodecLinearMethod({name: self.layers[name] for name in names})

    def parts(self, prefix: str) -> list[str]:
        """Names in the folder of what vLLM has as one layer."""
        parent, _, child = prefix.rpartition(".")
        if prefix in self.layers or child not in self.packed_modules_mapping:
            return [prefix]
        return [f"{parent}.{part}".lstrip(".") for part in self.packed_modules_mapping[child]]


class CodecLinearMethod(LinearMethodBase):
    """Loads and multiplies the compressed parts of one layer."""

    def __init__(self, entries: dict[str, LayerEntry]):
        """Args: entries: of every part by its name in the folder, in the order of the outputs."""
        self.entries = entries

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """One parameter for each stored buffer, the parts one after another.

        Raises:
            ValueError: tensor parallelism, or other shapes than were exported.
        """
        if input_size_per_partition != input_size or sum(output_partition_sizes) != output_size:
            raise ValueError("compressed layers are not split over GPUs: start vLLM with tensor_parallel_size=1")
        sizes = output_partition_sizes if len(self.entries) > 1 else [output_size]
        for (name, entry), rows in zip(self.entries.items(), sizes, strict=True):
            if entry.layout.shape != (rows, input_size):
                raise ValueError(f"{name} is {entry.layout.shape}, and vLLM's layer {(rows, input_size)}")
        empty = [part.state_dict() for part in self._modules_of()]
        for buffer in BUFFERS:
            parts = [state[buffer] for state in empty]
            parameter = nn.Parameter(torch.cat(parts), requires_grad=False)
            parameter.weight_loader = _Loader([len(part) for part in parts])  # type: ignore[attr-defined]
            layer.register_parameter(buffer, parameter)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Check what was loaded, and make a module of each part."""
        modules = self._modules_of()
        for buffer in BUFFERS:
            stored = getattr(layer, buffer).data
            sizes = [len(getattr(module, buffer)) for module in modules]
            for module, part in zip(modules, stored.split(sizes), strict=True):
                # of its own: the whole is given back
                setattr(module, buffer, part.clone())
            delattr(layer, buffer)
        for (name, entry), module in zip(self.entries.items(), modules, strict=True):
            check_buffers(name, entry, {buffer: getattr(module, buffer) for buffer in BUFFERS})
            module.prepare()
        layer.parts = nn.ModuleList(modules)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] -> [..., N], the outputs of all parts side by side."""
        parts: Sequence[Any] = layer.parts  # type: ignore[assignment]
        sizes = [part.out_features for part in parts]
        biases: Sequence[Tensor | None] = [None] * len(sizes) if bias is None else bias.split(sizes)
        outputs = [linear_from(part, x, b) for part, b in zip(parts, biases, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _modules_of(self) -> list[CompressedLinear]:
        # vLLM adds the bias itself, or hands it to `apply`
        return [CompressedLinear(e.layout, e.word_rows, e.scale_shape, e.group_size) for e in self.entries.values()]


class _Loader:
    """Copies a stored tensor to its place among the parts."""

    def __init__(self, rows: list[int]):
        self.rows = rows

    def __call__(self, parameter: Tensor, loaded: Tensor, shard: str | int | None = None) -> None:
        number = 0 if shard is None else QKV[shard] if isinstance(shard, str) else shard
        place = parameter.data.split(self.rows)[number]
        if place.shape != loaded.shape or place.dtype != loaded.dtype:
            raise ValueError(f"a stored tensor is {loaded.dtype} {tuple(loaded.shape)}, not {tuple(place.shape)}")
        place.copy_(loaded)
