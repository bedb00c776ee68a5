"""Export: weights of a trained or plain checkpoint, coded tile by tile into a Hugging Face folder.

Works layer by layer: a weight is read (memory-mapped), rounded to integers or taken as it is, coded, decoded again
and compared, and handed to the writer, so that memory holds one layer and one shard. The folder appears under its
name only when complete.
"""

import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rans_kernels.checkpoint import (
    FolderWriter,
    LayerEntry,
    open_shard,
    quantization_config,
    shard_of,
    tensor_crc32,
)
from rans_kernels.coder import (
    EncodedTensor,
    byte_histogram,
    decode_tiles,
    encode_tiles,
    entropy,
    high_bytes,
    weight_histogram,
)
from rans_kernels.coder.plan import can_fold, choose_float_layout, choose_layout
from rans_kernels.format import FLOATS, FormatError, TileLayout
from torch import Tensor, nn

from qat.checkpoint import read_checkpoint
from qat.config import ExportConfig, Lossless, QuantConfig, Rounding, to_plain
from qat.errors import UserError
from qat.model_card import model_card
from qat.quant import (
    QATEmbedding,
    QATLinear,
    exact_modules,
    grid,
    is_transposed,
    prepare,
    quantize_weight,
    quantized_modules,
)
from qat.report import log_to_wandb, print_table, size_totals, track, write_json

COPIED = ("tokenizer*", "special_tokens_map.json", "generation_config.json", "vocab*", "merges.txt", "chat_template*")


@dataclass(frozen=True)
class Source:
    """Where weights come from.

    Attributes:
        folder: has config.json and the tokenizer.
        quant: how the weights are rounded.
        names: of every stored tensor.
        read: gives one.
        base: name of the model it descends from, for the model card.
        step: optimiser step of a checkpoint; None for a plain folder.
    """

    folder: Path
    quant: QuantConfig
    names: list[str]
    read: Callable[[str], Tensor]
    base: str
    step: int | None


def open_source(config: ExportConfig) -> Source:
    """Open a Lightning checkpoint or a Hugging Face folder.

    Raises:
        UserError: neither, or damaged; settings that are nothing to a folder.
    """
    path = Path(config.source).expanduser()
    if path.is_file():
        checkpoint = read_checkpoint(path)
        if not checkpoint.config.quant.enabled:
            raise UserError(f"{path} was trained without quantisation: export its Hugging Face folder instead")
        if not checkpoint.fake_quant_on:
            raise UserError(
                f"{path} is of step {checkpoint.step}, before fake quantisation began at quant.start_step="
                f"{checkpoint.config.quant.start_step}: export a later checkpoint"
            )
        weights = checkpoint.weights
        base = checkpoint.config.model.path
        return Source(
            checkpoint.hf_folder, checkpoint.config.quant, list(weights), weights.__getitem__, base, checkpoint.step
        )
    if not (path / "config.json").is_file():
        raise UserError(f"source={config.source} is neither a .ckpt file nor a folder with config.json")
    if config.quant.columns or config.quant.rounding is not Rounding.nearest:
        key = "columns" if config.quant.columns else "rounding"
        raise UserError(f"quant.{key}: only training does that, before its first step; {config.source} is a folder")
    shards = shard_of(path)

    def read(name: str) -> Tensor:
        with open_shard(shards[name]) as shard:
            return shard.get_tensor(name)

    return Source(path, config.quant, list(shards), read, path.name, None)


