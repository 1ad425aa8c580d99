"""Walks through the settings of a space, and makes it smaller: some values of its parameters are left out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd
from typing import Any

from heddle.specs.load import SpecFile
from heddle.specs.parameter import Parameter, Term, Way
from heddle.specs.space import Space

# Of an open float so many values are looked at, from its low end to its high end.
FLOATS = 5
Kept = Mapping[str, Sequence[Any]]


@dataclass(frozen=True, slots=True)
class Cut:
    """A spec file whose space has only what may fit, what was left out, and blocks with too many settings to judge each.

    `whole` is the file as it was read.
    """

    file: SpecFile
    whole: SpecFile
    removed: tuple[str, ...] = ()
    unjudged: tuple[str, ...] = ()


def looked_at(parameter: Parameter) -> Sequence[Any]:
    """All values of a choice or an int; of a float FLOATS of them."""
    if parameter.kind != "float":
        return parameter.values()
    assert parameter.low is not None
    assert parameter.high is not None
    if parameter.low == parameter.high:
        return [parameter.low]
    width = parameter.high - parameter.low
    return [parameter.low + width * step / (FLOATS - 1) for step in range(FLOATS)]


@dataclass
class Walk:
    """Every setting of the parameters `names` of a space; the others stay at their defaults.

    A parameter that is closed in a setting has no value in it, as in `Space.settle`.
    """

    space: Space
    names: Collection[str]
    # Which value of each open parameter, and how many it has.
    _path: list[int] = field(default_factory=list)
    _sizes: list[int] = field(default_factory=list)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._path = []
        while True:
            self._sizes = []
            yield self.space.settle(self._choose)[0]
            del self._path[len(self._sizes) :]
            while self._path and self._path[-1] + 1 >= self._sizes[len(self._path) - 1]:
                self._path.pop()
            if not self._path:
                return
            self._path[-1] += 1

    def _choose(self, parameter: Parameter) -> Any:
        if parameter.name not in self.names:
            return parameter.default
        values, place = looked_at(parameter), len(self._sizes)
        if place == len(self._path):
            self._path.append(0)
        self._sizes.append(len(values))
        return values[self._path[place]]


def cut_space(space: Space, kept: Kept) -> Space:
    """The space with those values alone; a parameter that `kept` does not name keeps all, one of no value goes.

    An int becomes the narrowest range that has them, so that some of those left out may still be in it. Conditions speak of
    options by number: they are counted anew, and what stands inside an option that is gone goes with it.
    """
    numbers = {
        one.name: {one.option(value): new for new, value in enumerate(kept[one.name])}
        for one in space.parameters
        if one.kind == "choice" and one.name in kept
    }
    made: dict[str, Parameter] = {}
    gone: set[str] = set()
    for one in space.parameters:
        condition, inside = one.condition, numbers.get(one.condition[0] if one.condition else "")
        if condition is not None and inside is not None:
            if condition[1] not in inside:
                gone.add(one.name)
                continue
            condition = (condition[0], inside[condition[1]])
        if condition is not None and condition[0] in gone:
            gone.add(one.name)
            continue
        when = tuple(_way(way, numbers) for way in one.when)
        made[one.name] = replace(_narrowed(one, kept.get(one.name)), condition=condition, when=when)
    return Space(tuple(made.values()), space.placement)


def _way(way: Way, numbers: Mapping[str, Mapping[int | None, int]]) -> Way:
    """A way of being open by the new numbers; an option that is gone is nobody's number any more."""
    return tuple(
        term
        if term.name not in numbers
        else Term(
            term.name,
            frozenset(
                None if number is None else numbers[term.name][number]
                for number in term.numbers
                if number is None or number in numbers[term.name]
            ),
        )
        for term in way
    )


def _narrowed(one: Parameter, values: Sequence[Any] | None) -> Parameter:
    if values is None or one.kind == "float":
        return one
    if one.kind == "choice":
        return replace(one, choices=tuple(values))
    low, high = min(values), max(values)
    step = int(one.step or 1)
    # On a log scale Optuna takes no step.
    if not one.log:
        step = gcd(*(value - low for value in values)) or 1
    return replace(one, low=low, high=high, step=one.step if step == 1 and one.step is None else step)
