"""Proposals within latency budgets and near the best found: exact, reproducible, and none is left out for ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise, permutations

import numpy as np
import pytest

from heddle.search.placement import Budget, Question, Seen, Timed, propose
from heddle.search.placement.limits import TimedTrials, latency_budgets
from heddle.search.placement.proposals import PATIENCE, latency_limits, region_of, trust_budget
from heddle.search.placement.table import Table
from heddle.specs import uniform_layers
from heddle.specs.order import Order

Layers = tuple[str, ...]
COUNTS = {"full": 3, "linear": 5}
UNIFORM = tuple(uniform_layers(8, "linear", {"full": 3}))
EVERY = sorted({*permutations(["full"] * 3 + ["linear"] * 5)})


def share(layers: Layers, width: int = 1) -> float:
    """A latency whose boundaries cost: the fewer changes of kind, the faster."""
    return 0.8 + 0.05 * sum(a != b for a, b in pairwise(layers)) + 0.1 * (width - 1)


def timings(number: int, seed: int = 0) -> list[Timed]:
    rng = np.random.default_rng(seed)
    chosen = [EVERY[index] for index in rng.permutation(len(EVERY))[:number]]
    return [Timed(one, {"width": 1}, {"decode_ms": share(one)}) for one in chosen]


def asked(seen: set[Layers], timed: list[Timed], order: Order | None = None) -> Question:
    return Question(COUNTS, {"width": 1}, UNIFORM, seen.__contains__, order or Order(), timed)


def test_the_latency_model_finds_what_boundaries_cost_and_what_a_parameter_does() -> None:
    timed = [
        Timed(one.layers, {"width": w}, {"decode_ms": share(one.layers, w)})
        for one in timings(20)
        for w in (1, 2)
    ]
    for width in (1, 2):
        (budget,) = latency_budgets(timed, COUNTS, {"width": width}, 64)
        for layers in EVERY:
            index = [tuple(COUNTS).index(name) for name in layers]
            assert float(budget.of(index)) == pytest.approx(share(layers, width), abs=5e-3)


def test_a_value_that_was_timed_once_says_nothing_of_others() -> None:
    # As of an open float, which has nothing to do with what is timed here: counts alone decide it.
    rng = np.random.default_rng(3)
    placed = [
        tuple(rng.permutation(["full"] * count + ["linear"] * (8 - count)).tolist())
        for count in (1, 2, 3, 4, 5, 6) * 2
    ]
    timed = [
        Timed(one, {"rate": float(rng.random())}, {"decode_ms": 0.4 + 0.1 * one.count("full")})
        for one in placed
    ]
    for count in range(1, 7):
        (budget,) = latency_budgets(timed, {"full": count, "linear": 8 - count}, {"rate": 0.5}, 64)
        first = [0] * count + [1] * (8 - count)
        assert float(budget.of(first)) == pytest.approx(0.4 + 0.1 * count, abs=0.02)


def test_timings_as_they_come_are_fitted_as_all_of_them_together() -> None:
    grown = TimedTrials()
    for count, one in enumerate(timings(12), start=1):
        grown.append(one)
        for width in (1, 2):
            mine, whole = (
                latency_budgets(timed, COUNTS, {"width": width}, 64) for timed in (grown, timings(12)[:count])
            )
            assert [repr(budget) for budget in mine] == [repr(budget) for budget in whole]


def test_a_budget_that_nothing_keeps_is_passed_over_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # One that rounding alone would let in takes the solver down a whole ranking.
    slow = [Timed(one.layers, one.params, {"decode_ms": 1.0 + share(one.layers)}) for one in timings(20)]
    gone_through = list[int]()
    whole = Table.ranked

    def counted(self: Table, start: tuple[int, ...] | None = None) -> Iterator[tuple[int, ...]]:
        for one in whole(self, start):
            gone_through.append(1)
            yield one

    monkeypatch.setattr(Table, "ranked", counted)
    question = asked(set(), slow)
    assert region_of(question, latency_limits(question)).is_over()
    assert not region_of(asked(set(), timings(20)), latency_limits(asked(set(), timings(20)))).is_over()
    seen = [Seen(one, {"width": 1}, float(one.index("full"))) for one in EVERY[::4]]
    layers = propose(asked({one.layers for one in seen}, slow), seen, seed=0, number=0)
    assert layers not in {one.layers for one in seen}
    assert len(gone_through) < 4


def test_a_handful_of_timings_is_needed() -> None:
    assert latency_budgets(timings(3), COUNTS, {"width": 1}, 64) == ()


def test_no_placement_predicted_over_the_budget_comes_while_another_is_left() -> None:
    timed, seen, order = timings(20), set[Layers](), list[Layers]()
    (budget,) = latency_budgets(timed, COUNTS, {"width": 1}, 64)
    fits: Callable[[Layers], bool] = lambda one: (  # noqa: E731
        budget.excess(budget.of([tuple(COUNTS).index(name) for name in one])) == 0
    )
    within = {one for one in EVERY if fits(one)}
    assert 5 < len(within) < len(EVERY) - 5
    assert UNIFORM not in within
    for number in range(len(within) + 2):
        history = [Seen(one, {"width": 1}, share(one)) for one in order]
        layers = propose(asked(seen, timed), history, seed=2, number=number)
        assert layers not in seen
        seen.add(layers)
        order.append(layers)
    assert {*order[: len(within)]} == within
    # Then come the others.
    assert not {*order[len(within) :]} & within


def test_within_a_budget_the_order_of_layers_is_kept() -> None:
    order = Order({"full": frozenset({"linear"})})
    uniform = tuple(order.mended(UNIFORM))
    timed, seen = timings(20), set[Layers]()
    for number in range(12):
        question = Question(COUNTS, {"width": 1}, uniform, seen.__contains__, order, timed)
        layers = propose(
            question, [Seen(one, {"width": 1}, 0.5) for one in sorted(seen)], seed=0, number=number
        )
        assert order.keeps(layers)
        assert layers not in seen
        seen.add(layers)


def test_equal_questions_have_equal_answers() -> None:
    history = [Seen(one, {"width": 1}, 0.1 * place) for place, one in enumerate(EVERY[:7])]
    seen = {UNIFORM, *EVERY[:7]}
    first = [propose(asked(seen, timings(9)), history, seed=3, number=n) for n in range(6)]
    assert first == [propose(asked(seen, timings(9)), history, seed=3, number=n) for n in range(6)]


def test_the_trust_region_shrinks_around_the_best_and_opens_again() -> None:
    best = EVERY[10]
    others = [one for one in EVERY if one != best]
    question = asked(set(), [])

    def widths(fails: int) -> float | None:
        history = [Seen(best, {"width": 1}, 0.9), *(Seen(one, {"width": 1}, 0.1) for one in others[:fails])]
        found = trust_budget(question, history)
        return None if found is None else found.at_most

    assert [widths(PATIENCE * turn) for turn in range(4)] == [None, 4, 2, None]
    # What was found with other parameters says nothing of these.
    assert trust_budget(question, [Seen(best, {"width": 2}, 0.9)] * 9) is None
    history = [
        Seen(best, {"width": 1}, 0.9),
        *(Seen(one, {"width": 1}, 0.1) for one in others[: 2 * PATIENCE]),
    ]
    seen = {UNIFORM, *(one.layers for one in history)}
    for number in range(5):
        layers = propose(asked(seen, []), history, seed=1, number=number)
        assert sum(a != b for a, b in zip(layers, best, strict=True)) == 2


def test_tables_that_would_be_too_large_end_no_trial() -> None:
    # 24 layers of three kinds, two budgets, and the layers that differ from the best: 2.3e8 cells at 64 steps each.
    counts = {"a": 3, "b": 3, "rest": 18}
    uniform = tuple(uniform_layers(24, "rest", {"a": 3, "b": 3}))
    rng = np.random.default_rng(0)
    history = [
        Seen(tuple(rng.permutation(list(uniform)).tolist()), {}, -float(number)) for number in range(6)
    ]
    seen = {one.layers for one in history}
    cost = rng.uniform(1.0, 2.0, size=(24, 3)) / 40
    predicted = [
        Budget(name, cost, 1.0, pair=rng.uniform(size=(3, 3)) / 1000) for name in ("decode", "prefill")
    ]
    asked = Question(counts, {}, uniform, seen.__contains__, predicted=predicted)
    assert trust_budget(asked, history) is not None
    for number in range(6, 8):
        layers = propose(asked, history, seed=0, number=number)
        assert sorted(layers) == sorted(uniform)
        assert layers not in seen
