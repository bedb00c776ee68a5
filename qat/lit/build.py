"""From a TrainConfig to a finished run: folder, data, module, trainer, fit.

A run folder holds checkpoints/{last,best}.ckpt, hf/ (config, generation config and tokenizer of the base model),
config.yaml, metrics.jsonl and layers.jsonl. A resumed run goes on in its own folder.
"""

import logging
import os
import warnings
from datetime import datetime
from pathlib import Path

import pytorch_lightning as pl
import torch
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf
from pytorch_lightning.strategies import ParallelStrategy
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from qat.checkpoint import read_checkpoint
from qat.cli import run_dir
from qat.config import Granularity, Hold, Profile, RatePrice, ScaleRule, TrainConfig, to_plain
from qat.errors import UserError
from qat.lit.anchor import Anchor
from qat.lit.callbacks import AtomicCheckpointIO, Checkpoints, Interrupted, TrainMetrics
from qat.lit.data import TextDataModule, accumulate_grad_batches
from qat.lit.figures import FirstDivergence, QuantStatistics
from qat.lit.loggers import build_loggers, finish_loggers, log_checkpoint
from qat.lit.module import QATModule
from qat.lit.rate import RateControl
from qat.lit.sharded import ShardedStrategy
from qat.lit.start import Start, uses_start
from qat.model import load_config, load_tokenizer
from qat.quant import distinct_weights, quantized_modules
from qat.quant.control import freeze_step

log = logging.getLogger(__name__)


def train(config: TrainConfig) -> Path:
    """Train, and give the run folder.

    Raises:
        UserError: a mistake in the config, the model or the text; most are seen before anything is written.
        KeyboardInterrupt: Ctrl-C; its message tells how to go on.
    """
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # not for the user: a name of lightning's and one of transformers' that go out of use, and advice on slow
    # datasets, which windows of a mapped file are not
    for message in (".*LeafSpec.*", ".*gradient_checkpointing_enable.*", ".*does not have many workers.*"):
        warnings.filterwarnings("ignore", message)
    check_config(config)
    run = _run_folder(config)
    trainer = build_trainer(config, run)
    model_config = load_config(config.model.path, config.model.revision)
    _check_context(config, getattr(model_config, "max_position_embeddings", None))
    tokenizer = load_tokenizer(config.model.path, config.model.revision)
    data = TextDataModule(config.data, tokenizer, config.paths.cache, config.trainer.progress_bar)
    module = QATModule(to_plain(config))
    if trainer.is_global_zero:
        _start_run(config, run, module)
        model_config.save_pretrained(run / "hf")
        tokenizer.save_pretrained(run / "hf")
    trainer.loggers = build_loggers(config, run)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=config.trainer.resume, weights_only=True)
        if trainer.is_global_zero:
            log_checkpoint(config, run)
    except Interrupted as stop:
        raise KeyboardInterrupt(str(stop)) from None
    except SystemExit:
        # how lightning ends on a second Ctrl-C
        raise KeyboardInterrupt(f"stopped at once; {run / 'checkpoints'} has the last state that was saved") from None
    finally:
        finish_loggers(config)
    if trainer.is_global_zero:
        log.info("done: %s", run)
    return run


