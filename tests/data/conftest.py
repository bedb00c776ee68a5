from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
SAMPLE = "the quick brown fox jumps over the lazy dog\nand then, again, the dog jumps over the fox.\n" * 20


def byte_level_bpe(special: list[str]) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [SAMPLE],
        trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return backend


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """GPT-2's kind: byte level, lossless, adds nothing."""
    return PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe([EOS]), eos_token=EOS)


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerBase:
    """Llama's kind: puts <s> before every text."""
    backend = byte_level_bpe(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"
