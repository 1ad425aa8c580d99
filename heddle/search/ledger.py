"""The ledger: every finished evaluation as one durable file, so that nothing is ever evaluated twice.

`<run>/ledger/<spec hash>/<stage>/<key>.json`; the key is a digest of all that decides the result besides the
spec: data, recipe, seed, environment. A file holds a result or a failure with its reason; both are final for
their key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from heddle.search.durable import is_name, write_json

FORMAT = 1


def key_of(inputs: Mapping[str, Any]) -> str:
    """16 hex digits of the canonical JSON of `inputs`: the same inputs give the same key in every process."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Entry:
    """One finished evaluation: `result` when it succeeded, else `reason` = {"code", "message"}."""

    spec: str
    stage: str
    key: str
    inputs: dict[str, Any]
    result: dict[str, Any] | None
    reason: dict[str, str] | None = None
    attempts: int = 1
    wall_s: float = 0.0
    time: str = ""
    format: int = FORMAT

    @property
    def ok(self) -> bool:
        return self.reason is None


class Ledger:
    """Results on disk, looked up by (spec hash, stage, key)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, spec: str, stage: str, key: str) -> Path:
        for part in (spec, stage, key):
            assert is_name(part), f"not a ledger name: {part!r}"
        return self.folder / spec / stage / f"{key}.json"

    def get(self, spec: str, stage: str, key: str) -> Entry | None:
        """The entry, or None when this evaluation never finished."""
        path = self.path(spec, stage, key)
        return _read(path) if path.exists() else None

    def put(self, entry: Entry) -> Entry:
        """Write `entry` whole; an entry that is already there stays and is returned instead.

        Raises:
            HeddleError: "disk-full".
        """
        present = self.get(entry.spec, entry.stage, entry.key)
        if present is not None:
            return present
        stamped = replace(entry, time=entry.time or datetime.now(UTC).isoformat())
        plain = {one.name: getattr(stamped, one.name) for one in fields(stamped)}
        write_json(self.path(entry.spec, entry.stage, entry.key), plain)
        return stamped

    def entries(self) -> Iterator[Entry]:
        """Every finished evaluation, by path; temporary files of a writer that died are passed over."""
        for path in sorted(self.folder.glob("*/*/*.json")):
            if not path.name.startswith("."):
                yield _read(path)


def _read(path: Path) -> Entry:
    value = json.loads(path.read_bytes())
    assert value["format"] == FORMAT, f"{path}: ledger format {value['format']}, this heddle reads {FORMAT}"
    return Entry(**value)
