"""From a path in the data that was checked back to the place in the file that it came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from heddle.errors import HeddleError, Where
from heddle.specs.explain import Finding
from heddle.specs.reader import Document, Path_, printable


@dataclass(frozen=True, slots=True)
class Places:
    """A document, and which parts of the checked data came from elsewhere in it: an option of a choice, say."""

    document: Document
    moves: Mapping[Path_, Path_]

    def source(self, path: Path_, *, key: bool = False) -> Path_:
        """The path in the file of what stands at `path` in the checked data; with `key` of its key, which an open value has once
        for all its options."""
        if key and path:
            own = (*self.source(path[:-1]), path[-1])
            return own if self.source(path)[: len(own)] == own else self.source(path)
        for size in range(len(path), 0, -1):
            if path[:size] in self.moves:
                return (*self.moves[path[:size]], *path[size:])
        return path

    def where(self, path: Path_, *, key: bool = False) -> Where:
        """The place in the file, called as it is called there."""
        return self.document.where(self.source(path, key=key), key=key)

    def named(self, path: Path_, name: str) -> Where:
        """The place in the file, called `name`."""
        return replace(self.where(path), path=name)

    def error(self, finding: Finding) -> HeddleError:
        """The finding as an error with its place."""
        where = self.where(finding.path, key=finding.key)
        # Names out of the file may be quoted in both.
        hint = None if finding.hint is None else printable(finding.hint)
        return HeddleError(finding.code, printable(finding.what), where=where, hint=hint)
