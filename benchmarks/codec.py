"""Gate, then time the codec on this CPU: `python -m benchmarks.codec`. Writes benchmarks/results/codec-cpu.json.

Layers: 4096 x 4096 Gaussian weights of 3, 4, 5 and 7 bits, in every profile and for each number of coded bits.
Baseline of the same run: zlib level 1 on the same bytes, on as many threads. Export: a Llama of TinyLlama's shape
with random weights, verification included, in a process of its own whose peak memory is measured. No figure is
written if a decoded weight differs.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rans_kernels.coder import decode_tiles, encode_tiles, entropy, weight_histogram
from rans_kernels.coder.plan import choose_layout, choose_probability_bits
from rans_kernels.format import SPLITS, TileLayout

from qat.report import environment, print_table, write_json

RESULTS = Path(__file__).parent / "results" / "codec-cpu.json"
SIZE = 4096
REPEATS = 5


def gaussian(bits: float) -> np.ndarray:
    """Gaussian integers of about so many bits of entropy, int8 [SIZE, SIZE]."""
    w = np.random.default_rng(0).normal(0, 2 ** (bits - 2.047), (SIZE, SIZE))
    return np.clip(np.rint(w), -127, 127).astype(np.int8)


def median_seconds(function: Callable[[], Any]) -> float:
    """Median wall time of REPEATS calls after one warm-up."""
    function()
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def bench_layout(w: np.ndarray, layout: TileLayout) -> dict[str, Any]:
    """Bits and rates of one layout; raises if a weight is not decoded as it was."""
    e = encode_tiles(w, layout)
    arrays = e.heads, e.words, e.offsets, e.freqs
    if not np.array_equal(decode_tiles(layout, *arrays), w):
        raise SystemExit(f"error: {layout} does not decode to what was encoded; no figures written")
    scales = 4 * w.shape[0]
    bits, h = 8 * (e.nbytes + scales) / w.size, entropy(weight_histogram(w))
    return {
        "split": str(layout.split),
        "units": layout.units,
        "entropy": round(h, 4),
        "bits": round(bits, 4),
        "over_entropy": round(bits - h, 4),
        "encode_Mw_s": round(w.size / median_seconds(lambda: encode_tiles(w, layout)) / 1e6, 1),
        "decode_Mw_s": round(w.size / median_seconds(lambda: decode_tiles(layout, *arrays)) / 1e6, 1),
    }


def bench_zlib(w: np.ndarray) -> dict[str, Any]:
    """The baseline: zlib level 1 on slices of rows, a thread each core."""
    slices = np.array_split(w, 64)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        packed = list(pool.map(lambda s: zlib.compress(s.tobytes(), 1), slices))
        encode = median_seconds(lambda: list(pool.map(lambda s: zlib.compress(s.tobytes(), 1), slices)))
        decode = median_seconds(lambda: list(pool.map(zlib.decompress, packed)))
    h = entropy(weight_histogram(w))
    bits = 8 * sum(map(len, packed)) / w.size
    return {
        "split": "zlib-1", "units": None,
        "entropy": round(h, 4), "bits": round(bits, 4), "over_entropy": round(bits - h, 4),
        "encode_Mw_s": round(w.size / encode / 1e6, 1), "decode_Mw_s": round(w.size / decode / 1e6, 1),
    }  # fmt: skip


def bench_layers() -> list[dict[str, Any]]:
    """Every profile and number of coded bits at 3, 4, 5 and 7 bits of entropy."""
    rows = []
    for bits in (3, 4, 5, 7):
        w = gaussian(bits)
        counts = weight_histogram(w)
        for profile in ("compact", "auto", "fast"):
            layout = choose_layout(counts, w.shape, profile)
            rows.append({"profile": profile, **bench_layout(w, layout)})
        low, high = int(w.min()), int(w.max())
        for coded in (8, 4, 2, 1):
            split = next(s for s in SPLITS if s.coded_bits == coded and s.holds(low, high))
            layout = TileLayout(w.shape, split, 16, choose_probability_bits(split, w.shape))
            rows.append({"profile": f"coded_bits {coded}", **bench_layout(w, layout)})
        rows.append({"profile": "baseline", **bench_zlib(w)})
    return rows


def make_tinyllama(folder: Path) -> None:
    """A Llama of TinyLlama-1.1B's shape with random bfloat16 weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
        vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)


def export_tinyllama(folder: Path) -> None:
    """Export it and print seconds and peak memory as JSON: the body of the measured process."""
    from qat.config import ExportConfig
    from qat.export import export

    begin = time.perf_counter()
    source, target = str(folder / "model"), str(folder / "compressed")
    output = export(ExportConfig(source=source, output=target, progress_bar=False))
    seconds = time.perf_counter() - begin
    summary = json.loads((output / "export_report.json").read_text())["summary"]
    # on Linux in KiB; pages of the memory-mapped source count too
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": round(seconds, 1), "peak_GiB": round(peak, 2), **summary}))


def bench_export() -> dict[str, Any]:
    """Seconds and peak memory of exporting a model of TinyLlama's shape."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = [sys.executable, "-m", "benchmarks.codec"]
        subprocess.run([*base, "--make", name], check=True, stdout=subprocess.DEVNULL)
        source = sum(f.stat().st_size for f in (folder / "model").iterdir())
        result = subprocess.run([*base, "--export", name], check=True, capture_output=True, text=True)
        data = json.loads(result.stdout.splitlines()[-1])
        del data["source"], data["base"], data["step"]
        return {"model": "TinyLlama-1.1B's shape, random weights", "source_GiB": round(source / 2**30, 2), **data}


def main() -> None:
    """Run everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--export", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        return make_tinyllama(args.make / "model")
    if args.export:
        return export_tinyllama(args.export)
    layers = bench_layers()
    columns = list(layers[0])
    print_table(f"{SIZE} x {SIZE} Gaussian weights", columns, [[row[c] for c in columns] for row in layers])
    model = bench_export()
    print_table("export", ("", "value"), list(model.items()))
    write_json(RESULTS, {"environment": environment(), "layers": layers, "export": model})
    print(f"written to {RESULTS.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
