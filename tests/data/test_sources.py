import json
import lzma
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qat.data import sources
from qat.data.sources import PIECE, HubDataset, TextFile, cut, cut_stream, pieces, resolve
from qat.errors import UserError

SEP = "<|endoftext|>"


def documents(source: sources.Source, separator: str = SEP) -> list[str]:
    """What `pieces` streams, put together again."""
    texts: list[str] = []
    for piece in pieces(source, "text", separator):
        if piece.starts:
            texts.append("")
        texts[-1] += piece.text
    return texts


def write(path: Path, data: bytes) -> TextFile:
    path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)
    return TextFile(path)


@pytest.mark.parametrize("suffix", [".txt", ".txt.xz"])
@pytest.mark.parametrize(
    "text, expected",
    [
        ("one", ["one"]),
        ("one\n", ["one\n"]),
        (f"one\n{SEP}\ntwo", ["one\n", "\ntwo"]),
        (f"{SEP}one{SEP}{SEP}\n{SEP}two{SEP}\n", ["one", "two"]),
        ("a\r\nb\rc\x85d\u2028e\r\n", ["a\r\nb\rc\x85d\u2028e\r\n"]),
        ("\ufeffmarked", ["marked"]),
        ("\n" * PIECE + "one", ["one"]),
    ],
    ids=[
        "no-newline",
        "one-line",
        "two",
        "empty-ones-are-none",
        "line-ends-stay",
        "byte-order-mark",
        "blank-piece-first",
    ],
)
def test_text_file_gives_its_documents_as_they_stand(tmp_path, suffix, text, expected):
    assert documents(write(tmp_path / f"a{suffix}", text.encode())) == expected


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.xz"])
def test_jsonl_gives_a_document_a_line(tmp_path, suffix):
    texts = ["one", f"not {SEP} split", "two\r\nlines \u2028 and a 😀"]
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    assert documents(write(tmp_path / f"a{suffix}", "\r\n\n".join(lines).encode())) == texts


def test_without_separator_a_file_is_one_document(tmp_path):
    assert documents(write(tmp_path / "a.txt", f"one{SEP}two".encode()), separator="") == [f"one{SEP}two"]


