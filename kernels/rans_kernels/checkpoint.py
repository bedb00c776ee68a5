"""The folder on disk, written atomically and verified: a Hugging Face folder whose config.json says how it is coded.

config.json                     the model's own, and `quantization_config` (docs/format.md)
model-0000i-of-0000n.safetensors, model.safetensors.index.json
tokenizer and generation config, README.md (model card), export_report.json
"""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rans_kernels.coder import EncodedTensor, decode_tiles
from rans_kernels.format import FORMAT_VERSION, LANES, READ_VERSIONS, ROW_WORDS, FormatError, TileLayout, crc32

QUANT_METHOD = "codecllm"
BUFFERS = ("weight", "weight_words", "weight_offsets", "weight_freqs", "weight_scale")


@dataclass(frozen=True)
class LayerEntry:
    """What config.json says of one compressed weight.

    Attributes:
        kind: linear or embedding.
        layout: how it is coded.
        word_rows: rows of the words; those of the heads follow from the layout.
        scale_shape: of the scales.
        group_size: columns that share a scale, or None.
        bias: whether the layer has one; it is stored plainly.
        crc32: checksum of each stored buffer, by name.
        transposed: whether the architecture's own weight is [K, N], that of a Conv1D.
    """

    kind: str
    layout: TileLayout
    word_rows: int
    scale_shape: tuple[int, int]
    group_size: int | None
    bias: bool
    crc32: dict[str, int]
    transposed: bool = False

    @property
    def stock_shape(self) -> tuple[int, int]:
        """Shape of the weight that the architecture has."""
        n, k = self.layout.shape
        return (k, n) if self.transposed else (n, k)

    @classmethod
    def describe(
        cls,
        kind: str,
        encoded: EncodedTensor,
        scale: Tensor,
        group_size: int | None,
        bias: bool,
        transposed: bool = False,
    ) -> tuple["LayerEntry", dict[str, Tensor]]:
        """The entry of an encoded weight, and its buffers."""
        buffers = {
            "weight": torch.from_numpy(encoded.heads),
            "weight_words": torch.from_numpy(encoded.words),
            "weight_offsets": torch.from_numpy(encoded.offsets),
            "weight_freqs": torch.from_numpy(encoded.freqs),
            "weight_scale": scale.to(torch.float32).contiguous(),
        }
        sums = {name: crc32(buffer.numpy()) for name, buffer in buffers.items()}
        shape = (scale.shape[0], scale.shape[1])
        entry = cls(kind, encoded.layout, len(encoded.words), shape, group_size, bias, sums, transposed)
        return entry, buffers

    def to_json(self) -> dict[str, Any]:
        """Plain data for config.json."""
        return {
            "kind": self.kind,
            **self.layout.to_json(),
            "word_rows": self.word_rows,
            "scale_shape": list(self.scale_shape),
            "group_size": self.group_size,
            "bias": self.bias,
            "crc32": self.crc32,
            **({"transposed": True} if self.transposed else {}),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "LayerEntry":
        """The entry that `to_json` wrote.

        Raises:
            FormatError: a key is missing or has a value out of range.
        """
        layout = TileLayout.from_json(data)
        try:
            scale_n, scale_groups = (int(size) for size in data["scale_shape"])
            size = data["group_size"]
            sums = {name: int(data["crc32"][name]) for name in BUFFERS}
            entry = cls(
                str(data["kind"]), layout, int(data["word_rows"]), (scale_n, scale_groups),
                None if size is None else int(size), bool(data["bias"]), sums, bool(data.get("transposed", False)),
            )  # fmt: skip
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise FormatError(f"a layer's entry in config.json is damaged: {error!r}") from error
        n, k = layout.shape
        groups = 1 if entry.group_size is None else -(-k // max(1, entry.group_size))
        if entry.kind not in ("linear", "embedding") or entry.word_rows < 0:
            rows = f"{entry.word_rows} rows of words"
            raise FormatError(f"a layer's entry in config.json is damaged: kind {entry.kind!r}, {rows}")
        if entry.scale_shape != (1, 1) and (layout.is_float or entry.scale_shape != (n, groups)):
            raise FormatError(f"scales of shape {entry.scale_shape} do not fit a weight of shape {layout.shape}")
        return entry


def quantization_config(
    layers: dict[str, LayerEntry],
    tied: dict[str, str],
    quant: dict[str, Any],
    step: int | None,
    profile: str,
    producer: str,
    plain: dict[str, int],
) -> dict[str, Any]:
    """The `quantization_config` block of config.json.

    Args:
        layers: entry of every compressed module.
        tied: linear modules that share the weight of an embedding: {"lm_head": "model.embed_tokens"}.
        quant: the QuantConfig the integers were made with, as plain data.
        step: of training that they are from; None for weights of a plain folder, rounded to nearest or not at all.
        profile: compact, fast or auto.
        producer: name and version of the program that wrote it.
        plain: checksum of every tensor that is not compressed.
    """
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "producer": producer,
        "profile": profile,
        "quant": quant,
        "step": step,
        "tied": tied,
        "crc32": plain,
        "layers": {name: entry.to_json() for name, entry in layers.items()},
    }


def parse_layers(config: dict[str, Any]) -> dict[str, LayerEntry]:
    """Entries of every compressed module of a `quantization_config`.

    Raises:
        FormatError: another method or version, or a damaged entry; the message names the module.
    """
    if config.get("quant_method") != QUANT_METHOD:
        raise FormatError(
            f"quant_method is {config.get('quant_method')!r}, not {QUANT_METHOD!r}: not a codecllm folder"
        )
    version = config.get("format_version")
    if version not in READ_VERSIONS:
        read = " and ".join(map(str, READ_VERSIONS))
        raise FormatError(f"format_version is {version}; this codecllm reads {read}: install one that reads it")
    layers = {}
    for name, data in _table(config, "layers").items():
        try:
            layers[name] = LayerEntry.from_json(data)
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from error
    return layers


def parse_tied(config: dict[str, Any], layers: dict[str, LayerEntry]) -> dict[str, str]:
    """Linear modules without a weight of their own, and the compressed embedding whose weight they share.

    Raises:
        FormatError: one shares the weight of something else.
    """
    tied = _table(config, "tied")
    for head, source in tied.items():
        if not isinstance(source, str) or source not in layers or layers[source].kind != "embedding":
            raise FormatError(f"{head} is tied to {source}, which is no compressed embedding")
    return tied


def tensor_crc32(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes, of any dtype."""
    return crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def check_plain(folder: Path) -> None:
    """Compare the checksums of tensors that are not compressed, as far as config.json has them.

    Raises:
        FormatError: naming the tensor that differs.
    """
    sums = _table(read_config(folder)["quantization_config"], "crc32")
    for name, tensor in iterate_plain(folder):
        if name in sums and tensor_crc32(tensor) != sums[name]:
            raise FormatError(f"{name} is altered: its checksum differs; copy or export the folder again")


def _table(config: dict[str, Any], key: str) -> dict[str, Any]:
    table = config.get(key, {})
    if not isinstance(table, dict):
        raise FormatError(f"{key} of config.json is damaged: it is no table")
    return table


class FolderWriter:
    """Writes a folder beside its final place and renames it there when complete; on an error nothing is left.

    Use as a context manager; `add` tensors, then `finish`.
    """

    def __init__(self, output: Path, shard_bytes: int):
        """Args: output: the folder to make. shard_bytes: a new shard is begun before one grows beyond."""
        self.output, self.shard_bytes = output, shard_bytes
        self.folder = output.with_name(f".{output.name}.partial-{uuid.uuid4().hex[:8]}")
        self._pending: dict[str, Tensor] = {}
        self._shards: list[tuple[Path, list[str]]] = []
        self._bytes = 0

    def __enter__(self) -> "FolderWriter":
        try:
            self.folder.mkdir(parents=True)
        except BaseException:
            # ctrl-c may come when the folder is there, and nobody else would remove it
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Add tensors that belong together: they go to one shard."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._pending and sum(t.nbytes for t in self._pending.values()) + size > self.shard_bytes:
            self._flush()
        self._pending.update(tensors)

    def _flush(self) -> None:
        path = self.folder / f"shard-{len(self._shards):05d}"
        try:
            save_file(self._pending, path, metadata={"format": "pt"})
        except SafetensorError as error:
            # the writer reports a full disk in its own words
            code = errno.ENOSPC if "No space" in str(error) else errno.EIO
            raise OSError(code, os.strerror(code), str(self.output)) from error
        self._shards.append((path, list(self._pending)))
        self._bytes += sum(tensor.nbytes for tensor in self._pending.values())
        self._pending = {}

    def finish(self, config: dict[str, Any], overwrite: bool = False) -> None:
        """Name the shards, write index and config.json, and move the folder into place."""
        if self._pending or not self._shards:
            self._flush()
        total = len(self._shards)
        index: dict[str, str] = {}
        for i, (path, names) in enumerate(self._shards):
            single = total == 1
            name = "model.safetensors" if single else f"model-{i + 1:05d}-of-{total:05d}.safetensors"
            path.rename(self.folder / name)
            index |= dict.fromkeys(names, name)
        if total > 1:
            data = {"metadata": {"total_size": self._bytes}, "weight_map": index}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(data, indent=1))
        # without it nothing loads the folder, so it comes last
        (self.folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        for shard in self.folder.glob("*.safetensors"):
            # safetensors gives them to the owner alone
            shutil.copymode(self.folder / "config.json", shard)
        if overwrite and self.output.exists():
            old = self.folder.with_name(self.folder.name + "-old")
            self.output.rename(old)
            self.folder.rename(self.output)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(self.folder, self.output)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a compressed folder.

    Raises:
        FormatError: no folder, no config.json, not JSON, or not compressed.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FormatError(f"{folder} is not a compressed model: it has no config.json")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is damaged: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("quantization_config"), dict):
        raise FormatError(f"{folder} is not a compressed model: config.json has no quantization_config")
    return config


def coded_names(layers: Iterable[str]) -> set[str]:
    """Names of the stored tensors of compressed modules."""
    return {f"{name}.{buffer}" for name in layers for buffer in BUFFERS}


def shard_of(folder: Path) -> dict[str, Path]:
    """File of every stored tensor.

    Raises:
        FormatError: no weights, or a shard of the index is missing or damaged.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
            raise FormatError(f"{index} is damaged: {error!r}") from error
        if missing := sorted({path.name for path in names.values() if not path.is_file()}):
            raise FormatError(f"{folder} lacks {', '.join(missing)}: copy the whole folder again")
        return names
    single = folder / "model.safetensors"
    if not single.is_file():
        raise FormatError(f"{folder} has no model.safetensors: copy the whole folder again")
    with open_shard(single) as shard:
        return dict.fromkeys(shard.keys(), single)


def open_shard(path: Path) -> Any:
    """Open a safetensors file.

    Raises:
        FormatError: missing, truncated or damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise FormatError(f"{path.parent} lacks {path.name}: copy the whole folder again") from error
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} is damaged or truncated ({error}): copy it again") from error


def read_tensor(key: str, shards: dict[str, Path]) -> Tensor:
    """Read one stored tensor.

    Raises:
        FormatError: it is missing, or its file is damaged.
    """
    if key not in shards:
        raise FormatError(f"{key} is missing from the folder: copy or export it again")
    with open_shard(shards[key]) as shard:
        try:
            return shard.get_tensor(key)
        except SafetensorError as error:
            raise FormatError(f"{shards[key]} is damaged: {error}") from error


def read_layer(name: str, entry: LayerEntry, shards: dict[str, Path]) -> tuple[EncodedTensor, Tensor]:
    """Read one compressed weight and its scales, checksums compared.

    Raises:
        FormatError: a buffer is missing, has another shape or dtype, or another checksum.
    """
    buffers = {buffer: read_tensor(f"{name}.{buffer}", shards) for buffer in BUFFERS}
    check_buffers(name, entry, buffers)
    arrays = (buffers[buffer].numpy() for buffer in BUFFERS[:-1])
    return EncodedTensor(entry.layout, *arrays), buffers["weight_scale"]


def check_buffers(name: str, entry: LayerEntry, buffers: dict[str, Tensor]) -> None:
    """Compare shapes, dtypes and checksums of a weight's buffers with its entry.

    Raises:
        FormatError: naming the buffer.
    """
    layout = entry.layout
    expected = {
        "weight": ((layout.head_rows, LANES), torch.int32),
        "weight_words": ((entry.word_rows, ROW_WORDS), torch.int16),
        "weight_offsets": ((layout.tiles + 1,), torch.int32),
        "weight_freqs": ((256,), torch.int16),
        "weight_scale": (entry.scale_shape, torch.float32),
    }
    for buffer, (shape, dtype) in expected.items():
        tensor = buffers[buffer]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise FormatError(f"{name}.{buffer} is {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")
        if crc32(tensor.cpu().numpy()) != entry.crc32[buffer]:
            raise FormatError(f"{name}.{buffer} is altered: its checksum differs; copy or export the folder again")


def iterate_weights(folder: Path, workers: int | None = None) -> Iterator[tuple[str, LayerEntry, np.ndarray, Tensor]]:
    """Decode every compressed weight of a folder in turn: name, entry, int8 or bits [N, K], scales.

    Raises:
        FormatError: the first thing that is wrong with the folder.
    """
    config = read_config(folder)["quantization_config"]
    shards = shard_of(folder)
    for name, entry in parse_layers(config).items():
        encoded, scale = read_layer(name, entry, shards)
        try:
            weights = decode_tiles(entry.layout, encoded.heads, encoded.words, encoded.offsets, encoded.freqs, workers)
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from error
        yield name, entry, weights, scale


def iterate_plain(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Read every tensor of a folder that belongs to no compressed weight in turn: its name, and it.

    Raises:
        FormatError: the first thing that is wrong with the folder.
    """
    layers = parse_layers(read_config(folder)["quantization_config"])
    shards = shard_of(folder)
    coded = coded_names(layers)
    for key in shards:
        if key not in coded:
            yield key, read_tensor(key, shards)
