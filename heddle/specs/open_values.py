"""Finds the open values in the data of a `model`, says what is wrong with them, and fills them in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from heddle.specs.conditions import Conditions
from heddle.specs.explain import Finding, meant, shown
from heddle.specs.parameter import Parameter, same
from heddle.specs.places import Places
from heddle.specs.reader import HOLE, MAX_ERRORS, Document, Path_, dotted
from heddle.specs.space import Placement, Space

FORMS: dict[str, tuple[str, ...]] = {
    "choice": ("choice", "when", "otherwise"),
    "int": ("int", "step", "log", "when", "otherwise"),
    "float": ("float", "log", "when", "otherwise"),
}
# Words that cannot name a block.
RESERVED = (*FORMS, "placement")
MODEL: Path_ = ("model",)
BLOCKS: Path_ = (*MODEL, "blocks")
PLACEMENT: Path_ = (*MODEL, "layers", "placement")
MAX_PARAMETERS = 200
MAX_OPTIONS = 1000
LARGEST = 10**15


@dataclass
class OpenValues:
    """The open values of a document: the space they span, where each stands, and what is wrong with them."""

    document: Document
    parameters: dict[Path_, Parameter] = field(default_factory=dict)
    placement: Placement | None = None
    findings: list[Finding] = field(default_factory=list)
    broken: set[Path_] = field(default_factory=set)
    # The same parameters, each after those it needs.
    ordered: tuple[Parameter, ...] = ()
    _above: set[Path_] = field(default_factory=set)

    @property
    def space(self) -> Space:
        return Space(self.ordered, self.placement)

    @property
    def is_too_large(self) -> bool:
        """Whether there are more open values or options than are looked at one by one."""
        options = sum(len(one.choices) for one in self.parameters.values())
        return len(self.parameters) > MAX_PARAMETERS or options > MAX_OPTIONS

    @property
    def has_placement(self) -> bool:
        """Whether the layers are a placement, a broken one too."""
        model = self.document.data.get("model")
        layers = model.get("layers") if isinstance(model, dict) else None
        return isinstance(layers, dict) and "placement" in layers

    def fill_model(
        self, values: Mapping[str, Any], layers: Sequence[str] | None, moves: dict[Path_, Path_]
    ) -> Any:
        """The model's data at `values`; a placement becomes `layers`, or the uniform ones."""
        filled = self.fill(MODEL, values, moves)
        if self.placement is None or not isinstance(filled, dict):
            return filled
        names = list(layers) if layers is not None else self.placement.uniform(self.space.held(values))
        for index, name in enumerate(names):
            if name in self.placement.of:
                moves[*MODEL, "layers", index] = (*PLACEMENT, "of", self.placement.of.index(name))
        return {**filled, "layers": names}

    def fill(self, path: Path_, values: Mapping[str, Any], moves: dict[Path_, Path_]) -> Any:
        """The data at `path` with every open value replaced; `moves` gets where the replaced pieces come from."""
        data: Any = self.document.data
        for step in path:
            data = data[step]
        opened, _ = self.space.at(values)
        return self._fill(data, path, path, opened, moves)

    def _fill(
        self, data: Any, source: Path_, target: Path_, opened: Mapping[str, Any], moves: dict[Path_, Path_]
    ) -> Any:
        if source in self.broken:
            return HOLE
        parameter = self.parameters.get(source)
        if parameter is not None:
            if parameter.name not in opened and parameter.when and "otherwise" in data:
                moves[target] = (*source, "otherwise")
                return data["otherwise"]
            # One that is not open has the value of a `when` without `otherwise`: its default.
            value = opened.get(parameter.name, parameter.default)
            if parameter.kind != "choice":
                moves[target] = (*source, parameter.kind, *_end(parameter, value))
                return value
            index = parameter.option(value)
            assert index is not None, f"{value!r} is no option of {parameter.name}"
            source = (*source, "choice", index)
            moves[target] = source
            return self._fill(parameter.choices[index], source, target, opened, moves)
        # Most of a file has no open value below it and is taken as it is.
        if source not in self._above:
            return data
        if isinstance(data, dict):
            return {
                key: self._fill(one, (*source, key), (*target, key), opened, moves)
                for key, one in data.items()
            }
        return [self._fill(one, (*source, i), (*target, i), opened, moves) for i, one in enumerate(data)]

    def places(self, moves: Mapping[Path_, Path_]) -> Places:
        return Places(self.document, moves)

    def fail(self, code: str, what: str, path: Path_, hint: str | None = None, *, key: bool = False) -> None:
        self.findings.append(Finding(code, what, path, hint, key))


def _end(parameter: Parameter, value: object) -> tuple[int, ...]:
    ends = [parameter.low, parameter.high]
    return (ends.index(value),) if value in ends else ()


def find_open_values(document: Document) -> OpenValues:
    """Every open value of the document's model."""
    found = OpenValues(document)
    model = document.data.get("model")
    if isinstance(model, dict):
        _find(found, model, MODEL, None)
    if found.is_too_large:
        what = f"more than {MAX_PARAMETERS} open values, or more than {MAX_OPTIONS:,} options"
        found.fail("bad-space", what, MODEL, key=True)
        found.ordered = tuple(found.parameters.values())
        return found
    conditions = Conditions(document.data, found.parameters, found.broken)
    conditions.read()
    found.ordered = conditions.ordered()
    found.findings += conditions.findings
    return found


