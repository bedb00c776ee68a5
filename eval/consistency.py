"""Does the compressed model do what the model it came from does? Greedy tokens and logits, compared one by one.

    python -m eval.consistency compressed=out/model base=hf/model text=valid.txt output=reports/model modes=all

Pairs: the fake-quant model against the compressed one, where on one backend nothing at all may differ, in every way of
running that `modes` names; the unquantised base against it, which measures what quantisation costs; and the base
against itself in other batches, the floor of that measure. docs/evaluation.md defines every number.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rans_kernels
import torch
from rans_kernels.checkpoint import read_config
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.cost import CostMeter
from eval.mode_suite import ModeSuite
from eval.modes import choose_modes
from eval.page import write_page
from eval.references import reference_loaders, round_once
from eval.tables import (
    PROMISED,
    TITLES,
    Table,
    cost_table,
    example_table,
    histograms,
    mode_table,
    percentile_table,
    survival_figure,
    weight_tables,
)
from eval.weights import describe_weights
from qat.cli import entry_point
from qat.config import EvalConfig, to_plain
from qat.data import load_tokens, spread_prompts, windows
from qat.divergence import LogitComparison, compare_tokens
from qat.errors import CheckFailed, UserError
from qat.inference import (
    Trace,
    pick_device,
    pick_dtype,
    repeatable_attention,
    rows_at_once,
    token_texts,
    trace_greedy,
)
from qat.model import load_tokenizer
from qat.report import console, log_to_wandb, output_folder, print_table, progress_bar, write_report

EXAMPLES = 3
"""Prompts of a pair whose texts are kept."""


def check(config: EvalConfig) -> None:
    """`consistency`, for a command line.

    Raises:
        CheckFailed: a promised equality does not hold.
        UserError, rans_kernels.format.FormatError: as `consistency`.
    """
    if consistency(config)["passed"] is False:
        raise CheckFailed("the compressed model is not what it was made from")


def consistency(config: EvalConfig) -> dict[str, Any]:
    """Compare the compressed model with its fake-quant model and its base, as far as the config names them.

    Writes `consistency` into output/report.json, report.html and survival.png beside it, prints tables and a verdict,
    logs to W&B.
    At most two models are in memory.

    Returns:
        passed: all that is promised holds: no divergent token and, on the CPU, all logits equal, fake-quant vs
            compressed, and no mode failed; None where nothing promised was compared.
        fake_quant, own, library, base: the pairs that there are (eval.references.reference_loaders), {"generation":
            `qat.divergence.compare_tokens`, "logits": `qat.divergence.LogitComparison.summary`}; the reference is the
            named model. generation["examples"] are {"prompt", "reference", "other", "position"}: texts, of both models
            token by token, and where they part.
        floor: as a pair, the base against itself in other batches.
        modes: what eval.mode_suite.ModeSuite found, by mode.
        costs: of "compressed" and of each reference, `eval.cost.CostMeter.read`.
        device, dtype: where and in what the models ran.
        unfinished: true in report.json, without a page, if Ctrl-C stopped it; passed is None then.
        settings: the config, as plain data. text_tokens: tokens in the text.
        seconds: by stage.

    Raises:
        UserError: nothing to compare with, too little text, models that do not belong together, no such mode.
        rans_kernels.format.FormatError: `compressed` is no compressed folder.
    """
    output = output_folder(config.output)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    choose_modes(config.modes)
    folder = read_config(Path(config.compressed))
    _check_context(config, folder.get("max_position_embeddings"))
    references = reference_loaders(config, folder, device, dtype)
    tokenizer = load_tokenizer(config.compressed)
    prompts, text, text_tokens = _held_out(config, tokenizer)
    seconds: dict[str, float] = {}
    pairs: dict[str, Any] = {}
    costs: dict[str, Any] = {}
    progress = progress_bar()
    suite = ModeSuite(config, prompts, progress)

    def found() -> dict[str, Any]:
        return {
            "passed": _passed(pairs, suite.report(), device),
            **pairs,
            "modes": suite.report(),
            "costs": costs,
            "device": str(device),
            "dtype": str(dtype).removeprefix("torch."),
            "settings": to_plain(config),
            "text_tokens": text_tokens,
            "seconds": seconds,
        }

    with repeatable_attention(), progress, _kept_when_stopped(output, found):
        meter = CostMeter(device)
        with _timed(seconds, "load compressed"):
            compressed = rans_kernels.load(config.compressed, device=device, dtype=dtype)
        with _timed(seconds, "warm up compressed"):
            _warm_up(compressed, prompts, config)
        with _timed(seconds, "generate compressed"):
            written = _generate("compressed", compressed, prompts, config, config.batch_size, progress)
        costs["compressed"] = meter.read(compressed, written.tokens.numel(), seconds["generate compressed"])
        for name, load in references.items():
            meter = CostMeter(device)
            with _timed(seconds, f"load {name}"):
                reference = load(compressed)
            _check_pair(config, reference, compressed)
            with _timed(seconds, f"warm up {name}"):
                _warm_up(reference, prompts, config)
            with _timed(seconds, f"generate {name}"):
                own = _generate(name, reference, prompts, config, config.batch_size, progress)
            costs[name] = meter.read(reference, own.tokens.numel(), seconds[f"generate {name}"])
            with _timed(seconds, f"logits {name}"):
                logits = _compare_logits(name, reference, compressed, text, config.batch_size, progress)
            generation = compare_tokens(own.tokens, written.tokens, own.margins)
            generation["examples"] = _examples(
                tokenizer, prompts, own.tokens, written.tokens, generation["divergences"]
            )
            pairs[name] = {"generation": generation, "logits": logits}
            if name in PROMISED:
                suite.compare_weights(reference, compressed)
                suite.run(round_once(reference), compressed, (own, written))
                promised = own
            if name == "base" and config.floor:
                with _timed(seconds, "floor"):
                    pairs["floor"] = _floor(reference, prompts, own, text, config, progress)
            del reference
        if suite.names:
            suite.run_loaded(compressed, (promised, written))
    report = found()
    path = write_report(output, "consistency", report)
    weights = describe_weights(Path(config.compressed))
    write_report(output, "weights", weights)
    figure = output / "survival.png"
    survival_figure(pairs).savefig(figure, dpi=150)
    tables = _tables(pairs, suite.report()) | {"speed and memory": cost_table(report)}
    for title, (columns, rows) in tables.items():
        print_table(title, columns, rows)
    for line in _verdict(report):
        console().print(line)
    page = write_page(output)
    console().print(f"report: {path}, {page}")
    tables |= weight_tables(weights) | {"examples": example_table(pairs)}
    images, headline, counts = {"survival": figure}, _headline(report), histograms(weights)
    log_to_wandb(config.logger, output, "consistency", headline, tables, images, page=page, histograms=counts)
    return report


def _held_out(config: EvalConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor, int]:
    """Prompts [B, T] at evenly spaced positions of the text, its first windows [W, seq_len + 1], its length."""
    for key in ("prompts", "prompt_tokens", "new_tokens", "seq_len", "batch_size"):
        if getattr(config, key) < 1:
            raise UserError(f"{key}={getattr(config, key)}: must be at least 1")
    if config.windows is not None and config.windows < 1:
        raise UserError(f"windows={config.windows}: must be at least 1, or null for the whole text")
    if config.text is None:
        raise UserError("no held-out text: give text=... (a .txt, .txt.xz or .jsonl file, or hf://dataset)")
    tokens = load_tokens(config.text, tokenizer, config.paths.cache, config.text_key, config.separator)
    if len(tokens) < (needed := config.prompts * config.prompt_tokens):
        raise UserError(
            f"the text has {len(tokens):,} tokens, and {config.prompts} prompts of {config.prompt_tokens} need "
            f"{needed:,}: give more text or fewer prompts=..."
        )
    if len(tokens) <= config.seq_len:
        raise UserError(
            f"the text has {len(tokens):,} tokens, and one window of seq_len={config.seq_len} needs "
            f"{config.seq_len + 1:,}: give more text or a smaller seq_len=..."
        )
    prompts = spread_prompts(tokens, config.prompts, config.prompt_tokens)
    data = windows(tokens, config.seq_len)
    text = [data[index] for index in range(min(len(data), config.windows or len(data)))]
    return prompts, torch.stack(text), len(tokens)


def _check_context(config: EvalConfig, context: int | None) -> None:
    if context is None:
        return
    if config.prompt_tokens + config.new_tokens > context:
        raise UserError(
            f"prompt_tokens={config.prompt_tokens} and new_tokens={config.new_tokens} do not fit the model's context "
            f"of {context} tokens"
        )
    if config.seq_len > context:
        raise UserError(f"seq_len={config.seq_len} does not fit the model's context of {context} tokens")


def _check_pair(config: EvalConfig, reference: PreTrainedModel, compressed: PreTrainedModel) -> None:
    ours, theirs = compressed.config.vocab_size, reference.config.vocab_size
    if ours != theirs:
        source = config.checkpoint or config.base
        raise UserError(
            f"{source} has a vocabulary of {theirs} and {config.compressed} one of {ours}: not the same model"
        )


def _generate(
    name: str, model: PreTrainedModel, prompts: Tensor, config: EvalConfig, batch_size: int, progress: Progress
) -> Trace:
    task = progress.add_task(f"generate, {name}", total=len(prompts))
    return trace_greedy(model, prompts, config.new_tokens, batch_size, lambda done: progress.advance(task, done))


def _warm_up(model: PreTrainedModel, prompts: Tensor, config: EvalConfig) -> None:
    """A batch of two tokens: what is compiled or decoded once is no part of a model's speed."""
    trace_greedy(model, prompts[: config.batch_size], 2, config.batch_size)


