"""A bound from above that needs no steps: budgets at a price."""

from __future__ import annotations

import numpy as np

from heddle.search.placement.counts import Array
from heddle.search.placement.problem import Problem

# Prices tried. Any price gives a bound that holds; more of them make it closer.
ROUNDS = 80


def relaxed_bound(problem: Problem, found: float) -> float:
    """What no placement within the true budgets exceeds, by Lagrangian relaxation; `found` is the worth of one that keeps them.

        min_{λ ≥ 0} max_k [ value(k) - Σ_i λ_i (cost_i(k) - limit_i) ]

    Each inner maximum is exact, by dynamic programming without budgets. Two sides of a budget have a price each. One
    price is searched by halving its range, several by steps along the violation
    (Polyak's, whose length is how far the bound still lies above `found`).
    """
    sides = _sides(problem)
    if not sides:
        return _priced(problem, [], np.zeros(0))[0]
    upper, prices = np.inf, np.zeros(len(sides))
    scale = _scale(problem, sides)
    if len(sides) == 1:
        low, high = 0.0, 2.0 * float(scale[0])
        for _ in range(ROUNDS // 2):
            middle = (low + high) / 2
            bound, missed = _priced(problem, sides, np.array([middle]))
            upper = min(upper, bound)
            low, high = (middle, high) if missed[0] > 0 else (low, middle)
        return min(upper, _priced(problem, sides, np.array([0.0]))[0])
    for _ in range(ROUNDS):
        bound, missed = _priced(problem, sides, prices)
        upper = min(upper, bound)
        length = float(((missed * scale) ** 2).sum())
        if length < 1e-24 or upper <= found:
            break
        prices = np.maximum(0.0, prices + scale**2 * missed * (bound - found) / length)
    return upper


# A side of a budget: its costs in this direction [L, kinds before, kinds], and the limit they must not exceed.
Side = tuple[Array, float]


def _sides(problem: Problem) -> list[Side]:
    found: list[Side] = []
    for budget in problem.budgets:
        choices = np.stack([budget.choices(layer) for layer in range(problem.length)])
        if np.isfinite(budget.at_most):
            found.append((choices, budget.at_most - budget.constant))
        if budget.at_least is not None:
            found.append((-choices, budget.constant - budget.at_least))
    return found


def _scale(problem: Problem, sides: list[Side]) -> Array:
    """A price at which a side's costs weigh as much as all worth."""
    gains = [gain[np.isfinite(gain)] for gain in problem.gains]
    worth = sum(float(np.ptp(gain)) for gain in gains if gain.size) or 1.0
    return np.array([worth / max(float(np.ptp(costs)), 1e-300) for costs, _ in sides])


def _priced(problem: Problem, sides: list[Side], prices: Array) -> tuple[float, Array]:
    """The relaxed maximum at these prices, and by how much its placement misses each side."""
    window, kinds = problem.window, problem.kinds
    price = sum((p * costs for p, (costs, _) in zip(prices, sides, strict=True)), np.zeros(()))
    tail, choices = np.zeros((kinds,) * window), []
    for layer in reversed(range(problem.length)):
        fee = price[layer] if price.ndim else 0.0
        value = problem.gains[layer] - fee + tail[None]
        choices.append(value.argmax(axis=-1))
        tail = value.max(axis=-1)
    state, spent = (0,) * window, np.zeros(len(sides))
    for layer, choice in enumerate(reversed(choices)):
        kind = int(choice[state])
        spent += [costs[layer, state[-1], kind] for costs, _ in sides]
        state = (*state[1:], kind)
    limits = np.array([limit for _, limit in sides])
    return float(tail[(0,) * window] + prices @ limits), spent - limits
