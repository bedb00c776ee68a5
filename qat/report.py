"""What every entry point leaves behind: tables on the console, a report.json that is whole or not there, W&B."""

import json
import math
import os
import platform
import re
import shlex
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from qat.config import LoggerConfig, LoggerMode
from qat.errors import UserError

T = TypeVar("T")

PACKAGES = ("codecllm", "torch", "torchao", "transformers", "triton", "numpy", "lm_eval")


def console() -> Console:
    """Standard output; 140 columns wide where it is no terminal, so that piped tables do not fold."""
    return Console(width=None if sys.stdout.isatty() else 140, highlight=False, soft_wrap=True)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table: the first column to the left, the others to the right, floats with five digits, None as a dash."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_cell, row))
    console().print(table, soft_wrap=False)


def progress_bar(enabled: bool = True) -> Progress:
    """Rich progress with what, how far, how long; on stderr, so that tables can be piped."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not enabled)


def track(items: Iterable[T], description: str, enabled: bool = True, total: int | None = None) -> Iterator[T]:
    """The items one by one, with a progress bar; `total` is their number where they cannot tell."""
    with progress_bar(enabled) as progress:
        yield from progress.track(items, total, description=description)


def size_totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sizes of a compressed model, given kind (plain if it is not compressed), weights and bytes of all its tensors."""
    coded = [row for row in rows if row["kind"] != "plain"]
    weights, everything = (sum(row["weights"] for row in some) for some in (coded, rows))
    coded_bytes, size = (sum(row["bytes"] for row in some) for some in (coded, rows))
    return {
        "compressed_weights": weights,
        "bits": round(8 * coded_bytes / max(1, weights), 4),
        "parameters": everything,
        "compressed_bytes": coded_bytes,
        "other_bytes": size - coded_bytes,
        "model_bytes": size,
        "model_bits": round(8 * size / max(1, everything), 4),
        "fp16_bytes": 2 * everything,
        "ratio": round(2 * everything / max(1, size), 4),
    }


def output_folder(path: str | Path) -> Path:
    """The folder, made if need be; called before the work, so that a mistake costs nothing.

    Raises:
        UserError: it is a file, or cannot be written to.
    """
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder output={path}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to output={path}")
    return folder


def device_slug() -> str:
    """Name of this machine's GPU as a part of file names, `h200`, or `cpu`."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).removeprefix("nvidia-")


def environment() -> dict[str, Any]:
    """Versions, hardware, command line and time of this run, as plain data."""
    import torch

    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        # as it was typed, without the place of this machine's python
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "gpus": gpus,
        "versions": found,
    }


def write_text(path: Path, text: str) -> None:
    """Write a file under another name and rename it: it is whole or not there, and an old one stays until then."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write plain data as JSON, atomically; NaN and infinities, which JSON lacks, become null."""
    write_text(path, json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_report(output: Path, job: str, data: dict[str, Any]) -> Path:
    """Put `data` and the environment under the key `job` of output/report.json; what other jobs wrote there stays.

    Returns:
        The path of the report.
    """
    path = output / "report.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        report = {}
    write_json(path, {**report, job: {**data, "environment": environment()}})
    return path


def log_to_wandb(
    config: LoggerConfig,
    output: Path,
    job: str,
    summary: dict[str, Any],
    tables: Mapping[str, tuple[Sequence[str], Iterable[Sequence[Any]]]],
    images: Mapping[str, Path] | None = None,
    model: Path | None = None,
    page: Path | None = None,
    histograms: Mapping[str, tuple[Sequence[int], Sequence[float]]] | None = None,
) -> None:
    """Log one finished job to W&B as a run of its own; does nothing, and imports nothing, when disabled.

    Args:
        config: mode, project and so on.
        output: folder the run belongs to; an offline run is kept in output/wandb.
        job: kind of run: consistency, harness, export.
        summary: numbers by name; nested dicts become `outer/inner`.
        tables: columns and rows by name.
        images: PNG files by name.
        model: a folder that the run is about, and that it leaves as it is: W&B's data are kept beside it. With
            `config.artifact` it becomes an artifact with `summary` as its metadata.
        page: an HTML file that shows all of it, logged as `report`.
        histograms: counts and the edges of their bins, one more, by name.

    Raises:
        UserError: W&B refuses (nobody is logged in, no such entity). Write the report first.
    """
    if config.mode is LoggerMode.disabled:
        return
    import wandb

    try:
        run = wandb.init(
            mode=config.mode.value,
            project=config.project,
            entity=config.entity,
            group=config.group,
            tags=config.tags,
            job_type=job,
            name=f"{output.resolve().name}-{job}",
            dir=output if model is None else model.resolve().parent,
            config={"environment": environment()},
            settings=wandb.Settings(silent=config.mode is LoggerMode.offline, console="off"),
        )
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())
        raise UserError(f"W&B cannot be used ({reason}); the report is in {output}; give logger=offline") from error
    with run:
        run.summary.update(_flat(summary))
        for name, (columns, rows) in tables.items():
            table = wandb.Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)
            run.log({name: table})
        for name, path in (images or {}).items():
            run.log({name: wandb.Image(str(path))})
        for name, (counts, edges) in (histograms or {}).items():
            run.log({name: wandb.Histogram(np_histogram=(np.array(counts), np.array(edges)))})
        if page is not None:
            run.log({"report": wandb.Html(page, inject=False)})
        if model is not None and config.artifact:
            log_model(run, model.resolve().name, model, [path for path in model.rglob("*") if path.is_file()], summary)


def log_model(run: Any, name: str, folder: Path, files: Iterable[Path], metadata: dict[str, Any]) -> None:
    """Log files to a run of W&B as an artifact of type model, named as they are in `folder`.

    They are kept with the run, so that an offline one can be sent when the originals are gone: as hard links where
    that is possible, which cost nothing but must be replaced, not written into.
    """
    import wandb

    artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]", "-", name), type="model", metadata=_finite(metadata))
    kept = Path(run.dir).resolve().parent / "artifact"
    for file in files:
        inside = file.relative_to(folder)
        copy = kept / inside
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, copy)
        except OSError:
            shutil.copyfile(file, copy)
        artifact.add_file(str(copy), name=str(inside), policy="immutable", skip_cache=True)
    run.log_artifact(artifact)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cpu_name() -> str:
    """Model of the CPU; platform.processor() is empty on most Linux systems."""
    try:
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
