"""The best placements within budgets, and the proof of the best."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice, product

import numpy as np

from heddle.search.placement.bound import relaxed_bound
from heddle.search.placement.nearest import nothing_feasible
from heddle.search.placement.problem import Problem, Solution, solution_of
from heddle.search.placement.table import Table

# Placements read beyond the steps of the budgets.
MOST_READ = 2048


@dataclass(frozen=True, slots=True)
class Certificate:
    """How far the best placement found may lie below the true optimum of the objective.

    `upper` is proven: no placement within the true budgets is worth more. `gap` is 0 where no cost was rounded. Beside
    it stands what rounding can do at worst: the placement is at least as good as the optimum of a problem whose budgets
    give `withheld` (per budget, in its unit) less.
    """

    objective: float
    upper: float
    withheld: dict[str, float]

    @property
    def gap(self) -> float:
        return max(0.0, self.upper - self.objective)


@dataclass(frozen=True, slots=True)
class Answer:
    """The best placements, the best first, and the proof of the first. Equals come in the order of their layers."""

    solutions: tuple[Solution, ...]
    certificate: Certificate


def solve(problem: Problem, *, best: int = 1) -> Answer:
    """The `best` placements of most worth within the budgets, all different, and a certificate of the first.

    Exact where all costs are whole numbers; otherwise every placement keeps the true budgets, and the certificate tells
    what rounding may have lost.

    Raises:
        HeddleError: "nothing-feasible" where no placement is found; the text tells the least violation.
    """
    table = Table(problem)
    rounded = [grid for grid in table.grids if not grid.exact]
    chosen = list(islice(table.ranked(), best))
    if rounded and table.feasible:
        chosen = _with_spare(table, chosen, best)
    if not chosen:
        raise nothing_feasible(problem)
    found = tuple(solution_of(problem, layers) for layers in chosen)
    upper = objective = found[0].value
    if rounded:
        upper = max(objective, min(table.upper(), relaxed_bound(problem, objective)))
    withheld = {grid.budget.name: grid.spare * grid.unit for grid in rounded}
    return Answer(found, Certificate(objective, upper, withheld))


def _with_spare(table: Table, sure: list[tuple[int, ...]], best: int) -> list[tuple[int, ...]]:
    """Better placements, where costs were rounded up: those that are over a budget in steps and keep it in truth.

    The best for more steps than the budget has are read off the same table; the one that keeps the true budgets and is
    worth most tells how many steps to look for all of them within.
    """
    spare = [np.arange(low, top + 1) for low, top in zip(table.start, table.tops, strict=True)]
    # A choice of cells is enough, and a whole grid of them would be slow.
    most = max(2, int(MOST_READ ** (1 / len(spare))))
    spare = [cells[:: -(-len(cells) // most)] for cells in spare]
    starts = np.array(list(product(*spare)), dtype=np.int64)
    tops = table.tails[0][(0,) * table.problem.window][tuple(starts.T)]
    starts = starts[np.isfinite(tops)]
    if not len(starts):
        return sure
    layers = table.read(starts)
    worth = np.where(table.problem.keeps(layers), table.problem.value(layers), -np.inf)
    wide = tuple(int(steps) for steps in starts[worth.argmax()])
    more = islice(table.ranked(wide), 4 * best + 16)
    kept = {*sure, *(one for one in more if table.problem.keeps(one))}
    return sorted(kept, key=lambda one: (-float(table.problem.value(one)), one))[:best]
