"""The plan of a model: its spec with everything filled in, as a graph that passes have worked on. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from heddle.compose.costs import Setting, ends_cost, layer_cost
from heddle.compose.hf.known_failures import values
from heddle.compose.passes.assign_caches import assign_caches
from heddle.compose.passes.check_kind import check_kind
from heddle.compose.passes.check_shapes import check_shapes
from heddle.compose.passes.choose_kernels import choose_kernels
from heddle.compose.passes.count_costs import count_costs
from heddle.compose.passes.graph import (
    ChannelBlock,
    Classifier,
    Edge,
    Graph,
    Locate,
    MixerBlock,
    Node,
    Readout,
    edges_of,
    empty_graph,
    model_of,
    nodes_of,
    once_a_block,
)
from heddle.compose.passes.lay_constant_stream import lay_constant_stream
from heddle.compose.passes.link_references import link_references
from heddle.compose.passes.manager import Pass, run_passes
from heddle.compose.passes.plan_sharing import plan_sharing
from heddle.compose.passes.resolve_dims import resolve_dims
from heddle.compose.passes.resolve_layers import resolve_layers
from heddle.errors import Where
from heddle.specs.model import ModelSpec

PASSES: tuple[Pass, ...] = (
    resolve_layers,
    resolve_dims,
    link_references,
    plan_sharing,
    check_kind,
    lay_constant_stream,
    check_shapes,
    assign_caches,
    choose_kernels,
    count_costs,
)

# What models compute in on a GPU, and what a cache is counted in unless told otherwise.
BFLOAT16_BYTES = 2


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer, fully resolved. `mixer` and `channel` are plain data for the modules, `kind` included."""

    index: int
    block: str
    mixer: Mapping[str, Any]
    channel: Mapping[str, Any]
    norm: str
    parameters: int
    active_parameters: int
    _mixer: MixerBlock
    _channel: ChannelBlock | None
    # States of earlier layers that its mixer reads.
    _decodes: bool

    def runtime(self) -> dict[str, Any]:
        """Plain data for its modules; what is as in a plain pre-norm layer is left out."""
        mixer, channel = self._mixer, self._channel
        data: dict[str, Any] = {
            "mixer": dict(self.mixer),
            "channel": dict(self.channel),
            "norm": self.norm,
        }
        if mixer.norm_placement != "pre":
            data["norm_placement"] = mixer.norm_placement
        if mixer.residual is not None:
            data["residual"] = dict(mixer.residual)
        if channel is not None and channel.residual is not None:
            data["channel_residual"] = dict(channel.residual)
        if mixer.skip is not None:
            data["skip"] = dict(mixer.skip)
        if mixer.weights_of is not None:
            data["weights_of"] = mixer.weights_of
        return data

    def cost(self, context: int, batch: int = 1, *, element: int = BFLOAT16_BYTES) -> dict[str, float]:
        """As `Plan.cost`, of this layer alone."""
        setting = Setting(context=context, batch=batch, element=element, decodes=self._decodes)
        return layer_cost(self._mixer, self._channel, setting)

    @property
    def places_padding(self) -> bool:
        """Whether padding that follows text takes the place of text: in a state, a window, or blocks that are chosen."""
        states = self._mixer.states or ()
        counted = any(not state.grows or state.limit is not None or state.every > 1 for state in states)
        return counted or any(values(self.mixer, "selection"))

    def summary(self, context: int, batch: int = 1) -> dict[str, Any]:
        """Names and costs, for `heddle show`."""
        names = {
            "index": self.index,
            "block": self.block,
            "mixer": self.mixer["kind"],
            "channel": self.channel["kind"],
        }
        counts = {"parameters": self.parameters, "active_parameters": self.active_parameters}
        return {**names, "norm": self.norm, **counts, **self.cost(context, batch)}


@dataclass(frozen=True, eq=False)
class Plan:
    """A model with everything filled in. Prints as text; two plans are equal if their graphs are."""

    graph: Graph
    layers: tuple[LayerPlan, ...]

    @property
    def model(self) -> ModelSpec:
        return model_of(self.graph)

    @property
    def parameters(self) -> int:
        """Parameters of the whole model; a tied head has none of its own."""
        return sum(node.parameters or 0 for _, node in nodes_of(self.graph)) + self._bounds

    @property
    def bounds_width(self) -> int:
        """Columns of the table of lower bounds, which the model has once for all layers; 0: none but the first asks for it.

        The first layer has no bound, and nothing would train a table that it alone asks for.
        """
        width: Callable[[MixerBlock], int] = once_a_block(lambda spec, site: spec.bounds_width(site))
        mixers = [node for _, node in nodes_of(self.graph) if isinstance(node, MixerBlock)]
        return max((width(node) for node in mixers[1:]), default=0)

    @property
    def _bounds(self) -> int:
        return self.bounds_width * len(self.layers)

    @property
    def active_parameters(self) -> int:
        """Parameters that one token meets: all but those of the experts that it is not sent to."""
        return self.parameters - sum(layer.parameters - layer.active_parameters for layer in self.layers)

    def cost(self, context: int, batch: int = 1, *, element: int = BFLOAT16_BYTES) -> dict[str, float]:
        """Costs at `context` tokens; `element` is the bytes of a number.

        `prefill_flops_per_token` is the mean over a pass of `context` tokens, `decode_flops_per_token` that of one token
        after them; `train_flops_per_token` is of a forward and a backward pass. `cache_bytes` (growing with the context) and
        `state_bytes` (not) are of the whole batch, `cache_bytes_per_token` is of one sequence, before any window is full.
        `decode_bytes` and `prefill_bytes` are what a step of the whole batch and a pass over it must move; what is counted
        says `heddle.compose.costs`.

        An encoder has all tokens at once: whatever is about decoding and about caches is 0. A readout, which works once for
        a sequence, is spread over its tokens.
        """
        decodes = self.model.kind == "causal_lm"
        totals = ends_cost(
            self.model, Setting(context=context, batch=batch, element=element, decodes=decodes), self._bounds
        )
        for layer in self.layers:
            for name, value in layer.cost(context, batch, element=element).items():
                totals[name] += value
        return totals

    def runtime(self) -> dict[str, Any]:
        """Plain data for HeddleConfig; the kind of a causal language model is left out."""
        model = self.model
        names = ("vocab_size", "hidden_size", "context_length", "norm_eps", "tie_embeddings")
        factors = ("embedding_multiplier", "logit_multiplier", "logit_softcap")
        data = {name: getattr(model, name) for name in (*names, *factors)}
        if model.kind != "causal_lm":
            data["kind"] = model.kind
        if model.constant_tokens is not None:
            data["constant_tokens"] = list(model.constant_tokens)
        if self.bounds_width > 0:
            data["lower_bounds_width"] = self.bounds_width
        if model.readout is not None:
            data |= {"readout": model.readout.runtime(), "tie_embeddings": False}
        return {**data, "layers": [layer.runtime() for layer in self.layers]}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return _content(self.graph) == _content(other.graph)

    def __hash__(self) -> int:
        return hash(tuple(self.graph))

    def __str__(self) -> str:
        table = f"{'lower_bounds':<18}  {len(self.layers)} x {self.bounds_width}  {self._bounds:,} parameters"
        lines = [f"{len(self.layers)} layers, {self.parameters:,} parameters", *graph_lines(self.graph)]
        return "\n".join([*lines, table] if self._bounds else lines)


