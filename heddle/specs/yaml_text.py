"""A resolved spec as plain YAML that reads well."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from heddle.specs.model import ModelSpec
from heddle.specs.pattern import expand_layers, fold_items
from heddle.specs.spec import VERSION, Spec

# A mapping or list that fits on a line of this length stands on it.
LINE = 100
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}


def to_yaml(spec: Spec) -> str:
    """The resolved spec as YAML: no open values, no search, nothing at its default, repeats folded.

    It loads again to the same hash.
    """
    model: dict[str, Any] = {"vocab_size": spec.model.vocab_size, "hidden_size": spec.model.hidden_size}
    written = spec.model.written()
    model |= {name: value for name, value in written.items() if name not in ("blocks", "layers")}
    names = expand_layers(spec.model)
    model["blocks"] = {name: written["blocks"][name] for name in _in_order(spec.model, names)}
    model["layers"] = fold_items(spec.model.layers)
    rest = spec.model_dump(exclude={"version", "name", "model", "search"}, exclude_defaults=True)
    whole = {"version": VERSION, "name": spec.name, "model": model, **rest}
    return "".join(f"{line}\n" for key, value in whole.items() for line in _lines(key, value, 0))


def _in_order(model: ModelSpec, names: Sequence[str]) -> list[str]:
    used = set(names)
    return [name for name in model.blocks if name in used]


def _lines(key: str, value: Any, depth: int) -> list[str]:
    """`key: value`, on one line where it fits; the upper levels are always opened."""
    head = f"{'  ' * depth}{key}:"
    flow = f"{head} {_flow(value)}"
    opened = isinstance(value, Mapping) and key in ("model", "blocks")
    if not opened and (len(flow) <= LINE or not isinstance(value, (Mapping, list)) or not value):
        return [flow]
    if isinstance(value, Mapping):
        return [head, *(line for name, one in value.items() for line in _lines(name, one, depth + 1))]
    return [head, *(f"{'  ' * (depth + 1)}- {_flow(one)}" for one in value)]


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_flow(one) for one in value) + "]"
    if isinstance(value, str):
        return value if _PLAIN.fullmatch(value) and value.lower() not in _WORDS else json.dumps(value)
    if isinstance(value, float):
        # With a point: YAML 1.1 readers take 1e-06 for a text.
        text = repr(value)
        return text if "." in text else text.replace("e", ".0e")
    return json.dumps(value)
