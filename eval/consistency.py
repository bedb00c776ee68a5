"""Does the compressed model do what the model it came from does? Greedy tokens and logits, compared one by one.

    python -m eval.consistency compressed=out/model base=hf/model text=valid.txt output=reports/model

Two pairs: the fake-quant model against the compressed one, where on one backend nothing at all may differ, and the
unquantised base against it, which measures what quantisation costs. docs/evaluation.md defines every number.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rans_kernels
import torch
from rans_kernels.checkpoint import read_config
from rans_kernels.dense import Int8Embedding
from rich.progress import Progress
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.cost import CostMeter
from eval.page import write_page
from eval.tables import (
    TITLES,
    cost_table,
    example_table,
    histograms,
    percentile_table,
    survival_figure,
    weight_tables,
)
from eval.weights import describe_weights
from qat.checkpoint import load_fake_quant, read_checkpoint
from qat.cli import entry_point
from qat.config import EvalConfig, QuantConfig, from_plain, to_plain
from qat.data import load_tokens, spread_prompts, windows
from qat.divergence import LogitComparison, compare_tokens
from qat.errors import UserError
from qat.inference import generate_greedy, pick_device, pick_dtype, token_texts
from qat.model import load_model, load_tokenizer
from qat.quant import convert, prepare, quantized_modules
from qat.report import console, log_to_wandb, output_folder, print_table, progress_bar, write_report

LOGITS = 1 << 26
"""Logits of one model that exist at once."""

EXAMPLES = 3
"""Prompts of a pair whose texts are kept."""


def consistency(config: EvalConfig) -> dict[str, Any]:
    """Compare the compressed model with its fake-quant model and its base, as far as the config names them.

    Writes `consistency` into output/report.json, report.html and survival.png beside it, prints tables and a verdict,
    logs to W&B.
    At most two models are in memory.

    Returns:
        passed: no divergent token and all logits equal, fake-quant vs compressed; None without that pair.
        fake_quant, base: where the config names them, {"generation": `qat.divergence.compare_tokens`, "logits":
            `qat.divergence.LogitComparison.summary`}; the reference is the named model. generation["examples"] are
            {"prompt", "reference", "other", "position"}: texts, of both models token by token, and where they part.
        costs: of "compressed" and of each reference, `eval.cost.CostMeter.read`.
        device, dtype: where and in what the models ran.
        settings: the config, as plain data. text_tokens: tokens in the text.
        seconds: by stage.

    Raises:
        UserError: nothing to compare with, too little text, models that do not belong together.
        rans_kernels.format.FormatError: `compressed` is no compressed folder.
    """
    output = output_folder(config.output)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    folder = read_config(Path(config.compressed))
    _check_context(config, folder.get("max_position_embeddings"))
    references = _references(config, folder, dtype)
    tokenizer = load_tokenizer(config.compressed)
    prompts, text, text_tokens = _held_out(config, tokenizer)
    seconds: dict[str, float] = {}
    with progress_bar() as progress:
        costs: dict[str, Any] = {}
        meter = CostMeter(device)
        with _timed(seconds, "load compressed"):
            compressed = rans_kernels.load(config.compressed, device=device, dtype=dtype)
        with _timed(seconds, "warm up compressed"):
            _warm_up(compressed, prompts, config)
        with _timed(seconds, "generate compressed"):
            generated, _ = _generate("compressed", compressed, prompts, config, progress)
        costs["compressed"] = meter.read(compressed, generated.numel(), seconds["generate compressed"])
        pairs = {}
        for name, load in references.items():
            meter = CostMeter(device)
            with _timed(seconds, f"load {name}"):
                reference = load().to(device)
            _check_pair(config, reference, compressed)
            with _timed(seconds, f"warm up {name}"):
                _warm_up(reference, prompts, config)
            with _timed(seconds, f"generate {name}"):
                tokens, margins = _generate(name, reference, prompts, config, progress)
            costs[name] = meter.read(reference, tokens.numel(), seconds[f"generate {name}"])
            with _timed(seconds, f"logits {name}"):
                logits = _compare_logits(name, reference, compressed, text, config.batch_size, progress)
            generation = compare_tokens(tokens, generated, margins)
            generation["examples"] = _examples(tokenizer, prompts, tokens, generated, generation["divergences"])
            pairs[name] = {"generation": generation, "logits": logits}
            del reference
    report = {
        "passed": _passed(pairs["fake_quant"]) if "fake_quant" in pairs else None,
        **pairs,
        "costs": costs,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "settings": to_plain(config),
        "text_tokens": text_tokens,
        "seconds": seconds,
    }
    path = write_report(output, "consistency", report)
    weights = describe_weights(Path(config.compressed))
    write_report(output, "weights", weights)
    figure = output / "survival.png"
    survival_figure(pairs).savefig(figure, dpi=150)
    tables = _tables(pairs) | {"speed and memory": cost_table(report)}
    for title, (columns, rows) in tables.items():
        print_table(title, columns, rows)
    console().print(_verdict(report))
    page = write_page(output)
    console().print(f"report: {path}, {page}")
    tables |= weight_tables(weights) | {"examples": example_table(pairs)}
    images = {"survival": figure}
    headline, found = _headline(report), histograms(weights)
    log_to_wandb(config.logger, output, "consistency", headline, tables, images, page=page, histograms=found)
    return report


def _references(config: EvalConfig, folder: dict[str, Any], dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """The models to compare with, each loaded when its turn comes; `folder` is the compressed one's config.json."""
    quant, stored = folder["quantization_config"].get("quant"), getattr(torch, folder.get("dtype") or "float32")
    if config.base is None and config.checkpoint is None:
        raise UserError("nothing to compare with: give base=... (the unquantised model), checkpoint=... or both")
    base, checkpoint = config.base, config.checkpoint
    references: dict[str, Callable[[], Any]] = {}
    # a wrong path shows now, not after the first model has generated
    if base is not None:
        load_tokenizer(base)
    if checkpoint is not None:
        read_checkpoint(checkpoint)
        references["fake_quant"] = lambda: _in_dtype(_rounded(load_fake_quant(checkpoint), stored), dtype)
    elif quant is not None:
        references["fake_quant"] = lambda: _in_dtype(_prepared(base, from_plain(QuantConfig, quant)), dtype)
    if base is not None:
        references["base"] = lambda: load_model(base, dtype)
    return references


