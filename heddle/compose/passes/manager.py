"""Runs the passes one after another, and holds what is between them to what makes a plan legal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from heddle.compose.passes.graph import Edge, Graph, Locate, edges_of
from heddle.errors import HeddleError

Pass = Callable[[Graph, Locate], Graph]
# What these carry is as wide as the stream of the model at both ends.
STREAMS = ("stream", "skip", "qk_source", "constant", "share")


def run_passes(graph: Graph, passes: Sequence[Pass], locate: Locate) -> Graph:
    """The graph after `passes`, in their order.

    An error that is not the user's goes on as it is, its traceback whole, with a note that says which pass it comes from and
    which ran before it.

    Raises:
        HeddleErrors: of the first pass that finds something wrong with the spec.
    """
    for count, one in enumerate(passes):
        try:
            made = one(graph, locate)
            # The same graph is as legal as it was: nothing changes one in place.
            wrong = None if made is graph else illegal(made)
            assert wrong is None, wrong
            graph = made
        except HeddleError:
            raise
        except Exception as error:
            before = ", ".join(earlier.__name__ for earlier in passes[:count]) or "none"
            error.add_note(f"while running pass {one.__name__}; passes before it: {before}")
            raise
    return graph


def illegal(graph: Graph) -> str | None:
    """What makes a graph no plan; None if nothing does.

    The streams must lead once through every node, from the first to the last, and every other edge must point the same way:
    then nothing goes in a circle, and the order in which the layers run is the only one.
    """
    after: dict[str, str] = {}
    edges = list(edges_of(graph))
    for first, second, edge in edges:
        if edge.kind == "stream":
            if first in after:
                return f"two streams leave {first}, to {after[first]} and {second}"
            after[first] = second
    later = set(after.values())
    starts = [name for name in graph if name not in later]
    if len(starts) != 1:
        return f"a stream must begin at one node, and begins at {len(starts)}"
    order = [starts[0]]
    while order[-1] in after and len(order) <= len(graph):
        order.append(after[order[-1]])
    if len(order) != len(graph):
        return f"the stream from {order[0]} passes {len(order)} nodes, and there are {len(graph)}"
    if order != list(graph):
        return "the nodes stand in another order than that in which the stream passes them"
    return _wrong_edge(graph, edges)


def _wrong_edge(graph: Graph, edges: Sequence[tuple[str, str, Edge]]) -> str | None:
    """The first edge that does not point forward, or fits not both its ends."""
    nodes = dict(graph.nodes(data="node"))
    place = {name: number for number, name in enumerate(nodes)}
    for first, second, edge in edges:
        if place[first] >= place[second]:
            return f"{second} takes {edge.kind} of {first}, which does not stand before it"
        gives, takes = nodes[first].gives, nodes[second].takes
        if edge.kind in STREAMS and not gives == takes == edge.width:
            return f"{first} gives {gives}, {second} takes {takes}, the {edge.kind} has {edge.width}"
    return None
