"""Tables and figures of what an evaluation found, from the plain data of report.json: for console, W&B and the page."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = tuple[list[str], list[list[Any]]]
"""Columns and rows."""

TITLES = {"fake_quant": "fake-quant vs compressed", "base": "base vs compressed"}
"""Of the pairs of `eval.consistency`."""


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
