"""The loop of predicting, evaluating and solving again: it learns pairs, keeps the budgets, ends where it is right."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest

from heddle.errors import HeddleError
from heddle.search.placement import Budget, Problem, count_budget
from heddle.search.placement.landscape import Landscape
from heddle.search.placement.loop import Effort, Found, Loop

LENGTH = 8
SHAPE = (LENGTH, 2)
BUDGETS = (count_budget(1, SHAPE, 3, 3),)
RNG = np.random.default_rng(5)
TRUTH = Problem(RNG.normal(size=SHAPE), RNG.normal(size=(2, LENGTH, 2, 2)), BUDGETS)
EVERY = [one for one in product((0, 1), repeat=LENGTH) if sum(one) == 3]


def found(effort: Effort, budgets: tuple[Budget, ...] = BUDGETS, seed: int = 0) -> Found:
    def evaluate(rows: Sequence[tuple[int, ...]]) -> list[float]:
        return [float(TRUTH.value(one)) for one in rows]

    return Loop(evaluate, SHAPE, budgets, effort, seed=seed).run()


def test_the_landscape_predicts_what_it_did_not_see_better_with_pairs() -> None:
    chosen = np.array(EVERY)[np.random.default_rng(0).permutation(len(EVERY))]
    values = TRUTH.value(chosen)
    errors = []
    for window in (1, 2):
        model = Landscape(chosen[:36], values[:36], 2, window)
        predicted = np.array([model.predicted(one) for one in chosen[36:]])
        errors.append(float(np.abs(predicted - values[36:]).mean()))
    spread = float(np.abs(values - values[:36].mean()).mean())
    assert errors[1] < errors[0] < spread


def test_draws_agree_with_what_was_seen_and_differ_elsewhere() -> None:
    chosen, rng = np.array(EVERY[:20]), np.random.default_rng(0)
    model = Landscape(chosen, TRUTH.value(chosen), 2, 2)
    draws = [model.draw(rng).value(np.array(EVERY)) + model.centre for _ in range(40)]
    spread = np.std(draws, axis=0)
    assert spread[:20].max() < 0.5 * np.median(spread[20:])
    mean = np.array([model.predicted(one) for one in EVERY])
    # The mean of 40 draws strays from the mean by a sixth of their spread.
    assert np.all(np.abs(np.mean(draws, axis=0) - mean) < 5 * spread / np.sqrt(40) + 1e-9)


def test_the_loop_finds_the_optimum_and_says_that_predicted_and_real_agree() -> None:
    one = found(Effort(len(EVERY), batch=6, expected=3))
    assert one.value == pytest.approx(max(float(TRUTH.value(layers)) for layers in EVERY))
    assert one.agreed
    assert len(one.evaluated) < len(EVERY)
    assert one.rounds[-1].best == one.value
    assert np.isnan(one.rounds[0].predicted)


def test_nothing_is_evaluated_twice_and_all_keeps_the_budgets() -> None:
    one = found(Effort(999, batch=8, tolerance=-1.0))
    assert {layers for layers, _ in one.evaluated} == {*EVERY}
    assert len(one.evaluated) == len(EVERY)
    assert not one.agreed


def test_equal_seeds_evaluate_equal_placements() -> None:
    effort = Effort(16, batch=4, expected=2)
    assert found(effort).evaluated == found(effort).evaluated
    assert found(effort).evaluated != found(effort, seed=1).evaluated


def test_budgets_that_nothing_keeps_are_told() -> None:
    with pytest.raises(HeddleError) as raised:
        found(Effort(8), (*BUDGETS, count_budget(0, SHAPE, 1)))
    assert raised.value.code == "nothing-feasible"
