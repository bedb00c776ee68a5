"""The frontier of bits against quality, every method at the same stored bits, on the same text.

    python -m benchmarks.frontier --model M --calibration C --valid books=B wikitext=W --methods rtn gptq --bits 4 3 2
    python -m benchmarks.frontier --model M --train T1 T2 --valid books=B wikitext=W --methods rate ste --bits 3

A row for each method and target: bits of the real container with scales, tables and states counted, entropy of the
integers, perplexity by text and its ratio to the base's, and mean KL to the base in nats and the share of tokens with
the same top-1 token, both over the tokens of all texts. Writes benchmarks/results/frontier-<model>.json, in which rows
of other methods on the same setting stay, and draws all of them into docs/frontier.svg. Several calls may run at once.
"""

import argparse
import fcntl
import json
import math
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.trained import RECIPES, UNTARGETED, Training, train_variant
from qat.data import load_tokens, spread_windows, windows
from qat.divergence import kl_divergence, log_probabilities, negative_log_likelihood, same_top
from qat.errors import UserError
from qat.inference import pick_device
from qat.model import check_output_logits, hidden_states, load_model, load_tokenizer, output_logits
from qat.ptq import METHODS as AFTER_TRAINING
from qat.ptq import Trained
from qat.report import environment, print_table, write_json

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
COLOURS = ["#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#882255"]
MARKERS = "os^D"
SAME_BITS = 0.01
"""Bits a weight within which an exported folder takes what was reckoned."""


@dataclass(frozen=True)
class Candidate:
    """A model to judge, and what it takes.

    Attributes:
        model: computes with the weights as they are stored; read before the next candidate is asked for.
        bits: stored bits a weight of the compressed layers, everything counted.
        entropy: of their integers, bits a weight.
        knob: setting that met the target, or None.
        training: of a method that trains: tokens, steps, overrides, seconds by stage, tokens a second of training.
        consistency: of its export, `benchmarks.trained.Variant.consistency`.
    """

    model: PreTrainedModel
    bits: float
    entropy: float
    knob: float | None = None
    training: dict[str, Any] | None = None
    consistency: dict[str, Any] | None = None


@dataclass(frozen=True)
class Study:
    """What every method starts from.

    Attributes:
        model: Hugging Face folder of the base.
        calibration: token ids, int64 [B, T] each; empty without a text for it.
        device: where models run.
        training: what methods that train share; None without a text for it.
    """

    model: Path
    calibration: list[Tensor]
    device: torch.device
    training: Training | None = None

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


def by_training(name: str, study: Study, target: float | None) -> Candidate:
    """The base trained by a recipe of `benchmarks.trained`."""
    training = study.training
    if training is None:
        raise UserError(f"{name} trains: give it text with --train")
    made = train_variant(name, training, target)
    model: Any = made.model
    trained_on = training.steps * training.batch * training.seq_len
    notes = {
        "tokens": training.tokens,
        "steps": training.steps,
        "overrides": training.overrides,
        "seconds": made.seconds,
        "tokens_per_second": round(trained_on / max(made.seconds["training"], 0.1)),
    }
    return Candidate(model.to(study.device), made.cost.bits, made.cost.entropy, None, notes, made.consistency)


METHODS: dict[str, Method] = {
    name: Method(partial(after_training, name), method.knob is not None) for name, method in AFTER_TRAINING.items()
} | {name: Method(partial(by_training, name), name not in UNTARGETED) for name in RECIPES}
"""By name."""


