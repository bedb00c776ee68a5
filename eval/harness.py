"""lm-eval on a compressed folder, beside its base where one is given; offline when the tasks are local.

    python -m eval.harness compressed=out/model tasks=[arc_easy_local,piqa_local] data_dir=tasks output=reports/model

eval/tasks/ holds tasks that read local jsonl files from `data_dir`; lm-eval's own go by their names. Importing this
module makes lm-eval know the model type codecllm: simple_evaluate(model="codecllm", model_args={"pretrained": folder}).
"""

import gc
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import lm_eval
import rans_kernels
import torch
import yaml
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from rans_kernels.checkpoint import read_config

from eval.page import write_page
from eval.tables import Table, flip_table, histograms, score_table, weight_tables
from eval.weights import describe_weights
from qat.cli import entry_point
from qat.config import EvalConfig, to_plain
from qat.errors import UserError
from qat.inference import DTYPES, pick_device, pick_dtype
from qat.model import load_model, load_tokenizer
from qat.report import console, log_to_wandb, output_folder, print_table, write_report, write_text

TASKS = Path(__file__).resolve().parent / "tasks"


@register_model("codecllm")
class CodecLM(HFLM):
    """A compressed folder as lm-eval's kind of model; takes HFLM's arguments."""

    def _create_model(self, pretrained: str, dtype: Any = "auto", **kwargs: Any) -> None:
        stored = dtype is None or dtype == "auto"
        dtype = None if stored else DTYPES.get(dtype, dtype)
        self._model = rans_kernels.load(pretrained, device=self.device, dtype=dtype)


def harness(config: EvalConfig) -> dict[str, Any]:
    """Run lm-eval tasks on the compressed model, and on the base if the config names one.

    Writes `harness` into output/report.json and report.html (and samples_<model>_<task>.jsonl if `log_samples`), prints
    a table and logs to W&B.

    Returns:
        results: {"compressed": scores, "base": scores}, where scores[task][metric] = {"value", "error",
            "higher_is_better"}; metric carries lm-eval's filter unless that is "none"; error is the standard error.
        flips: with a base, flips[task] = {"items", "lost", "gained", "changed"}: items that went from right to wrong,
            from wrong to right, and to another choice in all; for multiple choice with `acc`.
        versions, samples: {task: version of the task}, {task: items scored}.
        device, dtype, settings: as in `eval.consistency`.

    Raises:
        UserError: unknown task, missing or empty data file, no such model.
        rans_kernels.format.FormatError: `compressed` is no compressed folder.
    """
    output = output_folder(config.output)
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    read_config(Path(config.compressed))
    tasks, manager = find_tasks(config.tasks, config.data_dir)
    offline = all(isinstance(task, dict) for task in tasks) and (config.base is None or Path(config.base).is_dir())
    runs: dict[str, Any] = {}
    with _quiet(), _offline(offline):
        for name in ["base", "compressed"] if config.base else ["compressed"]:
            runs[name] = _evaluate(name, config, tasks, manager, device, dtype)
            gc.collect()
    results = {name: _scores(run) for name, run in runs.items()}
    report = {
        "results": results,
        "flips": _flips(runs["base"], runs["compressed"]) if "base" in runs else {},
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
    page = write_page(output)
    console().print(f"report: {path}, {page}")
    tables |= weight_tables(weights)
    summary = {"results": results, "flips": report["flips"]}
    log_to_wandb(config.logger, output, "harness", summary, tables, page=page, histograms=histograms(weights))
    return report


def find_tasks(names: Any, data_dir: str | None) -> tuple[list[str | dict[str, Any]], TaskManager]:
    """What lm-eval is to run.

    Args:
        names: a name or a list of them: of eval/tasks/*.yaml, of a YAML file's path, or of lm-eval's own.
        data_dir: folder of the files that the tasks of eval/tasks read.

    Returns:
        The tasks, those of eval/tasks as dicts, and a manager that knows the others.

    Raises:
        UserError: none given, an unknown one, or a missing, damaged or empty data file.
    """
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list | tuple) or not names:
        raise UserError(f"no tasks: give tasks=[...] with some of {', '.join(_local_names())}, or lm-eval's own")
    tasks: list[str | dict[str, Any]] = []
    for name in map(str, names):
        if name in _local_names():
            tasks.append(_local_task(name, data_dir))
        elif name.endswith((".yaml", ".yml")) and not Path(name).is_file():
            raise UserError(f"no such task file: {name}")
        else:
            tasks.append(name)
    others = [task for task in tasks if isinstance(task, str)]
    # it takes lm-eval seconds to find its thousands of tasks
    manager = TaskManager(include_defaults=bool(others))
    for name in others:
        if name not in manager.all_tasks and not Path(name).is_file():
            raise UserError(
                f"unknown task {name}: give one of {', '.join(_local_names())}, the path of a YAML file, "
                "or a task of lm-eval (`lm_eval ls tasks` lists them)"
            )
    return tasks, manager


