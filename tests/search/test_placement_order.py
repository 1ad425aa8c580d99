"""A search puts no layer before what it takes from, and says so of the placement that it tries first."""

from __future__ import annotations

from itertools import pairwise, permutations

import numpy as np
import pytest

from heddle.compose.plan import plan
from heddle.search.placement import Question, Seen, best_assignment, propose
from heddle.search.space import Known, place, uniform
from heddle.specs import loads
from heddle.specs.order import Order

ORDER = Order({"taker": frozenset({"full"}), "late": frozenset({"taker"})}, {"taker": frozenset({"full"})})
KINDS = ("taker", "full", "late")
COUNTS = {"taker": 2, "full": 2, "late": 1}
LAWFUL = {
    one
    for one in permutations([kind for kind, count in COUNTS.items() for _ in range(count)])
    if ORDER.keeps(one)
}


@pytest.mark.parametrize("seed", range(4))
def test_the_solver_equals_brute_force_over_the_orders_that_are_kept(seed: int) -> None:
    rng = np.random.default_rng(seed)
    unary, pair = rng.normal(size=(5, 3)), rng.normal(size=(3, 3))

    def value(layers: tuple[str, ...]) -> float:
        index = [KINDS.index(name) for name in layers]
        return float(sum(unary[range(5), index]) + sum(pair[a, b] for a, b in pairwise(index)))

    def allows(used: tuple[int, ...], kind: int) -> bool:
        return ORDER.allows(KINDS[kind], dict(zip(KINDS, used, strict=True)), COUNTS)

    found = tuple(KINDS[kind] for kind in best_assignment(unary, pair, list(COUNTS.values()), allows))
    assert found in LAWFUL
    assert value(found) == pytest.approx(max(map(value, LAWFUL)))


def test_every_order_that_is_kept_comes_once_and_no_other() -> None:
    seen: set[tuple[str, ...]] = set()
    first = tuple(ORDER.mended(["late", "taker", "full", "taker", "full"]))
    for number in range(len(LAWFUL)):
        question = Question(COUNTS, {}, first, seen.__contains__, order=ORDER)
        layers = propose(question, [Seen(one, {}, 0.5) for one in seen], seed=1, number=number)
        assert layers in LAWFUL - seen
        seen.add(layers)
    assert seen == LAWFUL


TEXT = """\
version: 1
name: placed
model:
  vocab_size: 256
  hidden_size: 16
  blocks:
    full: {mixer: {kind: attention, heads: 2}, channel: {kind: none}}
    taker: {mixer: {kind: attention, heads: 2, keys_from: full}, channel: {kind: none}}
  layers: {placement: {length: 4, of: [taker, full], count: {full: {int: [1, 2]}}}}
search: {tasks: [text]}
"""


def test_no_trial_of_a_search_is_a_model_that_cannot_be_built() -> None:
    file = loads(TEXT)
    for count in (1, 2):
        values, asked = {"layers.placement.count.full": count}, set[str]()
        assert uniform(file, values)[0] == "full"
        # Of the four or six places the full layers can have, those with a full layer first.
        for number in range((1, 3)[count - 1]):
            one = place(file, values, Known([], asked.__contains__), seed=0, number=number)
            plan(one.model)
            assert one.hash not in asked
            asked.add(one.hash)
