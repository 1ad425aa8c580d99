"""Edges between layers: what the passes make of references, shared blocks and own-named layers, and what they refuse."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
from heddle.compose.passes.lay_constant_stream import lay_constant_stream
from heddle.compose.passes.link_references import link_references
from heddle.compose.passes.manager import Pass, illegal, run_passes
from heddle.compose.passes.plan_sharing import plan_sharing
from heddle.compose.passes.resolve_dims import resolve_dims
from heddle.compose.passes.resolve_layers import resolve_layers
from heddle.compose.plan import PASSES, plan
from heddle.errors import HeddleErrors, Where
from heddle.specs import ModelSpec, Site, loads
from heddle.specs.cost import State
from heddle.specs.kinds import MixerSpec, Reference
from heddle.specs.mixers.attention import Attention
from heddle.specs.pattern import layers_of
from heddle.specs.references import links

# A shared block, a composite mixer, a skip from the embedding and one from a layer by its own name, and an override.
TEXT = """\
version: 1
name: edges
model:
  vocab_size: 256
  hidden_size: 8
  blocks:
    twice: {mixer: {kind: attention, heads: 2}, channel: {kind: gelu, width: 16}, shared: true}
    both:
      mixer: {kind: parallel, mixers: [{kind: attention, heads: 2}, {kind: decay_attention, heads: 2}]}
      channel: {kind: none}
      skip: {source: embedding}
    back: {mixer: {kind: decay_attention, heads: 2}, channel: {kind: none}, skip: {source: anchor, init: 0.5}}
  layers:
    - twice
    - both
    - {block: both, name: anchor, override: {mixer: {merge: mean}, norm_placement: sandwich}}
    - twice
    - back
"""
FILE = loads(TEXT, file="a.yaml")
MODEL = FILE.spec.model
SITES = [Site(8, index, 5, 1e-6, 32_768) for index in range(5)]
TWICE, BOTH, BACK = (MODEL.blocks[name] for name in ("twice", "both", "back"))
ANCHOR = layers_of(MODEL)[2].spec


def here(path: str) -> Where:
    return Where(path=path)


def mixer(index: int, block: str, spec: MixerSpec, **fields: Any) -> MixerBlock:
    wide: dict[str, Any] = {"takes": 8, "gives": 8, "norm": "rmsnorm"}
    return MixerBlock(spec=spec, block=block, site=SITES[index], **wide | fields)


def channel(index: int) -> ChannelBlock:
    return ChannelBlock(
        spec=TWICE.channel, block="twice", site=SITES[index], takes=8, gives=8, norm="rmsnorm"
    )


Nodes = dict[str, Any]
Edges = list[tuple[str, str, Edge]]
LAYERS: Nodes = {
    "embedding": Embedding(vocab_size=256, gives=8),
    "layers.0.mixer": mixer(0, "twice", TWICE.mixer),
    "layers.0.channel": channel(0),
    "layers.1.mixer": mixer(1, "both", BOTH.mixer),
    "layers.2.mixer": mixer(2, "both", ANCHOR.mixer, layer="anchor", norm_placement="sandwich"),
    "layers.3.mixer": mixer(3, "twice", TWICE.mixer),
    "layers.3.channel": channel(3),
    "layers.4.mixer": mixer(4, "back", BACK.mixer),
    "norm": FinalNorm(takes=8, gives=8),
    "head": Head(vocab_size=256, takes=8),
}
CHAIN: Edges = [
    (first, second, Edge("stream", 8))
    for first, second in zip(list(LAYERS)[:-1], list(LAYERS)[1:], strict=True)
]
TIED: Edges = [("embedding", "head", Edge("share", 8))]


def changed(nodes: Nodes, **fields: Mapping[str, Any]) -> Nodes:
    """The nodes, each of the named field's nodes with its value."""
    made = dict(nodes)
    for field, values in fields.items():
        for name, value in values.items():
            made[name] = replace(made[name], **{field: value})
    return made


