"""What a run's own timings say about the latency of a member of its front: the linear model that placements are proposed by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from heddle import specs
from heddle.errors import HeddleError

if TYPE_CHECKING:
    from heddle.search.record import Run, Trial
    from heddle.specs import Placement


# So many specs are left out in turn, spread over the run: each costs a fit.
MOST_LEFT_OUT = 32


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Errors at one budget of specs that were each predicted from the timings of all others, in the mean, as shares."""

    label: str
    n: int
    mape: float
    spearman: float


def left_out_errors(run: Run) -> list[LeftOut]:
    """How far predictions like those of `expected_latencies` are off: of 32 timed specs at most, each left out in turn.

    Empty where nothing is predicted; a budget has none with fewer than three specs to tell of.
    """
    placement, limits, known = _timed(run)
    if placement is None:
        return []
    # Only here: whoever reads a run needs no numpy.
    import numpy as np

    from heddle.search.latency_model.fit import spearman

    specs_ = list({one.hash: one for one in known}.values())
    chosen = specs_[:: max(1, -(-len(specs_) // MOST_LEFT_OUT))]
    pairs: dict[str, list[tuple[float, float]]] = {}
    for trial in chosen:
        others = [one for one in specs_ if one.hash != trial.hash]
        for label, share in _shares(trial, others, placement, limits).items():
            if label in trial.latency and label in trial.constraints:
                pairs.setdefault(label, []).append((share, 1.0 + trial.constraints[label]))
    found = []
    for label, both in pairs.items():
        told, seen = np.array(both).T
        if len(both) > 2:
            mape = float(np.mean(np.abs(told / seen - 1.0)))
            found.append(LeftOut(label, len(both), mape, spearman(seen, told)))
    return found


def expected_latencies(run: Run) -> dict[int, dict[str, float]]:
    """By trial of the front and label of a latency budget: what is expected from the timings of all other specs of the run.

    In what the budget limits: milliseconds, or the ratio. Empty for a run that places no layers; nothing is said of a budget
    that fewer than four other specs were timed at.
    """
    placement, limits, known = _timed(run)
    if placement is None:
        return {}
    found = {}
    for trial in run.front_trials:
        shares = _shares(trial, [one for one in known if one.hash != trial.hash], placement, limits)
        if shares:
            found[trial.number] = {label: share * limits[label] for label, share in shares.items()}
    return found


def _timed(run: Run) -> tuple[Placement | None, dict[str, float], list[Trial]]:
    """The placement of the run's space, None where nothing is predicted; the limits of latency; and the trials timed."""
    try:
        placement = specs.loads(str(run.meta.get("spec", ""))).space.placement
    except HeddleError:
        placement = None
    limits = {budget.label: budget.at_most for budget in run.budgets if budget.is_timed}
    if placement is None or not limits:
        return None, {}, []
    return (
        placement,
        limits,
        [trial for trial in run.trials if trial.latency and set(trial.layers) <= set(placement.of)],
    )


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