def check_config(config: TrainConfig) -> None:
    """Raise UserError, naming the key, for values that mean nothing or do not go together."""
    loss, trainer, quant = config.loss, config.trainer, config.quant
    checks = {
        "loss.kl and loss.ce must not be negative, nor both 0": min(loss.kl, loss.ce) >= 0 < max(loss.kl, loss.ce),
        f"loss.hidden={loss.hidden}: must not be negative, and needs a teacher, loss.kl": (
            loss.hidden == 0 or (loss.hidden > 0 and loss.kl > 0)
        ),
        f"optim.anchor={config.optim.anchor}: must not be negative": config.optim.anchor >= 0,
        f"optim.decay_power={config.optim.decay_power}: must be positive, or null for half a cosine": (
            config.optim.decay_power is None or config.optim.decay_power > 0
        ),
        f"data.noise={config.data.noise}: must be from 0 to 0.5": 0 <= config.data.noise <= 0.5,
        "data.noise: needs a teacher to draw tokens from, loss.kl": not config.data.noise or loss.kl > 0,
        f"loss.temperature={loss.temperature}: must be positive": loss.temperature > 0,
        f"loss.chunk_tokens={loss.chunk_tokens}: must be at least 1": loss.chunk_tokens >= 1,
        f"trainer.precision={trainer.precision}: must be auto, 32-true or bf16-mixed": (
            trainer.precision in ("auto", "32-true", "bf16-mixed")
        ),
        f"trainer.strategy={trainer.strategy}: must be auto, ddp or fsdp": trainer.strategy in ("auto", "ddp", "fsdp"),
        "model.compile=true: not with trainer.strategy=fsdp": not config.model.compile or trainer.strategy != "fsdp",
        "quant.granularity=per_tensor: not with trainer.strategy=fsdp, which spreads rows": (
            not quant.enabled or quant.granularity is not Granularity.per_tensor or trainer.strategy != "fsdp"
        ),
        f"quant.start_step={quant.start_step}: must be below trainer.max_steps={trainer.max_steps}": (
            not quant.enabled or quant.start_step < trainer.max_steps
        ),
    }
    for key in ("max_steps", "valid_every", "checkpoint_every", "log_every"):
        value = getattr(trainer, key)
        checks[f"trainer.{key}={value}: must be at least 1"] = value >= 1
    for key, least in {"valid_prompts": 0, "prompt_tokens": 1, "new_tokens": 1}.items():
        value = getattr(config.data, key)
        checks[f"data.{key}={value}: must be at least {least}"] = value >= least
    checks |= _rate_checks(config)
    for message, fine in checks.items():
        if not fine:
            raise UserError(message)
    if trainer.resume:
        _check_resume(config)


def _check_context(config: TrainConfig, longest: int | None) -> None:
    data = config.data
    lengths = {f"data.seq_len={data.seq_len}": data.seq_len}
    if generates(config):
        together = f"data.prompt_tokens={data.prompt_tokens} and data.new_tokens={data.new_tokens}"
        lengths[together] = data.prompt_tokens + data.new_tokens
    for keys, length in lengths.items():
        if longest is not None and length > longest:
            raise UserError(f"{keys}, but the model takes at most {longest} tokens")


def generates(config: TrainConfig) -> bool:
    """Whether student and teacher generate at validation: not where one process has not the whole of them."""
    return config.loss.kl > 0 and config.data.valid_prompts > 0 and config.trainer.strategy != "fsdp"


def uses_rate(config: TrainConfig) -> bool:
    """Whether the run has a rate term, or integers that freeze."""
    rate = config.rate
    wanted = rate.price is not RatePrice.none or rate.freeze > 0 or rate.target_bits is not None
    return config.quant.enabled and wanted


