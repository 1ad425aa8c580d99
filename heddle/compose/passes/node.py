"""The typed nodes of a plan's graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import networkx as nx

from heddle.specs import ModelSpec, Site

Role = Literal["embedding", "mixer", "channel", "norm", "head"]


def _nothing(*_: int) -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Costs:
    """Closed forms of one node. FLOPs per token (a multiply-add counts 2), bytes per sequence."""

    prefill_flops: Callable[[int], float] = _nothing
    decode_flops: Callable[[int], float] = _nothing
    cache_bytes_per_token: Callable[[int], int] = _nothing
    state_bytes: Callable[[int, int], int] = _nothing


@dataclass(frozen=True, slots=True)
class Node:
    """One block. Passes fill it: `fields` by resolve_dims, `cache` by assign_caches, `parameters` and `costs` by count_costs."""

    role: Role
    kind: str
    # The block's name in the spec, and its layer; None outside the layers.
    block: str | None = None
    layer: int | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    cache: Literal["none", "kv", "state"] = "none"
    parameters: int = 0
    costs: Costs = Costs()


def model_of(graph: nx.DiGraph) -> ModelSpec:
    model: ModelSpec = graph.graph["model"]
    return model


def node_of(graph: nx.DiGraph, name: str) -> Node:
    node: Node = graph.nodes[name]["node"]
    return node


def with_nodes(graph: nx.DiGraph, change: Callable[[str, Node], Node]) -> nx.DiGraph:
    """A copy of the graph with every node sent through `change`."""
    copy = graph.copy()
    for name in copy:
        copy.nodes[name]["node"] = change(name, node_of(graph, name))
    return copy


def layer_names(graph: nx.DiGraph) -> list[str]:
    """The block name of each layer."""
    mixers = [node_of(graph, name) for name in graph if node_of(graph, name).role == "mixer"]
    return [node.block or "" for node in sorted(mixers, key=lambda node: node.layer or 0)]


def site_of(graph: nx.DiGraph, node: Node) -> Site:
    """Where a node's block stands."""
    model = model_of(graph)
    return Site(
        model.hidden_size, node.layer or 0, len(layer_names(graph)), model.norm_eps, model.context_length
    )
