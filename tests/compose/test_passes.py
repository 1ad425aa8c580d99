"""Each pass keeps the plan legal, says what it needs and gives, and leaves a graph that prints.

What each makes of a graph is in test_references.
"""

from __future__ import annotations

from typing import Any

import networkx as nx
import pytest

from heddle.compose.passes.check_shapes import check_shapes
from heddle.compose.passes.graph import Graph, edges_of, empty_graph
from heddle.compose.passes.resolve_dims import resolve_dims
from heddle.compose.passes.resolve_layers import resolve_layers
from heddle.compose.plan import PASSES, graph_lines
from heddle.errors import HeddleErrors, Where
from heddle.specs import ModelSpec

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


def here(path: str) -> Where:
    return Where(path=path)


def after(count: int) -> Graph:
    """The graph after the first passes of the list."""
    graph = empty_graph(MODEL)
    for one in PASSES[:count]:
        graph = one(graph, here)
    return graph


every_pass = pytest.mark.parametrize("one", PASSES, ids=lambda one: one.__name__)


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
        assert [line.split()[0] for line in lines] == [
            "embedding",
            "layers.0.mixer",
            "layers.0.channel",
            "layers.1.mixer",
            "norm",
            "head",
        ]


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
