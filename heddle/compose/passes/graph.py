"""The intermediate representation: a networkx DiGraph of typed nodes and edges.

A node is named by its place in the model (`embedding`, `layers.3.mixer`, `layers.3.channel`, `norm`, and `head`, or
`readout` and `classifier`) and carries a `Node` under "node"; what goes from one node to another is a tuple of `Edge` under
"edges". The graph itself carries the spec under "model". Nodes stand in it in the order in which they run. Passes fill in
the fields that are None; nothing here is ever changed in place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import networkx as nx

from heddle.errors import HeddleError, HeddleErrors, Where
from heddle.specs.cost import State
from heddle.specs.kinds import ChannelSpec, MixerSpec
from heddle.specs.layer import Site
from heddle.specs.model import ModelSpec
from heddle.specs.readout import ReadoutSpec

Graph: TypeAlias = nx.DiGraph
Locate = Callable[[str], Where]
Answer = TypeVar("Answer")


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
    """One half of a layer, with its norms and its way into the stream: by default x + part(norm(x)).

    `layer` is the layer's own name, if it has one. `weights_of` is the layer whose weights it has, if not its own. `constant`
    says whether the constant stream runs through it, too.
    """

    block: str
    site: Site
    norm: str
    norm_placement: str = "pre"
    residual: Mapping[str, Any] | None = None
    layer: str | None = None
    data: Mapping[str, Any] | None = None
    weights_of: int | None = None
    constant: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MixerBlock(Block):
    """The half that mixes along time. `skip` says what joins the stream before it: a layer (-1: the embedding)."""

    spec: MixerSpec
    states: tuple[State, ...] | None = None
    kernels: tuple[str, ...] | None = None
    skip: Mapping[str, Any] | None = None


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Readout(Node):
    """The hidden states of a sequence into one vector, of an encoder."""

    spec: ReadoutSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Classifier(Node):
    """That vector into the scores of classes."""

    classes: int


@dataclass(frozen=True, slots=True)
class Edge:
    """What goes along: activations of `width` features.

    `stream`: from each node to the next. `skip`: what an earlier layer gave to the stream. `qk_source`: the embedded tokens,
    of which a mixer makes queries and keys. `constant`: the constant stream, of which it makes them. `keys`, `values`,
    `indices`: what a mixer takes from that of an earlier layer. `share`: weights, of a layer or (by the head) of the embedding.
    """

    kind: Literal["stream", "skip", "qk_source", "constant", "keys", "values", "indices", "share"]
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
    yield from graph.nodes(data="node")


def with_nodes(graph: Graph, changed: Mapping[str, Node]) -> Graph:
    """A graph of its own, with other nodes under some of the names."""
    made = nx.DiGraph(**graph.graph)
    for name, node in graph.nodes(data="node"):
        made.add_node(name, node=changed.get(name, node))
    made.add_edges_from(graph.edges(data=True))
    return made


def once_a_block(ask: Callable[[Any, Site], Answer]) -> Callable[[MixerBlock | ChannelBlock], Answer]:
    """`ask(spec, site)`, the spec of a mixer or channel block asked at the first of the layers that have it.

    Sizes are the same at all of them (see `Site`), and a thousand layers are made of a few blocks.
    """
    told: dict[int, Answer] = {}

    def answer(node: MixerBlock | ChannelBlock) -> Answer:
        # By identity: the graph keeps every spec alive.
        if id(node.spec) not in told:
            told[id(node.spec)] = ask(node.spec, node.site)
        return told[id(node.spec)]

    return answer


def add_edge(graph: Graph, first: str, second: str, edge: Edge) -> None:
    """Adds an edge to a graph in the making; two nodes may have several, each once."""
    known = graph.edges[first, second]["edges"] if graph.has_edge(first, second) else ()
    graph.add_edge(first, second, edges=known if edge in known else (*known, edge))


def edges_of(graph: Graph) -> Iterator[tuple[str, str, Edge]]:
    """Every edge between two nodes."""
    # The plain mappings behind the views: a plan of a thousand layers is walked some dozen times.
    for first, following in graph.adjacency():
        for second, data in following.items():
            for edge in data["edges"]:
                yield first, second, edge


class Failures:
    """Collects what a pass finds wrong, so that all of it is told in one go."""

    def __init__(self, name: str, locate: Locate) -> None:
        self._pass, self._locate = name, locate
        self._errors: list[HeddleError] = []
        self._told: set[tuple[str | None, int, int | None, str]] = set()

    def add(self, code: str, what: str, path: str, hint: str | None = None) -> None:
        """Note an error at a path of the resolved model, such as `layers.3.mixer.heads`.

        A mistake of a block that stands in many layers is told once, at the first of them.
        """
        where = self._locate(path)
        if where.line is not None:
            place = (where.file, where.line, where.column, code)
            if place in self._told:
                return
            self._told.add(place)
        self._errors.append(HeddleError(code, f"{what} (pass {self._pass})", where=where, hint=hint))

    def check(self) -> None:
        """Raise HeddleErrors if anything was noted."""
        if self._errors:
            raise HeddleErrors(self._errors)