def _rate_checks(config: TrainConfig) -> dict[str, bool]:
    rate, quant, steps = config.rate, config.quant, config.trainer.max_steps
    unfrozen = freeze_step(rate, steps) - quant.start_step
    learned, priced = quant.enabled and quant.scale is ScaleRule.learned, rate.price is not RatePrice.none
    return {
        f"rate.price={rate.price.value}: needs quantised layers, not quant=none": quant.enabled or not priced,
        f"rate.target_bits={rate.target_bits}: must be positive": rate.target_bits is None or rate.target_bits > 0,
        f"rate.target_bits={rate.target_bits}: needs a price, rate=table or rate=prior, or rate.hold=steps": (
            rate.target_bits is None or priced or rate.hold is Hold.steps
        ),
        f"rate.embedding_bits={rate.embedding_bits}: must be positive": (
            rate.embedding_bits is None or rate.embedding_bits > 0
        ),
        f"rate.embedding_bits={rate.embedding_bits}: needs rate.target_bits for the other layers": (
            rate.embedding_bits is None or rate.target_bits is not None
        ),
        f"rate.embedding_bits={rate.embedding_bits}: needs quant.embeddings=true or quant.lm_head=true": (
            rate.embedding_bits is None or (quant.enabled and (quant.embeddings or quant.lm_head))
        ),
        "rate.lead: needs rate.target_bits": rate.lead is None or rate.target_bits is not None,
        "rate.weight=null: needs rate.target_bits, and a teacher, loss.kl": (
            rate.weight is not None or not priced or (rate.target_bits is not None and config.loss.kl > 0)
        ),
        "rate.lead and rate.weight=null: need quant.start_step=0": (
            quant.start_step == 0 or (rate.lead is None and rate.weight is not None)
        ),
        f"rate.target_bits={rate.target_bits}: needs steps that can be steered, quant=learned": (
            rate.target_bits is None or learned
        ),
        f"rate.freeze={rate.freeze}: needs steps that do not follow the weights, quant=learned": (
            not rate.freeze or learned
        ),
        f"rate.freeze={rate.freeze}: must be from 0 to below 1, and leave time for the ramp": (
            0 <= rate.freeze < 1 and (not rate.freeze or rate.ramp + rate.freeze <= 1)
        ),
        f"rate.freeze={rate.freeze}: leaves no step after quant.start_step={quant.start_step}": (
            not rate.freeze or quant.start_step < freeze_step(rate, steps)
        ),
        f"rate.land={rate.land}: must not be negative": rate.land >= 0,
        f"rate.ramp={rate.ramp}: must be from 0 to 1": 0 <= rate.ramp <= 1,
        f"rate.weight={rate.weight}: must be positive": rate.weight is None or rate.weight > 0,
        f"rate.ema={rate.ema}: must be from 0 to below 1": 0 <= rate.ema < 1,
        f"rate.every={rate.every}: must be at least 1": rate.every >= 1,
        "rate.fit=true: needs rate.profile=fast, whose code has ranges": not rate.fit or rate.profile is Profile.fast,
        "rate.fit=true: needs rate.freeze, or weights may leave the range again, and a price or a target": (
            not rate.fit or (rate.freeze > 0 and (priced or rate.target_bits is not None))
        ),
        f"rate.every={rate.every}: more than the {unfrozen} steps in which to approach rate.target_bits": (
            rate.target_bits is None or rate.every <= unfrozen
        ),
        f"rate.panels={rate.panels}: must be at least 1": rate.panels >= 1,
        f"rate.proportional={rate.proportional}: must not be negative": rate.proportional >= 0,
        f"rate.integral={rate.integral}: must not be negative": rate.integral >= 0,
    }


