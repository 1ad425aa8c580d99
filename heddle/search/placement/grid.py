"""A budget in whole steps, as the solver counts it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from heddle.errors import HeddleError
from heddle.search.placement.problem import Budget

Whole = NDArray[np.int64]
# Costs that differ by less than this share of a step count as whole.
EXACT = 2.0**52


@dataclass(frozen=True)
class Grid:
    """A budget whose costs are whole steps above the least that each layer can cost.

    Let x_l be that excess of a choice over the least one, in steps. Its whole steps are s_l = ⌈x_l⌉, so Σ s_l ≤ `capacity`
    gives Σ x_l ≤ `capacity`: what is returned keeps the true budget. The other way round, a placement that keeps it has
    Σ s_l ≤ Σ x_l + Σ_l max(s_l - x_l) ≤ `capacity` + `spare`: the best value within `capacity` + `spare` steps bounds the
    true optimum from above. Whole costs have s = x, and no `spare`.

    Shapes:  steps: [L, kinds before, kinds].
    """

    budget: Budget
    steps: Whole
    # What the cheapest choices cost together, and one step, in the budget's own unit.
    least: float
    unit: float
    capacity: int
    spare: int
    floor: int

    @property
    def exact(self) -> bool:
        return self.spare == 0

    def top(self, *, bound: bool) -> int:
        """The steps that the table needs: no placement takes more than the last of them."""
        most = int(self.steps.max(axis=(1, 2)).sum())
        return min(self.capacity + (self.spare if bound else 0), most)


def grid_of(budget: Budget) -> Grid:
    """The budget in steps; `capacity` is below 0 where even the cheapest placement is over it.

    Raises:
        HeddleError: "bad-argument" for costs that are not whole and have no `steps`.
    """
    choices = np.stack([budget.choices(layer) for layer in range(len(budget.cost))])
    lowest = choices.min(axis=(1, 2), keepdims=True)
    excess, least = choices - lowest, budget.constant + float(lowest.sum())
    given, most = budget.at_most - least, float(excess.max(axis=(1, 2)).sum())
    whole = bool((choices == np.rint(choices)).all()) and np.abs(choices).max() < EXACT
    unit = float(max(1, np.gcd.reduce(excess.astype(np.int64), axis=None))) if whole else 0.0
    capacity = int(min(given, most) // unit) if whole else -1
    if whole and (budget.steps is None or capacity <= budget.steps):
        floor = 0 if budget.at_least is None else int(np.ceil((budget.at_least - least) / unit))
        return Grid(budget, (excess // unit).astype(np.int64), least, unit, capacity, 0, max(0, floor))
    if budget.steps is None:
        raise HeddleError(
            "bad-argument",
            f"the costs of budget {budget.name!r} are not whole numbers",
            hint="give the budget `steps`, into which what it gives is cut",
        )
    return _rounded(budget, excess, least)


def _rounded(budget: Budget, excess: NDArray[np.float64], least: float) -> Grid:
    assert budget.steps is not None
    most, given = float(excess.max(axis=(1, 2)).sum()), budget.at_most - least
    if given < 0:
        return Grid(budget, np.zeros(excess.shape, np.int64), least, 1.0, -1, 0, 0)
    unit = (min(given, most) or 1.0) / budget.steps
    capacity = budget.steps if given > 0 else 0
    # What alone is over the budget needs no exact figure.
    share = np.minimum(excess / unit, capacity + len(excess) + 1.0)
    steps = np.ceil(share).astype(np.int64)
    if given >= most:
        # Nothing is over this budget, so rounding must not put anything over it.
        capacity = int(steps.max(axis=(1, 2)).sum())
    lost = np.where(share <= capacity, steps - share, 0.0).max(axis=(1, 2)).sum()
    return Grid(budget, steps, least, unit, capacity, int(np.floor(lost + 1e-9)), 0)
