"""Trials that the placement solver chooses whole: the numbers of layers with where they stand, at settings that were tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from heddle.errors import HeddleError
from heddle.search import space
from heddle.search.learnt import Learnt
from heddle.search.placement import WholeQuestion, propose_whole
from heddle.specs import Parameter, Space, SpecFile

# Trained trials of which fewer say too little to solve for.
LEAST_TRAINED = 3
# Settings of the other parameters that are solved for, those of the best trials.
MOST_SETTINGS = 8


@dataclass(frozen=True, slots=True)
class Solved:
    """The values of a trial's parameters as Optuna takes them, and its layers."""

    values: dict[str, Any]
    layers: tuple[str, ...]


def solved(
    file: SpecFile, learnt: Learnt, number: int, is_asked: Callable[[str], bool], *, seed: int
) -> Solved | None:
    """What the solver chooses for trial `number`: the same for what was learnt from the same trials.

    None where it is Optuna's turn: while too little is learnt; for every second trial where more than numbers of layers is
    open; where no number of layers is, or layers take from each other; and where the solver finds nothing new.
    """
    ranges = count_ranges(file.space)
    if ranges is None or len(learnt.history) < LEAST_TRAINED:
        return None
    counted = {name for name in ranges.values() if isinstance(name, str)}
    if number % 2 == 0 and any(parameter.name not in counted for parameter in file.space.parameters):
        return None
    settings = [one for one in learnt.settings(MOST_SETTINGS) if not file.order(one).after]
    placement = file.space.placement
    assert placement is not None

    def valued(place: int, layers: tuple[str, ...]) -> dict[str, Any]:
        mine = {name: layers.count(kind) for kind, name in ranges.items() if isinstance(name, str)}
        return {**settings[place], **mine}

    def is_seen(place: int, layers: tuple[str, ...]) -> bool:
        values = valued(place, layers)
        return learnt.is_tried(values, layers) or not _is_new(file, values, layers, is_asked)

    question = WholeQuestion(
        placement.of,
        placement.length,
        _limits(file.space, ranges),
        [space.outer(file, one) for one in settings],
        is_seen,
        learnt.timed,
    )
    found = propose_whole(question, learnt.history, seed=seed, number=number)
    if found is None:
        return None
    by_name = {parameter.name: parameter for parameter in file.space.parameters}
    values = {name: _told(by_name[name], value) for name, value in valued(*found).items()}
    return Solved(values, found[1])


def count_ranges(space: Space) -> dict[str, int | str] | None:
    """The number of layers of each counted block, or the name of the parameter that it is; None where no number is open, or
    one that is open takes not every whole number of its range at all settings."""
    if space.placement is None:
        return None
    by_name = {parameter.name: parameter for parameter in space.parameters}
    counts = dict(space.placement.counts)
    opened = [by_name[name] for name in counts.values() if isinstance(name, str)]
    plain = all(one.kind == "int" and one.step in (None, 1) and one.condition is None for one in opened)
    return counts if opened and plain else None


def _limits(space: Space, ranges: Mapping[str, int | str]) -> dict[str, tuple[int, int]]:
    """The least and the most layers of each block, that of the rest included."""
    assert space.placement is not None
    length, by_name = space.placement.length, {each.name: each for each in space.parameters}
    found = {
        kind: _range(count if isinstance(count, int) else by_name[count]) for kind, count in ranges.items()
    }
    low = length - sum(most for _, most in found.values())
    high = length - sum(least for least, _ in found.values())
    found = {kind: (least, min(most, length)) for kind, (least, most) in found.items()}
    return found | {space.placement.rest: (max(0, low), high)}


def _range(count: int | Parameter) -> tuple[int, int]:
    if isinstance(count, int):
        return count, count
    assert count.low is not None
    assert count.high is not None
    return int(count.low), int(count.high)


def _told(parameter: Parameter, value: Any) -> Any:
    return space.label_of(value) if parameter.kind == "choice" else value


def _is_new(
    file: SpecFile, values: Mapping[str, Any], layers: tuple[str, ...], is_asked: Callable[[str], bool]
) -> bool:
    """Whether these values are a point of the space whose spec is legal and was not asked for."""
    opened = file.space.settle(lambda parameter: values.get(parameter.name, parameter.default))[0]
    if opened != dict(values):
        return False
    try:
        return not is_asked(space.candidate(file, values, layers).hash)
    except HeddleError:
        return False
