"""Text to learn from: the standard library of the running interpreter, or a file or folder of the user's.

A corpus is two stretches of bytes, train and validation, and a digest of both. Documents are joined with a
newline, files in the order of their paths. The split is a rule, so it needs no list:

  by file    a file is validation if int(sha256(relative path)) % 10 == 0; for the standard library, and for a
             folder of at least 20 files where this puts 2 % to 30 % of the bytes into validation;
  by block   otherwise: the last tenth of the bytes, from the start of a line where there is one near.

A corpus is held in memory whole.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from heddle.errors import HeddleError, Where
from heddle.specs.named_files import (
    JSONL,
    NO_TEXT,
    PARQUET,
    STDLIB,
    choose_field,
    no_corpus,
    no_field,
    text_files,
)

# Tests and tools are not library text; encodings and pydoc_data are near-duplicate tables that leak across
# the split.
STDLIB_EXCLUDED = frozenset(
    [
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "turtledemo",
        "ensurepip",
        "encodings",
        "pydoc_data",
    ]
)
FEWEST_FILES = 20
VALIDATION_SHARE = (0.02, 0.30)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Train and validation bytes; `source` says where they are from, and which Python it was."""

    source: str
    train: bytes
    validation: bytes
    digest: str
    files: int
    split: Literal["file", "block"]

    def __repr__(self) -> str:
        sizes = f"{len(self.train):,} + {len(self.validation):,} bytes"
        return f"Corpus({self.source}: {self.files} files, {sizes}, split by {self.split}, {self.digest})"


def load_corpus(source: str, *, text_field: str = "text") -> Corpus:
    """The corpus that `data.source` names: "python-stdlib", or a text, JSONL or Parquet file or a folder.

    A file's kind is told by its suffix (.jsonl .ndjson, .parquet .pq, anything else is text); `text_field` is
    the field or column that holds the text. In a folder every file that is not hidden counts, at any depth.

    Raises `corpus-missing`, `corpus-not-readable` (with the line, for JSONL), `corpus-too-small`,
    `package-missing`.
    """
    if source == STDLIB:
        files, origin = (
            _stdlib_files(),
            f"{STDLIB} ({platform.python_implementation()} {platform.python_version()})",
        )
    else:
        files, origin = _user_files(Path(source), text_field), source
    if not sum(len(text) for _, text in files):
        raise HeddleError("corpus-too-small", f"{origin} holds no text", where=Where(path="data.source"))
    by_file = _split_by_file(files)
    if source != STDLIB and not _is_balanced(by_file, len(files)):
        train, validation = _split_by_block(b"\n".join(text for _, text in files))
        return Corpus(origin, train, validation, _digest(train, validation), len(files), "block")
    train, validation = by_file
    return Corpus(origin, train, validation, _digest(train, validation), len(files), "file")


def _stdlib_files() -> list[tuple[str, bytes]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = _walk(root, suffix=".py", excluded=STDLIB_EXCLUDED)
    if not paths:
        raise HeddleError(
            "corpus-missing",
            f"this Python has no library sources in {root}",
            where=Where(path="data.source"),
            hint="name a text file or folder as data.source",
        )
    return [(relative, _read(root / relative)) for relative in paths]


def _user_files(path: Path, text_field: str) -> list[tuple[str, bytes]]:
    if not path.exists():
        raise no_corpus(path, Where(path="data.source"))
    if not path.is_dir():
        return [(path.name, _text_of(path, text_field))]
    return [(relative, _text_of(path / relative, text_field)) for relative in _walk(path)]


def _walk(root: Path, *, suffix: str = "", excluded: frozenset[str] = frozenset()) -> list[str]:
    """Relative paths of the files below `root`, sorted; hidden ones and `excluded` folders left out."""
    return sorted(name for name in text_files(root, excluded) if name.endswith(suffix))


def _text_of(path: Path, text_field: str) -> bytes:
    suffix = path.suffix.lower()
    if suffix in JSONL:
        return b"\n".join(_jsonl_documents(path, text_field))
    if suffix in PARQUET:
        return b"\n".join(_parquet_documents(path, text_field))
    text = _read(path)
    if b"\0" in text:
        raise _unreadable(path, NO_TEXT[0], hint=NO_TEXT[1])
    return text


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, f"cannot be read: {error.strerror or error}") from error


def _jsonl_documents(path: Path, text_field: str) -> Iterator[bytes]:
    for number, line in enumerate(_read(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            column = getattr(error, "colno", None)
            raise _unreadable(
                path, f"not JSON: {getattr(error, 'msg', error)}", line=number, column=column
            ) from error
        text = row.get(text_field) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise _unreadable(path, *no_field(row, text_field), line=number)
        # A lone surrogate is legal JSON and not legal UTF-8.
        yield text.encode("utf-8", "replace")


def _parquet_documents(path: Path, text_field: str) -> Iterator[bytes]:
    try:
        # Optional and heavy: only a user with Parquet files needs it.
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise HeddleError(
            "package-missing",
            f"reading {path} needs pyarrow, which is not installed",
            where=Where(path="data.source"),
            hint="pip install 'heddle-lm[parquet]'",
        ) from error
    try:
        schema = parquet.read_schema(path)
        names = [field.name for field in schema if field.type in (arrow.string(), arrow.large_string())]
        if text_field not in names:
            raise _unreadable(path, f"no text column {text_field!r}", choose_field(names))
        column = parquet.read_table(path, columns=[text_field]).column(text_field)
    except (arrow.ArrowException, OSError) as error:
        raise _unreadable(path, f"not a Parquet file: {error}") from error
    for chunk in column.chunks:
        yield from (text.encode("utf-8", "replace") for text in chunk.to_pylist() if text is not None)


def _unreadable(
    path: Path, what: str, hint: str | None = None, *, line: int | None = None, column: int | None = None
) -> HeddleError:
    where = Where(path="data.source", file=str(path), line=line, column=column)
    return HeddleError("corpus-not-readable", what, where=where, hint=hint)


def _split_by_file(files: Sequence[tuple[str, bytes]]) -> tuple[bytes, bytes]:
    sides: tuple[list[bytes], list[bytes]] = ([], [])
    for relative, text in files:
        sides[_is_validation(relative)].append(text)
    return b"\n".join(sides[0]), b"\n".join(sides[1])


def _is_validation(relative: str) -> bool:
    return int(hashlib.sha256(relative.encode("utf-8", "surrogateescape")).hexdigest(), 16) % 10 == 0


def _is_balanced(sides: tuple[bytes, bytes], files: int) -> bool:
    train, validation = len(sides[0]), len(sides[1])
    low, high = VALIDATION_SHARE
    return files >= FEWEST_FILES and low <= validation / (train + validation) <= high


def _split_by_block(text: bytes) -> tuple[bytes, bytes]:
    cut = len(text) - len(text) // 10
    line = text.find(b"\n", cut, cut + len(text) // 50)
    if line >= 0:
        cut = line + 1
    # Never through a character of more than one byte.
    while cut < len(text) and text[cut] & 0xC0 == 0x80:
        cut += 1
    return text[:cut], text[cut:]


def _digest(train: bytes, validation: bytes) -> str:
    digest = hashlib.sha256(len(train).to_bytes(8, "big"))
    digest.update(train)
    digest.update(validation)
    return digest.hexdigest()[:16]