def plan(model: ModelSpec, where: Locate | None = None) -> Plan:
    """The plan of a resolved spec. `where` gives the place of a path such as `layers.3.mixer.heads`; see `SpecFile.where`.

    Raises:
        HeddleErrors: of the first pass that finds something wrong; each names the pass, the node and the spec's line.
    """
    locate = where or (lambda path: Where(path=path))
    graph = run_passes(empty_graph(model), PASSES, locate)
    return Plan(graph, _layers(graph))


def _layers(graph: Graph) -> tuple[LayerPlan, ...]:
    idle = once_a_block(lambda spec, site: spec.params(site) - spec.active_params(site))
    return tuple(_layer(graph, node, idle) for _, node in nodes_of(graph) if isinstance(node, MixerBlock))


def _layer(graph: Graph, mixer: MixerBlock, idle: Callable[[ChannelBlock], int]) -> LayerPlan:
    """`idle` says how many parameters of a channel block a token does not meet."""
    index, channel = mixer.site.layer_index, None
    if f"layers.{index}.channel" in graph:
        channel = graph.nodes[f"layers.{index}.channel"]["node"]
    assert channel is None or isinstance(channel, ChannelBlock)
    assert mixer.data is not None
    data = {"kind": "none"} if channel is None else channel.data
    assert data is not None
    parameters = (mixer.parameters or 0) + (channel.parameters or 0 if channel else 0)
    decodes = model_of(graph).kind == "causal_lm"
    return LayerPlan(
        index,
        mixer.block,
        mixer.data,
        data,
        mixer.norm,
        parameters,
        # Those of another layer are not counted here.
        parameters - (0 if channel is None or channel.weights_of is not None else idle(channel)),
        mixer,
        channel,
        decodes,
    )


def _content(graph: Graph) -> tuple[dict[str, Node], list[tuple[str, str, Edge]]]:
    return dict(nodes_of(graph)), sorted(edges_of(graph), key=repr)


def graph_lines(graph: Graph) -> list[str]:
    """A line for each node: its name, what it is, its states, its parameters, and what it shares."""
    lines = []
    for name, node in nodes_of(graph):
        cells = [f"{name:<18}", _told(node)]
        cells += _taken(graph, name)
        if node.parameters is not None:
            cells.append(f"{node.parameters:,} parameters")
        lines.append("  ".join(cells))
    return lines


def _taken(graph: Graph, name: str) -> list[str]:
    """What a node takes from others, beside the stream."""
    told = {
        "share": "uses {}'s weight",
        "skip": "adds the stream of {}",
        "qk_source": "makes queries and keys of {}",
        "constant": "makes queries and keys of the constant stream",
    }
    return [
        told.get(edge.kind, f"takes {edge.kind} of {{}}").format(first)
        for first, _, data in graph.in_edges(name, data=True)
        for edge in data["edges"]
        if edge.kind != "stream"
    ]


def _told(node: Node) -> str:
    if isinstance(node, Readout):
        return f"{_fields(node.spec.runtime())}  {node.takes} -> {node.gives}"
    if isinstance(node, Classifier):
        return f"{node.takes} -> {node.classes} classes"
    if not isinstance(node, (MixerBlock, ChannelBlock)):
        return f"{node.takes or 'ids'} -> {node.gives or 'logits'}"
    data = node.data or {"kind": node.spec.kind}
    states = (node.states or ()) if isinstance(node, MixerBlock) else ()
    held = "".join(
        f"  {state.name}{list(state.shape)}{' per token' if state.grows else ''}" for state in states
    )
    constant = "  with the constant stream" if node.constant else ""
    return f"{node.block}: {node.norm}, {_fields(data)}{held}{constant}"


def _fields(data: Mapping[str, Any]) -> str:
    """`attention(heads=4, window=8)`; what is not set is not told."""
    told = {key: value for key, value in data.items() if key != "kind" and value is not None}
    fields = ", ".join(f"{key}={value}" for key, value in told.items())
    return f"{data['kind']}({fields})"
