"""Which trials are worth keeping: the Pareto front over all tasks, the best of it, and the nearest misses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from heddle.search.record import BudgetInfo, Figure, Latency, TaskInfo, Trial


def front(trials: Iterable[Trial], tasks: Sequence[TaskInfo]) -> tuple[Trial, ...]:
    """Feasible trials that no other feasible trial beats in one task without losing in another.

    Of trials with the same spec the first one stands for all.
    """
    by_spec: dict[str, Trial] = {}
    for trial in sorted(trials, key=lambda trial: trial.number):
        if trial.feasible and all(task.name in trial.scores for task in tasks):
            by_spec.setdefault(trial.hash, trial)
    candidates = list(by_spec.values())
    values = {trial.number: [_up(trial, task) for task in tasks] for trial in candidates}
    return tuple(
        trial
        for trial in candidates
        if not any(_dominates(values[other.number], values[trial.number]) for other in candidates)
    )


def best(front_trials: Iterable[Trial]) -> Trial | None:
    """The member with the highest mean normalised score; of equals the faster, then the earlier one."""
    return max(
        front_trials, key=lambda trial: (trial.quality, -_slowness(trial), -trial.number), default=None
    )


def least_violating(trials: Iterable[Trial], most: int = 5) -> tuple[Trial, ...]:
    """Measured trials over a budget, the smallest violation first, each spec once."""
    over = sorted((trial for trial in trials if trial.violation > 0), key=lambda t: (t.violation, t.number))
    by_spec: dict[str, Trial] = {}
    for trial in over:
        by_spec.setdefault(trial.hash, trial)
    return tuple(by_spec.values())[:most]


def violations(
    latency: Mapping[str, Latency],
    budgets: Iterable[BudgetInfo],
    figures: Mapping[str, Figure] = MappingProxyType({}),
) -> dict[str, float]:
    """How far each budgeted figure lies over its limit, as a share of the limit; at most 0 keeps the
    budget.

    A measurement goes before a figure of `figures`; a budget with neither is left out.
    """
    found = {}
    for budget in budgets:
        row, told = latency.get(budget.timing), figures.get(budget.label)
        if row is not None:
            value = budget.limited(row)
            assert value is not None, f"{budget.label} was not measured, or not beside {budget.relative_to}"
        elif told is not None:
            value = told.limited
        else:
            continue
        found[budget.label] = value / budget.at_most - 1.0
    return found


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    at_least_equal = all(a >= b for a, b in zip(one, other, strict=True))
    return at_least_equal and any(a > b for a, b in zip(one, other, strict=True))


def _up(trial: Trial, task: TaskInfo) -> float:
    value = trial.scores[task.name].value
    return value if task.higher_is_better else -value


def _slowness(trial: Trial) -> float:
    return sum(row.ratio or row.median_ms for row in trial.latency.values())
