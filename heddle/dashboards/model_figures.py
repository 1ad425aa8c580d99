"""Plots of one model or of few: costs of each layer, curves of training, timings, placements, a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from heddle.dashboards import data, words
from heddle.dashboards.axes import Z
from heddle.dashboards.figures import FRONT, LINES, TRAINED, WINNER, Figure, escape, layout, slug
from heddle.search.placement_terms import Term, Terms
from heddle.search.record import Trial
from heddle.specs.palette import look_of

# Marks of plotly that are told apart at the size of a point.
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x")
# Field of a layer's costs, its name, its unit.
COSTS = (
    ("parameters", "Parameters", "parameters"),
    ("prefill_flops_per_token", "FLOPs of prefill", "FLOPs per token"),
    ("decode_flops_per_token", "FLOPs of decoding", "FLOPs per token"),
    ("cache_bytes", "Cache, which grows with the context,", "bytes"),
    ("state_bytes", "State, which does not grow,", "bytes"),
)


def costs(layers: Sequence[Mapping[str, Any]], context: int, batch: int) -> list[Figure]:
    """Bars for each layer, in the colours of its mixer."""
    found = []
    for field, name, unit in COSTS:
        traces = []
        for mixer in sorted({str(layer["mixer"]) for layer in layers}, key=data.natural):
            mine = [layer for layer in layers if layer["mixer"] == mixer]
            values = [layer.get(field, 0) for layer in mine]
            bars: dict[str, Any] = {"type": "bar", "name": escape(mixer), "marker": fill(mixer)}
            traces.append(bars | {"x": [layer["index"] for layer in mine], "y": values})
        if not any(value for trace in traces for value in trace["y"]):
            continue
        drawn = layout("layer", unit) | {"barmode": "stack", "showlegend": True}
        said = f"{name} of each layer at context {context}, batch {batch}"
        found.append(Figure(slug(f"layers {field}"), said, traces, drawn))
    return found


def fill(mixer: str) -> dict[str, Any]:
    """How bars of a mixer are filled, in its own colour everywhere."""
    look = look_of(mixer)
    hatch = {"pattern": {"shape": "/", "fgcolor": "#ffffff", "size": 6}} if look.hatched else {}
    return {"color": look.colour, "line": {"width": 0.5, "color": "--dim"}} | hatch


def curves(trials: Sequence[tuple[str, Trial]]) -> list[Figure]:
    """The loss of each training over its steps, one plot a task."""
    tasks = dict.fromkeys(task for _, trial in trials for task in trial.scores)
    found = []
    for task in tasks:
        traces = []
        for index, (name, trial) in enumerate(trials):
            score = trial.scores.get(task)
            if score is not None and score.losses:
                steps, losses = zip(*score.losses, strict=True)
                line: dict[str, Any] = {"type": "scatter", "mode": "lines", "name": escape(name)}
                traces.append(line | {"x": steps, "y": losses, "line": {"dash": LINES[index % len(LINES)]}})
        drawn = layout("step", "training loss, nats per token") | {"showlegend": len(trials) > 1}
        found.append(Figure(slug(f"curve {task}"), f"Training loss, {task}", traces, drawn))
    return found


def timings(trial: Trial) -> list[Figure]:
    """What was measured in the search, and again at its end, with intervals; one plot a measurement."""
    found = []
    for label in dict.fromkeys([*trial.latency, *trial.remeasured]):
        traces = []
        for name, seen, colour in (
            ("in the search", trial.latency.get(label), FRONT),
            ("at the end", trial.remeasured.get(label), WINNER),
        ):
            if seen is None:
                continue
            spread: dict[str, Any] = {"type": "data", "symmetric": False}
            spread |= {"array": [seen.high_ms - seen.median_ms], "arrayminus": [seen.median_ms - seen.low_ms]}
            bar: dict[str, Any] = {
                "type": "bar",
                "orientation": "h",
                "name": name,
                "marker": {"color": colour},
            }
            traces.append(bar | {"x": [seen.median_ms], "y": [name], "error_x": spread})
        drawn = layout("ms", "") | {"showlegend": False}
        drawn["xaxis"] |= {"rangemode": "tozero"}
        said = f"{label}: medians with 95 % intervals"
        found.append(Figure(slug(f"latency {label}"), said, traces, drawn))
    return found


def placement(said: str, name: str, placed: Sequence[Sequence[str]]) -> Figure:
    """A heat map: the share of models with each mixer at each layer."""
    depth = max((len(mixers) for mixers in placed), default=0)
    kinds = sorted({mixer for mixers in placed for mixer in mixers}, key=data.natural, reverse=True)
    counts = {kind: [0] * depth for kind in kinds}
    for mixers in placed:
        for layer, kind in enumerate(mixers):
            counts[kind][layer] += 1
    reach = [sum(len(mixers) > layer for mixers in placed) for layer in range(depth)]
    shares = [[counts[kind][layer] / reach[layer] for layer in range(depth)] for kind in kinds]
    heat = {
        "type": "heatmap",
        "x": list(range(depth)),
        "y": [escape(kind) for kind in kinds],
        "z": shares,
        "zmin": 0,
        "zmax": 1,
        "colorscale": "Cividis",
        "colorbar": {"title": {"text": "share"}, "thickness": 12},
        "xgap": 1,
        "ygap": 1,
        "hovertemplate": "layer %{x}: %{y} in %{z:.0%}<extra></extra>",
    }
    return Figure(f"placement-{name}", f"Mixers by layer in {said}", [heat], layout("layer", "mixer"))


def terms(found: Terms) -> list[Figure]:
    """What the placement model has learnt: the worth of each block at each layer, and of each pair of neighbours."""
    traces = []
    for index, (kind, row) in enumerate(found.singles.items()):
        line: dict[str, Any] = {"type": "scatter", "mode": "lines+markers", "name": escape(kind)}
        line |= {"x": list(range(len(row))), "y": [term.mean for term in row], "error_y": _spread(row)}
        # A block is no mixer, whose colours are taken.
        look = {"line": {"color": TRAINED, "dash": LINES[index % len(LINES)]}}
        traces.append(line | look | {"marker": {"color": TRAINED, "symbol": SYMBOLS[index % len(SYMBOLS)]}})
    unit = "mean normalised score"
    said = f"Worth of a block at a layer, against {found.baseline} there; bars are 95 % intervals"
    drawn = layout("layer", unit) | {"showlegend": True}
    names = [f"{low} → {high}" for low, high in found.pairs]
    row = list(found.pairs.values())
    dots: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers",
        "name": "pair",
        "x": [term.mean for term in row],
    }
    dots |= {
        "y": [escape(name) for name in names],
        "error_x": _spread(row),
        "marker": {"size": 9, "color": FRONT},
    }
    pairs = Figure(
        "terms-pairs",
        "Worth of one block right before another; bars are 95 % intervals",
        [dots],
        layout(unit, ""),
    )
    return [Figure("terms-layers", said, traces, drawn), pairs]


def _spread(row: Sequence[Term]) -> dict[str, Any]:
    return {"type": "data", "array": [Z * term.sd for term in row], "thickness": 1, "width": 0}


def latency_rows(trial: Trial) -> list[list[str]]:
    """The timings of a trial in words."""
    rows = []
    for label in dict.fromkeys([*trial.latency, *trial.remeasured]):
        first, again = trial.latency.get(label), trial.remeasured.get(label)
        cells = [
            ("–", "–") if seen is None else (words.latency_text(seen), words.ratio_text(seen))
            for seen in (first, again)
        ]
        held = again or first
        rows.append([label, *cells[0], *cells[1], "–" if held is None else words.peak_text(held)])
    return rows
