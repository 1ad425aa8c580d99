"""Pass: sizes that must fit each other.

Needs: `resolve_dims`.
Gives: the same graph; after it every block can be built. That streams fit both their ends and that nothing goes
in a circle is held between all passes, by `manager.illegal`.
"""

from __future__ import annotations

from heddle.compose.passes.graph import (
    ChannelBlock,
    Failures,
    Graph,
    Locate,
    MixerBlock,
    Readout,
    nodes_of,
    once_a_block,
)


def check_shapes(graph: Graph, locate: Locate) -> Graph:
    """The graph, unchanged.

    Raises:
        HeddleErrors: dims-not-divisible and its like, once for each block, at its first layer.
    """
    failures = Failures("check_shapes", locate)
    told: set[tuple[str, str, str]] = set()
    problems = once_a_block(lambda spec, site: spec.problems(site))
    for name, node in nodes_of(graph):
        if isinstance(node, Readout):
            for problem in node.spec.problems(node.takes or 0):
                failures.add(problem.code, problem.what, f"{name}.{problem.field}", problem.hint)
        if not isinstance(node, (MixerBlock, ChannelBlock)):
            continue
        for problem in problems(node):
            mistake = (node.block, problem.field, problem.what)
            if mistake not in told:
                told.add(mistake)
                failures.add(problem.code, problem.what, f"{name}.{problem.field}", problem.hint)
    failures.check()
    return graph
