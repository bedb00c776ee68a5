"""Tables and figures of what an evaluation found, from the plain data of report.json: for console, W&B and the page."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = tuple[list[str], list[list[Any]]]
"""Columns and rows."""

TITLES = {"fake_quant": "fake-quant vs compressed", "base": "base vs compressed"}
"""Of the pairs of `eval.consistency`."""

MODELS = {"compressed": "compressed", "fake_quant": "fake-quant", "base": "base"}
"""Of its models."""


def percentile_table(pairs: dict[str, Any]) -> Table:
    """KL and delta p over tokens, llama.cpp's percentiles; pairs: by their names in report.json."""
    columns = ["percentile", *(f"{what}, {TITLES[name]}" for name in pairs for what in ("KL", "delta p"))]
    spreads = [pair["logits"][key] for pair in pairs.values() for key in ("kl", "delta_p")]
    return columns, [[row, *(values[row] for values in spreads)] for row in spreads[0]]


def survival_figure(pairs: dict[str, Any]) -> "Figure":
    """S(n) of every pair; pairs: as `percentile_table`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, pair in pairs.items():
        survival = pair["generation"]["survival"]
        axes.step(range(1, len(survival) + 1), survival, label=TITLES[name])
    axes.set(xlabel="generated tokens", ylabel="share of prompts without a divergence", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def score_table(report: dict[str, Any]) -> Table:
    """Metrics of every task and model with their standard errors; report: the section of `eval.harness`."""
    models, rows = list(report["results"]), []
    for task, metrics in report["results"]["compressed"].items():
        for metric in metrics:
            row = [task, metric, report["samples"].get(task)]
            for name in models:
                score = report["results"][name][task][metric]
                row += [score["value"], score["error"]]
            rows.append(row)
    return ["task", "metric", "items", *(column for name in models for column in (name, f"± {name}"))], rows


def flip_table(report: dict[str, Any]) -> Table:
    """Items of every task whose answer changed; report: as `score_table`."""
    kinds = ["items", "lost", "gained", "changed"]
    return ["task", *kinds], [[task, *(counts[kind] for kind in kinds)] for task, counts in report["flips"].items()]


def cost_table(report: dict[str, Any]) -> Table:
    """Speed and memory of every model that generated; report: the section of `eval.consistency`."""
    columns = ["model", "tokens/s", "weights in memory, MB", "peak on the GPU, MB"]
    rows = []
    for name, cost in report["costs"].items():
        sizes = (cost["weight_bytes"], cost["peak_bytes"])
        megabytes = [None if size is None else f"{size / 1e6:,.1f}" for size in sizes]
        rows.append([MODELS[name], f"{cost['tokens_per_second']:,.0f}", *megabytes])
    return columns, rows


def example_table(pairs: dict[str, Any]) -> Table:
    """What both models of every pair wrote, and the first token that differs; pairs: as `percentile_table`."""
    columns = [
        "pair",
        "prompt",
        "reference",
        "compressed",
        "first divergence",
        "reference's token",
        "compressed's token",
    ]
    rows = []
    for name, pair in pairs.items():
        for example in pair["generation"]["examples"]:
            at, sides = example["position"], (example["reference"], example["other"])
            tokens = [None, None] if at is None else [side[at] for side in sides]
            rows.append([TITLES[name], example["prompt"], *map("".join, sides), at, *tokens])
    return columns, rows


def layer_table(weights: dict[str, Any]) -> Table:
    """Every compressed module; weights: the section of `eval.weights`."""
    columns = ["layer", "rows", "columns", "split", "entropy", "coded bits", "stored bits"]
    keys = ("split", "entropy", "coded_bits", "bits")
    return columns, [[row["name"], *row["shape"], *(row[key] for key in keys)] for row in natural(weights["modules"])]


def weight_tables(weights: dict[str, Any]) -> dict[str, Table]:
    """Layers, and how often every weight occurs and is expected, by role; weights: as `layer_table`."""
    rows = [
        [found["role"], found["dtype"], found["first"] + index, count, coded]
        for found in weights["histograms"]
        for index, (count, coded) in enumerate(zip(found["counts"], found["coded"], strict=True))
    ]
    columns = ["role", "dtype", "integer, or high byte of a float", "count", "expected"]
    return {"layers": layer_table(weights), "weights against the coded model": (columns, rows)}


def histograms(weights: dict[str, Any]) -> dict[str, tuple[list[int], list[float]]]:
    """Counts and the edges of their bins, by role; weights: as `layer_table`."""
    return {
        f"weights/{found['role']}, {found['dtype']}": (
            found["counts"],
            [found["first"] - 0.5 + index for index in range(len(found["counts"]) + 1)],
        )
        for found in weights["histograms"]
    }


def natural(modules: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Modules in the order of their blocks, 10 behind 9."""

    def key(module: dict[str, Any]) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in module["name"].split(".")]

    return sorted(modules, key=key)
