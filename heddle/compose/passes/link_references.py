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
from heddle.specs.layer import Site
from heddle.specs.pattern import Layer, layers_of
from heddle.specs.references import SKIP, Link, bad_links, links


def link_references(graph: Graph, locate: Locate) -> Graph:
    """The graph with its references resolved.

    Raises:
        HeddleErrors: unknown-layer, reference-direction or reference-mismatch, as `bad_links` says.
    """
    model, failures = model_of(graph), Failures("link_references", locate)
    layers = layers_of(model)
    found = links(layers)
    # What layers offer each other is the same wherever they stand.
    site = Site(model.hidden_size, 0, len(layers), model.norm_eps, model.context_length)
    for one in bad_links(layers, found, site):
        failures.add(one.code, one.what, one.path, one.hint)
    failures.check()
    made = with_nodes(graph, _resolved(graph, found, layers))
    for link in found:
        target: MixerBlock = graph.nodes[f"layers.{link.layer}.mixer"]["node"]
        add_edge(made, _source(graph, link), f"layers.{link.layer}.mixer", _edge(graph, link, target))
    return made


def _resolved(graph: Graph, found: list[Link], layers: list[Layer]) -> dict[str, MixerBlock]:
    """The mixers that take something, indices in the place of names."""
    changed: dict[str, MixerBlock] = {}
    for link in found:
        name = f"layers.{link.layer}.mixer"
        node = changed.get(name) or graph.nodes[name]["node"]
        if link.reference.field == SKIP:
            skip = layers[link.layer].spec.skip
            assert skip is not None
            changed[name] = replace(node, skip={**skip.plain(), "source": link.source})
            continue
        if link.reference.what == "stream":
            # A mixer takes the embedded tokens alone, and knows where they are.
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
        is_skip = link.reference.field == SKIP
        return Edge("skip" if is_skip else "qk_source", target.site.hidden_size)
    source: MixerBlock = graph.nodes[f"layers.{link.source}.mixer"]["node"]
    return Edge(what, math.prod(source.spec.offers(source.site)[what]))
