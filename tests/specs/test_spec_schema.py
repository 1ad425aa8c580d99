"""The JSON Schema that editors use says what `load` says, as far as a schema can."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

from heddle.errors import HeddleError, HeddleErrors
from heddle.specs import json_schema, loads
from heddle.specs.reader import parse

ROOT = Path(__file__).parents[2]
EXAMPLES = [
    *sorted((ROOT / "examples").glob("*.yaml")),
    *sorted((ROOT / "examples" / "specs").glob("*.yaml")),
    *sorted((ROOT / "heddle" / "specs" / "zoo").glob("*.yaml")),
    ROOT / "heddle" / "starter.yaml",
]
VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def _base() -> dict[str, Any]:
    linear = {"mixer": {"kind": "gated_deltanet", "heads": 2}, "channel": {"kind": "swiglu"}}
    full = {"mixer": {"kind": "attention", "heads": 4}, "channel": {"kind": "gelu"}}
    placement = {"length": 4, "of": ["linear", "full"], "count": {"full": {"int": [1, 2]}}}
    return {
        "version": 1,
        "name": "base",
        "model": {
            "vocab_size": 256,
            "hidden_size": 64,
            "blocks": {"linear": linear, "full": full},
            "layers": {"placement": placement},
        },
        "search": {"tasks": ["text"], "budgets": [{"decode_ms": {"at_most": 1.0, "context": 64}}]},
    }


def _set(path: str, value: Any) -> dict[str, Any]:
    data = _base()
    here: Any = data
    *way, last = path.split(".")
    for step in way:
        here = here[int(step)] if step.isdigit() else here[step]
    if isinstance(here, list):
        here[int(last)] = value
    else:
        here[last] = value
    return data


def test_the_schema_is_a_schema() -> None:
    assert json_schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(json_schema())


def test_the_committed_schema_is_todays() -> None:
    committed = (ROOT / "docs" / "heddle.schema.json").read_text(encoding="utf-8")
    assert json.loads(committed) == json_schema(), "heddle schema --out docs/heddle.schema.json"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid_for_both(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    loads(text)
    assert [error.message for error in VALIDATOR.iter_errors(YAML(typ="safe").load(text))] == []


PARALLEL = {
    "kind": "parallel",
    "mixers": [{"kind": "attention", "heads": 4}, {"kind": "gated_deltanet", "heads": 2}],
}
GOOD = [
    ("model.blocks.full.mixer", PARALLEL),
    (
        "model.blocks.full.mixer",
        {**PARALLEL, "merge": {"choice": ["sum", "mean"]}, "weights": [1.0, {"float": [0.1, 1.0]}]},
    ),
    ("model.blocks.full.mixer", {**PARALLEL, "mixers": [PARALLEL, {"choice": PARALLEL["mixers"]}]}),
    (
        "model.layers",
        [{"block": "full"}, {"block": "full", "name": "anchor", "override": {"mixer": {"window": 8}}}],
    ),
    (
        "model.layers",
        [{"block": "full", "override": {"mixer": {"rope": {"theta": 500.0}}, "norm": "layernorm"}}],
    ),
    ("model.layers", [{"block": "full", "override": {"mixer": {"kind": "gated_deltanet", "heads": 2}}}]),
    (
        "model.layers",
        [{"block": "full", "override": {"mixer": {"window": {"int": [4, 8]}}, "residual": {"branch": 0.5}}}],
    ),
    (
        "model.layers",
        [{"block": "full", "override": {"choice": [{"mixer": {"window": 8}}, {"norm": "layernorm"}]}}],
    ),
    ("model.layers", [{"choice": ["full", "linear"]}, "full"]),
    ("model.blocks.full.skip", {"source": "embedding", "init": {"choice": [0.0, 0.5]}}),
    ("model.blocks.full.residual", {"of": "normed", "stream": 2.0}),
    ("model.hidden_size", {"choice": [64, {"int": [64, 128], "step": 64}]}),
    (
        "model.norm_eps",
        {"float": [1e-6, 1e-4], "when": {"layers.placement.count.full": 2}, "otherwise": 1e-5},
    ),
    (
        "model.blocks.full.mixer.rope",
        {"choice": [None, {"theta": 500.0}], "when": {"layers.placement.count.full": [1, 2]}},
    ),
    (
        "model.blocks.full.channel.kind",
        {"choice": ["gelu", "relu2"], "when": {"layers.placement.count.full": 1}},
    ),
    ("model.hidden_size", {"choice": [64, 128]}),
    (
        "model.blocks.full.mixer",
        {"choice": [{"kind": "attention", "heads": 2}, {"kind": "gated_deltanet", "heads": 2}]},
    ),
    ("model.blocks.full.mixer.rope", None),
    ("model.blocks.full.mixer.rope", {"theta": {"float": [1e3, 1e5], "log": True}}),
    ("model.blocks.full.mixer.window", {"int": [8, 64], "step": 8}),
    ("model.blocks.full.norm", {"choice": ["rmsnorm", "layernorm"]}),
    ("model.layers", ["full", {"repeat": {"int": [1, 2]}, "pattern": ["linear", "full"]}]),
    ("model.layers.placement.count.full", 1),
    ("search.tasks", [{"mqar": {"pairs": 2, "tokens": "4k"}}, {"text": {}}, "text"]),
    ("search.time", "5m"),
    ("search.time", " 0.5 h "),
    ("search.time", 90),
    ("search.budgets.0.decode_ms.batch", {"cpu": 1, "cuda": 4}),
    ("search.budgets.0.decode_ms.relative_to", "all-full"),
    ("train", {"tokens": "20M", "learning_rate": 1e-3, "precision": "bfloat16"}),
]
BAD = [
    ("model.blocks.full.mixer", {**PARALLEL, "mixers": PARALLEL["mixers"][:1]}),
    ("model.blocks.full.mixer", {**PARALLEL, "mixers": PARALLEL["mixers"][0]}),
    ("model.blocks.full.mixer", {**PARALLEL, "mixers": [PARALLEL, {"kind": "attention", "head": 2}]}),
    ("model.blocks.full.mixer", {**PARALLEL, "mixers": [PARALLEL, {"heads": 2}]}),
    ("model.blocks.full.mixer", {**PARALLEL, "merge": "summ"}),
    ("model.blocks.full.mixer", {"heads": 4}),
    ("model.layers", [{"blok": "full"}]),
    ("model.layers", [{"block": "full", "nam": "a"}]),
    ("model.layers", [{"block": "full", "name": "a b"}]),
    ("model.layers", [{"block": "full", "override": {"mixer": {"windw": 8}}}]),
    ("model.layers", [{"block": "full", "override": {"mixr": {"window": 8}}}]),
    ("model.layers", [{"block": "full", "override": {"mixer": {"rope": {"theta": 0}}}}]),
    ("model.layers", [{"block": "full", "override": {"norm": "batchnorm"}}]),
    ("model.layers", [{"block": "full", "repeat": 2}]),
    ("model.blocks.full.skip", {"init": 0.5}),
    ("model.blocks.full.skip", "embedding"),
    ("model.blocks.full.residual", {"of": "norm"}),
    ("model.hidden_size", {"choice": [64, 128], "wen": {"layers.placement.count.full": 1}}),
    ("model.hidden_size", {"choice": [64, 128], "when": {}}),
    (
        "model.hidden_size",
        {"choice": [64, 128], "when": {"layers.placement.count.full": 1}, "otherwise": "64"},
    ),
    ("train", {"tokens": "20X"}),
    ("train", {"tokens": 0}),
    ("train", {"tokens": "0M"}),
    ("search.time", "0.0h"),
    ("version", 2),
    ("name", "a b"),
    ("extra", 1),
    ("model.hidden_size", "64"),
    ("model.hidden_size", 0),
    ("model.hidden_size", {"int": [1]}),
    ("model.blocks.full.mixer.kind", "atention"),
    ("model.blocks.full.mixer.head", 4),
    ("model.blocks.full.mixer.qk_norm", "yes"),
    ("model.blocks.full.channel", "swiglu"),
    ("model.layers", []),
    ("model.layers.placement.length", 0),
    ("search.tasks", ["txt"]),
    ("search.tasks", []),
    ("search.budgets.0", {"decode": {"at_most": 1.0, "context": 64}}),
    ("search.budgets.0.decode_ms.at_most", 0),
    ("search.budgets.0.decode_ms.batch", {"cpu": 1}),
    ("search.sampler", "tpee"),
    ("train", {"learning_rate": {"float": [0.1, 0.2]}}),
    ("train", {"precision": "float16"}),
]


@pytest.mark.parametrize(("path", "value"), GOOD, ids=str)
def test_both_accept_what_is_right(path: str, value: Any) -> None:
    data = _set(path, value)
    if path == "model.layers":
        # Then nothing may be left to search.
        del data["search"]
    loads(json.dumps(data))
    assert [error.message for error in VALIDATOR.iter_errors(data)] == []


@pytest.mark.parametrize(("path", "value"), BAD, ids=str)
def test_both_refuse_what_is_wrong(path: str, value: Any) -> None:
    data = _set(path, value)
    with pytest.raises(HeddleErrors):
        loads(json.dumps(data))
    assert not VALIDATOR.is_valid(data)


def definitions() -> Iterator[tuple[str, dict[str, Any]]]:
    schema = json_schema()
    yield from {"Spec": schema, **schema["$defs"]}.items()


def fields() -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Every field but kinds, by a name, its schema, and whether it must be there."""
    for name, part in definitions():
        for field, schema in part.get("properties", {}).items():
            if field != "kind" and "const" not in schema:
                yield (
                    f"{name}.{field}",
                    schema,
                    field in part.get("required", []) or name.startswith("Partial"),
                )


