"""What a run's own timings say about the latency of a member of its front: the linear model that placements are proposed by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from heddle import specs
from heddle.errors import HeddleError

if TYPE_CHECKING:
    from heddle.search.record import Run, Trial
    from heddle.specs import Placement


def expected_latencies(run: Run) -> dict[int, dict[str, float]]:
    """By trial of the front and label of a latency budget: what is expected from the timings of all other specs of the run.

    In what the budget limits: milliseconds, or the ratio. Empty for a run that places no layers; nothing is said of a budget
    that fewer than four other specs were timed at.
    """
    try:
        placement = specs.loads(str(run.meta.get("spec", ""))).space.placement
    except HeddleError:
        placement = None
    limits = {budget.label: budget.at_most for budget in run.budgets if budget.is_timed}
    if placement is None or not limits:
        return {}
    known = [trial for trial in run.trials if trial.latency and set(trial.layers) <= set(placement.of)]
    found = {}
    for trial in run.front_trials:
        shares = _shares(trial, [one for one in known if one.hash != trial.hash], placement, limits)
        if shares:
            found[trial.number] = {label: share * limits[label] for label, share in shares.items()}
    return found


def _shares(
    trial: Trial, others: list[Trial], placement: Placement, limits: dict[str, float]
) -> dict[str, float]:
    """The figures of `trial` as shares of the limits, by the timings of `others`."""
    # Only here: whoever reads a run needs no numpy.
    from heddle.search.placement import Timed
    from heddle.search.placement.limits import latency_budgets

    counted = {name for name in placement.counts.values() if isinstance(name, str)}

    def outer(one: Trial) -> dict[str, str]:
        return {name: repr(value) for name, value in one.params.items() if name not in counted}

    timed = [
        Timed(
            one.layers,
            outer(one),
            {
                label: 1.0 + over
                for label, over in one.constraints.items()
                if label in limits and label in one.latency
            },
        )
        for one in others
    ]
    kinds = list(placement.of)
    counts = {kind: trial.layers.count(kind) for kind in kinds}
    layers = [kinds.index(name) for name in trial.layers]
    # How finely a solver would count says nothing here.
    budgets = latency_budgets(timed, counts, outer(trial), 1)
    return {budget.name: float(budget.of(layers)) for budget in budgets}
