"""What happens beside the gradient steps: checkpoints, metrics of training, figures of the integers."""

import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor

from qat.lit.module import QATModule
from qat.quant import quantized_modules, weight_statistics


def ends_step(trainer: pl.Trainer, batch_idx: int) -> bool:
    """True if the optimiser stepped after this micro-batch."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0


class TrainMetrics(pl.Callback):
    """Writes train/{loss,kl,ce}, lr and tokens/s every few steps: means over all tokens since the last time."""

    def __init__(self, every: int):
        """Args: every: optimiser steps."""
        self.every = every

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """Now and then read and write: reading waits for the GPU. Raises UserError if the loss is not finite."""
        if not ends_step(trainer, batch_idx) or trainer.global_step % self.every:
            return
        assert isinstance(module, QATModule)
        loss, kl, ce, tokens = module.take_train_sums()
        module.check_finite(loss)
        module.log("train/loss", loss / tokens, prog_bar=True, logger=False)
        seconds = time.perf_counter() - self._since
        metrics = {"train/loss": loss / tokens, "train/ce": ce / tokens}
        if module.config.loss.kl:
            metrics["train/kl"] = kl / tokens
        module.write_metrics(metrics | {"lr": module.last_lr, "tokens/s": tokens / seconds})
        self._since = time.perf_counter()

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Stop the clock."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Leave the validation out."""
        self._since += time.perf_counter() - self._paused


class QuantStatistics(pl.Callback):
    """Writes quant/entropy (bits a weight) and quant/clipped_fraction, over all quantised weights, at validation."""

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Quantise every weight once, tied ones once; in every process, since all may hold a part."""
        assert isinstance(module, QATModule)
        modules = {id(m.weight): m for m in quantized_modules(module.model).values()}
        if modules:
            sizes = [m.weight.numel() for m in modules.values()]
            figures = [weight_statistics(m) for m in modules.values()]
            module.write_metrics(
                {
                    f"quant/{key}": float(np.average([f[key] for f in figures], weights=sizes))
                    for key in ("entropy", "clipped_fraction")
                }
            )


class Interrupted(Exception):
    """Ctrl-C was pressed, and the state is safe in `checkpoint`."""

    def __init__(self, checkpoint: Path, step: int):
        """Args: checkpoint: just written. step: optimiser steps done."""
        super().__init__(f"stopped after step {step}; to go on, add trainer.resume={checkpoint} to the same command")


class Checkpoints(pl.Callback):
    """Keeps checkpoints/last.ckpt and checkpoints/best.ckpt, and saves before it gives in to Ctrl-C.

    Checkpoints are taken between optimiser steps only, and where a validation follows, after it: a resumed run neither
    repeats nor misses anything. The best one is never a state before quant.start_step, nor one that the rate's phases
    still lead away from.
    """

    def __init__(self, folder: Path, every: int, valid_every: int, max_steps: int):
        """Args: folder: to write to. every, valid_every, max_steps: optimiser steps."""
        self.folder, self.every, self.valid_every, self.max_steps = folder, every, valid_every, max_steps
        self.best = math.inf
        self._due = self._stop = False
        self._old_handler: Any = None

    @property
    def last_path(self) -> Path:
        """Where the newest state is."""
        return self.folder / "last.ckpt"

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As saved."""
        self.best = state_dict["best"]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take over Ctrl-C."""
        if threading.current_thread() is threading.main_thread():
            self._old_handler = signal.signal(signal.SIGINT, self._on_interrupt)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """Save if it is time; at the end of the run, ask for a last validation."""
        if not ends_step(trainer, batch_idx):
            return
        step = trainer.global_step
        if trainer.strategy.reduce_boolean_decision(self._stop, all=False):
            self._save(trainer, self.last_path)
            raise Interrupted(self.last_path, step)
        at_end = step >= self.max_steps
        # lightning validates when it is told to stop, but not because max_steps is reached
        trainer.should_stop = at_end
        self._due = at_end or step % self.every == 0
        if self._due and not at_end and step % self.valid_every:
            self._save(trainer, self.last_path)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Save the best, and the last if it is time."""
        assert isinstance(module, QATModule)
        value = float(trainer.callback_metrics[module.monitor])
        if value < self.best and module.fake_quant_on == module.config.quant.enabled and module.on_target:
            self.best = value
            self._save(trainer, self.folder / "best.ckpt")
        if self._due:
            self._save(trainer, self.last_path)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Give Ctrl-C back."""
        self._release()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Give Ctrl-C back."""
        self._release()

    def _save(self, trainer: pl.Trainer, path: Path) -> None:
        assert isinstance(trainer.lightning_module, QATModule)
        trainer.lightning_module.check_finite()
        trainer.save_checkpoint(path)
        # lines of the steps that the checkpoint covers
        for logger in trainer.loggers:
            logger.save()
        if path == self.last_path:
            self._due = False

    def _on_interrupt(self, *_: Any) -> None:
        if self._stop:
            raise KeyboardInterrupt
        self._stop = True
        print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    def _release(self) -> None:
        if self._old_handler is not None:
            signal.signal(signal.SIGINT, self._old_handler)
            self._old_handler = None


class AtomicCheckpointIO(TorchCheckpointIO):
    """Streams a checkpoint to a file beside its place and then renames it; Lightning's own would build it in memory."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `path`, or leave what is there."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        try:
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
