"""A compressed folder as its headers tell it, config.json and the heads of the shards: its size is no matter."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rans_kernels.checkpoint import (
    BUFFERS,
    LayerEntry,
    coded_names,
    open_shard,
    parse_layers,
    parse_tied,
    read_config,
    shard_of,
)
from rans_kernels.format import FormatError

from qat.errors import UserError


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a shard, as the shard's header has it: dtype in safetensors' words."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Folder:
    """A compressed folder.

    Attributes:
        path: where it is.
        quantization: the block of config.json.
        layers: entry of every compressed module.
        tied: heads that share the weight of a compressed embedding.
        tensors: everything that is stored, by name.
        shards: number of files.
    """

    path: Path
    quantization: dict[str, Any]
    layers: dict[str, LayerEntry]
    tied: dict[str, str]
    tensors: dict[str, StoredTensor]
    shards: int

    @property
    def plain(self) -> dict[str, StoredTensor]:
        """Tensors that are not compressed."""
        coded = coded_names(self.layers)
        return {name: tensor for name, tensor in self.tensors.items() if name not in coded}


def open_folder(path: str) -> Folder:
    """Read all that can be known of a folder without its weights.

    Raises:
        UserError: no such folder.
        FormatError: not compressed, another version, a damaged config.json or index, a shard that is missing or
            truncated, or that has other tensors than are listed.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{path} is no folder: give one that `codecllm compress` wrote")
    try:
        quantization = read_config(folder)["quantization_config"]
    except FormatError as error:
        raise FormatError(f"{error}; give a folder that `codecllm compress` wrote, or copy it again") from error
    layers = parse_layers(quantization)
    tied = parse_tied(quantization, layers)
    tensors, shards = stored_tensors(folder)
    for name, entry in layers.items():
        needed = [*BUFFERS, "bias"] if entry.bias else BUFFERS
        if missing := [buffer for buffer in needed if f"{name}.{buffer}" not in tensors]:
            raise FormatError(f"{name}.{missing[0]} is missing from {folder}: copy or export the folder again")
    return Folder(folder, quantization, layers, tied, tensors, shards)


def stored_tensors(folder: Path) -> tuple[dict[str, StoredTensor], int]:
    """Tensors of all shards, and the number of shards.

    Raises:
        FormatError: a shard is missing or truncated, is not in the index, or differs from it.
    """
    index = shard_of(folder)
    files = set(index.values())
    if unlisted := sorted(set(folder.glob("model*.safetensors")) - files):
        raise FormatError(f"{unlisted[0]} is not in the index: remove it, or copy the whole folder again")
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(files):
        found = read_header(file)
        listed = {name for name, where in index.items() if where == file}
        if differing := sorted(listed ^ set(found)):
            problem = "lacks" if differing[0] in listed else "has, unlike the index,"
            raise FormatError(f"{file} {problem} {differing[0]}: copy the whole folder again")
        tensors |= found
    return tensors, len(files)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """What a shard holds.

    Raises:
        FormatError: it is truncated or damaged.
    """
    # it compares the header with the size of the file
    with open_shard(file):
        pass
    with open(file, "rb") as shard:
        header = json.loads(shard.read(int.from_bytes(shard.read(8), "little")))
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
    }
