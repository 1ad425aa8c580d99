"""Plots of several runs, and of trials that may be of several: their fronts, and a few trials in all quantities."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from heddle.dashboards import words
from heddle.dashboards.axes import PARAMETERS, Axis, all_axes
from heddle.dashboards.data import Cell
from heddle.dashboards.figures import LINES, Figure, draw_limit, escape, layout, slug
from heddle.search.record import Run, Trial

# Runs are told apart by shape as well as by colour.
SHAPES = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down")

# What a whole model costs: the name of its axis, and how a table writes it.
COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "prefill_flops_per_token": ("prefill FLOPs per token", words.count_text),
    "decode_flops_per_token": ("decode FLOPs per token", words.count_text),
    "cache_bytes": ("cache bytes", words.bytes_text),
    "state_bytes": ("state bytes", words.bytes_text),
}


@dataclass(frozen=True, slots=True)
class Beside:
    """A trial among trials of other runs, or a spec file: what it is called here, its page, and its name in a link.

    That name is `run:number` of a trial, and the name of a spec file, which has no run. `cells` are its layers, and `costs`
    what its whole model costs, by `COSTS`.
    """

    name: str
    run: Run | None
    trial: Trial
    address: str
    place: str
    cells: Sequence[Cell] = ()
    costs: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_winner(self) -> bool:
        return self.run is not None and self.trial.number == self.run.best


def fronts(members: Mapping[str, Sequence[Beside]], x: Axis, y: Axis) -> Figure:
    """The front of each run at two quantities; a run that has not both is left out."""
    traces, limits = [], set()
    for index, (key, held) in enumerate(members.items()):
        placed = [(x.value(one.trial), y.value(one.trial), one) for one in held if _has(one, x, y)]
        points = sorted((a, b, one.place, one) for a, b, one in placed if a is not None and b is not None)
        if not points:
            continue
        runs = [one.run for one in held[:1] if one.run is not None]
        limits |= {axis.limit for axis in all_axes(runs).values() if axis.key == x.key}
        winners = [one.is_winner for *_, one in points]
        shape = SHAPES[index % len(SHAPES)]
        trace: dict[str, Any] = {"type": "scatter", "mode": "lines+markers", "name": escape(key)}
        trace["line"] = {"width": 1.5, "dash": LINES[index % len(LINES)]}
        trace["marker"] = {
            "symbol": ["star" if won else shape for won in winners],
            "size": [15 if won else 9 for won in winners],
        }
        trace |= {"x": [a for a, *_ in points], "y": [b for _, b, *_ in points]}
        trace |= {"text": [_hover(one) for *_, one in points], "hovertemplate": "%{text}<extra></extra>"}
        traces.append(trace | {"customdata": [one.address for *_, one in points]})
    drawn = layout(x.label, y.label) | {"showlegend": True}
    if len(limits) == 1:
        draw_limit(drawn, "x", limits.pop())
    caption = f"{y.plain} against {x.plain}: the front of each run, its winner as a star"
    return Figure(slug(f"fronts {y.key} against {x.key}"), caption, traces, drawn)


def _has(one: Beside, *wanted: Axis) -> bool:
    known = {PARAMETERS.key: PARAMETERS} if one.run is None else all_axes([one.run])
    return all(axis.key in known and known[axis.key].label == axis.label for axis in wanted)


def _hover(one: Beside) -> str:
    lines = [one.name, *(f"{score.task} {words.score_text(score)}" for score in one.trial.scores.values())]
    lines += [f"{seen.label} {words.latency_text(seen)}" for seen in one.trial.latency.values()]
    return "<br>".join(map(escape, [*lines, words.short_layers(one.trial.layers)]))


def compared(chosen: Sequence[Beside]) -> Figure:
    """Each quantity that two or more have as a share of the largest among them, a line a trial."""
    held = _quantities(chosen)
    known = {name: row for name, row in held.items() if sum(value is not None for value in row) > 1}
    tops = [max(abs(value) for value in row if value is not None) or 1.0 for row in known.values()]
    traces = []
    for index, one in enumerate(chosen):
        line: dict[str, Any] = {"type": "scatter", "mode": "lines+markers", "name": escape(one.name)}
        line |= {"x": list(known), "line": {"dash": LINES[index % len(LINES)]}}
        mine = [row[index] for row in known.values()]
        line["y"] = [None if value is None else value / top for value, top in zip(mine, tops, strict=True)]
        traces.append(line | {"customdata": [one.address] * len(known)})
    drawn = layout("", "share of the largest")
    drawn["yaxis"] |= {"rangemode": "tozero"}
    # Long names stand below, at an angle.
    drawn["legend"] = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    said = "Objectives, budgets, parameters and costs, each as a share of the largest among these"
    return Figure("compared", said, traces if len(known) > 1 else [], drawn)


def _quantities(chosen: Sequence[Beside]) -> dict[str, list[float | None]]:
    """What each has of every quantity, by the name of its axis: what runs measure, and what is computed from a spec."""
    known = all_axes([one.run for one in chosen if one.run is not None])
    axes = [*(axis for key, axis in known.items() if key != PARAMETERS.key), PARAMETERS]
    found = {
        axis.label: [axis.value(one.trial) if _has(one, axis) else None for one in chosen] for axis in axes
    }
    for field_, (name, _) in COSTS.items():
        row = [one.costs.get(field_) for one in chosen]
        # Of layers without a state, or without a cache, there is nothing to compare.
        if any(row):
            found[name] = row
    return found
