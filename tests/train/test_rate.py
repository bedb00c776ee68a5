"""Runs with a rate term: bits land where they should, integers freeze, and a resumed run repeats the unbroken one."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from qat.checkpoint import load_fake_quant, read_checkpoint
from qat.cli import compose
from qat.config import Granularity, Hold, Profile, RatePrice, ScaleRule, TrainConfig
from qat.errors import UserError
from qat.export import export
from qat.lit import build
from qat.quant import quantize_weight, quantized_modules

MakeRateConfig = Callable[..., TrainConfig]


def metrics(folder: Path, key: str) -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def integers(folder: Path, name: str = "last") -> dict[str, torch.Tensor]:
    checkpoint = read_checkpoint(folder / "checkpoints" / f"{name}.ckpt")
    return {
        key: quantize_weight(
            checkpoint.weights[key.replace("_log2_scale", "")], checkpoint.config.quant, checkpoint.weights[key]
        )[0]
        for key in checkpoint.weights
        if key.endswith("_log2_scale")
    }


@pytest.mark.parametrize("price", [RatePrice.table, RatePrice.prior])
def test_a_price_lowers_the_entropy(make_rate_config: MakeRateConfig, price: RatePrice) -> None:
    entropies = {}
    for weight in (1e-9, 0.5):
        folder = build.train(make_rate_config(price=price, weight=weight))
        found = metrics(folder, "rate/entropy")
        assert set(found) == set(range(0, 13, 2))
        entropies[weight] = found[12]
        losses = metrics(folder, "train/loss")
        assert len(losses) == 12
        assert max(losses.values()) < 10
    assert entropies[0.5] < entropies[1e-9] - 0.1


@pytest.mark.parametrize("offset", [-0.4, 0.4])
def test_exported_bits_are_the_target(make_rate_config: MakeRateConfig, tmp_path: Path, offset: float) -> None:
    start = metrics(build.train(make_rate_config(2)), "rate/stored")[0]
    target = start + offset
    # a short run needs a quick controller
    rate = {"target_bits": target, "freeze": 0.2, "land": 1.0, "weight": 0.3, "proportional": 8.0, "integral": 0.3}
    config = make_rate_config(60, **rate)
    config.optim.scale_lr = 6e-2
    folder = build.train(config)
    output = tmp_path / "exported"
    export(compose("export", f"source={folder / 'checkpoints' / 'last.ckpt'}", f"output={output}"))
    bits = json.loads((output / "export_report.json").read_text())["summary"]["bits"]
    assert bits == pytest.approx(target, abs=0.05)
    # what training says of the container is what export stores
    assert metrics(folder, "rate/container")[60] == pytest.approx(bits, abs=2e-3)
    # the landing had less to do than the controller, although a container this small jumps from split to split
    assert abs(list(metrics(folder, "rate/stored").values())[-1] - target) < 0.75 * abs(offset)
    # an earlier state of lower divergence and other bits is not the best
    assert read_checkpoint(folder / "checkpoints" / "best.ckpt").step >= 48


@pytest.mark.parametrize("price", [RatePrice.none, RatePrice.table])
def test_steps_hold_the_target_with_and_without_a_price(make_rate_config: MakeRateConfig, price: RatePrice) -> None:
    config = make_rate_config(20, price=price, target_bits=10.0, lead=0.3, hold=Hold.steps, weight=None, ramp=0.5)
    config.optim.lr, config.optim.scale_lr = 1e-3, 0.0
    folder = build.train(config)
    stored, target = (metrics(folder, f"rate/{key}") for key in ("stored", "target"))
    assert stored[0] == pytest.approx(10.3, abs=0.05) and target[20] == 10
    assert all(abs(stored[step] - 10) < 0.1 for step in (14, 16, 18, 20))
    # the price is what the divergence says
    if price is not RatePrice.none:
        weight, kl, start = (metrics(folder, key) for key in ("rate/weight", "train/kl", "start/kl"))
        assert weight[0] == pytest.approx(2 * math.log(2) * start[0])
        assert weight[8] == pytest.approx(math.log(2) * (kl[7] + kl[8]), rel=1e-4)


@pytest.mark.parametrize("hold", [Hold.steps, Hold.weight])
def test_embedding_and_head_land_on_a_target_of_their_own(
    make_rate_config: MakeRateConfig, tmp_path: Path, hold: Hold
) -> None:
    rate = {"target_bits": 10.0, "embedding_bits": 6.0, "lead": 0.3, "hold": hold, "freeze": 0.2, "weight": 0.3,
            "proportional": 8.0, "integral": 0.3, "land": 1.0}  # fmt: skip
    config = make_rate_config(60 if hold is Hold.weight else 20, **rate)
    config.quant.embeddings, config.optim.scale_lr = True, 6e-2 if hold is Hold.weight else 3e-3
    folder = build.train(config)
    start = {group: metrics(folder, f"{group}/stored")[0] for group in ("rate", "rate/embedding")}
    assert start == pytest.approx({"rate": 10.3, "rate/embedding": 6.3}, abs=0.1)
    output = tmp_path / "exported"
    export(compose("export", f"source={folder / 'checkpoints' / 'last.ckpt'}", f"output={output}"))
    rows = [row for row in json.loads((output / "export_report.json").read_text())["layers"] if row["kind"] != "plain"]
    ends = ["embed" in row["name"] for row in rows]
    # the head shares the table
    assert sum(ends) == 1
    for group, wanted in {"rate": False, "rate/embedding": True}.items():
        own = [row for row, end in zip(rows, ends, strict=True) if end is wanted]
        bits = 8 * sum(row["bytes"] for row in own) / sum(row["weights"] for row in own)
        assert bits == pytest.approx(rate["embedding_bits" if wanted else "target_bits"], abs=0.05)
        assert list(metrics(folder, f"{group}/container").values())[-1] == pytest.approx(bits, abs=2e-3)


def test_weights_that_fit_have_finer_steps_at_the_same_stored_bits(
    make_rate_config: MakeRateConfig, tmp_path: Path
) -> None:
    found: dict[bool, Any] = {}
    for fit in (False, True):
        config = make_rate_config(
            30, target_bits=11.5, profile=Profile.fast, fit=fit, hold=Hold.steps, lead=0.5, freeze=0.2, weight=0.1
        )
        config.name, config.optim.lr, config.optim.scale_lr = f"fit-{fit}", 1e-3, 1e-3
        config.quant.granularity = Granularity.per_tensor
        folder = build.train(config)
        output = tmp_path / f"exported-{fit}"
        source = f"source={folder / 'checkpoints' / 'last.ckpt'}"
        export(compose("export", source, f"output={output}", "profile=fast"))
        report = json.loads((output / "export_report.json").read_text())
        assert report["summary"]["bits"] == pytest.approx(11.5, abs=0.25)
        assert metrics(folder, "rate/container")[30] == pytest.approx(report["summary"]["bits"], abs=2e-3)
        found[fit] = list(integers(folder).values()), metrics(folder, "quant/entropy")[30]
        splits = [row["split"] for row in report["layers"] if row["kind"] != "plain"]
        assert (set(splits) == {"c1r3"}) is fit
    assert all(q.min() >= -8 and q.max() <= 7 for q in found[True][0])
    # at the same stored bits steps are finer
    assert found[True][1] > found[False][1] + 0.1


@pytest.mark.parametrize("far", ["target_bits", "embedding_bits", None])
def test_a_state_is_on_target_only_if_both_groups_are(make_rate_config: MakeRateConfig, far: str | None) -> None:
    def prepared(**rate: Any) -> TrainConfig:
        config = make_rate_config(2, weight=1e-9, proportional=0.0, integral=0.0, ramp=0.0, **rate)
        config.quant.embeddings, config.optim.lr, config.optim.scale_lr = True, 0.0, 0.0
        return config

    # nothing moves: a target is met or missed from the start
    folder = build.train(prepared(target_bits=1.0, embedding_bits=1.0))
    keys = {"target_bits": "rate/stored", "embedding_bits": "rate/embedding/stored"}
    targets = {key: metrics(folder, metric)[0] + (key == far) for key, metric in keys.items()}
    folder = build.train(prepared(**targets))
    assert (folder / "checkpoints" / "best.ckpt").exists() is (far is None)


@pytest.mark.parametrize(("near", "target"), [(99.0, 10.0), (0.0, 10.0), (0.5, 2.0)])
def test_bits_near_the_target_are_left_as_they_are_at_the_freeze(
    make_rate_config: MakeRateConfig, monkeypatch: pytest.MonkeyPatch, near: float, target: float
) -> None:
    goals: list[float] = []
    monkeypatch.setattr("qat.lit.rate.LANDED", near)
    monkeypatch.setattr("qat.quant.rate.RateTerm.land", lambda self, measure, goal, octaves: goals.append(goal))
    build.train(make_rate_config(6, target_bits=target, freeze=0.5))
    # otherwise they are brought no nearer than that
    assert goals == ([] if near > 9 else [target + near])


class Watch(pl.Callback):
    """Keeps the integers that every step computes with, and the scales."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, list[torch.Tensor], list[torch.Tensor]]] = []

    def on_before_zero_grad(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        layers = quantized_modules(module.model).values()
        scales = [layer.log2_scale.detach().clone() for layer in layers]
        computed = [layer.fake_quantized_weight(torch.float32).detach() for layer in layers]
        q = [(weight / scale.exp2()).round() for weight, scale in zip(computed, scales, strict=True)]
        self.seen.append((trainer.global_step, q, scales))


def test_frozen_integers_stay_to_the_bit_while_steps_are_tuned(
    make_rate_config: MakeRateConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, original = Watch(), build.build_trainer

    def watched(config: TrainConfig, folder: Path) -> pl.Trainer:
        trainer = original(config, folder)
        trainer.callbacks.append(watch)
        return trainer

    monkeypatch.setattr(build, "build_trainer", watched)
    config = make_rate_config(12, freeze=0.5)
    # an optimiser that goes on moving weights whose gradient is 0
    config.optim.weight_decay = 1.0
    folder = build.train(config)
    frozen = [(q, scales) for step, q, scales in watch.seen if step >= 6]
    free = [q for step, q, _ in watch.seen if step < 6]
    assert len(frozen) == 6
    for q, _ in frozen:
        assert all(torch.equal(a, b) for a, b in zip(q, frozen[0][0], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(free[0], free[-1], strict=True))
    assert not torch.equal(frozen[0][1][0], frozen[-1][1][0])
    # and they are the ones that are exported
    assert all(
        torch.equal(a.double(), b.double()) for a, b in zip(integers(folder).values(), frozen[0][0], strict=False)
    )


def test_a_checkpoint_of_frozen_integers_computes_as_it_trained(make_rate_config: MakeRateConfig) -> None:
    folder = build.train(make_rate_config(6, freeze=0.5))
    model = load_fake_quant(folder / "checkpoints" / "last.ckpt")
    for layer in quantized_modules(model).values():
        before = layer.fake_quantized_weight(torch.float32)
        layer.freeze_integers()
        assert torch.equal(layer.fake_quantized_weight(torch.float32), before)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("rate.target_bits", {"target_bits": 3.0, "price": RatePrice.none}),
        ("rate.target_bits", {"target_bits": -1.0}),
        ("rate.embedding_bits", {"target_bits": 3.0, "embedding_bits": 4.0}),
        ("rate.fit", {"fit": True, "freeze": 0.1}),
        ("rate.fit", {"fit": True, "profile": Profile.fast}),
        ("rate.fit", {"fit": True, "profile": Profile.fast, "freeze": 0.1, "price": RatePrice.none}),
        ("rate.lead", {"lead": 0.5}),
        ("rate.weight", {"weight": None}),
        ("rate.freeze", {"freeze": 1.0}),
        ("rate.freeze", {"freeze": 0.5, "ramp": 0.6}),
        ("rate.ramp", {"ramp": 1.5}),
        ("rate.weight", {"weight": 0.0}),
        ("rate.land", {"land": -1.0}),
        ("rate.ema", {"ema": 1.0}),
        ("rate.every", {"every": 0}),
        ("rate.every=13", {"target_bits": 3.0, "every": 13}),
        ("rate.every=7", {"target_bits": 3.0, "every": 7, "freeze": 0.5}),
        ("rate.panels", {"panels": 0}),
        ("rate.integral", {"integral": -1.0}),
        ("rate.proportional", {"proportional": -1.0}),
    ],
)
def test_a_value_without_meaning_is_named(make_rate_config: MakeRateConfig, key: str, values: dict[str, Any]) -> None:
    build.check_config(make_rate_config())
    with pytest.raises(UserError, match=key):
        build.check_config(make_rate_config(**values))


@pytest.mark.parametrize(
    ("bits", "message"),
    [({"embedding_bits": 4.0}, "rate.target_bits"), ({"target_bits": 3.0, "embedding_bits": 0.0}, "positive")],
)
def test_a_target_of_embedding_and_head_says_what_it_needs(
    make_rate_config: MakeRateConfig, bits: dict[str, float], message: str
) -> None:
    config = make_rate_config(**bits)
    config.quant.embeddings = True
    with pytest.raises(UserError, match=f"rate.embedding_bits=.*{message}"):
        build.check_config(config)


@pytest.mark.parametrize("rate", [{"target_bits": 3.0}, {"freeze": 0.2}])
def test_what_needs_learned_steps_says_so(make_rate_config: MakeRateConfig, rate: dict[str, Any]) -> None:
    config = make_rate_config(**rate)
    config.quant.scale = ScaleRule.std
    with pytest.raises(UserError, match=f"rate.{next(iter(rate))}.*quant=learned"):
        build.check_config(config)


def test_a_run_cannot_be_resumed_with_another_rate(make_rate_config: MakeRateConfig) -> None:
    folder = build.train(make_rate_config(4))
    config = make_rate_config(6, weight=0.5)
    config.trainer.resume = str(folder / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match=r"rate\.weight"):
        build.check_config(config)