def _find(found: OpenValues, data: Any, path: Path_, condition: tuple[str, int] | None) -> None:
    form = _form(data, path)
    if form is not None:
        found._above.update(path[:size] for size in range(len(path)))
        parameter = _parameter(found, form, data, path, condition)
        if parameter is None:
            found.broken.add(path)
            return
        found.parameters[path] = parameter
        for index, option in enumerate(parameter.choices):
            _find(found, option, (*path, "choice", index), (parameter.name, index))
    elif isinstance(data, dict):
        for key, value in data.items():
            _find(found, value, (*path, key), condition)
    elif isinstance(data, list):
        for index, value in enumerate(data):
            _find(found, value, (*path, index), condition)


def _form(data: Any, path: Path_) -> str | None:
    """Which space form `data` is, if it is one."""
    if not isinstance(data, dict):
        return None
    # In these keys are names: of the model's own fields, and of blocks.
    if path in (MODEL, BLOCKS, (*PLACEMENT, "count")):
        return None
    return next((form for form in FORMS if form in data), None)


def _parameter(
    found: OpenValues, form: str, data: dict[str, Any], path: Path_, condition: tuple[str, int] | None
) -> Parameter | None:
    strange = [key for key in data if key not in FORMS[form]][:MAX_ERRORS]
    for key in strange:
        what = f"there is no field {shown(key)} in {{{form}: …}}"
        found.fail("unknown-field", what, (*path, key), meant(key, list(FORMS[form])), key=True)
    if strange:
        return None
    name = dotted(path)
    if (inner := next(_forms_in(data.get("otherwise"), (*path, "otherwise")), None)) is not None:
        found.fail("bad-space", "otherwise is a plain value, and this leaves one open", inner, "one value")
        return None
    if form == "choice":
        choices = _choices(found, data["choice"], (*path, "choice"))
        return None if choices is None else Parameter(name, "choice", choices, condition=condition)
    ends = _ends(found, form, data[form], (*path, form))
    if ends is None:
        return None
    if form == "int":
        return _int(found, data, path, Parameter(name, "int", (), *ends, condition=condition))
    return _logged(
        found, data, path, Parameter(name, "float", (), float(ends[0]), float(ends[1]), condition=condition)
    )


def _forms_in(data: Any, path: Path_) -> Iterator[Path_]:
    """Where open values stand in the data."""
    if _form(data, path) is not None:
        yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from _forms_in(value, (*path, key))


def _choices(found: OpenValues, options: Any, path: Path_) -> tuple[Any, ...] | None:
    if options is HOLE:
        return None
    if not isinstance(options, list) or not options:
        found.fail(
            "bad-space", f"a choice is a list of options, got {shown(options)}", path, "{choice: [1, 2]}"
        )
        return None
    for index, option in enumerate(options[:MAX_OPTIONS]):
        first = next(number for number, one in enumerate(options) if same(one, option))
        if first < index:
            found.fail(
                "bad-space", f"option {index + 1} repeats option {first + 1}", (*path, index), "remove one"
            )
            return None
    return tuple(options)


def _ends(found: OpenValues, form: str, ends: Any, path: Path_) -> tuple[float, float] | None:
    if ends is HOLE or (isinstance(ends, list) and HOLE in ends):
        return None
    kinds, numbers = ((int,), "whole numbers") if form == "int" else ((int, float), "numbers")
    if not isinstance(ends, list) or len(ends) != 2 or any(type(end) not in kinds for end in ends):
        example = "{int: [1, 8]}" if form == "int" else "{float: [0.1, 0.9]}"
        found.fail("bad-space", f"{form} is [low, high], two {numbers}", path, example)
        return None
    low, high = ends
    if max(abs(low), abs(high)) > LARGEST:
        found.fail("bad-space", f"the ends are at most {LARGEST:,}", path)
        return None
    if low > high:
        found.fail("bad-space", f"low {low} is above high {high}", path, f"[{high}, {low}]")
        return None
    return low, high


def _int(found: OpenValues, data: dict[str, Any], path: Path_, parameter: Parameter) -> Parameter | None:
    step = data.get("step")
    if HOLE in (step, data.get("log")):
        return None
    if "step" not in data:
        return _logged(found, data, path, parameter)
    if type(step) is not int or step < 1:
        found.fail("bad-space", f"step is a whole number of at least 1, got {shown(step)}", (*path, "step"))
        return None
    if data.get("log") is True:
        found.fail("bad-space", "step and log exclude each other", (*path, "log"), "remove one")
        return None
    return replace(parameter, step=step)


def _logged(found: OpenValues, data: dict[str, Any], path: Path_, parameter: Parameter) -> Parameter | None:
    log = data.get("log", False)
    if log is HOLE:
        return None
    if not isinstance(log, bool):
        found.fail("wrong-type", f"expected true or false, got {shown(log)}", (*path, "log"))
        return None
    assert parameter.low is not None
    if log and parameter.low <= 0:
        found.fail("bad-space", "log needs a low end above 0", (*path, "log"))
        return None
    return replace(parameter, log=log)
