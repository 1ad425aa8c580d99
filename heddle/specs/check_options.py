"""Checks what a spec could become: each option of each choice and the high end of each range, with the rest at its default."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from heddle.specs.check_references import References
from heddle.specs.checks import block_problems, vocabulary_findings
from heddle.specs.constant_stream import token_problems
from heddle.specs.explain import Finding, check_field
from heddle.specs.kinds import Problem
from heddle.specs.model import BlockSpec, ModelSpec
from heddle.specs.model_kind import readout_problems
from heddle.specs.model_parts import ModelParts, check_block, check_layers, override_findings
from heddle.specs.open_values import MODEL, OpenValues
from heddle.specs.parameter import Parameter, settings
from heddle.specs.reader import HOLE, MAX_ERRORS, Path_, dotted, steps_of

# Other settings that are tried before an option is called impossible, and for all options of a file together.
TRIES = 200
ALL_TRIES = 2000


@dataclass(frozen=True, slots=True)
class Context:
    """What else a file says that a model must fit, as far as it is known."""

    search: Any
    tokenizer: object


@dataclass(frozen=True, slots=True)
class _Option:
    """A value of a parameter, where it stands, and the setting it is tried in."""

    parameter: Parameter
    source: Path_
    path: Path_
    values: Mapping[str, Any]
    # The parameters that must keep their values for the option to be there.
    fixed: frozenset[str] = frozenset()


def option_findings(found: OpenValues, parts: ModelParts, context: Context) -> list[Finding]:
    """What is wrong with the options. Their paths are those of the file."""
    check = _Check(found, parts, context)
    findings: list[Finding] = []
    for option in () if found.is_too_large else _options(found):
        findings += check.option(option)
        if len(findings) > MAX_ERRORS:
            break
    return findings


def _options(found: OpenValues) -> Iterator[_Option]:
    paths = {parameter.name: path for path, parameter in found.parameters.items()}
    space = found.space
    at_defaults = {parameter.name for parameter in space.active({})}
    for path, parameter in found.parameters.items():
        target = _target(path, paths)
        opening = space.opening(parameter.name)
        if opening is not None:
            # Defaults were checked with the file, but only of what is open there.
            is_new = parameter.name not in at_defaults
            for source, value in _values(parameter, path, is_new=is_new):
                values = {**opening, parameter.name: value}
                yield _Option(parameter, source, target, values, frozenset(values))
        form_path = (*path, "otherwise")
        closing = space.closing(parameter.name) if form_path in found.document.values else None
        if closing is not None and parameter.name in at_defaults:
            yield _Option(parameter, form_path, target, closing, frozenset(closing))


def _values(parameter: Parameter, path: Path_, *, is_new: bool) -> Iterator[tuple[Path_, Any]]:
    """The values to try, each with its place: options, or the ends of a range. The default only if it `is_new`."""
    if parameter.kind == "choice":
        for index, choice in enumerate(parameter.choices):
            if index or is_new:
                yield (*path, "choice", index), choice
        return
    if is_new:
        yield (*path, parameter.kind, 0), parameter.low
    yield (*path, parameter.kind, 1), parameter.high


def _target(path: Path_, paths: Mapping[str, Path_]) -> Path_:
    """The path in the resolved data: without `choice` and the number of the option."""
    forms = {(*one, "choice") for one in paths.values()}
    steps: list[str | int] = []
    index = 0
    while index < len(path):
        if path[: index + 1] in forms:
            index += 2
            continue
        steps.append(path[index])
        index += 1
    return tuple(steps)


class _Check:
    """Checks options against the part of the model they stand in."""

    def __init__(self, found: OpenValues, parts: ModelParts, context: Context) -> None:
        self.found, self.parts, self.context = found, parts, context
        self.left = ALL_TRIES
        self.references = References(found, parts)

    def option(self, option: _Option) -> list[Finding]:
        return self._alone(option) or self._between_layers(option)

    def _between_layers(self, option: _Option) -> list[Finding]:
        """What layers cannot take from each other with this option."""
        found = []
        wrong = self.references.wrong(option.values, option.fixed or frozenset({option.parameter.name}))
        for block, one in {(block, one.link.reference.field): (block, one) for block, one in wrong}.values():
            field = (*MODEL, "blocks", block, *steps_of(one.link.reference.field))
            moves: dict[Path_, Path_] = {}
            self.found.fill(field[:3], option.values, moves)
            source = self.found.places(moves).source(field)
            is_in_it = source[: len(option.source)] == option.source
            what = one.what if is_in_it else f"with this option {dotted(field[1:])}: {one.what}"
            found.append(Finding(one.code, what, source if is_in_it else option.source, one.hint))
        return found

    def _alone(self, option: _Option) -> list[Finding]:
        name = str(option.path[1])
        if name == "blocks":
            block = option.path[2]
            return self._block(option, block) if isinstance(block, str) else []
        if name == "layers":
            return self._layers(option)
        return self._scalar(option, name) if name in ModelSpec.model_fields else []

    def _hidden_size(self, values: Mapping[str, Any]) -> int | None:
        """The width at `values`; None if it is not known."""
        if "hidden_size" not in self.parts.fields:
            return None
        value = self.found.fill((*MODEL, "hidden_size"), values, {})
        return value if type(value) is int and value > 0 else None

    def _filled(self, path: Path_, option: _Option) -> tuple[Any, dict[Path_, Path_]]:
        moves: dict[Path_, Path_] = {}
        return self.found.fill(path, option.values, moves), moves

    def _block(self, option: _Option, name: str) -> list[Finding]:
        path = (*MODEL, "blocks", name)
        data, moves = self._filled(path, option)
        block, wrong = check_block(data, {})
        if block is None:
            return self._own([one.below(path) for one in wrong], option, moves)
        hidden_size = self._hidden_size(option.values)
        if hidden_size is None or option.parameter.kind != "choice":
            return []
        default = self.parts.blocks.get(name)
        kind = self.parts.kind
        old = [] if default is None else block_problems(default, hidden_size, kind)
        # What the default has as well is told there, unless the option says it again.
        new = [
            (part, problem)
            for part, problem in block_problems(block, hidden_size, kind)
            if (part, problem) not in old or self._source(part, problem, path, option, moves)[1]
        ]
        if not new or self._can_be_built(option, name):
            return []
        return [self._told(part, problem, path, option, moves) for part, problem in new]

    def _can_be_built(self, option: _Option, name: str) -> bool:
        """Whether another setting of the block, or of the hidden size, makes the option legal."""
        path = (*MODEL, "blocks", name)
        near = [
            parameter
            for place, parameter in self.found.parameters.items()
            if (place[:3] == path or parameter.name == "hidden_size") and parameter.name not in option.fixed
        ]
        if not near:
            return False
        for setting in settings(near, TRIES):
            if self.left <= 0:
                # Out of patience: what cannot be shown to be wrong is let through, and met by the search.
                return True
            self.left -= 1
            values = {**option.values, **setting}
            block = check_block(self.found.fill(path, values, {}), {})[0]
            hidden_size = self._hidden_size(values)
            if block is None or hidden_size is None:
                continue
            if not block_problems(block, hidden_size, self.parts.kind):
                return True
        return False

    def _source(
        self, part: str, problem: Problem, path: Path_, option: _Option, moves: dict[Path_, Path_]
    ) -> tuple[Path_, bool]:
        """Where in the file the field stands, and whether that is in the option."""
        source = self.found.places(moves).source((*path, part, *steps_of(problem.field)))
        return source, source[: len(option.source)] == option.source

    def _told(
        self, part: str, problem: Problem, path: Path_, option: _Option, moves: dict[Path_, Path_]
    ) -> Finding:
        """The problem at the option that brings it, if need be away from the field that does not fit."""
        source, is_in_it = self._source(part, problem, path, option, moves)
        if is_in_it:
            return Finding(problem.code, problem.what, source, problem.hint)
        return Finding(
            problem.code,
            f"with this option {part}.{problem.field}: {problem.what}",
            option.source,
            problem.hint,
        )

    def _layers(self, option: _Option) -> list[Finding]:
        if self.found.has_placement:
            # Counts are checked with the placement.
            return []
        data, moves = self._filled((*MODEL, "layers"), option)
        wrong = check_layers(data, self.parts.blocks)[1]
        if "override" in option.path and self.parts.blocks:
            blocks = self._filled((*MODEL, "blocks"), option)[0]
            # Sizes may fit at other settings of the file; an unknown field, kind or value never does.
            fields = {**self.parts.fields, "hidden_size": None}
            wrong += override_findings(data, blocks, self.parts.blocks, fields)
        return self._own([one.below(MODEL) for one in wrong], option, moves)

    def _scalar(self, option: _Option, name: str) -> list[Finding]:
        path = (*MODEL, name)
        data, moves = self._filled(path, option)
        value, wrong = check_field(ModelSpec, name, data)
        if value is HOLE:
            return self._own([one.below(path) for one in wrong], option, moves)
        if name == "readout":
            wrong_sizes = readout_problems({**self.parts.fields, "kind": self.parts.kind, name: value})
            return [Finding(one.code, one.what, option.source, one.hint) for one in wrong_sizes]
        if name == "constant_tokens":
            wrong_ids = token_problems({**self.parts.fields, name: value})
            return [Finding(one.code, one.what, option.source, one.hint) for one in wrong_ids]
        if name == "vocab_size":
            told = vocabulary_findings(value, self.context.tokenizer, self.context.search)
            wrong_ids = token_problems({**self.parts.fields, name: value})
            told += [Finding(one.code, one.what, (), one.hint) for one in wrong_ids]
            return [one.below(option.source) for one in told]
        if name == "hidden_size" and option.parameter.kind == "choice":
            return [one for block in self.parts.blocks.items() for one in self._width(option, value, *block)]
        return []

    def _width(self, option: _Option, value: int, name: str, block: BlockSpec | None) -> list[Finding]:
        """What a block cannot do at another hidden size."""
        if block is None:
            return []
        kind = self.parts.kind
        old = block_problems(block, self.parts.fields.get("hidden_size", value), kind)
        new = [
            one
            for one in block_problems(block, value, kind)
            if one[1].field not in {problem.field for _, problem in old}
        ]
        if not new or self._can_be_built(option, name):
            return []
        return [
            Finding(
                problem.code,
                f"blocks.{name}.{part}.{problem.field}: {problem.what}",
                option.source,
                problem.hint,
            )
            for part, problem in new
        ]

    def _own(self, findings: list[Finding], option: _Option, moves: dict[Path_, Path_]) -> list[Finding]:
        """Those that stand in the option, at their places in the file; the others are told with the default."""
        places = self.found.places(moves)
        own = []
        for one in findings:
            source = places.source(one.path, key=one.key)
            if source[: len(option.source)] == option.source:
                own.append(Finding(one.code, one.what, source, one.hint, one.key))
        return own
