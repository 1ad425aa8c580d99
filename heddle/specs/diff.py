"""What differs between two specs, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from heddle.specs.canonical import canonical
from heddle.specs.spec import Spec

SECTIONS = ("tokenizer", "data", "train", "search")


@dataclass(frozen=True, slots=True)
class Difference:
    """A field that is not the same; None where a side has it not, or off. A layer's path counts from 0."""

    path: str
    left: Any
    right: Any


def differences(left: Spec, right: Spec) -> list[Difference]:
    """What makes two specs differ: the model as it is built, in the order of its layers, then the other sections.

    Layers are aligned first, so that one more layer is told as that. Spellings and names make no difference: models
    without differences have the same hash.
    """
    models = [json.loads(canonical(spec.model)) for spec in (left, right)]
    layers = [model.pop("layers") for model in models]
    found = [*_fields("", *models), *_layers(*layers)]
    for name in SECTIONS:
        found += _fields(name, *(spec.model_dump(mode="json").get(name) for spec in (left, right)))
    return found


def _layers(left: list[Any], right: list[Any]) -> Iterator[Difference]:
    texts = [[json.dumps(layer, sort_keys=True) for layer in side] for side in (left, right)]
    for _, i, i_end, j, j_end in SequenceMatcher(None, texts[0], texts[1], autojunk=False).get_opcodes():
        paired = min(i_end - i, j_end - j)
        for step in range(paired):
            place = f"layers.{i + step}" + ("" if i == j else f" | {j + step}")
            yield from _fields(place, left[i + step], right[j + step])
        for at in range(i + paired, i_end):
            yield Difference(f"layers.{at}", left[at], None)
        for at in range(j + paired, j_end):
            yield Difference(f"layers.{at}", None, right[at])


def _fields(path: str, left: Any, right: Any) -> Iterator[Difference]:
    if left == right:
        return
    if not (isinstance(left, Mapping) and isinstance(right, Mapping)):
        yield Difference(path, left, right)
        return
    for name in [*left, *(name for name in right if name not in left)]:
        yield from _fields(f"{path}.{name}" if path else name, left.get(name), right.get(name))
