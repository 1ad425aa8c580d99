"""The counts of a placement that the solver puts to Optuna: which there are to choose from, and which it chooses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any

from heddle.search.placement.seeds import MOST_COUNTS, solved
from heddle.search.space import Asked, Known, Layers, suggested
from heddle.specs import Parameter, Space, SpecFile

# Combinations of counts that are gone through for those closest to the best found.
MOST_COMBINED = 4096


def seeded(file: SpecFile, best: Mapping[str, Any], known: Known) -> tuple[dict[str, Any], Layers] | None:
    """Counts for a trial as Optuna spells them, and its placement, where all else is as in `best`, values of a trial.

    None without open counts, and while nothing is known to choose by.
    """
    asked, first = dict[tuple[str, ...], Asked](), None
    for values in combinations(file.space, best):
        one = Asked(file, values, known, first)
        first = first or one
        asked.setdefault(tuple(sorted(one.question.uniform)), one)
    if first is None:
        return None
    layers = solved([one.question for one in asked.values()], first.history)
    if layers is None:
        return None
    one = asked[tuple(sorted(layers))]
    counts = {each.name: one.values[each.name] for each in counting(file.space) if each.name in one.values}
    return suggested(file.space, counts), one.blocks.layers(layers)


def counting(space: Space) -> list[Parameter]:
    """The parameters that count layers of a placement."""
    names = set() if space.placement is None else {*space.placement.counts.values()}
    return [one for one in space.parameters if one.name in names]


def combinations(space: Space, best: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Values that differ from `best` in their counts alone and find room, at most MOST_COUNTS, the closest first."""
    placement, at = space.placement, space.at(best)[0]
    counts = [one for one in counting(space) if one.name in at]
    if placement is None or not counts:
        return
    middle = [at[one.name] for one in counts]
    allowed = [
        sorted(one.values(), key=lambda value: abs(value - own))
        for one, own in zip(counts, middle, strict=True)
    ]
    while prod(map(len, allowed)) > MOST_COMBINED:
        max(allowed, key=len).pop()
    found = 0
    for chosen in sorted(product(*allowed), key=lambda values: _apart(values, middle)):
        if found == MOST_COUNTS:
            return
        values, held = space.at({**at, **dict(zip((one.name for one in counts), chosen, strict=True))})
        if placement.count(held)[placement.rest] >= 0:
            found += 1
            yield values


def _apart(values: Sequence[int], others: Sequence[int]) -> tuple[int, ...]:
    return sum(abs(one - other) for one, other in zip(values, others, strict=True)), *values
