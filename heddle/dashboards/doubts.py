"""What the outcome of a run leaves open: budgets that nothing keeps, tasks that order nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from heddle.search.record import Run


def closest_text(run: Run) -> str:
    """What the budgets would have to allow for the trial that missed them by least: ": LABEL to 0.77 for trial 3", or nothing."""
    least = next((run.trial(number) for number in run.least_violating), None)
    over = {} if least is None else {label: one for label, one in least.constraints.items() if one > 0}
    wanted = [
        f"{budget.label} to {_upwards(budget.at_most * (1 + over[budget.label]))}"
        for budget in run.budgets
        if budget.label in over
    ]
    return f": {', '.join(wanted)} for trial {least.number}" if least and wanted else ""


def _upwards(value: float) -> str:
    """With three digits behind the point at most, never below `value`."""
    return f"{math.ceil(value * 1000) / 1000:.3f}".rstrip("0").rstrip(".")


def at_chance(run: Run) -> list[str]:
    """The tasks at which no spec that was trained to its end is above chance."""
    trained = [trial for trial in run.trials if trial.state == "complete"]
    return [
        info.name
        for info in run.tasks
        if trained
        and all(one.scores[info.name].normalised <= 0 for one in trained if info.name in one.scores)
    ]
