"""Where metrics and figures of layers go: always local files of JSON lines, and W&B unless it is disabled."""

import json
import math
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from qat.checkpoint import read_checkpoint
from qat.config import LoggerMode, TrainConfig, to_plain
from qat.errors import UserError
from qat.report import log_model

Row = dict[str, Any]
"""Figures of a layer: name, shape, weights, bits, and those of `qat.quant.weight_statistics`."""


@runtime_checkable
class LayerLogger(Protocol):
    """A logger that takes figures of layers too."""

    def log_layers(self, rows: Sequence[Row], step: int) -> None:
        """Take one row a layer."""


class StepFile:
    """JSON lines with ascending steps; of a resumed run, lines from its first step on are written anew."""

    def __init__(self, path: Path):
        """Args: path: of the file; made when the first line is written."""
        self.path = path
        self._opened = False

    def append(self, rows: Sequence[Row]) -> None:
        """Write lines, all with the same "step"."""
        if not self._opened and self.path.exists():
            self._cut(rows[0]["step"])
        self._opened = True
        with open(self.path, "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def _cut(self, step: int) -> None:
        kept = 0
        with open(self.path, "rb+") as file:
            for line in file:
                # a killed run may have left half a line
                if not line.endswith(b"\n") or json.loads(line)["step"] >= step:
                    break
                kept += len(line)
            file.truncate(kept)


class JsonlLogger(Logger):
    """One line a step: {"step": ..., metric: value, ...}, NaN and infinities as null; beside it layers.jsonl.

    Files of a resumed run are those of an unbroken one.
    """

    def __init__(self, path: Path):
        """Args: path: of the file of metrics."""
        super().__init__()
        self.path = path
        self._metrics, self._layers = StepFile(path), StepFile(path.with_name("layers.jsonl"))
        self._pending: dict[str, Any] = {}

    @property
    def name(self) -> str:
        """Kind of logger."""
        return "jsonl"

    @property
    def version(self) -> None:
        """None: the run folder says it."""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add to the line of `step`; a line is written when the next step begins, and at the end."""
        if self._pending.get("step") != step:
            self.save()
        self._pending["step"] = step
        self._pending |= {k: float(v) if math.isfinite(v) else None for k, v in metrics.items()}

    @rank_zero_only
    def log_layers(self, rows: Sequence[Row], step: int) -> None:
        """Write a line a layer: {"step": ..., "name": ..., ...}."""
        self._layers.append([{"step": step, **row} for row in rows])

    @rank_zero_only
    def save(self) -> None:
        """Write the line begun."""
        if self._pending:
            self._metrics.append([self._pending])
            self._pending = {}

    def finalize(self, status: str) -> None:
        """Write the last line."""
        self.save()


class WandbRunLogger(WandbLogger):
    """Metrics to W&B; layers as a table, and a histogram of each one's integers."""

    @rank_zero_only
    def log_layers(self, rows: Sequence[Row], step: int) -> None:
        """Log the table `layers` and the histograms `integers/<layer>`."""
        import wandb

        columns = [key for key in rows[0] if key != "counts"]
        cells = [[str(row[key]) if key == "shape" else row[key] for key in columns] for row in rows]
        figures: dict[str, Any] = {"layers": wandb.Table(columns=list(columns), data=cells)}
        for row in rows:
            counts = np.array(row["counts"])
            edges = np.arange(len(counts) + 1) - len(counts) / 2
            figures[f"integers/{row['name']}"] = wandb.Histogram(np_histogram=(counts, edges))
        self.log_metrics(figures, step)


def build_loggers(config: TrainConfig, run: Path) -> list[Logger]:
    """The loggers of a run.

    Raises:
        UserError: logger=online, and W&B cannot be reached or nobody is logged in.
    """
    loggers: list[Logger] = [JsonlLogger(run / "metrics.jsonl")]
    if config.logger.mode is LoggerMode.disabled:
        return loggers
    import wandb
    from wandb.errors import Error

    offline = config.logger.mode is LoggerMode.offline
    wandb_logger = WandbRunLogger(
        name=config.name,
        # the same after a resume, which then goes on in the same run of W&B
        id=re.sub(r"[^\w-]", "-", f"{run.parent.name}-{run.name}"),
        save_dir=run,
        # not lightning's `offline`, which sets the environment and comes too late after an earlier run of the process
        mode=config.logger.mode.value,
        settings=wandb.Settings(silent=offline, console="off"),
        project=config.logger.project,
        entity=config.logger.entity,
        group=config.logger.group,
        tags=config.logger.tags,
        config=to_plain(config),
    )
    try:
        _ = wandb_logger.experiment
    except Error as error:
        reason = " ".join(str(error).split())
        raise UserError(f"W&B cannot be used ({reason}); give logger=offline or logger=disabled") from error
    return [*loggers, wandb_logger]


def log_checkpoint(config: TrainConfig, run: Path) -> None:
    """The best checkpoint, or the last if none is best, as an artifact of the open W&B run, if the config wants it.

    Its metadata are the figures of its step, and by the names of export: `entropy`, `bits` where a container was
    measured, `ratio`, 16 to these.
    """
    if config.logger.mode is LoggerMode.disabled or not config.logger.artifact:
        return
    import wandb

    best, last = (run / "checkpoints" / f"{name}.ckpt" for name in ("best", "last"))
    path = best if best.exists() else last
    step = read_checkpoint(path).step
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    figures = next((line for line in lines if line["step"] == step), {"step": step})
    bits = figures.get("rate/container")
    summary = {"entropy": figures.get("quant/entropy"), "bits": bits, "ratio": bits and 16 / bits}
    log_model(wandb.run, config.name, run, [path, *(run / "hf").iterdir()], summary | figures)


def finish_loggers(config: TrainConfig) -> None:
    """Close the W&B run, or the next job of a sweep would write into it."""
    if config.logger.mode is not LoggerMode.disabled:
        import wandb

        wandb.finish()
