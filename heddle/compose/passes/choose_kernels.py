"""Pass: which ops each mixer calls.

Needs: `resolve_layers`.
Gives: `kernels` of mixers, names of `heddle.kernels`. Which code of an op runs is chosen when it is called, by the one
rule of `Op.path`: device, dtype and sizes are not known before.
"""

from __future__ import annotations

from dataclasses import replace

from heddle.compose.passes.graph import Graph, Locate, MixerBlock, nodes_of, once_a_block, with_nodes


def choose_kernels(graph: Graph, locate: Locate) -> Graph:  # noqa: ARG001
    """The graph with the ops of each mixer."""
    kernels = once_a_block(lambda spec, _: spec.kernels())
    mixers = [(name, node) for name, node in nodes_of(graph) if isinstance(node, MixerBlock)]
    return with_nodes(graph, {name: replace(node, kernels=kernels(node)) for name, node in mixers})
