"""Placement: the solver is exact, and the proposals are fresh, reproducible and learn from the run."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, permutations
from math import comb

import numpy as np
import pytest

from heddle.search.placement import QualityModel, Question, Seen, best_assignment, propose
from heddle.search.placement.proposals import simple
from heddle.specs import uniform_layers


def value_of(kinds: tuple[int, ...], unary: np.ndarray, pair: np.ndarray) -> float:
    alone = sum(unary[layer, kind] for layer, kind in enumerate(kinds))
    return float(alone + sum(pair[a, b] for a, b in pairwise(kinds)))


@pytest.mark.parametrize(
    "counts", [(0, 1), (1, 0), (2, 4), (6, 0), (1, 1, 1), (3, 2, 2), (0, 3, 3), (1, 2, 1, 2)]
)
@pytest.mark.parametrize("seed", range(4))
def test_the_solver_equals_brute_force(counts: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    length, kinds = sum(counts), len(counts)
    unary, pair = rng.normal(size=(length, kinds)), rng.normal(size=(kinds, kinds))
    multiset = [kind for kind, count in enumerate(counts) for _ in range(count)]
    best = max(value_of(one, unary, pair) for one in set(permutations(multiset)))
    found = best_assignment(unary, pair, counts)
    assert [found.count(kind) for kind in range(kinds)] == list(counts)
    assert value_of(tuple(found), unary, pair) == pytest.approx(best, abs=1e-12)


def test_the_solver_takes_a_deep_model_with_three_kinds() -> None:
    rng = np.random.default_rng(0)
    found = best_assignment(rng.normal(size=(48, 3)), rng.normal(size=(3, 3)), (8, 8, 32))
    assert [found.count(kind) for kind in range(3)] == [8, 8, 32]


def question(seen: set[tuple[str, ...]], length: int = 8, full: int = 2) -> Question:
    counts = {"full": full, "linear": length - full}
    uniform = tuple(uniform_layers(length, "linear", {"full": full}))
    return Question(counts, {}, uniform, seen.__contains__)


def test_the_first_placements_of_a_search_are_simple_ones_by_turns() -> None:
    first, last = ("full",) * 2 + ("linear",) * 6, ("linear",) * 6 + ("full",) * 2
    found = [propose(question(set()), [], seed=0, number=number) for number in range(4)]
    assert found == [question(set()).uniform, last, first, question(set()).uniform]
    # One that was asked for is passed over.
    assert propose(question({last}), [], seed=0, number=1) == first


def test_the_start_of_a_question_goes_before_all_else_where_it_is_new_and_has_its_counts() -> None:
    start = ("linear", "full", "full", *("linear",) * 5)
    asked = replace(question(set()), start=start)
    assert propose(asked, [], seed=0, number=0) == start
    assert propose(replace(asked, is_seen={start}.__contains__), [], seed=0, number=0) != start
    assert propose(replace(asked, start=("full",) * 8), [], seed=0, number=0).count("full") == 2


def test_no_placement_comes_twice_until_all_have_come() -> None:
    seen: set[tuple[str, ...]] = set()
    history: list[Seen] = []
    for number in range(comb(6, 2)):
        layers = propose(question(seen, length=6), history, seed=1, number=number)
        assert layers not in seen
        assert layers.count("full") == 2
        seen.add(layers)
        history.append(Seen(layers, {}, 0.5))
    assert propose(question(seen, length=6), history, seed=1, number=99) in seen


def test_equal_history_and_seed_give_equal_proposals() -> None:
    history = [Seen(one, {"width": 4}, 0.3) for one in simple(question(set()))]
    asked = question({one.layers for one in history})
    first = [propose(asked, history, seed=7, number=n) for n in range(5)]
    again = [propose(asked, history, seed=7, number=n) for n in range(5)]
    other = [propose(asked, history, seed=8, number=n) for n in range(5)]
    assert first == again
    assert first != other


def test_the_model_learns_where_full_layers_pay() -> None:
    """Quality is the mean position of the full layers: a draw after 30 random trials places them late."""
    rng = np.random.default_rng(0)
    history = []
    for _ in range(30):
        places = rng.choice(12, size=3, replace=False)
        layers = tuple("full" if layer in places else "linear" for layer in range(12))
        history.append(Seen(layers, {}, float(places.mean()) / 11))
    unary, pair = QualityModel(("full", "linear"), 12, history).draw(np.random.default_rng(1))
    found = best_assignment(unary, pair, (3, 9))
    assert np.mean([layer for layer, kind in enumerate(found) if kind == 0]) > 8


def test_another_parameter_is_not_mistaken_for_the_placement() -> None:
    """Full layers were placed late only where the width was good: the width explains the quality."""
    history = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        good = seed % 2 == 0
        places = rng.choice(8, size=2, replace=False)
        layers = tuple("full" if layer in places else "linear" for layer in range(8))
        history.append(Seen(layers, {"width": 64 if good else 32}, 0.9 if good else 0.1))
    model = QualityModel(("full", "linear"), 8, history)
    assert np.abs(model.mean[:8]).max() < np.abs(model.mean[-2:]).max()


def test_three_kinds_are_placed_together() -> None:
    counts = {"full": 1, "window": 2, "linear": 5}
    uniform = tuple(uniform_layers(8, "linear", {"full": 1, "window": 2}))
    seen: set[tuple[str, ...]] = set()
    for number in range(6):
        layers = propose(Question(counts, {}, uniform, seen.__contains__), [], seed=0, number=number)
        assert {kind: layers.count(kind) for kind in counts} == counts
        seen.add(layers)
    assert len(seen) == 6
