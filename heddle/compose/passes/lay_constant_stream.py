"""Pass: the constant stream, which runs beside the text as far as a layer reads it.

Needs: `resolve_layers`, `check_kind`.
Gives: `constant` of the blocks that it runs through, of layers in front of the last that reads it, and a `constant` edge from
the embedding to each mixer that reads it.
"""

from __future__ import annotations

from dataclasses import replace

from heddle.compose.passes.graph import (
    Block,
    ChannelBlock,
    Edge,
    Failures,
    Graph,
    Locate,
    MixerBlock,
    add_edge,
    model_of,
    nodes_of,
    with_nodes,
)
from heddle.specs.constant_stream import last_reader, reads_constant, token_problems

# Contracts of a mixer of which it is the same sequence however the text comes in.
KEPT = ("step", "chunks")


def lay_constant_stream(graph: Graph, locate: Locate) -> Graph:
    """The graph with its constant stream, if there is one.

    Raises:
        HeddleErrors: out-of-range for tokens of it that are none of the vocabulary; conflicting-fields for a mixer in front of
        one that reads it for which a prompt is more than its tokens, once for each block, at its first layer.
    """
    model, failures = model_of(graph), Failures("lay_constant_stream", locate)
    fields = {"vocab_size": model.vocab_size, "constant_tokens": model.constant_tokens}
    for problem in token_problems(fields):
        failures.add(problem.code, problem.what, problem.field, problem.hint)
    mixers = [(name, node) for name, node in nodes_of(graph) if isinstance(node, MixerBlock)]
    last = last_reader([node.spec for _, node in mixers])
    told: set[str] = set()
    for name, node in mixers[: max(last, 0)]:
        if node.block not in told and any(one in KEPT for one in node.spec.exemptions()):
            told.add(node.block)
            kind = node.spec.kind
            what = f"{kind} goes by where a prompt ends, and the constant stream, which has none, is read in layer {last}"
            hint = f"no {kind} in front of the last layer with qk_source: constant"
            failures.add("conflicting-fields", what, f"{name}.kind", hint)
    failures.check()
    if last < 0:
        return graph
    beside: dict[str, Block] = {
        name: replace(node, constant=True)
        for name, node in nodes_of(graph)
        if isinstance(node, (MixerBlock, ChannelBlock)) and node.site.layer_index < last
    }
    made = with_nodes(graph, beside)
    for name, node in mixers:
        if reads_constant(node.spec):
            add_edge(made, "embedding", name, Edge("constant", model.hidden_size))
    return made
