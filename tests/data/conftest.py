from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

EOS = "<|endoftext|>"
SAMPLE = "the quick brown fox jumps over the lazy dog\nand then, again, the dog jumps over the fox.\n" * 20


@pytest.fixture(scope="session")
def tokenizer(byte_level_bpe: Callable[[str, list[str]], Tokenizer]) -> PreTrainedTokenizerBase:
    """GPT-2's kind: byte level, lossless, adds nothing."""
    return PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe(SAMPLE, [EOS]), eos_token=EOS)


@pytest.fixture(scope="session")
def bos_tokenizer(byte_level_bpe: Callable[[str, list[str]], Tokenizer]) -> PreTrainedTokenizerBase:
    """Llama's kind: puts <s> before every text."""
    backend = byte_level_bpe(SAMPLE, ["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"
