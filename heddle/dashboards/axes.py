"""What trials are plotted against: each task, each budget, the parameters; with units, intervals and limits."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass

from heddle.dashboards import words
from heddle.search.record import BudgetInfo, Run, TaskInfo, Trial

# Standard errors on each side of a score: a 95 % interval.
Z = 1.96


@dataclass(frozen=True, slots=True)
class Axis:
    """One quantity of a trial. `key` names it in a link, `label` stands at the axis, `text` in a caption."""

    key: str
    label: str
    text: str
    task: TaskInfo | None = None
    budget: BudgetInfo | None = None

    @property
    def plain(self) -> str:
        """The name alone, for a list to choose from."""
        if self.task is not None:
            return self.task.name
        return "parameters" if self.budget is None else words.budget_name(self.budget)

    @property
    def limit(self) -> float | None:
        return None if self.budget is None else self.budget.at_most

    def value(self, trial: Trial) -> float | None:
        """What the trial measured; None where it has nothing."""
        if self.task is not None:
            score = trial.scores.get(self.task.name)
            return None if score is None else score.value
        return float(trial.parameters) if self.budget is None else words.budget_value(trial, self.budget)

    def again(self, trial: Trial) -> float | None:
        """What the second timing of the trial gave; scores and parameters have only one."""
        timed = None if self.budget is None else trial.remeasured.get(self.budget.timing)
        return None if timed is None or self.budget is None else self.budget.limited(timed)

    def bars(self, trial: Trial) -> tuple[float, float]:
        """How far the 95 % interval reaches below and above the value; zeros where there is none."""
        if self.task is not None:
            score = trial.scores.get(self.task.name)
            return (0.0, 0.0) if score is None else (Z * score.se, Z * score.se)
        timed = None if self.budget is None else trial.latency.get(self.budget.label)
        # A peak of bytes has no interval.
        if timed is None or self.budget is None or not self.budget.is_timed:
            return 0.0, 0.0
        if self.budget.relative_to is None:
            return timed.median_ms - timed.low_ms, timed.high_ms - timed.median_ms
        if timed.ratio is None or timed.ratio_low is None or timed.ratio_high is None:
            return 0.0, 0.0
        return timed.ratio - timed.ratio_low, timed.ratio_high - timed.ratio


PARAMETERS = Axis("parameters", "parameters", "parameters (fewer are cheaper)")


def axes(run: Run) -> list[Axis]:
    """The tasks, the budgets, and the parameters."""
    found = [
        Axis(f"task:{task.name}", axis_label(task), words.metric_text(task), task=task) for task in run.tasks
    ]
    for budget in run.budgets:
        name = html.escape(words.budget_name(budget), quote=False)
        found.append(Axis(f"budget:{budget.label}", name, words.budget_text(budget), budget=budget))
    return [*found, PARAMETERS]


def all_axes(runs: Iterable[Run]) -> dict[str, Axis]:
    """The axes of some runs by their keys, those of tasks first; of two that share a key the first."""
    found: dict[str, Axis] = {}
    for run in runs:
        for axis in axes(run):
            found.setdefault(axis.key, axis)
    order = ("task", "budget", "parameters")
    return dict(sorted(found.items(), key=lambda item: order.index(item[0].partition(":")[0])))


def axis_label(task: TaskInfo) -> str:
    """The task with its unit and an arrow to where it is better, escaped for plotly."""
    unit = {"accuracy": "accuracy", "bits_per_byte": "bits per byte"}.get(task.metric, task.metric)
    return html.escape(f"{task.name} {unit} {'↑' if task.higher_is_better else '↓'}", quote=False)
