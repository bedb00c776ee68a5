"""The Lightning face of `qat.data`: config in, batches of token windows (int64 [B, seq_len + 1]) out.

The whole run is one Lightning epoch of max_steps * accumulate_grad_batches batches, so that progress bar, schedulers
and resume count alike. After a resume the loader starts at the optimiser step of the checkpoint
(`trainer.global_step`): the run sees the batches that an unbroken one would have, given that checkpoints are written
between optimiser steps. For Trainer(max_steps=..., accumulate_grad_batches=..., use_distributed_sampler=False).
"""

from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from qat.config import DataConfig
from qat.data import RunSampler, load_tokens, resolve, windows
from qat.errors import UserError


def accumulate_grad_batches(config: DataConfig, world_size: int) -> int:
    """Micro-batches that a device takes for one optimiser step: batch_size / (micro_batch_size * world_size).

    Raises:
        UserError: it is no whole number.
    """
    at_once = config.micro_batch_size * world_size
    if at_once < 1 or config.batch_size < 1 or config.batch_size % at_once:
        raise UserError(
            f"data.batch_size={config.batch_size} is not a multiple of "
            f"data.micro_batch_size={config.micro_batch_size} x {world_size} devices = {at_once}"
        )
    return config.batch_size // at_once


class TextDataModule(pl.LightningDataModule):
    """Training and validation windows of text files and hub datasets."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase | str,
        cache_dir: str | Path,
        progress: bool = True,
    ):
        """Check the config; no text is read yet.

        Args:
            config: what to read, and the sizes.
            tokenizer: a tokenizer, or the folder or hub name of a model that has one.
            cache_dir: of the tokens, see `load_tokens`.
            progress: show a bar while tokenising.

        Raises:
            UserError: sources that are not there or in both `train` and `valid`, sizes that make no sense.
        """
        super().__init__()
        self.config, self.cache_dir, self.progress = config, cache_dir, progress
        self._tokenizer = tokenizer
        train = {source.key for source in resolve(config.train)}
        for source in resolve(config.valid):
            if source.key in train:
                raise UserError(f"{source} is in data.train and in data.valid; validate on other text")
        for name, size in {"seq_len": config.seq_len, "valid_windows": config.valid_windows}.items():
            if size is not None and size < 1:
                raise UserError(f"data.{name}={size} must be at least 1")
        accumulate_grad_batches(config, world_size=1)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded when first asked for."""
        if isinstance(self._tokenizer, str):
            from qat.model import load_tokenizer

            self._tokenizer = load_tokenizer(self._tokenizer)
        return self._tokenizer

    @property
    def accumulate_grad_batches(self) -> int:
        """What the trainer must be told; it depends on the trainer's number of devices (1 before there is one)."""
        return accumulate_grad_batches(self.config, self.trainer.world_size if self.trainer else 1)

    def prepare_data(self) -> None:
        """Tokenise into the cache; Lightning calls it in one process of a node."""
        self._tokens(self.config.train)
        self._tokens(self.config.valid)

    def setup(self, stage: str) -> None:
        """Map the tokens; Lightning calls it in every process.

        Raises:
            UserError: less text than a window, or fewer validation windows than devices.
        """
        if stage == "fit":
            self.train_windows = windows(self._tokens(self.config.train), self.config.seq_len)
        self.valid_windows = windows(self._tokens(self.config.valid), self.config.seq_len)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """This rank's micro-batches of the whole run, from the trainer's step on."""
        trainer = self.trainer
        assert trainer is not None
        if trainer.max_steps < 1:
            raise UserError(f"trainer.max_steps={trainer.max_steps} must be at least 1")
        if trainer.accumulate_grad_batches != self.accumulate_grad_batches:
            raise ValueError(f"the trainer needs accumulate_grad_batches={self.accumulate_grad_batches}")
        sampler = RunSampler(
            windows=len(self.train_windows),
            steps=trainer.max_steps,
            batch_size=self.config.batch_size,
            micro_batch_size=self.config.micro_batch_size,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            seed=self.config.seed,
            start_step=trainer.global_step,
        )
        return ResumableLoader(self.train_windows, batch_sampler=sampler, **self._loader_options())

    def val_dataloader(self) -> DataLoader[Tensor]:
        """This rank's share of the first `valid_windows` windows: none is left out, none comes twice.

        Shares differ by one window at most, and every rank has as many batches, of nearly equal size; where
        micro-batches are of one window some have two. For an exact mean
        add up losses and tokens over ranks: `self.log(..., sync_dist=True)` averages batch sizes as integers.

        Raises:
            UserError: there are fewer windows than devices.
        """
        rank, ranks = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        count = min(len(self.valid_windows), self.config.valid_windows or len(self.valid_windows))
        if count < ranks:
            raise UserError(f"{count} validation windows are too few for {ranks} devices")
        # no more than the smallest share has windows: sharded models wait for one another in every batch
        batches = min(ceil(ceil(count / ranks) / self.config.micro_batch_size), count // ranks)
        shares = [part.tolist() for part in np.array_split(np.arange(rank, count, ranks), batches)]
        return DataLoader(self.valid_windows, batch_sampler=shares, **self._loader_options())

    def _tokens(self, sources: Any) -> np.memmap:
        config = self.config
        return load_tokens(sources, self.tokenizer, self.cache_dir, config.text_key, config.separator, self.progress)

    def _loader_options(self) -> dict[str, Any]:
        return {"num_workers": self.config.num_workers, "pin_memory": torch.cuda.is_available()}


class ResumableLoader(DataLoader[Tensor]):
    """Tells Lightning that resuming inside an epoch is safe. It has no state: the sampler starts where it should."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to do."""