class Judge:
    """Compares models with the base on some texts; of the base it keeps the last hidden states, not the logits."""

    @torch.inference_mode()
    def __init__(self, base: PreTrainedModel, texts: dict[str, list[Tensor]]):
        """Args: base: in eval mode. texts: windows by name, int64 [B, T + 1] each."""
        check_output_logits(base)
        self.base, self.texts = base, texts
        self.hidden = {
            name: [hidden_states(base, batch[:, :-1])[-1] for batch in batches] for name, batches in texts.items()
        }

    @torch.inference_mode()
    def figures(self, model: PreTrainedModel) -> dict[str, Any]:
        """Perplexity and ratio by text; KL, top-1 agreement and tokens over all of them."""
        ppl, ratio, total = {}, {}, np.zeros(5)
        for name, batches in self.texts.items():
            # one transfer a text: a host that waits for the GPU shares it badly with other processes
            sums = sum(self._sums(model, *pair) for pair in zip(batches, self.hidden[name], strict=True))
            p, q, *_, tokens = sums.tolist()  # type: ignore[union-attr]
            ppl[name], ratio[name] = round(math.exp(q / tokens), 4), round(math.exp((q - p) / tokens), 5)
            total += sums.cpu().numpy()  # type: ignore[union-attr]
        _, _, kl, same, tokens = total.tolist()
        return {
            "ppl": ppl,
            "ratio": ratio,
            "kl": round(kl / tokens, 6),
            "top1": round(same / tokens, 4),
            "tokens": int(tokens),
        }

    def _sums(self, model: PreTrainedModel, batch: Tensor, hidden: Tensor) -> Tensor:
        """Over tokens: both negative log-likelihoods, KL, same top-1 token, how many; float64 [5]."""
        p_logits = output_logits(self.base, hidden)
        q_logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        log_p, log_q, targets = log_probabilities(p_logits), log_probabilities(q_logits), batch[:, 1:]
        figures = [
            negative_log_likelihood(log_p, targets),
            negative_log_likelihood(log_q, targets),
            kl_divergence(log_p, log_q),
            same_top(p_logits, q_logits),
            torch.ones_like(targets),
        ]
        return torch.stack([values.sum(dtype=torch.float64) for values in figures])


def measure(study: Study, judge: Judge, name: str, target: float | None) -> dict[str, Any]:
    """The row of a method and a target; `seconds` is the time to make the model, its search included."""
    begin = time.perf_counter()
    made = METHODS[name].make(study, target)
    seconds = time.perf_counter() - begin
    figures = judge.figures(made.model)
    if made.training is not None:
        made.training["seconds"]["judging"] = round(time.perf_counter() - begin - seconds, 1)
    return {
        "method": name,
        "target_bits": target,
        "bits": round(made.bits, 4),
        "entropy": round(made.entropy, 4),
        **figures,
        "seconds": round(seconds, 1),
        "knob": None if made.knob is None else round(made.knob, 5),
        "training": made.training,
        "consistency": made.consistency,
    }


def broken_promises(row: dict[str, Any]) -> list[str]:
    """What is wrong with the export of a row: it generates other tokens, or takes other bits than were reckoned.

    On a CPU logits have to be equal as well; on a GPU the two models run different kernels.
    """
    found = row["consistency"]
    if found is None:
        return []
    who = f"{row['method']} at {row['target_bits']}"
    if "error" in found:
        return [f"{who}: not compared with its export: {found['error']}"]
    where, wrong = f"on {found['device']} in {found['dtype']}", []
    if found["divergent_tokens"]:
        wrong.append(f"{who}: {found['divergent_tokens']:,} divergent tokens of {found['tokens']:,} {where}")
    elif found["device"] == "cpu" and not found["logits_equal"]:
        wrong.append(f"{who}: logits of the exported model differ {where}")
    if abs(found["stored_bits"] - row["bits"]) > SAME_BITS:
        wrong.append(f"{who}: {row['bits']} bits were reckoned, the exported folder stores {found['stored_bits']}")
    return wrong


