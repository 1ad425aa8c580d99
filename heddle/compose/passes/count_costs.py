"""Pass: the parameters of every node.

Needs: `check_shapes`.
Gives: `parameters`, the norms of a block counted with the block; FLOPs and bytes depend on context and batch and are
answered by `heddle.compose.costs`.
"""

from __future__ import annotations

from dataclasses import replace

from heddle.compose.passes.graph import (
    ChannelBlock,
    Classifier,
    Embedding,
    FinalNorm,
    Graph,
    Head,
    Locate,
    MixerBlock,
    Node,
    Readout,
    model_of,
    nodes_of,
    once_a_block,
    with_nodes,
)


def count_costs(graph: Graph, locate: Locate) -> Graph:  # noqa: ARG001
    """The graph with parameter counts."""
    model = model_of(graph)
    inner = once_a_block(lambda spec, site: spec.params(site))
    found = {}
    for name, node in nodes_of(graph):
        if isinstance(node, (MixerBlock, ChannelBlock)):
            count = 0 if node.weights_of is not None else inner(node) + _around(node)
        else:
            count = _parameters(node, model.hidden_size, tied=model.tie_embeddings)
        found[name] = replace(node, parameters=count)
    return with_nodes(graph, found)


def _parameters(node: Node, width: int, *, tied: bool) -> int:
    if isinstance(node, Embedding):
        return node.vocab_size * width
    if isinstance(node, Head):
        return 0 if tied else node.vocab_size * width
    if isinstance(node, Readout):
        return node.spec.params(width)
    if isinstance(node, Classifier):
        return ((node.takes or 0) + 1) * node.classes
    assert isinstance(node, FinalNorm)
    return norm_parameters("rmsnorm", width)


def own_parameters(node: MixerBlock | ChannelBlock) -> int:
    """The parameters that a block runs with, whether they are its own or an earlier layer's."""
    return node.spec.params(node.site) + _around(node)


def _around(node: MixerBlock | ChannelBlock) -> int:
    """The parameters of a block's norms, and of what joins the stream before it."""
    width = node.site.hidden_size
    norms = 2 if node.norm_placement == "sandwich" else 1
    # A skip has two factors, of the stream and of what joins it.
    skip = 2 if isinstance(node, MixerBlock) and node.skip is not None else 0
    return norms * norm_parameters(node.norm, width) + skip


def norm_parameters(norm: str, width: int) -> int:
    """A weight, and for layernorm a bias."""
    return 2 * width if norm == "layernorm" else width
