"""The files that `data` and `tokenizer` of a spec name: whether they are there and begin as what they are called.

Their first bytes are read and no more, so that `heddle check` takes as long for a corpus of terabytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from heddle.errors import HeddleError, Where
from heddle.specs.recipe import DataSpec
from heddle.specs.spec import Spec

# What `data.source` names besides files: the library sources of the Python that runs.
STDLIB = "python-stdlib"
BYTES = "bytes"
JSONL = frozenset({".jsonl", ".ndjson"})
PARQUET = frozenset({".parquet", ".pq"})
# Tasks that read `data`.
OF_TEXT = ("text", "masked_bytes")
FIRST_BYTES = 1 << 16
# What is wrong with a file that holds bytes of 0, and a hint.
NO_TEXT = "this is not text: it holds zero bytes", "leave such files out of the folder"
PARQUET_BEGINS = b"PAR1"


def file_problems(
    spec: Spec, where: Callable[[str], Where], *, is_trained: bool = False
) -> list[HeddleError]:
    """What is wrong with the files that a search of `spec` would read, each at the field that names it, by place.

    `is_trained`: `heddle train` reads `data` whatever the tasks of the search are.
    """
    found = list[HeddleError]()
    tasks = None if spec.search is None or is_trained else spec.search.tasks
    if tasks is None or any(task.kind in OF_TEXT for task in tasks):
        found += _data_problems(spec.data, where("data.source"))
    if spec.tokenizer != BYTES:
        found += _tokenizer_problems(Path(spec.tokenizer), where("tokenizer"))
    return sorted(found, key=lambda one: (one.where.line or 0, one.where.column or 0))


def no_corpus(path: Path, where: Where) -> HeddleError:
    """There is nothing at `path`."""
    hint = f"data.source is {STDLIB!r} or the path of a text, JSONL or Parquet file or folder"
    told = f"no file or folder {path} (looked in {Path.cwd()})"
    return HeddleError("corpus-missing", told, where=where, hint=hint)


def no_tokenizer(path: Path, where: Where) -> HeddleError:
    """There is no tokenizer at `path`."""
    hint = 'tokenizer is "bytes", a tokenizer.json, or a folder that holds one'
    return HeddleError("file-not-found", f"no tokenizer at {path}", where=where, hint=hint)


def tokenizer_file(path: Path) -> Path:
    """The file of the tokenizer that is called `path`: itself, or the one in that folder."""
    return path / "tokenizer.json" if path.is_dir() else path


def text_files(root: Path, excluded: frozenset[str] = frozenset()) -> Iterator[str]:
    """Relative paths of the files of a corpus folder, at any depth, a folder's own first; hidden ones and `excluded` folders
    are left out."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in excluded and not name.startswith("."))
        relative = Path(folder).relative_to(root)
        yield from ((relative / name).as_posix() for name in sorted(names) if not name.startswith("."))


def _data_problems(data: DataSpec, place: Where) -> Iterator[HeddleError]:
    if data.source == STDLIB:
        return
    first = path = Path(data.source)
    try:
        if not path.exists():
            yield no_corpus(path, place)
            return
        if path.is_dir():
            name = next(text_files(path), None)
            if name is None:
                yield HeddleError("corpus-too-small", f"{path} holds no file", where=place)
                return
            first = path / name
        wrong = _wrong_beginning(first, data.text_field)
    except OSError as error:
        wrong = f"cannot be read: {error.strerror or error}", None
    if wrong is not None:
        yield HeddleError("corpus-not-readable", f"{first}: {wrong[0]}", where=place, hint=wrong[1])


def _wrong_beginning(path: Path, text_field: str) -> tuple[str, str | None] | None:
    """What the first bytes of a file tell that it cannot be, and a hint."""
    if not path.is_file():
        return "no regular file", None
    begins, kind = _beginning(path), path.suffix.lower()
    if kind in PARQUET:
        return None if begins.startswith(PARQUET_BEGINS) else ("not a Parquet file", None)
    if kind not in JSONL:
        return NO_TEXT if b"\0" in begins else None
    line, end, _ = begins.lstrip().partition(b"\n")
    # A longer row than what was read is left to the search.
    return _wrong_row(line, text_field) if line and (end or len(begins) < FIRST_BYTES) else None


def _wrong_row(line: bytes, text_field: str) -> tuple[str, str | None] | None:
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"its first row is not JSON: {getattr(error, 'msg', error)}", None
    text = row.get(text_field) if isinstance(row, dict) else None
    return None if isinstance(text, str) else no_field(row, text_field)


def no_field(row: object, text_field: str) -> tuple[str, str | None]:
    """What a row of a JSONL file lacks that has no text in that field, and a hint."""
    if not isinstance(row, dict):
        return f"expected an object with a field {text_field!r}, found {type(row).__name__}", None
    if text_field in row:
        return f"field {text_field!r} is {type(row[text_field]).__name__}, not text", None
    strings = [name for name, value in row.items() if isinstance(value, str)]
    return f"no field {text_field!r}", choose_field(strings)


def choose_field(names: Sequence[str]) -> str | None:
    """The hint that names the fields or columns of text."""
    return f"set data.text_field to one of: {', '.join(names)}" if names else None


def _tokenizer_problems(path: Path, place: Where) -> Iterator[HeddleError]:
    try:
        file = tokenizer_file(path)
        if not file.is_file():
            yield no_tokenizer(path, place)
            return
        is_json = _beginning(file).lstrip().startswith(b"{")
    except OSError as error:
        yield HeddleError("file-not-readable", f"{path}: {error.strerror or error}", where=place)
        return
    if not is_json:
        yield HeddleError("file-not-readable", f"{file}: not a tokenizer.json", where=place)


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(FIRST_BYTES)
