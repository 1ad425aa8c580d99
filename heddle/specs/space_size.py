"""How many settings a space has: what is not open counts once, however many values it could have."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from heddle.specs.parameter import Parameter

# Sizes beyond this are called infinite: nobody counts them, and exact ones would take long.
COUNTABLE = 10**100
# So many different pasts are kept apart; where conditions cross more than that, the size is called infinite, too.
MAX_STATES = 1000


@dataclass(frozen=True, slots=True)
class _State:
    """What of the past decides the future: layers used, and the numbers of those that later ones depend on."""

    used: int
    numbers: tuple[tuple[str, int | None], ...]
    opened: frozenset[str]


def count_settings(parameters: Sequence[Parameter], length: int, counts: Mapping[str, int | str]) -> float:
    """Settings of `parameters`, each after those it needs, times the ways to place `counts` blocks in `length` layers.

    Parameter by parameter: a state goes over into one for each class of values that later conditions can tell apart.
    """
    last = {name: index for index, one in enumerate(parameters) for name in one.needs()}
    placed = {count for count in counts.values() if isinstance(count, str)}
    used, ways = _fixed(length, [count for count in counts.values() if isinstance(count, int)])
    states: dict[_State, float] = {_State(used, (), frozenset()): ways}
    for index, one in enumerate(parameters):
        # What later blocks need at least is kept free, so that no way is a dead end.
        later = [other for other in parameters[index + 1 :] if other.name in placed]
        free = length - sum(other.ends()[0] for other in later) if one.name in placed else None
        steps = _Steps(one, parameters, free, length)
        grown: dict[_State, float] = {}
        for state, number in states.items():
            for after, more in steps.after(state):
                kept = _forget(after, last, index)
                grown[kept] = grown.get(kept, 0) + number * more
                if grown[kept] > COUNTABLE:
                    return math.inf
        if len(grown) > MAX_STATES + length:
            return math.inf
        states = grown
    total = sum(states.values())
    return total if total <= COUNTABLE else math.inf


def _fixed(length: int, counts: Sequence[int]) -> tuple[int, int]:
    """Layers used by blocks whose count is no parameter, and the ways to place them."""
    used, ways = 0, 1
    for count in counts:
        ways *= math.comb(length - used, count)
        used += count
    return used, ways


class _Steps:
    """The values of one parameter, as far as later ones can tell them apart."""

    def __init__(
        self, parameter: Parameter, parameters: Sequence[Parameter], free: int | None, length: int
    ) -> None:
        self.parameter, self.free, self.length = parameter, free, length
        name = parameter.name
        terms = [term.numbers for one in parameters for way in one.when for term in way if term.name == name]
        inside = [one.condition[1] for one in parameters if one.condition and one.condition[0] == name]
        self.tested = [*terms, *(frozenset[int | None]({option}) for option in inside)]
        self.classes = self._classes()

    def after(self, state: _State) -> Iterator[tuple[_State, float]]:
        one = self.parameter
        is_open = one.is_open(dict(state.numbers), state.opened)
        closed = one.closed
        for number, size in self.classes if is_open else [(one.number(closed), 1)]:
            opened = state.opened | {one.name} if is_open else state.opened
            kept = _State(state.used, (*state.numbers, (one.name, number)), opened)
            if self.free is None:
                yield kept, size
                continue
            count = one.numbered(number) if is_open else closed
            if state.used + count <= self.free:
                ways = math.comb(self.length - state.used, count)
                yield _State(state.used + count, kept.numbers, opened), ways

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


def _forget(state: _State, last: Mapping[str, int], index: int) -> _State:
    """Without what no later parameter depends on."""
    kept = tuple((name, number) for name, number in state.numbers if last.get(name, -1) > index)
    names = {name for name, _ in kept}
    return _State(state.used, kept, state.opened & names)
