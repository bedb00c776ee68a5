from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rans_kernels

from eval.consistency import consistency
from qat.config import (
    DataConfig,
    EvalConfig,
    ExportConfig,
    LoggerConfig,
    LoggerMode,
    ModelConfig,
    OptimConfig,
    PathsConfig,
    QuantConfig,
    ScaleRule,
    TrainConfig,
    TrainerConfig,
)
from qat.export import export
from qat.lit.build import train


@pytest.fixture(scope="session")
def base(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


@pytest.fixture(scope="session")
def compressed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("compressed") / "model"
    quant = QuantConfig(bits=5, embeddings=True)
    export(ExportConfig(source=str(base), output=str(output), quant=quant, progress_bar=False))
    return output


@pytest.fixture(scope="session")
def other_vocabulary(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(vocab_size=310)


@pytest.fixture(scope="session")
def checkpoint(base: Path, sample_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two steps of training with learned scales and quantised embeddings."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "train.txt").write_text(sample_text)
    (folder / "valid.txt").write_text(sample_text[::-1])
    run = train(
        TrainConfig(
            name="tiny",
            model=ModelConfig(path=str(base)),
            data=DataConfig(
                train=str(folder / "train.txt"), valid=str(folder / "valid.txt"), seq_len=33, batch_size=2,
                micro_batch_size=2, valid_windows=2,
            ),
            quant=QuantConfig(bits=4, scale=ScaleRule.learned, embeddings=True),
            optim=OptimConfig(lr=1e-2, scale_lr=1e-2, warmup_steps=1),
            trainer=TrainerConfig(max_steps=2, accelerator="cpu", devices=1, progress_bar=False),
            logger=LoggerConfig(mode=LoggerMode.disabled),
            paths=PathsConfig(output_root=str(folder / "outputs"), cache=str(folder / "cache")),
        )
    )  # fmt: skip
    return run / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="session")
def config_in(base: Path, compressed: Path, sample_text: str) -> Callable[[Path], EvalConfig]:
    """Makes a small evaluation whose files are in a folder."""

    def make(folder: Path) -> EvalConfig:
        (folder / "text.txt").write_text(sample_text)
        return EvalConfig(
            compressed=str(compressed),
            base=str(base),
            output=str(folder / "report"),
            device="cpu",
            text=str(folder / "text.txt"),
            prompts=7,
            prompt_tokens=9,
            new_tokens=13,
            seq_len=63,
            windows=5,
            batch_size=3,
            logger=LoggerConfig(mode=LoggerMode.disabled),
            paths=PathsConfig(cache=str(folder / "cache")),
        )

    return make


@pytest.fixture
def config(config_in: Callable[[Path], EvalConfig], tmp_path: Path) -> EvalConfig:
    return config_in(tmp_path)


@pytest.fixture(scope="session")
def evaluated(config_in: Callable[[Path], EvalConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What eval/consistency.py leaves behind; tests only read it."""
    config = config_in(tmp_path_factory.mktemp("evaluated"))
    consistency(config)
    return Path(config.output)


@pytest.fixture
def altered(monkeypatch: pytest.MonkeyPatch) -> None:
    """One scale of every compressed model that is loaded is not what was stored."""
    load = rans_kernels.load

    def load_altered(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        model.get_submodule("model.layers.1.mlp.down_proj").weight_scale[7] *= 1.5
        return model

    monkeypatch.setattr(rans_kernels, "load", load_altered)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(self: socket.socket, address: Any) -> None:
        # wandb talks to its own service
        if self.family != socket.AF_UNIX:
            raise AssertionError(f"connects to {address}")
        connect(self, address)

    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", refuse)
