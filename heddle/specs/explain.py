"""Pydantic's findings in our own words, each with its path in the data."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel, Tag, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from heddle.specs.base import NAME_HINT, NAME_PATTERN, Schema, nearest
from heddle.specs.kinds import ChannelSpec, MixerSpec
from heddle.specs.mixers import ABSENT, BROKEN
from heddle.specs.model import CHANNELS, MIXERS
from heddle.specs.reader import HOLE, MAX_ERRORS, Path_, printable

FORM_KEYS = ("choice", "int", "float", "placement")


@dataclass(frozen=True, slots=True)
class Finding:
    """An error before it has a place in a file. `key` says that it speaks of the key at `path`, not of the value."""

    code: str
    what: str
    path: Path_
    hint: str | None = None
    key: bool = False

    def below(self, path: Path_) -> Finding:
        """The same finding in the data around it."""
        return Finding(self.code, self.what, (*path, *self.path), self.hint, self.key)


@cache
def _adapter(owner: type[Schema], field: str) -> TypeAdapter[Any]:
    annotation: Any = _annotation(owner, field)
    return TypeAdapter(annotation)


def _annotation(owner: type[BaseModel], field: str) -> Any:
    if not owner.__pydantic_fields_complete__:
        # What a composite mixer holds is known when the catalogue is.
        owner.model_rebuild()
    info = owner.model_fields[field]
    return typing.Annotated[info.annotation, info]


def check_field(owner: type[Schema], field: str, value: Any) -> tuple[Any, list[Finding]]:
    """The value of a field, validated, and no findings; or a hole and what is wrong with it, by path below the field."""
    return _checked(
        lambda: _adapter(owner, field).validate_python(value, strict=True),
        _Walk(_annotation(owner, field), field),
    )


def check_schema(schema: type[Schema], value: Any, name: str) -> tuple[Any, list[Finding]]:
    """As `check_field`, for a value that is a whole `schema`; `name` is what it is called."""
    return _checked(lambda: schema.model_validate(value), _Walk(schema, name))


def check_fields(
    schema: type[Schema], data: Mapping[str, Any], leave: tuple[str, ...]
) -> tuple[dict[str, Any], list[Finding]]:
    """Each field of `schema` by itself: the valid ones, and what is wrong with the others. `leave` is not looked at."""
    valid: dict[str, Any] = {}
    found = [_unknown(name, schema, ()) for name in _strange(schema, data)]
    for name, info in schema.model_fields.items():
        if name in leave:
            continue
        if name not in data:
            found += [missing(name, schema, ())] if info.is_required() else []
            continue
        value, wrong = check_field(schema, name, data[name])
        found += [one.below((name,)) for one in wrong]
        if value is not HOLE:
            valid[name] = value
    return valid, found


def _strange(schema: type[Schema], data: Mapping[str, Any]) -> list[str]:
    return [name for name in data if name not in schema.model_fields][:MAX_ERRORS]


def _checked(validate: Callable[[], Any], walk: _Walk) -> tuple[Any, list[Finding]]:
    try:
        return validate(), []
    except ValidationError as failure:
        # Those about a hole are no news, and nobody reads more than the first hundred.
        details = [one for one in failure.errors(include_url=False) if not _is_about_hole(one)]
        return HOLE, [walk.explain(one) for one in details[:MAX_ERRORS]]


def _is_about_hole(detail: ErrorDetails) -> bool:
    value = detail["input"]
    has_no_kind = detail["type"] == "union_tag_invalid" and isinstance(value, Mapping)
    return value is HOLE or (has_no_kind and value.get("kind") is HOLE)


@dataclass(frozen=True, slots=True)
class _Spot:
    """Where a finding points to: a path, the type there, and the schema whose field it is."""

    path: Path_
    annotation: Any
    owner: type[BaseModel] | None
    is_key: bool = False


class _Walk:
    """Follows pydantic's `loc` through the types: its steps for members of a union are no steps in the data."""

    def __init__(self, annotation: Any, name: str) -> None:
        self.annotation, self.name = annotation, name

    def spot(self, loc: tuple[str | int, ...]) -> _Spot:
        path: list[str | int] = []
        here, owner, is_key = self.annotation, None, False
        for step in loc:
            members = _members(here)
            # A budget of a latency has two tags, and is no union by itself.
            if len({kind for _, kind in members}) > 1:
                if all(typing.get_origin(kind) is typing.Literal for _, kind in members):
                    # One list of names in two parts.
                    continue
                here = next((kind for tag, kind in members if tag == step), None)
                continue
            kind = members[0][1] if members else None
            if step == "[key]":
                is_key = True
                continue
            path.append(step)
            owner = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
            here = _below(kind, step)
        return _Spot(tuple(path), here, owner, is_key)

    def explain(self, detail: ErrorDetails) -> Finding:
        kind, value, loc = detail["type"], detail["input"], detail["loc"]
        spot = self.spot(loc)
        name = next((str(step) for step in reversed(spot.path) if isinstance(step, str)), self.name)
        if kind == "extra_forbidden":
            assert spot.owner is not None
            return _unknown(str(spot.path[-1]), spot.owner, spot.path[:-1])
        if kind == "missing":
            assert spot.owner is not None
            return missing(str(spot.path[-1]), spot.owner, spot.path[:-1])
        if kind == "union_tag_not_found":
            kinds = ", ".join(_tags(spot.annotation))
            return Finding(
                "missing-field", "'kind' is missing", (*spot.path, "kind"), f"one of {kinds}", key=True
            )
        if kind == "union_tag_invalid":
            part = "mixer" if name == "mixers" else name
            return _unknown_kind(part, value, _tags(spot.annotation)).below(spot.path)
        if spot.is_key:
            return Finding("out-of-range", f"{shown(value)} is not a name", spot.path, NAME_HINT, key=True)
        if self.name == "layers" and len(spot.path) == 1 and kind in _EXPECTED:
            what = f"a layer is a block's name, {{block: …}} or {{repeat: …, pattern: […]}}; this is {shown(value)}"
            return Finding("wrong-type", what, spot.path)
        code, what, hint = _told(detail, spot.annotation)
        return Finding(code, what, spot.path, hint)


