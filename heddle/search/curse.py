"""How far predictions of latency were off in a run, and whether more so for what was selected: the winner's curse.

Of many specs, those are selected that seem good; where a prediction is too low, a spec seems better than it is. So the errors
of the selected ones are set beside those of the others. Needs only the standard library.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heddle.search.record import Run
    from heddle.search.results import BudgetInfo, Figure, Latency, Trial


@dataclass(frozen=True, slots=True)
class Curse:
    """Means of measured / predicted - 1 at one budget: of the front by its second timing, and of all other timed specs.

    `held_out` is the same of the stacks that the model was checked on, which were drawn at random. None where there are none.
    """

    label: str
    selected: float | None
    n_selected: int
    others: float | None
    n_others: int
    held_out: float | None


@dataclass(frozen=True, slots=True)
class Compared:
    """A member of the front: what was predicted for it, and what its second timing gave, both as the budget counts."""

    number: int
    label: str
    predicted: Figure
    measured: float
    error: float


def compared(run: Run) -> list[Compared]:
    """Predicted beside measured again, for every member of the front and every budget with a prediction."""
    found = []
    for trial, budget in ((trial, budget) for trial in run.front_trials for budget in run.budgets):
        figure, again = predicted(trial, budget), trial.remeasured.get(budget.label)
        value = None if again is None else counted(again, budget)
        if figure is not None and value is not None:
            found.append(Compared(trial.number, budget.label, figure, value, value / figure.limited - 1))
    return found


def curses(run: Run) -> list[Curse]:
    """One for each budget that something was predicted for."""
    found, selected = [], set(run.front)
    for budget in run.budgets:
        if not any(predicted(trial, budget) for trial in run.trials):
            continue
        mine = [one.error for one in compared(run) if one.label == budget.label]
        others = _errors((trial for trial in run.trials if trial.number not in selected), budget)
        fit = next((one for one in run.meta.get("latency_model", []) if one["label"] == budget.label), None)
        held_out = None if fit is None else fit["held_out"]["measured_over_predicted"]
        found.append(Curse(budget.label, _mean(mine), len(mine), _mean(others), len(others), held_out))
    return found


def summary(run: Run) -> dict[str, Any] | None:
    """The model's held-out errors and what became of its predictions, as plain data; None for a run without a model."""
    fits = run.meta.get("latency_model")
    if fits is None:
        return None
    never = sum(not trial.latency and any(map(_is_predicted, trial.figures.values())) for trial in run.trials)
    return {"fits": fits, "never_timed": never, "curse": [asdict(one) for one in curses(run)]}


def predicted(trial: Trial, budget: BudgetInfo) -> Figure | None:
    """What a model said of the trial at that budget; None where it said nothing."""
    figure = trial.figures.get(budget.label)
    return figure if figure is not None and _is_predicted(figure) else None


def counted(latency: Latency, budget: BudgetInfo) -> float | None:
    """What the budget limits: milliseconds, or the ratio."""
    return budget.limited(latency)


def _is_predicted(figure: Figure) -> bool:
    return figure.source == "predicted"


def _errors(trials: Iterable[Trial], budget: BudgetInfo) -> list[float]:
    found = []
    for trial in trials:
        figure, timed = predicted(trial, budget), trial.latency.get(budget.label)
        value = None if timed is None else counted(timed, budget)
        if figure is not None and value is not None:
            found.append(value / figure.limited - 1)
    return found


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None
