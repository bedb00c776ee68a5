"""What several suites share: a tiny Llama whose layers fit no tile, and a byte-level tokenizer for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
TEXT = "".join(f"the {n % 7} quick foxes jump over {n * n % 31} lazy dogs, and then they rest.\n" for n in range(150))


def save_tiny_llama(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Random weights far enough apart for greedy text to vary; `changes` are LlamaConfig's."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "bos_token_id": 0,
        "eos_token_id": 0,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**(values | changes))).save_pretrained(folder)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a folder with a tiny Llama and its tokenizer; the same arguments give the same folder."""
    made: dict[str, Path] = {}

    def make(seed: int = 0, **changes: Any) -> Path:
        key = repr((seed, sorted(changes.items())))
        if key not in made:
            made[key] = save_tiny_llama(tmp_path_factory.mktemp("llama") / "model", seed, **changes)
        return made[key]

    return make
