"""The search space of a spec: the values left open inside `model`, and the placement of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from heddle.specs.parameter import Parameter, Term, Way
from heddle.specs.pattern import uniform_layers
from heddle.specs.space_size import Placing, count_settings


@dataclass(frozen=True, slots=True)
class Placement:
    """`length` layers; each counted block stands `counts[block]` times (a number, or a parameter's name), `rest` elsewhere."""

    length: int
    of: tuple[str, ...]
    rest: str
    counts: Mapping[str, int | str]

    def count(self, values: Mapping[str, Any]) -> dict[str, int]:
        """How many layers each block gets, `rest` included, in the order of `of`. `rest` may come out below 0.

        `values` must have every count that is a parameter, as `Space.held` does.
        """
        counted = {
            name: int(values[count]) if isinstance(count, str) else count
            for name, count in self.counts.items()
        }
        counted[self.rest] = self.length - sum(counted.values())
        return {name: counted[name] for name in self.of}

    def uniform(self, values: Mapping[str, Any]) -> list[str]:
        """The evenly spread placement at `values`."""
        counts = self.count(values)
        counts.pop(self.rest)
        return uniform_layers(self.length, self.rest, counts)


class _Numbers(dict[str, int | None]):
    """The numbers of parameters at the values in `held`; most are never asked for."""

    def __init__(self, parameters: Mapping[str, Parameter], held: Mapping[str, Any]) -> None:
        super().__init__()
        self._parameters, self._held = parameters, held

    def __missing__(self, name: str) -> int | None:
        self[name] = number = self._parameters[name].number(self._held[name])
        return number


@dataclass(frozen=True, slots=True)
class Space:
    """Every open value of a spec; each stands after those that decide whether it is open."""

    parameters: tuple[Parameter, ...] = ()
    placement: Placement | None = None

    def defaults(self) -> dict[str, Any]:
        """The value of each parameter in `SpecFile.spec`, if it is open there."""
        return {parameter.name: parameter.default for parameter in self.parameters}

    def settle(self, choose: Callable[[Parameter], Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The values of the open parameters, and those of all; `choose` is asked for the open ones alone, in their order."""
        opened: dict[str, Any] = {}
        held: dict[str, Any] = {}
        numbers = _Numbers({parameter.name: parameter for parameter in self.parameters}, held)
        for parameter in self.parameters:
            if parameter.is_open(numbers, opened):
                opened[parameter.name] = held[parameter.name] = choose(parameter)
            else:
                held[parameter.name] = parameter.closed
        return opened, held

    def at(self, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `settle`, at `values`; what they do not name is at its default."""
        return self.settle(lambda one: values.get(one.name, one.default))

    def settings(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """As `settle`, every combination of open values once, in order; there must be no open float, whose values have no end."""
        path: list[int] = []
        while True:
            sizes = list[int]()
            opened, held = self.settle(partial(_next_on, path, sizes))
            path += [0] * (len(sizes) - len(path))
            yield opened, held
            while path and path[-1] + 1 == sizes[len(path) - 1]:
                path.pop()
            if not path:
                return
            path[-1] += 1

    def active(self, values: Mapping[str, Any]) -> list[Parameter]:
        """The parameters that mean something at `values`: not those in an option that is not chosen, nor those whose `when`
        does not hold."""
        opened, _ = self.at(values)
        return [parameter for parameter in self.parameters if parameter.name in opened]

    def held(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The value of every parameter at `values`, of those that are not open too."""
        return self.at(values)[1]

    def size(self) -> float:
        """How many settings there are, whether or not each is a legal model; what is not open counts once, and so does what lies
        in a block that the placement has no layer of.

        An upper bound where values of one block decide what is open in another. Infinite with an open float, beyond 10^100, or
        where too many conditions cross for counting.
        """
        one = self.placement
        return count_settings(
            self.parameters, Placing() if one is None else Placing(one.length, one.counts, one.rest)
        )

    def opening(self, name: str) -> dict[str, Any] | None:
        """Values at which the parameter `name` is open, the others at their defaults; None if none are found."""
        for way in self._named(name).when or ((),):
            values: dict[str, Any] = {}
            self._require(name, way, values)
            if name in self.at(values)[0]:
                return values
        return None

    def closing(self, name: str) -> dict[str, Any] | None:
        """Values at which the `when` of parameter `name` does not hold though it could be open there; None if none are found."""
        parameter = self._named(name)
        for term in (term for way in parameter.when for term in way):
            other = self._named(term.name)
            numbers = [other.number(value) for value in other.values()[:1000]]
            values: dict[str, Any] = {}
            self._require(name, (), values)
            for number in [number for number in numbers if number not in term.numbers][:1]:
                values[term.name] = other.numbered(number)
            opened, held = self.at(values)
            above = parameter.condition
            is_there = above is None or self._named(above[0]).number(held[above[0]]) == above[1]
            if name not in opened and is_there:
                return values
        return None

    def _named(self, name: str) -> Parameter:
        return next(parameter for parameter in self.parameters if parameter.name == name)

    def _require(self, name: str, way: Way, values: dict[str, Any]) -> None:
        """Adds the values at which `way` holds and the option around the parameter `name` is chosen."""
        above = self._named(name).condition
        for term in (*way, *(() if above is None else (Term(above[0], frozenset({above[1]})),))):
            if term.name not in values:
                parent = self._named(term.name)
                default = parent.number(parent.default)
                number = default if default in term.numbers else next(iter(term.numbers))
                values[term.name] = parent.numbered(number)
                self._require(term.name, parent.when[0] if parent.when else (), values)


def _next_on(path: Sequence[int], sizes: list[int], parameter: Parameter) -> Any:
    """The value on the way of `path`, the first beyond its end; `sizes` gets how many there are."""
    is_one = parameter.kind == "float" and parameter.low == parameter.high
    values = [parameter.low] if is_one else parameter.values()
    at = path[len(sizes)] if len(sizes) < len(path) else 0
    sizes.append(len(values))
    return values[at]
