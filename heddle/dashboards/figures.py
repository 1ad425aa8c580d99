"""The plots of a run as plotly figures in plain data; `report.js` draws them in the colours of the page.

Plotly reads some HTML in texts, so that every name of a run is escaped here as well.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from heddle.dashboards import data, spent, words
from heddle.dashboards.axes import Axis, axes
from heddle.search.record import Run, Trial

# Names of CSS variables; report.js puts in the colours of the page.
TRAINED, FRONT, WINNER, REFERENCE, BROKEN, LIMIT = ("--dim", "--accent", "--good", "--ink", "--bad", "--bad")
AGAIN, OVER, LEFT = "--soft", "--over", "--left"

# What has no score stands below the plot, each kind in a row of its own: its name, mark and colour.
LOST = {
    "infeasible": (words.STATE_WORDS["infeasible"], "x-thin-open", OVER),
    "pruned": (words.STATE_WORDS["pruned"], "line-ns-open", LEFT),
    "failed": (words.STATE_WORDS["failed"], "triangle-down-open", BROKEN),
}
# The heights of a row and of the gap above the rows, as shares of the plot.
ROW, GAP = 0.05, 0.05
SCORED = {"symbol": "circle-open", "size": 8, "color": TRAINED, "line": {"width": 1.5}}
# A cloud of more trials is thinned: of those that would lie on one another, one is drawn.
CLOUD, IN_A_ROW, CELLS = 600, 72, (36, 24)
# Bars of more trials than these hide the points.
BARS = 40
# So few trials have a tick each.
FEW = 10
# Lines are told apart by their dashes as well as by their colours.
LINES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


@dataclass(frozen=True, slots=True)
class Figure:
    """One plot: a name for a file, a caption for the page, and plotly's data and layout."""

    name: str
    caption: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]

    def plain(self) -> dict[str, Any]:
        """What the script gets. `asdict` would copy every point."""
        return {"name": self.name, "caption": self.caption, "data": self.data, "layout": self.layout}

    @property
    def is_empty(self) -> bool:
        return not any(trace.get("x") or trace.get("z") for trace in self.data)


def figures(run: Run) -> list[Figure]:
    """The plots worth drawing for this run: score against each budget, score against score, best so far."""
    known = axes(run)
    tasks = [axis for axis in known if axis.task is not None]
    budgets = [axis for axis in known if axis.budget is not None]
    found = [pair(run, budget, task) for task in tasks for budget in budgets]
    found += [pair(run, a, b) for a, b in combinations(tasks, 2)]
    found += [progress(run), failures(run)]
    return [figure for figure in found if not figure.is_empty]


def pair(run: Run, x: Axis, y: Axis) -> Figure:
    """Every trial at two quantities: trained, front, winner, reference, timed again; and what was lost at the edge."""
    traces = _clouds(run, x, y)
    drawn = layout(x.label, y.label)
    untold = 0
    if x.task is None:
        places = {trial.number: x.value(trial) for trial in run.trials if trial.state in LOST}
        _add_rugs(traces, drawn, run, {number: at for number, at in places.items() if at is not None})
        untold = sum(at is None for at in places.values())
    draw_limit(drawn, "x", x.limit)
    draw_limit(drawn, "y", y.limit)
    caption = f"{y.text} against {x.text}. Bars are 95 % intervals (scores: 1.96 standard errors)."
    caption += f" Nothing was measured of {untold} more." if untold else ""
    return Figure(slug(f"{y.key} against {x.key}"), caption, traces, drawn)


def draw_limit(layout: dict[str, Any], side: str, limit: float | None) -> None:
    """The budget as a dashed line across the plot; nothing where there is none."""
    if limit is None:
        return
    other = "y" if side == "x" else "x"
    ends = {f"{side}0": limit, f"{side}1": limit, f"{other}0": 0, f"{other}1": 1}
    line = {
        "type": "line",
        f"{other}ref": "paper",
        "line": {"color": LIMIT, "dash": "dash", "width": 1.5},
        **ends,
    }
    note = {
        side: limit,
        other: 1,
        f"{other}ref": "paper",
        f"{other}anchor": "bottom",
        "showarrow": False,
    }
    if side == "y":
        note["xanchor"], note["yanchor"] = "right", "bottom"
    layout.setdefault("shapes", []).append(line)
    layout.setdefault("annotations", []).append(note | {"text": f"budget {limit:g}"})


