"""Names that layers call each other by: what each leads to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from heddle.specs.base import nearest
from heddle.specs.kinds import Reference
from heddle.specs.layer import Site
from heddle.specs.pattern import Layer

# What the embedded tokens are called by a skip.
EMBEDDING = "embedding"
# The path of its source inside a block.
SKIP = "skip.source"


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
        yield Reference(SKIP, layer.spec.skip.source, "stream")


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


@dataclass(frozen=True, slots=True)
class BadLink:
    """What is wrong with a reference."""

    link: Link
    code: str
    what: str
    hint: str | None = None

    @property
    def path(self) -> str:
        """`layers.3.mixer.keys_from`"""
        return f"layers.{self.link.layer}.{self.link.reference.field}"


def bad_links(layers: Sequence[Layer], found: Sequence[Link], site: Site) -> Iterator[BadLink]:
    """The links that lead nowhere or to what does not fit, and those of one module to several layers.

    unknown-layer for a name that nothing has; reference-direction for one that stands only later; reference-mismatch for a
    layer that has no such thing, or has it in another shape, and for layers of a shared block that would take from
    different ones.
    """
    fits: set[tuple[int, str, int]] = set()
    for link in found:
        # A thousand layers are made of a few blocks.
        taker = layers[link.layer].spec
        source = taker if link.source is None else layers[max(link.source, 0)].spec
        pair = id(taker), link.reference.field, id(source)
        if pair in fits and link.source is not None:
            continue
        wrong = _bad_link(layers, link, site)
        if wrong is None:
            fits.add(pair)
        else:
            yield wrong
    yield from _torn(layers, found)


def _bad_link(layers: Sequence[Layer], link: Link, site: Site) -> BadLink | None:
    one = link.reference
    if not link.is_known:
        names = list(dict.fromkeys(name for layer in layers for name in (layer.block, layer.name) if name))
        close = nearest(one.name, names)
        hint = f"did you mean {close}?" if close else f"the layers are {', '.join(names[:20])}"
        return BadLink(link, "unknown-layer", f"no layer and no block is called {one.name!r}", hint)
    if link.source is None:
        what = (
            f"layer {link.layer} takes {one.what} from {one.name!r}, which stands before none of its layers"
        )
        hint = "a layer takes from earlier ones only; put it first, or name another"
        return BadLink(link, "reference-direction", what, hint)
    if one.what == "stream":
        return None
    inner = replace(one, field=one.field.removeprefix("mixer."))
    misfit = layers[link.layer].spec.mixer.misfit(inner, layers[link.source].spec.mixer, site)
    return None if misfit is None else BadLink(link, "reference-mismatch", misfit)


def _torn(layers: Sequence[Layer], found: Sequence[Link]) -> Iterator[BadLink]:
    """One module runs at all layers of a shared block, and takes from one layer."""
    first: dict[tuple[str, str], Link] = {}
    for link in found:
        layer = layers[link.layer]
        if not layer.spec.shared or link.source is None:
            continue
        one = first.setdefault((layer.block, link.reference.field), link)
        if one.source != link.source:
            what = (
                f"layers {one.layer} and {link.layer} share their weights, and would take {link.reference.what} "
                f"from layers {one.source} and {link.source}"
            )
            yield BadLink(link, "reference-mismatch", what, "give one layer a name, and take from that")
