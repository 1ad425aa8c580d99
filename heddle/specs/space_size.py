"""How many settings a space has: what is not open, or has no effect, counts once, however many values it could have."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from heddle.specs.parameter import Parameter

# Sizes beyond this are called infinite: nobody counts them, and exact ones would take long.
COUNTABLE = 10**100
# So many different pasts are kept apart; where conditions cross more than that, the size is called infinite, too.
MAX_STATES = 1000


@dataclass(frozen=True, slots=True)
class _State:
    """What of the past decides the future: layers used, numbers that later ones depend on, and blocks without layers."""

    used: int
    numbers: tuple[tuple[str, int | None], ...]
    opened: frozenset[str]
    absent: frozenset[str]


@dataclass(frozen=True, slots=True)
class Placing:
    """What a placement says of the size: its layers, the count of each block that has one, and the block that has the others."""

    length: int = 0
    counts: Mapping[str, int | str] = field(default_factory=dict)
    rest: str = ""


def count_settings(parameters: Sequence[Parameter], placing: Placing) -> float:
    """Settings of `parameters`, each after those it needs, times the ways to place the layers.

    A value inside of a block that gets no layer has no effect and counts once; unless something outside of the block depends on
    it, or where too many such blocks cross: then the size is an upper bound.
    """
    size = _count(parameters, placing, is_exact=True)
    return _count(parameters, placing, is_exact=False) if math.isinf(size) else size


def _count(parameters: Sequence[Parameter], placing: Placing, *, is_exact: bool) -> float:
    """Parameter by parameter: a state goes over into one for each class of values that later conditions can tell apart."""
    placed = {count for count in placing.counts.values() if isinstance(count, str)}
    ordered = _counts_first(parameters, placed)
    last = {name: index for index, one in enumerate(ordered) for name in one.needs()}
    inside = {block: index for index, one in enumerate(ordered) if (block := _block_of(one.name))}
    felt = _felt(ordered) if is_exact else {one.name for one in ordered}
    start, ways = _start(placing)
    states: dict[_State, float] = {start: ways}
    for index, one in enumerate(ordered):
        # What later blocks need at least is kept free, so that no way is a dead end.
        later = [other for other in ordered[index + 1 :] if other.name in placed]
        free = placing.length - sum(other.ends()[0] for other in later) if one.name in placed else None
        steps = _Steps(one, ordered, free, placing, is_last=not later)
        grown: dict[_State, float] = {}
        for state, number in states.items():
            for after, more in steps.after(state, is_felt=one.name in felt):
                kept = _forget(after, last, inside, index)
                grown[kept] = grown.get(kept, 0) + number * more
                if grown[kept] > COUNTABLE:
                    return math.inf
        if len(grown) > MAX_STATES + placing.length:
            return math.inf
        states = grown
    total = sum(states.values())
    return total if total <= COUNTABLE else math.inf


def _counts_first(parameters: Sequence[Parameter], placed: Container[str]) -> list[Parameter]:
    """The same, each still after those it needs, and the counts of a placement as early as that allows."""
    needs = {one.name: one.needs() for one in parameters}
    early, left = set[str](), [name for name in needs if name in placed]
    while left:
        name = left.pop()
        if name not in early:
            early.add(name)
            left += needs[name]
    return sorted(parameters, key=lambda one: one.name not in early)


def _felt(parameters: Sequence[Parameter]) -> set[str]:
    """Those that something outside of their block depends on, by way of others too."""
    needs = {one.name: one.needs() for one in parameters}
    felt = set[str]()
    left = [other for name in needs for other in needs[name] if _block_of(other) != _block_of(name)]
    while left:
        name = left.pop()
        if name not in felt:
            felt.add(name)
            left += needs[name]
    return felt


def _block_of(name: str) -> str | None:
    """The block that the parameter of that name lies in."""
    steps = name.split(".")
    return steps[1] if steps[0] == "blocks" else None


def _start(placing: Placing) -> tuple[_State, int]:
    """Before any parameter: layers used by blocks whose count is none, and the ways to place them."""
    used, ways, absent = 0, 1, set[str]()
    for name, count in placing.counts.items():
        if isinstance(count, int):
            ways *= math.comb(placing.length - used, count)
            used += count
            absent |= {name} if count == 0 else set()
    is_known = all(isinstance(count, int) for count in placing.counts.values())
    absent |= {placing.rest} if is_known and used == placing.length else set()
    return _State(used, (), frozenset(), frozenset(absent)), ways


class _Steps:
    """The values of one parameter, as far as later ones can tell them apart; after a count that `is_last` the rest is known."""

    def __init__(
        self,
        parameter: Parameter,
        parameters: Sequence[Parameter],
        free: int | None,
        placing: Placing,
        *,
        is_last: bool,
    ) -> None:
        self.parameter, self.free, self.placing, self.is_last = parameter, free, placing, is_last
        name = parameter.name
        self.counted = {block for block, count in placing.counts.items() if count == name}
        terms = [term.numbers for one in parameters for way in one.when for term in way if term.name == name]
        inside = [one.condition[1] for one in parameters if one.condition and one.condition[0] == name]
        self.tested = [*terms, *(frozenset[int | None]({option}) for option in inside)]
        self.classes = self._classes()

    def after(self, state: _State, *, is_felt: bool) -> Iterator[tuple[_State, float]]:
        one = self.parameter
        is_open = one.is_open(dict(state.numbers), state.opened)
        if not is_felt and _block_of(one.name) in state.absent:
            is_open = False
        closed = one.closed
        for number, size in self.classes if is_open else [(one.number(closed), 1)]:
            opened = state.opened | {one.name} if is_open else state.opened
            kept = _State(state.used, (*state.numbers, (one.name, number)), opened, state.absent)
            if self.free is None:
                yield kept, size
                continue
            count = one.numbered(number) if is_open else closed
            if state.used + count <= self.free:
                yield self._placed(kept, count), math.comb(self.placing.length - state.used, count)

    def _placed(self, state: _State, count: int) -> _State:
        """`state` after so many layers more, with the blocks that are known now to have none."""
        used, absent = state.used + count, state.absent
        if count == 0:
            absent |= self.counted
        if self.is_last:
            absent |= {self.placing.rest} if used == self.placing.length else set()
            # Nobody asks any more.
            used = 0
        return _State(used, state.numbers, state.opened, absent)

    def _classes(self) -> list[tuple[int | None, float]]:
        """One number for each class of values, and how many the class has."""
        one = self.parameter
        if self.free is not None:
            # Each count of a placement has ways of its own.
            return [(one.number(value), 1) for value in one.values()]
        if not self.tested:
            return [(None, one.size())]
        if one.kind == "choice":
            numbers, rest = list(range(len(one.choices))), 0.0
        else:
            known = {number for tested in self.tested for number in tested}
            numbers = sorted(number for number in known if number is not None and one.allows(number))
            rest = one.size() - len(numbers)
        found: dict[tuple[bool, ...], tuple[int | None, float]] = {}
        for number in numbers:
            key = tuple(number in tested for tested in self.tested)
            first, size = found.get(key, (number, 0))
            found[key] = (first, size + 1)
        if rest:
            # Values that no condition names; one of them stands for all.
            found[()] = (next(value for value in one.values() if value not in numbers), rest)
        return list(found.values())


def _forget(state: _State, last: Mapping[str, int], inside: Mapping[str, int], index: int) -> _State:
    """Without what no later parameter depends on."""
    kept = tuple((name, number) for name, number in state.numbers if last.get(name, -1) > index)
    names = {name for name, _ in kept}
    absent = frozenset(block for block in state.absent if inside.get(block, -1) > index)
    return _State(state.used, kept, state.opened & names, absent)
