"""A plan's graph as a Mermaid flowchart, which GitHub and most editors draw."""

from __future__ import annotations

from heddle.compose.passes.graph import ChannelBlock, Edge, MixerBlock, Node, Readout, edges_of, nodes_of
from heddle.compose.plan import Plan


def mermaid(plan: Plan) -> str:
    """The flowchart: a box for each node, an arrow for each stream, a dotted one for a shared weight."""
    names = {name: f"n{index}" for index, (name, _) in enumerate(nodes_of(plan.graph))}
    lines = ["flowchart TD"]
    lines += [f'    {names[name]}["{_label(name, node)}"]' for name, node in nodes_of(plan.graph)]
    for first, second, edge in edges_of(plan.graph):
        lines.append(f"    {names[first]} {_arrow(edge)} {names[second]}")
    return "\n".join(lines) + "\n"


def _label(name: str, node: Node) -> str:
    told = [name]
    if isinstance(node, MixerBlock | ChannelBlock):
        told.append(f"{node.block}: {node.spec.kind}")
    elif isinstance(node, Readout):
        told.append(node.spec.kind)
    if node.parameters:
        told.append(f"{node.parameters:,} parameters")
    return "<br/>".join(told)


def _arrow(edge: Edge) -> str:
    if edge.kind == "stream":
        return "-->"
    return f"-. {'weight' if edge.kind == 'share' else edge.kind} .->"