def test_every_field_has_a_description_and_a_default_or_must_be_there() -> None:
    assert [
        name
        for name, schema, _ in fields()
        if not schema.get("description") and name != "Placement.placement"
    ] == []
    assert [name for name, schema, is_needed in fields() if not is_needed and "default" not in schema] == []
    assert [
        name for name, part in definitions() if "properties" in part and not part.get("description")
    ] == []


def is_of(schema: dict[str, Any], kinds: set[str]) -> bool:
    return any(one.get("type") in kinds for one in [schema, *schema.get("anyOf", [])])


def test_every_number_and_text_has_an_example_that_is_valid() -> None:
    schema = json_schema()
    for name, field, _ in fields():
        text = json.dumps(field)
        if (
            is_of(field, {"integer", "number", "string", "array"})
            and "enum" not in text
            and "Placement" not in name
        ):
            assert field.get("examples"), name
        for example in [*field.get("examples", []), *([field["default"]] if "default" in field else [])]:
            validator = jsonschema.Draft202012Validator({**field, "$defs": schema["$defs"]})
            assert validator.is_valid(example), f"{name}: {example}"


# What a number may be counted in. A word that is new here is a unit, or a sign that a description names none.
UNITS = re.compile(
    r"count|tokens?|features?|second|share|factor|heads?|layers?|wide|width|taps|dimension|seed|ratio|rate|number|quer(y|ies)|"
    r"expert|millisec|multipl|added|temperature|version|norm|bytes|blocks?|channels?|wavelength|logits|Classes|specs?|"
    r"trials|devices?|CPU|GPU|pattern|turns?|scale|begins|context|objective|vector|limits",
    re.IGNORECASE,
)


