"""Pass: sizes that must fit each other.

Needs: `resolve_dims`.
Gives: the same graph; after it every block can be built and every stream fits both its ends.
"""

from __future__ import annotations

from heddle.compose.passes.graph import ChannelBlock, Failures, Graph, Locate, MixerBlock, nodes_of


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
    for first, second, data in graph.edges(data=True):
        gives, takes = graph.nodes[first]["node"].gives, graph.nodes[second]["node"].takes
        assert gives == takes == data["edge"].width, f"{first} gives {gives}, {second} takes {takes}"
    return graph
