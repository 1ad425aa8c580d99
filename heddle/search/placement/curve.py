"""The whole Pareto curve of worth against one budget, read off one table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from heddle.errors import HeddleError
from heddle.search.placement.nearest import nothing_feasible
from heddle.search.placement.problem import Problem, Solution, solution_of
from heddle.search.placement.table import Table


@dataclass(frozen=True, slots=True)
class Point:
    """A placement worth more than every other found at its cost or below; none there is worth more than `upper`."""

    solution: Solution
    cost: float
    upper: float


def curve(problem: Problem, name: str) -> tuple[Point, ...]:
    """Worth against the cost of budget `name`, the cheapest point first; the other budgets hold.

    Exact where costs are whole numbers: all Pareto-optimal costs are there, each with its best placement. One pass: the
    table of the solver holds the best value within every number of steps.

    Raises:
        HeddleError: "bad-argument" where no budget has that name or it has an `at_least`, which asks for a total and
            not for less; "nothing-feasible" where no placement keeps the budgets.
    """
    index = {budget.name: place for place, budget in enumerate(problem.budgets)}
    if name not in index or problem.budgets[index[name]].at_least is not None:
        free = [budget.name for budget in problem.budgets if budget.at_least is None]
        raise HeddleError("bad-argument", f"there is no curve over {name!r}", hint=f"budgets are {free}")
    table, axis = Table(problem), index[name]
    values = _along(table, axis, table.start)
    better = np.flatnonzero(values > np.concatenate([[-np.inf], values[:-1]]))
    if not table.feasible or not len(better):
        raise nothing_feasible(problem)
    starts = np.tile(np.array(table.start, dtype=np.int64), (len(better), 1))
    starts[:, axis] = better
    layers = table.read(starts)
    # Beyond the budget's own steps are placements that rounding alone puts over it.
    kept = layers[problem.keeps(layers)]
    if not len(kept):
        raise nothing_feasible(problem)
    solutions = [solution_of(problem, tuple(int(kind) for kind in row)) for row in kept]
    return _bounded(table, axis, _undominated(solutions, name), name)


def _along(table: Table, axis: int, rest: tuple[int, ...]) -> NDArray[np.float64]:
    where: list[int | slice] = list(rest)
    where[axis] = slice(None)
    return np.asarray(table.tails[0][(*(0,) * table.problem.window, *where)])


def _bounded(table: Table, axis: int, solutions: list[Solution], name: str) -> tuple[Point, ...]:
    exact = all(grid.exact for grid in table.grids)
    bounds, grid = _along(table, axis, table.tops), table.grids[axis]
    points = []
    for solution in solutions:
        cost, upper = solution.costs[name], solution.value
        if not exact:
            # A placement at this cost or below takes at most so many steps, however its costs were rounded.
            steps = int(np.floor((cost - grid.least) / grid.unit + 1e-9)) + grid.spare
            upper = max(upper, float(bounds[min(steps, len(bounds) - 1)]))
        points.append(Point(solution, cost, upper))
    return tuple(points)


def _undominated(solutions: list[Solution], name: str) -> list[Solution]:
    """Those worth more than every cheaper one, the cheapest first."""
    kept: list[Solution] = []
    for one in sorted(solutions, key=lambda one: (one.costs[name], -one.value, one.layers)):
        if not kept or one.value > kept[-1].value:
            kept.append(one)
    return kept