def under_model_names(source: Source, hf_config: Any) -> Source:
    """The source with the base model's prefix put before names, where all lack it as those of the hub's GPT-2 do.

    Then it is without what transformers passes over, GPT-2's masks.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(hf_config), None)
    if kind is None or any(name.startswith(f"{kind.base_model_prefix}.") for name in source.names):
        return source
    with torch.device("meta"):
        known = set(kind(hf_config).state_dict())
    passed = re.compile("|".join(kind._keys_to_ignore_on_load_unexpected or ["$^"]))
    stored = {}
    for name in source.names:
        full = f"{kind.base_model_prefix}.{name}"
        if full in known or not passed.search(name):
            stored[full if full in known else name] = name
    return replace(source, names=list(stored), read=lambda name: source.read(stored[name]))


def export(config: ExportConfig) -> Path:
    """Write the compressed folder and return it.

    Raises:
        UserError: a wrong path, or weights that cannot be quantised.
        FormatError: a decoded layer differs from what was coded; nothing is written.
    """
    from qat.model import load_config

    output = checked_output(config)
    begin = time.perf_counter()
    dtype = parse_dtype(config.dtype)
    source = open_source(config)
    hf_config = load_config(source.folder)
    if getattr(hf_config, "quantization_config", None) is not None:
        raise UserError(f"{config.source} is quantised already; training and export start from plain weights")
    source = under_model_names(source, hf_config)
    modules, tied = plan_modules(hf_config, source.quant, config.lossless)
    weight_of = {f"{name}.weight": name for name in modules}
    if missing := sorted(set(weight_of) - set(source.names)):
        raise UserError(f"{config.source} has no tensor {missing[0]}: its names differ from those of the architecture")
    layers: dict[str, LayerEntry] = {}
    report: list[dict[str, Any]] = []
    plain: dict[str, int] = {}
    # not stored, because they are another tensor: transformers ties the head again on load
    passed = {f"{head}.weight" for head in tied}
    if getattr(hf_config, "tie_word_embeddings", False):
        passed.add("lm_head.weight")
    with FolderWriter(output, parse_size(config.shard_size)) as writer:
        for key in track(sorted(source.names), "export", config.progress_bar):
            name = weight_of.get(key)
            if name is not None:
                row, entry, buffers = export_layer(name, modules[name], source, config, dtype)
                writer.add({f"{name}.{buffer}": tensor for buffer, tensor in buffers.items()})
                layers[name] = entry
                report.append(row)
            elif key not in passed and not key.endswith(".weight_log2_scale"):
                tensor = store_as(source.read(key), dtype)
                writer.add({key: tensor})
                plain[key] = tensor_crc32(tensor)
                report.append(plain_row(key, tensor))
        data = hf_config.to_dict()
        # a place on this machine
        data.pop("_name_or_path", None)
        data["dtype"] = stored_dtype(report)
        if tied:
            # the stored weight is not a parameter that transformers could tie
            data["tie_word_embeddings"] = False
        producer = f"codecllm {version('codecllm')}"
        data["quantization_config"] = quantization_config(
            layers, tied, to_plain(source.quant), source.step, config.profile.value, producer, plain
        )
        copy_companions(source.folder, writer.folder)
        summary = summarise(report) | {
            "source": config.source, "base": source.base, "step": source.step, "profile": config.profile.value,
            "seconds": round(time.perf_counter() - begin, 2),
        }  # fmt: skip
        write_json(writer.folder / "export_report.json", {"summary": summary, "layers": report})
        (writer.folder / "README.md").write_text(model_card(output.name, summary, data))
        writer.finish(data, config.overwrite)
    print_report(output, summary, report)
    log_to_wandb(config.logger, output, "export", summary, {"layers": layer_table(report)}, model=output)
    return output


def checked_output(config: ExportConfig) -> Path:
    """The folder to write.

    Raises:
        UserError: it exists and is not to be overwritten, is no model, or holds the source.
    """
    output = Path(config.output).expanduser()
    if not output.exists():
        return output
    if not config.overwrite:
        raise UserError(
            f"output={config.output} exists: choose another name or say overwrite=true (--overwrite of codecllm)"
        )
    check_replaceable(output, Path(config.source).expanduser())
    return output


def check_replaceable(output: Path, source: Path) -> None:
    """Raise UserError for an existing folder that must not be replaced: no model, or one that holds the source."""
    if not (output / "config.json").is_file():
        raise UserError(f"output={output} is no model, and is not overwritten: choose another name")
    if source.resolve().is_relative_to(output.resolve()):
        raise UserError(f"output={output} holds the source, which would be lost: choose another name")


def copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer and generation config from one model's folder to another's."""
    for pattern in COPIED:
        for file in source.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def plan_modules(hf_config: Any, quant: QuantConfig, lossless: Lossless) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Modules to compress by name, and heads that share an embedding's weight: {head: embedding}.

    Raises:
        UserError: there is nothing to compress.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
        model.tie_weights()
        if quant.enabled:
            prepare(model, quant)
    chosen: dict[str, nn.Module] = dict(quantized_modules(model))
    if lossless is not Lossless.none:
        chosen |= exact_modules(model, ends_only=lossless is Lossless.embeddings)
    if not chosen:
        raise UserError(f"quant=none lossless={lossless.value} leaves nothing to compress: give another of the two")
    modules: dict[str, nn.Module] = {}
    owner: dict[int, str] = {}
    tied: dict[str, str] = {}
    embeddings_first = sorted(chosen.items(), key=lambda item: not isinstance(item[1], nn.Embedding))
    for name, module in embeddings_first:
        first = owner.setdefault(id(module.weight), name)
        if first == name:
            modules[name] = module
        else:
            tied[name] = first
    return modules, tied


