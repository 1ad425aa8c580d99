"""Pass: sizes that must fit each other.

Needs: `resolve_dims`.
Gives: the same graph; after it every block can be built and every stream fits both its ends.
"""

from __future__ import annotations

import networkx as nx

from heddle.compose.passes.graph import (
    ChannelBlock,
    Failures,
    Graph,
    Locate,
    MixerBlock,
    edges_of,
    nodes_of,
)


def check_shapes(graph: Graph, locate: Locate) -> Graph:
    """The graph, unchanged.

    Raises:
        HeddleErrors: dims-not-divisible and its like, once for each block, at its first layer.
    """
    failures = Failures("check_shapes", locate)
    told: set[tuple[str, str]] = set()
    for name, node in nodes_of(graph):
        if not isinstance(node, (MixerBlock, ChannelBlock)):
            continue
        for problem in node.spec.problems(node.site):
            if (node.block, problem.field) not in told:
                told.add((node.block, problem.field))
                failures.add(problem.code, problem.what, f"{name}.{problem.field}", problem.hint)
    failures.check()
    assert nx.is_directed_acyclic_graph(graph), "layers take from each other in a circle"
    for first, second, edge in edges_of(graph):
        gives, takes = graph.nodes[first]["node"].gives, graph.nodes[second]["node"].takes
        if edge.kind in ("stream", "skip", "share"):
            assert gives == takes == edge.width, f"{first} gives {gives}, {second} takes {takes}"
    return graph
