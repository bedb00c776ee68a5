"""The frontier of bits against quality, every method at the same stored bits, on the same text.

    python -m benchmarks.frontier --model M --calibration C --valid books=B wikitext=W --methods rtn gptq --bits 4 3 2

A row for each method and target: bits of the real container with scales, tables and states counted, entropy of the
integers, perplexity by text and its ratio to the base's, and mean KL to the base in nats and the share of tokens with
the same top-1 token, both over the tokens of all texts. Writes benchmarks/results/frontier-<model>.json, in which rows
of other methods on the same setting stay, and draws all of them into docs/frontier.svg.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat.data import load_tokens, windows
from qat.divergence import LogitComparison
from qat.errors import UserError
from qat.inference import pick_device
from qat.model import check_output_logits, load_model, load_tokenizer, output_logits
from qat.ptq import METHODS as AFTER_TRAINING
from qat.ptq import Trained
from qat.report import environment, print_table, write_json

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#882255"]


@dataclass(frozen=True)
class Candidate:
    """A model to judge, and what it takes.

    Attributes:
        model: computes with the weights as they are stored; read before the next candidate is asked for.
        bits: stored bits a weight of the compressed layers, everything counted.
        entropy: of their integers, bits a weight.
        knob: setting that met the target, or None.
    """

    model: PreTrainedModel
    bits: float
    entropy: float
    knob: float | None = None


@dataclass(frozen=True)
class Study:
    """What every method starts from.

    Attributes:
        model: Hugging Face folder of the base.
        calibration: token ids, int64 [B, T] each; empty without a text for it.
        device: where models run.
    """

    model: Path
    calibration: list[Tensor]
    device: torch.device

    @cached_property
    def trained(self) -> Trained:
        """The base's weights, which methods after training round in place."""
        return Trained(load_model(self.model).to(self.device), self.calibration)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Method:
    """One entry of the table.

    Attributes:
        make: the candidate for a target in stored bits a weight, or for None if the method has no choice.
        targeted: whether it has one.
    """

    make: Callable[[Study, float | None], Candidate]
    targeted: bool


def after_training(name: str, study: Study, target: float | None) -> Candidate:
    """The base rounded by a method of `qat.ptq`."""
    trained, method = study.trained, AFTER_TRAINING[name]
    if target is None:
        cost = trained.cost(trained.round(method))
        return Candidate(trained.model, cost.bits, cost.entropy)
    knob, cost = trained.at_bits(method, target)
    return Candidate(trained.model, cost.bits, cost.entropy, knob)


METHODS: dict[str, Method] = {
    name: Method(partial(after_training, name), method.knob is not None) for name, method in AFTER_TRAINING.items()
}
"""By name; a method that trains adds an entry of its own."""


class Judge:
    """Compares models with the base on some texts; of the base it keeps the last hidden states, not the logits."""

    @torch.inference_mode()
    def __init__(self, base: PreTrainedModel, texts: dict[str, list[Tensor]]):
        """Args: base: in eval mode. texts: windows by name, int64 [B, T + 1] each."""
        check_output_logits(base)
        self.base, self.texts = base, texts
        self.hidden = {
            name: [base.base_model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state for batch in batches]
            for name, batches in texts.items()
        }

    @torch.inference_mode()
    def figures(self, model: PreTrainedModel) -> dict[str, Any]:
        """Perplexity and ratio by text; KL, top-1 agreement and tokens over all of them."""
        ppl, ratio, parts = {}, {}, []
        for name, batches in self.texts.items():
            comparison = LogitComparison()
            for batch, hidden in zip(batches, self.hidden[name], strict=True):
                p = output_logits(self.base, hidden)
                q = model(input_ids=batch[:, :-1], use_cache=False).logits
                for p_logits, q_logits, targets in zip(p, q, batch[:, 1:], strict=True):
                    comparison.update(p_logits, q_logits, targets)
            summary = comparison.summary()
            ppl[name] = round(summary["perplexity"]["other"], 4)
            ratio[name] = round(summary["perplexity"]["ratio"], 5)
            parts.append((summary["tokens"], summary["kl"]["mean"], summary["same_top"]))
        tokens, kl, same = np.array(parts).T
        return {
            "ppl": ppl,
            "ratio": ratio,
            "kl": round(float(np.average(kl, weights=tokens)), 6),
            "top1": round(float(np.average(same, weights=tokens)), 4),
            "tokens": int(tokens.sum()),
        }


def measure(study: Study, judge: Judge, methods: Iterable[str], bits: Sequence[float]) -> Iterable[dict[str, Any]]:
    """A row for each method and target; `seconds` is the time to make the model, its search included."""
    for name in methods:
        method = METHODS[name]
        targets: Sequence[float | None] = bits if method.targeted else [None]
        for target in targets:
            begin = time.perf_counter()
            made = method.make(study, target)
            seconds = time.perf_counter() - begin
            yield {
                "method": name,
                "target_bits": target,
                "bits": round(made.bits, 4),
                "entropy": round(made.entropy, 4),
                **judge.figures(made.model),
                "seconds": round(seconds, 1),
                "knob": None if made.knob is None else round(made.knob, 5),
            }


