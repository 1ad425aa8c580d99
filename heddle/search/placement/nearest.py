"""Where nothing keeps the budgets: the placement that misses them by least."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np

from heddle.errors import HeddleError
from heddle.search.placement.problem import Budget, Problem, Solution, solution_of
from heddle.search.placement.table import Table

# Steps of each budget on the way to the least violation, by the number of budgets that are counted in steps there.
STEPS_TO_NEAREST = (1, 1000, 60, 20)


def nearest(problem: Problem) -> Solution:
    """The placement that misses the budgets by least: the worst of its shares over a budget is the smallest there is.

    Budgets with an `at_least`, the counts, are held to. The costs of one budget are exact; of several, all but the last
    are exact up to their steps.

    Raises:
        HeddleError: "nothing-feasible" where no placement has those counts.
    """
    hard = tuple(budget for budget in problem.budgets if budget.at_least is not None)
    soft = [budget for budget in problem.budgets if budget.at_least is None]
    if not soft:
        return _kept(problem, hard)
    *open_, last = soft
    free = tuple(_unlimited(budget, STEPS_TO_NEAREST[min(len(open_), 3)]) for budget in open_)
    forbidden = np.where(np.isneginf(problem.unary), -np.inf, 0.0)
    pair = np.zeros((problem.window, problem.length, problem.kinds, problem.kinds))
    for distance, layer in product(range(1, problem.window + 1), range(problem.length)):
        pair[distance - 1, layer][np.isneginf(problem.pair_at(distance, layer))] = -np.inf
    if last.pair is not None:
        pair[0, 1:] -= last.pair
    frugal = Problem(forbidden - last.cost, pair, (*hard, *free))
    table = Table(frugal, bound=False)
    if not table.feasible:
        return _kept(problem, hard)
    worst, at = np.inf, table.start
    for left in product(*(range(top + 1) for top in table.start[len(hard) :])):
        where = (*table.start[: len(hard)], *left)
        spent = [grid.least + grid.unit * have for grid, have in zip(table.grids, where, strict=True)]
        shares = [float(b.excess(cost)) for b, cost in zip(open_, spent[len(hard) :], strict=True)]
        over = max([float(last.excess(last.constant - table.at(where))), *shares])
        if over < worst:
            worst, at = over, where
    if np.isinf(worst):
        return _kept(problem, hard)
    table.start = at
    return solution_of(problem, next(table.ranked()))


def _unlimited(budget: Budget, steps: int) -> Budget:
    """The same resource without a limit, in at most so many steps."""
    return replace(budget, at_most=np.inf, steps=min(steps, budget.steps or steps))


def _kept(problem: Problem, hard: tuple[Budget, ...]) -> Solution:
    """A placement with the counts asked for. Raises "nothing-feasible"."""
    table = Table(Problem(problem.unary, problem.pair, hard), bound=False)
    layers = next(table.ranked(), None)
    if layers is None:
        names = ", ".join(budget.name for budget in hard) or "none"
        raise HeddleError(
            "nothing-feasible", f"no placement of {problem.length} layers has what is asked for: {names}"
        )
    return solution_of(problem, layers)


def nothing_feasible(problem: Problem) -> HeddleError:
    """The error that tells which placement comes nearest to the budgets, and by how much it misses each."""
    try:
        one = nearest(problem)
    except HeddleError as error:
        return error
    missed = [
        f"{name} by {100 * share:.3g} % ({one.costs[name]:.6g})"
        for name, share in problem.over(one.costs).items()
    ]
    what = "no placement keeps the budgets; the nearest one misses " + (", ".join(missed) or "none")
    hint = f"its layers are {list(one.layers)}"
    if not missed:
        what = "no placement keeps the budgets in so few steps, though one does"
        hint += "; give the budgets more `steps`"
    return HeddleError("nothing-feasible", what, hint=hint)