@torch.inference_mode()
def _compare_logits(
    name: str,
    reference: PreTrainedModel,
    other: PreTrainedModel,
    text: Tensor,
    batch_size: int,
    progress: Progress,
    other_rows: int | None = None,
) -> dict[str, Any]:
    """Teacher-forced logits of both models on windows [W, T + 1], without a KV cache.

    other_rows: windows that `other` reads at once, as many as the reference if it is None.
    """
    comparison = LogitComparison()
    task = progress.add_task(f"logits, {name}", total=len(text))
    rows = rows_at_once(reference, text.shape[1], batch_size)
    for batch in text.to(reference.device).split(rows):
        p = reference(input_ids=batch[:, :-1], use_cache=False).logits
        parts = batch[:, :-1].split(min(other_rows or rows, rows))
        q = torch.cat([other(input_ids=part, use_cache=False).logits for part in parts])
        for p_logits, q_logits, targets in zip(p, q, batch[:, 1:], strict=True):
            comparison.update(p_logits, q_logits, targets)
            progress.advance(task)
    return comparison.summary()


def _floor(
    base: PreTrainedModel, prompts: Tensor, written: Trace, text: Tensor, config: EvalConfig, progress: Progress
) -> dict[str, Any]:
    """The base against itself, prompts in batches half as large (or of two, not one), windows one by one; as a pair."""
    size = config.batch_size // 2 or 2
    again = _generate("base in other batches", base, prompts, config, size, progress)
    return {
        "generation": compare_tokens(written.tokens, again.tokens, written.margins),
        "logits": _compare_logits("base in other batches", base, base, text, config.batch_size, progress, 1),
    }