def export_layer(
    name: str, module: nn.Module, source: Source, config: ExportConfig, dtype: torch.dtype | None
) -> tuple[dict[str, Any], LayerEntry, dict[str, Tensor]]:
    """Code and verify one weight, rounded to integers if it is to be: its row of the report, its entry, its buffers."""
    begin = time.perf_counter()
    bias = getattr(module, "bias", None) is not None
    transposed = is_transposed(module)
    weight = source.read(f"{name}.weight")
    if transposed:
        weight = weight.t().contiguous()
    if isinstance(module, QATLinear | QATEmbedding):
        weights, scale, layout, facts = plan_integers(name, weight, source, config, bias)
        group_size = grid(source.quant)[1]
    else:
        weights, layout, facts = plan_floats(name, weight, config, dtype)
        scale, group_size = torch.ones(1, 1), None
    if config.units is not None:
        layout = replace(layout, units=config.units)
    if config.probability_bits is not None:
        layout = replace(layout, probability_bits=config.probability_bits)
    encoded = encode_tiles(weights, layout, config.workers)
    verify(name, weights, encoded, config.workers)
    kind = "embedding" if isinstance(module, nn.Embedding) else "linear"
    entry, buffers = LayerEntry.describe(kind, encoded, scale, group_size, bias, transposed)
    row = {
        "name": name,
        "kind": kind,
        "shape": list(weights.shape),
        "weights": weights.size,
        "dtype": layout.dtype,
        "entropy": round(facts["entropy"], 4),
        "bits": round(8 * (encoded.nbytes + scale.nbytes) / weights.size, 4),
        "bytes": encoded.nbytes + scale.nbytes,
        "split": str(layout.split),
        "units": layout.units,
        "fold": layout.fold,
        "clipped": round(facts["clipped"], 8),
        "seconds": round(time.perf_counter() - begin, 3),
    }
    return row, entry, buffers


def plan_integers(
    name: str, weight: Tensor, source: Source, config: ExportConfig, bias: bool
) -> tuple[np.ndarray, Tensor, TileLayout, dict[str, float]]:
    """A weight [N, K] rounded to int8, its scales, how to code it, and its entropy and share of clipped weights."""
    log2_key = f"{name}.weight_log2_scale"
    log2_scale = source.read(log2_key) if log2_key in source.names else None
    q, scale = quantize_weight(weight, source.quant, log2_scale, f"{name}.weight")
    weights, (qmax, _) = q.numpy(), grid(source.quant)
    counts = weight_histogram(weights)
    clipped = float(counts[[128 - qmax, 128 + qmax]].sum() / weights.size)
    foldable = can_fold(scale.numel(), bias)
    layout = choose_layout(counts, (q.shape[0], q.shape[1]), config.profile.value, foldable)
    return weights, scale, layout, {"entropy": entropy(counts), "clipped": clipped}


