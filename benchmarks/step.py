"""Time an optimiser step of training: `python -m benchmarks.step`. Writes benchmarks/results/step-<gpu>.json.

A Llama of a named shape with random weights, float32 masters, bfloat16 by autocast, decoder layers and loss compiled,
chunked head, gradients clipped, fused AdamW; quantised as experiment=bookllama_rate says. All variants in one process,
one after the other, each with a model of its own, plain fine-tuning at both ends, so that a clock that drifts shows:

    finetune       cross-entropy of the plain model: what the others are compared with
    qat            fake quantisation
    qat-rate       the same and the price of bits; histograms and what follows from them are added as one in rate.every
    teacher        the same with the KL from a bfloat16 teacher in place of the cross-entropy
    torchao-int8   torchao's fake quantisation of weights, INT8 a row
    torchao-int4   the same, INT4 in groups of 128

Memory is the most that was allocated during timed steps.
"""

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import PreTrainedModel

from benchmarks.generate import SHAPES
from qat.cli import compose
from qat.config import Granularity, TrainConfig
from qat.distill import Losses, distillation_loss, token_losses
from qat.errors import UserError
from qat.inference import pick_device
from qat.lit.module import parameter_groups
from qat.model import compile_layers, hidden_states, output_logits
from qat.quant import prepare
from qat.quant.rate import RateTerm, pull_rate, rate_terms
from qat.report import device_slug, environment, print_table, write_json

RESULTS = Path(__file__).parent / "results"
VARIANTS = ("finetune", "qat", "qat-rate", "teacher", "torchao-int8", "torchao-int4")
BASELINE = "finetune"
WARMUP = 5
REFRESHES = 5
RATE_WEIGHT = 0.02
"""Nats a bit."""


class Step:
    """One variant's model, optimiser and loss; a call is an optimiser step."""

    def __init__(self, variant: str, values: dict[str, Any], config: TrainConfig, ids: Tensor):
        """Build it.

        Args:
            variant: of VARIANTS.
            values: LlamaConfig's.
            config: of the recipe.
            ids: int64 [B, T + 1] to train on.

        Raises:
            ImportError: the variant is torchao's, which is not there.
        """
        self.config, self.ids = config, ids
        self.model = build(values, ids.device, torch.float32).train()
        if variant.startswith("torchao"):
            prepare_torchao(self.model, variant)
        elif variant != BASELINE:
            prepare(self.model, config.quant)
        self.teacher: PreTrainedModel | None = None
        if variant == "teacher":
            self.teacher = build(values, ids.device, torch.bfloat16).requires_grad_(False)
        self.terms: dict[str, RateTerm] = {}
        if variant in ("qat-rate", "teacher"):
            self.terms = rate_terms(self.model, config.rate, config.model.compile)
            self.refresh()
        if config.model.compile:
            for model in (self.model, self.teacher):
                if model is not None:
                    compile_layers(model)
        self.losses: Losses = torch.compile(token_losses) if config.model.compile else token_losses
        optim = config.optim
        groups = parameter_groups(self.model, optim)
        self.optimizer = AdamW(groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True)

    def __call__(self) -> Tensor:
        """The loss."""
        ids, targets, loss = self.ids[:, :-1], self.ids[:, 1:], self.config.loss
        with torch.autocast(ids.device.type, torch.bfloat16):
            (hidden,), teacher_hidden = hidden_states(self.model, ids), None
            if self.teacher is not None:
                with torch.no_grad():
                    (teacher_hidden,) = hidden_states(self.teacher, ids)
            result = distillation_loss(
                hidden,
                teacher_hidden,
                partial(output_logits, self.model),
                None if self.teacher is None else partial(output_logits, self.teacher),
                targets,
                kl_weight=float(self.teacher is not None),
                ce_weight=float(self.teacher is None),
                chunk_tokens=loss.chunk_tokens,
                losses=self.losses,
            )
        result.loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.trainer.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return result.loss.detach()

    def refresh(self) -> None:
        """What a run does every rate.every steps: histograms, and the price that is paid from then on."""
        for term in self.terms.values():
            term.refresh()
        pull_rate(self.terms, dict.fromkeys(self.terms, RATE_WEIGHT))


