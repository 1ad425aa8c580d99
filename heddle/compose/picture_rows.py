"""What a picture of a plan shows: a row for each step, equal layers of a long model folded, and arcs between rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from heddle.compose.passes.graph import ChannelBlock, Graph, MixerBlock, Readout, edges_of, nodes_of
from heddle.compose.plan import Plan, graph_lines
from heddle.specs.kinds import MixerSpec
from heddle.specs.pattern import fold_layers

# Models of more layers than this are folded.
MANY = 60


@dataclass(frozen=True, slots=True)
class Row:
    """One step. Of a layer `mixers` are its kind and those it is made of, each with its depth; `told` is the whole text."""

    label: str
    number: str = ""
    mixers: tuple[tuple[int, str], ...] = ()
    channel: str | None = None
    told: str = ""


@dataclass(frozen=True, slots=True)
class Fold:
    """Rows `first` to `last` stand `times` times."""

    first: int
    last: int
    times: int


@dataclass(frozen=True, slots=True)
class Arc:
    """What goes from one row past others: to a row above its own, it comes from the repeat before."""

    kind: str
    source: int
    targets: tuple[int, ...]


@dataclass(slots=True)
class Rows:
    """The rows from top to bottom, what is folded, and the arcs."""

    rows: list[Row] = field(default_factory=list)
    folds: list[Fold] = field(default_factory=list)
    arcs: list[Arc] = field(default_factory=list)


def rows_of(plan: Plan) -> Rows:
    """The rows of a plan."""
    made, graph = Rows(), plan.graph
    told = dict(zip((name for name, _ in nodes_of(graph)), graph_lines(graph), strict=True))
    steps = _steps(graph)
    layers = [step for step in steps if step[0].startswith("layers.")]
    first = steps.index(layers[0])
    row_of: dict[str, int] = {}
    for step in steps[:first]:
        _add(made, row_of, [step], told, graph)
    _add_layers(made, row_of, layers, told=told, graph=graph)
    for step in steps[first + len(layers) :]:
        _add(made, row_of, [step], told, graph)
    made.arcs = _arcs(graph, row_of)
    return made


def _steps(graph: Graph) -> list[tuple[str, ...]]:
    """The nodes in their order, those of a layer together."""
    steps: list[tuple[str, ...]] = []
    for name, node in nodes_of(graph):
        if isinstance(node, ChannelBlock):
            steps[-1] = (*steps[-1], name)
        else:
            steps.append((name,))
    return steps


def _add_layers(
    made: Rows,
    row_of: dict[str, int],
    layers: Sequence[tuple[str, ...]],
    *,
    told: dict[str, str],
    graph: Graph,
) -> None:
    """Each layer a row; of a long model, equal ones that repeat stand once."""
    signs = [_sign(graph, step) for step in layers]
    folded = fold_layers(signs) if len(layers) > MANY else signs
    start = 0
    for item in folded:
        size, times = (len(item["pattern"]), item["repeat"]) if isinstance(item, dict) else (1, 1)
        begin = len(made.rows)
        for place in range(size):
            _add(made, row_of, layers[start + place : start + size * times : size], told, graph)
        if times > 1:
            made.folds.append(Fold(begin, begin + size - 1, times))
        start += size * times


def _sign(graph: Graph, step: tuple[str, ...]) -> str:
    """What makes two layers equal in a picture: what they are, and what they take from which block."""
    nodes = [graph.nodes[name]["node"] for name in step]
    taken = sorted(
        f"{edge.kind} {getattr(graph.nodes[source]['node'], 'block', source)}"
        for name in step
        for source, _, data in graph.in_edges(name, data=True)
        for edge in data["edges"]
        if edge.kind != "stream"
    )
    told = [(node.block, node.layer, node.norm_placement, node.spec, node.constant) for node in nodes]
    return repr(told + taken)


def _add(
    made: Rows, row_of: dict[str, int], steps: Sequence[tuple[str, ...]], told: dict[str, str], graph: Graph
) -> None:
    """One row, for all of `steps`."""
    for step in steps:
        row_of |= dict.fromkeys(step, len(made.rows))
    first = steps[0]
    node, text = graph.nodes[first[0]]["node"], "\n".join(told[name] for name in first)
    if not isinstance(node, MixerBlock):
        label = f"{first[0]}: {node.spec.kind}" if isinstance(node, Readout) else first[0]
        made.rows.append(Row(label, told=text))
        return
    channel = graph.nodes[first[1]]["node"].spec.kind if len(first) > 1 else None
    label = node.block if node.layer is None else f"{node.block} {node.layer}"
    number = f"{node.site.layer_index}{'…' if len(steps) > 1 else ''}"
    made.rows.append(Row(label, number, tuple(_nested(node.spec)), channel, text))


def _nested(spec: MixerSpec, depth: int = 0) -> Iterator[tuple[int, str]]:
    yield depth, spec.kind
    for part in spec.parts().values():
        yield from _nested(part, depth + 1)


def _arcs(graph: Graph, row_of: dict[str, int]) -> list[Arc]:
    targets: dict[tuple[str, int], set[int]] = {}
    for first, second, edge in edges_of(graph):
        if edge.kind != "stream":
            targets.setdefault((edge.kind, row_of[first]), set()).add(row_of[second])
    return [Arc(kind, source, tuple(sorted(rows))) for (kind, source), rows in sorted(targets.items())]
