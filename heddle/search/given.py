"""What a search is asked for besides its spec file and its folder."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from heddle.search.evaluate import Evaluate
from heddle.search.latency import Effort
from heddle.search.lock import Frozen
from heddle.search.record import read_meta
from heddle.specs import SpecFile


@dataclass(frozen=True, slots=True)
class Given:
    """The arguments of `search` besides the file and the folder."""

    trials: int | None
    seconds: float | None
    resume: bool
    storage: str | None
    ray_address: str | None
    evaluate: Evaluate
    effort: Effort
    deterministic: bool
    frozen: Frozen | None

    def is_deterministic(self, out: Path) -> bool:
        """Whether the search in `out` is, or will be: a search that goes on stays what it was begun as."""
        begun = read_meta(out) if self.resume else self.frozen.lock if self.frozen is not None else {}
        return self.deterministic or bool(begun.get("deterministic"))

    def timed_on(self, out: Path) -> str | None:
        """The kind of node that the search in `out`, or that of the lockfile, was timed on; None where nothing says so."""
        begun = read_meta(out) if self.resume else self.frozen.lock if self.frozen is not None else {}
        return begun.get("timed_on")

    def again(self, file: SpecFile, out: Path) -> str:
        """What to type to go on with the search in `out`. A storage URL may hold a password and is not
        repeated."""
        words = ["heddle", "search", file.file or "SPEC", "--out", str(out), "--resume"]
        words += ["--ray-address", self.ray_address] if self.ray_address else []
        words += ["--storage", "URL"] if self.storage else []
        return shlex.join(words)
