"""lm-eval on a compressed folder, beside its base and its fake-quant model; offline when the tasks are local.

    python -m eval.harness compressed=out/model tasks=[arc_easy_local,piqa_local] data_dir=tasks output=reports/model

eval/tasks/ holds tasks that read local files from `data_dir`; lm-eval's own go by their names. Importing this
module makes lm-eval know the model type codecllm: simple_evaluate(model="codecllm", model_args={"pretrained": folder}).
Under `torchrun` or `accelerate launch` every process has the models, and its share of the items.
"""

import gc
import hashlib
import inspect
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import lm_eval
import rans_kernels
import torch
from accelerate.utils import patch_environment
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from rans_kernels.checkpoint import read_config

from eval.items import compare_answers, compare_responses
from eval.local_tasks import find_tasks
from eval.page import write_page
from eval.references import reference_loaders
from eval.tables import Table, flip_table, histograms, likelihood_table, score_table, weight_tables
from eval.weights import describe_weights
from qat.cli import entry_point
from qat.config import EvalConfig, to_plain
from qat.errors import CheckFailed, UserError
from qat.inference import DTYPES, pick_device, pick_dtype
from qat.report import console, log_to_wandb, output_folder, print_table, write_report, write_text

SET_HERE = {"pretrained", "tokenizer", "dtype", "device", "batch_size", "max_batch_size", "backend"}
"""Arguments of HFLM that other keys stand for."""


@register_model("codecllm")
class CodecLM(HFLM):
    """A compressed folder as lm-eval's kind of model; takes HFLM's arguments."""

    def __init__(self, pretrained: str, loader: Callable[[torch.device], Any] | None = None, **kwargs: Any):
        """Args: pretrained: folder. loader: what to load in its place, with its tokenizer. kwargs: HFLM's."""
        self._loader = loader
        # of several processes accelerate gives each a GPU, and without one sees a single process
        cpu = {"accelerate_use_cpu": "true"} if kwargs.get("device") == "cpu" else {}
        with patch_environment(**cpu):
            super().__init__(pretrained, **kwargs)
        if accelerator := getattr(self, "accelerator", None):
            # which HFLM reads on several GPUs alone
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes

    def _create_model(self, pretrained: str, dtype: Any = "auto", **kwargs: Any) -> None:
        if self._loader is not None:
            self._model = self._loader(self.device)
            return
        stored = dtype is None or dtype == "auto"
        dtype = None if stored else DTYPES.get(dtype, dtype)
        self._model = rans_kernels.load(pretrained, device=self.device, dtype=dtype)


def check(config: EvalConfig) -> None:
    """`harness`, for a command line.

    Raises:
        CheckFailed: log-likelihoods of the compressed model are not those of the fake-quant model.
        UserError, rans_kernels.format.FormatError: as `harness`.
    """
    if harness(config).get("passed") is False:
        raise CheckFailed("the compressed model does not answer as the fake-quant model does")


