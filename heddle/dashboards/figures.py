"""The plots of a report as plotly figures in plain data; `report.js` draws them in the colours of the page.

Plotly reads some HTML in texts, so that every name of a run is escaped here as well.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from heddle.dashboards import data, words
from heddle.search.record import BudgetInfo, Run, TaskInfo, Trial

# Names of CSS variables; report.js puts in the colours of the page.
TRAINED, FRONT, WINNER, REFERENCE, BROKEN, LIMIT = ("--dim", "--accent", "--good", "--ink", "--bad", "--bad")

LOST = "over budget or failed"

Value = Callable[[Trial], float | None]


@dataclass(frozen=True, slots=True)
class Figure:
    """One plot: a caption for the page and plotly's data and layout."""

    caption: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]


def figures(run: Run) -> list[Figure]:
    """The plots worth drawing for this run: score against each budget, score against score, best so far."""
    found = [_against_budget(run, budget, task) for task in run.tasks for budget in run.budgets]
    found += [_against_task(run, a, b) for i, a in enumerate(run.tasks) for b in run.tasks[i + 1 :]]
    found.append(_progress(run))
    return [figure for figure in found if any(trace.get("x") for trace in figure.data)]


def _against_budget(run: Run, budget: BudgetInfo, task: TaskInfo) -> Figure:
    def cost(trial: Trial) -> float | None:
        return words.budget_value(trial, budget)

    refused = [trial for trial in run.trials if trial.state != "complete" and cost(trial) is not None]
    traces = _clouds(run, cost, lambda trial: _score(trial, task))
    traces.append(_rug(run, refused, [cost(trial) for trial in refused]))
    layout = _with_rug(_layout(_escape(words.budget_name(budget)), _axis(task)))
    limit = {"type": "line", "x0": budget.at_most, "x1": budget.at_most, "y0": 0, "y1": 1, "yref": "paper"}
    note = {"x": budget.at_most, "y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False}
    layout["shapes"] = [limit | {"line": {"color": LIMIT, "dash": "dash", "width": 1.5}}]
    layout["annotations"] = [note | {"text": f"budget {budget.at_most:g}"}]
    return Figure(f"{words.metric_text(task)} against {words.budget_text(budget)}", traces, layout)


def _against_task(run: Run, a: TaskInfo, b: TaskInfo) -> Figure:
    traces = _clouds(run, lambda trial: _score(trial, a), lambda trial: _score(trial, b))
    return Figure(
        f"{words.metric_text(b)} against {words.metric_text(a)}", traces, _layout(_axis(a), _axis(b))
    )


def _progress(run: Run) -> Figure:
    scored = [trial for trial in run.trials if trial.quality is not None]
    lost = [trial for trial in run.trials if trial.state in ("infeasible", "failed")]
    steps = data.best_so_far(run)
    if steps:
        steps.append((run.trials[-1].number, steps[-1][1]))
    best: dict[str, Any] = {"type": "scatter", "mode": "lines", "name": "best so far"}
    best |= {"x": [number for number, _ in steps], "y": [value for _, value in steps]}
    trained = _trace("trained", scored, run, [t.number for t in scored], [t.quality for t in scored])
    traces = [
        best | {"line": {"shape": "hv", "color": FRONT, "width": 2}},
        trained | {"marker": {"size": 7, "color": TRAINED}},
        _rug(run, lost, [trial.number for trial in lost]),
    ]
    caption = "Best mean normalised score so far (0 is chance, 1 the best possible)"
    return Figure(caption, traces, _with_rug(_layout("trial", "mean normalised score")))


def _rug(run: Run, trials: Sequence[Trial], x: Sequence[float | None]) -> dict[str, Any]:
    """Trials without a score as a row of crosses below the plot, in a band of its own."""
    crosses = {"symbol": "x-thin-open", "size": 9, "color": BROKEN, "line": {"width": 2}}
    return _trace(LOST, trials, run, x, [0.0] * len(trials)) | {"yaxis": "y2", "marker": crosses}


def _with_rug(layout: dict[str, Any]) -> dict[str, Any]:
    layout["xaxis"] |= {"anchor": "y2"}
    layout["yaxis"] |= {"domain": [0.14, 1]}
    layout["yaxis2"] = {"domain": [0, 0.08], "range": [-1, 1], "showticklabels": False, "showgrid": False}
    return layout


def _clouds(run: Run, x: Value, y: Value) -> list[dict[str, Any]]:
    """Trained specs, the front joined by a line, the winner and the reference, each a trace of its own."""
    done = [
        trial
        for trial in run.trials
        if trial.state == "complete" and x(trial) is not None and y(trial) is not None
    ]
    winner = [trial for trial in done if trial.number == run.best]
    front = sorted(
        (t for t in done if t.number in run.front and t.number != run.best), key=lambda t: x(t) or 0.0
    )
    rest = [trial for trial in done if trial.number not in run.front and trial.number != run.best]
    reference = (
        [run.reference]
        if run.reference is not None and None not in (x(run.reference), y(run.reference))
        else []
    )
    looks: list[tuple[str, Sequence[Trial], dict[str, Any]]] = [
        ("trained", rest, {"symbol": "circle-open", "size": 8, "color": TRAINED, "line": {"width": 1.5}}),
        ("Pareto front", front, {"symbol": "circle", "size": 9, "color": FRONT}),
        ("winner", winner, {"symbol": "star", "size": 15, "color": WINNER}),
        ("reference", reference, {"symbol": "diamond", "size": 10, "color": REFERENCE}),
    ]
    return [
        _trace(name, trials, run, [x(t) for t in trials], [y(t) for t in trials]) | {"marker": look}
        for name, trials, look in looks
    ]


def _trace(
    name: str, trials: Sequence[Trial], run: Run, x: Sequence[float | None], y: Sequence[float | None]
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": list(x),
        "y": list(y),
        "text": [_hover(trial, run) for trial in trials],
        "hovertemplate": "%{text}<extra></extra>",
    }


def _hover(trial: Trial, run: Run) -> str:
    lines = [f"{data.name_of(trial, run)} ({words.STATE_WORDS.get(trial.state, trial.state)})"]
    lines += [f"{score.task} {words.score_text(score)}" for score in trial.scores.values()]
    lines += [f"{latency.phase} {words.latency_text(latency)}" for latency in trial.latency.values()]
    lines.append(words.params_text(trial))
    return "<br>".join(_escape(line) for line in lines)


def _score(trial: Trial, task: TaskInfo) -> float | None:
    score = trial.scores.get(task.name)
    return None if score is None else score.value


def _axis(task: TaskInfo) -> str:
    unit = {"accuracy": "accuracy", "bits_per_byte": "bits per byte"}.get(task.metric, task.metric)
    return _escape(f"{task.name} {unit} {'↑' if task.higher_is_better else '↓'}")


def _layout(x: str, y: str) -> dict[str, Any]:
    return {"xaxis": {"title": {"text": x}}, "yaxis": {"title": {"text": y}}}


def _escape(text: str) -> str:
    return html.escape(text, quote=False)
