"""Methods of the frontier that train: variants of a recipe, each an entry of `RECIPES` in words of train.py's command.

A variant is trained to the target through the path of train.py, and its last checkpoint weighed as export stores it.
It can be exported, too, and the compressed model held against the one that was trained.
"""

import gc
import io
import json
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from eval.consistency import consistency
from qat.checkpoint import load_fake_quant
from qat.cli import compose
from qat.errors import UserError
from qat.export import export
from qat.lit.build import train
from qat.model import load_config
from qat.ptq import Cost, Rounded, stored_cost
from qat.quant import distinct_weights, exact_modules, freeze, grid, quantize_weight, quantized_modules, set_fake_quant

FULL = ["experiment=bookllama_rate"]
WHOLE = [*FULL, "quant.embeddings=true", "quant.lm_head=true"]
# the rates of the full recipe; steps keep their proportions, and their common factor holds the target
PLAIN = ["quant=learned", "quant.k=0.5", "rate.hold=steps", "rate.lead=0", "optim.lr=2e-4",
         "optim.scale_lr=0"]  # fmt: skip

RECIPES: dict[str, list[str]] = {
    "rate": FULL,
    "rate-prior": [*FULL, "rate.price=prior"],
    "rate-noprice": [*FULL, "rate.price=none"],
    "rate-dual": [*FULL, "rate.hold=weight"],
    "rate-nocolumns": [*FULL, "quant.columns=0"],
    "rate-gptq": [*FULL, "quant.rounding=gptq"],
    "rate-noramp": [*FULL, "rate.lead=0"],
    "rate-nofreeze": [*FULL, "rate.freeze=0"],
    "rate-nohidden": [*FULL, "loss.hidden=0"],
    "rate-cold": [*FULL, "loss.temperature=1"],
    "rate-nonoise": [*FULL, "data.noise=0"],
    "rate-noanchor": [*FULL, "optim.anchor=0"],
    "rate-row": [*FULL, "quant.granularity=per_channel"],
    "rate-whole": WHOLE,
    "rate-together": WHOLE,
    "rate-fast": [*FULL, "rate.profile=fast", "rate.fit=true"],
    "ste": PLAIN,
    "ste-layer": [*PLAIN, "quant.granularity=per_tensor"],
    "ste-decay": [*PLAIN, "optim.weight_decay=0.3"],
    "finetune": ["quant=none", "optim.lr=2e-4"],
}
"""`rate` is the full recipe, the next ones lack a part or have another. `rate-whole` codes embedding and head too, at
a target of their own, `rate-together` with one target for everything, `rate-fast` is for the export of that profile.
`ste` is fake quantisation alone, one step a row, `ste-decay` with weight decay; `finetune` is not quantised and has no
target."""
UNTARGETED = {"finetune"}
OWN_TARGET = {"rate-whole"}
ABOVE = 0.5
"""Bits that embedding and head are held above the other layers: best for rounding bookllama-16m (docs/frontier.md)."""

NEW_TOKENS = 256
"""Generated for a prompt to compare models by."""


