"""Pieces of the JSON Schema that pydantic does not make: examples, unions by name, and blocks with some of their fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from heddle.specs.kinds import ChannelSpec, MixerSpec

Schema = dict[str, Any]
REF = "#/$defs/"
# What a field of this name may look like, where its schema does not say; whatever else has its default, or its lowest value.
EXAMPLES: dict[str, list[Any]] = {
    "name": ["gdn-softmax-24"],
    "vocab_size": [256, 32_000],
    "hidden_size": [256, 1024],
    "heads": [4, 16],
    "kv_heads": [2, 4],
    "value_heads": [4, 8],
    "head_dim": [64, 128],
    "value_dim": [64, 128],
    "short_conv": [4],
    "window": [512, 4096],
    "width": [1024],
    "ratio": [2.67],
    "logit_softcap": [30.0],
    "softcap": [50.0],
    "block": ["full"],
    "pattern": [["linear", "linear", "linear", "full"]],
    "repeat": [6],
    "source": ["embedding", "first"],
    "layers": [["full", {"repeat": 3, "pattern": ["linear", "full"]}]],
    "weights": [[1.0, 0.5]],
    "text_field": ["text"],
    "time": ["30m", "2h"],
    "relative_to": ["all-full"],
    "latency_model": ["latency.json"],
    "context": [8192],
    "at_most": [0.6],
    "tasks": [["text", {"mqar": {"pairs": 8}}]],
    "before": [[{"share": 0.1}, {"share": 0.3}]],
    "budgets": [[{"decode_ms": {"at_most": 20, "context": 8192}}]],
    "mixer": [{"kind": "attention", "heads": 4}],
    "mixers": [[{"kind": "attention", "heads": 4, "window": 128}, {"kind": "gated_deltanet", "heads": 2}]],
    "channel": [{"kind": "swiglu"}],
    "override": [{"mixer": {"window": None}}],
    "blocks": [{"full": {"mixer": {"kind": "attention", "heads": 4}, "channel": {"kind": "swiglu"}}}],
}
# A field with these is completed by editors from the schema itself.
_TELLING = ("enum", "const", "examples")


def add_notes(part: Schema) -> None:
    """Gives each field of a definition the default that pydantic makes by a factory, and an example."""
    required = part.get("required", [])
    for name, field in part.get("properties", {}).items():
        if name not in required and "default" not in field:
            field["default"] = [] if field.get("type") == "array" else {}
        if not any(key in field for key in _TELLING) and field.get("type") != "boolean":
            examples = [one for one in EXAMPLES.get(name, []) if _may_be(one, field)] or _examples(field)
            if examples:
                field["examples"] = examples


def _may_be(example: Any, field: Schema) -> bool:
    types = {one.get("type") for one in [field, *field.get("anyOf", [])]}
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return (
        names[type(example)] in types
        or (type(example) is int and "number" in types)
        or types <= {None, "null"}
    )


def _examples(field: Schema) -> list[Any]:
    if field.get("default") not in (None, [], {}):
        return [field["default"]]
    for one in [field, *field.get("anyOf", [])]:
        if one.get("type") in ("integer", "number"):
            low = one.get("minimum", one.get("exclusiveMinimum", 0))
            high = one.get("maximum", one.get("exclusiveMaximum", low + 2))
            return [low if "minimum" in one else (low + min(high, low + 2)) / 2]
    return []


def references(schema: Any) -> Iterator[str]:
    """The definitions that a schema names."""
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"].removeprefix(REF)
        for one in schema.values():
            yield from references(one)
    elif isinstance(schema, list):
        for one in schema:
            yield from references(one)


def reachable(definitions: dict[str, Schema], name: str) -> list[str]:
    """A definition and all that it leads to, each once."""
    found = [name]
    for one in found:
        found += [other for other in dict.fromkeys(references(definitions[one])) if other not in found]
    return found


def name_unions(definitions: dict[str, Schema]) -> None:
    """Turns each union of kinds into a definition of its own, AnyMixer and so on; a `kind` is required in its members."""
    bases = {"AnyMixer": MixerSpec, "AnyChannel": ChannelSpec}
    kinds = {name: {one.__name__ for one in _subclasses(base)} for name, base in bases.items()}
    made: dict[str, Schema] = {}

    def named(schema: Any, path: tuple[str, ...]) -> Any:
        if isinstance(schema, list):
            return [named(one, path) for one in schema]
        if not isinstance(schema, dict):
            return schema
        if set(schema) != {"discriminator", "oneOf"}:
            return {key: named(one, (*path, key)) for key, one in schema.items()}
        members = list(references(schema["oneOf"]))
        at = next(key for key in reversed(path) if key not in _KEYWORDS)
        name = next((one for one, known in kinds.items() if members[0] in known), f"Any{at.capitalize()}")
        made[name] = schema
        for member in members:
            required = definitions[member].get("required", [])
            definitions[member]["required"] = sorted({*required, "kind"})
        return {"$ref": f"{REF}{name}"}

    for name in list(definitions):
        definitions[name] = named(definitions[name], (name,))
    definitions |= made


_KEYWORDS = {
    "anyOf",
    "oneOf",
    "items",
    "properties",
    "choice",
    "otherwise",
    "additionalProperties",
    "patternProperties",
}


def _subclasses(base: type[Any]) -> Iterator[type[Any]]:
    for kind in base.__subclasses__():
        yield kind
        yield from _subclasses(kind)


def add_partials(definitions: dict[str, Schema], name: str) -> Schema:
    """A reference to the definition in which no field of `name`, or of what its fields hold, is required."""
    made = f"Partial{name}"
    if made not in definitions:
        definitions[made] = {}
        whole = {key: one for key, one in definitions[name].items() if key != "required"}
        definitions[made] |= _partial(definitions, whole)
    return {"$ref": f"{REF}{made}"}


def _partial(definitions: dict[str, Schema], schema: Any) -> Any:
    if isinstance(schema, list):
        return [_partial(definitions, one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if isinstance(schema.get("$ref"), str):
        name = schema["$ref"].removeprefix(REF)
        return schema if name in ("When", "Open") else add_partials(definitions, name)
    made: Schema = {}
    for key, one in schema.items():
        if key == "examples" or key == "default":
            made[key] = one
        elif key == "oneOf":
            made["anyOf"] = _partial(definitions, one)
        elif key == "items" and schema.get("type") == "array" and "maxItems" in schema:
            # Lists take each other's place as a whole.
            made[key] = one
        elif key != "discriminator":
            made[key] = _partial(definitions, one)
    return made
