"""Gate, then time generation with streamed weights: `python -m benchmarks.stream`. Writes results/stream-<gpu>.json.

A Llama of a named shape with random weights (benchmarks/generate.py), head and embedding in half precision, within a
memory budget for weights: compressed at about 3 and 4 bits, and in float16, streamed by the same `Streamer`; and, for
comparison, resident. Greedy, one prompt; eagerly with a dynamic cache, and with a static cache and every step the same
CUDA graph, copies and all. Gate: every streamed run gives the tokens of its resident one. Beside it: the bandwidth of
copies from pinned memory, which bounds all of it.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rans_kernels.placement import GB, BudgetError, place
from rans_kernels.streaming import Streamer, host_memory
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from benchmarks.generate import PROMPT_TOKENS, SHAPES, build, fill, synchronize
from benchmarks.linear import WEIGHTS
from eval.graph import StepGraph
from qat.errors import UserError
from qat.inference import pick_device
from qat.report import device_slug, environment, print_table, write_json

RESULTS = Path(__file__).parent / "results"
CODINGS = ("3 bits", "4 bits", "compact")
SPEEDS = ("eager", "graph")
COLUMNS = (
    "weights", "budget_gb", "offload", "slots", "stays", "eager_tokens_s", "graph_tokens_s", "eager_over_float16",
    "graph_over_float16", "streamed_gb_s",
)  # fmt: skip
Row = dict[str, Any]


@torch.inference_mode()
def generate(model: LlamaForCausalLM, prompt: Tensor, tokens: int) -> tuple[Tensor, float]:
    """Greedy tokens [1, tokens], and tokens a second of all but the first two."""
    cache, ids = DynamicCache(config=model.config), prompt

    def step() -> Tensor:
        nonlocal ids
        ids = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        return ids

    return timed([step] * tokens, model.device)


@torch.inference_mode()
def generate_recorded(model: LlamaForCausalLM, prompt: Tensor, tokens: int) -> tuple[Tensor, float]:
    """The same by one CUDA graph."""
    graph = StepGraph(model, 1, prompt.shape[1] + tokens + 2)

    def start() -> Tensor:
        graph.start(prompt)
        return graph.ids.clone()

    def step() -> Tensor:
        graph.step()
        return graph.ids.clone()

    return timed([start, *[step] * (tokens - 1)], model.device)


def timed(steps: list[Callable[[], Tensor]], device: torch.device) -> tuple[Tensor, float]:
    """What the steps give, joined, and how many a second there were behind the second."""
    found, begin = [], 0.0
    for i, step in enumerate(steps):
        found.append(step())
        if i == 1:
            synchronize(device)
            begin = time.perf_counter()
    synchronize(device)
    return torch.cat(found, dim=1), (len(steps) - 2) / (time.perf_counter() - begin)


def measure(model: LlamaForCausalLM, prompt: Tensor, tokens: int, graph: bool) -> tuple[dict[str, Tensor], Row]:
    """Tokens and speed, eager and recorded; of the latter none unless `graph`.

    A first run learns the order of the layers, and torch prepares attention over every length of the cache.
    """
    found, speeds = {}, Row()
    generate(model, prompt, tokens)
    for name, run in zip(SPEEDS, (generate, generate_recorded), strict=True):
        if name == "eager" or graph:
            found[name], rate = run(model, prompt, tokens)
            speeds[f"{name}_tokens_s"] = round(rate, 2)
    return found, speeds


def bandwidth(device: torch.device) -> float | None:
    """GB/s of copies of 32 MB from pinned memory; None on a CPU."""
    if device.type != "cuda":
        return None
    size = 32 << 20
    source, target = host_memory(4 * size, True), torch.empty(size, dtype=torch.uint8, device=device)
    for repeats in (4, 64):
        synchronize(device)
        begin = time.perf_counter()
        for i in range(repeats):
            target.copy_(source[i % 4 * size : (i % 4 + 1) * size], non_blocking=True)
        synchronize(device)
    return round(repeats * size / (time.perf_counter() - begin) / GB, 2)


def least_and_all(model: LlamaForCausalLM, device: torch.device, slots: int) -> tuple[float, float]:
    """GB of the smallest budget that does, and of everything."""
    try:
        place(model, 1e-9, device, slots)
    except BudgetError as error:
        return error.least / GB, place(model, math.inf, device, slots).needed / GB
    raise AssertionError("a budget of one byte does")


def bench(weights: str, device: torch.device, args: argparse.Namespace) -> list[Row]:
    """Gate and measure one kind of weights, resident and with every budget."""
    begin = time.perf_counter()
    model, masters = build(args.shape, device, None if weights == "float16" else WEIGHTS[weights][:3])
    stored = fill(model, masters, "fp16" if weights == "float16" else "compressed")
    del masters
    prompt = torch.randint(
        SHAPES[args.shape]["vocab_size"], (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(3)
    ).to(device)
    expected, speeds = measure(model, prompt, args.tokens, True)
    about = {"shape": args.shape, "weights": weights, "weight_bytes": stored, "tokens": args.tokens}
    rows: list[Row] = [{**about, "budget_gb": None, **speeds}]
    spent = time.perf_counter() - begin
    print(f"{weights}, resident: {speeds}; {spent:.0f} s so far", flush=True)
    low, high = least_and_all(model, device, args.slots)
    runs = [(budget, "host", args.slots, True) for budget in args.budgets or [(low + high) / 2]]
    if weights == "4 bits":
        first, last = runs[0][0], runs[-1][0]
        # and what a reader's thread costs, fewer slots, and the first layers staying
        runs += [(first, "disk", args.slots, True), (last, "host", 2, True), (last, "host", args.slots, False)]
    for budget, offload, slots, spread in runs:
        streamer = Streamer(model, budget, device, offload, slots, spread).enable()
        # a reader's thread is not recorded
        found, speeds = measure(model, prompt, args.tokens, offload == "host")
        used = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
        streamer.disable()
        if not all(torch.equal(tokens, expected[name]) for name, tokens in found.items()):
            raise SystemExit(f"error: {weights} within {budget} GB gives other tokens; no figures written")
        plan, best = streamer.placement, max(speeds.values())
        rows.append(
            {
                **about, "budget_gb": budget, "offload": offload, "slots": plan.slots,
                "stays": "spread" if spread else "first", **speeds,
                "streamed_bytes": plan.streamed_bytes, "streamed_gb_s": round(plan.streamed_bytes * best / GB, 2),
                "needed_bytes": plan.needed, "device_bytes": used, "divergent_tokens": 0,
                "distinct_tokens": len(found["eager"].unique()),
            }
        )  # fmt: skip
        spent = time.perf_counter() - begin
        print(f"{weights}, {budget:.3g} GB, {offload}: {speeds}; {spent:.0f} s so far", flush=True)
    return rows


def main() -> None:
    """Build, gate, time, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3-8b", choices=list(SHAPES))
    parser.add_argument("--weights", nargs="+", default=["float16", *CODINGS], choices=["float16", *CODINGS])
    parser.add_argument("--budgets", nargs="+", type=float, help="GB; 3 and 4.5 for 8B, else between least and all")
    parser.add_argument("--slots", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=26)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    if args.tokens < 3:
        parser.error(f"--tokens {args.tokens}: the first two are not timed, give 3 or more")
    if args.budgets is None and args.shape == "llama-3-8b":
        args.budgets = [3.0, 4.5]
    try:
        device = pick_device(args.device)
    except UserError as error:
        parser.error(str(error))
    copies = bandwidth(device)
    rows = [row for weights in args.weights for row in bench(weights, device, args)]
    plain = {row["budget_gb"]: row for row in rows if row["weights"] == "float16" and row.get("offload") == "host"}
    for row in rows:
        if row["budget_gb"] in plain and row["offload"] == "host":
            for name in SPEEDS:
                rate, slow = (each[f"{name}_tokens_s"] for each in (row, plain[row["budget_gb"]]))
                row[f"{name}_over_float16"] = round(rate / slow, 2)
    if device.type == "cuda":
        data = {"environment": environment(), "pinned_gb_s": copies, "rows": rows}
        write_json(RESULTS / f"stream-{device_slug()}.json", data)
    print(f"copies from pinned memory: {copies} GB/s")
    lines = [
        [
            *(row.get(column) for column in COLUMNS),
            *(row.get(key, 0) / GB for key in ("streamed_bytes", "needed_bytes")),
        ]
        for row in rows
    ]
    print_table("tokens a second within a budget", [*COLUMNS, "streamed GB", "needed GB"], lines)


if __name__ == "__main__":
    main()
