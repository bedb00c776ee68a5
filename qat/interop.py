"""A compressed folder written again in formats that need nothing of ours: plain floats, or compressed-tensors' INT8.

Works weight by weight, as export does: memory holds one weight and one shard, and the folder appears under its name
only when complete (docs/interop.md).
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rans_kernels.checkpoint import FolderWriter, LayerEntry, iterate_plain, iterate_weights, parse_layers, read_config
from rans_kernels.dense import dequantize
from torch import Tensor, nn

from qat.errors import UserError
from qat.export import check_replaceable, copy_companions, parse_dtype, parse_size, store_as


def to_plain(
    source: str | Path, output: str | Path, dtype: str = "bfloat16", overwrite: bool = False, shard_size: str = "5GB"
) -> Path:
    """Write a folder of ordinary floats, which any version of transformers loads, and return it.

    Args:
        source: compressed folder.
        output: folder to make.
        dtype: of every float: float32, bfloat16, float16, or auto for that of what was not compressed.
        overwrite: whether an existing output is replaced.
        shard_size: of one file at most, as 5GB.

    Raises:
        UserError: a wrong dtype or size, or the output exists.
        FormatError: the source is no compressed folder, or damaged; nothing is written.
    """
    return _rewrite(Path(source).expanduser(), output, dtype, overwrite, shard_size)


def to_compressed_tensors(
    source: str | Path, output: str | Path, dtype: str = "bfloat16", overwrite: bool = False, shard_size: str = "5GB"
) -> Path:
    """Write a `pack-quantized` folder (W8A16), the same integers and scales, and return it.

    Embeddings, the output head and layers whose last group of columns is not whole become floats of `dtype`. Scales
    stay float32.

    Args:
        source: compressed folder.
        output: folder to make.
        dtype: of every other float, as in `to_plain`.
        overwrite: whether an existing output is replaced.
        shard_size: of one file at most, as 5GB.

    Raises:
        UserError: as `to_plain`, and no layer is INT8.
        FormatError: as `to_plain`.
    """
    source = Path(source).expanduser()
    layers = parse_layers(read_config(source)["quantization_config"])
    linear, head = _linear_layers(source)
    packed = {name for name in linear if name != head and name in layers and _packable(layers[name])}
    sizes = {layers[name].group_size for name in packed}
    if len(sizes) != 1:
        raise UserError(f"{source} has no INT8 linear layers in a form that compressed-tensors has: write it as plain")
    block = _quantization_block(sizes.pop(), sorted(linear - packed))
    return _rewrite(source, output, dtype, overwrite, shard_size, packed, block)


def _packable(entry: LayerEntry) -> bool:
    """Whether compressed-tensors has a form for a weight: integers, with groups of columns that are all whole."""
    whole = entry.group_size is None or entry.layout.shape[1] % entry.group_size == 0
    return not entry.layout.is_float and whole


def _quantization_block(group_size: int | None, ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config` of INT8 weights and nothing else.

    Args:
        group_size: columns that share a scale, or None for one scale a row.
        ignore: linear layers that are floats.
    """
    weights = {
        "num_bits": 8, "type": "int", "symmetric": True, "dynamic": False,
        "strategy": "channel" if group_size is None else "group", "group_size": group_size,
    }  # fmt: skip
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ignore,
    }


def _pack(weights: np.ndarray, scale: Tensor) -> dict[str, Tensor]:
    """The tensors of an INT8 weight [N, K] in `pack-quantized`: four columns an int32, the lowest byte first, plus 128.

    One scale for all is repeated for every row: vLLM knows no other where activations are not quantised.
    """
    n, k = weights.shape
    unsigned = np.pad(weights.view(np.uint8) ^ 0x80, ((0, 0), (0, -k % 4)))
    return {
        "weight_packed": torch.from_numpy(unsigned.view("<i4")),
        "weight_scale": scale.expand(n, -1).contiguous(),
        "weight_shape": torch.tensor([n, k]),
    }


def _unpacked(entry: LayerEntry, weights: np.ndarray, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The floats that a layer of `dtype` computes with, of integers or of floats coded without loss, in stock shape."""
    stored = torch.from_numpy(weights)
    if entry.layout.is_float:
        floats = stored.view(getattr(torch, entry.layout.dtype)).to(dtype)
    else:
        floats = dequantize(stored, scale, dtype, entry.group_size)
    return floats.t().contiguous() if entry.transposed else floats


def _linear_layers(source: Path) -> tuple[set[str], str | None]:
    """Names of a model's linear layers, and that of its output head."""
    from transformers import AutoModelForCausalLM

    from qat.model import load_config

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(source))
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = model.get_output_embeddings()
    return set(linear), next((name for name, module in linear.items() if module is head), None)


def _rewrite(
    source: Path,
    output: str | Path,
    dtype: str,
    overwrite: bool,
    shard_size: str,
    packed: Collection[str] = (),
    block: dict[str, Any] | None = None,
) -> Path:
    """Write the folder: the layers of `packed` as integers, the rest as floats; `block` says so in config.json."""
    output = Path(output).expanduser()
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists: choose another name or say --overwrite")
    if output.resolve() == source.resolve():
        raise UserError(f"{output} is the folder to read: choose another name")
    if output.exists():
        check_replaceable(output, source)
    config = read_config(source)
    coded = config.pop("quantization_config")
    floats = parse_dtype(dtype) or getattr(torch, config.get("dtype") or "float32")
    config["dtype"] = str(floats).removeprefix("torch.")
    if coded.get("tied"):
        # export says no where the stored weight is none that transformers could tie
        config["tie_word_embeddings"] = True
    if block is not None:
        config["quantization_config"] = block
    with FolderWriter(output, parse_size(shard_size)) as writer:
        for name, entry, weights, scale in iterate_weights(source):
            if name in packed:
                writer.add({f"{name}.{key}": tensor for key, tensor in _pack(weights, scale).items()})
            else:
                writer.add({f"{name}.weight": _unpacked(entry, weights, scale, floats)})
        for key, tensor in iterate_plain(source):
            writer.add({key: store_as(tensor, floats)})
        copy_companions(source, writer.folder)
        writer.finish(config, overwrite)
    dense = len(parse_layers(coded)) - len(packed)
    print(f"{output}: {len(packed)} weights as INT8, {dense} as {config['dtype']}")
    return output
