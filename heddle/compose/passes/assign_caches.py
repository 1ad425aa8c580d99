"""Pass: what each mixer remembers between tokens.

Needs: `check_shapes`.
Gives: `states` of mixers: the tensors their caches hold for one sequence, growing or not.
"""

from __future__ import annotations

from dataclasses import replace

from heddle.compose.passes.graph import (
    Graph,
    Locate,
    MixerBlock,
    model_of,
    nodes_of,
    once_a_block,
    with_nodes,
)


def assign_caches(graph: Graph, locate: Locate) -> Graph:  # noqa: ARG001
    """The graph with the cache of each mixer; an encoder sees all tokens at once and keeps none."""
    keeps = model_of(graph).kind == "causal_lm"
    states = once_a_block(lambda spec, site: spec.states(site) if keeps else ())
    mixers = [(name, node) for name, node in nodes_of(graph) if isinstance(node, MixerBlock)]
    return with_nodes(graph, {name: replace(node, states=states(node)) for name, node in mixers})
