"""The student in training: fake-quantised weights, the unquantised base model as teacher, nothing else of its own.

Everything that changes over a run is a function of `global_step` (learning rate, start of fake quantisation) or of
the batch index (random numbers), or is in the state of a callback (rate), so a resumed run repeats the unbroken one.
The teacher is no submodule: it is neither saved, nor wrapped by DDP, nor seen by the optimiser.
"""

import math
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers.modeling_utils import PreTrainedModel

from qat.config import OptimConfig, RatePrice, TrainConfig, from_plain
from qat.distill import Losses, distillation_loss, hidden_error, token_losses, token_sums
from qat.errors import UserError
from qat.model import check_output_logits, compile_layers, hidden_states, load_model, output_logits
from qat.noise import replace_tokens
from qat.quant import prepare, set_fake_quant
from qat.quant.control import freeze_step
from qat.quant.rate import pull_rate, rate_loss, rate_terms


class QATModule(pl.LightningModule):
    """Trains `model`, a causal language model with fake-quantised layers, towards its teacher and the text.

    Batches are int64 token ids [B, seq_len + 1].
    """

    def __init__(self, config: dict[str, Any]):
        """Load the base model and prepare it.

        Args:
            config: `to_plain` of a TrainConfig; plain data, so that checkpoints load with weights_only=True.

        Raises:
            UserError: the model cannot be loaded or quantised, or its logits cannot be had from its hidden states.
        """
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.config: TrainConfig = from_plain(TrainConfig, config)
        self.model = load_model(self.config.model.path, torch.float32, self.config.model.revision)
        check_output_logits(self.model)
        self.model.train()
        if self.config.model.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.config.quant.enabled:
            prepare(self.model, self.config.quant)
        rate = self.config.rate
        watched = self.config.quant.enabled and (rate.price is not RatePrice.none or rate.target_bits is not None)
        self.rate_terms = rate_terms(self.model, rate, self.config.model.compile) if watched else {}
        """By group of weights with a target of its own."""
        self.rate_weights: dict[str, float] = {}
        """Nats a bit by group, none without a price; for the callback RateControl to set."""
        self.on_target = True
        """Whether this state may be the best one, as far as bits go; likewise."""
        self.last_kl: Tensor | float = 0.0
        """Of the last micro-batch, in nats, on its device."""
        self.start_kl: float | None = None
        """Before the first step, if the callback Start has measured it."""
        self.teacher: list[PreTrainedModel] = []
        """None or one; in a list, lest it becomes a submodule."""
        self._losses: Losses = token_losses
        self._hidden_error = hidden_error
        self._train_sums = torch.zeros(4)
        self._valid_sums = torch.zeros(4, dtype=torch.float64)

    @property
    def fake_quant_on(self) -> bool:
        """True from optimiser step quant.start_step on."""
        return self.config.quant.enabled and self.global_step >= self.config.quant.start_step

    @property
    def monitor(self) -> str:
        """The metric, lower is better, that makes a checkpoint the best."""
        return "val/kl" if self.config.loss.kl else "val/ce"

    @property
    def last_lr(self) -> float:
        """The rate that the weights were last stepped with."""
        return self.config.optim.lr * self.lr_share

    @property
    def lr_share(self) -> float:
        """Of the peak rate, what the weights were last stepped with."""
        return self._lr_factor(self.global_step - 1)

    def setup(self, stage: str) -> None:
        """Load the teacher, in the compute dtype, unless the loss has no use for one."""
        if self.config.loss.kl and not self.teacher:
            dtype = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else torch.float32
            teacher = load_model(self.config.model.path, dtype, self.config.model.revision)
            self.teacher = [teacher.requires_grad_(False)]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Count as this run does: its max_steps say which batch is the last, its devices how many make a step.

        The learning rates of the next step, too, are those of this run's schedule, and not of the saved one.
        """
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        progress["is_last_batch"] = False
        done = checkpoint["global_step"] * self.trainer.accumulate_grad_batches
        for counts in (progress["total"], progress["current"]):
            ahead = done - counts["ready"]
            counts.update({key: count + ahead for key, count in counts.items()})
        factor = self._lr_factor(checkpoint["global_step"])
        for optimizer in checkpoint["optimizer_states"]:
            for group in optimizer["param_groups"]:
                group["lr"] = group["initial_lr"] * factor

    def on_fit_start(self) -> None:
        """Put the teacher where the student is."""
        for teacher in self.teacher:
            teacher.to(self.device)  # type: ignore[arg-type]

    def on_train_start(self) -> None:
        """Compile what is called below, in place; only now, since preparing the model looks into its blocks."""
        if self.config.model.compile:
            for model in (self.model, *self.teacher):
                compile_layers(model)
            self._losses = torch.compile(token_losses)
            self._hidden_error = torch.compile(hidden_error)

    def on_validation_start(self) -> None:
        """As `on_fit_start`, for trainer.validate; fake quantisation as at this step."""
        self.on_fit_start()
        set_fake_quant(self.model, self.fake_quant_on)
        self._valid_sums.zero_()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Set what depends on the step; random numbers (dropout) then repeat after a resume."""
        set_fake_quant(self.model, self.fake_quant_on)
        if self.config.rate.price is RatePrice.table:
            # lightning divides losses by the number of micro-batches, not this
            pull_rate(self.rate_terms, self.rate_weights, 1 / self.trainer.accumulate_grad_batches)
        seed, rank, world = self.config.trainer.seed, self.trainer.global_rank, self.trainer.world_size
        torch.manual_seed((seed << 32) + batch_idx * world + rank)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Loss of a micro-batch; its sums go to `take_train_sums`."""
        loss = self.config.loss
        student, teacher, targets = self._hidden(self._with_noise(batch), layers=loss.hidden > 0)
        result = distillation_loss(
            student[-1],
            teacher[-1] if teacher else None,
            self._student_head,
            self._teacher_head if self.teacher else None,
            targets,
            kl_weight=loss.kl,
            ce_weight=loss.ce,
            temperature=loss.temperature,
            chunk_tokens=loss.chunk_tokens,
            losses=self._losses,
        )
        if loss.hidden:
            result = result._replace(loss=result.loss + loss.hidden * self._hidden_error(student, teacher))
        means = torch.stack([*result, torch.ones_like(result.loss)]).detach()
        self._train_sums = self._train_sums.to(means.device) + means * targets.numel()
        self.last_kl = result.kl.detach()
        # no view of the sums: fsdp puts a hook on what is returned
        return result.loss.clone()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Add the gradient of a price that the backward does not: of a process' own rows, behind the reduction.

        Once a step, and where activations are gone: it is as large as the weights.
        """
        if self.rate_weights and self.config.rate.price is RatePrice.prior:
            rate_loss(self.rate_terms, self.rate_weights).backward()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Add a batch to the sums over all validation tokens; not compiled, for which once more would be needed."""
        with torch.compiler.set_stance("force_eager"):
            self._valid_sums += self._token_sums(batch)

    def on_validation_epoch_end(self) -> None:
        """Means over the tokens of all ranks: val/ce, val/ppl and, with a teacher, val/kl, val/top1.

        Raises:
            UserError: they are not finite.
        """
        kl, ce, agree, tokens = self._over_ranks(self._valid_sums)
        ce /= tokens
        self.check_finite(ce)
        metrics = {"val/ce": ce, "val/ppl": math.exp(min(ce, 700.0))}
        if self.teacher:
            metrics |= {"val/kl": kl / tokens, "val/top1": agree / tokens}
        self.log_dict(metrics, logger=False, prog_bar=True, sync_dist=True)
        self.write_metrics(metrics)

    def divergence(self, batches: list[Tensor]) -> float:
        """Mean KL from the teacher over some batches as they are computed in training, in nats."""
        sums = torch.zeros(4, dtype=torch.float64)
        with self.trainer.precision_plugin.train_step_context(), torch.no_grad():
            for batch in batches:
                sums += self._token_sums(batch)
        return float(sums[0] / sums[3])

    def take_train_sums(self) -> list[float]:
        """Sums over tokens of loss, KL and cross-entropy, and the tokens, over all ranks since the last call."""
        sums = self._over_ranks(self._train_sums)
        self._train_sums.zero_()
        return sums

    def check_finite(self, loss: float | None = None) -> None:
        """Raise UserError for a loss that is not, without one for those since `take_train_sums`."""
        loss = self._over_ranks(self._train_sums)[0] if loss is None else loss
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is not finite after step {self.global_step}: try a lower optim.lr or a longer "
                "optim.warmup_steps; checkpoints/best.ckpt, if there is one, is from before"
            )

    def write_metrics(self, metrics: dict[str, float]) -> None:
        """Hand metrics to the loggers under the optimiser step (Lightning's own counter is off by one after resume)."""
        if self.trainer.is_global_zero and not self.trainer.sanity_checking:
            for logger in self.trainer.loggers:
                logger.log_metrics(metrics, step=self.global_step)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW over groups with rates of their own; linear warm-up and decay, and the same again once frozen."""
        config = self.config.optim
        optimizer = AdamW(
            parameter_groups(self.model, config), lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps
        )
        scheduler = LambdaLR(optimizer, lambda step: self._lr_factor(step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _lr_factor(self, step: int) -> float:
        config, steps = self.config.optim, self.config.trainer.max_steps
        frozen_from = freeze_step(self.config.rate, steps) if self.config.quant.enabled else steps
        if step < frozen_from:
            return lr_factor(step, frozen_from, config)
        # a short phase that warmed up for most of its time would end at full rate
        config = replace(config, warmup_steps=min(config.warmup_steps, (steps - frozen_from) // 5))
        return config.frozen_lr_ratio * lr_factor(step - frozen_from, steps - frozen_from, config)

    def _with_noise(self, batch: Tensor) -> Tensor:
        """The batch, of whose tokens but the last some are replaced as `data.noise` says."""
        share, ids = self.config.data.noise, batch[:, :-1]
        if not share:
            return batch
        with torch.no_grad():
            hidden = hidden_states(self.teacher[0], ids)
        ids = replace_tokens(ids, hidden[-1], self._teacher_head, share, self.config.loss.chunk_tokens)
        return torch.cat([ids, batch[:, -1:]], dim=1)

    def _hidden(self, batch: Tensor, layers: bool = False) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Hidden states [B, T, D] of student and teacher, last or behind every `layers`, and targets [B, T]."""
        ids, targets = batch[:, :-1], batch[:, 1:]
        student, teacher = hidden_states(self.model, ids, layers), []
        for model in self.teacher:
            with torch.no_grad():
                teacher = hidden_states(model, ids, layers)
        return student, teacher, targets

    def _token_sums(self, batch: Tensor) -> Tensor:
        student, teacher, targets = self._hidden(batch)
        heads = self._student_head, self._teacher_head if teacher else None
        return token_sums(student[-1], teacher[-1] if teacher else None, *heads, targets, self.config.loss.chunk_tokens)

    def _student_head(self, hidden: Tensor) -> Tensor:
        return output_logits(self.model, hidden)

    def _teacher_head(self, hidden: Tensor) -> Tensor:
        return output_logits(self.teacher[0], hidden)

    def _over_ranks(self, sums: Tensor) -> list[float]:
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(sums.to(self.device, copy=True), reduce_op="sum")
        return sums.tolist()


def lr_factor(step: int, max_steps: int, config: OptimConfig) -> float:
    """Share of the peak rate for the optimiser step `step`: a ramp to 1, then a decay to `min_lr_ratio`.

    The last step, max_steps - 1, still has a rate above the final one.
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    progress = min((step - config.warmup_steps) / max(max_steps - config.warmup_steps, 1), 1.0)
    power = config.decay_power
    share = 0.5 * (1 + math.cos(math.pi * progress)) if power is None else (1 - progress) ** power
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * share


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Groups for AdamW: matrices (decay), biases (none), embeddings, norms, learned scales (own rates, none)."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices, rest, embeddings, norms, scales = [], [], [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith("weight_log2_scale"):
            scales.append(parameter)
        elif id(parameter) in tables:
            embeddings.append(parameter)
        elif parameter.ndim >= 2:
            matrices.append(parameter)
        elif name.endswith("norm.weight"):
            norms.append(parameter)
        else:
            rest.append(parameter)

    def given(rate: float | None) -> float:
        return config.lr if rate is None else rate

    groups: list[dict[str, Any]] = [
        {"name": "matrices", "params": matrices, "weight_decay": config.weight_decay},
        {"name": "rest", "params": rest, "weight_decay": 0.0},
        {"name": "embeddings", "params": embeddings, "weight_decay": 0.0, "lr": given(config.embedding_lr)},
        {"name": "norms", "params": norms, "weight_decay": 0.0, "lr": given(config.norm_lr)},
        {"name": "scales", "params": scales, "weight_decay": 0.0, "lr": config.scale_lr},
    ]
    return [group for group in groups if group["params"]]
