"""Windows of tokens, and the order in which training sees them.

The order is a function of (seed, number of windows) alone: one permutation of all windows after the other. Optimiser
step s takes order[s * batch_size : (s + 1) * batch_size], cut into micro-batches that are dealt to the ranks in turn.
So a run can start at any step, and the number of ranks changes who computes a micro-batch, not what is in it.
"""

from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from qat.errors import UserError


class Windows(Dataset[Tensor]):
    """Neighbouring windows of a token array that do not overlap; what is left at its end is not used."""

    def __init__(self, tokens: np.ndarray, seq_len: int):
        """Args: tokens: integers [n]. seq_len: predicted tokens of a window."""
        self.tokens, self.size = tokens, seq_len + 1

    def __len__(self) -> int:
        return len(self.tokens) // self.size

    def __getitem__(self, index: int) -> Tensor:
        """int64 [seq_len + 1]."""
        window = self.tokens[index * self.size : (index + 1) * self.size]
        return torch.from_numpy(window.astype(np.int64))


def windows(tokens: np.ndarray, seq_len: int) -> Windows:
    """Dataset of int64 windows [seq_len + 1].

    Raises:
        UserError: there are fewer tokens than one window needs.
    """
    if len(tokens) < seq_len + 1:
        raise UserError(
            f"the text has {len(tokens)} tokens and one window of data.seq_len={seq_len} needs {seq_len + 1}: "
            "give more text or a smaller data.seq_len"
        )
    return Windows(tokens, seq_len)


def spread_windows(data: Windows, count: int) -> Tensor:
    """int64 [count, seq_len + 1]: windows from all over the text, the first and the last among them; all if fewer."""
    chosen = np.linspace(0, len(data) - 1, min(count, len(data))).astype(int)
    return torch.stack([data[int(index)] for index in chosen])


def spread_prompts(tokens: np.ndarray, count: int, length: int) -> Tensor:
    """int64 [count, length]: runs of tokens at evenly spaced positions, from the first to the last that fits."""
    starts = np.linspace(0, len(tokens) - length, count).astype(np.int64)
    return torch.from_numpy(np.stack([tokens[start : start + length] for start in starts]).astype(np.int64))


class RunSampler(Sampler[list[int]]):
    """Micro-batches of one rank; a single pass is the whole run.

    `len()` counts the micro-batches of the whole run wherever it starts, as Lightning's own counters do after a resume.
    """

    def __init__(
        self,
        windows: int,
        steps: int,
        batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start_step: int = 0,
    ):
        """Deal windows to ranks.

        Args:
            windows: how many there are, at least 1.
            steps: optimiser steps of the whole run.
            batch_size: windows of an optimiser step, a multiple of micro_batch_size * world_size.
            micro_batch_size: windows of a micro-batch.
            rank: who asks, of `world_size`.
            world_size: number of ranks.
            seed: of the order.
            start_step: first optimiser step to give.
        """
        assert batch_size % (micro_batch_size * world_size) == 0
        self.windows, self.steps, self.start_step, self.seed = windows, steps, start_step, seed
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return self.steps * (self.batch_size // (self.micro_batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order(self.start_step * self.batch_size)
        for _ in range(self.start_step, self.steps):
            batch = list(islice(order, self.batch_size))
            for first in range(
                self.rank * self.micro_batch_size, self.batch_size, self.world_size * self.micro_batch_size
            ):
                yield batch[first : first + self.micro_batch_size]

    def _order(self, start: int) -> Iterator[int]:
        epoch, offset = divmod(start, self.windows)
        while True:
            # sorting raw words, because shuffling may change with numpy's version and the words may not
            key = np.array([self.seed % 2**64, epoch], np.uint64)
            permutation = np.random.Philox(key=key).random_raw(self.windows).argsort(kind="stable")
            yield from permutation[offset:].tolist()
            epoch, offset = epoch + 1, 0
