"""Placement inside a trial: predict, evaluate the best for real, learn from what was wrong, solve again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from heddle.search.placement.landscape import Landscape, unseen
from heddle.search.placement.nearest import nothing_feasible
from heddle.search.placement.problem import Budget
from heddle.search.placement.table import Table

Layers = tuple[int, ...]
# The values of placements, all of a round at once.
Evaluate = Callable[[Sequence[Layers]], Sequence[float]]


@dataclass(frozen=True, slots=True)
class Effort:
    """How a loop spends its evaluations.

    Of a round's `batch`, `expected` placements are the best of the expected landscape within the trust region; the rest are
    the best of draws from the posterior, every second of them from anywhere. `tolerance` is how far, as a share of the spread of
    all values, the prediction of the best may be off where predicted and real are said to agree; below 0, never.
    """

    evaluations: int
    batch: int = 8
    expected: int = 4
    window: int = 2
    tolerance: float = 0.02


@dataclass(frozen=True, slots=True)
class Round:
    """What a round predicted of its most promising placement, before it was evaluated, and what was found."""

    predicted: float
    real: float
    radius: int
    best: float


@dataclass(frozen=True, slots=True)
class Found:
    """The best placement, and how it was come by.

    `agreed` says that the placement of the highest expected value anywhere within the budgets was evaluated, is the best
    found, and its prediction from all others' values was right.
    """

    layers: Layers
    value: float
    evaluated: tuple[tuple[Layers, float], ...]
    rounds: tuple[Round, ...]
    agreed: bool


class Loop:
    """A search for the placement of the highest value within budgets; `known` are values that were had before, of placements
    within the budgets or not (such as one layer restored at a time).

        model ← values so far;  evaluate the k best of it near the best found;  real against predicted sets how near;  again

    The radius, in layers that differ, doubles where the gain is at least ¾ of what was predicted and halves where it is less
    than ¼, as trust regions do. Equal values, budgets and seed give equal evaluations.
    """

    def __init__(
        self,
        evaluate: Evaluate,
        shape: tuple[int, int],
        budgets: tuple[Budget, ...],
        effort: Effort,
        *,
        known: Sequence[tuple[Layers, float]] = (),
        seed: int = 0,
    ) -> None:
        self.evaluate, self.budgets, self.effort = evaluate, budgets, effort
        self.length, self.kinds = shape
        self.known, self.own = list(known), list[tuple[Layers, float]]()
        self.rng, self.radius = np.random.default_rng(seed), self.length
        self.rounds: list[Round] = []

    def run(self) -> Found:
        """Rounds until the evaluations are spent, predicted and real agree, or no placement is left.

        Raises:
            HeddleError: "nothing-feasible" where no placement keeps the budgets.
        """
        while len(self.own) < self.effort.evaluations and not self.agreed():
            model = self.model()
            chosen = self._chosen(model, min(self.effort.batch, self.effort.evaluations - len(self.own)))
            if not chosen and not self.own:
                raise nothing_feasible(model.mean(self.budgets))
            if not chosen:
                break
            predicted = model.predicted(chosen[0]) if self.own else np.nan
            before = self.best[1] if self.own else -np.inf
            values = [float(value) for value in self.evaluate(chosen)]
            self.own += zip(chosen, values, strict=True)
            self.rounds.append(Round(predicted, values[0], self.radius, self.best[1]))
            self._trust(predicted - before, max(values) - before)
        return Found(*self.best, tuple(self.own), tuple(self.rounds), self.agreed())

    @property
    def best(self) -> tuple[Layers, float]:
        """The best of those within the budgets; of equals the first."""
        return max(self.own, key=lambda one: one[1])

    def model(self, without: Layers | None = None) -> Landscape:
        """What all values say, or all but one."""
        rows = [one for one in (*self.known, *self.own) if one[0] != without]
        layers = np.array([one for one, _ in rows], dtype=np.int64).reshape(len(rows), self.length)
        return Landscape(layers, np.array([value for _, value in rows]), self.kinds, self.effort.window)

    def agreed(self) -> bool:
        """Whether the model's best is the best found, and the others' values alone predict it."""
        if len(self.own) < 2 * self.effort.batch or self.effort.tolerance < 0:
            return False
        top = next(Table(self.model().mean(self.budgets), bound=False).ranked())
        layers, value = self.best
        if top != layers:
            return False
        spread = float(np.ptp([one for _, one in self.own]))
        return abs(self.model(layers).predicted(layers) - value) <= self.effort.tolerance * spread

    def _chosen(self, model: Landscape, count: int) -> list[Layers]:
        """The placements of the next round, the most promising first."""
        seen, chosen = {one for one, _ in self.own}, list[Layers]()
        near = (*self.budgets, self._near()) if self.own else self.budgets
        if self.own:
            table = Table(model.mean(near), bound=False)
            chosen += unseen(table.ranked(), seen, min(count, self.effort.expected))
        for turn in range(4 * count):
            if len(chosen) >= count:
                break
            where = near if turn % 2 == 0 else self.budgets
            table = Table(model.draw(self.rng, where), bound=False)
            chosen += unseen(table.ranked(), seen | {*chosen}, 1)
        return chosen

    def _near(self) -> Budget:
        """At most `radius` layers that differ from the best found."""
        cost = np.ones((self.length, self.kinds))
        cost[range(self.length), list(self.best[0])] = 0.0
        return Budget("layers that differ", cost, self.radius)

    def _trust(self, expected: float, gained: float) -> None:
        if not np.isfinite(expected):
            return
        if expected > 0 and gained >= 0.75 * expected:
            self.radius = min(self.length, 2 * self.radius)
        elif expected <= 0 or gained < 0.25 * expected:
            self.radius = max(2, self.radius // 2)
