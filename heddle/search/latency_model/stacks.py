"""A model as the latency model sees it: what each layer is, which of them meet, and what stands around them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from heddle.specs import BlockSpec, ModelSpec, spec_hash
from heddle.specs.canonical import LATER, SCALARS
from heddle.specs.pattern import layers_of

# Layers of two kinds that stand next to each other, in no order: of a stack's changes from one kind to another as many lead
# there as back, give or take one, so that no measurement of whole stacks could tell the two directions apart.
Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Stack:
    """A model, what each of its layers is (`terms`), and what is around the layers (`frame`), as digests."""

    model: ModelSpec
    hash: str
    blocks: tuple[str, ...]
    terms: tuple[str, ...]
    frame: str

    @property
    def counts(self) -> Counter[str]:
        return Counter(self.terms)

    @property
    def pairs(self) -> Counter[Pair]:
        """How often layers of two different kinds meet."""
        met = ((one, other) for one, other in pairwise(self.terms) if one != other)
        return Counter((min(pair), max(pair)) for pair in met)


def stack_of(model: ModelSpec) -> Stack:
    """The stack of a model. Equal layers have equal terms, whatever their blocks are called."""
    known: dict[int, str] = {}
    layers = layers_of(model)
    for layer in layers:
        if id(layer.spec) not in known:
            known[id(layer.spec)] = _term(model, layer.spec)
    return Stack(
        model,
        spec_hash(model),
        tuple(layer.block for layer in layers),
        tuple(known[id(layer.spec)] for layer in layers),
        _frame(model),
    )


def _term(model: ModelSpec, block: BlockSpec) -> str:
    """The hash of the model of that one layer: the block in full, and all that its sizes follow from."""
    return spec_hash(model.model_copy(update={"blocks": {"one": block}, "layers": ["one"]}))


def _frame(model: ModelSpec) -> str:
    """A digest of everything but the layers: embedding, head and width decide what a model costs without any."""
    data = {name: getattr(model, name) for name in (*SCALARS, *LATER)}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def labels_of(stacks: Iterable[Stack]) -> dict[str, str]:
    """A name to read for each term: block, kind of mixer, and its plain fields. Equal names get a part of the digest."""
    found: dict[str, str] = {}
    for stack in stacks:
        for layer, term in zip(layers_of(stack.model), stack.terms, strict=True):
            if term not in found:
                found[term] = _label(layer.block, layer.spec)
    repeated = Counter(found.values())
    return {term: label if repeated[label] == 1 else f"{label} ({term[:6]})" for term, label in found.items()}


def _label(name: str, block: BlockSpec) -> str:
    written = block.mixer.written()
    fields = [f"{key} {value}" for key, value in written.items() if key != "kind" and _is_plain(value)]
    return f"{name}: {', '.join([str(written['kind']), *fields])}"


def _is_plain(value: object) -> bool:
    return not isinstance(value, (Mapping, list, tuple))
