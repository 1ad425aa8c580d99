"""Which workers and GPUs a search keeps busy, by the events of its last session."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from heddle.dashboards import data
from heddle.dashboards.frame import url
from heddle.dashboards.html import Html, element, join, table
from heddle.dashboards.sections import note, section
from heddle.search.record import REFERENCE, Run

# As in `heddle.search.evaluations`, whose import brings Ray.
LATENCY = "latency"
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
        open_s = self.clock_s - self._since[gpu] if gpu in self._since else 0.0
        return (self.spent_s[gpu] + open_s) / self.clock_s if self.clock_s else 0.0


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


def facts(found: Busy) -> list[tuple[str, object]]:
    """How many workers and GPUs are busy, for tiles."""
    count = len(found.flying)
    told: list[tuple[str, object]] = [
        ("workers busy", count if found.workers is None else f"{count} of {found.workers}")
    ]
    return told + ([("GPUs busy", f"{len(found.busy_gpus)} of {found.gpus}")] if found.gpus else [])


def busy_section(run: Run, key: str, found: Busy) -> Html | None:
    """What runs now, and how long each GPU was busy; nothing of a search on a CPU that has ended."""
    parts = [_flying(run, key, found), _gpus(found)]
    held = [part for part in parts if part is not None]
    return section("Workers", *held) if held else None


def _flying(run: Run, key: str, found: Busy) -> Html | None:
    if not found.flying:
        return None
    known = {trial.number: trial for trial in data.with_reference(run)}
    rows = []
    for one in sorted(found.flying.values(), key=lambda one: one.began):
        trial = known.get(one.number)
        name = f"trial {one.number}" if trial is None else data.name_of(trial, run)
        what = "timing" if one.stage == LATENCY else one.stage
        link = element("a", name, href=url(key, "trial", one.number)) if one.number >= REFERENCE else name
        rows.append([link, what, one.began[:19].replace("T", " "), *([_names(one)] if found.gpus else [])])
    return table(["Spec", "Evaluation", "Since (UTC)", *(["GPU"] if found.gpus else [])], rows)


def _names(one: Flying) -> str:
    return ", ".join(f"{node} GPU {gpu}" for node, gpu in one.gpus) or "not told yet"


def _gpus(found: Busy) -> Html | None:
    if not found.gpus or not found.spent_s:
        return None
    now = found.busy_gpus
    rows = [
        [f"{node} GPU {index}", "busy" if (node, index) in now else "idle", f"{100 * found.share((node, index)):.0f} %"]
        for node, index in sorted(found.spent_s)
    ]  # fmt: skip
    never = found.gpus - len(rows)
    told = note(f"{never} of {found.gpus} GPUs took no evaluation yet.") if never > 0 else ""
    how = note("Busy: at least one evaluation is on it, which says nothing of how much of it that uses.")
    return join([how, table(["GPU", "Now", "Busy in this session"], rows, numeric=(2,)), told])
