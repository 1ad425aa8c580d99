"""The search space of a spec: the values left open inside `model`, and the placement of its layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from heddle.specs.pattern import uniform_layers

# Sizes beyond this are called infinite: nobody counts them, and exact ones would take long.
COUNTABLE = 10**100


@dataclass(frozen=True, slots=True)
class Parameter:
    """One open value. `name` is its dotted path in the file, `blocks.linear.mixer` or `layers.placement.count.full`.

    `choices` are as the file spells them, whole mappings too. A parameter inside an option of a choice has a `condition`:
    the name of the choice and the number of the option, from 0. Its own name goes through both, as in
    `blocks.linear.mixer.choice.2.window`.
    """

    name: str
    kind: Literal["choice", "int", "float"]
    choices: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    step: float | None = None
    log: bool = False
    condition: tuple[str, int] | None = None

    @property
    def default(self) -> Any:
        """The first choice, or the low end."""
        return self.choices[0] if self.kind == "choice" else self.low

    def option(self, value: object) -> int | None:
        """The number of the option that `value` is; None if it is none of them."""
        return next((index for index, one in enumerate(self.choices) if same(one, value)), None)

    def allows(self, value: object) -> bool:
        """Whether `value` lies in the range."""
        if self.kind == "choice":
            return self.option(value) is not None
        kinds = (int,) if self.kind == "int" else (int, float)
        if type(value) not in kinds:
            return False
        assert self.low is not None
        assert self.high is not None
        assert isinstance(value, (int, float))
        inside = self.low <= value <= self.high
        return inside and (self.step is None or (value - self.low) % self.step == 0)

    def values(self) -> Sequence[Any]:
        """Every value of a choice or of an int."""
        if self.kind == "choice":
            return self.choices
        assert self.kind == "int", f"{self.name} has no end of values"
        assert self.low is not None
        assert self.high is not None
        return range(int(self.low), int(self.high) + 1, int(self.step or 1))

    def size(self) -> float:
        """How many values there are; infinite for a float."""
        if self.kind == "float":
            return 1 if self.low == self.high else math.inf
        return len(self.values())


def same(one: object, other: object) -> bool:
    """Equality that tells true from 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


@dataclass(frozen=True, slots=True)
class Placement:
    """`length` layers; each counted block stands `counts[block]` times (a number, or a parameter's name), `rest` elsewhere."""

    length: int
    of: tuple[str, ...]
    rest: str
    counts: Mapping[str, int | str]

    def count(self, values: Mapping[str, Any]) -> dict[str, int]:
        """How many layers each block gets, `rest` included, in the order of `of`. `rest` may come out below 0."""
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


@dataclass(frozen=True, slots=True)
class Space:
    """Every open value of a spec; a choice stands before the parameters inside its options."""

    parameters: tuple[Parameter, ...] = ()
    placement: Placement | None = None

    def defaults(self) -> dict[str, Any]:
        """The value of each parameter in `SpecFile.spec`."""
        return {parameter.name: parameter.default for parameter in self.parameters}

    def active(self, values: Mapping[str, Any]) -> list[Parameter]:
        """The parameters that mean something at `values`: those inside an option that is not chosen do not."""
        found: list[Parameter] = []
        active: dict[str, Parameter] = {}
        for parameter in self.parameters:
            if parameter.condition is not None:
                parent = active.get(parameter.condition[0])
                if (
                    parent is None
                    or parent.option(values.get(parent.name, parent.default)) != parameter.condition[1]
                ):
                    continue
            active[parameter.name] = parameter
            found.append(parameter)
        return found

    def size(self) -> float:
        """How many settings there are, whether or not each is a legal model; infinite with a float or beyond 10^100."""
        counted = set() if self.placement is None else set(self.placement.counts.values())
        free = [parameter for parameter in self.parameters if parameter.name not in counted]
        total = _settings(free, None)
        if self.placement is not None:
            total *= _placements(self.placement, {parameter.name: parameter for parameter in self.parameters})
        return total if total <= COUNTABLE else math.inf


def _settings(parameters: Sequence[Parameter], condition: tuple[str, int] | None) -> float:
    total: float = 1
    for parameter in parameters:
        if parameter.condition != condition:
            continue
        if parameter.kind == "choice":
            options = range(len(parameter.choices))
            total *= sum(_settings(parameters, (parameter.name, index)) for index in options)
        else:
            total *= parameter.size()
        if total > COUNTABLE:
            return math.inf
    return total


def _placements(placement: Placement, parameters: Mapping[str, Parameter]) -> float:
    """Ways to place the blocks, over every setting of their counts.

    Block by block: of the layers still free, any `count` may be taken.
    """
    ranges = [_counts(count, parameters) for count in placement.counts.values()]
    # Ways to have used so many layers. What later blocks need at least is kept free, so no way is a dead end.
    ways = {0: 1}
    for index, counts in enumerate(ranges):
        free = placement.length - sum(min(later) for later in ranges[index + 1 :])
        grown: dict[int, int] = {}
        for used, number in ways.items():
            for count in counts:
                if used + count <= free:
                    more = number * math.comb(placement.length - used, count)
                    grown[used + count] = grown.get(used + count, 0) + more
                    if more > COUNTABLE:
                        return math.inf
        ways = grown
    return sum(ways.values())


def _counts(count: int | str, parameters: Mapping[str, Parameter]) -> Sequence[int]:
    return [count] if isinstance(count, int) else parameters[count].values()


def settings(parameters: Sequence[Parameter], most: int) -> Iterator[dict[str, Any]]:
    """Up to `most` settings of `parameters`, spread over all of them; ranges at their ends and in between."""
    values = [_sample(parameter) for parameter in parameters]
    total = math.prod(len(one) for one in values)
    stride = max(1, total // most)
    # A stride that shares a factor with a parameter's count would leave some of its values out.
    while stride > 1 and any(math.gcd(stride, len(one)) > 1 for one in values):
        stride += 1
    for number in range(min(total, most)):
        rest, setting = number * stride % total, {}
        for parameter, options in zip(parameters, values, strict=True):
            rest, index = divmod(rest, len(options))
            setting[parameter.name] = options[index]
        yield setting


def _sample(parameter: Parameter) -> Sequence[Any]:
    if parameter.kind == "float":
        return [parameter.low, parameter.high]
    values = parameter.values()
    if len(values) <= 64:
        return values
    return [values[index * (len(values) - 1) // 63] for index in range(64)]
