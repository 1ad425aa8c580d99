"""Files of older versions of the language, brought to the one of today; every piece keeps its place in the file.

A migration leads from one version to the next. It is a function that changes a `Rewrite`, and stands in `MIGRATIONS` under
the version it leads from; `docs/decisions/0006-versions.md` says when a version is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

from heddle.specs.explain import Finding, shown
from heddle.specs.reader import HOLE, Document, Path_
from heddle.specs.spec import VERSION

UPGRADE = "pip install --upgrade heddle-lm"


class Rewrite:
    """The data of a document in the making, and where in the file each piece came from."""

    def __init__(self, data: Any, origins: Mapping[Path_, Path_]) -> None:
        self.data = deepcopy(data)
        self.origins = dict(origins)

    def at(self, path: Path_) -> Any:
        """The piece at `path`; None if nothing is there."""
        held: Any = self.data
        for step in path:
            is_there = step in held if isinstance(held, dict) else _is_index(held, step)
            if not is_there:
                return None
            held = held[step]
        return held

    def paths(self) -> list[Path_]:
        """Where everything stands now, outermost first."""
        return sorted(self.origins, key=len)

    def rename(self, path: Path_, name: str) -> None:
        """Gives the key at `path` another name, at the same place of its mapping."""
        owner = self.at(path[:-1])
        if isinstance(owner, dict) and path[-1] in owner and name not in owner:
            items = [(name if key == path[-1] else key, value) for key, value in owner.items()]
            owner.clear()
            owner.update(items)
            self._move(path, (*path[:-1], name))

    def put(self, path: Path_, value: Any) -> None:
        """Another value at `path`, a key of a mapping; what is wrong with it is told where the old one stood."""
        owner = self.at(path[:-1])
        if isinstance(owner, dict):
            owner[path[-1]] = value
            self._drop(path, below=True)

    def wrap(self, path: Path_, key: str) -> None:
        """Puts the value at `path` into a mapping, under `key`."""
        owner = self.at(path[:-1])
        if isinstance(owner, dict) and path[-1] in owner:
            owner[path[-1]] = {key: owner[path[-1]]}
            origin = self.origins.get(path, path)
            self._move(path, (*path, key))
            self.origins[path] = origin

    def remove(self, path: Path_) -> None:
        """Takes the key at `path` out of its mapping."""
        owner = self.at(path[:-1])
        if isinstance(owner, dict) and path[-1] in owner:
            del owner[path[-1]]
            self._drop(path, below=False)

    def _move(self, old: Path_, new: Path_) -> None:
        size = len(old)
        moved = {path: origin for path, origin in self.origins.items() if path[:size] == old}
        for path in moved:
            del self.origins[path]
        self.origins |= {(*new, *path[size:]): origin for path, origin in moved.items()}

    def _drop(self, path: Path_, *, below: bool) -> None:
        for one in [one for one in self.origins if one[: len(path)] == path and (one != path or not below)]:
            del self.origins[one]


Migration = Callable[[Rewrite], None]
# Version -> the way to the next one. Version 1 is the first that was released.
MIGRATIONS: dict[int, Migration] = {}


def migrated(document: Document) -> tuple[Document, list[Finding]]:
    """The document in the language of today, and what is wrong with its version; its data is a mapping.

    With a version that is missing or not known it is taken as one of today, so that nothing else is hidden.
    """
    data, path = document.data, ("version",)
    version = data.get("version", HOLE)
    if version == VERSION and type(version) is int:
        return document, []
    if type(version) is int and _leads_here(version):
        return _moved(document, version), []
    taken = replace(document, data={**data, "version": VERSION})
    if "version" not in data:
        hint = f"begin the file with version: {VERSION}"
        return taken, [Finding("missing-field", "'version' is missing", path, hint)]
    if version is HOLE:
        return taken, []
    is_newer = type(version) is int and version > VERSION
    what = f"version {shown(version)} is {'newer than this heddle' if is_newer else 'not known'}"
    hint = f"{UPGRADE}, or version: {VERSION}" if is_newer else f"version: {VERSION}"
    what = f"{what}; this heddle reads version {', '.join(map(str, sorted([*MIGRATIONS, VERSION])))}"
    return taken, [Finding("version-not-supported", what, path, hint)]


def _leads_here(version: int) -> bool:
    return version < VERSION and all(step in MIGRATIONS for step in range(version, VERSION))


def _moved(document: Document, version: int) -> Document:
    rewrite = Rewrite(document.data, {path: path for path in document.values})
    for step in range(version, VERSION):
        MIGRATIONS[step](rewrite)
        rewrite.data["version"] = step + 1
    keys = {path: document.keys[old] for path, old in rewrite.origins.items() if old in document.keys}
    values = {path: document.values[old] for path, old in rewrite.origins.items() if old in document.values}
    return Document(rewrite.data, document.source, keys, values, document.errors)


def _is_index(held: Any, step: str | int) -> bool:
    return isinstance(held, list) and isinstance(step, int) and 0 <= step < len(held)
