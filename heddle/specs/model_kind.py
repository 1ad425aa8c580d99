"""What the kind of a model allows: which mixers, and which readout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from heddle.specs.kinds import MixerSpec, Problem
from heddle.specs.readout import ReadoutSpec


def causality_problems(mixer: MixerSpec, path: str = "mixer") -> Iterator[Problem]:
    """What in `mixer`, which stands at `path`, sees later tokens: no place for it in a causal language model."""
    parts = {f"{path}.{name}": part for name, part in mixer.parts().items() if not part.is_causal}
    for name, part in parts.items():
        yield from causality_problems(part, name)
    if parts or mixer.is_causal:
        return
    what = f"{mixer.kind} lets tokens see later ones, and this is a causal language model"
    if getattr(mixer, "causal", None) is False:
        yield Problem(f"{path}.causal", what, "causal: true, or kind: encoder in model", "not-causal")
    else:
        yield Problem(f"{path}.kind", what, "another kind of mixer, or kind: encoder in model", "not-causal")


def readout_problems(fields: Mapping[str, Any]) -> Iterator[Problem]:
    """What does not fit the readout among the fields of a model, by path below it; fields that are not known are left out."""
    readout, hidden_size = fields.get("readout"), fields.get("hidden_size")
    if not isinstance(readout, ReadoutSpec):
        return
    if fields.get("kind") == "causal_lm":
        what = "a causal language model gives logits for every token and has no readout"
        yield Problem("readout", what, "kind: encoder, or no readout", "conflicting-fields")
    elif hidden_size is not None:
        for one in readout.problems(hidden_size):
            yield Problem(f"readout.{one.field}", one.what, one.hint, one.code)
