"""What the report shows of a run, worked out from its record: layer strips, kernel paths, best so far."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import cycle

from heddle import specs
from heddle.errors import HeddleError
from heddle.search.record import Latency, Run, Trial
from heddle.specs import BlockSpec

# One hue a mixer kind, told apart also by the colour-blind: the palette of Okabe and Ito.
KIND_COLOURS = {
    "attention": "#0072b2",
    "gated_deltanet": "#d55e00",
    "decay_attention": "#009e73",
}
# Windowed attentions are lighter relatives of the full one, the narrowest window the lightest.
WINDOWED = ("#b8def5", "#8cc8ee", "#56b4e9", "#3594cf", "#7fa8c9", "#a3bccf")
SPARE_COLOURS = ("#cc79a7", "#b8860b", "#7a5195", "#666666")


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
    try:
        blocks = specs.loads(trial.spec).spec.model.blocks
    except HeddleError:
        # Written by a later heddle, perhaps: the block names still tell the placement.
        blocks = {}
    names = {name: mixer_name(block) for name, block in blocks.items()}
    return [Cell(index, block, names.get(block, block)) for index, block in enumerate(trial.layers)]


def colours(mixers: Iterable[str]) -> dict[str, str]:
    """One colour for each mixer name, the same in every strip of a report."""
    windowed, spare = cycle(WINDOWED), cycle(SPARE_COLOURS)
    chosen: dict[str, str] = {}
    for mixer in sorted(set(mixers), key=_natural):
        kind, _, extra = mixer.partition(" (")
        colour = next(windowed) if extra.startswith("window") else KIND_COLOURS.get(kind)
        chosen[mixer] = colour if colour and colour not in chosen.values() else next(spare)
    return chosen


def _natural(name: str) -> list[tuple[int, str]]:
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
