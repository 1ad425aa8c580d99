"""What differs between two specs, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import zip_longest
from typing import Any

from heddle.specs.canonical import canonical
from heddle.specs.model import ModelSpec
from heddle.specs.pattern import layers_of
from heddle.specs.references import links
from heddle.specs.spec import Spec

SECTIONS = ("tokenizer", "data", "train", "search")
# Stands for the layer that is named, while layers are aligned.
ANY_LAYER = "a layer"


@dataclass(frozen=True, slots=True)
class Difference:
    """A field that is not the same; None where a side has it not, or off. A layer's path counts from 0.

    What a layer takes from another is told as the index of that one on its own side.
    """

    path: str
    left: Any
    right: Any


def differences(left: Spec, right: Spec) -> list[Difference]:
    """What makes two specs differ: the model as it is built, in the order of its layers, then the other sections.

    Layers are aligned first, so that one more layer is told as that and moves no reference. Spellings and names make no
    difference: models without differences have the same hash.
    """
    sides = [_Side.of(spec.model) for spec in (left, right)]
    found = [*_fields("", sides[0].model, sides[1].model, _never), *_layers(*sides)]
    for name in SECTIONS:
        one, other = (spec.model_dump(mode="json").get(name) for spec in (left, right))
        found += _fields(name, one, other, _never)
    return found


@dataclass(frozen=True, slots=True)
class _Side:
    """A canonical model, its layers, and which fields of them lead to other layers."""

    model: dict[str, Any]
    layers: list[dict[str, Any]]
    references: frozenset[tuple[int, str]]

    @classmethod
    def of(cls, model: ModelSpec) -> _Side:
        data = json.loads(canonical(model))
        layers = data.pop("layers")
        named = {
            (link.layer, link.reference.field) for link in links(layers_of(model)) if link.source is not None
        }
        shared = {(index, "weights_of") for index, layer in enumerate(layers) if "weights_of" in layer}
        return cls(data, layers, frozenset(named | shared))

    def texts(self) -> list[str]:
        """Each layer as a text that says nothing of where other layers stand."""
        blank = json.loads(json.dumps(self.layers))
        for index, field in self.references:
            *steps, last = field.split(".")
            held: Any = blank[index]
            for step in steps:
                held = held[int(step)] if isinstance(held, list) else held[step]
            held[last] = ANY_LAYER if held[last] >= 0 else held[last]
        return [json.dumps(layer, sort_keys=True) for layer in blank]


# Path and both values -> whether they mean the same; None if equality decides.
Same = Callable[[str, Any, Any], bool | None]


def _never(path: str, left: Any, right: Any) -> bool | None:  # noqa: ARG001
    return None


def _layers(left: _Side, right: _Side) -> Iterator[Difference]:
    matcher = SequenceMatcher(None, left.texts(), right.texts(), autojunk=False)
    codes = [code[1:] for code in matcher.get_opcodes()]
    partner = {
        i + step: j + step for i, i_end, j, j_end in codes for step in range(min(i_end - i, j_end - j))
    }
    for i, i_end, j, j_end in codes:
        paired = min(i_end - i, j_end - j)
        for step in range(paired):
            place = f"layers.{i + step}" + ("" if i == j else f" | {j + step}")
            same = _aligned(left, right, partner, (i + step, j + step))
            yield from _fields(place, left.layers[i + step], right.layers[j + step], same)
        for at in range(i + paired, i_end):
            yield Difference(f"layers.{at}", left.layers[at], None)
        for at in range(j + paired, j_end):
            yield Difference(f"layers.{at}", None, right.layers[at])


def _aligned(left: _Side, right: _Side, partner: Mapping[int, int], pair: tuple[int, int]) -> Same:
    """Whether two references of this pair of layers lead to layers that were aligned with each other."""

    def same(path: str, one: Any, other: Any) -> bool | None:
        # Behind `layers.3` or `layers.3 | 4`.
        field = path.split(".", 2)[2]
        if (pair[0], field) not in left.references or (pair[1], field) not in right.references:
            return None
        return bool(one == other if one < 0 else partner.get(one) == other)

    return same


def _fields(path: str, left: Any, right: Any, same: Same) -> Iterator[Difference]:
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        for name in [*left, *(name for name in right if name not in left)]:
            yield from _fields(f"{path}.{name}" if path else name, left.get(name), right.get(name), same)
    elif _is_of_parts(left) and _is_of_parts(right):
        for index, (one, other) in enumerate(zip_longest(left, right)):
            yield from _fields(f"{path}.{index}", one, other, same)
    else:
        # Two equal numbers may name different layers, and two different ones the same.
        told = same(path, left, right)
        if left != right if told is None else not told:
            yield Difference(path, left, right)


def _is_of_parts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, Mapping) for one in value)