def _unknown_kind(part: str, value: Any, tags: list[str]) -> Finding:
    """Of a mapping `value` in the place of a mixer, say, whose kind is none."""
    kind = value.get("kind") if isinstance(value, Mapping) else value
    if not isinstance(kind, str):
        return Finding(
            "wrong-type", f"expected a kind, got {shown(kind)}", ("kind",), f"one of {', '.join(tags)}"
        )
    return Finding(
        "unknown-kind", f"there is no {part} kind {shown(kind)}", ("kind",), _kind_hint(kind, tags)
    )


def _kind_hint(tag: str, tags: list[str]) -> str:
    """What was meant, or why a package that offers this kind does not."""
    for one in (*BROKEN, *ABSENT):
        if one.kind == tag:
            return f"the package {one.package} offers it, but {one.why}"
    return meant(tag, tags)


def _unknown(name: str, owner: type[BaseModel], path: Path_) -> Finding:
    what = f"there is no field {shown(name)} here"
    fields = list(owner.model_fields)
    hint = meant(name, fields)
    others = [kind for kind, one in {**MIXERS, **CHANNELS}.items() if name in one.model_fields]
    if nearest(name, fields) is None and others and issubclass(owner, (MixerSpec, ChannelSpec)):
        hint = f"{name} is a field of {', '.join(others)}; {hint}"
    return Finding("unknown-field", what, (*path, name), hint, key=True)


def missing(name: str, owner: type[BaseModel], path: Path_ = ()) -> Finding:
    """That a field is not there."""
    description = owner.model_fields[name].description or ""
    return Finding(
        "missing-field", f"{name!r} is missing", (*path, name), f"{name}: {_lower(description)}", key=True
    )


def meant(name: object, known: list[str]) -> str:
    """`did you mean …?`, or everything there is."""
    close = nearest(name, known)
    return f"did you mean {close}?" if close is not None else f"known here: {', '.join(known)}"


def without_echoes(findings: list[Finding]) -> list[Finding]:
    """Without the fields that are missing only because they are misspelled beside it."""
    meant_here = {(one.path[:-1], one.hint) for one in findings if one.code == "unknown-field"}
    return [
        one
        for one in findings
        if one.code != "missing-field" or (one.path[:-1], f"did you mean {one.path[-1]}?") not in meant_here
    ]