def progress(run: Run, over: str = "trial") -> Figure:
    """The best so far over trials, over minutes, or over the seconds of GPUs or workers."""
    where = spent.positions(run, over)
    scored = [trial for trial in run.trials if trial.quality is not None]
    steps = [(where[number], value) for number, value in data.best_so_far(run)]
    if steps:
        steps.append((max(where.values()), steps[-1][1]))
    best: dict[str, Any] = {"type": "scatter", "mode": "lines", "name": "best so far"}
    best |= {"x": [x for x, _ in steps], "y": [y for _, y in steps], "hoverinfo": "skip"}
    seen = thinned([(where[t.number], float(t.quality or 0), t) for t in scored])
    trained = points(_trained(run), seen, run, [where[t.number] for t in seen], [t.quality for t in seen])
    traces = [
        best | {"line": {"shape": "hv", "color": FRONT, "width": 2}},
        trained | {"marker": SCORED},
    ]
    drawn = layout(spent.overs(run)[over], "mean normalised score")
    if over == "trial" and len(run.trials) <= FEW:
        # There is no trial 0.5.
        drawn["xaxis"] |= {"dtick": 1}
    _add_rugs(traces, drawn, run, where)
    caption = "Best mean normalised score so far (0 is chance, 1 the best possible)"
    return Figure(slug(f"best so far by {over}"), caption, traces, drawn)


def failures(run: Run) -> Figure:
    """How many trials failed for what."""
    counted = data.failures(run)
    bars: dict[str, Any] = {"type": "bar", "orientation": "h", "marker": {"color": BROKEN}, "name": "failed"}
    names = [escape(name) for name in counted]
    bars |= {"y": names, "x": list(counted.values()), "hovertemplate": "%{y}: %{x}<extra></extra>"}
    drawn = layout("trials", "error code") | {"showlegend": False}
    drawn["xaxis"] |= {"rangemode": "tozero", "tickformat": "d"}
    return Figure("failures", "Trials that failed, by class", [bars], drawn)


def progress_of(runs: Sequence[tuple[str, Run]]) -> Figure:
    """The best so far of several runs over the time each has spent."""
    traces = []
    for index, (key, run) in enumerate(runs):
        where, steps = spent.positions(run, "time"), data.best_so_far(run)
        if steps:
            steps.append((max(where, key=lambda number: where[number]), steps[-1][1]))
            line = {"shape": "hv", "width": 2, "dash": LINES[index % len(LINES)]}
            trace: dict[str, Any] = {"type": "scatter", "mode": "lines", "name": escape(key), "line": line}
            traces.append(trace | {"x": [where[number] for number, _ in steps], "y": [y for _, y in steps]})
    said = "Best mean normalised score so far, each run over its own time"
    return Figure("runs", said, traces, layout(spent.MINUTES, "mean normalised score"))


def twice(run: Run) -> list[Figure]:
    """The first timing of the front's members against the second, one plot a measurement."""
    labels = dict.fromkeys(label for trial in run.front_trials for label in trial.remeasured)
    found = []
    for label in labels:
        members = [t for t in run.front_trials if label in t.latency and label in t.remeasured]
        pairs = [(trial.latency[label], trial.remeasured[label]) for trial in members]
        x, y = [one.median_ms for one, _ in pairs], [again.median_ms for _, again in pairs]
        trace = points("front", members, run, x, y) | {"marker": {"size": 9, "color": FRONT}}
        for side, rows in (
            ("error_x", [one for one, _ in pairs]),
            ("error_y", [again for _, again in pairs]),
        ):
            above, below = [r.high_ms - r.median_ms for r in rows], [r.median_ms - r.low_ms for r in rows]
            trace[side] = {
                "type": "data",
                "symmetric": False,
                "array": above,
                "arrayminus": below,
                "width": 0,
            }
        said = f"{label}: at the end against in the search; bars are 95 % intervals"
        drawn = layout("ms in the search", "ms at the end")
        found.append(Figure(slug(f"twice {label}"), said, [equal([*x, *y]), trace] if members else [], drawn))
    return found


def equal(values: Sequence[float]) -> dict[str, Any]:
    """The line on which two quantities are equal, as far as `values` reach."""
    ends = [min(values, default=0.0), max(values, default=1.0)]
    line: dict[str, Any] = {"type": "scatter", "mode": "lines", "name": "equal", "hoverinfo": "skip"}
    return line | {"x": ends, "y": ends, "line": {"color": TRAINED, "dash": "dash", "width": 1}}


def _add_rugs(
    traces: list[dict[str, Any]], drawn: dict[str, Any], run: Run, where: Mapping[int, float]
) -> None:
    """Put trials without a score below a plot, each kind as a row of marks; plotly cannot draw an axis that nothing stands on,
    so that without such trials there is no band."""
    rows = 0
    for state, (name, symbol, colour) in LOST.items():
        lost = [(where[t.number], 0.0, t) for t in run.trials if t.state == state and t.number in where]
        if not lost:
            continue
        kept = thinned(lost, IN_A_ROW)
        trace = points(name, kept, run, [where[trial.number] for trial in kept], [float(-rows)] * len(kept))
        marks = {"symbol": symbol, "size": 9, "color": colour, "line": {"width": 2, "color": colour}}
        traces.append(trace | {"yaxis": "y2", "marker": marks})
        rows += 1
    if not rows:
        return
    drawn["xaxis"] |= {"anchor": "y2"}
    drawn["yaxis"] |= {"domain": [rows * ROW + GAP, 1]}
    drawn["yaxis2"] = {
        "domain": [0, rows * ROW],
        "range": [0.5 - rows, 0.5],
        "showticklabels": False,
        "showgrid": False,
    }


