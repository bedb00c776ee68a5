"""What validation reports beside its losses: figures of the integers, and how long teacher and student say the same."""

from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from qat.config import DataConfig
from qat.data import spread_prompts
from qat.divergence import first_divergence
from qat.errors import UserError
from qat.inference import generate_greedy
from qat.lit.loggers import LayerLogger, Row
from qat.lit.module import QATModule
from qat.quant import distinct_weights, quantized_modules, weight_statistics
from qat.quant.modules import QATModule as QuantLayer


class QuantStatistics(pl.Callback):
    """Writes quant/entropy (bits a weight) and quant/clipped_fraction, over all quantised weights, at validation.

    And figures of every layer to the loggers that take them: stored bits too, where RateControl has just measured them.
    """

    def __init__(self, layers: bool):
        """Args: layers: whether figures of every layer are wanted."""
        self.layers = layers

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Quantise every weight once, tied ones once; in every process, since all may hold a part."""
        assert isinstance(module, QATModule)
        layers = distinct_weights(quantized_modules(module.model))
        overheads = {name: bits for term in module.rate_terms.values() for name, bits in term.overheads.items()}
        rows = [_layer_row(name, layer, overheads.get(name)) for name, layer in layers.items()]
        if not trainer.is_global_zero or not rows:
            return
        sizes = [row["weights"] for row in rows]
        keys = ("entropy", "clipped_fraction")
        module.write_metrics({f"quant/{k}": float(np.average([row[k] for row in rows], weights=sizes)) for k in keys})
        for logger in trainer.loggers:
            if self.layers and isinstance(logger, LayerLogger):
                logger.log_layers(rows, module.global_step)


def _layer_row(name: str, layer: QuantLayer, overhead: float | None) -> Row:
    figures = weight_statistics(layer)
    bits = None if overhead is None else figures["entropy"] + overhead
    return {"name": name, "shape": list(layer.weight.shape), "weights": layer.weight.numel(), "bits": bits, **figures}


class FirstDivergence(pl.Callback):
    """Writes val/first_divergence and val/identical: how long student and teacher generate the same text.

    Both go on greedily from data.valid_prompts of the validation text, at validation. The first is the mean number of
    tokens before one that differs, data.new_tokens where none does; the second is the share of such prompts.
    """

    def __init__(self, config: DataConfig):
        """Args: config: number and lengths."""
        self.config = config
        self._expected: Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Raise UserError if the text is too short."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        tokens, wanted = data.valid_windows.tokens, self.config.prompt_tokens
        if len(tokens) < wanted:
            raise UserError(f"data.prompt_tokens={wanted}, but the validation text has {len(tokens)} tokens")
        self._prompts = spread_prompts(tokens, self.config.valid_prompts, wanted)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Generate on rank zero; the teacher once."""
        assert isinstance(module, QATModule)
        if not trainer.is_global_zero or not module.teacher:
            return
        new_tokens = self.config.new_tokens
        # compiled for windows, the network would be compiled anew for every length
        with trainer.precision_plugin.val_step_context(), torch.compiler.set_stance("force_eager"):
            if self._expected is None:
                self._expected, _ = generate_greedy(module.teacher[0], self._prompts, new_tokens)
            tokens, _ = generate_greedy(module.model, self._prompts, new_tokens)
        first = first_divergence(self._expected, tokens).double()
        identical = (first == new_tokens).double()
        module.write_metrics({"val/first_divergence": float(first.mean()), "val/identical": float(identical.mean())})
