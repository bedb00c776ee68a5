"""The Lightning module: what is optimised, saved, and decided by the step alone."""

import math
from collections.abc import Callable

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from qat.config import LossConfig, OptimConfig, QuantConfig, TrainConfig, to_plain
from qat.distill import hidden_error
from qat.errors import UserError
from qat.lit.build import build_trainer, check_config
from qat.lit.data import TextDataModule
from qat.lit.module import QATModule, lr_factor, parameter_groups
from qat.model import hidden_states, load_model, load_tokenizer
from qat.quant import quantized_modules, set_fake_quant

MakeConfig = Callable[[], TrainConfig]


class Recorder(pl.Callback):
    """Keeps, for every micro-batch, the optimiser step and whether each quantised layer quantises."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, set[bool]]] = []

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: Tensor) -> None:
        assert isinstance(module, QATModule)
        switches = {m.fake_quant_enabled for m in quantized_modules(module.model).values()}
        self.seen.append((trainer.global_step, switches))


def fit(config: TrainConfig, tmp_path, *callbacks: pl.Callback) -> tuple[pl.Trainer, QATModule]:
    trainer = build_trainer(config, tmp_path)
    trainer.callbacks += callbacks
    tokenizer = load_tokenizer(config.model.path)
    module = QATModule(to_plain(config))
    trainer.fit(module, datamodule=TextDataModule(config.data, tokenizer, config.paths.cache, progress=False))
    return trainer, module


def test_fake_quantisation_starts_at_its_step_and_not_before(make_config: MakeConfig, tmp_path) -> None:
    recorder = Recorder()
    fit(make_config(), tmp_path, recorder)
    # 6 steps of 2 micro-batches, from step 2 on
    assert recorder.seen == [(step, {step >= 2}) for step in range(6) for _ in range(2)]


def test_validation_metrics_are_means_over_tokens(make_config: MakeConfig, tmp_path) -> None:
    # 5 windows in batches of 2, 2 and 1: a mean of batch means would be another number
    config = make_config()
    trainer, module = fit(config, tmp_path)
    teacher = load_model(config.model.path)
    student = module.model.eval()
    windows = torch.stack([trainer.datamodule.valid_windows[i] for i in range(5)])
    ids, targets = windows[:, :-1], windows[:, 1:]
    with torch.no_grad():
        q, p = (model(ids).logits.double().log_softmax(-1) for model in (student, teacher))
    expected = {
        "val/ce": -q.gather(-1, targets[..., None]).mean().item(),
        "val/kl": (p.exp() * (p - q)).sum(-1).mean().item(),
        "val/top1": (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
    }
    expected["val/ppl"] = math.exp(expected["val/ce"])
    metrics = {key: trainer.callback_metrics[key].item() for key in expected}
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert expected["val/kl"] > 1e-4


def test_the_teacher_is_the_base_model_and_no_part_of_the_module(make_config: MakeConfig, tmp_path) -> None:
    config = make_config()
    _, module = fit(config, tmp_path)
    base = load_model(config.model.path)
    names = set(dict(module.named_parameters()))
    scales = {f"model.{name}.weight_log2_scale" for name in quantized_modules(module.model)}
    assert names == {f"model.{name}" for name, _ in base.named_parameters()} | scales
    # after training: the student moved, the teacher did not
    (teacher,) = module.teacher
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), base.parameters(), strict=True))
    assert not torch.equal(module.model.get_input_embeddings().weight, base.get_input_embeddings().weight)


def test_cross_entropy_alone_loads_no_teacher(make_config: MakeConfig, tmp_path) -> None:
    config = make_config()
    config.loss = LossConfig(kl=0.0, ce=1.0)
    config.quant = QuantConfig(enabled=False)
    config.trainer.max_steps = 2
    trainer, module = fit(config, tmp_path)
    assert not module.teacher
    assert not quantized_modules(module.model)
    assert "val/kl" not in trainer.callback_metrics
    assert (tmp_path / "checkpoints" / "best.ckpt").exists()


def test_gradient_checkpointing_changes_no_gradient(make_config: MakeConfig, tmp_path) -> None:
    gradients = []
    for checkpointing in (False, True):
        config = make_config()
        config.model.gradient_checkpointing = checkpointing
        module = QATModule(to_plain(config))
        assert module.model.is_gradient_checkpointing == checkpointing
        assert module.model.training
        ids = torch.arange(20).reshape(2, 10)
        module.model.base_model(input_ids=ids, use_cache=False).last_hidden_state.square().sum().backward()
        gradients.append([p.grad for p in module.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_every_parameter_is_in_one_group_and_only_matrices_decay(make_config: MakeConfig) -> None:
    module = QATModule(to_plain(make_config()))
    names = {id(p): name for name, p in module.model.named_parameters()}
    optim = OptimConfig(lr=1.0, scale_lr=2.0, norm_lr=3.0, embedding_lr=0.0, weight_decay=0.1)
    groups = {g["name"]: g for g in parameter_groups(module.model, optim)}
    members = {key: {names[id(p)] for p in group["params"]} for key, group in groups.items()}
    assert sorted(n for group in members.values() for n in group) == sorted(names.values())
    assert members["scales"] == {n for n in names.values() if n.endswith("weight_log2_scale")}
    assert members["matrices"] == {n for n in names.values() if n.endswith("proj.weight")}
    assert members["norms"] == {n for n in names.values() if "norm" in n}
    assert members["embeddings"] == {n for n in names.values() if "embed" in n}
    assert [groups[key]["weight_decay"] for key in ("matrices", "embeddings", "norms", "scales")] == [0.1, 0, 0, 0]
    assert [groups[key]["lr"] for key in ("norms", "scales", "embeddings")] == [3.0, 2.0, 0.0]
    assert "lr" not in groups["matrices"]


@pytest.mark.parametrize("warmup", [0, 1, 7, 40])
@pytest.mark.parametrize("power", [None, 0.5, 2.0])
def test_the_rate_climbs_to_its_peak_and_falls_to_its_end(warmup: int, power: float | None) -> None:
    config = OptimConfig(warmup_steps=warmup, decay_power=power, min_lr_ratio=0.1)
    factors = [lr_factor(step, 30, config) for step in range(31)]
    climb, fall = factors[: warmup + 1], factors[warmup:]
    assert climb == sorted(climb)
    assert fall == sorted(fall, reverse=True)
    assert all(0 < factor <= 1 for factor in factors)
    if warmup < 30:
        assert max(factors) == factors[warmup] == 1
        assert factors[30] == pytest.approx(0.1)
        assert factors[29] > factors[30]


def test_hidden_states_are_learned_from_the_teacher_where_they_have_a_weight(make_config: MakeConfig) -> None:
    config = make_config()
    # logits alone do not say what is behind the first layer
    config.loss.hidden, config.quant.start_step = 2.0, 0
    with_it, without = QATModule(to_plain(config)), QATModule(to_plain(make_config()))
    batch = torch.randint(300, (2, 12))
    losses = []
    for module in (with_it, without):
        module.teacher = [load_model(config.model.path).requires_grad_(False)]
        set_fake_quant(module.model, True)
        losses.append(module.training_step(batch, 0))
    states = [hidden_states(model, batch[:, :-1], layers=True) for model in (with_it.model, with_it.teacher[0])]
    assert losses[0].item() - losses[1].item() == pytest.approx(2 * hidden_error(*states).item(), rel=1e-4)
    assert losses[0].item() > losses[1].item() > 0


def test_rates_are_down_at_the_freeze_and_rise_once_more(make_config: MakeConfig) -> None:
    config = make_config()
    config.trainer.max_steps, config.rate.freeze, config.optim.frozen_lr_ratio = 20, 0.25, 0.5
    module = QATModule(to_plain(config))
    (factors,) = module.configure_optimizers()["lr_scheduler"]["scheduler"].lr_lambdas[:1]
    rates = [factors(step) for step in range(20)]
    assert max(rates[:15]) == 1 and rates[14] < 0.05
    assert max(rates[15:]) == 0.5 and rates[19] < 0.25


@pytest.mark.parametrize(
    ("group", "key", "value"),
    [
        ("loss", "kl", 0.0),
        ("loss", "ce", -1.0),
        ("loss", "hidden", -1.0),
        ("optim", "decay_power", 0.0),
        ("data", "noise", 0.6),
        ("loss", "temperature", 0.0),
        ("loss", "chunk_tokens", 0),
        ("trainer", "precision", "16-true"),
        ("trainer", "strategy", "deepspeed"),
        ("trainer", "max_steps", 0),
        ("trainer", "valid_every", 0),
        ("quant", "start_step", 6),
        ("optim", "anchor", -1.0),
    ],
)
def test_a_value_without_meaning_is_named(make_config: MakeConfig, group: str, key: str, value: object) -> None:
    config = make_config()
    check_config(config)
    setattr(getattr(config, group), key, value)
    with pytest.raises(UserError, match=f"{group}.{key}"):
        check_config(config)