def _prepared(base: Any, quant: QuantConfig) -> nn.Module:
    model = load_model(base)
    # without quantisation all is stored as it is, or coded without loss
    return (prepare(model, quant) if quant.enabled else model).eval()


def _rounded(model: Any, stored: torch.dtype) -> Any:
    """Tensors that are not compressed rounded as export was told to store them; float32 changes nothing."""
    compressed = {id(module.weight) for module in quantized_modules(model).values()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in compressed and not name.endswith("weight_log2_scale"):
            parameter.data = parameter.data.to(stored).to(parameter.dtype)
    return model


def _in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A fake-quant model in float32, its arithmetic moved to `dtype` without touching its integers and scales."""
    if dtype == torch.float32:
        return model
    converted = convert(model)
    for parameter in converted.parameters():
        parameter.data = parameter.data.to(dtype)
    for module in converted.modules():
        if isinstance(module, Int8Embedding):
            module.dtype = dtype
    return converted


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
    name: str, model: PreTrainedModel, prompts: Tensor, config: EvalConfig, progress: Progress
) -> tuple[Tensor, Tensor]:
    task = progress.add_task(f"generate, {name}", total=len(prompts))
    return generate_greedy(
        model, prompts, config.new_tokens, config.batch_size, lambda done: progress.advance(task, done)
    )


def _warm_up(model: PreTrainedModel, prompts: Tensor, config: EvalConfig) -> None:
    """A batch of two tokens: what is compiled or decoded once is no part of a model's speed."""
    generate_greedy(model, prompts[: config.batch_size], 2, config.batch_size)


@torch.inference_mode()
def _compare_logits(
    name: str, reference: PreTrainedModel, other: PreTrainedModel, text: Tensor, batch_size: int, progress: Progress
) -> dict[str, Any]:
    """Teacher-forced logits of both models on windows [W, T + 1], without a KV cache."""
    comparison = LogitComparison()
    task = progress.add_task(f"logits, {name}", total=len(text))
    rows = max(1, min(batch_size, LOGITS // (text.shape[1] * reference.config.vocab_size)))
    for batch in text.to(reference.device).split(rows):
        p, q = (model(input_ids=batch[:, :-1], use_cache=False).logits for model in (reference, other))
        for p_logits, q_logits, targets in zip(p, q, batch[:, 1:], strict=True):
            comparison.update(p_logits, q_logits, targets)
            progress.advance(task)
    return comparison.summary()


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


def _passed(pair: dict[str, Any]) -> bool:
    return pair["generation"]["divergent_tokens"] == 0 and pair["logits"]["bit_equal"]


def _verdict(report: dict[str, Any]) -> str:
    if report["passed"] is None:
        return "no fake-quant model to compare with: neither PASS nor FAIL"
    generation, logits = report["fake_quant"]["generation"], report["fake_quant"]["logits"]
    found = (
        f"{generation['divergent_tokens']:,} divergent tokens of {generation['tokens']:,} in {generation['prompts']} "
        f"prompts; logits {'equal to the bit' if logits['bit_equal'] else 'differ'} on {logits['tokens']:,} tokens"
    )
    if report["passed"]:
        return f"[bold green]PASS[/] fake-quant vs compressed: {found}"
    if report["device"] != "cpu":
        found += f" (on {report['device']} the two use different kernels; docs/evaluation.md, level 4)"
    return f"[bold red]FAIL[/] fake-quant vs compressed: {found}"


def _tables(pairs: dict[str, Any]) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """Columns and rows by title: the numbers that matter, and llama.cpp's percentiles."""
    titles = [TITLES[name] for name in pairs]
    figures = [_figures(pair) for pair in pairs.values()]
    return {
        "consistency": (["quantity", *titles], [[row, *(values[row] for values in figures)] for row in figures[0]]),
        "percentiles over tokens": percentile_table(pairs),
    }


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
        "perplexity, compressed": perplexity["other"],
        "perplexity ratio": _plus_minus(perplexity["ratio"], perplexity["ratio_error"]),
    }


def _plus_minus(value: float, error: float) -> str:
    return f"{value:.6g} ± {error:.2g}"


def _headline(report: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the report without its curves and lists."""
    headline: dict[str, Any] = {"passed": report["passed"], "seconds": report["seconds"]}
    for name in TITLES.keys() & report.keys():
        numbers = {**report[name]["generation"], **report[name]["logits"]}
        headline[name] = {key: value for key, value in numbers.items() if not isinstance(value, list)}
    return headline


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = round(time.perf_counter() - start, 3)


if __name__ == "__main__":
    entry_point("eval", consistency)
