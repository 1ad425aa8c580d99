"""The placements of all counts side by side: the same that a table and a ranking of each count's own give."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice, product

import numpy as np
import pytest

from heddle.search.placement import Budget, History, Problem, Question, Seen, Timed, count_budget
from heddle.search.placement import all_counts as counts_module
from heddle.search.placement.all_counts import most_hoped
from heddle.search.placement.foremost import foremost, in_turn
from heddle.search.placement.near_best import near_best
from heddle.search.placement.proposals import (
    in_order,
    latency_limits,
    likely,
    region_of,
    window_of,
)
from heddle.search.placement.table import Table
from heddle.specs import uniform_layers
from heddle.specs.order import Order

Layers = tuple[str, ...]
KINDS = ("full", "near", "rest")


def ranked(question: Question, history: History, candidates: int) -> list[tuple[int, ...]]:
    """What is looked at of one question: its own table, gone down placement by placement."""
    near = near_best(history, question.kinds, window_of(question))
    assert near is not None
    region = region_of(question, latency_limits(question))
    table = region.widest(near.landscape.mean())
    kept = filter(table.problem.keeps, islice(table.ranked(table.tops), 4 * candidates))
    return list(islice(kept, candidates)) if table.feasible else []


def slowly(questions: list[Question], history: History, candidates: int) -> Layers | None:
    """`most_hoped`, count by count."""
    rows = [(one, row) for one in questions for row in ranked(one, history, candidates)]
    hoped = [np.zeros(0)]
    for question in questions:
        placed = np.array([row for one, row in rows if one is question], dtype=np.int64)
        near = near_best(history, question.kinds, window_of(question))
        assert near is not None
        hoped.append(near.hoped(placed, question.params, question.asked) if len(placed) else np.zeros(0))
    for place in in_order(np.concatenate(hoped)):
        question, row = rows[place]
        layers = tuple(question.kinds[kind] for kind in row)
        if not question.is_seen(layers):
            return layers
    return None


class Case:
    """A made-up history of `trials` trials, and the questions of all its counts. `room` is the share of the trials
    that each of two budgets leaves."""

    def __init__(
        self, seed: int, kinds: int, *, trials: int, room: float | None, order: bool = False
    ) -> None:
        self.rng, self.kinds, self.length = (
            np.random.default_rng(seed),
            KINDS[-kinds:],
            8 if kinds == 2 else 6,
        )
        truth = Problem(self.rng.normal(size=(self.length, kinds)), self._pairs(2, self.length))
        made = [self._drawn() for _ in range(trials)]
        self.history = History.of(
            Seen(one, {"w": int(self.rng.integers(2))}, float(truth.value(self._index(one)))) for one in made
        )
        self.asked = [(self._drawn(), {"w": 1}) for _ in range(2)]
        timed, predicted = list[Timed](), tuple[Budget, ...]()
        if room is not None:
            step, placed = self.rng.normal(size=kinds), np.array([self._index(one) for one in made])
            taken = step[placed].mean(axis=1) + 0.1 * (placed[:, 1:] != placed[:, :-1]).sum(axis=1)
            share = 1.0 + taken - np.quantile(taken, room)
            timed = [Timed(one, {"w": 0}, {"decode": each}) for one, each in zip(made, share, strict=True)]
            cost, pair = np.abs(self.rng.normal(size=(self.length, kinds))), np.abs(self._pairs())
            budget = Budget("prefill", cost, pair=pair)
            predicted = (replace(budget, at_most=float(np.quantile(budget.of(placed), room))),)
        self.order = Order({self.kinds[0]: frozenset({self.kinds[1]})}) if order else Order()
        seen = set(made)
        self.questions = [self._question(counts, seen, timed, predicted) for counts in self._counts()]

    def _pairs(self, *shape: int) -> np.ndarray:
        return self.rng.normal(size=(*shape, len(self.kinds), len(self.kinds)))

    def _drawn(self) -> Layers:
        return tuple(self.rng.choice(self.kinds, size=self.length).tolist())

    def _index(self, layers: Layers) -> list[int]:
        return [self.kinds.index(name) for name in layers]

    def _counts(self) -> list[dict[str, int]]:
        several = product(range(self.length + 1), repeat=len(self.kinds) - 1)
        return [
            dict(zip(self.kinds, (*head, self.length - sum(head)), strict=True))
            for head in several
            if sum(head) <= self.length
        ]

    def _question(
        self, counts: dict[str, int], seen: set[Layers], timed: list[Timed], predicted: tuple[Budget, ...]
    ) -> Question:
        last = self.kinds[-1]
        even = tuple(uniform_layers(self.length, last, {name: counts[name] for name in self.kinds[:-1]}))
        return Question(
            counts, {"w": 1}, even, seen.__contains__, self.order, timed, predicted, asked=self.asked
        )


@pytest.fixture(autouse=True)
def coarse_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps of a budget: small tables, and much that rounding alone puts outside."""
    monkeypatch.setattr("heddle.search.placement.proposals.STEPS", 8)