def _examples(
    tokenizer: PreTrainedTokenizerBase, prompts: Tensor, reference: Tensor, other: Tensor, divergences: list[Any]
) -> list[dict[str, Any]]:
    """A few prompts and what both models wrote, token by token: from the one that parts first to that which does last.

    Those between are evenly spaced by where they part; where none does they are the first prompts.
    """
    positions = {found["prompt"]: found["position"] for found in divergences}
    parting = sorted(positions, key=lambda row: (positions[row], row))
    last = max(1, EXAMPLES - 1)
    spread = [parting[index * (len(parting) - 1) // last] for index in range(EXAMPLES)] if parting else []
    chosen = list(dict.fromkeys([*spread, *range(len(prompts))]))[:EXAMPLES]
    return [
        {
            "prompt": tokenizer.decode(prompts[row]),
            "reference": token_texts(tokenizer, reference[row].tolist()),
            "other": token_texts(tokenizer, other[row].tolist()),
            "position": positions.get(row),
        }
        for row in chosen
    ]


def _passed(pairs: dict[str, Any], modes: dict[str, Any], device: torch.device) -> bool | None:
    found = [_pair_passed(pairs[name], str(device)) for name in PROMISED if name in pairs]
    found += [entry["status"] == "passed" for entry in modes.values() if entry["status"] != "skipped"]
    return all(found) if found else None


def _pair_passed(pair: dict[str, Any], device: str) -> bool:
    # a large prompt is read by other kernels on some GPUs (docs/kernels.md), in the last bits of its logits
    return pair["generation"]["divergent_tokens"] == 0 and (device != "cpu" or pair["logits"]["bit_equal"])


def _verdict(report: dict[str, Any]) -> list[str]:
    """A line a promised pair and, if there are modes, one for them."""
    lines = []
    for name in PROMISED & report.keys():
        generation, logits = report[name]["generation"], report[name]["logits"]
        found = (
            f"{generation['divergent_tokens']:,} divergent tokens of {generation['tokens']:,} in "
            f"{generation['prompts']} prompts; logits {'equal to the bit' if logits['bit_equal'] else 'differ'} on "
            f"{logits['tokens']:,} tokens"
        )
        lines.append(f"{_word(_pair_passed(report[name], report['device']))} {TITLES[name]}: {found}")
    names: dict[str, list[str]] = {}
    for name, entry in report["modes"].items():
        names.setdefault(entry["status"], []).append(f"{name}: {entry['reason']}" if entry["reason"] else name)
    if names:
        counts = "; ".join(f"{len(found)} {status} ({', '.join(found)})" for status, found in names.items())
        lines.append(f"{_word('failed' not in names)} modes: {counts}")
    return lines or ["no fake-quant model to compare with (checkpoint=... of a trained one): neither PASS nor FAIL"]


def _word(passed: bool) -> str:
    return "[bold green]PASS[/]" if passed else "[bold red]FAIL[/]"


def _tables(pairs: dict[str, Any], modes: dict[str, Any]) -> dict[str, Table]:
    """Columns and rows by title: the numbers that matter, and llama.cpp's percentiles."""
    titles = [TITLES[name] for name in pairs]
    figures = [_figures(pair) for pair in pairs.values()]
    tables: dict[str, Table] = {
        "consistency": (["quantity", *titles], [[row, *(values[row] for values in figures)] for row in figures[0]]),
        "percentiles over tokens": percentile_table(pairs),
    }
    return tables | ({"modes": mode_table(modes)} if modes else {})


def _figures(pair: dict[str, Any]) -> dict[str, Any]:
    made, logits, perplexity = pair["generation"], pair["logits"], pair["logits"]["perplexity"]
    margins = [divergence["margin"] for divergence in made["divergences"]]
    return {
        "generated tokens": made["tokens"],
        "divergent tokens": made["divergent_tokens"],
        "divergent prompts": made["divergent_prompts"],
        "token match": made["token_match"],
        "first divergence, min": made["first_divergence"]["min"],
        "first divergence, median": made["first_divergence"]["median"],
        "margin at first divergence, min": min(margins, default=None),
        "margin at first divergence, max": max(margins, default=None),
        "scored tokens": logits["tokens"],
        "logits equal to the bit": "yes" if logits["bit_equal"] else "no",
        "largest logit difference": logits["max_abs_difference"],
        "same top token": _plus_minus(logits["same_top"], logits["same_top_error"]),
        "mean KL, nats": _plus_minus(logits["kl"]["mean"], logits["kl"]["error"]),
        "EAR": _plus_minus(logits["ear"]["mean"], logits["ear"]["error"]),
        "perplexity, reference": perplexity["reference"],
        "perplexity, other": perplexity["other"],
        "perplexity ratio": _plus_minus(perplexity["ratio"], perplexity["ratio_error"]),
    }


def _plus_minus(value: float, error: float) -> str:
    return f"{value:.6g} ± {error:.2g}"


def _headline(report: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the report without its curves and lists."""
    headline: dict[str, Any] = {"passed": report["passed"], "seconds": report["seconds"]}
    headline["modes"] = {name: entry["status"] for name, entry in report["modes"].items()}
    for name in TITLES.keys() & report.keys():
        numbers = {**report[name]["generation"], **report[name]["logits"]}
        headline[name] = {key: value for key, value in numbers.items() if not isinstance(value, list)}
    return headline


@contextmanager
def _kept_when_stopped(output: Path, found: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """Write what was found before Ctrl-C; the suite can take an hour."""
    try:
        yield
    except KeyboardInterrupt:
        report = found() | {"passed": None, "unfinished": True}
        if TITLES.keys() & report.keys():
            path = write_report(output, "consistency", report)
            console().print(f"stopped; what was found so far is in {path}")
        raise


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 3)


if __name__ == "__main__":
    entry_point("eval", check)
