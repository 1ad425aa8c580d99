"""The whole Pareto curve of worth against one budget, read off one table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from heddle.errors import HeddleError
from heddle.search.placement.dp import Solution, Table, nothing_feasible, solution_of
from heddle.search.placement.problem import Problem

Whole = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Point:
    """A placement that no other found beats at its cost or below; none within its `budget` is worth more than `upper`.

    `budget` is what the placement was looked for within: at least its true cost, which rounding had counted as more.
    """

    solution: Solution
    cost: float
    budget: float
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
    table = Table(problem)
    axis = index[name]
    if not table.feasible or np.isneginf(table.at(table.start)):
        raise nothing_feasible(problem)
    values = _along(table, axis, table.start)
    bounds = _along(table, axis, table.tops)
    grid = table.grids[axis]
    within = table.start[axis] + 1
    better = np.flatnonzero(values[:within] > np.concatenate([[-np.inf], values[: within - 1]]))
    starts = np.tile(np.array(table.start, dtype=np.int64), (len(better), 1))
    starts[:, axis] = better
    found = []
    for steps, layers in zip(better, _read(table, starts), strict=True):
        solution = solution_of(problem, tuple(int(kind) for kind in layers))
        upper = float(bounds[min(int(steps) + grid.spare, len(bounds) - 1)])
        budget = grid.least + grid.unit * int(steps)
        found.append(
            Point(solution, solution.costs[name], budget, upper if _rounds(table) else solution.value)
        )
    return _undominated(found)


def _rounds(table: Table) -> bool:
    return any(not grid.exact for grid in table.grids)


def _along(table: Table, axis: int, rest: tuple[int, ...]) -> NDArray[np.float64]:
    where: list[int | slice] = list(rest)
    where[axis] = slice(None)
    return np.asarray(table.tails[0][(*(0,) * table.problem.window, *where)])


def _read(table: Table, starts: Whole) -> Whole:
    """The best placement from each row of steps left, the lowest kind of equals: [rows, L]."""
    problem = table.problem
    rows, left = np.arange(len(starts)), starts.copy()
    state = np.zeros((problem.window, len(starts)), dtype=np.int64)
    made = np.zeros((len(starts), problem.length), dtype=np.int64)
    for layer in range(problem.length):
        values, rests = [], []
        for kind in range(problem.kinds):
            cost = [grid.steps[layer, state[-1], kind] for grid in table.grids]
            rest = left - np.stack(cost, axis=1)
            after = (*state[1:], np.full(len(starts), kind), *np.maximum(rest, 0).T)
            value = problem.gains[layer][(*state, kind)] + table.tails[layer + 1][after]
            values.append(np.where((rest < 0).any(axis=1), -np.inf, value))
            rests.append(rest)
        chosen = np.stack(values).argmax(axis=0)
        left = np.stack(rests)[chosen, rows]
        made[:, layer] = chosen
        state = np.concatenate([state[1:], chosen[None]])
    return made


def _undominated(points: list[Point]) -> tuple[Point, ...]:
    """Those worth more than every cheaper one: rounding may have put a cheaper placement after a dearer one."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda one: (one.cost, -one.solution.value)):
        if not kept or point.solution.value > kept[-1].solution.value:
            kept.append(point)
    return tuple(kept)