ATTENTION = {"kind": "attention", "heads": 2, "head_dim": 4, "kv_heads": 2}
ATTENTION |= {
    "rope": {"theta": 10000.0, "fraction": 1.0},
    "qk_norm": False,
    "gate": False,
    "window": None,
}
DECAY = {"kind": "decay_attention", "heads": 2, "head_dim": 4, "form": "lightning", "short_conv": None}
PARALLEL = {"kind": "parallel", "merge": "sum", "norm": False, "weights": None, "mixers": [ATTENTION, DECAY]}
DATA = {
    "layers.0.mixer": ATTENTION,
    "layers.0.channel": {"kind": "gelu", "width": 16},
    "layers.1.mixer": PARALLEL,
    "layers.2.mixer": PARALLEL | {"merge": "mean"},
    "layers.3.mixer": ATTENTION,
    "layers.3.channel": {"kind": "gelu", "width": 16},
    "layers.4.mixer": DECAY,
}
DIMS = changed(LAYERS, data=DATA)
SKIPS = {
    "layers.1.mixer": {"source": -1, "init": 0.0},
    "layers.2.mixer": {"source": -1, "init": 0.0},
    "layers.4.mixer": {"source": 2, "init": 0.5},
}
LINKED = changed(DIMS, skip=SKIPS)
LINKS: Edges = [
    ("embedding", "layers.1.mixer", Edge("skip", 8)),
    ("embedding", "layers.2.mixer", Edge("skip", 8)),
    ("layers.2.mixer", "layers.4.mixer", Edge("skip", 8)),
]
SHARED = changed(LINKED, weights_of={"layers.3.mixer": 0, "layers.3.channel": 0})
SHARES: Edges = [(f"layers.0.{half}", f"layers.3.{half}", Edge("share", 8)) for half in ("mixer", "channel")]
KV = tuple(State(name, (2, 4), grows=True) for name in ("keys", "values"))
MEMORY = (State("memory", (2, 4, 4), element=4),)
OF_BOTH = tuple(replace(one, name=f"mixers.0.{one.name}") for one in KV)
OF_BOTH += tuple(replace(one, name=f"mixers.1.{one.name}") for one in MEMORY)
STATES = {"layers.0.mixer": KV, "layers.1.mixer": OF_BOTH, "layers.2.mixer": OF_BOTH}
CACHED = changed(SHARED, states=STATES | {"layers.3.mixer": KV, "layers.4.mixer": MEMORY})
DECAYS = ("decay_attention",)
KERNELS = {"layers.0.mixer": (), "layers.1.mixer": DECAYS, "layers.2.mixer": DECAYS}
CHOSEN = changed(CACHED, kernels=KERNELS | {"layers.3.mixer": (), "layers.4.mixer": DECAYS})
# Attention 4 · 64, decay attention 5 · 64 + 8; a norm 8, two in a sandwich; two factors of a skip; a twin has none.
COUNTED = changed(
    CHOSEN,
    parameters={
        "embedding": 2048,
        "layers.0.mixer": 264,
        "layers.0.channel": 264,
        "layers.1.mixer": 256 + 328 + 8 + 2,
        "layers.2.mixer": 256 + 328 + 16 + 2,
        "layers.3.mixer": 0,
        "layers.3.channel": 0,
        "layers.4.mixer": 328 + 8 + 2,
        "norm": 8,
        "head": 0,
    },
)


def graph_of(nodes: Nodes, *edges: Edges) -> Graph:
    graph = empty_graph(MODEL)
    for name, node in nodes.items():
        graph.add_node(name, node=node)
    for first, second, edge in [*CHAIN, *TIED, *(one for some in edges for one in some)]:
        add_edge(graph, first, second, edge)
    return graph


EXPECTED: dict[Pass, tuple[Graph, Graph]] = {
    resolve_layers: (empty_graph(MODEL), graph_of(LAYERS)),
    resolve_dims: (graph_of(LAYERS), graph_of(DIMS)),
    link_references: (graph_of(DIMS), graph_of(LINKED, LINKS)),
    plan_sharing: (graph_of(LINKED, LINKS), graph_of(SHARED, LINKS, SHARES)),
    check_kind: (graph_of(SHARED, LINKS, SHARES), graph_of(SHARED, LINKS, SHARES)),
    # A constant stream is in tests/compose/test_constant_stream.py.
    lay_constant_stream: (graph_of(SHARED, LINKS, SHARES), graph_of(SHARED, LINKS, SHARES)),
    check_shapes: (graph_of(SHARED, LINKS, SHARES), graph_of(SHARED, LINKS, SHARES)),
    assign_caches: (graph_of(SHARED, LINKS, SHARES), graph_of(CACHED, LINKS, SHARES)),
    choose_kernels: (graph_of(CACHED, LINKS, SHARES), graph_of(CHOSEN, LINKS, SHARES)),
    count_costs: (graph_of(CHOSEN, LINKS, SHARES), graph_of(COUNTED, LINKS, SHARES)),
}
every_pass = pytest.mark.parametrize("one", PASSES, ids=lambda one: one.__name__)


