"""Plots of several runs, and of trials that may be of several: their fronts, and a few trials in all quantities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heddle.dashboards import words
from heddle.dashboards.axes import Axis, all_axes
from heddle.dashboards.figures import LINES, Figure, draw_limit, escape, layout, slug
from heddle.search.record import Run, Trial

# Runs are told apart by shape as well as by colour.
SHAPES = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down")


@dataclass(frozen=True, slots=True)
class Beside:
    """A trial among trials of other runs: what it is called here, its page, and its name in a link (`run:number`)."""

    name: str
    run: Run
    trial: Trial
    address: str
    place: str


def fronts(members: Mapping[str, Sequence[Beside]], x: Axis, y: Axis) -> Figure:
    """The front of each run at two quantities; a run that has not both is left out."""
    traces, limits = [], set()
    for index, (key, held) in enumerate(members.items()):
        placed = [(x.value(one.trial), y.value(one.trial), one) for one in held if _has(one.run, x, y)]
        points = sorted((a, b, one.place, one) for a, b, one in placed if a is not None and b is not None)
        if not points:
            continue
        limits |= {axis.limit for axis in all_axes([held[0].run]).values() if axis.key == x.key}
        winners = [one.trial.number == one.run.best for *_, one in points]
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


def _has(run: Run, *wanted: Axis) -> bool:
    known = all_axes([run])
    return all(axis.key in known and known[axis.key].label == axis.label for axis in wanted)


def _hover(one: Beside) -> str:
    lines = [one.name, *(f"{score.task} {words.score_text(score)}" for score in one.trial.scores.values())]
    lines += [f"{seen.label} {words.latency_text(seen)}" for seen in one.trial.latency.values()]
    return "<br>".join(map(escape, [*lines, words.short_layers(one.trial.layers)]))


def compared(chosen: Sequence[Beside]) -> Figure:
    """Each quantity that two or more have as a share of the largest among them, a line a trial."""
    known: list[tuple[Axis, list[float | None]]] = []
    for axis in all_axes([one.run for one in chosen]).values():
        values = [axis.value(one.trial) if _has(one.run, axis) else None for one in chosen]
        if sum(value is not None for value in values) > 1:
            known.append((axis, values))
    tops = [max(abs(value) for value in values if value is not None) or 1.0 for _, values in known]
    traces = []
    for index, one in enumerate(chosen):
        line: dict[str, Any] = {"type": "scatter", "mode": "lines+markers", "name": escape(one.name)}
        line |= {"x": [axis.label for axis, _ in known], "line": {"dash": LINES[index % len(LINES)]}}
        mine = [values[index] for _, values in known]
        line["y"] = [None if value is None else value / top for value, top in zip(mine, tops, strict=True)]
        traces.append(line | {"customdata": [one.address] * len(known)})
    drawn = layout("", "share of the largest")
    drawn["yaxis"] |= {"rangemode": "tozero"}
    said = "Objectives, budgets and parameters, each as a share of the largest among these trials"
    return Figure("compared", said, traces if len(known) > 1 else [], drawn)
