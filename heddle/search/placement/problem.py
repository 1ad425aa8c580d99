"""What a placement is worth and what it costs: the question that the solver of `dp` answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from heddle.errors import HeddleError
from heddle.search.placement.counts import Array

Layers = Sequence[int] | NDArray[np.int64]


@dataclass(frozen=True)
class Budget:
    """What the layers may cost of one resource: latency, bytes of cache, parameters, layers of a kind.

        at_least ≤ constant + Σ_l cost[l, k_l] + Σ_{l>0} pair[k_{l-1}, k_l] ≤ at_most

    `steps` is how finely the solver counts a resource whose costs are not whole multiples of something: what is given is
    cut into so many steps and every cost rounded up to one. None stands for whole numbers, which are never rounded, and
    which alone may have an `at_least`. `pair` is what a boundary between two kinds adds.

    Shapes:  cost: [L, kinds];  pair: [kinds, kinds].
    """

    name: str
    cost: Array
    at_most: float = np.inf
    at_least: float | None = None
    pair: Array | None = None
    constant: float = 0.0
    steps: int | None = None

    def choices(self, layer: int) -> Array:
        """What each kind costs at `layer` after each kind before it: [kinds before, kinds]."""
        kinds = self.cost.shape[1]
        beside = np.zeros((kinds, kinds)) if self.pair is None or layer == 0 else self.pair
        return np.asarray(self.cost[layer][None, :] + beside, dtype=np.float64)

    def of(self, layers: Layers) -> Array:
        """What these layers cost: for one placement a number, for rows of placements one each."""
        kinds = np.asarray(layers)
        total = self.cost[np.arange(kinds.shape[-1]), kinds].sum(axis=-1) + self.constant
        if self.pair is not None:
            total = total + self.pair[kinds[..., :-1], kinds[..., 1:]].sum(axis=-1)
        return np.asarray(total, dtype=np.float64)

    def excess(self, cost: Array | float) -> Array:
        """How far `cost` lies over what is given, or under what is asked, as a share of it; 0 keeps the budget."""
        # The sum of float64 costs that add up to the limit may end a rounding above it.
        slack = 1e-12 * max(1.0, abs(self.constant), float(np.abs(self.cost).sum(axis=0).max()))
        least = -np.inf if self.at_least is None else self.at_least
        over = np.maximum(np.asarray(cost) - self.at_most, least - np.asarray(cost))
        return np.where(over <= slack, 0.0, over / (abs(self.at_most) or 1.0))


def within(budgets: Sequence[Budget], layers: Layers) -> NDArray[np.bool_]:
    """Whether each row of layers keeps every budget."""
    missed = [budget.excess(budget.of(layers)) > 0 for budget in budgets]
    return ~np.any(missed, axis=0) if missed else np.ones(np.asarray(layers).shape[:-1], dtype=np.bool_)


def count_budget(kind: int, shape: tuple[int, int], most: int, least: int | None = None) -> Budget:
    """At most `most`, and at least `least`, layers of a kind; `shape` is (L, kinds)."""
    cost = np.zeros(shape)
    cost[:, kind] = 1.0
    return Budget(f"layers of kind {kind}", cost, most, least)


@dataclass(frozen=True)
class Problem:
    """Choose a kind k_l for each of L layers so that

        Σ_l unary[l, k_l] + Σ_{d=1..w} Σ_{l≥d} pair[d-1, l, k_{l-d}, k_l]

    is as large as can be within every budget. A worth of -inf forbids a kind at a layer, or two kinds at that distance.

    Shapes:  unary: [L, kinds];  pair: [w, L, kinds, kinds], or [w, kinds, kinds] for all layers alike.

    Raises:
        HeddleError: "bad-argument" for arrays that do not fit each other or hold no numbers.
    """

    unary: Array
    pair: Array | None = None
    budgets: tuple[Budget, ...] = ()

    def __post_init__(self) -> None:
        length, kinds = _dims(self.unary)
        if self.pair is not None and self.pair.shape[-3:] not in (
            (len(self.pair), kinds, kinds),
            (length, kinds, kinds),
        ):
            raise _bad(f"pair terms of shape {self.pair.shape} beside {length} layers of {kinds} kinds")
        for array in (self.unary, self.pair):
            if array is not None and (np.isnan(array).any() or np.isposinf(array).any()):
                raise _bad("what a kind is worth is a number, or -inf where it is forbidden")
        for budget in self.budgets:
            _check(budget, (length, kinds))

    @property
    def length(self) -> int:
        return int(self.unary.shape[0])

    @property
    def kinds(self) -> int:
        return int(self.unary.shape[1])

    @property
    def window(self) -> int:
        """How many choices back a pair term reaches; at least 1."""
        return 1 if self.pair is None else len(self.pair)

    def pair_at(self, distance: int, layer: int) -> Array:
        """The worth of each kind `distance` layers back beside each kind at `layer`: [kinds, kinds]."""
        if self.pair is None or distance > layer:
            return np.zeros((self.kinds, self.kinds))
        of_distance: Array = self.pair[distance - 1]
        return of_distance[layer] if of_distance.ndim == 3 else of_distance

    @cached_property
    def gains(self) -> list[Array]:
        """What a choice adds after the last w ones: for each layer [kinds, … w times, kinds], the newest last."""
        window, made = self.window, []
        for layer in range(self.length):
            total = np.zeros((self.kinds,) * (window + 1)) + self.unary[layer]
            for distance in range(1, window + 1):
                shape = [1] * (window + 1)
                shape[window - distance] = shape[window] = self.kinds
                total = total + self.pair_at(distance, layer).reshape(shape)
            made.append(total)
        return made

    def value(self, layers: Layers) -> Array:
        """What these layers are worth: for one placement a number, for rows of placements one each."""
        kinds = np.asarray(layers)
        total = self.unary[np.arange(self.length), kinds].sum(axis=-1)
        for layer in range(self.length) if self.pair is not None else ():
            for distance in range(1, min(self.window, layer) + 1):
                total = total + self.pair_at(distance, layer)[kinds[..., layer - distance], kinds[..., layer]]
        return np.asarray(total, dtype=np.float64)

    def costs(self, layers: Sequence[int]) -> dict[str, float]:
        """What these layers cost of each budget."""
        return {budget.name: float(budget.of(layers)) for budget in self.budgets}

    def keeps(self, layers: Layers) -> NDArray[np.bool_]:
        """Whether each row of layers keeps every budget."""
        return within(self.budgets, layers)

    def over(self, costs: Mapping[str, float]) -> dict[str, float]:
        """By what share of it each budget that is not kept is missed."""
        found = {budget.name: float(budget.excess(costs[budget.name])) for budget in self.budgets}
        return {name: share for name, share in found.items() if share > 0}


@dataclass(frozen=True, slots=True)
class Solution:
    """A placement: the kind of each layer, what it is worth, and its true costs."""

    layers: tuple[int, ...]
    value: float
    costs: dict[str, float]


def solution_of(problem: Problem, layers: tuple[int, ...]) -> Solution:
    """These layers with their worth and costs."""
    return Solution(layers, float(problem.value(layers)), problem.costs(layers))


def _dims(unary: Array) -> tuple[int, int]:
    if unary.ndim != 2 or 0 in unary.shape:
        raise _bad(f"a worth for each layer and kind is asked for, not an array of shape {unary.shape}")
    return int(unary.shape[0]), int(unary.shape[1])


def _check(budget: Budget, dims: tuple[int, int]) -> None:
    pair = budget.pair
    if budget.cost.shape != dims or (pair is not None and pair.shape != (dims[1], dims[1])):
        raise _bad(f"the costs of budget {budget.name!r} do not fit {dims[0]} layers of {dims[1]} kinds")
    if not np.isfinite(budget.cost).all() or (pair is not None and not np.isfinite(pair).all()):
        raise _bad(f"the costs of budget {budget.name!r} are not all numbers")
    if budget.steps is not None and budget.steps < 1:
        raise _bad(f"budget {budget.name!r} has {budget.steps} steps; at least 1 is needed")
    if budget.at_least is not None and budget.steps is not None:
        raise _bad(f"budget {budget.name!r} has an at_least, which needs whole numbers and so no steps")


def _bad(what: str) -> HeddleError:
    return HeddleError("bad-argument", what)