def harness(config: EvalConfig) -> dict[str, Any]:
    """Run lm-eval tasks on the compressed model, on the base and on the fake-quant model, as far as the config says.

    Writes `harness` into output/report.json and report.html (and samples_<model>_<task>.jsonl if `log_samples`), prints
    tables and logs to W&B.

    Returns:
        results: by model, base, fake_quant and compressed: results[model][task][metric] = {"value", "error",
            "higher_is_better"}; metric carries lm-eval's filter unless that is "none"; error is the standard error.
        passed: all log-likelihoods are the fake-quant model's; None without it.
        likelihoods: with a fake-quant model, by task, `eval.items.compare_responses` of it and the compressed one.
        flips: with a base, by task, `eval.items.compare_answers` of it and the compressed model.
        versions, samples: {task: version of the task}, {task: items scored}.
        device, dtype, settings: as in `eval.consistency`.
        Of several processes the first has it all, the others nothing.

    Raises:
        UserError: unknown task, missing or empty data file, no such model, an option that lm-eval does not know.
        rans_kernels.format.FormatError: `compressed` is no compressed folder.
    """
    output = output_folder(config.output)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    folder = read_config(Path(config.compressed))
    options = _options(config)
    tasks, manager = find_tasks(config.tasks, config.data_dir, config.text, config.harness.metadata)
    offline = all(isinstance(task, dict) for task in tasks) and (config.base is None or Path(config.base).is_dir())
    runs: dict[str, Any] = {}
    with _quiet(), _offline(offline):
        for name, loader in _loaders(config, folder, device, dtype).items():
            source = config.base if name == "base" and config.base is not None else config.compressed
            lm = CodecLM(source, loader, dtype=dtype, device=str(device), **_model_options(config))
            cache = _cache(config, name, dtype, device)
            runs[name] = lm_eval.simple_evaluate(
                lm, tasks=list(tasks), log_samples=True, task_manager=manager, use_cache=cache, **options
            )
            del lm
            gc.collect()
    if runs["compressed"] is None:
        return {}
    results = {name: _scores(run) for name, run in runs.items()}
    likelihoods = _compare(compare_responses, runs, "fake_quant")
    report = {
        "passed": all(found["items"] == found["equal"] for found in likelihoods.values()) if likelihoods else None,
        "results": results,
        "likelihoods": likelihoods,
        "flips": _compare(compare_answers, runs, "base"),
        "versions": runs["compressed"]["versions"],
        "samples": {task: count["effective"] for task, count in runs["compressed"]["n-samples"].items()},
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "settings": to_plain(config),
    }
    path = write_report(output, "harness", report)
    weights = describe_weights(Path(config.compressed))
    write_report(output, "weights", weights)
    if config.log_samples:
        _write_samples(output, runs)
    tables = _tables(report)
    for title, (columns, rows) in tables.items():
        print_table(title, columns, rows)
    if report["passed"] is not None:
        word = "[bold green]PASS[/]" if report["passed"] else "[bold red]FAIL[/]"
        equal, items = (sum(found[key] for found in likelihoods.values()) for key in ("equal", "items"))
        console().print(f"{word} fake-quant vs compressed: {equal:,} of {items:,} items equal to the bit")
    page = write_page(output)
    console().print(f"report: {path}, {page}")
    tables |= weight_tables(weights)
    log_to_wandb(config.logger, output, "harness", _headline(report), tables, page=page, histograms=histograms(weights))
    return report


