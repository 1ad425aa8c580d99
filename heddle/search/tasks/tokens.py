"""A corpus as token ids: its bytes, or what the user's tokenizer makes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from heddle.errors import HeddleError, Where
from heddle.search.tasks.corpus import Corpus
from heddle.specs.named_files import BYTES, no_tokenizer, tokenizer_file

BYTE_VALUES = 256
# Characters that are tokenised in one piece; pieces end at a newline and are worked on in parallel.
PIECE = 1 << 16

Ids = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of both splits; `validation_bytes[i]` counts the bytes that validation token i stands for.

    Shapes:  train: [N];  validation, validation_bytes: [M]. The ids have the smallest integer type that holds
    them.
    """

    train: Ids
    validation: Ids
    validation_bytes: Ids
    digest: str


def tokens_of(corpus: Corpus, tokenizer: str, vocab_size: int) -> Tokens:
    """The corpus in the ids of `tokenizer`: "bytes", or a tokenizer.json or a folder that holds one.

    Raises `tokenizer-mismatch` if an id does not fit into `vocab_size`, `file-not-found`,
    `file-not-readable`.
    """
    if tokenizer == BYTES:
        _check_vocabulary(tokenizer, BYTE_VALUES, vocab_size)
        validation = np.frombuffer(corpus.validation, dtype=np.uint8)
        train = np.frombuffer(corpus.train, dtype=np.uint8)
        return Tokens(train, validation, np.ones_like(validation), corpus.digest)
    path = _tokenizer_file(Path(tokenizer))
    encoder = _read_tokenizer(path)
    _check_vocabulary(tokenizer, encoder.get_vocab_size(with_added_tokens=True), vocab_size)
    train, _ = _encode(encoder, corpus.train, vocab_size)
    validation, sizes = _encode(encoder, corpus.validation, vocab_size)
    digest = hashlib.sha256(corpus.digest.encode() + path.read_bytes()).hexdigest()[:16]
    return Tokens(train, validation, sizes, digest)


def _tokenizer_file(path: Path) -> Path:
    file = tokenizer_file(path)
    if not file.is_file():
        raise no_tokenizer(path, Where(path="tokenizer"))
    return file


def _read_tokenizer(path: Path) -> Any:
    # 0.1 s that the byte tokenizer needs not.
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    # The Rust side raises bare Exception.
    except Exception as error:
        where = Where(path="tokenizer", file=str(path))
        raise HeddleError("file-not-readable", f"not a tokenizer.json: {error}", where=where) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_vocabulary(tokenizer: str, ids: int, vocab_size: int) -> None:
    if ids > vocab_size:
        raise HeddleError(
            "tokenizer-mismatch",
            f"the tokenizer {tokenizer!r} has {ids} ids, the model's vocabulary is {vocab_size}",
            where=Where(path="model.vocab_size"),
            hint=f"set model.vocab_size to {ids} or more",
        )


def _encode(tokenizer: Any, text: bytes, vocab_size: int) -> tuple[Ids, Ids]:
    """Ids, and the bytes each stands for: those from the end of the token before it to its own end."""
    kind = np.min_scalar_type(vocab_size - 1)
    ids: list[Ids] = []
    sizes: list[Ids] = []
    pieces = list(_pieces(text.decode("utf-8", "replace")))
    for piece, encoding in zip(pieces, tokenizer.encode_batch(pieces, add_special_tokens=False), strict=True):
        ends = np.maximum.accumulate(np.array([0, *(end for _, end in encoding.offsets)], dtype=np.int64))
        ids.append(np.array(encoding.ids, dtype=kind))
        sizes.append(np.diff(_byte_offsets(piece)[ends]).astype(np.uint16))
    return np.concatenate(ids or [np.zeros(0, kind)]), np.concatenate(sizes or [np.zeros(0, np.uint16)])


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        line = text.find("\n", start + PIECE)
        end = len(text) if line < 0 else line + 1
        yield text[start:end]
        start = end


def _byte_offsets(text: str) -> npt.NDArray[np.int64]:
    """Where each character begins in the UTF-8 bytes of `text`; one more entry holds their number."""
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(widths)])