def _trained(run: Run) -> str:
    """What a trial with scores is called: of a search with budgets it kept them."""
    return "feasible" if run.budgets else words.STATE_WORDS["complete"]


def _clouds(run: Run, x: Axis, y: Axis) -> list[dict[str, Any]]:
    """Trained specs, the front, the winner and the reference, each a trace of its own; and the second timings."""
    seen = ((trial, x.value(trial), y.value(trial)) for trial in run.trials if trial.state == "complete")
    done = [(a, b, trial) for trial, a, b in seen if a is not None and b is not None]
    members = {*run.front, run.best}
    winner = [trial for *_, trial in done if trial.number == run.best]
    placed = sorted((a, n, t) for n, (a, _, t) in enumerate(done) if t.number in members - {run.best})
    front = [trial for *_, trial in placed]
    known = run.reference is not None and None not in (x.value(run.reference), y.value(run.reference))
    reference = [run.reference] if run.reference is not None and known else []
    drawn = thinned([one for one in done if one[2].number not in members])
    looks: list[tuple[str, Sequence[Trial], dict[str, Any]]] = [
        (_trained(run), drawn, SCORED),
        ("Pareto front", front, {"symbol": "circle", "size": 9, "color": FRONT}),
        ("winner", winner, {"symbol": "star", "size": 15, "color": WINNER}),
        ("reference", reference, {"symbol": "diamond", "size": 10, "color": REFERENCE}),
    ]
    traces = []
    for name, trials, look in looks:
        trace = points(name, trials, run, [x.value(t) for t in trials], [y.value(t) for t in trials])
        trace |= {"marker": look} | (_bars(trials, x, y, look["color"]) if len(trials) <= BARS else {})
        traces.append(trace)
    return [*traces, *_again(run, [*front, *winner], x, y)]


def _again(run: Run, trials: Sequence[Trial], x: Axis, y: Axis) -> list[dict[str, Any]]:
    """The members of the front where their second timing puts them."""
    twice = [t for t in trials if x.again(t) is not None or y.again(t) is not None]
    if not twice:
        return []
    xs = [x.value(t) if x.again(t) is None else x.again(t) for t in twice]
    ys = [y.value(t) if y.again(t) is None else y.again(t) for t in twice]
    look = {"symbol": "diamond-open", "size": 10, "color": AGAIN, "line": {"width": 1.5}}
    return [points("timed again", twice, run, xs, ys) | {"marker": look}]


def _bars(trials: Sequence[Trial], x: Axis, y: Axis, colour: str) -> dict[str, Any]:
    """Error bars in both directions, where a quantity has an interval."""
    found = {}
    for side, axis in (("error_x", x), ("error_y", y)):
        below, above = zip(*(axis.bars(t) for t in trials), strict=True) if trials else ((), ())
        if any(below) or any(above):
            shape = {"type": "data", "symmetric": False, "array": list(above), "arrayminus": list(below)}
            found[side] = shape | {"color": colour, "thickness": 1, "width": 0}
    return found


def thinned(placed: Sequence[tuple[float, float, Trial]], most: int = CLOUD) -> list[Trial]:
    """Of more than `most` trials those that are seen: one in each cell of a fine grid."""
    if len(placed) <= most:
        return [trial for *_, trial in placed]
    columns = [[x for x, _, _ in placed], [y for _, y, _ in placed]]
    lows = [min(column) for column in columns]
    spans = [max(column) - low or 1.0 for column, low in zip(columns, lows, strict=True)]
    cells: dict[tuple[int, int], Trial] = {}
    for x, y, trial in placed:
        across, up = (
            int(count * (value - low) / span)
            for count, value, low, span in zip(CELLS, (x, y), lows, spans, strict=True)
        )
        cells.setdefault((across, up), trial)
    return list(cells.values())


def points(
    name: str, trials: Sequence[Trial], run: Run, x: Sequence[float | None], y: Sequence[float | None]
) -> dict[str, Any]:
    """Trials as points that say what was measured, and lead to their pages."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": list(x),
        "y": list(y),
        "text": [_hover(trial, run) for trial in trials],
        # A click on a point leads to its trial.
        "customdata": [trial.number for trial in trials],
        "hovertemplate": "%{text}<extra></extra>",
    }


def _hover(trial: Trial, run: Run) -> str:
    lines = [f"{data.name_of(trial, run)} ({words.STATE_WORDS.get(trial.state, trial.state)})"]
    lines += [f"{score.task} {words.score_text(score)}" for score in trial.scores.values()]
    lines += [f"{latency.phase} {words.latency_text(latency)}" for latency in trial.latency.values()]
    lines.append(words.params_text(trial))
    return "<br>".join(escape(line) for line in lines)


def layout(x: str, y: str) -> dict[str, Any]:
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}


def escape(text: str) -> str:
    return html.escape(text, quote=False)


def slug(text: str) -> str:
    """A name for a file, of letters, digits and hyphens alone."""
    return "-".join("".join(c if c.isascii() and c.isalnum() else " " for c in text).split()).lower()