def _loaders(
    config: EvalConfig, folder: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> dict[str, Callable[[torch.device], Any] | None]:
    """The models to run, each loaded when its turn comes; None stands for the compressed folder itself."""
    wanted = ["base"] if config.base is not None else []
    if config.checkpoint is not None or config.harness.fake_quant:
        wanted.append("fake_quant")
    if not wanted:
        return {"compressed": None}
    # a wrong path shows now
    known = reference_loaders(config, folder, device, dtype)
    if missing := [name for name in wanted if name not in known]:
        raise UserError(
            f"harness.{missing[0]}=true, but there is nothing to make it from: give checkpoint=..., or base=... if "
            "the folder was rounded from it without training"
        )

    def loader(name: str) -> Callable[[torch.device], Any]:
        def load(here: torch.device) -> Any:
            # whose tiles say in which order a GPU adds
            tiles = name == "fake_quant" and here.type != "cpu"
            compressed: Any = rans_kernels.load(config.compressed, here, dtype) if tiles else None
            return reference_loaders(config, folder, here, dtype)[name](compressed)

        return load

    return {**{name: loader(name) for name in wanted}, "compressed": None}


def _options(config: EvalConfig) -> dict[str, Any]:
    """What `simple_evaluate` is told, but for the model, the tasks and the cache of responses."""
    given = asdict(config.harness)
    for ours in ("model_args", "use_cache", "fake_quant", "metadata"):
        del given[ours]
    given["batch_size"] = _batch_size(config)
    return {**given, "num_fewshot": config.num_fewshot, "limit": config.limit}


def _batch_size(config: EvalConfig) -> int | str:
    size = config.batch_size if config.harness.batch_size is None else config.harness.batch_size
    if isinstance(size, int) and size > 0 or isinstance(size, str) and size.partition(":")[0] == "auto":
        return size
    raise UserError(f"harness.batch_size={size}: give a whole number from 1, auto or auto:N")


def _model_options(config: EvalConfig) -> dict[str, Any]:
    """Arguments of HFLM.

    Raises:
        UserError: it has no such argument, or another key stands for it.
    """
    given = dict(config.harness.model_args or {})
    known = set(inspect.signature(HFLM.__init__).parameters) - SET_HERE - {"self", "kwargs"}
    if unknown := sorted(given.keys() - known):
        raise UserError(f"harness.model_args.{unknown[0]}: give some of {', '.join(sorted(known))}")
    most = {"max_batch_size": config.harness.max_batch_size} if config.harness.max_batch_size else {}
    return {**given, **most, "batch_size": _batch_size(config)}


def _cache(config: EvalConfig, name: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Where lm-eval keeps the responses of a model, by all that they depend on: it tells requests apart, not models."""
    if config.harness.use_cache is None:
        return None
    sources: dict[str, list[Any]] = {"base": [config.base], "compressed": [config.compressed]}
    about: list[Any] = [str(dtype), device.type, _batch_size(config), config.harness.model_args]
    for source in sources.get(name, [config.checkpoint or config.base, config.compressed]):
        path = Path(str(source)).expanduser()
        files = sorted(path.glob("*")) if path.is_dir() else [path]
        about += [(str(source), *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file()))]
    digest = hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()[:12]
    return str(Path(config.harness.use_cache).expanduser().resolve() / f"{name}_{digest}")


def _compare(compare: Callable[[Any, Any], Any], runs: dict[str, Any], reference: str) -> dict[str, Any]:
    """By task, a reference's items beside the compressed model's; without tasks for which there is nothing to say."""
    if reference not in runs:
        return {}
    samples = {name: run["samples"] for name, run in runs.items()}
    found = {task: compare(items, samples["compressed"][task]) for task, items in samples[reference].items()}
    return {task: value for task, value in found.items() if value is not None}


def _headline(report: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the report without its lists."""
    flips = {
        task: {key: value for key, value in found.items() if isinstance(value, int | float)}
        for task, found in report["flips"].items()
    }
    return {"passed": report["passed"], "results": report["results"], "flips": flips}


def _scores(run: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """Metrics of every task, without the keys of lm-eval's tables that are no metrics."""
    scores: dict[str, dict[str, dict[str, Any]]] = {}
    for task, values in run["results"].items():
        scores[task] = {}
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            scores[task][metric if filtered == "none" else key] = {
                "value": float(value),
                "error": float(error) if isinstance(error, int | float) else None,
                "higher_is_better": run["higher_is_better"].get(task, {}).get(metric),
            }
    return scores


def _tables(report: dict[str, Any]) -> dict[str, Table]:
    tables = {"lm-eval": score_table(report)}
    if report["likelihoods"]:
        tables["log-likelihoods, fake-quant vs compressed"] = likelihood_table(report)
    if report["flips"]:
        tables["flips, base to compressed"] = flip_table(report)
    return tables


def _write_samples(output: Path, runs: dict[str, Any]) -> None:
    """One JSON line an item, as lm-eval gives them."""
    for name, run in runs.items():
        for task, items in run["samples"].items():
            lines = [json.dumps(item, default=str, ensure_ascii=False) + "\n" for item in items]
            write_text(output / f"samples_{name}_{task}.jsonl", "".join(lines))


@contextmanager
def _quiet() -> Iterator[None]:
    """Only errors of lm-eval's many lines; progress bars stay."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _offline(enabled: bool) -> Iterator[None]:
    """Keep the hub and `datasets` off the network, child processes included, while inside."""
    if not enabled:
        yield
        return
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    # both libraries read the environment once, when they are imported
    constants: tuple[Any, ...] = (huggingface_hub.constants, datasets.config)
    environment = {name: os.environ.get(name) for name in names}
    before = [module.HF_HUB_OFFLINE for module in constants]
    os.environ.update(dict.fromkeys(names, "1"))
    for module in constants:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(constants, before, strict=True):
            module.HF_HUB_OFFLINE = value
        for name, old in environment.items():
            if old is None:
                del os.environ[name]
            else:
                os.environ[name] = old


if __name__ == "__main__":
    entry_point("eval", check)
