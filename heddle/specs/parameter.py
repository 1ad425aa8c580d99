"""One value that a spec leaves open, and on which others it depends."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Term:
    """That the parameter `name` is at one of `numbers`: options of a choice, counted from 0, or values of an int.

    None among them stands for a parameter that is not open and has an `otherwise` beside its options.
    """

    name: str
    numbers: frozenset[int | None]


# One way of being open: all of its terms must hold.
Way = tuple[Term, ...]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One open value. `name` is its dotted path in the file, `blocks.linear.mixer` or `layers.placement.count.full`.

    `choices` are as the file spells them, whole mappings too. A parameter inside an option of a choice has a `condition`:
    the name of the choice and the number of the option, from 0. Its own name goes through both, as in
    `blocks.linear.mixer.choice.2.window`. Of its ways of being open, `when`, one must hold; without any it always is. Where
    none holds, the field is `otherwise`.
    """

    name: str
    kind: Literal["choice", "int", "float"]
    choices: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    step: float | None = None
    log: bool = False
    condition: tuple[str, int] | None = None
    when: tuple[Way, ...] = ()
    otherwise: Any = None

    @property
    def default(self) -> Any:
        """The first choice, or the low end."""
        return self.choices[0] if self.kind == "choice" else self.low

    @property
    def closed(self) -> Any:
        """The value where it is not open."""
        return self.otherwise if self.when else self.default

    def option(self, value: object) -> int | None:
        """The number of the option that `value` is; None if it is none of them."""
        return next((index for index, one in enumerate(self.choices) if same(one, value)), None)

    def number(self, value: object) -> int | None:
        """What terms compare: the number of an option, or the whole number itself; None for anything else."""
        if self.kind == "choice":
            return self.option(value)
        return value if type(value) is int and self.allows(value) else None

    def numbered(self, number: int | None) -> Any:
        """The value of a number."""
        if number is None:
            return self.closed
        return self.choices[number] if self.kind == "choice" else number

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

    def ends(self) -> tuple[int, int]:
        """The least and the greatest of values that are whole numbers, of the one where it is not open too."""
        values = self.values()
        known = values if self.kind == "choice" else (values[0], values[-1])
        found = [int(value) for value in (*known, self.closed)]
        return min(found), max(found)

    def size(self) -> float:
        """How many values there are; infinite for a float."""
        if self.kind == "float":
            return 1 if self.low == self.high else math.inf
        return len(self.values())

    def needs(self) -> list[str]:
        """The parameters that decide whether it is open."""
        above = [] if self.condition is None else [self.condition[0]]
        return list(dict.fromkeys([*above, *(term.name for way in self.when for term in way)]))

    def is_open(self, numbers: Mapping[str, int | None], opened: Container[str]) -> bool:
        """Whether it is open where those it needs have these numbers, and those in `opened` are open."""
        if self.condition is not None:
            parent, option = self.condition
            if parent not in opened or numbers[parent] != option:
                return False
        return not self.when or any(
            all(numbers[term.name] in term.numbers for term in way) for way in self.when
        )


def same(one: object, other: object) -> bool:
    """Equality that tells true from 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


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
