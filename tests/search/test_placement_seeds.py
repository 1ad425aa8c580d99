"""Counts that the solver puts to Optuna: simple placements first, then what may be hoped most of, over all counts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench.engine_overhead import Here
from fast_search import fast_file, scored

from heddle.search import run, space
from heddle.search.placement import Budget, Problem, Question, Seen, Timed
from heddle.search.placement.proposals import simple
from heddle.search.placement.seeds import MOST_COUNTS, solved
from heddle.search.progress import Silent
from heddle.search.record import Trial
from heddle.search.seeding import combinations, seeded
from heddle.search.study import open_storage
from heddle.specs import ModelSpec, expand_layers, loads, uniform_layers
from heddle.specs.order import Order

Layers = tuple[str, ...]
KINDS = ("full", "linear")
EVERY = [tuple(KINDS[kind] for kind in one) for one in product((0, 1), repeat=8)]
RNG = np.random.default_rng(2)
TRUTH = Problem(RNG.normal(size=(8, 2)), RNG.normal(size=(1, 8, 2, 2)))
TEXT = """\
version: 1
name: counted
model:
  vocab_size: 256
  hidden_size: 16
  blocks:
    full: {mixer: {kind: attention, heads: 2}, channel: {kind: swiglu}}
    near: {mixer: {kind: attention, heads: 2, window: {choice: [8, 16]}}, channel: {kind: swiglu}}
    rest: {mixer: {kind: lightning, heads: 2}, channel: {kind: swiglu}}
  layers: {placement: {length: 6, of: [full, near, rest], count: {full: {int: [0, 6], step: 2}, near: {int: [0, 3]}}}}
