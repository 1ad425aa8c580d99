"""Samplers that go through a space in its own order: `grid` takes each combination of open values, `all` each spec, once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from heddle.errors import HeddleError
from heddle.search import space
from heddle.specs import SpecFile, expand_layers

SAMPLERS = ("grid", "all")


@dataclass(frozen=True, slots=True)
class Listed:
    """The values of a trial, and its layers; None where the placement solver finds them."""

    values: dict[str, Any]
    layers: tuple[str, ...] | None


class Listing:
    """What each trial of a search with one of SAMPLERS is, by its number: the same whatever has been found."""

    def __init__(self, file: SpecFile, sampler: str) -> None:
        self._left = _combinations(file) if sampler == "grid" else _specs(file)
        self._found = list[Listed]()

    def at(self, number: int) -> Listed | None:
        """Trial `number`, from 0; None after the last."""
        while len(self._found) <= number:
            one = next(self._left, None)
            if one is None:
                return None
            self._found.append(one)
        return self._found[number]


def _combinations(file: SpecFile) -> Iterator[Listed]:
    """Every combination of open values whose counts find room."""
    placement = file.space.placement
    for values, held in file.space.settings():
        if placement is None or placement.count(held)[placement.rest] >= 0:
            yield Listed(values, None)


def _specs(file: SpecFile) -> Iterator[Listed]:
    """Every spec of the space once, however many combinations and placements make it; of those that make none one each."""
    known = set[str]()
    for combination in _combinations(file):
        values = combination.values
        for layers in _placements(file, values):
            try:
                made = layers if layers is not None else expand_layers(file.resolve(values).model)
                spec = space.candidate(file, values, made).hash
            except HeddleError:
                spec = repr(values)
            if spec not in known:
                known.add(spec)
                yield Listed(values, layers)


def _placements(file: SpecFile, values: Mapping[str, Any]) -> Iterator[tuple[str, ...] | None]:
    """The placements at `values` that keep the order of the layers; all of them where none does. None without a placement."""
    placement = file.space.placement
    if placement is None:
        yield None
        return
    order = file.order(values)
    is_kept = order.keeps(space.uniform(file, values))
    for layers in arrangements(placement.count(file.space.held(values))):
        if order.keeps(layers) or not is_kept:
            yield layers


def arrangements(counts: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
    """Every way to place so many of each name, in the order of the names."""
    names = list(counts)
    row = [kind for kind, name in enumerate(names) for _ in range(counts[name])]
    while True:
        yield tuple(names[kind] for kind in row)
        # The next row in lexicographic order, by Narayana's rule.
        pivot = max((at for at in range(len(row) - 1) if row[at] < row[at + 1]), default=None)
        if pivot is None:
            return
        other = max(at for at in range(len(row)) if row[at] > row[pivot])
        row[pivot], row[other] = row[other], row[pivot]
        row[pivot + 1 :] = reversed(row[pivot + 1 :])
