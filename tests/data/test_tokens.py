import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from qat.data import load_tokens, tokens
from qat.errors import UserError

EOS = "<|endoftext|>"


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "a.txt"
    path.write_text(f"the fox\n{EOS}\nthe lazy dog")
    return str(path)


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """The texts that went through a tokenizer."""
    texts: list[str] = []
    real = tokens.Encoder.tokens

    def record(self, batch, first):
        texts.extend(piece.text for piece in batch)
        return real(self, batch, first)

    monkeypatch.setattr(tokens.Encoder, "tokens", record)
    return texts


def load(source, tokenizer, cache, **options) -> np.memmap:
    return load_tokens(source, tokenizer, cache, progress=False, **options)


@given(
    runs=st.lists(
        st.tuples(st.sampled_from(["the ", "fox\n", "\r\n", "é", "日本", "👩\u200d👧", "\t", "x"]), st.integers(1, 30)),
        max_size=20,
    )
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_byte_level_tokens_decode_to_the_text(runs, tokenizer, tmp_path):
    written = f"start {''.join(part * count for part, count in runs)}{EOS}end"
    (tmp_path / "a.txt").write_text(written, newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qat.data.sources.PIECE", 10)
        patch.setattr(tokens, "BATCH", 3)
        ids = load(str(tmp_path / "a.txt"), tokenizer, tmp_path / "cache")
    assert tokenizer.decode(ids) == written + EOS


def test_a_line_longer_than_three_pieces_keeps_its_text(tokenizer, tmp_path, cache):
    written = "".join(chr(0x3B1 + i % 24) for i in range(60_000))
    (tmp_path / "a.txt").write_text(written, encoding="utf-8")
    assert tokenizer.decode(load(str(tmp_path / "a.txt"), tokenizer, cache)) == written + EOS


def test_eos_ends_every_document_of_every_source(tokenizer, tmp_path, cache):
    (tmp_path / "a.txt").write_text(f"one{EOS}two{EOS}\n")
    (tmp_path / "b.jsonl").write_text('{"body": "three"}\n{"body": "four"}')
    ids = load([str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl")], tokenizer, cache, text_key="body")
    assert tokenizer.decode(ids) == EOS.join(["one", "two", "three", "four", ""])
    assert np.count_nonzero(ids == tokenizer.eos_token_id) == 4


def test_other_separators_become_eos(tokenizer, tmp_path, cache):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n\n\n")
    ids = load(str(tmp_path / "a.txt"), tokenizer, cache, separator="\n\n")
    assert tokenizer.decode(ids) == f"one{EOS}two{EOS}"


def test_bos_starts_documents_but_not_pieces_where_the_tokenizer_adds_one(bos_tokenizer, tmp_path, cache, monkeypatch):
    monkeypatch.setattr("qat.data.sources.PIECE", 8)
    (tmp_path / "a.txt").write_text(f"the fox\nthe lazy dog\n{EOS}dog")
    assert bos_tokenizer.decode(load(str(tmp_path / "a.txt"), bos_tokenizer, cache)) == (
        "<s>the fox\nthe lazy dog\n</s><s>dog</s>"
    )


def test_bos_that_is_eos_comes_once(bos_tokenizer, text, cache):
    same = PreTrainedTokenizerFast(tokenizer_object=bos_tokenizer.backend_tokenizer, bos_token="<s>", eos_token="<s>")
    assert same.decode(load(text, same, cache)) == "the fox\n<s>\nthe lazy dog<s>"


@pytest.mark.parametrize("top, dtype", [(65_535, np.uint16), (65_536, np.uint32)])
def test_dtype_is_the_narrowest_that_holds_the_vocabulary(top, dtype, text, cache):
    vocab = {"the": 0, "fox": 1, "</s>": top}
    narrow = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab, "fox")), eos_token="</s>")
    ids = load(text, narrow, cache)
    assert ids.dtype == dtype and ids[-1] == top


def test_second_load_maps_the_cache_and_tokenises_nothing(tokenizer, text, cache, encoded):
    first = load(text, tokenizer, cache)
    assert encoded == ["the fox\n", "\nthe lazy dog"]
    # padding and truncation left behind by another use of the tokenizer change nothing
    tokenizer.backend_tokenizer.enable_truncation(1)
    tokenizer.backend_tokenizer.enable_padding()
    second = load(text, tokenizer, cache)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    assert len(encoded) == 2
    assert isinstance(second, np.memmap) and not second.flags.writeable
    assert np.array_equal(first, second)


def test_cache_depends_on_contents_tokenizer_and_settings_not_on_names(
    tokenizer, bos_tokenizer, text, cache, encoded, tmp_path
):
    load(text, tokenizer, cache)
    moved = Path(text).rename(tmp_path / "b.txt")
    load(str(moved), tokenizer, cache)
    assert len(list(cache.iterdir())) == 1
    load(str(moved), bos_tokenizer, cache)
    load(str(moved), tokenizer, cache, separator="\n")
    moved.write_text("changed")
    load(str(moved), tokenizer, cache)
    assert len(list(cache.iterdir())) == 4
    assert encoded[-1] == "changed"


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b[:40], lambda b: b"", lambda b: b"x" * 99]
)
def test_cache_of_the_wrong_length_is_built_again(tokenizer, text, cache, encoded, damage):
    whole = np.array(load(text, tokenizer, cache))
    (path,) = cache.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    assert np.array_equal(load(text, tokenizer, cache), whole)
    assert len(encoded) == 4


@pytest.mark.parametrize(
    "error, raised, message",
    [
        (
            OSError(28, "No space left on device"),
            UserError,
            "cannot write tokens to .*paths.cache.*: No space left on device",
        ),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
    ids=["disk-full", "ctrl-c"],
)
@pytest.mark.parametrize("when", ["write_array_header_1_0", "fsync", "replace"])
def test_interrupted_write_leaves_nothing(tokenizer, text, cache, monkeypatch, error, raised, message, when):
    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format if when.startswith("write") else os, when, fail)
        with pytest.raises(raised, match=message):
            load(text, tokenizer, cache)
    assert list(cache.iterdir()) == []
    assert tokenizer.decode(load(text, tokenizer, cache)) == f"the fox\n{EOS}\nthe lazy dog{EOS}"


def test_bad_source_leaves_no_cache(tokenizer, text, cache, tmp_path):
    (tmp_path / "b.txt").write_bytes(b"fine so far\n" * 100_000 + b"\xff")
    with pytest.raises(UserError, match="b.txt is not UTF-8"):
        load([text, str(tmp_path / "b.txt")], tokenizer, cache)
    assert list(cache.iterdir()) == []


def test_two_writers_at_once_agree(tokenizer, tmp_path, cache):
    (tmp_path / "a.txt").write_text("the fox jumps over the dog\n" * 20_000)
    with ThreadPoolExecutor(2) as pool:
        a, b = pool.map(lambda _: load(str(tmp_path / "a.txt"), tokenizer, cache), range(2))
    assert np.array_equal(a, b) and len(list(cache.iterdir())) == 1


def test_cache_folder_that_cannot_be_is_named(tokenizer, text, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write tokens to .*file"):
        load(text, tokenizer, tmp_path / "file" / "cache")


def test_tokenizer_without_eos_is_refused(tokenizer, text, cache):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(UserError, match="no end-of-text token .* set eos_token"):
        load(text, bare, cache)