"""
FULL, NEAR, WINDOW = "layers.placement.count.full", "layers.placement.count.near", "blocks.near.mixer.window"


def worth(layers: Layers) -> float:
    return float(TRUTH.value([KINDS.index(name) for name in layers]))


def share(layers: Layers) -> float:
    """Five full layers are as many as keep the budget."""
    return 0.45 + 0.1 * layers.count("full")


def questions(seen: set[Layers], timed: list[Timed], order: Order | None = None) -> list[Question]:
    found = []
    for count in range(9):
        uniform = tuple(uniform_layers(8, "linear", {"full": count}))
        counts = {"full": count, "linear": 8 - count}
        found.append(Question(counts, {}, uniform, seen.__contains__, order or Order(), timed))
    return found


def some(count: int) -> list[Layers]:
    return [EVERY[index] for index in np.random.default_rng(1).permutation(len(EVERY))[:count]]


TIMED = [Timed(one, {}, {"decode_ms": share(one)}) for one in some(12)]


def test_simple_placements_at_the_costliest_counts_within_the_budget_come_first() -> None:
    seen, found = set[Layers](), list[Layers]()
    for _ in range(3):
        layers = solved(questions(seen, TIMED), [])
        assert layers is not None
        found.append(layers)
        seen.add(layers)
    assert found == list(simple(questions(seen, TIMED)[5]))
    # Nothing is known to choose by then.
    assert solved(questions(seen, TIMED), []) is None
    assert solved(questions(set(), []), []) is None


def test_a_simple_placement_that_any_trial_had_does_not_come_again() -> None:
    first = solved(questions(set(), TIMED), [])
    asked = [replace(one, is_placed={first}.__contains__) for one in questions(set(), TIMED)]
    assert solved(asked, []) == simple(asked[5])[1]


def test_a_block_that_the_best_trial_has_none_of_costs_what_it_costs() -> None:
    """A latency model tells what the blocks of a model cost, and nothing of others."""

    def predict(model: ModelSpec, kinds: Sequence[str]) -> list[Budget]:
        have = set(expand_layers(model))
        each = [{"full": 0.4, "near": 0.2, "rest": 0.1}[kind] if kind in have else 0.0 for kind in kinds]
        return [Budget("decode_ms", np.tile(each, (6, 1)), 1.0)]

    file = loads(TEXT)
    known = space.Known([], lambda _: False, predict=predict)
    for best in ({WINDOW: 8, FULL: 0, NEAR: 0}, {WINDOW: 8, FULL: 2, NEAR: 0}, {WINDOW: 8, FULL: 2, NEAR: 2}):
        made = seeded(file, best, known)
        assert made is not None
        cost = sum({"full": 0.4, "near": 0.2, "rest": 0.1}[name] for name in made[1])
        assert 0.9 <= cost <= 1.0 + 1e-9


def test_blocks_one_after_another_keep_the_order_of_layers() -> None:
    order = Order({"full": frozenset({"linear"})})
    for one in questions(set(), [], order)[:8]:
        for layers in simple(one):
            assert sorted(layers) == sorted(one.uniform)
            assert order.keeps(layers) or layers == one.uniform


def test_counts_and_placement_are_those_of_the_best_within_the_budget_once_enough_is_known() -> None:
    trained = some(80)
    history, seen = [Seen(one, {}, worth(one)) for one in trained], set(trained)
    layers = solved(questions(seen, TIMED), history)
    assert layers is not None
    assert layers not in seen
    assert share(layers) <= 1.0
    left = sorted((worth(one) for one in EVERY if one not in seen and share(one) <= 1.0), reverse=True)
    assert worth(layers) >= left[2]
    assert solved(questions(seen, TIMED), history) == layers


def test_counts_to_choose_from_find_room_and_come_closest_first() -> None:
    file = loads(TEXT)
    best = {WINDOW: 16, FULL: 2, NEAR: 1}
    found = list(combinations(file.space, best))
    assert found[0] == best
    assert {(one[FULL], one[NEAR]) for one in found} == {
        (full, near) for full in (0, 2, 4, 6) for near in range(4) if full + near <= 6
    }
    apart = [abs(one[FULL] - 2) + abs(one[NEAR] - 1) for one in found]
    assert apart == sorted(apart)
    deep = loads(
        TEXT.replace("length: 6", "length: 60").replace("[0, 6]", "[0, 60]").replace("[0, 3]", "[0, 60]")
    )
    assert len(list(combinations(deep.space, best))) == MOST_COUNTS
    fixed = loads(TEXT.replace("{int: [0, 6], step: 2}", "2").replace("{int: [0, 3]}", "1"))
    assert list(combinations(fixed.space, {WINDOW: 8})) == []


def test_a_seed_has_counts_alone_and_other_values_stay_with_optuna() -> None:
    file, history = loads(TEXT), list[Seen]()
    rng = np.random.default_rng(0)
    for number in range(16):
        values: dict[str, Any] = {
            WINDOW: (8, 16)[number % 2],
            FULL: 2 * int(rng.integers(2)),
            NEAR: int(rng.integers(4)),
        }
        known = space.Known(history, lambda _: False)
        layers = space.place(file, values, known, seed=0, number=number).layers
        history.append(Seen(layers, space.outer(file, values), float(layers.index("rest"))))
    made = seeded(file, {WINDOW: 16, FULL: 2, NEAR: 1}, known)
    assert made is not None
    counts, layers = made
    assert set(counts) == {FULL, NEAR}
    assert (layers.count("full"), layers.count("near")) == (counts[FULL], counts[NEAR])
    placed = space.place(file, {WINDOW: 8, **counts}, known, seed=0, number=17, start=layers)
    assert placed.layers == layers
    assert made == seeded(file, {WINDOW: 16, FULL: 2, NEAR: 1}, known)


@pytest.mark.parametrize("told", ["all", "seed"])
def test_a_search_of_made_up_landscapes_is_ahead_of_every_simple_way(tmp_path: Path, told: str) -> None:
    bench, out = Path(__file__).parents[1] / "bench", tmp_path / "rows.jsonl"
    ways = ["uniform", "first K", "last K", "random", "heddle search"]
    command = [sys.executable, str(bench / "truth_judge.py"), "--synthetic", "--landscape", "crowded"]
    command += ["--told", told, "--repeats", "12", "--first-seed", "1000", "--out", str(out), "--ways", *ways]
    subprocess.run(command, check=True, capture_output=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    gaps = {(row["impl"], row["budget_quantile"]): row["gap"][-1] for row in rows}
    for quantile in (0.25, 0.5, 0.75):
        own = gaps["heddle search", quantile]
        assert all(own < gaps[way, quantile] for way in ways[:-1]), gaps


class Stopped(BaseException):
    """A driver that ends."""


class Stopping(Silent):
    """Ends the driver when it has asked for so many trials."""

    def __init__(self, after: int) -> None:
        self.left = after

    def trial_started(self, trial: Trial) -> None:  # noqa: ARG002
        self.left -= 1
        if self.left == 0:
            raise Stopped


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_search_that_goes_on_asks_for_the_seeds_of_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    monkeypatch.setattr(run, "Workers", Here)
    file = fast_file(trials=20, sampler=sampler)
    whole = run.search(file, tmp_path / "whole", evaluate=scored, progress=Silent())
    for number, after in enumerate((6, 3, 5)):
        with pytest.raises(Stopped):
            run.search(file, tmp_path / "parts", evaluate=scored, progress=Stopping(after), resume=number > 0)
    parts = run.search(file, tmp_path / "parts", evaluate=scored, progress=Silent(), resume=True)
    assert [(one.params, one.layers) for one in parts.trials] == [
        (one.params, one.layers) for one in whole.trials
    ]
    assert [one.number for one in whole.trials] == list(range(20))
    storage = open_storage(tmp_path / "whole")
    (study,) = storage.get_all_studies()
    fixed = [one.system_attrs.get("fixed_params") for one in storage.get_all_trials(study._study_id)]
    seeds = [number for number, values in enumerate(fixed) if values is not None]
    assert seeds
    assert all(number % 2 == 0 for number in seeds)
