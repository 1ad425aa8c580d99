"""Reads the `when` of open values: which settings of others open them, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from heddle.specs.base import nearest
from heddle.specs.explain import Finding, shown
from heddle.specs.parameter import Parameter, Term, Way, same
from heddle.specs.reader import HOLE, MAX_ERRORS, Path_, printable

EXAMPLE = "when: {blocks.linear.mixer.kind: attention}"
# More ways of being open than a file has reason for.
MAX_WAYS = 16
# Steps taken through options to find what conditions speak of, in a whole file.
MAX_STEPS = 50_000
SHOWN = 12


@dataclass(frozen=True, slots=True)
class _End:
    """What stands at a dotted path in one setting: an open value, a plain one, or nothing; and what leads there."""

    way: Way
    parameter: Parameter | None = None
    value: Any = None
    is_there: bool = True


@dataclass
class Conditions:
    """The conditions of a model's open values.

    `parameters` are all of them by their paths in `data`, the whole document; `broken` could not be read.
    """

    data: Any
    parameters: dict[Path_, Parameter]
    broken: set[Path_]
    findings: list[Finding] = field(default_factory=list)
    _steps: int = 0

    def read(self) -> None:
        """Gives every parameter that has a `when` in the file its ways of being open."""
        for path, parameter in list(self.parameters.items()):
            form = _at(self.data, path)
            if "when" not in form:
                if "otherwise" in form:
                    what = "otherwise says what holds where `when` does not, and there is no when"
                    self._fail(what, (*path, "otherwise"), EXAMPLE, key=True)
                continue
            otherwise = form.get("otherwise", parameter.default)
            ways = self._ways(form["when"], (*path, "when"), parameter)
            if ways is not None:
                self.parameters[path] = replace(parameter, when=ways, otherwise=otherwise)

    def ordered(self) -> tuple[Parameter, ...]:
        """The parameters, each after those it needs; conditions that go in a circle are told and dropped."""
        by_name = {parameter.name: path for path, parameter in self.parameters.items()}
        made: dict[str, Parameter] = {}
        for name in by_name:
            self._place(name, by_name, made, [])
        return tuple(made.values())

    def _place(
        self, name: str, by_name: Mapping[str, Path_], made: dict[str, Parameter], above: list[str]
    ) -> None:
        if name in made:
            return
        path = by_name[name]
        if name in above:
            circle = [*above[above.index(name) :], name]
            # An option needs its choice by nature; what can be mended is a `when`.
            first = next(one for one in circle if self.parameters[by_name[one]].when)
            what = f"the conditions go in a circle: {' → '.join(map(printable, circle))}"
            self._fail(what, (*by_name[first], "when"), "remove one of them", key=True)
            for one in circle:
                self.parameters[by_name[one]] = replace(self.parameters[by_name[one]], when=())
            return
        for needed in self.parameters[path].needs():
            self._place(needed, by_name, made, [*above, name])
        made.setdefault(name, self.parameters[path])

    def _ways(self, when: Any, path: Path_, parameter: Parameter) -> tuple[Way, ...] | None:
        if when is HOLE or (isinstance(when, dict) and HOLE in when.values()):
            return None
        if not isinstance(when, dict) or not when:
            what = f"when is a mapping of open values to what they must be, got {shown(when)}"
            self._fail(what, path, EXAMPLE)
            return None
        each = [self._one(key, wanted, (*path, key)) for key, wanted in list(when.items())[:MAX_ERRORS]]
        told = [one for one in each if one is not None]
        if len(told) < len(each):
            return None
        above = parameter.condition
        place: Way = () if above is None else (Term(above[0], frozenset({above[1]})),)
        ways = [place]
        for options in told:
            met = (_met(one, other) for one, other in product(ways, options[: MAX_WAYS + 1]))
            ways = [way for way in met if way is not None]
            if len(ways) > MAX_WAYS or len(options) > MAX_WAYS:
                self._fail(f"more than {MAX_WAYS} combinations of other values", path, "a simpler condition")
                return None
        if not ways:
            self._fail("no setting fulfils this condition", path, "remove it, or the open value", key=True)
            return None
        # That the option around it is chosen is known from its place.
        return tuple(tuple(term for term in way if term not in place) for way in ways)

    def _one(self, key: str, wanted: Any, path: Path_) -> list[Way] | None:
        """The ways in which what stands at the dotted path `key` is as wanted."""
        steps = key.split(".")
        ends = list(self._ends(("model",), steps, ()))
        there = [end for end in ends if end.is_there]
        if self._steps > MAX_STEPS:
            self._fail(
                "the conditions of this file lead through too many options", path, "fewer of them", key=True
            )
            return None
        if not there:
            if any(_leads(one, steps) for one in self.broken):
                return None
            self._fail(f"there is no field {shown(key)} in the model", path, self._known(key), key=True)
            return None
        if all(end.parameter is None and not end.way for end in there):
            self._fail(
                f"{shown(key)} is not left open, so nothing depends on it", path, self._known(key), key=True
            )
            return None
        if any(end.parameter is not None and end.parameter.kind == "float" for end in there):
            what = f"{shown(key)} is a float, and no trial would meet one value of it"
            self._fail(what, path, "a choice or an int", key=True)
            return None
        options = wanted if isinstance(wanted, list) else [wanted]
        if HOLE in options:
            return None
        if not options:
            self._fail("there is no value in this list", path, EXAMPLE)
        found: list[Way] = []
        for index, option in enumerate(options[:MAX_ERRORS]):
            ways = [way for end in there for way in _as_wanted(end, option)]
            if not ways:
                place = (*path, index) if isinstance(wanted, list) else path
                self._fail(
                    f"{_words(option)} is no value of {printable(key)}", place, _values_hint(option, there)
                )
                return None
            found += ways
        return _joined(found) or None

    def _ends(self, path: Path_, steps: Sequence[str], way: Way) -> Iterator[_End]:
        """Everything that may stand where `steps` lead from `path`."""
        self._steps += 1
        if self._steps > MAX_STEPS:
            return
        parameter = self.parameters.get(path)
        if parameter is not None and steps and parameter.kind == "choice":
            yield from self._options(path, parameter, steps, way)
        elif parameter is not None:
            yield _End(way, None if steps else parameter, is_there=not steps)
        elif not steps:
            yield _End(way, None, _at(self.data, path))
        else:
            data, step = _at(self.data, path), steps[0]
            key = int(step) if isinstance(data, list) and step.isdecimal() and len(step) < 6 else step
            is_there = key in data if isinstance(data, dict) else isinstance(key, int) and key < len(data)
            if is_there and (*path, key) not in self.broken:
                yield from self._ends((*path, key), steps[1:], way)
            else:
                yield _End(way, is_there=False)

    def _options(self, path: Path_, parameter: Parameter, steps: Sequence[str], way: Way) -> Iterator[_End]:
        for index in range(len(parameter.choices)):
            rest = steps
            if steps[0] == "choice":
                if len(steps) < 2 or steps[1] != str(index):
                    continue
                rest = steps[2:]
            term = Term(parameter.name, frozenset({index}))
            yield from self._ends((*path, "choice", index), rest, (*way, term))
        form = _at(self.data, path)
        if "otherwise" in form and parameter.option(form["otherwise"]) is None:
            term = Term(parameter.name, frozenset({None}))
            yield from self._ends((*path, "otherwise"), steps, (*way, term))

    def _known(self, key: str) -> str | None:
        names = [parameter.name for parameter in self.parameters.values() if parameter.kind != "float"]
        short = [_short(name) for name in names]
        inside = [
            f"{_short(parameter.name)}.{name}"
            for parameter in self.parameters.values()
            for option in parameter.choices
            if isinstance(option, dict)
            for name in option
        ]
        close = nearest(key, dict.fromkeys([*names, *short, *inside]))
        if close is not None and close != key:
            return f"did you mean {printable(close)}?"
        known = [printable(name) for name in names if name][:SHOWN]
        return f"open are {', '.join(known)}"

    def _fail(self, what: str, path: Path_, hint: str | None, *, key: bool = False) -> None:
        self.findings.append(Finding("bad-space", what, path, hint, key))


def _at(data: Any, path: Path_) -> Any:
    for step in path:
        data = data[step]
    return data


def _leads(path: Path_, steps: Sequence[str]) -> bool:
    """Whether `steps`, below the model, lead through `path`."""
    own = [str(step) for step in path[1:]]
    return list(steps[: len(own)]) == own


def _short(name: str) -> str:
    """The name of a parameter without the options it stands in, as its field is called in the resolved model."""
    steps = name.split(".")
    while "choice" in steps:
        at = steps.index("choice")
        del steps[at : at + 2]
    return ".".join(steps)


def _as_wanted(end: _End, wanted: Any) -> Iterator[Way]:
    """The ways in which `end` is `wanted`; one, or none."""
    parameter = end.parameter
    if parameter is None:
        if same(end.value, wanted) and end.way:
            yield end.way
        return
    if isinstance(wanted, dict) and list(wanted) == ["option"]:
        number = wanted["option"]
        if type(number) is int and 0 <= number < len(parameter.choices):
            yield (*end.way, Term(parameter.name, frozenset({number})))
    elif parameter.allows(wanted):
        yield (*end.way, Term(parameter.name, frozenset({parameter.number(wanted)})))


def _words(option: Any) -> str:
    is_number = isinstance(option, dict) and list(option) == ["option"]
    return f"option {shown(option['option'])}" if is_number else shown(option)


def _values_hint(option: Any, ends: Sequence[_End]) -> str | None:
    known: list[str] = []
    for end in ends:
        one = end.parameter
        if one is not None and one.kind == "int":
            known.append(f"{one.low} to {one.high}")
        elif one is not None:
            known += [shown(value) for value in one.choices if not isinstance(value, (dict, list))]
            if all(isinstance(value, dict) for value in one.choices):
                known.append(f"{{option: 0}} to {{option: {len(one.choices) - 1}}}")
        elif not isinstance(end.value, (dict, list)):
            known.append(shown(end.value))
    names = list(dict.fromkeys(known))
    close = nearest(shown(option), names) if isinstance(option, str) else None
    if close is not None:
        return f"did you mean {close.strip(chr(39))}?"
    return f"it may be {', '.join(names[:SHOWN])}" if names else None


def _joined(ways: Sequence[Way]) -> list[Way]:
    """The same ways, those joined that differ in the numbers of their last term."""
    found: dict[tuple[Way, str], frozenset[int | None]] = {}
    for way in ways:
        key = (way[:-1], way[-1].name)
        found[key] = found.get(key, frozenset()) | way[-1].numbers
    return [(*before, Term(name, numbers)) for (before, name), numbers in found.items()]


def _met(one: Way, other: Way) -> Way | None:
    """Both ways at once; None if they contradict each other."""
    terms = {term.name: term.numbers for term in one}
    for term in other:
        terms[term.name] = terms.get(term.name, term.numbers) & term.numbers
    if not all(terms.values()):
        return None
    return tuple(Term(name, numbers) for name, numbers in terms.items())
