"""Pass: every size that the spec left open.

Needs: `resolve_layers`.
Gives: `data` of mixers and channels: plain data for their modules, with head sizes and widths filled in.
"""

from __future__ import annotations

from dataclasses import replace

from heddle.compose.passes.graph import (
    Block,
    ChannelBlock,
    Graph,
    Locate,
    MixerBlock,
    nodes_of,
    once_a_block,
    with_nodes,
)


def resolve_dims(graph: Graph, locate: Locate) -> Graph:  # noqa: ARG001
    """The graph with the resolved fields of each block."""
    data = once_a_block(lambda spec, site: spec.runtime(site))
    found: dict[str, Block] = {}
    for name, node in nodes_of(graph):
        if isinstance(node, (MixerBlock, ChannelBlock)):
            found[name] = replace(node, data=data(node))
    return with_nodes(graph, found)