def build_trainer(config: TrainConfig, run: Path) -> pl.Trainer:
    """The Trainer for `config`, without loggers.

    Raises:
        UserError: devices that are not there, a batch that cannot be dealt to them, or a sweep in which Lightning
            would start processes of its own.
    """
    trainer_config = config.trainer
    try:
        trainer = pl.Trainer(
            accelerator=trainer_config.accelerator,
            devices=trainer_config.devices,
            num_nodes=trainer_config.num_nodes,
            strategy=ShardedStrategy() if trainer_config.strategy == "fsdp" else trainer_config.strategy,
            precision=_precision(config),  # type: ignore[arg-type]
            max_steps=trainer_config.max_steps,
            max_epochs=1,
            val_check_interval=trainer_config.valid_every,
            check_val_every_n_epoch=None,
            gradient_clip_val=trainer_config.gradient_clip or None,
            deterministic=trainer_config.deterministic,
            enable_progress_bar=trainer_config.progress_bar,
            callbacks=[
                TrainMetrics(trainer_config.log_every),
                *([Start(config)] if uses_start(config) else []),
                # before what freezes weights
                *([Anchor(config)] if config.optim.anchor else []),
                # after what reads the step's figures, before what reports and saves its own
                *([RateControl(config)] if uses_rate(config) else []),
                QuantStatistics(config.logger.layers),
                *([FirstDivergence(config.data)] if generates(config) else []),
                Checkpoints(
                    run / "checkpoints",
                    trainer_config.checkpoint_every,
                    trainer_config.valid_every,
                    trainer_config.max_steps,
                ),
            ],
            plugins=[AtomicCheckpointIO()],
            default_root_dir=run,
            logger=False,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            # models keep tensors made during validation (rotary tables), and inference tensors cannot be trained with
            inference_mode=False,
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    _refuse_processes_in_sweep(trainer)
    # the number of devices is known only now; lightning counts validations in micro-batches
    accumulate = accumulate_grad_batches(config.data, trainer.world_size)
    trainer.accumulate_grad_batches = accumulate
    trainer.val_check_interval = trainer_config.valid_every * accumulate
    return trainer


def _precision(config: TrainConfig) -> str:
    if config.trainer.precision != "auto":
        return config.trainer.precision
    on_gpu = config.trainer.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def _refuse_processes_in_sweep(trainer: pl.Trainer) -> None:
    """Lightning's DDP processes would start the whole sweep again, and train ranks with different settings."""
    strategy = trainer.strategy
    launches = isinstance(strategy, ParallelStrategy) and not (
        strategy.cluster_environment is not None and strategy.cluster_environment.creates_processes_externally
    )
    if launches and HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        raise UserError(
            "a sweep (-m) cannot start the processes of several devices: use trainer.devices=1 trainer.strategy=auto, "
            "or start them from outside with torchrun or SLURM"
        )


def _check_resume(config: TrainConfig) -> None:
    """A resumed run must quantise as before and find its place in the text again."""
    path = Path(str(config.trainer.resume)).expanduser().resolve()
    config.trainer.resume = str(path)
    checkpoint = read_checkpoint(path)
    if checkpoint.step >= config.trainer.max_steps:
        raise UserError(f"{path} has done all of trainer.max_steps={config.trainer.max_steps} steps")
    saved, given = (to_plain(c) for c in (checkpoint.config, config))
    fixed = [(group, key) for group in ("quant", "rate") for key in saved[group]]
    fixed += [("data", key) for key in ("seq_len", "batch_size", "seed")]
    for group, key in fixed:
        if saved[group][key] != given[group][key]:
            raise UserError(
                f"{group}.{key}={given[group][key]}, but {path} was trained with {saved[group][key]}: a resumed run "
                "goes on with the same settings"
            )


def _run_folder(config: TrainConfig) -> Path:
    # --help and compose leave a config of hydra's without a folder behind
    if HydraConfig.initialized() and not OmegaConf.is_missing(HydraConfig.get().runtime, "output_dir"):
        return Path(HydraConfig.get().runtime.output_dir)
    fresh = Path(config.paths.output_root, config.name, datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
    return Path(run_dir(config.trainer.resume, str(fresh)))


def _start_run(config: TrainConfig, run: Path, module: QATModule) -> None:
    """Make the folder, point `latest` to it, say what will be trained."""
    (run / "hf").mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump(to_plain(config), sort_keys=False))
    # as it is: save_pretrained refuses what it finds inconsistent, also in well-known models
    if module.model.generation_config is not None:
        module.model.generation_config.to_json_file(run / "hf" / "generation_config.json")
    link = run.parent / f".latest.{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(run.name)
    os.replace(link, run.parent / "latest")
    layers = quantized_modules(module.model)
    log.info(
        "%s: %.1f M parameters, %.1f M of them quantised in %d layers; %d tokens a step; writing to %s",
        type(module.model).__name__,
        sum(p.numel() for p in module.model.parameters()) / 1e6,
        sum(layer.weight.numel() for layer in distinct_weights(layers).values()) / 1e6,
        len(layers),
        config.data.batch_size * config.data.seq_len,
        run,
    )
