"""The solver with budgets equals brute force, keeps what rounding touches, and says so where nothing fits."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from heddle.errors import HeddleError
from heddle.search.placement import Budget, Problem, count_budget, curve, nearest, solve

Layers = tuple[int, ...]


def problem(seed: int, length: int, kinds: int, window: int, **more: object) -> Problem:
    """Random worths, with pair terms of each layer if the seed is odd, and a budget of whole numbers with boundaries."""
    rng = np.random.default_rng(seed)
    each = (length,) if seed % 2 else ()
    cost = rng.integers(1, 9, (length, kinds)).astype(float)
    budget = Budget(
        "bytes", cost, at_most=3 + 5.5 * length, pair=rng.integers(0, 3, (kinds, kinds)) * 1.0, constant=3
    )
    pair = rng.normal(size=(window, *each, kinds, kinds))
    return Problem(rng.normal(size=(length, kinds)), pair, more.get("budgets", (budget,)))  # type: ignore[arg-type]


def every(one: Problem) -> list[tuple[float, Layers]]:
    """All placements within the budgets, the best first."""
    found = []
    for layers in product(range(one.kinds), repeat=one.length):
        costs = one.costs(layers)
        if all(
            budget.at_most >= costs[budget.name]
            and (budget.at_least is None or costs[budget.name] >= budget.at_least)
            for budget in one.budgets
        ):
            found.append((one.value(layers), layers))
    return sorted(found, key=lambda pair: (-pair[0], pair[1]))


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize(("length", "kinds"), [(1, 3), (2, 2), (6, 3), (5, 4)])
def test_the_best_placements_equal_brute_force(length: int, kinds: int, window: int) -> None:
    for seed in range(2):
        one = problem(seed, length, kinds, window)
        wanted, answer = every(one)[:12], solve(one, best=12)
        assert [solution.layers for solution in answer.solutions] == [layers for _, layers in wanted]
        np.testing.assert_allclose([s.value for s in answer.solutions], [value for value, _ in wanted])
        assert answer.certificate.gap == 0
        assert answer.certificate.objective == answer.solutions[0].value


def test_eight_layers_of_three_kinds_with_two_budgets_equal_brute_force() -> None:
    rng = np.random.default_rng(3)
    few = count_budget(1, (8, 3), 3, 2)
    one = problem(4, 8, 3, 2, budgets=(Budget("ms", rng.integers(0, 20, (8, 3)) * 4096.0, 300_000), few))
    answer = solve(one, best=5)
    assert [solution.layers for solution in answer.solutions] == [layers for _, layers in every(one)[:5]]
    assert all(2 <= solution.layers.count(1) <= 3 for solution in answer.solutions)


@pytest.mark.parametrize("window", [1, 2])
def test_the_curve_equals_brute_force(window: int) -> None:
    one = problem(1, 6, 3, window)
    points = curve(one, "bytes")
    best: dict[float, float] = {}
    for value, layers in every(one):
        cost = one.costs(layers)["bytes"]
        best[cost] = max(best.get(cost, -np.inf), value)
    wanted, top = [], -np.inf
    for cost in sorted(best):
        if best[cost] > top:
            top = best[cost]
            wanted.append((cost, top))
    np.testing.assert_allclose([(point.cost, point.solution.value) for point in points], wanted)
    assert all(point.upper == point.solution.value for point in points)


@pytest.mark.parametrize("steps", [7, 40, 1000])
def test_rounded_costs_never_break_the_budget_and_the_bound_holds(steps: int) -> None:
    for seed in range(4):
        rng = np.random.default_rng(seed)
        costs, beside = rng.random((6, 3)), rng.random((3, 3)) / 4
        budget = Budget("ms", costs, at_most=0.1 + 6 * 0.45, pair=beside, constant=0.1, steps=steps)
        one = problem(seed, 6, 3, 1, budgets=(budget, count_budget(0, (6, 3), 4)))
        wanted, answer = every(one), solve(one, best=4)
        found = answer.solutions
        assert all(solution.costs["ms"] <= budget.at_most for solution in found)
        assert answer.certificate.objective <= wanted[0][0] + 1e-12 <= answer.certificate.upper + 1e-9
        less = budget.at_most - answer.certificate.withheld.get("ms", 0.0)
        smaller = [value for value, layers in wanted if one.costs(layers)["ms"] <= less - 1e-12]
        assert not smaller or answer.certificate.objective >= max(smaller) - 1e-12
        for point in curve(one, "ms"):
            true = max(value for value, layers in wanted if one.costs(layers)["ms"] <= point.cost + 1e-12)
            assert point.solution.value <= true + 1e-12 <= point.upper + 1e-9
    if steps == 1000:
        assert answer.certificate.gap < 0.5


def test_equals_come_in_the_order_of_their_layers() -> None:
    one = Problem(np.zeros((4, 2)), None, (count_budget(0, (4, 2), 2, 2),))
    found = [solution.layers for solution in solve(one, best=99).solutions]
    assert found == sorted(layers for layers in product((0, 1), repeat=4) if layers.count(0) == 2)
    assert solve(one, best=99) == solve(one, best=99)


def test_a_forbidden_kind_and_a_forbidden_neighbour_are_not_used() -> None:
    unary, pair = np.zeros((5, 2)), np.zeros((1, 2, 2))
    unary[0, 1] = unary[4, 0] = pair[0, 1, 1] = -np.inf
    found = [solution.layers for solution in solve(Problem(unary, pair), best=99).solutions]
    assert found == [(0, 0, 0, 0, 1), (0, 0, 1, 0, 1), (0, 1, 0, 0, 1)]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_least_violation_equals_brute_force(number: int) -> None:
    rng = np.random.default_rng(number)
    budgets = tuple(
        Budget(f"b{n}", rng.integers(5, 15, (5, 3)).astype(float), at_most=20.0 + n) for n in range(number)
    )
    one = Problem(rng.normal(size=(5, 3)), None, (*budgets, count_budget(2, (5, 3), 2, 2)))
    shares = {
        layers: max(one.over(one.costs(layers)).values())
        for layers in product(range(3), repeat=5)
        if layers.count(2) == 2
    }
    found = nearest(one)
    assert max(one.over(found.costs).values()) == pytest.approx(min(shares.values()))
    with pytest.raises(HeddleError, match=r"misses b0 by .* %") as raised:
        solve(one)
    assert raised.value.code == "nothing-feasible"
    assert str(list(found.layers)) in str(raised.value)


def test_counts_that_no_placement_has_are_named() -> None:
    one = Problem(np.zeros((3, 2)), None, (count_budget(0, (3, 2), 9, 5), count_budget(1, (3, 2), 1, 1)))
    with pytest.raises(HeddleError, match="layers of kind 0"):
        solve(one)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Problem(np.zeros(3)),
        lambda: Problem(np.full((3, 2), np.nan)),
        lambda: Problem(np.zeros((3, 2)), np.zeros((1, 3, 3))),
        lambda: Problem(np.zeros((3, 2)), None, (Budget("ms", np.zeros((2, 2))),)),
        lambda: Problem(np.zeros((3, 2)), None, (Budget("ms", np.zeros((3, 2)), steps=0),)),
        lambda: Problem(np.zeros((3, 2)), None, (Budget("ms", np.zeros((3, 2)), at_least=1, steps=9),)),
        lambda: solve(Problem(np.zeros((3, 2)), None, (Budget("ms", np.full((3, 2), 0.3), at_most=2),))),
        lambda: solve(
            Problem(
                np.zeros((3, 2)), None, (Budget("ms", np.array([[1, 1e9], [1, 3], [1, 1]]), at_most=1e9),)
            )
        ),
        lambda: curve(Problem(np.zeros((3, 2)), None, (count_budget(0, (3, 2), 2, 2),)), "ms"),
    ],
)
def test_what_makes_no_sense_is_refused(make: object) -> None:
    with pytest.raises(HeddleError) as raised:
        make()  # type: ignore[operator]
    assert raised.value.code == "bad-argument"
