"""Where metrics go: always a local file of JSON lines, and W&B unless it is disabled."""

import json
import math
import os
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from qat.config import LoggerMode, TrainConfig, to_plain
from qat.errors import UserError


class JsonlLogger(Logger):
    """Appends one line a step to a file: {"step": ..., metric: value, ...}; NaN and infinities become null.

    A resumed run appends to the same file; of a step with two lines the later one counts.
    """

    def __init__(self, path: Path):
        """Args: path: of the file; made when the first line is written."""
        super().__init__()
        self.path = path
        self._pending: dict[str, Any] = {}
        self._opened = False

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
    def save(self) -> None:
        """Write the line begun."""
        if not self._pending:
            return
        if not self._opened and self.path.exists():
            # a killed run may have left half a line
            whole = self.path.read_bytes().rpartition(b"\n")
            os.truncate(self.path, len(whole[0] + whole[1]))
        self._opened = True
        with open(self.path, "a") as file:
            file.write(json.dumps(self._pending) + "\n")
        self._pending = {}

    def finalize(self, status: str) -> None:
        """Write the last line."""
        self.save()


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
    wandb_logger = WandbLogger(
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


def finish_loggers(config: TrainConfig) -> None:
    """Close the W&B run, or the next job of a sweep would write into it."""
    if config.logger.mode is not LoggerMode.disabled:
        import wandb

        wandb.finish()