_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def _told(detail: ErrorDetails, annotation: Any) -> tuple[str, str, str | None]:
    """Code, words and hint of a value that does not fit its field."""
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "literal_error":
        options = _literals(annotation)
        close = nearest(value, options)
        what = f"{shown(value)} is not one of {', '.join(options)}"
        return "out-of-range", what, f"did you mean {close}?" if close else None
    if kind in _EXPECTED:
        if isinstance(value, Mapping) and kind not in ("dict_type", "model_type", "model_attributes_type"):
            return _mapping_told(value, _EXPECTED[kind])
        return (
            "wrong-type",
            f"expected {_EXPECTED[kind]}, got {shown(value)}",
            _type_hint(kind, value, annotation),
        )
    if kind in _BOUNDS:
        name, word = _BOUNDS[kind]
        return "out-of-range", f"{shown(value)} is not {word} {_number(context[name])}", None
    if kind in ("too_long", "string_too_long"):
        unit = "characters" if kind == "string_too_long" else "items"
        return "out-of-range", f"more than {context['max_length']:,} {unit}", None
    if kind in ("too_short", "string_too_short"):
        items = "1 item" if len(value) == 1 else f"{len(value)} items"
        return (
            "out-of-range",
            f"{items}; at least {context['min_length']} are needed" if value else "is empty",
            None,
        )
    if kind == "string_pattern_mismatch":
        hint = (
            NAME_HINT
            if context["pattern"] == NAME_PATTERN
            else "letters, digits, '.', '_' and '-', at most 64"
        )
        return "out-of-range", f"{shown(value)} is not a name", hint
    if kind == "value_error":
        return "wrong-type", str(context["error"]), None
    return "wrong-type", f"{shown(value)}: {_lower(detail['msg'])}", None


def _mapping_told(value: Mapping[str, Any], expected: str) -> tuple[str, str, str | None]:
    """A mapping in the place of a plain value: perhaps a space form, misspelled or misplaced."""
    forms = [key for key in value if key in FORM_KEYS]
    if forms:
        return "bad-space", f"a value may be left open ({forms[0]}) inside model only", f"write {expected}"
    if expected == _EXPECTED["list_type"]:
        return "wrong-type", f"expected {expected}, got a mapping", "put it in a list, between [ and ]"
    close = next((form for key in value if (form := nearest(key, FORM_KEYS[:3])) is not None), None)
    return "wrong-type", f"expected {expected}, got a mapping", f"did you mean {close}?" if close else None


def _type_hint(kind: str, value: Any, annotation: Any) -> str | None:
    if kind == "bool_type" and isinstance(value, str) and value.lower() in ("yes", "no", "on", "off"):
        return "true" if value.lower() in ("yes", "on") else "false"
    if kind in ("int_type", "float_type") and isinstance(value, str) and value[:1].isdigit():
        return "a plain number, without quotes or units"
    tags = _tags(annotation)
    if kind not in ("model_type", "model_attributes_type") or not isinstance(value, str):
        return None
    if value in tags:
        return f"{{kind: {value}, …}}"
    needed = [name for name in _required(annotation) if name != "kind"]
    return f"{{{needed[0]}: {printable(value)}}}" if len(needed) == 1 and value.isidentifier() else None


def _required(annotation: Any) -> list[str]:
    """The fields that a value of this type must have, where it can be of one type alone."""
    members = [kind for _, kind in _members(annotation)]
    if len(members) != 1 or not (isinstance(members[0], type) and issubclass(members[0], BaseModel)):
        return []
    return [name for name, info in members[0].model_fields.items() if info.is_required()]


def shown(value: Any) -> str:
    """A value as an error quotes it: short, and safe to print."""
    assert value is not HOLE
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    text = repr(value) if isinstance(value, str) else str(value)
    return printable(text if len(text) <= 60 else f"{text[:56]}…{text[-1]}")


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _members(annotation: Any, tag: str | None = None) -> list[tuple[str | None, Any]]:
    """The types an annotation allows beside None, each with its tag in a union."""
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *notes = typing.get_args(annotation)
        tags = [note.tag for note in notes if isinstance(note, Tag)]
        return _members(inner, tags[0] if tags else tag)
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return [one for part in typing.get_args(annotation) for one in _members(part, tag)]
    if annotation is None or annotation is type(None):
        return []
    if tag is None and isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(one, annotation) for one in _own_tags(annotation)] or [(None, annotation)]
    return [(tag, annotation)]


def _own_tags(schema: type[BaseModel]) -> list[str]:
    """The tags by which a union knows a schema: its kind, or the phases of a budget."""
    kind, phase = (schema.model_fields.get(name) for name in ("kind", "phase"))
    if kind is not None:
        return [str(kind.default)]
    return [] if phase is None else [str(one) for one in typing.get_args(phase.annotation)]


def _tags(annotation: Any) -> list[str]:
    return [tag for tag, _ in _members(annotation) if tag is not None]


def _literals(annotation: Any) -> list[str]:
    return [str(option) for _, kind in _members(annotation) for option in typing.get_args(kind)]


def _below(kind: Any, step: str | int) -> Any:
    """The type of what stands at `step` inside a value of type `kind`."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return _annotation(kind, str(step)) if step in kind.model_fields else None
    arguments = typing.get_args(kind)
    return arguments[-1] if arguments else None
