"""Pass: patterns and names into a chain of nodes.

Needs: the spec in `graph.graph["model"]`.
Gives: embedding → each layer's mixer and channel → norm → head, linked by streams; a tied head also by a share. In the
place of the head an encoder may have a readout → classifier.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from heddle.compose.passes.graph import (
    ChannelBlock,
    Classifier,
    Edge,
    Embedding,
    Failures,
    FinalNorm,
    Graph,
    Head,
    Locate,
    MixerBlock,
    Node,
    Readout,
    add_edge,
    empty_graph,
    model_of,
)
from heddle.specs.base import nearest
from heddle.specs.layer import Site
from heddle.specs.model import ModelSpec, Residual
from heddle.specs.pattern import Layer, expand_layers, layers_of


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
        *_ends(model),
    ]
    made = empty_graph(model)
    for name, node in chain:
        made.add_node(name, node=node)
    for (first, node), (second, _) in pairwise(chain):
        add_edge(made, first, second, Edge("stream", node.gives or 0))
    if model.tie_embeddings and model.readout is None:
        add_edge(made, "embedding", "head", Edge("share", model.hidden_size))
    return made


def _ends(model: ModelSpec) -> list[tuple[str, Node]]:
    """What makes logits of the last hidden states."""
    if model.readout is None:
        return [("head", Head(vocab_size=model.vocab_size, takes=model.hidden_size))]
    width = model.readout.width(model.hidden_size)
    return [
        ("readout", Readout(spec=model.readout, takes=model.hidden_size, gives=width)),
        ("classifier", Classifier(classes=model.readout.classes, takes=width)),
    ]


def _layers(model: ModelSpec, locate: Locate) -> list[tuple[str, Node]]:
    names, failures = expand_layers(model), Failures("resolve_layers", locate)
    for index, name in enumerate(names):
        if name not in model.blocks:
            close = nearest(name, model.blocks)
            hint = f"did you mean {close}?" if close else f"the blocks are {', '.join(model.blocks)}"
            failures.add("unknown-block", f"there is no block {name!r}", f"layers.{index}", hint)
    failures.check()
    made: list[tuple[str, Node]] = []
    for layer in layers_of(model):
        site = Site(model.hidden_size, layer.index, len(names), model.norm_eps, model.context_length)
        made += _layer(layer, site)
    return made


def _layer(layer: Layer, site: Site) -> list[tuple[str, Node]]:
    block, width, place = layer.spec, site.hidden_size, f"layers.{site.layer_index}"
    common: dict[str, Any] = {
        "block": layer.block,
        "layer": layer.name,
        "site": site,
        "norm": block.norm,
        "norm_placement": block.norm_placement,
        "takes": width,
        "gives": width,
    }
    mixer = MixerBlock(spec=block.mixer, residual=_residual(block.residual), **common)
    if block.channel.is_empty:
        return [(f"{place}.mixer", mixer)]
    residual = _residual(block.channel_residual or block.residual)
    channel = ChannelBlock(spec=block.channel, residual=residual, **common)
    return [(f"{place}.mixer", mixer), (f"{place}.channel", channel)]


def _residual(residual: Residual | None) -> Mapping[str, Any] | None:
    """None for what is nothing but an addition, however it was spelled."""
    return None if residual is None or residual == Residual() else residual.plain()