def content(graph: Graph) -> tuple[Any, ...]:
    return graph.graph["model"], dict(nodes_of(graph)), sorted(edges_of(graph), key=repr)


@every_pass
def test_a_pass_makes_the_expected_of_what_was_before(one: Pass) -> None:
    before, expected = EXPECTED[one]
    assert content(one(before, here)) == content(expected)


@every_pass
def test_a_pass_changes_nothing_it_was_given_and_twice_is_once(one: Pass) -> None:
    before = EXPECTED[one][0]
    kept = content(before.copy())
    once = one(before, here)
    assert content(before) == kept
    assert content(one(once, here)) == content(once)
    assert illegal(once) is None


def test_the_passes_of_this_page_are_all_there_are() -> None:
    assert tuple(EXPECTED) == PASSES
    assert content(plan(MODEL, FILE.where).graph) == content(EXPECTED[count_costs][1])


# What is refused.


def refused(text: str) -> HeddleErrors:
    file = loads(text, file="a.yaml")
    with pytest.raises(HeddleErrors) as told:
        plan(file.spec.model, file.where)
    return told.value


def test_a_layer_cannot_take_from_itself_and_the_next_of_its_block_takes_from_it() -> None:
    (error,) = refused(TEXT.replace("source: anchor", "source: back")).errors
    assert (error.code, error.where.line) == ("reference-direction", 12)
    (error,) = refused(
        TEXT.replace("- back", "- {block: back, name: me, override: {skip: {source: me}}}")
    ).errors
    assert (error.code, error.where.line, error.where.path) == (
        "reference-direction",
        18,
        "layers.4.skip.source",
    )
    assert "override" in (error.where.text or "")
    # The first takes from `anchor`, each later one by an override from the one before.
    again = "    - {block: back, override: {skip: {source: back}}}\n"
    file = loads(TEXT + again * 2)
    made = plan(file.spec.model, file.where)
    assert [layer.runtime()["skip"]["source"] for layer in made.layers[4:]] == [2, 4, 5]


def test_a_mistake_of_a_block_in_many_layers_is_told_once() -> None:
    text = TEXT.replace("source: anchor", "source: ankor").replace(
        "- back", "- {repeat: 100, pattern: [back]}"
    )
    assert [error.where.path for error in refused(text).errors] == ["layers.4.skip.source"]


class Taker(Attention):
    """Attention that takes the keys of an earlier layer."""

    source: str = "full"

    def references(self) -> tuple[Reference, ...]:
        return (Reference("source", self.source, "keys"),)

    def offers(self, site: Site) -> Any:
        resolved = self.resolved(site)
        return {"keys": (resolved.kv_heads, resolved.head_dim)}


class Giver(Attention):
    """Attention that hands its keys on."""

    def offers(self, site: Site) -> Any:
        resolved = self.resolved(site)
        return {"keys": (resolved.kv_heads, resolved.head_dim)}


def with_mixers(**mixers: MixerSpec) -> ModelSpec:
    """The model, with mixers that no file can name; the language's own kinds have tests of their own."""
    blocks = {
        name: MODEL.blocks["back"].model_copy(update={"mixer": one, "skip": None})
        for name, one in mixers.items()
    }
    return MODEL.model_copy(update={"blocks": blocks, "layers": list(mixers)})


def test_keys_become_an_edge_and_an_index() -> None:
    made = plan(with_mixers(full=Giver(heads=2, head_dim=4), it=Taker(heads=2, head_dim=4)))
    assert ("layers.0.mixer", "layers.1.mixer", Edge("keys", 8)) in list(edges_of(made.graph))
    assert made.layers[1].mixer["source"] == 0
    assert "takes keys of layers.0.mixer" in str(made)


@pytest.mark.parametrize(
    ("giver", "what"),
    [
        (Giver(heads=2, head_dim=2), "the keys of full are 2 x 2 a token, and 2 x 4 are needed"),
        (MODEL.blocks["back"].mixer, "full is decay_attention, which has no keys to hand on"),
    ],
)
def test_what_is_not_there_or_of_another_shape_is_refused(giver: MixerSpec, what: str) -> None:
    with pytest.raises(HeddleErrors) as told:
        plan(with_mixers(full=giver, it=Taker(heads=2, head_dim=4)))
    (error,) = told.value.errors
    assert (error.code, error.where.path) == ("reference-mismatch", "layers.1.mixer.source")
    assert error.what == f"{what} (pass link_references)"


