"""Show what a compressed folder holds.

A table of the compressed modules and totals, from config.json and the heads of the shards: no weight is read.

  codecllm inspect compressed/model
  codecllm inspect compressed/model --json | jq .summary.bits
"""

import argparse
import json
from math import prod
from pathlib import Path
from typing import Any

from qat.report import print_table, size_totals

COLUMNS = ("name", "kind", "shape", "split", "units", "fold", "dtype", "entropy", "bits", "bytes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder, and how it is shown."""
    parser.add_argument("folder", metavar="FOLDER", help="a compressed folder")
    parser.add_argument("--json", action="store_true", help="print JSON, all tensors by name")


def run(arguments: argparse.Namespace) -> None:
    """Print what `describe` finds."""
    found = describe(arguments.folder)
    if arguments.json:
        print(json.dumps(found, indent=2))
        return
    modules, summary = found["modules"], found["summary"]
    print_table(
        f"{len(modules)} compressed modules", COLUMNS, [[_cell(row[key]) for key in COLUMNS] for row in modules]
    )
    print(
        f"{arguments.folder}: {summary['bits']:.3f} bits a compressed weight, everything stored\n"
        f"compressed tensors {_megabytes(summary['compressed_bytes'])}, others {_megabytes(summary['other_bytes'])}, "
        f"in FP16 {_megabytes(summary['fp16_bytes'])}: {summary['ratio']:.2f}x smaller\n"
        f"format {summary['format_version']}, profile {summary['profile']}, written by {summary['producer']}"
    )


def describe(path: str) -> dict[str, Any]:
    """`modules` and `plain`, a row for each compressed module and other tensor, and `summary`, as plain data.

    Entropies are those that export measured; None where export_report.json does not have them.

    Raises:
        UserError: no such folder.
        rans_kernels.format.FormatError: as `qat.commands.folder.open_folder`.
    """
    from rans_kernels.checkpoint import BUFFERS

    from qat.commands.folder import open_folder

    folder = open_folder(path)
    entropies = _entropies(folder.path)
    modules = []
    for name, entry in folder.layers.items():
        layout, weights = entry.layout, prod(entry.layout.shape)
        nbytes = sum(folder.tensors[f"{name}.{buffer}"].nbytes for buffer in BUFFERS)
        modules.append({
            "name": name, "kind": entry.kind, "shape": list(layout.shape), "weights": weights,
            "split": str(layout.split), "units": layout.units, "fold": layout.fold, "dtype": layout.dtype,
            "entropy": entropies.get(name), "bits": round(8 * nbytes / max(1, weights), 4), "bytes": nbytes,
        })  # fmt: skip
    plain = [
        {
            "name": name, "kind": "plain", "shape": list(tensor.shape), "weights": prod(tensor.shape),
            "dtype": tensor.dtype, "bytes": tensor.nbytes,
        }
        for name, tensor in folder.plain.items()
    ]  # fmt: skip
    about = {key: folder.quantization.get(key) for key in ("format_version", "profile", "producer")}
    summary = size_totals([*modules, *plain]) | about | {"tied": folder.tied, "shards": folder.shards}
    return {"summary": summary, "modules": modules, "plain": plain}


def _entropies(folder: Path) -> dict[str, float]:
    """Of every compressed module, by export's report, which a folder need not have."""
    try:
        rows = json.loads((folder / "export_report.json").read_text(encoding="utf-8"))["layers"]
        return {row["name"]: row["entropy"] for row in rows if row["kind"] != "plain"}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _cell(value: Any) -> Any:
    return " x ".join(map(str, value)) if isinstance(value, list) else value


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"
