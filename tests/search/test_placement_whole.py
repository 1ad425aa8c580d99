"""Where the numbers of layers are open, the solver chooses them with the placement."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
import pytest

from heddle.search.learnt import Learnt
from heddle.search.placement import QualityModel, Seen, Timed, WholeQuestion, propose_whole
from heddle.search.placement.limits import count_limits
from heddle.search.record import Score, Trial
from heddle.search.solved import count_ranges, solved
from heddle.search.space import candidate
from heddle.specs import SpecFile, loads

KINDS, LENGTH = ("linear", "full", "wide"), 4
EVERY = list(product(KINDS, repeat=LENGTH))
SHARE = {"linear": 0.1, "full": 0.3, "wide": 0.2}


def share(layers: tuple[str, ...]) -> float:
    return 0.1 + sum(SHARE[kind] for kind in layers)


def worth(layers: tuple[str, ...]) -> float:
    return sum((1 + place) * (kind == "full") + 0.5 * (kind == "wide") for place, kind in enumerate(layers))


@pytest.fixture(scope="module")
def history() -> list[Seen]:
    rng = np.random.default_rng(0)
    return [Seen(EVERY[place], {}, worth(EVERY[place])) for place in rng.permutation(len(EVERY))[:12]]


def question(ranges: Mapping[str, tuple[int, int]], seen: set[tuple[str, ...]], **more: Any) -> WholeQuestion:
    return WholeQuestion(KINDS, LENGTH, ranges, [{}], lambda _, layers: layers in seen, **more)


def test_every_placement_within_ranges_and_budget_comes_once_and_no_other(history: list[Seen]) -> None:
    ranges = {"linear": (1, 4), "full": (0, 2), "wide": (1, 3)}
    timed = [Timed(one.layers, {}, {"decode": share(one.layers)}) for one in history]
    (limit,) = count_limits(timed, KINDS, LENGTH, {})
    lawful = {
        layers
        for layers in EVERY
        if all(low <= layers.count(kind) <= high for kind, (low, high) in ranges.items())
        and limit.constant + sum(limit.each[KINDS.index(kind)] for kind in layers) <= 1.0
    }
    # The fit is that of the true shares, to a hair of the ridge.
    assert {one for one in lawful if share(one) > 1.01} == set()
    seen: set[tuple[str, ...]] = set()
    while found := propose_whole(question(ranges, seen, timed=timed), history, seed=1, number=len(seen)):
        assert found[1] in lawful - seen
        seen.add(found[1])
    assert seen == lawful


def test_a_drawn_landscape_is_maximised_over_all_counts(history: list[Seen]) -> None:
    found = propose_whole(question(dict.fromkeys(KINDS, (0, 4)), set()), history, seed=3, number=5)
    assert found is not None
    unary, pair = QualityModel(KINDS, LENGTH, history).draw(np.random.default_rng([3, 5, 1]))

    def value(layers: tuple[str, ...]) -> float:
        index = [KINDS.index(kind) for kind in layers]
        return float(unary[range(LENGTH), index].sum() + pair[index[:-1], index[1:]].sum())

    assert found[1] == max(EVERY, key=value)


def test_the_setting_that_scores_better_is_chosen(history: list[Seen]) -> None:
    told = [Seen(one.layers, {"a": str(n % 2)}, one.quality + 9.0 * (n % 2)) for n, one in enumerate(history)]
    asked = WholeQuestion(
        KINDS, LENGTH, dict.fromkeys(KINDS, (0, 4)), [{"a": "0"}, {"a": "1"}], lambda *_: False
    )
    for number in range(4):
        found = propose_whole(asked, told, seed=0, number=number)
        assert found is not None
        assert found[0] == 1


TEXT = """\
version: 1
name: whole
model:
  vocab_size: 256
  hidden_size: 16
  blocks:
    linear: {mixer: {kind: gated_deltanet, heads: 2}, channel: {kind: swiglu, ratio: RATIO}}
    full: {mixer: {kind: attention, heads: 2}, channel: {kind: swiglu}}
  layers: {placement: {length: 5, of: [linear, full], count: {full: COUNT}}}
tokenizer: bytes
data: {source: corpus.txt, sequence_length: 32}
search: {tasks: [text], trials: 8, budgets: [{decode_ms: {at_most: 1.0, batch: 1, context: 64}}]}
"""


def spec(count: str = "{int: [1, 3]}", ratio: str = "2.0") -> SpecFile:
    return loads(TEXT.replace("COUNT", count).replace("RATIO", ratio))


def learnt(file: SpecFile, *trials: tuple[str, dict[str, Any], float | None]) -> Learnt:
    """What trials with these layers (letters), values and qualities say; one without a quality is over its budget."""
    made = {}
    for number, (letters, values, quality) in enumerate(trials):
        layers = tuple("full" if letter == "F" else "linear" for letter in letters)
        scores = {} if quality is None else {"text": scored(quality)}
        over = {"decode": 0.3 * letters.count("F") - 0.75}
        state = "infeasible" if quality is None else "complete"
        own = (number, state, values, layers, str(number), 0, "", 1, scores, {}, over, None, 1, 0.0, None)
        made[number] = Trial(*own)
    return Learnt(file).until(len(made), made)


def scored(quality: float) -> Score:
    return Score("text", "bits_per_byte", 8.0, 0.1, 1, quality, 0, 1, 1, 0.0, ())


def of(count: int, **more: Any) -> dict[str, Any]:
    return {"layers.placement.count.full": count, **more}


RUNS = (
    ("LLLLF", of(1), 0.2),
    ("FLLLL", of(1), 0.1),
    ("LLFLF", of(2), 0.4),
    ("FFLLL", of(2), 0.2),
    ("FFFLL", of(3), None),
)


def test_a_trial_of_the_solver_keeps_ranges_budget_and_space() -> None:
    file = spec()
    said = learnt(file, *RUNS)
    asked = {candidate(file, of(2), ("linear", "linear", "linear", "full", "full")).hash}
    for number in range(5, 12):
        one = solved(file, said, number, asked.__contains__, seed=0)
        assert one is not None
        assert one.values == of(one.layers.count("full"))
        # Three full layers were over the budget each time.
        assert 1 <= one.layers.count("full") <= 2
        made = candidate(file, one.values, one.layers)
        assert made.hash not in asked
        asked.add(made.hash)


def test_optuna_draws_where_there_is_nothing_to_solve() -> None:
    def nothing(_: str) -> bool:
        return False

    file = spec()
    # Too few trained trials; a number that is given; numbers in steps.
    assert solved(file, learnt(file, *RUNS[:2]), 5, nothing, seed=0) is None
    assert solved(spec("2"), learnt(spec("2"), *(("LLFLF", {}, 0.1),) * 4), 5, nothing, seed=0) is None
    assert count_ranges(spec("{int: [1, 3], step: 2}").space) is None
    # Every second trial where something else is open too.
    both = spec(ratio="{choice: [1.0, 2.0]}")
    name = "blocks.linear.channel.ratio"
    said = learnt(both, *((layers, {**values, name: 2.0}, quality) for layers, values, quality in RUNS))
    assert solved(both, said, 6, nothing, seed=0) is None
    one = solved(both, said, 7, nothing, seed=0)
    assert one is not None
    assert one.values[name] == "2.0"