def clock(row: dict[str, Any]) -> str:
    """Where the time of a row that was trained went."""
    notes = row["training"]
    stages = ", ".join(f"{stage} {seconds} s" for stage, seconds in notes["seconds"].items())
    return f"{row['method']} at {row['target_bits']}: {stages}; trained on {notes['tokens_per_second']:,} tokens/s"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """No other process is in here for the same path."""
    with open(path.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def merge(path: Path, setting: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The new rows, and those of the file that were measured on the same setting and not again."""
    try:
        old = json.loads(path.read_text())
    except FileNotFoundError:
        return rows

    def asked(setting: dict[str, Any]) -> dict[str, Any]:
        # the base's perplexity is a result, and may differ in its last digit from device to device
        return {key: value for key, value in setting.items() if key != "base_ppl"}

    kept = old["rows"] if asked(old["setting"]) == asked(setting) else []
    again = {(row["method"], row["target_bits"]) for row in rows}
    return [row for row in kept if (row["method"], row["target_bits"]) not in again] + rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity over the base's and KL against stored bits; equal rows give equal files.

    Of methods with several targets, if there are any. The first text is drawn solid, the others broken.
    """
    methods = Counter(row["method"] for row in rows)
    names = [name for name, count in methods.items() if count > 1] or list(methods)
    matplotlib.rcParams["svg.hashsalt"] = "frontier"
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for index, name in enumerate(names):
        own = sorted((row for row in rows if row["method"] == name), key=lambda row: row["bits"])
        bits, colour = [row["bits"] for row in own], COLOURS[index % len(COLOURS)]
        marker = MARKERS[index // len(COLOURS) % len(MARKERS)]
        for text, style in zip(own[0]["ratio"], ["-", "--", ":", "-."], strict=False):
            losses = [100 * (row["ratio"][text] - 1) for row in own]
            left.plot(bits, losses, style, marker=marker, color=colour, label=f"{name}, {text}")
        right.plot(bits, [row["kl"] for row in own], marker=marker, color=colour, label=name)
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
    first = range(min(count, len(data)))
    chosen = spread_windows(data, count) if spread else torch.stack([data[index] for index in first])
    return list(chosen.to(device).split(8))


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
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(AFTER_TRAINING))
    parser.add_argument("--label", default="", help="added to the names of the methods, to keep rows apart")
    parser.add_argument("--bits", nargs="+", type=float, default=[4, 3, 2.5, 2], help="stored bits a weight")
    parser.add_argument("--windows", type=int, default=1026, help="of a text to judge on")
    parser.add_argument("--calibration-windows", type=int, default=32, help="from all over the calibration text")
    parser.add_argument("--train", nargs="+", help="texts for methods that train")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="that a method may train on")
    parser.add_argument("--batch", type=int, default=16, help="windows of an optimiser step")
    parser.add_argument("--micro-batch", type=int, default=64, help="windows at once, at most; a divisor of the batch")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of train.py, for all that train")
    parser.add_argument("--consistency", type=int, default=0, metavar="PROMPTS",
                        help="export what was trained, and compare the tokens that both models generate")  # fmt: skip
    parser.add_argument("--consistency-device", default="cpu", help="to compare on; on cpu not a bit may differ")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="for checkpoints and exports of what was trained")
    parser.add_argument("--seq-len", type=int, default=512, help="predicted tokens of a window")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--cache", type=Path, default="~/.cache/codecllm", help="tokenised text")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "frontier.svg")
    args = parser.parse_args(words)
    # hydra, which the methods that train are told it through, knows no ~
    args.cache = str(args.cache.expanduser())
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
    training = Training(
        args.model, args.train, args.valid[0][1], args.tokens, args.seq_len, args.batch,
        min(args.batch, args.micro_batch), args.cache, "gpu" if device.type == "cuda" else device.type, args.set,
        args.consistency, str(pick_device(args.consistency_device)), args.keep, args.label,
    ) if args.train else None  # fmt: skip
    study = Study(args.model, calibration, device, training)
    path = args.results / f"frontier-{args.model.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    failures: list[str] = []
    everything: list[dict[str, Any]] = []
    wanted = [(name, target) for name in args.methods for target in (args.bits if METHODS[name].targeted else [None])]
    for name, target in wanted:
        try:
            row = measure(study, judge, name, target)
        except Exception as error:
            # the rows to come are not its fault
            traceback.print_exc()
            failures.append(f"{name} at {target}: {error}")
            continue
        row["method"] += args.label
        print(json.dumps(row), flush=True)
        if row["training"]:
            print(clock(row), flush=True)
        failures += broken_promises(row)
        # after every row: a long run that is cut short leaves what it has
        with locked(path):
            everything = merge(path, setting, [row])
            write_json(path, {"environment": environment(), "setting": setting, "rows": everything})
    if everything:
        with locked(path):
            everything = merge(path, setting, [])
            draw(everything, args.figure)
        print_table(f"{args.model.name}, base perplexity {base['ppl']}", *table(everything))
        print(f"written to {path} and {args.figure}")
    if failures:
        raise UserError("; ".join(failures))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
