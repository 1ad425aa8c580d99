"""What the report shows of a run, worked out from its record: layer strips, kernel paths, best so far."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from heddle import specs
from heddle.errors import CODES, HeddleError
from heddle.search.record import Latency, Run, Trial
from heddle.specs import BlockSpec


@dataclass(frozen=True, slots=True)
class Cell:
    """One layer in a strip: its block and what mixes there."""

    index: int
    block: str
    mixer: str


def mixer_name(block: BlockSpec) -> str:
    """The kind, and what of its fields changes what it is: the window, the form."""
    mixer = block.mixer
    window, form = getattr(mixer, "window", None), getattr(mixer, "form", None)
    extra = f"window {window}" if window is not None else form
    return f"{mixer.kind} ({extra})" if extra else str(mixer.kind)


def strip(trial: Trial) -> list[Cell]:
    """The layers of a trial's model, bottom first."""
    names = _mixer_names(trial.spec)
    return [Cell(index, block, names.get(block, block)) for index, block in enumerate(trial.layers)]


@lru_cache(maxsize=1024)
def _mixer_names(spec: str) -> dict[str, str]:
    """What mixes in each block of a spec."""
    try:
        blocks = specs.loads(spec).spec.model.blocks
    except HeddleError:
        # Written by a later heddle, perhaps: the block names still tell the placement.
        return {}
    return {name: mixer_name(block) for name, block in blocks.items()}


def mixers_of(run: Run) -> Callable[[Trial], list[str]]:
    """Gives the kind of mixer at each layer of a trial, without reading its spec: what is open stands in its params."""
    try:
        blocks = specs.loads(str(run.meta.get("spec", ""))).spec.model.blocks
    except HeddleError:
        blocks = {}
    fixed = {name: str(block.mixer.kind) for name, block in blocks.items()}

    def mixers(trial: Trial) -> list[str]:
        kinds = {block: _chosen(trial.params.get(f"blocks.{block}.mixer")) for block in set(trial.layers)}
        return [kinds[block] or fixed.get(block, block) for block in trial.layers]

    return mixers


def _chosen(value: object) -> str | None:
    return str(value["kind"]) if isinstance(value, Mapping) and "kind" in value else None


def natural(name: str) -> list[tuple[int, str]]:
    """A sort key that puts window 16 before window 128."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def kernel_paths(run: Run) -> dict[str, set[str]]:
    """The paths each mixer kind took in the timings of the run: triton, torch or sdpa."""
    found: dict[str, set[str]] = {}
    for latency in latencies(run):
        for kind, path in latency.paths.items():
            found.setdefault(kind, set()).add(path)
    return dict(sorted(found.items()))


def latencies(run: Run) -> Iterator[Latency]:
    """Every timing of the run."""
    for trial in with_reference(run):
        yield from trial.latency.values()
        yield from trial.remeasured.values()


def with_reference(run: Run) -> list[Trial]:
    """All trials, the budgets' reference model first when there is one."""
    return ([run.reference] if run.reference is not None else []) + list(run.trials)


def best_so_far(run: Run) -> list[tuple[int, float]]:
    """(trial number, best mean normalised score among feasible trials up to it), where it rises."""
    steps: list[tuple[int, float]] = []
    for trial in run.trials:
        quality = trial.quality
        if quality is not None and trial.feasible and (not steps or quality > steps[-1][1]):
            steps.append((trial.number, quality))
    return steps


def name_of(trial: Trial, run: Run) -> str:
    """ "trial 7", or the name of the reference model."""
    if run.reference is not None and trial.number == run.reference.number:
        relative = next((budget.relative_to for budget in run.budgets if budget.relative_to), None)
        return relative or "reference"
    return f"trial {trial.number}"


def failures(run: Run) -> dict[str, int]:
    """How many trials failed for what: the codes of their reasons, the most frequent first."""
    codes = Counter(_code(trial.reason or "unknown") for trial in run.trials if trial.state == "failed")
    return dict(codes.most_common())


def _code(reason: str) -> str:
    """The error code in "task: code: message" or "code: message"."""
    parts = [part.strip() for part in reason.split(":")]
    return next((part for part in parts[:2] if part in CODES), parts[0][:60])


@dataclass(frozen=True, slots=True)
class Pace:
    """Where a running search stands: trials told of all, and seconds left if that is known."""

    told: int
    total: int
    phase: str
    seconds_left: float | None


def pace(run: Run) -> Pace:
    """What the events of the last session tell; the time left is at its pace, of the rounds alone."""
    told, phase, clock = 0, "", 0.0
    for event in run.events:
        kind, clock = event["event"], event["clock_s"]
        if kind == "search_started":
            told = 0
        elif kind == "phase":
            phase = f"{event['phase']}: {event['detail']}" if event["detail"] else event["phase"]
        elif kind == "trial_finished" and event["number"] >= 0:
            told += 1
    ended = sum(trial.state != "running" for trial in run.trials)
    total = int(run.meta.get("trials") or len(run.trials))
    left = clock / told * max(0, total - ended) if told and run.status == "running" else None
    return Pace(ended, total, phase, left)
