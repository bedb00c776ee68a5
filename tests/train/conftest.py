"""A tiny Llama with its tokenizer, some text, and a config that trains it in a second."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qat.config import (
    DataConfig,
    LoggerConfig,
    LoggerMode,
    ModelConfig,
    OptimConfig,
    PathsConfig,
    QuantConfig,
    RateConfig,
    RatePrice,
    ScaleRule,
    TrainConfig,
    TrainerConfig,
)


def some_text(words: int, seed: int) -> str:
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(80)]
    return " ".join(draw.choice(vocabulary[: 1 + draw.randrange(80)]) for _ in range(words))


@pytest.fixture(scope="session")
def tiny(tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with model/, train.txt and valid.txt."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "train.txt").write_text(some_text(6000, seed=0))
    (folder / "valid.txt").write_text(some_text(1500, seed=0)[::-1])
    # large weights, so that rounding matters
    model = tiny_llama(hidden_size=32, intermediate_size=48, max_position_embeddings=64, tie_word_embeddings=True)
    (folder / "model").symlink_to(model)
    return folder


def config_for(tiny: Path, outputs: Path) -> TrainConfig:
    """A run of 6 steps of 2 micro-batches with all that has state: delayed start, learned scales, schedule."""
    return TrainConfig(
        name="tiny",
        model=ModelConfig(path=str(tiny / "model")),
        data=DataConfig(
            train=str(tiny / "train.txt"),
            valid=str(tiny / "valid.txt"),
            seq_len=33,
            batch_size=4,
            micro_batch_size=2,
            valid_windows=5,
        ),
        quant=QuantConfig(scale=ScaleRule.learned, init=ScaleRule.std, k=0.5, start_step=2),
        optim=OptimConfig(lr=1e-2, scale_lr=1e-2, weight_decay=0.1, warmup_steps=2),
        trainer=TrainerConfig(
            max_steps=6,
            accelerator="cpu",
            devices=1,
            valid_every=2,
            checkpoint_every=1,
            log_every=1,
            progress_bar=False,
        ),
        logger=LoggerConfig(mode=LoggerMode.disabled),
        paths=PathsConfig(output_root=str(outputs), cache=str(tiny / "cache")),
    )


@pytest.fixture
def make_config(tiny: Path, tmp_path: Path) -> Callable[[], TrainConfig]:
    """Gives a fresh `config_for` whose runs go to this test's folder."""
    return lambda: config_for(tiny, tmp_path / "outputs")


@pytest.fixture
def make_rate_config(make_config: Callable[[], TrainConfig]) -> Callable[..., TrainConfig]:
    """Makes a config of so many steps with a rate term from the first one on; keywords are RateConfig's."""

    def make(steps: int = 12, **rate: Any) -> TrainConfig:
        config = make_config()
        config.quant.start_step = 0
        config.trainer.max_steps = steps
        config.optim.scale_lr = 3e-2
        config.optim.weight_decay = 0.0
        config.rate = RateConfig(**({"price": RatePrice.table, "every": 2, "panels": 99} | rate))
        return config

    return make


@pytest.fixture(scope="session")
def unbroken(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of `config_for` from start to end: what every interrupted one has to equal."""
    from qat.lit.build import train

    return train(config_for(tiny, tmp_path_factory.mktemp("unbroken")))
