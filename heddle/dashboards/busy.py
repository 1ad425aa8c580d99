"""Which workers and GPUs a search keeps busy, by the events of a session."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from heddle.search.record import Run

# A GPU: the name of its machine, and its index as Ray counts.
Gpu = tuple[str, str]


@dataclass(slots=True)
class Flying:
    """An evaluation that has not ended: of which trial, what, since when, and on which GPUs if it told."""

    number: int
    stage: str
    began: str
    gpus: tuple[Gpu, ...] = ()


@dataclass(slots=True)
class Busy:
    """`workers` and `gpus` are how many there are, None before an evaluation told; `spent_s` is how long each GPU was busy."""

    workers: int | None = None
    gpus: int | None = None
    flying: dict[tuple[str, str, str], Flying] = field(default_factory=dict)
    spent_s: dict[Gpu, float] = field(default_factory=dict)
    clock_s: float = 0.0
    _since: dict[Gpu, float] = field(default_factory=dict)

    @property
    def busy_gpus(self) -> set[Gpu]:
        return {gpu for one in self.flying.values() for gpu in one.gpus}

    def take(self, event: Mapping[str, Any]) -> None:
        """Go on with the next event."""
        self.clock_s = max(self.clock_s, event["clock_s"])
        kind = event["event"]
        if kind == "workers":
            self.workers, self.gpus = event["parallel"], event["gpus"]
        if not kind.startswith("evaluation_"):
            return
        place = (event["hash"], event["stage"], event["key"])
        if kind == "evaluation_started":
            self.flying[place] = Flying(event["number"], event["stage"], event["time"])
        elif kind == "evaluation_finished":
            self.flying.pop(place, None)
        elif place in self.flying:
            self.flying[place].gpus = tuple((str(event["node"]), str(gpu)) for gpu in event["gpus"])
        self._count()

    def _count(self) -> None:
        """Close the time of GPUs that became idle, and begin that of others."""
        now = self.busy_gpus if self.gpus else set()
        for gpu in self._since.keys() - now:
            self.spent_s[gpu] += self.clock_s - self._since.pop(gpu)
        for gpu in now - self._since.keys():
            self._since[gpu] = self.clock_s
            self.spent_s.setdefault(gpu, 0.0)

    def share(self, gpu: Gpu) -> float:
        """How much of the session a GPU was busy, until its last event."""
        return self._spent(gpu) / self.clock_s if self.clock_s else 0.0

    @property
    def gpu_s(self) -> float:
        """Seconds that GPUs were busy, all of them together, until the last event."""
        return sum(map(self._spent, self.spent_s))

    def _spent(self, gpu: Gpu) -> float:
        return self.spent_s[gpu] + (self.clock_s - self._since[gpu] if gpu in self._since else 0.0)


def busy(run: Run) -> Busy:
    """Who is busy; nobody where the search does not run."""
    found = Busy()
    for event in run.events:
        if event["event"] == "search_started":
            found = Busy()
        found.take(event)
    if run.status != "running":
        found.flying = {}
    return found
