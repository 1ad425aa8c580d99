"""Names that layers call each other by: what each leads to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from heddle.specs.kinds import Reference
from heddle.specs.pattern import Layer

# What the embedded tokens are called by a skip.
EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True)
class Link:
    """A reference of layer `layer` and what it leads to: layer `source`, -1 for the embedding, None for nothing earlier.

    `is_known` says whether the name stands anywhere at all.
    """

    layer: int
    reference: Reference
    source: int | None
    is_known: bool = True


def references_of(layer: Layer) -> Iterator[Reference]:
    """Every reference of a layer, its field as a path inside the block."""
    for one in layer.spec.mixer.references():
        yield Reference(f"mixer.{one.field}", one.name, one.what)
    if layer.spec.skip is not None:
        yield Reference("skip.source", layer.spec.skip.source, "stream")


def links(layers: Sequence[Layer]) -> list[Link]:
    """Every reference of every layer, each to the nearest earlier layer of that name, or of the block of that name."""
    known = {name for layer in layers for name in (layer.block, layer.name) if name is not None} | {EMBEDDING}
    nearest: dict[str, int] = {EMBEDDING: -1}
    found: list[Link] = []
    for layer in layers:
        for one in references_of(layer):
            source = nearest.get(one.name) if one.what == "stream" or one.name != EMBEDDING else None
            found.append(Link(layer.index, one, source, one.name in known))
        nearest[layer.block] = layer.index
        if layer.name is not None:
            nearest[layer.name] = layer.index
    return found