def merge(path: Path, setting: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The new rows, and those of the file that were measured on the same setting and not again."""
    try:
        old = json.loads(path.read_text())
    except FileNotFoundError:
        return rows
    kept = old["rows"] if old["setting"] == setting else []
    again = {(row["method"], row["target_bits"]) for row in rows}
    return [row for row in kept if (row["method"], row["target_bits"]) not in again] + rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity over the base's and KL against stored bits; equal rows give equal files.

    The first text is drawn solid, the others broken.
    """
    matplotlib.rcParams["svg.hashsalt"] = "frontier"
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for index, name in enumerate(dict.fromkeys(row["method"] for row in rows)):
        own = sorted((row for row in rows if row["method"] == name), key=lambda row: row["bits"])
        bits, colour = [row["bits"] for row in own], COLOURS[index % len(COLOURS)]
        for text, style in zip(own[0]["ratio"], ["-", "--", ":", "-."], strict=False):
            losses = [100 * (row["ratio"][text] - 1) for row in own]
            left.plot(bits, losses, style, marker="o", color=colour, label=f"{name}, {text}")
        right.plot(bits, [row["kl"] for row in own], marker="o", color=colour, label=name)
    left.set(ylabel="perplexity over the base's, %")
    # by chance a fine grid may even gain a little
    left.set_yscale("symlog", linthresh=0.01)
    right.set(ylabel="mean KL to the base, nats", yscale="log")
    for axes in (left, right):
        axes.set(xlabel="bits stored a weight")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def read_windows(
    source: str, model: Path, cache: str, seq_len: int, count: int, device: torch.device, spread: bool = False
) -> list[Tensor]:
    """Batches of at most 8 windows [B, seq_len + 1] of a text: its first, or some from all over it."""
    data = windows(load_tokens(source, load_tokenizer(model), cache), seq_len)
    count = min(count, len(data))
    chosen = np.linspace(0, len(data) - 1, count).astype(int) if spread else range(count)
    return list(torch.stack([data[int(index)] for index in chosen]).to(device).split(8))


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and cells to print."""
    texts = list(rows[0]["ppl"])
    columns = ["method", "target", "bits", "entropy", *(f"{t} ppl" for t in texts), *(f"{t} %" for t in texts)]
    cells = [
        [row["method"], row["target_bits"], row["bits"], row["entropy"], *row["ppl"].values(),
         *(100 * (ratio - 1) for ratio in row["ratio"].values()), row["kl"], row["top1"], row["seconds"]]
        for row in rows
    ]  # fmt: skip
    return [*columns, "KL", "top-1", "seconds"], cells


def named(text: str) -> tuple[str, str]:
    """NAME=TEXT of the command line."""
    name, _, source = text.partition("=")
    if not (name and source):
        raise argparse.ArgumentTypeError(f"{text}: say NAME=TEXT")
    return name, source


def main(words: Sequence[str] | None = None) -> None:
    """Measure, merge, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=Path, help="Hugging Face folder of the base")
    parser.add_argument("--valid", required=True, nargs="+", type=named, metavar="NAME=TEXT", help="held-out texts")
    parser.add_argument("--calibration", help="text for methods that round by what enters a layer")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--bits", nargs="+", type=float, default=[4, 3, 2.5, 2], help="stored bits a weight")
    parser.add_argument("--windows", type=int, default=1026, help="of a text to judge on")
    parser.add_argument("--calibration-windows", type=int, default=32, help="from all over the calibration text")
    parser.add_argument("--seq-len", type=int, default=512, help="predicted tokens of a window")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cache", default="~/.cache/codecllm", help="tokenised text")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "frontier.svg")
    args = parser.parse_args(words)
    device = pick_device(args.device)
    read = partial(read_windows, model=args.model, cache=args.cache, seq_len=args.seq_len, device=device)
    texts = {name: read(source, count=args.windows) for name, source in args.valid}
    calibration = (
        [batch[:, :-1] for batch in read(args.calibration, count=args.calibration_windows, spread=True)]
        if args.calibration
        else []
    )
    judge = Judge(load_model(args.model).to(device), texts)  # type: ignore[arg-type]
    base = judge.figures(judge.base)
    setting = {
        "model": args.model.name,
        "seq_len": args.seq_len,
        "texts": {name: Path(source).name for name, source in args.valid},
        "windows": {name: sum(map(len, batches)) for name, batches in texts.items()},
        "calibration": Path(args.calibration).name if args.calibration else None,
        "calibration_windows": sum(map(len, calibration)),
        "base_ppl": base["ppl"],
    }
    path = args.results / f"frontier-{args.model.name}.json"
    rows: list[dict[str, Any]] = []
    for row in measure(Study(args.model, calibration, device), judge, args.methods, args.bits):
        rows.append(row)
        # after every row: a long run that is cut short leaves what it has
        everything = merge(path, setting, rows)
        write_json(path, {"environment": environment(), "setting": setting, "rows": everything})
    draw(everything, args.figure)
    print_table(f"{args.model.name}, base perplexity {base['ppl']}", *table(everything))
    print(f"written to {path} and {args.figure}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