def test_every_number_says_what_it_counts() -> None:
    for name, field, _ in fields():
        if is_of(field, {"integer", "number"}):
            assert UNITS.search(field["description"]), f"{name}: {field['description']}"


def test_the_forms_of_open_values_are_described() -> None:
    schema = json_schema()["$defs"]
    assert all(schema[name]["description"] for name in ("When", "Open", "Placement"))
    assert {"PartialBlockSpec", "PartialAnyMixer", "PartialRope", "PartialSkip"} <= set(schema)
    assert "required" not in schema["PartialBlockSpec"]


# What a schema can express: which fields there are and must be, types, and the bounds of one value. It cannot say how
# fields relate to each other, which names exist, what the words of the language are, how much is too much in all, or that 2.0
# is no whole number; and inside open values it takes more than `load` does.
EXPRESSIBLE = {"unknown-field", "unknown-kind", "missing-field", "wrong-type", "out-of-range"}
BOUNDS = re.compile(
    r"is not (above|at least|below|at most) [0-9.,e+-]+$|is not one of |is not a name$|is empty$|"
    r"^more than [0-9,]+ (items|characters)$|at least [0-9]+ are needed$"
)
NOT_EXPRESSIBLE = re.compile(r"is not a whole number$|expected a whole number, got -?[0-9.e+]+$")


def is_expressible(error: HeddleError) -> bool:
    inside = any(
        f".{form}." in f".{error.where.path}." for form in ("choice", "otherwise", "when", "int", "float")
    )
    # Of which kind the block is that an override changes, the schema does not know.
    overridden = re.search(r"\.override\.(mixer|channel)", error.where.path)
    if error.code not in EXPRESSIBLE or inside or overridden or NOT_EXPRESSIBLE.search(error.what):
        return False
    return error.code != "out-of-range" or BOUNDS.search(error.what) is not None


def told(text: str) -> tuple[HeddleError, ...]:
    try:
        loads(text)
    except HeddleErrors as errors:
        return errors.errors
    return ()


def test_an_independent_validator_agrees_wherever_a_schema_can_say_it(
    broken_spec: Callable[[random.Random], str], random_seed: int, full_counts: bool
) -> None:
    seen: Counter[str] = Counter()
    for number in range(10_000 if full_counts else 400):
        text = broken_spec(random.Random(f"schema-{random_seed}-{number}"))
        try:
            document = parse(text)
        except HeddleErrors:
            continue
        if document.errors:
            continue
        errors = told(text)
        place = f"seed {random_seed}, case {number}: {list(map(str, errors))}\n{text}"
        if any(is_expressible(error) for error in errors):
            seen["refused"] += 1
            assert not VALIDATOR.is_valid(document.data), place
        elif not errors:
            seen["accepted"] += 1
            assert [error.message[:200] for error in VALIDATOR.iter_errors(document.data)] == [], place
    assert seen["refused"] > 50
    assert seen["accepted"] > 10