def test_hub_dataset_gives_a_document_a_row(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    (tmp_path / "local").mkdir()
    write(tmp_path / "local" / "train.jsonl", b'{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    (whole,), (part,) = resolve(f"hf://{tmp_path}/local"), resolve(f"hf://{tmp_path}/local@train[:2]")
    assert documents(whole) == ["one", "two", "three"]
    assert documents(part) == ["one", "two"]
    assert whole.content_hash() == resolve(f"hf://{tmp_path}/local")[0].content_hash() != part.content_hash()
    with pytest.raises(UserError, match="no column 'body'; the columns are: text"):
        next(pieces(whole, "body", SEP))
    with pytest.raises(UserError, match="cannot load hf://.*/local@test: .*test"):
        resolve(f"hf://{tmp_path}/local@test")[0].content_hash()


@given(
    # long runs of few letters, so that documents exceed a piece and separators lie across blocks
    st.lists(st.tuples(st.sampled_from(["a", "b ", "\n", "é", "😀", "--", "-"]), st.integers(1, 40)), max_size=12),
    st.sampled_from([1, 2, 3, 63]),
)
@settings(max_examples=200, deadline=None)
def test_cuts_lose_nothing_and_do_not_depend_on_blocks(runs, block):
    text = "".join(part * count for part, count in runs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE", 10)
        whole = [part for document in text.split("--") for part in cut(document)]
        streamed = list(cut_stream([text[i : i + block] for i in range(0, len(text), block)], "--"))
    assert streamed == whole
    assert all(len(part.text) <= 10 for part in whole)
    assert "".join(part.text + "--" * part.ends for part in whole) == text + "--"


@pytest.mark.parametrize(
    "line, last",
    [("word " * 7 + "\n", "\n"), ("word " * 12_000, "d"), ("w" * 60_000, "w")],
    ids=["lines", "words", "one"],
)
def test_pieces_end_at_a_line_else_at_a_word_else_anywhere(line, last):
    parts = [part.text for part in cut(line * (60_000 // len(line)))]
    assert len(parts) == -(-60_000 // PIECE) or last != "w"
    assert all(part.endswith(last) and PIECE - 36 <= len(part) <= PIECE for part in parts[:-1])


def test_reading_holds_a_block_not_the_file(tmp_path):
    source = write(tmp_path / "a.txt", b"a line of text that is repeated\n" * (1 << 19))
    tracemalloc.start()
    assert sum(len(piece.text) for piece in pieces(source, "text", SEP)) == 1 << 24
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_share_done_grows_to_all(tmp_path):
    source = write(tmp_path / "a.txt", b"0123456\n" * 500_000)
    done = [piece.done for piece in pieces(source, "text", SEP)]
    assert done == sorted(done) and done[0] < 0.5 and done[-1] == 1


def test_specs_resolve_relative_home_glob_list_and_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ["b.txt", "a.txt", "sub/c.jsonl", "home/d.txt.xz", "[x].txt"]:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    assert list(map(str, resolve("a.txt"))) == ["a.txt"]
    assert list(map(str, resolve("[ab].txt"))) == ["a.txt", "b.txt"]
    assert list(map(str, resolve("[x].txt"))) == ["[x].txt"]
    assert list(map(str, resolve(["b.txt", "**/*.jsonl", "~/*.xz"]))) == [
        "b.txt",
        "sub/c.jsonl",
        f"{tmp_path}/home/d.txt.xz",
    ]
    assert resolve("hf://org/name") == [HubDataset("org/name", None, "train")]
    assert resolve("hf://org/name:cfg@validation[:1%]") == [HubDataset("org/name", "cfg", "validation[:1%]")]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("none.txt", "no such file: .*none.txt"),
        ("no*.txt", "no file matches .*no.*txt"),
        (".", "is a folder"),
        ("a.csv", r"a.csv is not a kind of text .*\.txt, \.txt\.xz, \.jsonl, \.jsonl\.xz"),
        ("a.xz", "a.xz is not a kind"),
        ([], "not as \\[\\]"),
        (3, "not as 3"),
        (["a.txt", None], "a list of these"),
        ("hf://@train", "names no dataset"),
    ],
)
def test_wrong_specs_say_what_is_wrong(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    Path("a.csv").touch()
    Path("a.xz").touch()
    with pytest.raises(UserError, match=message) as caught:
        resolve(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.txt", b"", "a.txt holds no text"),
        ("a.txt", f" \n{SEP}\n".encode(), "a.txt holds no text"),
        ("a.txt", "café".encode("latin1"), "a.txt is not UTF-8: it holds a byte 0xe9"),
        ("a.txt", "café".encode()[:-1], "a.txt is not UTF-8: it holds a byte 0xc3"),
        ("a.jsonl", b"\n", "a.jsonl holds no text"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "a.jsonl, line 3: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "a.jsonl, line 2: not a JSON object but a value of type list"),
        ("a.jsonl", b'{"body": "a", "id": 1}\n', "a.jsonl, line 1: no key 'text'; the keys are: body, id"),
        ("a.jsonl", b'{"text": 1}\n', "a.jsonl, line 1: 'text' holds no text but a value of type int"),
        ("a.jsonl", b'{"text": "\\ud83d"}\n', "a.jsonl, line 1: .* surrogate"),
        ("a.jsonl.xz", b'{"text": "a"}\n[1]\n', "a.jsonl.xz, line 2: not a JSON object"),
    ],
)
def test_wrong_contents_say_what_is_wrong(tmp_path, name, data, message):
    with pytest.raises(UserError, match=message):
        list(pieces(write(tmp_path / name, data), "text", SEP))


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-30], lambda b: b[:60] + b"\xff\x00" + b[62:], lambda b: b"", lambda b: b"text"]
)
def test_damaged_xz_is_named(tmp_path, damage):
    path = tmp_path / "a.txt.xz"
    path.write_bytes(damage(lzma.compress(bytes(i * i % 251 % 100 + 20 for i in range(5000)))))
    with pytest.raises(UserError, match="a.txt.xz is truncated or damaged"):
        list(pieces(TextFile(path), "text", SEP))