def _local_names() -> list[str]:
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


def _local_task(name: str, data_dir: str | None) -> dict[str, Any]:
    """The YAML of eval/tasks/<name>.yaml with its data file made absolute and looked into."""
    task = yaml.safe_load((TASKS / f"{name}.yaml").read_text(encoding="utf-8"))
    files = task["dataset_kwargs"]["data_files"]
    if data_dir is None:
        raise UserError(f"{name} reads {files['test']}: give data_dir=..., the folder it is in")
    path = Path(data_dir).expanduser().resolve() / files["test"]
    if not path.is_file():
        raise UserError(f"{name} reads {path}, which does not exist: check data_dir={data_dir}")
    with open(path, encoding="utf-8") as lines:
        first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise UserError(f"{path} is empty")
    try:
        keys = json.loads(first).keys()
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} does not hold one JSON object a line") from error
    if missing := [key for key in task["metadata"]["keys"] if key not in keys]:
        raise UserError(f"{path} has no key {missing[0]!r}; {name} needs {', '.join(task['metadata']['keys'])}")
    files["test"] = str(path)
    return task


def _evaluate(
    name: str, config: EvalConfig, tasks: list[Any], manager: TaskManager, device: torch.device, dtype: torch.dtype
) -> Any:
    options: dict[str, Any] = {"batch_size": config.batch_size, "device": str(device)}
    if name == "base":
        assert config.base is not None
        model: Any = load_model(config.base, dtype)
        lm = HFLM(pretrained=model.to(device), tokenizer=load_tokenizer(config.base), **options)
    else:
        lm = CodecLM(pretrained=config.compressed, dtype=dtype, **options)
    return lm_eval.simple_evaluate(
        model=lm,
        tasks=list(tasks),
        num_fewshot=config.num_fewshot,
        batch_size=config.batch_size,
        limit=config.limit,
        log_samples=True,
        task_manager=manager,
    )


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


def _flips(base: Any, compressed: Any) -> dict[str, dict[str, int]]:
    """How many items of each multiple-choice task changed (Dutta et al. 2024, arXiv 2407.09141)."""
    flips = {}
    for task, before in base["samples"].items():
        after = {item["doc_id"]: item for item in compressed["samples"][task]}
        if not all("acc" in item and len(item["filtered_resps"]) > 1 for item in before):
            continue
        pairs = [(item, after[item["doc_id"]]) for item in before]
        flips[task] = {
            "items": len(pairs),
            "lost": sum(p["acc"] > q["acc"] for p, q in pairs),
            "gained": sum(p["acc"] < q["acc"] for p, q in pairs),
            "changed": sum(_choice(p) != _choice(q) for p, q in pairs),
        }
    return flips


def _choice(item: dict[str, Any]) -> int:
    likelihoods = [float(response[0]) for response in item["filtered_resps"]]
    return likelihoods.index(max(likelihoods))


def _tables(report: dict[str, Any]) -> dict[str, Table]:
    tables = {"lm-eval": score_table(report)}
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
    entry_point("eval", harness)
