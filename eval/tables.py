"""Tables and figures of what an evaluation found, from the plain data of report.json: for console, W&B and the page."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Table = tuple[list[str], list[list[Any]]]
"""Columns and rows."""

TITLES = {
    "fake_quant": "fake-quant vs compressed",
    "own": "dense INT8 vs compressed",
    "library": "fake-quant by the library vs compressed",
    "base": "base vs compressed",
    "floor": "base vs itself, other batches",
}
"""Of the pairs of `eval.consistency`."""

PROMISED = {"fake_quant", "own"}
"""Those in which nothing may differ."""

MODELS = {"compressed": "compressed"} | {name: title.split(" vs ")[0] for name, title in TITLES.items()}
"""Of its models."""


def percentile_table(pairs: dict[str, Any]) -> Table:
    """KL and delta p over tokens, llama.cpp's percentiles; pairs: by their names in report.json."""
    columns = ["percentile", *(f"{what}, {TITLES[name]}" for name in pairs for what in ("KL", "delta p"))]
    spreads = [pair["logits"][key] for pair in pairs.values() for key in ("kl", "delta_p")]
    return columns, [[row, *(values[row] for values in spreads)] for row in spreads[0]]


def mode_table(modes: dict[str, Any]) -> Table:
    """What every mode gave; modes: by their names in report.json.

    Of the run beside the reference's: tokens compared, how many differ, the first (prompt and position) and the top-1
    margin there, steps whose logits differ, and the largest difference; of that beside the eager run of the same model:
    tokens that differ, and steps whose logits do. Checks of layers have weights and rows in the place of tokens.
    """
    columns = ["mode", "", "tokens", "differ", "first", "margin", "logits differ", "by at most"]
    return [*columns, "from eager", "its logits", "seconds"], [_mode(*item) for item in modes.items()]


def _mode(name: str, entry: dict[str, Any]) -> list[Any]:
    row: list[Any] = [name, entry["status"], *[None] * 8, entry.get("seconds")]
    if "weights" in entry:
        row[2:4] = entry["weights"]["weights"], len(entry["weights"]["unequal"])
    elif "layers" in entry:
        splits = entry["layers"]["splits"]
        row[2], row[6], row[7] = (splits["dense"][key] for key in ("rows", "unequal_rows", "max_difference"))
        row[9] = max(split["unequal_rows"] for split in splits.values())
    elif "reference" in entry:
        pair, eager = entry["reference"], entry.get("eager", {})
        row[2:4] = pair["tokens"], pair["divergent_tokens"]
        if pair["divergences"]:
            first = min(pair["divergences"], key=lambda found: found["position"])
            row[4:6] = f"{first['prompt']}:{first['position']}", first["margin"]
        row[6:8] = pair["unequal_logits"], pair["max_logit_difference"]
        row[8:10] = eager.get("divergent_tokens"), eager.get("unequal_logits")
    return row


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


def likelihood_table(report: dict[str, Any]) -> Table:
    """Items of every task that the fake-quant model answers alike to the bit; report: as `score_table`."""
    kinds = ["items", "equal", "max_difference"]
    rows = [[task, *(found[kind] for kind in kinds)] for task, found in report["likelihoods"].items()]
    return ["task", "items", "equal to the bit", "largest difference"], rows


def flip_table(report: dict[str, Any]) -> Table:
    """Items of every task whose answer changed; report: as `score_table`."""
    kinds = ["items", "lost", "gained", "wrong_to_wrong", "changed", "difference"]
    columns = ["items", "lost", "gained", "wrong to wrong", "changed", "accuracy", "95 % interval", "p"]
    rows = []
    for task, found in report["flips"].items():
        interval = " to ".join(f"{end:+.4f}" for end in found.get("difference_interval", []))
        rows.append([task, *(found.get(kind) for kind in kinds), interval or None, found.get("p")])
    return ["task", *columns], rows


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
        for example in pair["generation"].get("examples", []):
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
