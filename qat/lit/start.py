"""What is done to the base before the first step: columns rescaled, steps set to a target, weights rounded by GPTQ."""

import time
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from qat.config import Granularity, Rounding, TrainConfig
from qat.data import spread_windows
from qat.lit.module import QATModule
from qat.model import decoder_layers
from qat.ptq import compensate
from qat.ptq.calibration import walk
from qat.quant import end_modules, grid, quantized_modules, set_fake_quant, weight_scale
from qat.quant.columns import rescale_columns
from qat.quant.container import container_overhead
from qat.quant.rate import RateTerm

BATCH = 8
"""Calibration windows at once."""
SPAN = 8.0
"""Octaves that steps may move to begin at rate.lead."""


class Start(pl.Callback):
    """Prepares a run that begins, on quant.calibration_windows of the training text; writes start/{kl,seconds}.

    It does what quant.columns, rate.lead and quant.rounding say, in this order. A resumed run finds it done.
    """

    def __init__(self, config: TrainConfig):
        """Args: config: of the run."""
        self.config = config
        self._seconds = 0.0

    @torch.no_grad()
    def setup(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        """Prepare a run that begins; already here, since a strategy may shard the model next."""
        assert isinstance(module, QATModule)
        if self.config.trainer.resume:
            return
        begin = time.perf_counter()
        quant, model, device = self.config.quant, module.model, trainer.strategy.root_device
        module.to(device)
        batches = [batch.to(device) for batch in self._windows(trainer)]
        model.eval()
        set_fake_quant(model, False)
        layers = _in_blocks(model)
        if quant.columns:
            _rescale(model, layers, batches, quant.columns, quant.granularity is not Granularity.per_tensor)
            for layer in quantized_modules(model).values():
                layer.reset_scale()
        if self.config.rate.lead is not None:
            for term in module.rate_terms.values():
                self._land(term, (term.config.target_bits or 0) + self.config.rate.lead)
        if quant.rounding is Rounding.gptq:
            _round(model, {n: m for n, m in quantized_modules(model).items() if n in layers}, batches)
        if trainer.world_size > 1:
            # kernels need not add in the same order everywhere
            for parameter in model.parameters():
                torch.distributed.broadcast(parameter.data, 0)
        model.train()
        self._seconds = time.perf_counter() - begin

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Measure what a run begins with."""
        assert isinstance(module, QATModule)
        if module.global_step or not self.config.loss.kl:
            return
        set_fake_quant(module.model, module.fake_quant_on)
        module.model.eval()
        module.start_kl = module.divergence([batch.to(module.device) for batch in self._windows(trainer)])
        module.model.train()
        module.write_metrics({"start/kl": module.start_kl, "start/seconds": self._seconds})

    def _windows(self, trainer: pl.Trainer) -> list[Tensor]:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        return list(spread_windows(data.train_windows, self.config.quant.calibration_windows).split(BATCH))

    def _land(self, term: RateTerm, target: float) -> None:
        rate = self.config.rate
        measure = partial(container_overhead, term.modules, rate.profile.value, rate.panels, rate.fit)
        term.land(lambda: term.content().entropy + measure(), target, SPAN)


def uses_start(config: TrainConfig) -> bool:
    """Whether anything is to be done, or known, before the first step."""
    quant, rate = config.quant, config.rate
    wanted = quant.columns or quant.rounding is Rounding.gptq or rate.lead is not None or rate.weight is None
    return quant.enabled and bool(wanted)


def _in_blocks(model: Any) -> dict[str, nn.Linear]:
    inside = {module for block in decoder_layers(model) for module in block.modules()}
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and m in inside}


def _rescale(model: Any, layers: dict[str, nn.Linear], batches: list[Tensor], exponent: float, rows: bool) -> None:
    squares: dict[nn.Module, Tensor] = {}
    for moments in walk(model, layers, [batch[:, :-1] for batch in batches]):
        squares |= {layers[name]: moment.diagonal() for name, moment in moments.items()}
    rescale_columns(model, squares, exponent, rows)


def _round(model: Any, layers: dict[str, Any], batches: list[Tensor]) -> None:
    """Move every weight to where GPTQ rounds it from: its integer is GPTQ's, and its place between two is kept."""
    for end in end_modules(model).values():
        # rounded to nearest: the blocks see what they will get
        end.fake_quant_enabled = True
    for moments in walk(model, layers, [batch[:, :-1] for batch in batches]):
        for name, moment in moments.items():
            layer = layers[name]
            scale = weight_scale(layer.weight, layer.quant_config, layer.log2_scale)
            steps = compensate(layer.weight, moment, scale, grid(layer.quant_config)[0])
            # the blocks behind see it rounded, training goes on from the unrounded
            layer.fake_quant_enabled = True
            layer.weight.copy_(steps * scale)
