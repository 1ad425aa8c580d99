"""Pass: names of earlier layers into edges.

Needs: `resolve_dims`.
Gives: an edge for everything that a layer takes from an earlier one; in `data` and `skip` the layer's index in the place
of its name.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

from heddle.compose.passes.graph import (
    Edge,
    Failures,
    Graph,
    Locate,
    MixerBlock,
    add_edge,
    model_of,
    with_nodes,
)
from heddle.specs.base import nearest
from heddle.specs.pattern import Layer, layers_of
from heddle.specs.references import Link, links


def link_references(graph: Graph, locate: Locate) -> Graph:
    """The graph with its references resolved.

    Raises:
        HeddleErrors: unknown-layer for a name that nothing has; reference-direction for one that stands only later;
        reference-mismatch for a layer that has no such thing, or has it in another shape, and for layers of a shared block
        that would take from different ones.
    """
    layers, failures = layers_of(model_of(graph)), Failures("link_references", locate)
    found = links(layers)
    for link in found:
        _check(graph, link, layers, failures)
    _check_shared(found, layers, failures)
    failures.check()
    made = with_nodes(graph, _resolved(graph, found, layers))
    for link in found:
        target: MixerBlock = graph.nodes[f"layers.{link.layer}.mixer"]["node"]
        add_edge(made, _source(graph, link), f"layers.{link.layer}.mixer", _edge(graph, link, target))
    return made


def _check(graph: Graph, link: Link, layers: list[Layer], failures: Failures) -> None:
    one, path = link.reference, f"layers.{link.layer}.{link.reference.field}"
    if not link.is_known:
        names = list(dict.fromkeys(name for layer in layers for name in (layer.block, layer.name) if name))
        close = nearest(one.name, names)
        hint = f"did you mean {close}?" if close else f"the layers are {', '.join(names[:20])}"
        failures.add("unknown-layer", f"no layer and no block is called {one.name!r}", path, hint)
    elif link.source is None:
        what = (
            f"layer {link.layer} takes {one.what} from {one.name!r}, which stands before none of its layers"
        )
        hint = "a layer takes from earlier ones only; put it first, or name another"
        failures.add("reference-direction", what, path, hint)
    elif one.what != "stream":
        node: MixerBlock = graph.nodes[f"layers.{link.layer}.mixer"]["node"]
        source: MixerBlock = graph.nodes[f"layers.{link.source}.mixer"]["node"]
        inner = replace(one, field=one.field.removeprefix("mixer."))
        wrong = node.spec.misfit(inner, source.spec, source.site)
        if wrong is not None:
            failures.add("reference-mismatch", wrong, path)


def _check_shared(found: list[Link], layers: list[Layer], failures: Failures) -> None:
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
            path, hint = (
                f"layers.{link.layer}.{link.reference.field}",
                "give one layer a name, and take from that",
            )
            failures.add("reference-mismatch", what, path, hint)


def _resolved(graph: Graph, found: list[Link], layers: list[Layer]) -> dict[str, MixerBlock]:
    """The mixers that take something, indices in the place of names."""
    changed: dict[str, MixerBlock] = {}
    for link in found:
        name = f"layers.{link.layer}.mixer"
        node = changed.get(name) or graph.nodes[name]["node"]
        if link.reference.what == "stream":
            skip = layers[link.layer].spec.skip
            assert skip is not None
            changed[name] = replace(node, skip={**skip.plain(), "source": link.source})
            continue
        data = copy.deepcopy(dict(node.data or {}))
        part: Any = data
        *steps, last = link.reference.field.removeprefix("mixer.").split(".")
        for step in steps:
            part = part[int(step) if isinstance(part, list) else step]
        part[last] = link.source
        changed[name] = replace(node, data=data)
    return changed


def _source(graph: Graph, link: Link) -> str:
    """The node that hands it on: of a layer's stream its last one."""
    if link.source == -1:
        return "embedding"
    name = f"layers.{link.source}.channel"
    return name if link.reference.what == "stream" and name in graph else f"layers.{link.source}.mixer"


def _edge(graph: Graph, link: Link, target: MixerBlock) -> Edge:
    what = link.reference.what
    if what == "stream":
        return Edge("skip", target.site.hidden_size)
    source: MixerBlock = graph.nodes[f"layers.{link.source}.mixer"]["node"]
    return Edge(what, math.prod(source.spec.offers(source.site)[what]))
