"""The JSON Schema of a spec file, for editors: every field with its description, bounds and default."""

from __future__ import annotations

from typing import Any

from heddle.specs.layer import MAX_LAYERS
from heddle.specs.open_values import FORMS, RESERVED
from heddle.specs.schema_parts import REF, Schema, add_notes, add_partials, name_unions, reachable
from heddle.specs.search import BUDGETS
from heddle.specs.spec import Spec
from heddle.specs.tasks import TASKS

_NOTES = ("description", "default", "examples")


def json_schema() -> Schema:
    """Draft 2020-12. What it cannot say (sizes that must fit each other, names that must exist) `load` checks."""
    schema = _without_titles(Spec.model_json_schema())
    definitions = schema.pop("$defs")
    for part in (schema, *definitions.values()):
        add_notes(part)
    for name in reachable(definitions, "ModelSpec"):
        definitions[name] = _open_fields(definitions[name])
    model = definitions["ModelSpec"]["properties"]
    model["layers"]["anyOf"].append({"$ref": f"{REF}Placement"})
    definitions |= {"Placement": _placement(), "When": WHEN, "Open": OPEN}
    _name_blocks(model["blocks"]["anyOf"][0])
    _short_forms(definitions)
    name_unions(definitions)
    override = definitions["OneLayer"]["properties"]["override"]["anyOf"]
    override[0] = add_partials(definitions, "BlockSpec")
    options = {"anyOf": [override[0], {"$ref": f"{REF}Open"}]}
    override[1]["properties"]["choice"]["items"] = options
    override[1]["properties"]["otherwise"] = override[0]
    schema["required"] = ["version", "name", "model"]
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Heddle spec"}
    return {**head, **schema, "$defs": dict(sorted(definitions.items()))}


def _without_titles(value: Any) -> Any:
    """Pydantic's titles repeat the names."""
    if isinstance(value, dict):
        return {
            key: _without_titles(one)
            for key, one in value.items()
            if key != "title" or not isinstance(one, str)
        }
    return [_without_titles(one) for one in value] if isinstance(value, list) else value


def _open_fields(schema: Schema) -> Schema:
    properties = {
        name: one if name == "kind" or "const" in one else _open(one)
        for name, one in schema["properties"].items()
    }
    return {**schema, "properties": properties}


def _open(schema: Schema) -> Schema:
    """`schema`, or a choice among such values, or a range if they are numbers."""
    notes = {key: schema[key] for key in _NOTES if key in schema}
    plain = _open_inside({key: value for key, value in schema.items() if key not in _NOTES})
    closed = {"when": {"$ref": f"{REF}When"}, "otherwise": plain}
    options = {"type": "array", "minItems": 1, "items": {"anyOf": [plain, {"$ref": f"{REF}Open"}]}}
    forms = [_form("choice", options, **closed)]
    types = {one.get("type") for one in [plain, *plain.get("anyOf", [])]}
    if types & {"integer", "number"}:
        forms.append(_form("int", _ends("integer"), step=_STEP, log=_LOG, **closed))
    if "number" in types:
        forms.append(_form("float", _ends("number"), log=_LOG, **closed))
    if "discriminator" in plain:
        kinds = list(plain["discriminator"]["mapping"])
        kind = _form("choice", {"type": "array", "minItems": 1, "items": {"enum": kinds}})
        kind["properties"] |= {"when": closed["when"], "otherwise": {"enum": kinds}}
        forms.append({"type": "object", "properties": {"kind": kind}, "required": ["kind"]})
    return {**notes, "anyOf": [plain, *forms]}


def _ends(kind: str) -> Schema:
    return {"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": kind}}


_STEP: Schema = {"type": "integer", "minimum": 1, "description": "Distance of the values."}
_LOG: Schema = {
    "type": "boolean",
    "default": False,
    "description": "Whether values are drawn on a logarithmic scale.",
}
WHEN: Schema = {
    "type": "object",
    "minProperties": 1,
    "description": "Fields that are left open, by dotted path, each with the value or the list of values at which this one "
    "is open; {option: N} is an option by its number, from 0. Elsewhere the field is `otherwise`, or its first value.",
    "examples": [{"blocks.linear.mixer.kind": "attention"}, {"hidden_size": [512, 1024]}],
}


# An option that is left open again; what stands in it is checked by `load`.
OPEN: Schema = {
    "type": "object",
    "anyOf": [{"required": [form]} for form in FORMS],
    "description": "A value that is left open inside an option of another.",
}


def _open_inside(schema: Schema) -> Schema:
    """The items of lists and the values of named blocks may be open, too."""
    made = dict(schema)
    if "items" in made:
        made["items"] = _open(made["items"])
    if "patternProperties" in made:
        made["patternProperties"] = {key: _open(one) for key, one in made["patternProperties"].items()}
    if "additionalProperties" in made and isinstance(made["additionalProperties"], dict):
        made["additionalProperties"] = _open(made["additionalProperties"])
    for union in ("anyOf", "oneOf"):
        if union in made:
            made[union] = [_open_inside(one) for one in made[union]]
    return made


def _form(name: str, value: Schema, **others: Schema) -> Schema:
    properties = {name: value, **others}
    return {"type": "object", "properties": properties, "required": [name], "additionalProperties": False}


def _placement() -> Schema:
    count: Schema = {"type": "integer", "minimum": 0}
    names = {"type": "array", "minItems": 1, "maxItems": 16, "uniqueItems": True, "items": {"type": "string"}}
    fields = {
        "length": {
            "type": "integer",
            "minimum": 1,
            "maximum": MAX_LAYERS,
            "description": "Layers in all (a count).",
        },
        "of": {**names, "description": "The blocks to place."},
        "count": {
            "type": "object",
            "additionalProperties": _open(count),
            "description": "How many layers each block gets; the one block without a count takes the rest.",
        },
    }
    inner = {
        "type": "object",
        "properties": fields,
        "required": ["length", "of"],
        "additionalProperties": False,
    }
    told = "Leaves it to the search where the blocks stand, and how many of each if a count is open."
    return {**_form("placement", inner), "description": told}


def _name_blocks(blocks: Schema) -> None:
    blocks["additionalProperties"] = False
    blocks["propertyNames"] = {"not": {"enum": list(RESERVED)}}


def _short_forms(definitions: dict[str, Schema]) -> None:
    """Tasks and budgets as they are written: by name, or by name with fields."""
    search = definitions["SearchSpec"]["properties"]
    tasks = [
        _named(kind, definitions.pop(one.__name__), "kind", optional=True) for kind, one in TASKS.items()
    ]
    for part in (search, definitions["RungSpec"]["properties"]):
        part["tasks"]["items"] = {"$ref": f"{REF}AnyTask"}
    definitions["AnyTask"] = {"anyOf": [{"enum": list(TASKS)}, *tasks]}
    budgets = {one.__name__: definitions.pop(one.__name__) for one in dict.fromkeys(BUDGETS.values())}
    search["budgets"]["items"] = {
        "anyOf": [_named(phase, budgets[one.__name__], "phase") for phase, one in BUDGETS.items()]
    }


def _named(name: str, schema: Schema, tag: str, *, optional: bool = False) -> Schema:
    properties = {key: one for key, one in schema["properties"].items() if key != tag}
    fields = {**schema, "properties": properties}
    if "required" in schema:
        fields["required"] = [key for key in schema["required"] if key != tag]
    return _form(name, {"anyOf": [fields, {"type": "null"}]} if optional else fields)
