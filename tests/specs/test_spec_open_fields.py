"""Any value inside `model` may be left open: each field of each kind, wherever it stands."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from heddle.errors import HeddleErrors
from heddle.specs import CHANNELS, MIXERS, ModelSpec, loads, spec_hash
from heddle.specs.model import BlockSpec, Residual, Skip
from heddle.specs.reader import parse

ROOT = Path(__file__).parents[2]
Steps = tuple[str | int, ...]
# The kind decides what the others mean; blocks are names; a placement says for itself what it leaves open.
NEVER = {("kind",), ("blocks",), ("layers", "placement")}


def _sources() -> Iterator[tuple[str, dict[str, Any]]]:
    """Whole models: the examples, and one around each fragment of the page of the language."""
    for path in sorted((ROOT / "examples/specs").glob("*.yaml")):
        yield path.stem, parse(path.read_text(encoding="utf-8")).data["model"]
    page = (ROOT / "docs/spec.md").read_text(encoding="utf-8")
    for number, text in enumerate(re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)):
        data = parse(text).data
        if "search" not in data and not {"choice", "int", "float"} & set(
            re.findall(r"\b[a-z]+\b(?=:)", text)
        ):
            yield f"docs-{number}", _around(data)
    for kind, schema in CHANNELS.items():
        if not any(info.is_required() for info in schema.model_fields.values()):
            yield kind, _around({"channel": {"kind": kind}})


def _around(fragment: dict[str, Any]) -> dict[str, Any]:
    linear = {"mixer": {"kind": "gated_deltanet", "heads": 2}, "channel": {"kind": "swiglu"}}
    full = {"mixer": {"kind": "attention", "heads": 4}, "channel": {"kind": "swiglu"}}
    blocks = {"linear": linear, "full": full}
    model: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "blocks": blocks,
        "layers": ["linear", "full"],
    }
    inner = fragment.get("model", fragment)
    for key, value in inner.items():
        if key in ModelSpec.model_fields:
            model[key] = value
        elif key in BlockSpec.model_fields:
            full[key] = value
    return model


def parts(data: Any, path: Steps = ()) -> Iterator[Steps]:
    if path:
        yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from parts(value, (*path, key))


def at(data: Any, path: Steps) -> Any:
    for step in path:
        data = data[step]
    return data


def text_of(model: dict[str, Any]) -> str:
    return json.dumps({"version": 1, "name": "open", "tokenizer": "own", "model": model})


def with_open(model: dict[str, Any], path: Steps, form: dict[str, Any]) -> str:
    made = copy.deepcopy(model)
    at(made, path[:-1])[path[-1]] = form
    return text_of(made)


def _full(model: dict[str, Any]) -> dict[str, Any]:
    """The same model with every field written, defaults too."""
    data: dict[str, Any] = loads(text_of(model)).spec.model.model_dump()
    # An override would have all fields of the block.
    return {**data, "layers": model["layers"]}


SOURCES = [(name, _full(one)) for name, one in _sources() if "placement" not in str(one["layers"])]


def signature(model: dict[str, Any], path: Steps) -> tuple[str, ...]:
    """What stands at a path, whichever block or layer it is in."""
    found, here = [], model
    for step in path:
        kind = here.get("kind", "") if isinstance(here, dict) else ""
        found.append("" if isinstance(here, list) or here is model.get("blocks") else f"{kind}.{step}")
        here = here[step]
    return (*found, type(here).__name__)


def _cases() -> Iterator[Any]:
    """Each field once, in the first model that has it."""
    tried: set[tuple[str, ...]] = set()
    for name, model in SOURCES:
        paths = {signature(model, path): path for path in parts(model) if path not in NEVER}
        new = [path for told, path in paths.items() if told not in tried]
        tried |= set(paths)
        yield pytest.param(model, new, id=name)


@pytest.mark.parametrize(("model", "paths"), list(_cases()))
def test_a_choice_may_stand_for_any_value_of_a_model(model: dict[str, Any], paths: list[Steps]) -> None:
    plain = spec_hash(loads(text_of(model)).spec.model)
    for path in paths:
        value = at(model, path)
        form = {"choice": [value], "when": {"tie_embeddings": False}, "otherwise": value}
        is_decider = path == ("tie_embeddings",)
        tied = model["tie_embeddings"]
        deciding: dict[str, Any] = {"tie_embeddings": {"choice": [tied, not tied]}}
        if is_decider:
            form, deciding = {"choice": [value]}, {}
        file = loads(with_open({**model, **deciding}, path, form))
        assert spec_hash(file.spec.model) == plain, path
        assert file.space.size() == (1 if is_decider else 2)


def _fields(schema: type[BaseModel]) -> set[str]:
    return set(schema.model_fields) - {"kind"}


def test_these_models_have_every_field_of_every_kind() -> None:
    seen: dict[str, set[str]] = {}
    for _, model in SOURCES:
        for path in parts(model):
            held = at(model, path)
            if isinstance(held, dict):
                seen.setdefault(str(held.get("kind")), set()).update(held)
    for kind, schema in {**MIXERS, **CHANNELS}.items():
        if schema.__module__.startswith("heddle."):
            assert _fields(schema) <= seen[kind], kind
    assert _fields(BlockSpec) | _fields(Residual) | _fields(Skip) <= seen["None"]


def test_the_kind_of_a_model_and_the_names_of_its_blocks_are_never_open() -> None:
    model = SOURCES[0][1]
    with pytest.raises(HeddleErrors, match="kind of a model cannot be left open"):
        loads(text_of({**model, "kind": {"choice": ["causal_lm"]}}))
    with pytest.raises(HeddleErrors, match="word of the language"):
        loads(text_of({**model, "blocks": {"choice": [model["blocks"]]}}))
