"""The exact solver's table: dynamic programming over layers, the last choices, and what is left of each budget."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heddle.errors import HeddleError
from heddle.search.placement.counts import Array
from heddle.search.placement.grid import Grid, Whole, grid_of
from heddle.search.placement.problem import Problem

# Cells of the table, 8 bytes each.
MOST_CELLS = 10**8
Index = tuple[Any, ...]
# Minus what a beginning can still reach, its layers, their worth, and the steps left.
Branch = tuple[float, tuple[int, ...], float, tuple[int, ...]]
# Whether a kind may stand at a layer with so many steps of each budget left: [steps of each budget, …] of truths.
Gate = Callable[[int, int], NDArray[np.bool_]]


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
        self._steps: dict[tuple[int, int], list[list[int]]] = {}
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
        gates = [self.allowed(layer, kind) if self.gate else None for kind in range(problem.kinds)]
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

    def allowed(self, layer: int, kind: int) -> NDArray[np.bool_]:
        """What the gate says, for every number of steps left of each budget."""
        assert self.gate is not None
        return np.broadcast_to(self.gate(layer, kind), tuple(top + 1 for top in self.tops))

    def at(self, left: tuple[int, ...]) -> float:
        """The best value of all with these steps."""
        return float(self.tails[0][(0,) * self.problem.window + left])

    def upper(self) -> float:
        """What no placement within the true budgets exceeds."""
        return self.at(self.tops)

    def ranked(self, start: tuple[int, ...] | None = None) -> Iterator[tuple[int, ...]]:
        """Every placement within so many steps, the best first, equals in the order of their layers.

        Without `start` those are the steps that keep every budget.

        The table says exactly what each beginning can still reach, so a search by that goes straight to the next best.
        """
        start = self.start if start is None else start
        heap: list[Branch] = [(-self.at(start), (), 0.0, start)]
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
        gains, after = self.problem.gains[layer][state], self.tails[layer + 1][state[1:]]
        for kind, *steps in self._choices(layer, state[-1]):
            rest = tuple([have - step for have, step in zip(left, steps, strict=True)])
            if (rest and min(rest) < 0) or (self.gate and not self.allowed(layer, kind)[left]):
                continue
            sure = worth + float(gains[kind])
            reach = sure + float(after[(kind, *rest)])
            if reach > -np.inf:
                yield -reach, (*layers, kind), sure, rest

    def _choices(self, layer: int, before: int) -> list[list[int]]:
        """Each kind that is not forbidden at a layer, with its steps of each budget."""
        if (layer, before) not in self._steps:
            kinds = np.flatnonzero(np.isfinite(self.problem.unary[layer]))
            columns = [kinds, *(grid.steps[layer, before][kinds] for grid in self.grids)]
            self._steps[layer, before] = np.stack(columns, axis=1).tolist()
        return self._steps[layer, before]

    def read(self, starts: Whole) -> Whole:
        """The best placement within each row of steps, the lowest kind of equals; each row must have one.

        Shapes:  starts: [rows, budgets];  out: [rows, L].
        """
        rows, left = np.arange(len(starts)), starts.copy()
        state = np.zeros((self.problem.window, len(starts)), dtype=np.int64)
        made = np.zeros((len(starts), self.problem.length), dtype=np.int64)
        for layer in range(self.problem.length):
            values, rests = [], []
            for kind in range(self.problem.kinds):
                cost = [grid.steps[layer, state[-1], kind] for grid in self.grids]
                rest = left - np.array(cost, dtype=np.int64).reshape(len(cost), len(starts)).T
                after = (*state[1:], np.full(len(starts), kind), *np.maximum(rest, 0).T)
                value = self.problem.gains[layer][(*state, kind)] + self.tails[layer + 1][after]
                wrong = (rest < 0).any(axis=1)
                if self.gate:
                    wrong |= ~self.allowed(layer, kind)[tuple(left.T)]
                values.append(np.where(wrong, -np.inf, value))
                rests.append(rest)
            chosen = np.stack(values).argmax(axis=0)
            left = np.stack(rests)[chosen, rows]
            made[:, layer] = chosen
            state = np.concatenate([state[1:], chosen[None]])
        return made
