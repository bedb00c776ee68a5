"""Where text comes from: files and hub datasets, read as a stream of pieces in bounded memory.

A document is cut into pieces of at most `PIECE` characters, so that tokenisation runs in parallel and never holds a
whole book. Cuts lie behind a line end where there is one, else before a space, and do not depend on how the file is
read; the pieces of a document, joined, are the document. Text is taken as it stands, line ends included (a byte
order mark is not). A document of nothing but white space is no document.
"""

import glob
import hashlib
import io
import json
import lzma
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple, TextIO

from qat.errors import UserError

PIECE = 20_000
BLOCK = 1 << 18
SUFFIXES = (".txt", ".txt.xz", ".jsonl", ".jsonl.xz")
HUB = "hf://"


class Piece(NamedTuple):
    """Part of a document."""

    text: str
    starts: bool
    """It is the first piece of its document."""
    done: float
    """Share of the source read so far, 0 to 1."""


class Part(NamedTuple):
    """Part of a document, as the readers below see it."""

    text: str
    ends: bool
    """It is the last part of its document."""


@dataclass(frozen=True)
class TextFile:
    """A .txt or .jsonl file, plain or .xz."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def key(self) -> str:
        """What makes two sources the same one."""
        return str(self.path.resolve())

    def content_hash(self) -> str:
        """sha256 of the bytes on disk and of the way they are read."""
        with _naming(self.path), open(self.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        digest.update(_suffix(self.path).encode())
        return digest.hexdigest()

    def parts(self, text_key: str, separator: str) -> Iterator[tuple[Part, float]]:
        """Parts of the documents, and the share of the file read so far; see `pieces`."""
        with _naming(self.path), open(self.path, "rb") as raw:
            stream: IO[bytes] = lzma.LZMAFile(raw) if self.path.suffix == ".xz" else raw  # noqa: SIM115
            size = max(self.path.stat().st_size, 1)
            # newline="\n": nothing is translated, and nothing else ends a line
            with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n") as text:
                parts: Iterator[Part]
                if _suffix(self.path).startswith(".jsonl"):
                    parts = (part for document in self._records(text, text_key) for part in cut(document))
                else:
                    parts = cut_stream(iter(lambda: text.read(BLOCK), ""), separator)
                for part in parts:
                    yield part, raw.tell() / size

    def _records(self, lines: TextIO, text_key: str) -> Iterator[str]:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{self.path}, line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not JSON ({error.msg}, column {error.colno})") from error
            if not isinstance(record, dict):
                raise UserError(f"{where}: not a JSON object but a value of type {type(record).__name__}")
            yield _text(record, text_key, where)


@dataclass(frozen=True)
class HubDataset:
    """What `datasets.load_dataset` finds: a dataset on the hub, or a local folder. Each row is a document."""

    name: str
    config: str | None
    split: str

    def __str__(self) -> str:
        return f"{HUB}{self.name}{f':{self.config}' if self.config else ''}@{self.split}"

    @property
    def key(self) -> str:
        """What makes two sources the same one."""
        return str(self)

    @cached_property
    def _rows(self) -> Any:
        import datasets

        try:
            return datasets.load_dataset(self.name, self.config, split=self.split)
        # of its own, of the http client, of the file format: any of them means that there is no such data
        except Exception as error:
            raise UserError(f"cannot load {self}: {' '.join(str(error).split())}") from error

    def content_hash(self) -> str:
        """Fingerprint that `datasets` gives to the rows."""
        return str(self._rows._fingerprint)

    def parts(self, text_key: str, separator: str) -> Iterator[tuple[Part, float]]:
        """Parts of the documents, and the share of the rows read so far; see `pieces`."""
        columns = self._rows.column_names
        if text_key not in columns:
            raise UserError(f"{self}: no column {text_key!r}; the columns are: {', '.join(columns)}")
        for index, row in enumerate(self._rows.select_columns([text_key])):
            for part in cut(_text(row, text_key, f"{self}, row {index}")):
                yield part, index / len(self._rows)


Source = TextFile | HubDataset


def resolve(specs: Any) -> list[Source]:
    """The sources that a config value stands for.

    Args:
        specs: a string or a list of strings: a file (relative to the working folder, `~` is the home folder), a glob
            (its files in sorted order), or hf://dataset[:config][@split] (split train where none is given).

    Raises:
        UserError: nothing there, a folder, a glob that matches no file, or a kind of file that is not known.
    """
    specs = [specs] if isinstance(specs, str) else specs
    if not isinstance(specs, list | tuple) or not specs or not all(isinstance(s, str) and s for s in specs):
        raise UserError(f"text is given as a path, a glob, hf://dataset or a list of these, not as {specs!r}")
    return [source for spec in specs for source in _resolve_one(spec)]


def _resolve_one(spec: str) -> list[Source]:
    if spec.startswith(HUB):
        dataset, _, split = spec.removeprefix(HUB).partition("@")
        name, _, config = dataset.partition(":")
        if not name:
            raise UserError(f"{spec!r} names no dataset; the form is hf://dataset[:config][@split]")
        return [HubDataset(name, config or None, split or "train")]
    path = Path(spec).expanduser()
    paths = [path]
    # a name that holds a bracket may also be meant as it stands
    if glob.has_magic(spec) and not path.exists():
        paths = [p for p in map(Path, sorted(glob.glob(str(path), recursive=True))) if p.is_file()]
        if not paths:
            raise UserError(f"no file matches {path.absolute()}")
    for path in paths:
        if not path.exists():
            raise UserError(f"no such file: {path.absolute()}")
        if path.is_dir():
            raise UserError(f"{path} is a folder; name its files or a glob such as {path / '*.txt'}")
        if _suffix(path) not in SUFFIXES:
            raise UserError(f"{path} is not a kind of text that can be read: {', '.join(SUFFIXES)}")
    return [TextFile(path) for path in paths]


def pieces(source: Source, text_key: str, separator: str) -> Iterator[Piece]:
    """Stream the documents of a source.

    Args:
        source: to read.
        text_key: field of a .jsonl object or of a row that holds the document.
        separator: string between the documents of a .txt file; "" makes each file one document.

    Raises:
        UserError: the source cannot be read, is damaged, is not UTF-8, has no text under `text_key`, or none at all.
    """
    starts = empty = True
    for part, done in source.parts(text_key, separator):
        # white space alone starts no document
        if part.text and not (starts and part.text.isspace()):
            yield Piece(part.text, starts, done)
            starts = empty = False
        starts = starts or part.ends
    if empty:
        raise UserError(f"{source} holds no text")


def cut(document: str) -> Iterator[Part]:
    """Cut up a document."""
    for start, end in pairwise([0, *_cuts(document), len(document)]):
        yield Part(document[start:end], end == len(document))


def cut_stream(blocks: Iterable[str], separator: str) -> Iterator[Part]:
    """Cut up documents that come in blocks of any size, without ever holding more than a block and a piece."""
    rest = ""
    for block in blocks:
        *ended, rest = (rest + block).split(separator) if separator else [rest + block]
        for document in ended:
            yield from cut(document)
        at = 0
        # the spare characters may turn out to be half of a separator
        for end in _cuts(rest, spare=len(separator)):
            yield Part(rest[at:end], False)
            at = end
        rest = rest[at:]
    yield from cut(rest)


def _cuts(text: str, spare: int = 0) -> Iterator[int]:
    """Where to cut while more than PIECE + spare characters are left: what comes later moves no cut."""
    at = 0
    while len(text) - at > PIECE + spare:
        window = text[at : at + PIECE]
        at += window.rfind("\n") + 1 or max(window.rfind(" "), 0) or PIECE
        yield at


def _suffix(path: Path) -> str:
    return "".join(path.suffixes[-2:] if path.suffix == ".xz" else path.suffixes[-1:])


def _text(record: dict[str, Any], key: str, where: str) -> str:
    if key not in record:
        raise UserError(f"{where}: no key {key!r}; the keys are: {', '.join(record) or '(none)'}")
    text = record[key]
    if not isinstance(text, str):
        raise UserError(f"{where}: {key!r} holds no text but a value of type {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {key!r} holds half of a surrogate pair, which is no character") from error
    return text


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn what can be wrong with the bytes of a file into a UserError that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: it holds a byte 0x{error.object[error.start]:02x}") from error
    except (lzma.LZMAError, EOFError) as error:
        raise UserError(f"{path} is truncated or damaged: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
