"""The rate of a run: histograms every few steps, the weight of the rate term that follows, and the frozen end."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from qat.config import RatePrice, TrainConfig
from qat.lit.callbacks import ends_step
from qat.lit.module import QATModule
from qat.quant import freeze, settle
from qat.quant.container import overhead_bits
from qat.quant.control import BitsController, freeze_step, rate_groups
from qat.quant.rate import RateTerm

LANDED = 0.015
"""Bits a weight beside the target that are left as they are at the freeze. Training gathers weights at thresholds, and
a common factor rounds many of them anew: 0.014 bits of it took a third more divergence (docs/frontier.md)."""
TOLERANCE = 0.05
"""Bits a weight beside the target within which a state may be the best one."""


@dataclass
class Steered:
    """What is known of a group of weights; all of it is in checkpoints.

    Attributes:
        controller: holds the group to its target.
        shares: histograms by layer, the very dict of the group's RateTerm.
        overhead: bits a weight that the container adds to an ideal code, as last measured.
    """

    controller: BitsController
    shares: dict[str, Tensor] = field(default_factory=dict)
    overhead: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, and tensors on the CPU."""
        shares = {name: shares.cpu() for name, shares in self.shares.items()}
        return {"controller": self.controller.state_dict(), "shares": shares, "overhead": self.overhead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As saved."""
        self.controller.load_state_dict(state["controller"])
        self.shares, self.overhead = state["shares"], state["overhead"]

    def container(self, term: RateTerm) -> float:
        """Stored bits a weight, with the overhead measured anew."""
        bits = overhead_bits(term.modules, term.config.profile.value, term.config.panels, term.config.fit)
        term.overheads = {name: bits[name] / module.weight.numel() for name, module in term.modules.items()}
        content = term.content()
        stored = content.entropy + sum(bits.values()) / term.weights
        self.overhead = stored - content.coded
        return stored

    def update(self, step: int, term: RateTerm, kl: float | None, lr_share: float) -> dict[str, float]:
        """Take a histogram after an optimiser step into account, and move steps; gives what to log.

        Args:
            step: number of the optimiser step.
            term: of the group.
            kl: since the last histogram, in nats; None if unknown.
            lr_share: of the peak that the learning rate is at.
        """
        if self.overhead is None:
            self.container(term)
        assert self.overhead is not None
        if term.config.fit:
            term.fit()
        entropy, coded = term.refresh()
        stored = coded + self.overhead
        self.controller.update(step, stored, kl, lr_share)
        metrics = {"entropy": entropy, "stored": stored}
        if term.config.price is not RatePrice.none:
            metrics["weight"] = self.controller.weight
        if term.config.target_bits is not None:
            metrics["target"] = self.controller.target(step)
        if octaves := self.controller.octaves(lr_share):
            term.shift(octaves)
        return metrics


class RateControl(pl.Callback):
    """Steers weights of the rate term, or steps, to the targets; freezes integers for the last rate.freeze of a run.

    It acts between optimiser steps and before checkpoints are taken, so that a checkpoint holds what the next step
    needs. Every rank computes the same. Writes rate/{entropy,stored,target,weight} with each histogram; at validation
    rate/price, the surrogate, and rate/container, stored bits with what the container adds measured anew. Where
    embedding and head have a target of their own, theirs are rate/embedding/..., and the others' rate/...
    """

    def __init__(self, config: TrainConfig):
        """Args: config: of the run."""
        self.config, self.steps = config.rate, config.trainer.max_steps
        self.start_step = config.quant.start_step
        self.groups = {
            group: Steered(BitsController.fresh(own, self.steps)) for group, own in rate_groups(self.config).items()
        }
        self.frozen = False
        # sum over micro-batches since the last histogram, and their number; read by the host with the histogram
        self._kl: Tensor | float = 0.0
        self._micro_batches = 0

    def state_dict(self) -> dict[str, Any]:
        """Every group's, phase, divergence since the last histogram."""
        return {
            "groups": {group: steered.state_dict() for group, steered in self.groups.items()},
            "frozen": self.frozen,
            "kl": float(self._kl),
            "micro_batches": self._micro_batches,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As saved."""
        for group, state in state_dict["groups"].items():
            self.groups[group].load_state_dict(state)
        self.frozen, self._kl = state_dict["frozen"], state_dict["kl"]
        self._micro_batches = state_dict["micro_batches"]

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Take up where the checkpoint was, or make the first histogram."""
        assert isinstance(module, QATModule)
        for group, term in module.rate_terms.items():
            # one dict for both: what the term refreshes is what is saved
            term.shares = self.groups[group].shares
        if self.frozen:
            freeze(module.model)
        elif module.fake_quant_on and not self._measured:
            self._refresh(module)
        self._steer(module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        """After an optimiser step: measure if it is time, freeze if it is time, and keep frozen integers."""
        assert isinstance(module, QATModule)
        if module.rate_terms and self.config.weight is None:
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
        """Measure the container, and the price, which is a pass over all weights."""
        assert isinstance(module, QATModule)
        if not (module.rate_terms and module.fake_quant_on):
            return
        metrics: dict[str, float] = {}
        for group, term in module.rate_terms.items():
            metrics[f"{group}/container"] = self.groups[group].container(term)
            if term.config.price is not RatePrice.none and self._measured:
                with torch.no_grad():
                    metrics[f"{group}/price"] = float(term.bits())
        module.write_metrics(metrics)

    @property
    def _measured(self) -> bool:
        return all(steered.shares for steered in self.groups.values())

    def _refresh(self, module: QATModule) -> None:
        if not module.rate_terms:
            return
        kl = self._take_kl(module)
        metrics: dict[str, float] = {}
        for group, term in module.rate_terms.items():
            found = self.groups[group].update(module.global_step, term, kl, module.lr_share)
            metrics |= {f"{group}/{key}": value for key, value in found.items()}
        module.write_metrics(metrics)

    def _take_kl(self, module: QATModule) -> float | None:
        """Mean divergence since the last histogram; at the start that of the prepared model."""
        if not self._micro_batches:
            return module.start_kl
        kl = float(self._kl / self._micro_batches)
        self._kl, self._micro_batches = 0.0, 0
        return kl

    def _freeze(self, module: QATModule) -> None:
        for group, term in module.rate_terms.items():
            if term.config.target_bits is not None:
                measure, target = partial(self.groups[group].container, term), term.config.target_bits
                stored = measure()
                near = min(max(stored, target - LANDED), target + LANDED)
                if near != stored:
                    term.land(measure, near, self.config.land)
            if term.config.fit:
                term.fit()
        freeze(module.model)
        self.frozen = True

    def _steer(self, module: QATModule) -> None:
        """Tell the module what follows from this state."""
        controllers = {group: steered.controller for group, steered in self.groups.items()}
        priced = self.config.price is not RatePrice.none and not self.frozen and self._measured
        module.rate_weights = {group: controller.weight for group, controller in controllers.items() if priced}
        if self.config.freeze:
            module.on_target = self.frozen
        else:
            module.on_target = all(controller.near(TOLERANCE) for controller in controllers.values())
