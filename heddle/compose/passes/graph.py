"""The intermediate representation: a networkx DiGraph of typed nodes and edges.

A node is named by its place in the model (`embedding`, `layers.3.mixer`, `layers.3.channel`, `norm`, `head`) and carries
a `Node` under "node"; an edge carries an `Edge` under "edge". The graph itself carries the spec under "model". Passes
fill in the fields that are None; nothing here is ever changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import networkx as nx

from heddle.errors import HeddleError, HeddleErrors, Where
from heddle.specs.cost import State
from heddle.specs.kinds import ChannelSpec, MixerSpec
from heddle.specs.layer import Site
from heddle.specs.model import ModelSpec

Graph: TypeAlias = nx.DiGraph
Locate = Callable[[str], Where]


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A step of the model. `takes` and `gives` are the widths of its streams; None where it has none."""

    takes: int | None = None
    gives: int | None = None
    parameters: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding(Node):
    """Token ids into the residual stream."""

    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Block(Node):
    """One half of a layer, with the norm before it: x + part(norm(x))."""

    block: str
    site: Site
    norm: str
    data: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MixerBlock(Block):
    """The half that mixes along time."""

    spec: MixerSpec
    states: tuple[State, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelBlock(Block):
    """The half that mixes features."""

    spec: ChannelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class FinalNorm(Node):
    """The norm after the last layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Head(Node):
    """The residual stream into logits."""

    vocab_size: int


@dataclass(frozen=True, slots=True)
class Edge:
    """`stream`: activations of `width` features. `share`: the head uses the embedding's weight."""

    kind: Literal["stream", "share"]
    width: int


def empty_graph(model: ModelSpec) -> Graph:
    """The graph every plan starts from: the spec and nothing else."""
    return nx.DiGraph(model=model)


def model_of(graph: Graph) -> ModelSpec:
    """The spec the graph is made from."""
    model: ModelSpec = graph.graph["model"]
    return model


def nodes_of(graph: Graph) -> Iterator[tuple[str, Node]]:
    """Names and nodes in the order in which they run."""
    for name in nx.topological_sort(graph):
        yield name, graph.nodes[name]["node"]


def with_nodes(graph: Graph, changed: Mapping[str, Node]) -> Graph:
    """The same graph with other nodes under some of its names."""
    made = nx.DiGraph(**graph.graph)
    for name, data in graph.nodes(data=True):
        made.add_node(name, node=changed.get(name, data["node"]))
    for first, second, data in graph.edges(data=True):
        made.add_edge(first, second, edge=data["edge"])
    return made


class Failures:
    """Collects what a pass finds wrong, so that all of it is told in one go."""

    def __init__(self, name: str, locate: Locate) -> None:
        self._pass, self._locate = name, locate
        self._errors: list[HeddleError] = []

    def add(self, code: str, what: str, path: str, hint: str | None = None) -> None:
        """Note an error at a path of the resolved model, such as `layers.3.mixer.heads`."""
        told = f"{what} (pass {self._pass})"
        self._errors.append(HeddleError(code, told, where=self._locate(path), hint=hint))

    def check(self) -> None:
        """Raise HeddleErrors if anything was noted."""
        if self._errors:
            raise HeddleErrors(self._errors)
