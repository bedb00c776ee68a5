"""What several suites share: a tiny Llama whose layers fit no tile, and a byte-level tokenizer for it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

# triton reads it when it is first imported, which lm-eval and inductor do too
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from rans_kernels.format import Split, TileLayout
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
TEXT = "".join(f"the {n % 7} quick foxes jump over {n * n % 31} lazy dogs, and then they rest.\n" for n in range(150))

# matrices this small only lose by sharing
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` say why they are skipped."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


def train_bpe(text: str, special: list[str]) -> Tokenizer:
    """Byte-level BPE with 300 tokens, lossless, adds nothing to a text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text], trainer)
    return backend


@pytest.fixture(scope="session")
def byte_level_bpe() -> Callable[[str, list[str]], Tokenizer]:
    """`train_bpe`, for suites with a text of their own."""
    return train_bpe


@pytest.fixture(scope="session")
def sample_text() -> str:
    """Text on which the tiny Llama's tokenizer was trained."""
    return TEXT


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a folder with a tiny random Llama and its tokenizer; the same arguments give the same folder.

    Weights are far enough apart for greedy text to vary. Keyword arguments are LlamaConfig's.
    """
    values = {
        "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "bos_token_id": 0,
        "eos_token_id": 0,
    }  # fmt: skip
    made: dict[str, Path] = {}

    def make(**changes: Any) -> Path:
        key = repr(sorted(changes.items()))
        if key not in made:
            made[key] = folder = tmp_path_factory.mktemp("llama") / "model"
            torch.manual_seed(0)
            model = LlamaForCausalLM(LlamaConfig(**(values | changes)))
            model.to(getattr(torch, changes.get("dtype", "float32"))).save_pretrained(folder)
            PreTrainedTokenizerFast(tokenizer_object=train_bpe(TEXT, [EOS]), eos_token=EOS).save_pretrained(folder)
        return made[key]

    return make


@pytest.fixture(scope="session")
def wandb_log() -> Callable[[Path], bytes]:
    """Reads what an offline run of W&B in a folder logged, joined: pieces in blocks of 32 KiB, each behind 7 bytes."""

    def read(folder: Path) -> bytes:
        import wandb

        # its service writes after a run is finished, too
        wandb.teardown()
        (path,) = folder.glob("*.wandb")
        data, at, joined = path.read_bytes(), 7, b""
        while at < len(data):
            left = -at % 32768
            if 0 < left < 7:
                at += left
            length = int.from_bytes(data[at + 4 : at + 6], "little")
            joined += data[at + 7 : at + 7 + length]
            at += 7 + length
        return joined

    return read


@pytest.fixture(scope="session")
def float_case() -> Callable[..., tuple[TileLayout, np.ndarray]]:
    """Makes a layout of floats below 2 with windows here and there, and random bits that fill them, the top most."""

    def make(
        shape: tuple[int, int], split: Split, units: int = 2, dtype: str = "bfloat16", probability_bits: int = 12
    ) -> tuple[TileLayout, np.ndarray]:
        rng = np.random.default_rng(0)
        width = 1 << max(0, split.raw_bits - 1)
        count = min(1 << split.coded_bits - (split.raw_bits == 0), 64 // width)
        windows = np.sort(rng.choice(64 // width, count, replace=False)) * width
        window = count - np.minimum(rng.geometric(0.4, shape), count)
        high = windows[window] + rng.integers(0, width, shape) | rng.integers(0, 2, shape) << 7
        bits = (high << 8 | rng.integers(0, 256, shape)).astype(np.uint16)
        # no multiples of the width: raw bits are added, not put beside
        if width > 1:
            windows[windows > 0] -= 1
            bits[high % 128 >= width] -= 256
        return TileLayout(shape, split, units, probability_bits, dtype, tuple(windows.tolist())), bits

    return make
