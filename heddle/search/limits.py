"""The budgets of a search as they stand on a device, and what of them is known before anything is timed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from heddle.compose.plan import plan
from heddle.search.latency import Place
from heddle.search.latency_model.model import LatencyModel, PlaceFit
from heddle.search.latency_model.placements import costs_of_placements
from heddle.search.latency_model.stacks import stack_of
from heddle.search.placement import Budget
from heddle.search.record import BudgetInfo, Figure, Trial
from heddle.search.space import Candidate
from heddle.specs import ModelSpec, PerDevice, SpecFile
from heddle.specs.search import Budget as LatencyBudget
from heddle.specs.search import CacheBudget, PeakBudget


def budgets_on(file: SpecFile, device: str) -> tuple[BudgetInfo, ...]:
    """The budgets as they stand on `device`; a second one at the same place gets a number in its label."""
    assert file.spec.search is not None
    found, names = [], Counter[str]()
    for budget in file.spec.search.budgets:
        batch, context = 0, 0
        phase: str = budget.phase
        label = phase
        if isinstance(budget, (LatencyBudget, PeakBudget, CacheBudget)):
            batch, context = _on(budget.batch, device), _on(budget.context, device)
            if isinstance(budget, PeakBudget):
                phase = budget.of
                label = f"{phase}_{label}"
            label = f"{label}@{batch}x{context}"
        label = _numbered(label, names)
        found.append(
            BudgetInfo(
                label,
                phase.removesuffix("_ms"),
                budget.at_most,
                budget.relative_to,
                batch,
                context,
                # Settled below: it may be that of a later budget.
                "" if isinstance(budget, PeakBudget) else None,
            )
        )
    return _with_timings(found, names)


def _with_timings(budgets: Sequence[BudgetInfo], names: Counter[str]) -> tuple[BudgetInfo, ...]:
    """Those of a peak with the label of their timings: of one place beside one model there is one, whatever is read from it."""
    labels = {_timed_at(budget): budget.label for budget in budgets if budget.is_timed}
    found = []
    for budget in budgets:
        at = _timed_at(budget)
        if budget.peak_in is not None and at not in labels:
            labels[at] = _numbered(Place(budget.phase, budget.batch, budget.context).label, names)
        found.append(budget if budget.peak_in is None else replace(budget, peak_in=labels[at]))
    return tuple(found)


def _timed_at(budget: BudgetInfo) -> tuple[str, int, int, str | None]:
    return budget.phase, budget.batch, budget.context, budget.relative_to


def _numbered(label: str, names: Counter[str]) -> str:
    """`label`, with a number from the second time on."""
    names[label] += 1
    return label if names[label] == 1 else f"{label}#{names[label]}"


def _on(value: Any, device: str) -> int:
    """A number that may be given for each kind of device."""
    return int(getattr(value, device)) if isinstance(value, PerDevice) else int(value)


class Limits:
    """What is known of each spec before it is timed: costs by the plan, latencies by a model where there is one."""

    def __init__(
        self,
        budgets: Sequence[BudgetInfo],
        references: Mapping[str, Candidate],
        model: LatencyModel | None = None,
    ) -> None:
        self._budgets, self._model = tuple(budgets), model
        self._references = references
        self._costs = {
            budget.label: None
            if budget.relative_to is None
            else _cost(references[budget.relative_to].model, budget)
            for budget in budgets
            if not budget.is_measured
        }

    @property
    def has_model(self) -> bool:
        """Whether latencies are predicted."""
        return self._model is not None

    def figures(self, model: ModelSpec) -> dict[str, Figure]:
        """By the budget's label; without those that nothing is known of."""
        found = {}
        for budget in self._budgets:
            figure = self._predicted(model, budget) if budget.is_measured else self._computed(model, budget)
            if figure is not None:
                found[budget.label] = figure
        return found

    def of_placements(self, model: ModelSpec, kinds: Sequence[str]) -> tuple[Budget, ...]:
        """What the latency model predicts of each placement of these blocks in the layers of `model`, as shares of the budgets.

        Nothing of a budget that it has no fit for, or whose fit has not seen one of the blocks of `model`, or two of them meet.
        """
        if self._model is None:
            return ()
        stack, found = stack_of(model), list[Budget]()
        for budget in self._budgets:
            fit = self._fit(budget) if budget.is_timed else None
            told = None if fit is None else costs_of_placements(fit, stack, kinds)
            if fit is None or told is None:
                continue
            cost, pair, constant = told
            limit = budget.at_most * (1.0 if budget.relative_to is None else fit.reference_ms)
            found.append(
                Budget(budget.label, cost / limit, 1.0, pair=pair / limit, constant=constant / limit)
            )
        return tuple(found)

    def rule_out(self, figures: Mapping[str, Figure]) -> bool:
        """Whether a budget is broken for certain: by a cost, or by a prediction less its margin."""
        told = ((budget, figures[budget.label]) for budget in self._budgets if budget.label in figures)
        return any(one.least is not None and one.least > budget.at_most for budget, one in told)

    def all_constraints(self, trial: Trial, trials: Mapping[int, Trial]) -> dict[str, float]:
        """The constraints of `trial` with one for every budget, as some samplers ask for.

        Of a budget that nothing is known of it is the mean over the trials before, which tells a sampler nothing new; without
        any, the edge of the budget.
        """
        found = {}
        for budget in self._budgets:
            if budget.label in trial.constraints:
                found[budget.label] = trial.constraints[budget.label]
                continue
            before = (one.constraints for number, one in trials.items() if 0 <= number < trial.number)
            known = [one[budget.label] for one in before if budget.label in one]
            found[budget.label] = fmean(known) if known else 0.0
        return found

    def _computed(self, model: ModelSpec, budget: BudgetInfo) -> Figure:
        return Figure(_cost(model, budget), 0.0, self._costs[budget.label], "computed")

    def _predicted(self, model: ModelSpec, budget: BudgetInfo) -> Figure | None:
        fit = self._fit(budget) if budget.is_timed else None
        told = None if fit is None else fit.predict(stack_of(model))
        if fit is None or told is None:
            return None
        reference = None if budget.relative_to is None else fit.reference_ms
        return Figure(told.ms, told.margin_ms, reference, "predicted")

    def _fit(self, budget: BudgetInfo) -> PlaceFit | None:
        """The fit of the latency model at a budget's place; None without."""
        if self._model is None:
            return None
        beside = None if budget.relative_to is None else self._references[budget.relative_to].hash
        return self._model.at(Place(budget.phase, budget.batch, budget.context), beside)


def _cost(model: ModelSpec, budget: BudgetInfo) -> float:
    """Parameters, or the bytes of caches and states in bfloat16, on whatever device."""
    planned = plan(model)
    if budget.phase == "parameters":
        return float(planned.parameters)
    cost = planned.cost(budget.context, budget.batch)
    return cost["cache_bytes"] + cost["state_bytes"]
