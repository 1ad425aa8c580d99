"""One text for one model, however it was spelled; and its hash."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from heddle.specs.layer import Site
from heddle.specs.model import ModelSpec
from heddle.specs.pattern import expand_layers
from heddle.specs.yaml_text import to_yaml

FORMAT = 1
SCALARS = ("vocab_size", "hidden_size", "context_length", "tie_embeddings", "norm_eps")


def canonical(model: ModelSpec) -> str:
    """JSON of all that decides what the model computes: each layer in full; names and spellings are gone.

    What is off (null or false) is left out, so that a switch added to the language later changes no hash of today.
    """
    names = expand_layers(model)
    made = {name: _block(model, name) for name in dict.fromkeys(names)}
    data = {
        "format": FORMAT,
        **{name: getattr(model, name) for name in SCALARS},
        "layers": [made[name] for name in names],
    }
    return json.dumps(_without_off(data), sort_keys=True, separators=(",", ":"), allow_nan=False)


def spec_hash(model: ModelSpec) -> str:
    """16 hex digits, equal for equal computations."""
    return hashlib.sha256(canonical(model).encode()).hexdigest()[:16]


def _block(model: ModelSpec, name: str) -> dict[str, Any]:
    # Sizes do not depend on the layer; what does (decay rates) follows from its place in the list.
    site = Site(model.hidden_size, 0, 1, model.norm_eps, model.context_length)
    block = model.blocks[name]
    return {
        "mixer": block.mixer.canonical(site),
        "channel": block.channel.canonical(site),
        "norm": block.norm,
    }


def _without_off(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_off(one) for key, one in value.items() if one is not None and one is not False}
    return [_without_off(one) for one in value] if isinstance(value, list) else value


__all__ = ["canonical", "spec_hash", "to_yaml"]
