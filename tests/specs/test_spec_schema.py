"""The JSON Schema that editors use says what `load` says, as far as a schema can."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

from heddle.errors import HeddleErrors
from heddle.specs import json_schema, loads

ROOT = Path(__file__).parents[2]
EXAMPLES = [
    *sorted((ROOT / "examples").glob("*.yaml")),
    *sorted((ROOT / "examples" / "specs").glob("*.yaml")),
]
EXAMPLES.append(ROOT / "heddle" / "starter.yaml")
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


GOOD = [
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
    ("search.time", 90),
    ("search.budgets.0.decode_ms.batch", {"cpu": 1, "cuda": 4}),
    ("search.budgets.0.decode_ms.relative_to", "all-full"),
    ("train", {"tokens": "20M", "learning_rate": 1e-3, "precision": "bfloat16"}),
]
BAD = [
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
    loads(json.dumps(data))
    assert [error.message for error in VALIDATOR.iter_errors(data)] == []


@pytest.mark.parametrize(("path", "value"), BAD, ids=str)
def test_both_refuse_what_is_wrong(path: str, value: Any) -> None:
    data = _set(path, value)
    with pytest.raises(HeddleErrors):
        loads(json.dumps(data))
    assert not VALIDATOR.is_valid(data)


def test_every_field_is_described() -> None:
    bare = []
    for name, part in {"Spec": json_schema(), **json_schema()["$defs"]}.items():
        for field, schema in part.get("properties", {}).items():
            if (
                field != "kind"
                and "description" not in schema
                and "const" not in schema
                and name != "Placement"
            ):
                bare.append(f"{name}.{field}")
    assert not bare
