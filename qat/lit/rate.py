"""The rate of a run: histograms every few steps, the weight of the rate term that follows, and the frozen end."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from qat.config import RatePrice, TrainConfig
from qat.lit.callbacks import ends_step
from qat.lit.module import QATModule
from qat.quant import freeze, settle
from qat.quant.container import overhead_bits
from qat.quant.control import BitsController, freeze_step
from qat.quant.rate import RateTerm

TOLERANCE = 0.05
"""Bits a weight beside the target within which a state may be the best one."""


class RateControl(pl.Callback):
    """Steers module.rate_weight, or all steps, to rate.target_bits; freezes integers for the last rate.freeze of a run.

    It acts between optimiser steps and before checkpoints are taken, so that a checkpoint holds what the next step
    needs. Every rank computes the same. Writes rate/{price,entropy,stored,target,weight} with each histogram, and at
    validation rate/container: stored bits with what the container adds measured anew.
    """

    def __init__(self, config: TrainConfig):
        """Args: config: of the run."""
        self.config, self.steps = config.rate, config.trainer.max_steps
        self.start_step = config.quant.start_step
        self.controller = BitsController.fresh(self.config, self.steps)
        self.overhead: float | None = None
        self.frozen = False
        self._shares: dict[str, Tensor] = {}
        # sum over micro-batches since the last histogram, and their number; read by the host with the histogram
        self._kl: Tensor | float = 0.0
        self._micro_batches = 0

    def state_dict(self) -> dict[str, Any]:
        """Controller, histograms, overhead, phase, divergence since the last histogram."""
        return {
            "controller": self.controller.state_dict(),
            "shares": {name: shares.cpu() for name, shares in self._shares.items()},
            "overhead": self.overhead,
            "frozen": self.frozen,
            "kl": float(self._kl),
            "micro_batches": self._micro_batches,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As saved."""
        self.controller.load_state_dict(state_dict["controller"])
        self._shares, self.overhead, self.frozen = (state_dict[key] for key in ("shares", "overhead", "frozen"))
        self._kl, self._micro_batches = state_dict["kl"], state_dict["micro_batches"]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take up where the checkpoint was, or make the first histogram."""
        assert isinstance(module, QATModule)
        if module.rate_term is not None:
            # one dict for both: what the term refreshes is what is saved
            module.rate_term.shares = self._shares
        if self.frozen:
            freeze(module.model)
        elif module.fake_quant_on and not self._shares:
            self._refresh(module)
        self._steer(module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """After an optimiser step: measure if it is time, freeze if it is time, and keep frozen integers."""
        assert isinstance(module, QATModule)
        if module.rate_term is not None and self.config.weight is None:
            # over all processes at once: a checkpoint holds the state of the first
            self._kl = trainer.strategy.reduce(module.last_kl, reduce_op="mean") + self._kl
            self._micro_batches += 1
        if not ends_step(trainer, batch_idx):
            return
        step = module.global_step
        if self.frozen:
            settle(module.model)
        elif step >= freeze_step(self.config, self.steps) and self.config.freeze:
            self._freeze(module)
        elif step >= self.start_step and (step - self.start_step) % self.config.every == 0:
            self._refresh(module)
        self._steer(module)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Measure the container."""
        assert isinstance(module, QATModule)
        if module.rate_term is not None and module.fake_quant_on:
            module.write_metrics({"rate/container": self._container(module.rate_term)})

    def _refresh(self, module: QATModule) -> None:
        term = module.rate_term
        if term is None:
            return
        if self.overhead is None:
            self._container(term)
        assert self.overhead is not None
        entropy = term.refresh()
        stored = entropy + self.overhead
        self.controller.update(module.global_step, stored, self._take_kl(module))
        metrics = {"rate/entropy": entropy, "rate/stored": stored}
        if self.config.price is not RatePrice.none:
            with torch.no_grad():
                metrics |= {"rate/price": float(term.bits()), "rate/weight": self.controller.weight}
        if self.config.target_bits is not None:
            metrics["rate/target"] = self.controller.target(module.global_step)
        module.write_metrics(metrics)
        if octaves := self.controller.octaves(module.lr_share):
            term.shift(octaves)

    def _take_kl(self, module: QATModule) -> float | None:
        """Mean divergence since the last histogram; at the start that of the prepared model."""
        if not self._micro_batches:
            return module.start_kl
        kl = float(self._kl / self._micro_batches)
        self._kl, self._micro_batches = 0.0, 0
        return kl

    def _freeze(self, module: QATModule) -> None:
        if module.rate_term is not None and self.config.target_bits is not None:
            term = module.rate_term
            term.land(lambda: self._container(term), self.config.target_bits, self.config.land)
        freeze(module.model)
        self.frozen = True

    def _steer(self, module: QATModule) -> None:
        """Tell the module what follows from this state."""
        config, bits = self.config, self.controller.bits
        priced = config.price is not RatePrice.none and not self.frozen and self._shares
        module.rate_weight = self.controller.weight if priced else 0.0
        if config.freeze:
            module.on_target = self.frozen
        elif config.target_bits is not None:
            module.on_target = bits is not None and abs(bits - config.target_bits) <= TOLERANCE

    def _container(self, term: RateTerm) -> float:
        """Stored bits a weight, with the overhead measured anew."""
        bits = overhead_bits(term.modules, self.config.profile.value, self.config.panels)
        term.overheads = {name: bits[name] / module.weight.numel() for name, module in term.modules.items()}
        self.overhead = sum(bits.values()) / term.weights
        return term.entropy() + self.overhead