@given(
    sources=st.lists(st.sampled_from(["a", "b", "c", "x", "y", "embedding"]), min_size=3, max_size=3),
    layers=st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from([None, "x", "y"])), min_size=1, max_size=12
    ),
)
def test_no_file_can_make_layers_take_from_each_other_in_a_circle(
    sources: list[str], layers: list[tuple[str, str | None]]
) -> None:
    blocks = {
        name: MODEL.blocks["back"].model_copy(
            update={"skip": BACK.skip.model_copy(update={"source": source})}
        )  # type: ignore[union-attr]
        for name, source in zip("abc", sources, strict=True)
    }
    data = MODEL.model_dump() | {"blocks": {name: one.model_dump() for name, one in blocks.items()}}
    used: set[str] = set()
    items: list[Any] = []
    for block, name in layers:
        items.append(block if name is None or name in used else {"block": block, "name": name})
        used |= {name} if name else set()
    model = ModelSpec.model_validate(data | {"layers": items})
    assert all(link.source is None or link.source < link.layer for link in links(layers_of(model)))
    assert is_legal_or_refused(model)


def is_legal_or_refused(model: ModelSpec) -> bool:
    """Whether a model has a plan without a circle, or is refused for its names."""
    try:
        return nx.is_directed_acyclic_graph(plan(model).graph)
    except HeddleErrors as errors:
        return {error.code for error in errors.errors} <= {"unknown-layer", "reference-direction"}


# What holds between passes.


def broken(graph: Graph, first: str, second: str, edge: Edge) -> Graph:
    made = graph.copy()
    add_edge(made, first, second, edge)
    return made


def test_an_illegal_graph_is_told_apart() -> None:
    whole = graph_of(DIMS)
    assert illegal(whole) is None
    back = broken(whole, "layers.2.mixer", "layers.1.mixer", Edge("keys", 8))
    assert illegal(back) == "layers.1.mixer takes keys of layers.2.mixer, which does not stand before it"
    fork = broken(whole, "layers.1.mixer", "head", Edge("stream", 8))
    assert illegal(fork) == "two streams leave layers.1.mixer, to layers.2.mixer and head"
    circle = broken(whole, "head", "norm", Edge("stream", 8))
    assert illegal(circle) == "the stream from embedding passes 11 nodes, and there are 10"
    narrow = graph_of(changed(DIMS, gives={"layers.1.mixer": 4}))
    assert illegal(narrow) == "layers.1.mixer gives 4, layers.2.mixer takes 8, the stream has 8"
    alone = whole.copy()
    alone.remove_edge("layers.0.channel", "layers.1.mixer")
    assert illegal(alone) == "a stream must begin at one node, and begins at 2"
    assert illegal(empty_graph(MODEL)) == "a stream must begin at one node, and begins at 0"


def test_a_mistake_of_ours_in_a_pass_says_which_pass_and_what_ran_before() -> None:
    def stumbles(graph: Graph, locate: Any) -> Graph:  # noqa: ARG001
        raise KeyError("gone")

    def circles(graph: Graph, locate: Any) -> Graph:  # noqa: ARG001
        return broken(graph, "layers.2.mixer", "layers.1.mixer", Edge("keys", 8))

    for wrong, error in ((stumbles, KeyError), (circles, AssertionError)):
        with pytest.raises(error) as told:
            run_passes(empty_graph(MODEL), (resolve_layers, resolve_dims, wrong), here)
        shown = "".join(traceback.format_exception(told.value))
        assert f"while running pass {wrong.__name__}; passes before it: resolve_layers, resolve_dims" in shown
        assert "in run_passes" in shown
    with pytest.raises(KeyError) as told:
        run_passes(empty_graph(MODEL), (stumbles,), here)
    assert told.value.__notes__ == ["while running pass stumbles; passes before it: none"]
    assert any(frame.name == "stumbles" for frame in traceback.extract_tb(told.value.__traceback__))


def test_an_error_of_the_user_carries_no_note() -> None:
    with pytest.raises(HeddleErrors) as told:
        plan(MODEL.model_copy(update={"layers": ["ful"]}))
    assert not hasattr(told.value, "__notes__")