@pytest.mark.parametrize("trials", [5, 40])
@pytest.mark.parametrize("room", [None, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("kinds", [2, 3])
def test_all_counts_at_once_choose_what_each_count_alone_does(
    kinds: int, room: float | None, trials: int
) -> None:
    for seed in range(2):
        case = Case(seed, kinds, trials=trials, room=room)
        for candidates in (4, 30):
            known = slowly(case.questions, case.history, candidates)
            assert most_hoped(case.questions, case.history, candidates) == known
        for question in case.questions[::3]:
            drawn = near_best(case.history, question.kinds, window_of(question)).landscape.mean()
            told = likely(region_of(question, latency_limits(question)), drawn, 8)
            assert [tuple(one) for one in told.tolist()] == ranked(question, case.history, 8)


def test_more_steps_change_nothing_but_what_is_gone_through() -> None:
    gone_through = {False: 0, True: 0}
    for seed, room in product(range(3), (0.05, 0.2)):
        case = Case(seed, 2, trials=30, room=room)
        for question in case.questions:
            drawn = near_best(case.history, question.kinds, window_of(question)).landscape.mean()
            region, kept = region_of(question, latency_limits(question)), dict[bool, list[tuple[int, ...]]]()
            for is_finer in (False, True):
                table = (region.finer(drawn.window) if is_finer else region).widest(drawn)
                listed = list(table.ranked(table.tops))
                kept[is_finer] = [one for one in listed if table.problem.keeps(one)]
                gone_through[is_finer] += len(listed)
            assert kept[False] == kept[True]
            assert region.is_over() <= (not kept[True])
    assert gone_through[True] < 0.8 * gone_through[False]


@pytest.mark.parametrize("cause", ["an order of layers", "neighbours alone", "too large a table"])
def test_counts_that_one_table_does_not_hold_choose_the_same(
    cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(0, 2, trials=30, room=0.5, order=cause == "an order of layers")
    if cause == "neighbours alone":
        for module in ("proposals", "all_counts"):
            window = f"heddle.search.placement.{module}.window_of"
            monkeypatch.setattr(window, lambda question: 1 + question.counts["near"] % 2)
        monkeypatch.setattr(f"{__name__}.window_of", lambda question: 1 + question.counts["near"] % 2)
    if cause == "too large a table":
        monkeypatch.setattr(counts_module, "CELLS", 10)
    known = slowly(case.questions, case.history, 20)
    assert known is not None
    assert most_hoped(case.questions, case.history, 20) == known


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("kinds", [2, 3])
def test_the_foremost_are_the_first_of_the_ranking(
    kinds: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, length = np.random.default_rng(kinds), 7
    for ties in (False, True):
        # Whole worths make many ties, and sums that are exact.
        scale = 1.0 if ties else 2.0**20
        unary = np.rint(scale * rng.normal(size=(length, kinds)))
        unary[2, 0] = -np.inf
        pair = np.rint(scale * rng.normal(size=(window, length, kinds, kinds)))
        rounded = Budget("ms", np.abs(rng.normal(size=(length, kinds))), 4.0, steps=12)
        problem = Problem(unary, pair, (count_budget(0, (length, kinds), 4, 4), rounded))
        table = Table(problem)
        starts = np.array([table.tops, table.start, (2, table.tops[1]), (0, 0)])
        for start, found in zip(starts, foremost(table, starts, 25), strict=True):
            assert [tuple(one) for one in found.tolist()] == list(islice(table.ranked(tuple(start)), 25))
        monkeypatch.setattr("heddle.search.placement.foremost.AT_ONCE", (3, 40))
        assert list(in_turn(table)) == [one for one in table.ranked(table.tops) if problem.keeps(one)]
    bare = Table(Problem(unary, pair))
    (found,) = foremost(bare, np.zeros((1, 0), dtype=np.int64), 10)
    assert [tuple(one) for one in found.tolist()] == list(islice(bare.ranked(), 10))
