"""Rotary positions in the words of a spec and of `rope_parameters`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Fields of each kind of scaling: ours, theirs.
SCALING: Mapping[str, Mapping[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_frequency_factor": "low_freq_factor",
        "high_frequency_factor": "high_freq_factor",
        "original_length": "original_max_position_embeddings",
    },
    "yarn": {
        "factor": "factor",
        "original_length": "original_max_position_embeddings",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
    },
}


def rope_parameters(rope: Mapping[str, Any] | None, *, partial: bool = False) -> dict[str, Any]:
    """`rope_parameters` of positions, and of none those of a class that has some; with `partial` the share that turns too."""
    rope = {"theta": 10_000.0, "fraction": 1.0} if rope is None else rope
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": rope["theta"]}
    scaling = rope.get("scaling")
    if scaling is not None:
        names = SCALING[scaling["kind"]]
        found |= {"rope_type": scaling["kind"], **{names[name]: scaling[name] for name in names}}
    return {**found, "partial_rotary_factor": rope["fraction"]} if partial else found


def rope_of(parameters: Mapping[str, Any], *, partial: bool = False) -> dict[str, Any]:
    """The `rope` of a mixer. A kind of scaling that the language lacks gives its plain positions."""
    rope: dict[str, Any] = {"theta": float(parameters["rope_theta"])}
    if partial:
        rope["fraction"] = float(parameters["partial_rotary_factor"])
    kind = parameters.get("rope_type", "default")
    if kind in SCALING:
        told = {
            ours: parameters[theirs]
            for ours, theirs in SCALING[kind].items()
            if parameters.get(theirs) is not None
        }
        rope["scaling"] = {"kind": kind, **told}
    return rope
