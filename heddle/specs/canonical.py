"""One text for one model, however it was spelled; and its hash."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from heddle.specs.constant_stream import last_reader
from heddle.specs.layer import Site
from heddle.specs.model import BlockSpec, ModelSpec, Residual
from heddle.specs.pattern import Layer, layers_of
from heddle.specs.references import links
from heddle.specs.yaml_text import to_yaml

FORMAT = 1
SCALARS = ("vocab_size", "hidden_size", "context_length", "tie_embeddings", "norm_eps")
# Fields of the language that came later: at their defaults they are left out, so that they change no older hash.
LATER = ("embedding_multiplier", "logit_multiplier", "logit_softcap")


def canonical(model: ModelSpec) -> str:
    """JSON of all that decides what the model computes: each layer in full; names and spellings are gone.

    What is off (null or false) or at the default of a later field is left out, so that a switch added to the language
    later changes no hash of today. A reference becomes the index of the layer that it leads to.
    """
    layers = layers_of(model)
    made: dict[int, str] = {}
    data = {
        "format": FORMAT,
        **{name: getattr(model, name) for name in SCALARS},
        **{name: getattr(model, name) for name in LATER if getattr(model, name) != _default(model, name)},
        **_kind(model),
        **_constant(model, layers),
        "layers": [_layer(model, layer, made) for layer in layers],
    }
    _resolve_names(data["layers"], layers)
    _tell_shared(data["layers"], layers)
    return json.dumps(_without_off(data), sort_keys=True, separators=(",", ":"), allow_nan=False)


def spec_hash(model: ModelSpec) -> str:
    """16 hex digits, equal for equal computations."""
    return hashlib.sha256(canonical(model).encode()).hexdigest()[:16]


def _layer(model: ModelSpec, layer: Layer, made: dict[int, str]) -> dict[str, Any]:
    # Sizes do not depend on the layer; what does (decay rates) follows from its place in the list.
    if id(layer.spec) not in made:
        made[id(layer.spec)] = json.dumps(_block(model, layer.spec))
    # Names are resolved in a copy for each layer; deep, because they may stand inside the mixer.
    copied: dict[str, Any] = json.loads(made[id(layer.spec)])
    return copied


def _block(model: ModelSpec, block: BlockSpec) -> dict[str, Any]:
    site = Site(model.hidden_size, 0, 1, model.norm_eps, model.context_length)
    return {
        "mixer": block.mixer.canonical(site),
        "channel": block.channel.canonical(site),
        "norm": block.norm,
        "norm_placement": None if block.norm_placement == "pre" else block.norm_placement,
        "residual": _residual(block.residual),
        "channel_residual": None
        if block.channel.is_empty
        else _residual(block.channel_residual or block.residual),
        "skip": None if block.skip is None else block.skip.model_dump(),
    }


def _kind(model: ModelSpec) -> dict[str, Any]:
    """Nothing for a causal language model. With a readout there is no head that could be tied."""
    data: dict[str, Any] = {} if model.kind == "causal_lm" else {"kind": model.kind}
    return (
        data
        if model.readout is None
        else {**data, "readout": model.readout.runtime(), "tie_embeddings": False}
    )


def _constant(model: ModelSpec, layers: list[Layer]) -> dict[str, Any]:
    """The tokens of the constant stream, if a layer reads it."""
    is_read = model.constant_tokens is not None and last_reader([layer.spec.mixer for layer in layers]) >= 0
    return {"constant_tokens": model.constant_tokens} if is_read else {}


def _default(owner: ModelSpec, name: str) -> Any:
    return type(owner).model_fields[name].default


def _residual(residual: Residual | None) -> dict[str, Any] | None:
    return None if residual is None or residual == Residual() else residual.model_dump()


def _resolve_names(data: list[dict[str, Any]], layers: list[Layer]) -> None:
    for link in links(layers):
        *steps, last = link.reference.field.split(".")
        part: Any = data[link.layer]
        for step in steps:
            part = part[int(step) if isinstance(part, list) else step]
        # A name that leads nowhere is an error elsewhere; here it stays what it is.
        part[last] = part[last] if link.source is None else link.source


def _tell_shared(data: list[dict[str, Any]], layers: list[Layer]) -> None:
    first: dict[str, int] = {}
    for layer in layers:
        if layer.spec.shared:
            owner = first.setdefault(layer.block, layer.index)
            if owner != layer.index:
                data[layer.index]["weights_of"] = owner


def _without_off(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_off(one) for key, one in value.items() if one is not None and one is not False}
    return [_without_off(one) for one in value] if isinstance(value, list) else value


__all__ = ["canonical", "spec_hash", "to_yaml"]
