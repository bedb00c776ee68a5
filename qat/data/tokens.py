"""Tokenise once: all sources in one flat, memory-mapped array of token ids in the cache folder.

Every document gives [bos] text eos, where bos is there only if the tokenizer puts one before a text by itself (as
Llama's does and GPT-2's does not) and it is not the eos token. The cache is a .npy file named by a hash of all that its
tokens depend on: the contents of the sources, the tokenizer, the settings. It is written under another name and then
renamed, so that a file of the right name is whole, whoever else writes or dies.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from qat.data.sources import PIECE, Piece, Source, pieces, resolve
from qat.errors import UserError

FORMAT = 1
BATCH = 128  # pieces tokenised at once: at most 2.5 million characters


@dataclass(frozen=True)
class Encoder:
    """Text to token ids: a private copy of a tokenizer's backend, and the tokens between documents."""

    backend: Tokenizer
    bos: tuple[int, ...]
    eos: int
    dtype: np.dtype

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "Encoder":
        """Raises UserError if the tokenizer has no fast backend or no end-of-text token."""
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise UserError(
                f"{tokenizer.name_or_path}: the tokenizer has no tokenizer.json (a fast tokenizer is needed)"
            )
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"{tokenizer.name_or_path}: the tokenizer has no end-of-text token to put between documents; "
                "set eos_token in its tokenizer_config.json"
            )
        # calls of the tokenizer leave padding and truncation behind in its backend
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        eos, bos = int(tokenizer.eos_token_id), tokenizer.bos_token_id
        adds_bos = bos is not None and bos != eos and backend.encode("").ids[:1] == [bos]
        top = max(backend.get_vocab().values())
        dtype = np.dtype(np.uint16 if top < 1 << 16 else np.uint32)
        return cls(backend, (int(bos),) if adds_bos else (), eos, dtype)

    def tokens(self, batch: list[Piece], first: bool) -> np.ndarray:
        """Token ids of some pieces, each document that starts closing the one before it (none if `first`)."""
        ids: list[int] = []
        encoded = self.backend.encode_batch_fast([piece.text for piece in batch], add_special_tokens=False)
        for piece, encoding in zip(batch, encoded, strict=True):
            if piece.starts:
                ids += self.bos if first else (self.eos, *self.bos)
                first = False
            ids += encoding.ids
        return np.array(ids, self.dtype)


def load_tokens(
    sources: str | list[str],
    tokenizer: PreTrainedTokenizerBase,
    cache_dir: str | Path,
    text_key: str = "text",
    separator: str = "<|endoftext|>",
    progress: bool = True,
) -> np.memmap:
    """Tokens of all sources, one after the other, from the cache or through the tokenizer into it.

    Args:
        sources: as `qat.data.sources.resolve` takes them.
        tokenizer: a fast tokenizer with an end-of-text token.
        cache_dir: folder of the cache; made if need be.
        text_key: field that holds the text in .jsonl and hub datasets.
        separator: string between the documents of a .txt file; an eos token takes its place.
        progress: show a bar while tokenising.

    Returns:
        uint16 [n], or uint32 if the vocabulary needs it; read-only.

    Raises:
        UserError: sources that cannot be read, a tokenizer that will not do, a cache folder that cannot be written.
    """
    found, encoder = resolve(sources), Encoder.of(tokenizer)
    settings = {
        "format": FORMAT,
        "piece": PIECE,
        "sources": [source.content_hash() for source in found],
        "tokenizer": encoder.backend.to_str(),
        "bos": encoder.bos,
        "eos": encoder.eos,
        "text_key": text_key,
        "separator": separator,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    path = Path(cache_dir).expanduser() / f"{digest}.npy"
    tokens = _open(path)
    if tokens is None:
        _write(path, _tokenise(found, encoder, text_key, separator, progress), encoder.dtype)
        tokens = _open(path)
        assert tokens is not None
    return tokens


def _tokenise(
    sources: list[Source], encoder: Encoder, text_key: str, separator: str, progress: bool
) -> Iterator[np.ndarray]:
    columns = (
        TextColumn("tokenising {task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task("", total=len(sources))
        first = True
        for index, source in enumerate(sources):
            bar.update(task, description=str(source))
            stream = pieces(source, text_key, separator)
            while batch := list(islice(stream, BATCH)):
                yield encoder.tokens(batch, first)
                bar.update(task, completed=index + batch[-1].done)
                first = False
        yield np.array([encoder.eos], encoder.dtype)
        bar.update(task, completed=len(sources))


def _open(path: Path) -> np.memmap | None:
    """The cached tokens, or None where there are none or the file is not as long as it says."""
    try:
        tokens: Any = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return tokens if path.stat().st_size == tokens.offset + tokens.nbytes else None


def _write(path: Path, chunks: Iterator[np.ndarray], dtype: np.dtype) -> None:
    temporary = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                _write_header(file, 0, dtype)
                count = 0
                for chunk in chunks:
                    file.write(chunk.data)
                    count += len(chunk)
                # numpy pads the header for this: its size does not depend on the count
                file.seek(0)
                _write_header(file, count, dtype)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write tokens to {path.parent} (paths.cache): {error.strerror}") from error


def _write_header(file: IO[bytes], count: int, dtype: np.dtype) -> None:
    header = {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)
