"""Files that are written whole or not at all, and a log of lines that survives a torn end.

A full disk becomes `HeddleError("disk-full")`, which names the file and the space left; what was finished
stays.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from heddle.errors import HeddleError

# EDQUOT: a user's quota is spent, which is the same thing to the one who waits for the result.
_FULL = {errno.ENOSPC, errno.EDQUOT}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def is_name(part: str) -> bool:
    """Whether `part` may name a file of a run: it leads nowhere but into its folder."""
    return _NAME.fullmatch(part) is not None


def disk_full(error: OSError, path: Path) -> HeddleError | None:
    """The error to tell when `error` says that there is no space for `path`; None for any other error."""
    if error.errno not in _FULL:
        return None
    free = shutil.disk_usage(path if path.is_dir() else path.parent).free
    return HeddleError(
        "disk-full",
        f"no space to write {path} ({free / 1e6:.1f} MB free)",
        hint="everything finished so far is kept; free some space and run again with --resume",
    )


@contextmanager
def full_disk_told(path: Path) -> Iterator[None]:
    """Turn "no space left" inside the block, which writes `path`, into `HeddleError("disk-full")`."""
    try:
        yield
    except OSError as error:
        told = disk_full(error, path)
        if told is None:
            raise
        raise told from error


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader, also after a crash, sees the old file or the new one, never a
    part.

    Raises:
        HeddleError: "disk-full".
    """
    with full_disk_told(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                # A temporary file is its owner's alone; what is kept is as readable as any other file.
                os.fchmod(handle, 0o666 & ~_umask())
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """`write_whole` of `value` as indented JSON."""
    write_whole(path, (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Make the names inside `folder` durable: a rename is safe only once its folder is synced."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cut_torn_tail(path: Path) -> bytes:
    """Cut `path` back to its last newline and give the bytes that were cut; they are kept beside it as
    `.torn`."""
    if not path.exists():
        return b""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    tail = data[end:]
    if tail:
        with open(path.with_name(path.name + ".torn"), "ab") as torn:
            torn.write(tail + b"\n")
        with open(path, "r+b") as file:
            file.truncate(end)
            file.flush()
            os.fsync(file.fileno())
    return tail


class LineLog:
    """A file of JSON lines, one an event; lines are durable when `write` returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_tail(path)
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the log

    def write(self, *values: dict[str, Any]) -> None:
        """Append a line for each, or nothing. Raises HeddleError "disk-full"."""
        lines = "".join(
            json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n" for value in values
        ).encode()
        with full_disk_told(self.path):
            end = self._file.seek(0, os.SEEK_END)
            try:
                # A disk that is nearly full takes a part and says so only at the next write.
                while lines:
                    lines = lines[self._file.write(lines) :]
                os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(end)
                raise

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The events of a `LineLog`, without a last line that is still being written or was torn."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines if line.strip()]