def plan_floats(
    name: str, weight: Tensor, config: ExportConfig, dtype: torch.dtype | None
) -> tuple[np.ndarray, TileLayout, dict[str, float]]:
    """The bits of a weight [N, K], uint16, how to code them, and their entropy: the high byte's, and 8.

    Raises:
        UserError: it is no 16-bit float, and `dtype` does not make it one.
    """
    weight = store_as(weight, dtype)
    kind = str(weight.dtype).removeprefix("torch.")
    if kind not in FLOATS:
        raise UserError(
            f"{name}.weight is {kind}, and lossless={config.lossless.value} takes 16 bits: say dtype=bfloat16 to round "
            "what is not quantised, or lossless=none to store it plainly"
        )
    bits = weight.view(torch.uint16).numpy()
    counts = byte_histogram(high_bytes(bits))
    layout = choose_float_layout(counts, (bits.shape[0], bits.shape[1]), config.profile.value, kind)
    return bits, layout, {"entropy": entropy(counts) + 8, "clipped": 0.0}


def verify(name: str, weights: np.ndarray, encoded: EncodedTensor, workers: int | None) -> None:
    """Decode a weight and compare every integer, or every bit.

    Raises:
        FormatError: they differ.
    """
    decoded = decode_tiles(encoded.layout, encoded.heads, encoded.words, encoded.offsets, encoded.freqs, workers)
    if not np.array_equal(decoded, weights):
        raise FormatError(f"{name}: the decoded weights differ from those coded; this is a bug, nothing was written")


def plain_row(name: str, tensor: Tensor) -> dict[str, Any]:
    """Row of the report for a tensor stored as it is."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {
        "name": name, "kind": "plain", "shape": list(tensor.shape), "weights": tensor.numel(), "dtype": dtype,
        "bytes": tensor.nbytes, "bits": 8 * tensor.element_size(),
    }  # fmt: skip


def store_as(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A copy of a tensor that is not compressed, in `dtype` if it is a float and `dtype` is not None."""
    return tensor.clone() if dtype is None or not tensor.is_floating_point() else tensor.to(dtype, copy=True)


def parse_dtype(name: str) -> torch.dtype | None:
    """None for auto.

    Raises:
        UserError: no dtype to store in.
    """
    dtypes = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise UserError(f"dtype={name}: give one of {', '.join(dtypes)}")
    return dtypes[name]


def stored_dtype(report: list[dict[str, Any]]) -> str:
    """Widest float dtype of what is not quantised: what transformers loads it as."""
    order = ["float16", "bfloat16", "float32"]
    return max((row["dtype"] for row in report if row.get("dtype") in order), key=order.index, default="float32")


def summarise(report: list[dict[str, Any]]) -> dict[str, Any]:
    """Totals: of the compressed layers, and of the whole model."""
    coded = [row for row in report if row["kind"] != "plain"]
    weights = sum(row["weights"] for row in coded)
    return {
        "lossless_weights": sum(row["weights"] for row in coded if row["dtype"] in FLOATS),
        "entropy": round(sum(row["entropy"] * row["weights"] for row in coded) / weights, 4),
    } | size_totals(report)


def layer_table(report: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[list[Any]]]:
    """Columns and rows of the compressed layers."""
    columns = ("name", "shape", "entropy", "bits", "split", "units", "clipped")
    coded = [row for row in report if row["kind"] != "plain"]
    return columns, [[str(row[c]) if c == "shape" else row[c] for c in columns] for row in coded]


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB or 200MB.

    Raises:
        UserError: anything else.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = text[:-2], text[-2:].upper()
    try:
        size = int(float(number) * units[unit])
    except (KeyError, ValueError) as error:
        raise UserError(f"shard_size={text}: give it as 5GB or 200MB") from error
    if size <= 0:
        raise UserError(f"shard_size={text}: must be positive")
    return size


def print_report(output: Path, summary: dict[str, Any], report: list[dict[str, Any]]) -> None:
    """Show what was written."""
    columns, rows = layer_table(report)
    shown = rows if len(rows) <= 24 else [*rows[:12], *rows[-12:]]
    print_table(f"{len(rows)} compressed layers", columns, shown)
    print(
        f"{output}: {summary['bits']:.3f} bits a weight over an entropy of {summary['entropy']:.3f}, every tile "
        f"verified; {summary['model_bytes'] / 1e6:.1f} MB in all, {summary['ratio']:.2f}x smaller "
        f"than FP16, in {summary['seconds']:.1f} s"
    )
