"""The exact solver: dynamic programming over layers, the last choices, and what is left of each budget."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heddle.errors import HeddleError
from heddle.search.placement.bound import relaxed_bound
from heddle.search.placement.counts import Array
from heddle.search.placement.grid import Grid, grid_of
from heddle.search.placement.problem import Budget, Problem

# Cells of the table, 8 bytes each.
MOST_CELLS = 10**8
# Steps of each budget on the way to the least violation, by the number of budgets that are counted in steps there.
STEPS_TO_NEAREST = (1, 1000, 60, 20)
Index = tuple[Any, ...]
# Minus what a beginning can still reach, its layers, their worth, and the steps left.
Branch = tuple[float, tuple[int, ...], float, tuple[int, ...]]
# Whether a kind may stand at a layer with so many steps of each budget left: [steps of each budget, …] of truths.
Gate = Callable[[int, int], NDArray[np.bool_]]


@dataclass(frozen=True, slots=True)
class Solution:
    """A placement: the kind of each layer, what it is worth, and its true costs."""

    layers: tuple[int, ...]
    value: float
    costs: dict[str, float]


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


class Table:
    """The best that layers l … L-1 can add, for each l, the w choices before it, and the steps left of each budget.

        T_l(s, r) = max_k gain_l(s, k) + T_{l+1}(s' = s shifted by k, r - steps_l(s, k)),   T_L = 0

    Filled from the last layer back, so that placements are read forward and ties go to the lowest kind of the earliest
    layer. With `bound` the table holds the spare steps too, from which upper bounds are read.

    Shapes:  tails[l]: [kinds, … w times, steps of each budget + 1, …].

    Raises:
        HeddleError: "bad-argument" for a table of more than MOST_CELLS cells.
    """

    def __init__(self, problem: Problem, *, bound: bool = True, gate: Gate | None = None) -> None:
        self.problem, self.gate = problem, gate
        self.grids: list[Grid] = [grid_of(budget) for budget in problem.budgets]
        self.feasible = all(grid.capacity >= 0 for grid in self.grids)
        self.tops = tuple(max(0, grid.top(bound=bound)) for grid in self.grids)
        # Where rounding is left aside, no placement takes more than the table's last step.
        self.start = tuple(
            min(max(0, grid.capacity), top) for grid, top in zip(self.grids, self.tops, strict=True)
        )
        shape = (problem.kinds,) * problem.window + tuple(top + 1 for top in self.tops)
        cells = (problem.length + 1) * np.prod([float(size) for size in shape])
        if cells > MOST_CELLS:
            raise HeddleError(
                "bad-argument",
                f"the table of this placement has {cells:.2g} cells, more than {MOST_CELLS:.0e}",
                hint="give the budgets fewer `steps`, or pair terms a shorter window",
            )
        self.tails = self._filled(shape)

    def _filled(self, shape: tuple[int, ...]) -> list[Array]:
        last = np.zeros(shape)
        for axis, (grid, start) in enumerate(zip(self.grids, self.start, strict=True)):
            # Ending with more left than this has used less than `floor` steps.
            over: list[Any] = [slice(None)] * len(shape)
            over[self.problem.window + axis] = slice(max(0, start - grid.floor + 1), None)
            if grid.floor:
                last[tuple(over)] = -np.inf
        tails = [last]
        for layer in reversed(range(self.problem.length)):
            tails.append(self._extended(tails[-1], layer))
        return tails[::-1]

    def _extended(self, after: Array, layer: int) -> Array:
        """T_l from T_{l+1}."""
        problem, window = self.problem, self.problem.window
        gain = problem.gains[layer]
        best = np.full(after.shape, -np.inf)
        wide: Index = (...,) + (None,) * len(self.grids)
        gates = [self.gate(layer, kind) if self.gate else None for kind in range(problem.kinds)]
        for before, kind in product(range(problem.kinds), repeat=2):
            if np.isneginf(problem.unary[layer, kind]):
                continue
            steps = [int(grid.steps[layer, before, kind]) for grid in self.grids]
            if any(step > top for step, top in zip(steps, self.tops, strict=True)):
                continue
            place: Index = (kind,) if window == 1 else (slice(None),) * (window - 2) + (before, kind)
            left: Index = tuple(slice(0, top + 1 - step) for step, top in zip(steps, self.tops, strict=True))
            value = after[place][(..., *left)] + gain[..., before, kind][wide]
            gone: Index = (..., *(slice(step, None) for step in steps))
            allowed = gates[kind]
            if allowed is not None:
                value = np.where(allowed[gone], value, -np.inf)
            # The ellipsis makes it a view even where there are no budgets.
            view: Index = (*(slice(None),) * (window - 1), before, ...)
            target = best[view][gone]
            np.maximum(target, value, out=target)
        return best

    def at(self, left: tuple[int, ...]) -> float:
        """The best value of all with these steps."""
        return float(self.tails[0][(0,) * self.problem.window + left])

    def upper(self) -> float:
        """What no placement within the true budgets exceeds."""
        return self.at(self.tops)

    def ranked(self) -> Iterator[tuple[int, ...]]:
        """Every placement within the budgets, the best first, equals in the order of their layers.

        The table says exactly what each beginning can still reach, so a search by that goes straight to the next best.
        """
        heap: list[Branch] = [(-self.at(self.start), (), 0.0, self.start)]
        if not self.feasible or np.isposinf(heap[0][0]):
            return
        while heap:
            _, layers, worth, left = heapq.heappop(heap)
            if len(layers) == self.problem.length:
                yield layers
                continue
            for item in self._further(layers, worth, left):
                heapq.heappush(heap, item)

    def _further(self, layers: tuple[int, ...], worth: float, left: tuple[int, ...]) -> Iterator[Branch]:
        layer, window = len(layers), self.problem.window
        state = ((0,) * window + layers)[-window:]
        for kind in range(self.problem.kinds):
            rest = tuple(
                have - int(grid.steps[layer, state[-1], kind])
                for have, grid in zip(left, self.grids, strict=True)
            )
            if any(have < 0 for have in rest) or (self.gate and not self.gate(layer, kind)[left]):
                continue
            sure = worth + float(self.problem.gains[layer][state][kind])
            reach = sure + float(self.tails[layer + 1][(*state[1:], kind, *rest)])
            if np.isfinite(reach):
                yield -reach, (*layers, kind), sure, rest


def solution_of(problem: Problem, layers: tuple[int, ...]) -> Solution:
    """These layers with their worth and costs."""
    return Solution(layers, problem.value(layers), problem.costs(layers))


def solve(problem: Problem, *, best: int = 1) -> Answer:
    """The `best` placements of most worth within the budgets, all different, and a certificate of the first.

    Exact where all costs are whole numbers; otherwise every placement keeps the true budgets, and the certificate tells
    what rounding may have lost.

    Raises:
        HeddleError: "nothing-feasible" where no placement is found; the text tells the least violation.
    """
    table = Table(problem)
    found = tuple(solution_of(problem, layers) for layers in islice(table.ranked(), best))
    if not found:
        raise nothing_feasible(problem)
    rounded = [grid for grid in table.grids if not grid.exact]
    objective = found[0].value
    upper = objective
    if rounded:
        upper = max(objective, min(table.upper(), relaxed_bound(problem)))
    withheld = {grid.budget.name: grid.spare * grid.unit for grid in rounded}
    return Answer(found, Certificate(objective, upper, withheld))


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
        shares = [b.excess(cost) for b, cost in zip(open_, spent[len(hard) :], strict=True)]
        over = max([last.excess(last.constant - table.at(where)), *shares])
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
