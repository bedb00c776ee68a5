from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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

EOS = "<|endoftext|>"
TEXT = "".join(f"the {n % 7} quick foxes jump over {n * n % 31} lazy dogs, and then they rest.\n" for n in range(150))


def save_model(folder: Path, vocab: int = 300, seed: int = 0) -> Path:
    """A random Llama whose layers fit no tile; its logits are far apart enough for greedy text to vary."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small only lose by sharing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def compressed(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("compressed") / "model"
    quant = QuantConfig(bits=5, embeddings=True)
    export(ExportConfig(source=str(base), output=str(output), quant=quant, progress_bar=False))
    return output


@pytest.fixture(scope="session")
def other_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("other"), vocab=310)


@pytest.fixture(scope="session")
def checkpoint(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two steps of training with learned scales and quantised embeddings."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "train.txt").write_text(TEXT)
    (folder / "valid.txt").write_text(TEXT[::-1])
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


@pytest.fixture
def config(base: Path, compressed: Path, tmp_path: Path) -> EvalConfig:
    (tmp_path / "text.txt").write_text(TEXT)
    return EvalConfig(
        compressed=str(compressed),
        base=str(base),
        output=str(tmp_path / "report"),
        device="cpu",
        text=str(tmp_path / "text.txt"),
        prompts=7,
        prompt_tokens=9,
        new_tokens=13,
        seq_len=63,
        windows=5,
        batch_size=3,
        logger=LoggerConfig(mode=LoggerMode.disabled),
        paths=PathsConfig(cache=str(tmp_path / "cache")),
    )


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
