"""Weights pulled back to where they began, so that what the training text does not need stays as it was.

Adam moves every weight by about the learning rate, whatever its gradient: over N steps, one that the training text does
not care about walks lr * sqrt(N) at random, which other texts feel. With a pull w += lr * c * (start - w) after every
step (L2-SP, arXiv 1802.01483, decoupled as AdamW's decay is) it stays within sqrt(lr / 2 c), while one whose gradient
is s times its noise still gets s / c away.
"""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from qat.config import TrainConfig
from qat.lit.callbacks import ends_step
from qat.lit.module import QATModule, parameter_groups
from qat.quant.shards import spread_as, whole


class Anchor(pl.Callback):
    """Pulls the weight matrices, by optim.anchor, after every optimiser step; keeps a bfloat16 copy of their start.

    What is frozen stays where it is: RateControl settles it later in the same step.
    """

    def __init__(self, config: TrainConfig):
        """Args: config: of the run."""
        self.config = config.optim
        self._start: list[Tensor] = []
        self._weights: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """The start, in the order of the parameters."""
        return {"start": [whole(start).cpu() for start in self._start]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As saved."""
        self._start = state_dict["start"]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Remember where a run begins; a resumed one knows."""
        assert isinstance(module, QATModule)
        groups = parameter_groups(module.model, self.config)
        weights: list[Tensor] = next((group["params"] for group in groups if group["name"] == "matrices"), [])
        if self._start:
            self._start = [spread_as(start.to(w.device), w) for start, w in zip(self._start, weights, strict=True)]
        else:
            self._start = [weight.detach().to(torch.bfloat16) for weight in weights]
        self._weights = weights

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """After an optimiser step."""
        assert isinstance(module, QATModule)
        if ends_step(trainer, batch_idx):
            share = min(1.0, module.last_lr * self.config.anchor)
            for weight, start in zip(self._weights, self._start, strict=True):
                weight.lerp_(start.to(weight.dtype), share)
