"""Pass: patterns and names into a chain of nodes.

Needs: the spec in `graph.graph["model"]`.
Gives: embedding → each layer's mixer and channel → norm → head, linked by streams; a tied head also by a share.
"""

from __future__ import annotations

from itertools import pairwise

from heddle.compose.passes.graph import (
    ChannelBlock,
    Edge,
    Embedding,
    Failures,
    FinalNorm,
    Graph,
    Head,
    Locate,
    MixerBlock,
    Node,
    empty_graph,
    model_of,
)
from heddle.specs.base import nearest
from heddle.specs.layer import Site
from heddle.specs.model import BlockSpec, ModelSpec
from heddle.specs.pattern import expand_layers


def resolve_layers(graph: Graph, locate: Locate) -> Graph:
    """The graph with one node for every step of the model.

    Raises:
        HeddleErrors: unknown-block, at each layer that names none.
    """
    model = model_of(graph)
    chain = [
        ("embedding", Embedding(vocab_size=model.vocab_size, gives=model.hidden_size)),
        *_layers(model, locate),
        ("norm", FinalNorm(takes=model.hidden_size, gives=model.hidden_size)),
        ("head", Head(vocab_size=model.vocab_size, takes=model.hidden_size)),
    ]
    made = empty_graph(model)
    for name, node in chain:
        made.add_node(name, node=node)
    for (first, _), (second, _) in pairwise(chain):
        made.add_edge(first, second, edge=Edge("stream", model.hidden_size))
    if model.tie_embeddings:
        made.add_edge("embedding", "head", edge=Edge("share", model.hidden_size))
    return made


def _layers(model: ModelSpec, locate: Locate) -> list[tuple[str, Node]]:
    names, failures = expand_layers(model), Failures("resolve_layers", locate)
    made: list[tuple[str, Node]] = []
    for index, name in enumerate(names):
        if name not in model.blocks:
            close = nearest(name, model.blocks)
            hint = f"did you mean {close}?" if close else f"the blocks are {', '.join(model.blocks)}"
            failures.add("unknown-block", f"there is no block {name!r}", f"layers.{index}", hint)
            continue
        site = Site(model.hidden_size, index, len(names), model.norm_eps, model.context_length)
        made += _layer(name, model.blocks[name], site)
    failures.check()
    return made


def _layer(name: str, block: BlockSpec, site: Site) -> list[tuple[str, Node]]:
    width, place = site.hidden_size, f"layers.{site.layer_index}"
    mixer = MixerBlock(spec=block.mixer, block=name, site=site, norm=block.norm, takes=width, gives=width)
    if block.channel.is_empty:
        return [(f"{place}.mixer", mixer)]
    channel = ChannelBlock(
        spec=block.channel, block=name, site=site, norm=block.norm, takes=width, gives=width
    )
    return [(f"{place}.mixer", mixer), (f"{place}.channel", channel)]