@dataclass(frozen=True)
class Training:
    """What all variants share.

    Attributes:
        model: Hugging Face folder of the base.
        texts: to train on.
        valid: held-out text; nothing is chosen by it.
        tokens: budget.
        seq_len: predicted tokens of a window.
        batch: windows of an optimiser step.
        micro_batch: windows at once.
        cache: folder of tokenised text.
        accelerator: gpu or cpu.
        overrides: words of train.py's command, after all others.
        prompts: of the held-out text, by which a model is compared with its export; 0 for no comparison.
        device: where they are compared.
        keep: folder for runs and exports; None keeps none.
        label: added to names in that folder.
    """

    model: Path
    texts: list[str]
    valid: str
    tokens: int
    seq_len: int
    batch: int
    micro_batch: int
    cache: str
    accelerator: str
    overrides: list[str] = field(default_factory=list)
    prompts: int = 0
    device: str = "auto"
    keep: Path | None = None
    label: str = ""

    @property
    def steps(self) -> int:
        """Optimiser steps that the budget allows."""
        return self.tokens // (self.batch * self.seq_len)

    def words(self, name: str, target: float | None, output: Path) -> list[str]:
        """Of train.py's command for a variant."""
        bits = [f"name={name}"] if target is None else [f"name={name}-{target:g}", *self._target_words(name, target)]
        # seldom: nothing is chosen by validation, but what the container adds is measured then
        every = max(1, self.steps // 4)
        return [
            *RECIPES[name], *bits, f"model.path={self.model}", f"data.train=[{','.join(self.texts)}]",
            f"data.valid={self.valid}", f"data.seq_len={self.seq_len}", f"data.batch_size={self.batch}",
            f"data.micro_batch_size={self.micro_batch}", "data.valid_windows=64", "data.valid_prompts=0",
            "logger.layers=false", "loss.chunk_tokens=8192",
            f"trainer.max_steps={self.steps}", f"trainer.valid_every={every}", "trainer.log_every=20",
            f"trainer.checkpoint_every={self.steps}", "trainer.progress_bar=false", "logger=disabled",
            f"trainer.accelerator={self.accelerator}", f"paths.cache={self.cache}", f"paths.output_root={output}",
            *self.overrides,
        ]  # fmt: skip

    def _target_words(self, name: str, target: float) -> list[str]:
        if name not in OWN_TARGET:
            return [f"rate.target_bits={target}"]
        # all that is coded shall come to the target
        others = target - ABOVE * end_share(self.model)
        return [f"rate.target_bits={others}", f"rate.embedding_bits={others + ABOVE}"]


def end_share(folder: Path) -> float:
    """Of the weights of a model's embedding and linear layers, the share of embedding and head; tied ones once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(folder))
    ends, everything = (distinct_weights(exact_modules(model, ends_only)).values() for ends_only in (True, False))
    return weight_count(ends) / weight_count(everything)


def weight_count(modules: Iterable[Any]) -> int:
    """Weights of some layers."""
    return sum(module.weight.numel() for module in modules)


@dataclass(frozen=True)
class Variant:
    """What a recipe came to.

    Attributes:
        model: on the CPU in eval mode, with the weights that the integers stand for.
        cost: what they take, reckoned.
        seconds: by stage: start, training, export, consistency.
        consistency: of the exported model with the trained one, as `compare`, or {"error": why not}; None if unasked.
    """

    model: PreTrainedModel
    cost: Cost
    seconds: dict[str, float]
    consistency: dict[str, Any] | None


def train_variant(name: str, training: Training, target: float | None) -> Variant:
    """Train a variant to so many stored bits; one that is not quantised is rounded to bfloat16, and not exported.

    Raises:
        UserError: the budget does not make a step, there is a run of this name in the folder to keep it, or as `train`.
    """
    if training.steps < 1:
        raise UserError(
            f"--tokens {training.tokens} is less than a step of {training.batch} windows of {training.seq_len}"
        )
    kept = training.keep and training.keep / f"{name}{training.label}{'' if target is None else f'-{target:g}'}"
    if kept and kept.exists():
        raise UserError(f"{kept} exists: give another --keep or --label, or move it away")
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = compose("train", *training.words(name, target, Path(folder)))
        with _timed(seconds, "training"):
            run = train(config)
        seconds = {"start": _start_seconds(run)} | seconds
        seconds["training"] = round(seconds["training"] - seconds["start"], 1)
        # a run is full of cycles, and other processes may want the memory
        gc.collect()
        torch.cuda.empty_cache()
        if kept:
            (run / "checkpoints" / "best.ckpt").unlink(missing_ok=True)
            kept.parent.mkdir(parents=True, exist_ok=True)
            run = Path(shutil.move(run, kept))
        checkpoint = run / "checkpoints" / "last.ckpt"
        model: Any = load_fake_quant(checkpoint)
        layers = distinct_weights(quantized_modules(model)).values()
        if not layers:
            return Variant(model.to(torch.bfloat16).float(), Cost(16.0, 16.0), seconds, None)
        profile, found = config.rate.profile.value, None
        try:
            if kept or training.prompts:
                with _timed(seconds, "export"), _quiet():
                    words = [f"source={checkpoint}", f"output={run / 'compressed'}", f"profile={profile}"]
                    compressed = export(compose("export", *words, "progress_bar=false"))
                if training.prompts:
                    with _timed(seconds, "consistency"), _quiet():
                        found = compare(compressed, checkpoint, training)
        except Exception as error:
            # what was trained can be judged all the same
            traceback.print_exc()
            found = {"error": str(error)}
    rounded = (
        Rounded(
            *quantize_weight(layer.weight, layer.quant_config, layer.log2_scale),
            grid(layer.quant_config)[1],
            getattr(layer, "bias", None) is not None,
        )
        for layer in layers
    )
    cost = stored_cost(rounded, profile)
    freeze(model)
    set_fake_quant(model, False)
    return Variant(model, cost, seconds, found)


def compare(compressed: Path, checkpoint: Path, training: Training) -> dict[str, Any]:
    """Level 4 of the numerics contract for an exported folder, and what it stores.

    Returns:
        prompts, new_tokens, tokens, divergent_tokens: as `qat.divergence.compare_tokens`.
        margin: the largest at a first divergence, by which the trained model preferred its token; None without one.
        logits_equal: to the bit, on some windows of the text.
        device, dtype: where and in what both models ran.
        stored_bits: bits a weight of the compressed layers, as export counted them in the folder.
    """
    report = consistency(
        compose(
            "eval", f"compressed={compressed}", f"checkpoint={checkpoint}", f"text={training.valid}",
            f"output={checkpoint.parents[1] / 'report'}", f"device={training.device}", f"prompts={training.prompts}",
            f"new_tokens={NEW_TOKENS}", f"seq_len={training.seq_len}", "windows=16", "batch_size=128",
            "logger=disabled", f"paths.cache={training.cache}",
        )
    )  # fmt: skip
    made = report["fake_quant"]["generation"]
    return {
        **{key: made[key] for key in ("prompts", "new_tokens", "tokens", "divergent_tokens")},
        "margin": max((divergence["margin"] for divergence in made["divergences"]), default=None),
        "logits_equal": report["fake_quant"]["logits"]["bit_equal"],
        "device": report["device"],
        "dtype": report["dtype"],
        "stored_bits": json.loads((compressed / "export_report.json").read_text())["summary"]["bits"],
    }


def _start_seconds(run: Path) -> float:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return next((round(line["start/seconds"], 1) for line in lines if "start/seconds" in line), 0.0)


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - begin, 1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the tables and bars that entry points show."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield
