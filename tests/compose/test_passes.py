"""Each pass: what it makes of a graph, that it changes nothing it was given, and that twice is once."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import networkx as nx
import pytest

from heddle.compose.passes.assign_caches import assign_caches
from heddle.compose.passes.check_kind import check_kind
from heddle.compose.passes.check_shapes import check_shapes
from heddle.compose.passes.choose_kernels import choose_kernels
from heddle.compose.passes.count_costs import count_costs
from heddle.compose.passes.graph import (
    ChannelBlock,
    Edge,
    Embedding,
    FinalNorm,
    Graph,
    Head,
    MixerBlock,
    add_edge,
    edges_of,
    empty_graph,
    nodes_of,
)
from heddle.compose.passes.link_references import link_references
from heddle.compose.passes.plan_sharing import plan_sharing
from heddle.compose.passes.resolve_dims import resolve_dims
from heddle.compose.passes.resolve_layers import resolve_layers
from heddle.compose.plan import PASSES, graph_lines
from heddle.errors import HeddleErrors, Where
from heddle.specs import ModelSpec, Site
from heddle.specs.cost import State

MODEL = ModelSpec.model_validate(
    {
        "vocab_size": 10,
        "hidden_size": 8,
        "blocks": {
            "a": {"mixer": {"kind": "attention", "heads": 2}, "channel": {"kind": "gelu", "width": 16}},
            "d": {"mixer": {"kind": "decay_attention", "heads": 2}, "channel": {"kind": "none"}},
        },
        "layers": ["a", "d"],
    }
)
SITES = [Site(8, index, 2, 1e-6, 32_768) for index in range(2)]
A, D = MODEL.blocks["a"], MODEL.blocks["d"]


def here(path: str) -> Where:
    return Where(path=path)


def graph_of(nodes: dict[str, Any], *, tied: bool = True) -> Graph:
    """The nodes in a chain, the head tied to the embedding."""
    graph = empty_graph(MODEL)
    for name, node in nodes.items():
        graph.add_node(name, node=node)
    for first, second in pairwise(nodes):
        add_edge(graph, first, second, Edge("stream", 8))
    if tied:
        add_edge(graph, "embedding", "head", Edge("share", 8))
    return graph


def content(graph: Graph) -> tuple[Any, ...]:
    """All that is in a graph, to compare."""
    return graph.graph["model"], dict(nodes_of(graph)), sorted(edges_of(graph), key=repr)


def after(count: int) -> Graph:
    """The graph after the first passes of the list."""
    graph = empty_graph(MODEL)
    for one in PASSES[:count]:
        graph = one(graph, here)
    return graph


WIDE = {"takes": 8, "gives": 8, "norm": "rmsnorm"}
LAYERS = {
    "embedding": Embedding(vocab_size=10, gives=8),
    "layers.0.mixer": MixerBlock(spec=A.mixer, block="a", site=SITES[0], **WIDE),
    "layers.0.channel": ChannelBlock(spec=A.channel, block="a", site=SITES[0], **WIDE),
    "layers.1.mixer": MixerBlock(spec=D.mixer, block="d", site=SITES[1], **WIDE),
    "norm": FinalNorm(takes=8, gives=8),
    "head": Head(vocab_size=10, takes=8),
}
ATTENTION = {
    "kind": "attention",
    "heads": 2,
    "head_dim": 4,
    "kv_heads": 2,
    "rope": {"theta": 10000.0, "fraction": 1.0},
    "qk_norm": False,
    "gate": False,
    "window": None,
}
DECAY = {"kind": "decay_attention", "heads": 2, "head_dim": 4, "form": "lightning", "short_conv": None}
DIMS = LAYERS | {
    "layers.0.mixer": replace(LAYERS["layers.0.mixer"], data=ATTENTION),
    "layers.0.channel": replace(LAYERS["layers.0.channel"], data={"kind": "gelu", "width": 16}),
    "layers.1.mixer": replace(LAYERS["layers.1.mixer"], data=DECAY),
}
GROWING = tuple(State(name, (2, 4), grows=True) for name in ("keys", "values"))
CACHES = DIMS | {
    "layers.0.mixer": replace(DIMS["layers.0.mixer"], states=GROWING),
    "layers.1.mixer": replace(DIMS["layers.1.mixer"], states=(State("memory", (2, 4, 4), element=4),)),
}
KERNELS = CACHES | {
    "layers.0.mixer": replace(CACHES["layers.0.mixer"], kernels=()),
    "layers.1.mixer": replace(CACHES["layers.1.mixer"], kernels=("decay_attention",)),
}
COSTS = {
    "embedding": 80,
    "layers.0.mixer": 264,
    "layers.0.channel": 264,
    "layers.1.mixer": 336,
    "norm": 8,
    "head": 0,
}

EXPECTED = {
    resolve_layers: (empty_graph(MODEL), graph_of(LAYERS)),
    resolve_dims: (graph_of(LAYERS), graph_of(DIMS)),
    link_references: (graph_of(DIMS), graph_of(DIMS)),
    plan_sharing: (graph_of(DIMS), graph_of(DIMS)),
    check_kind: (graph_of(DIMS), graph_of(DIMS)),
    check_shapes: (graph_of(DIMS), graph_of(DIMS)),
    assign_caches: (graph_of(DIMS), graph_of(CACHES)),
    choose_kernels: (graph_of(CACHES), graph_of(KERNELS)),
    count_costs: (
        graph_of(KERNELS),
        graph_of({name: replace(node, parameters=COSTS[name]) for name, node in KERNELS.items()}),
    ),
}
every_pass = pytest.mark.parametrize("one", PASSES, ids=lambda one: one.__name__)


@every_pass
def test_a_pass_makes_the_expected_of_what_was_before(one: Any) -> None:
    before, expected = EXPECTED[one]
    assert content(one(before, here)) == content(expected)


@every_pass
def test_a_pass_leaves_what_it_was_given(one: Any) -> None:
    before = after(PASSES.index(one))
    kept = content(before.copy())
    one(before, here)
    assert content(before) == kept


@every_pass
def test_a_pass_done_twice_is_a_pass_done_once(one: Any) -> None:
    once = one(after(PASSES.index(one)), here)
    assert content(one(once, here)) == content(once)


@every_pass
def test_a_pass_keeps_the_plan_legal(one: Any) -> None:
    made = one(after(PASSES.index(one)), here)
    assert nx.is_directed_acyclic_graph(made)
    assert nx.is_weakly_connected(made)
    streams = [first for first, _, edge in edges_of(made) if edge.kind == "stream"]
    assert streams == list(made)[:-1]
    assert made.graph["model"] is MODEL


@every_pass
def test_a_pass_says_what_it_needs_and_gives(one: Any) -> None:
    import importlib

    told = importlib.import_module(one.__module__).__doc__ or ""
    assert told.startswith("Pass: ")
    assert "\nNeeds: " in told
    assert "\nGives: " in told


def test_the_intermediate_representation_prints_after_every_pass() -> None:
    for count in range(1, len(PASSES) + 1):
        lines = graph_lines(after(count))
        assert [line.split()[0] for line in lines] == list(LAYERS)


def test_all_blocks_that_cannot_be_built_are_told_together() -> None:
    data = MODEL.model_dump()
    data["blocks"]["a"]["mixer"] |= {"heads": 3}
    data["blocks"]["d"]["mixer"] |= {"heads": 5}
    graph = resolve_dims(resolve_layers(empty_graph(ModelSpec.model_validate(data)), here), here)
    with pytest.raises(HeddleErrors) as told:
        check_shapes(graph, here)
    assert [(error.where.path, error.what) for error in told.value.errors] == [
        ("layers.0.mixer.heads", "3 does not divide hidden_size 8 (pass check_shapes)"),
        ("layers.1.mixer.heads", "5 does not divide hidden_size 8 (pass check_shapes)"),
    ]
