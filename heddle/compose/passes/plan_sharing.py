"""Pass: which layers have the weights of an earlier one.

Needs: `resolve_layers`.
Gives: `weights_of` of every layer of a shared block but the first, and share edges from that first one.
"""

from __future__ import annotations

from dataclasses import replace

from heddle.compose.passes.graph import (
    Block,
    ChannelBlock,
    Edge,
    Graph,
    Locate,
    MixerBlock,
    add_edge,
    model_of,
    nodes_of,
    with_nodes,
)


def plan_sharing(graph: Graph, locate: Locate) -> Graph:  # noqa: ARG001
    """The graph with its shared weights."""
    model = model_of(graph)
    first: dict[str, int] = {}
    found: dict[str, Block] = {}
    for name, node in nodes_of(graph):
        if isinstance(node, (MixerBlock, ChannelBlock)) and model.blocks[node.block].shared:
            owner = first.setdefault(node.block, node.site.layer_index)
            if owner != node.site.layer_index:
                found[name] = replace(node, weights_of=owner)
    if not found:
        return graph
    made = with_nodes(graph, found)
    for name, node in found.items():
        source = f"layers.{node.weights_of}.{name.rpartition('.')[2]}"
        add_edge(made, source, name, Edge("share", node.site.hidden_size))
    return made