def build(values: dict[str, Any], device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A Llama with random weights, the same at every call, in eval mode."""
    torch.manual_seed(0)
    with device:
        model: Any = LlamaForCausalLM(LlamaConfig(**values, tie_word_embeddings=False))
    return model.to(dtype).eval()


def prepare_torchao(model: PreTrainedModel, variant: str) -> None:
    """Have torchao fake-quantise what `prepare` would: every linear layer but the head."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    linears = [m for m in model.base_model.modules() if isinstance(m, nn.Linear)]
    if variant == "torchao-int8":
        weight = IntxFakeQuantizeConfig(torch.int8, "per_channel")
    else:
        # small shapes have no whole groups of 128
        group_size = math.gcd(128, *(m.in_features for m in linears))
        weight = IntxFakeQuantizeConfig(torch.int4, group_size=group_size)  # type: ignore[attr-defined]
    quantize_(model, QATConfig(weight_config=weight, step="prepare"), lambda module, name: module in linears)


def milliseconds(function: Callable[[], Any], calls: int, device: torch.device) -> list[float]:
    """Of every call, by events on a GPU, where the host may run ahead."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(calls):
            function()
            marks.append(time.perf_counter())
        return [1e3 * (end - begin) for begin, end in zip(marks, marks[1:], strict=False)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in zip(events, events[1:], strict=False)]


def measure(variant: str, values: dict[str, Any], config: TrainConfig, ids: Tensor, steps: int) -> dict[str, Any]:
    """A row of the results; one that says why if the variant cannot be had."""
    device, begin = ids.device, time.perf_counter()
    try:
        step = Step(variant, values, config, ids)
    except ImportError as error:
        return {"variant": variant, "missing": str(error)}
    loss = float(step())
    row: dict[str, Any] = {"variant": variant, "loss": loss, "start_s": round(time.perf_counter() - begin, 1)}
    milliseconds(step, WARMUP, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = milliseconds(step, steps, device)
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    row |= {"ms": statistics.median(times), "ms_p10": tenths[0], "ms_p90": tenths[-1]}
    row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None
    row["refresh_ms"] = statistics.median(milliseconds(step.refresh, REFRESHES, device)) if step.terms else 0.0
    row["ms_amortised"] = row["ms"] + row["refresh_ms"] / config.rate.every
    return row


def release(device: torch.device) -> None:
    """Give back what a variant held, compiled code included."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def compare(rows: list[dict[str, Any]]) -> None:
    """Add to the rows what they are over the baseline: time, the mean of its rows being 1, and gigabytes."""
    baseline = [row for row in rows if row["variant"] == BASELINE]
    ms = statistics.mean(row["ms"] for row in baseline)
    for row in rows:
        if "missing" not in row:
            row["over_finetune"] = row["ms_amortised"] / ms
            more = row["memory_gb"] is not None
            row["more_memory_gb"] = row["memory_gb"] - baseline[0]["memory_gb"] if more else None


def main(words: Sequence[str] | None = None) -> None:
    """Measure, write, print.

    Raises:
        UserError: no such device, or one on which the shape would take hours.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="tinyllama-1.1b", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, help="decoder layers, if not those of the shape")
    parser.add_argument("--batch", type=int, default=4, help="windows of a step")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--steps", type=int, default=20, help="that are timed")
    parser.add_argument("--granularity", default="per_tensor", choices=[g.value for g in Granularity])
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS, help="beside finetune")
    parser.add_argument("--compile", default="layers", choices=("none", "layers"))
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write to")
    args = parser.parse_args(words)
    if args.steps < 2:
        raise UserError(f"--steps {args.steps}: give at least 2")
    device = pick_device(args.device)
    if device.type != "cuda" and args.shape != "tiny":
        raise UserError(f"--shape {args.shape} needs a GPU; give --shape tiny to see whether all runs on a CPU")
    values = dict(SHAPES[args.shape])
    values["num_hidden_layers"] = args.layers or values["num_hidden_layers"]
    values["max_position_embeddings"] = args.seq_len
    config: TrainConfig = compose(
        "train",
        "experiment=bookllama_rate",
        *("model.path=random", "data.train=none", "data.valid=none"),
        f"model.compile={args.compile == 'layers'}",
        f"quant.granularity={args.granularity}",
    )
    ids = torch.randint(values["vocab_size"], (args.batch, args.seq_len + 1), device=device)
    chosen = [variant for variant in VARIANTS if variant in args.variants and variant != BASELINE]
    rows = []
    for variant in (BASELINE, *chosen, BASELINE):
        rows.append(measure(variant, values, config, ids, args.steps))
        release(device)
        print(", ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{v}" for k, v in rows[-1].items()), flush=True)
    compare(rows)
    with torch.device("meta"):
        weights = LlamaForCausalLM(LlamaConfig(**values, tie_word_embeddings=False)).num_parameters()
    found = {row["variant"]: row for row in rows}
    teacher = found["teacher"]["ms"] - found["qat-rate"]["ms"] if {"teacher", "qat-rate"} <= found.keys() else None
    path = args.results / f"step-{device_slug() if device.type == 'cuda' else 'cpu'}.json"
    setting = {key: getattr(args, key) for key in ("shape", "batch", "seq_len", "steps", "granularity", "compile")}
    setting |= {"layers": values["num_hidden_layers"], "weights": weights, "bf16_copy_gb": 2 * weights / 1e9}
    data = {"environment": environment(), "setting": setting, "rows": rows, "teacher_ms": teacher}
    write_json(path, data)
    columns = ("ms", "ms_p10", "ms_p90", "refresh_ms", "ms_amortised", "over_finetune", "memory_gb", "more_memory_gb")
    print_table(
        f"a step of {args.batch * args.seq_len:,} tokens; a bfloat16 copy of the weights is {2 * weights / 1e9:.2f} GB",
        ["variant", *(column.replace("_", " ") for column in columns)],
        [[row["variant"], *(row.get(column) for column in columns)] for row in rows],
    )
    for row in rows:
        if "missing" in row:
            print(f"{row['variant']}: {row['missing']}")
    print(f"teacher: {teacher and round(teacher, 2)} ms more; written to {path}")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
