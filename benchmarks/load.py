"""Time and peak memory of loading: `python -m benchmarks.load`. Writes benchmarks/results/load-<device>.json.

A compressed folder of a named shape is made (random weights of about 4 bits, as in benchmarks/generate.py, and head and
embedding in bfloat16) and loaded from the page cache, every time in a process of its own that has loaded a tiny one, so
that libraries and a GPU's kernels are there: all of it, and within a budget. Peak memory is what loading added: of a
process, file pages that are mapped in included, and of a GPU. To reach: 3 s for 1.1 B parameters, and no more than what
is stored and one layer.
"""

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rans_kernels.checkpoint import FolderWriter, LayerEntry, quantization_config, read_config
from rans_kernels.coder import EncodedTensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.generate import SHAPES, SIGMA, encode_layer
from qat.errors import UserError
from qat.inference import pick_device, pick_dtype
from qat.report import device_slug, environment, print_table, write_json

RESULTS = Path(__file__).parent / "results"
GB = 1e9
COLUMNS = ("budget_gb", "offload", "seconds", "host_over_mb", "device_over_mb")


def make_folder(shape: str, output: Path) -> Path:
    """A compressed folder; every decoder layer has the same integers and scales of its own."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], architectures=["LlamaForCausalLM"], dtype="bfloat16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    masters = encode_layer(model.model.layers[0], torch.device("cpu"))
    entries: dict[str, LayerEntry] = {}
    with FolderWriter(output, 5_000_000_000) as writer:
        for i in range(len(model.model.layers)):
            for child, master in masters.items():
                name, (n, k) = f"model.layers.{i}.{child}", master.layout.shape
                arrays = (master.coded[f"weight{part}"].numpy() for part in ("", "_words", "_offsets", "_freqs"))
                scale = (torch.rand(n, 1) * 0.2 + 0.9) * (k**-0.5 / SIGMA)
                encoded = EncodedTensor(master.layout, *arrays)
                entries[name], buffers = LayerEntry.describe("linear", encoded, scale, None, False)
                # safetensors refuses tensors that share memory
                writer.add({f"{name}.{buffer}": tensor.clone() for buffer, tensor in buffers.items()})
        for name, parameter in model.named_parameters():
            if name.removesuffix(".weight") not in entries:
                plain = torch.ones(parameter.shape, dtype=torch.bfloat16)
                writer.add({name: plain if "norm" in name else plain.normal_(0, 0.02)})
        coded = quantization_config(entries, {}, {}, None, "fast", "benchmarks.load", {})
        writer.finish({**config.to_dict(), "quantization_config": coded})
    return output


def resident_bytes(peak: bool = False) -> int | None:
    """Memory of this process, or the most it had; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    key = "VmHWM:" if peak else "VmRSS:"
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure(folder: Path, tiny: Path, device: str, budget: float | None, offload: str) -> dict[str, Any]:
    """Load once: seconds, and what the peak of memory was over that before. To be called in a fresh process."""
    import rans_kernels
    from transformers import AutoModelForCausalLM  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401
    from transformers.utils import logging

    logging.disable_progress_bar()
    target = pick_device(device)
    gpu, dtype = target.type == "cuda", pick_dtype("bfloat16", target)
    rans_kernels.load(tiny, target, dtype)(torch.ones(1, 1, dtype=torch.int64, device=target))
    with suppress(OSError):
        # forget the peak so far
        Path("/proc/self/clear_refs").write_text("5")
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    before, on_device = resident_bytes(), torch.cuda.memory_allocated() if gpu else 0
    begin = time.perf_counter()
    model = rans_kernels.load(folder, target, dtype, budget, offload)
    if gpu:
        torch.cuda.synchronize()
    seconds, after = time.perf_counter() - begin, resident_bytes(peak=True)
    assert not any(parameter.is_meta for parameter in model.parameters())
    return {
        "seconds": round(seconds, 3),
        "host_bytes": None if before is None or after is None else after - before,
        "device_bytes": torch.cuda.max_memory_allocated() - on_device if gpu else None,
    }


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function gives in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def bench(folder: Path, tiny: Path, device: str, repeats: int) -> list[dict[str, Any]]:
    """Rows of a folder: seconds are the best of several loads, bytes the most."""
    stored = sum(shard.stat().st_size for shard in folder.glob("*.safetensors"))
    coded = read_config(folder)["quantization_config"]["layers"]
    # heads and words, which are all but a few KB of it
    sizes = {
        name: entry["word_rows"] * 16 + LayerEntry.from_json(entry).layout.head_rows * 128
        for name, entry in coded.items()
    }
    about = {
        "stored_bytes": stored,
        "layer_bytes": sum(size for name, size in sizes.items() if name.startswith("model.layers.0.")),
        "matrix_bytes": max(sizes.values()),
    }
    rows = []
    for share, offload in ((None, "host"), (0.6, "host"), (0.6, "disk")):
        budget = None if share is None else share * stored / GB
        runs = [apart(measure, folder, tiny, device, budget, offload) for _ in range(repeats)]
        row: dict[str, Any] = {"budget_gb": budget, "offload": offload if budget else None}
        row["seconds"] = min(run["seconds"] for run in runs)
        for key in ("host_bytes", "device_bytes"):
            row[key] = None if runs[0][key] is None else max(run[key] for run in runs)
            row[key.replace("bytes", "over_mb")] = None if row[key] is None else round((row[key] - stored) / 1e6, 1)
        rows.append({**row, **about})
    return rows


def main() -> None:
    """Make, load, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="tinyllama-1.1b", choices=list(SHAPES)[1:])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    try:
        device = str(pick_device(args.device))
    except UserError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as scratch:
        folder, tiny = (make_folder(shape, Path(scratch) / shape) for shape in (args.shape, "tiny"))
        rows = bench(folder, tiny, device, args.repeats)
    slug = device_slug() if device != "cpu" else "cpu"
    write_json(RESULTS / f"load-{slug}.json", {"environment": environment(), "shape": args.shape, "rows": rows})
    lines = [list(map(row.get, COLUMNS)) for row in rows]
    stored, layer, matrix = (rows[0][f"{name}_bytes"] / 1e6 for name in ("stored", "layer", "matrix"))
    print_table(
        f"loading {stored:.0f} MB; a decoder layer has {layer:.1f}, the largest matrix {matrix:.1f}",
        ["budget GB", "offload", "s", "host over it, MB", "device over it, MB"], lines,
    )  # fmt: skip


if __name__ == "__main__":
    main()
