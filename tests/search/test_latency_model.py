"""The latency model: its design meets everything, its fit finds exact tables again, its margin covers."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from heddle.errors import HeddleError
from heddle.search.latency import Effort, Place
from heddle.search.latency_model.design import Design, columns, design, matrix
from heddle.search.latency_model.fit import (
    conformal,
    constant,
    fit,
    held_out,
    line,
    non_negative,
    spearman,
)
from heddle.search.latency_model.measuring import How, Site, fit_model
from heddle.search.latency_model.model import RANDOM, load_model
from heddle.search.latency_model.stacks import Stack, labels_of, stack_of
from heddle.search.objectives import asked_of
from heddle.specs import SpecFile, loads

SPACE = """
version: 1
name: space
model:
  vocab_size: 256
  hidden_size: 32
  context_length: 256
  blocks:
    near: {mixer: {kind: attention, heads: 2, window: {choice: [8, 16]}}, channel: {kind: gelu, ratio: 1.0}}
    mid: {mixer: {kind: gla, heads: 2}, channel: {kind: gelu, ratio: 1.0}}
    full: {mixer: {kind: attention, heads: 2}, channel: {kind: gelu, ratio: 1.0}}
  layers: {placement: {length: 6, of: [near, mid, full], count: {full: {int: [1, 3]}, mid: {int: [0, 2]}}}}
search: {tasks: [mqar], budgets: [{decode_ms: {at_most: 1.0, context: 64}}]}
"""


@pytest.fixture(scope="module")
def space() -> SpecFile:
    return loads(SPACE)


@pytest.fixture(scope="module")
def drawn(space: SpecFile) -> Design:
    return design(space)


def table(stacks: tuple[Stack, ...]) -> dict[tuple[str, ...], float]:
    """Made-up milliseconds for everything the stacks have."""
    rng = np.random.default_rng(3)
    sizes = {"frame": (0.5, 0.6), "term": (0.1, 1.0), "pair": (-0.05, 0.05)}
    return {name: float(rng.uniform(*sizes[name[0]])) for name in columns(stacks)}


def times(stacks: tuple[Stack, ...], of: dict[tuple[str, ...], float]) -> np.ndarray:
    return matrix(stacks, list(of)) @ np.array(list(of.values()))


def test_a_design_meets_every_term_at_several_places_and_next_to_every_other(drawn: Design) -> None:
    names = columns(drawn.fitted)
    assert len(drawn.fitted) == 3 * len(names)
    assert Counter(name[0] for name in names) == {"frame": 1, "term": 4, "pair": 5}
    # The two windows are options of one block, and never stand in one stack.
    for term in {term for stack in drawn.fitted for term in stack.terms}:
        thirds = {
            3 * place // len(stack.terms)
            for stack in drawn.fitted
            for place, one in enumerate(stack.terms)
            if one == term
        }
        assert thirds == {0, 1, 2}
    assert all(
        sum(stack.pairs[name[1:]] > 0 for stack in drawn.fitted) >= 3 for name in names if name[0] == "pair"
    )


def test_held_out_stacks_are_of_the_space_and_not_of_the_design(space: SpecFile, drawn: Design) -> None:
    assert len(drawn.held_out) == len({stack.hash for stack in drawn.held_out}) == 30
    assert not {stack.hash for stack in drawn.fitted} & {stack.hash for stack in drawn.held_out}
    for stack in drawn.held_out:
        counts = Counter(stack.blocks)
        assert (1 <= counts["full"] <= 3, counts["mid"] <= 2, len(stack.blocks)) == (True, True, 6)
    small, again, other = (design(space, stacks=10, held_out=3, seed=seed) for seed in (0, 0, 1))
    assert small == again != other


def test_a_space_of_few_specs_is_refused() -> None:
    text = SPACE.replace(
        "length: 6, of: [near, mid, full], count: {full: {int: [1, 3]}, mid: {int: [0, 2]}}",
        "length: 1, of: [near, full], count: {full: 0}",
    )
    with pytest.raises(HeddleError, match="too few specs"):
        design(loads(text))


def test_too_few_stacks_for_a_space_that_has_more_are_no_fault_of_the_space(space: SpecFile) -> None:
    with pytest.raises(HeddleError, match="4 stacks do not fit the 10 terms") as caught:
        design(space, stacks=4)
    assert "12 should do" in str(caught.value.hint)


def test_terms_are_named_by_what_they_are(drawn: Design) -> None:
    labels = labels_of(drawn.fitted)
    assert sorted(labels.values()) == [
        "full: attention, heads 2",
        "mid: gla, heads 2",
        "near: attention, heads 2, window 16",
        "near: attention, heads 2, window 8",
    ]


def test_the_fit_finds_an_exact_table_again(drawn: Design) -> None:
    of = table(drawn.fitted)
    found, error = fit(drawn.fitted, times(drawn.fitted, of))
    assert found.way.has_pairs
    assert error < 1e-3
    for name, value in of.items():
        assert found.weights[name] == pytest.approx(value, abs=2e-3)
    predicted = [found.predict(stack) for stack in drawn.held_out]
    assert predicted == pytest.approx(times(drawn.held_out, of), rel=2e-3)


def test_what_was_never_measured_is_not_predicted(space: SpecFile, drawn: Design) -> None:
    found, _ = fit(drawn.fitted, times(drawn.fitted, table(drawn.fitted)))
    wider = space.spec.model.model_copy(update={"hidden_size": 64})
    assert found.predict(stack_of(wider)) is None


def test_noise_costs_about_as_much_as_it_is_and_the_margin_covers_it(drawn: Design) -> None:
    of, rng = table(drawn.fitted), np.random.default_rng(0)
    noisy = times(drawn.fitted, of) * rng.normal(1, 0.02, len(drawn.fitted))
    found, _ = fit(drawn.fitted, noisy)
    measured = times(drawn.held_out, of) * rng.normal(1, 0.02, len(drawn.held_out))
    predicted = np.array([found.predict(stack) for stack in drawn.held_out])
    baselines = (np.full(30, measured.mean()), measured * 1.1)
    told = held_out(measured, predicted, baselines, limit=float(np.median(measured)))
    assert told.mape < 0.03
    assert told.margin is not None
    assert told.mape < told.margin <= told.worst * 1.1
    assert told.spearman > 0.95
    assert told.flops_mape == pytest.approx(0.1)
    assert told.constant_mape > told.mape
    assert told.near_budget >= 3
    assert held_out(measured, predicted, baselines, limit=None).near(float(np.median(measured))) == told
    assert (told.near(1e3).bias_near_budget, told.near(1e3).near_budget) == (None, 0)
    # The promise is one over draws of the held-out measurements: each draw's margin covers a fresh one more or less often.
    truth, shape = times(drawn.held_out, of), (400, len(drawn.held_out))
    seen, fresh = (np.abs(truth * rng.normal(1, 0.02, shape) / predicted - 1) for _ in range(2))
    assert np.mean([(new <= conformal(old)).mean() for old, new in zip(seen, fresh, strict=True)]) >= 0.95


def test_the_conformal_margin_covers_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(0), 0
    for _ in range(2000):
        errors = rng.exponential(size=31)
        margin = conformal(errors[:30])
        assert margin is not None
        hits += errors[30] <= margin
    # 30 of 31 ranks lie below: 96.8 %.
    assert 0.955 < hits / 2000 < 0.98
    assert conformal(list(rng.exponential(size=18))) is None
    assert conformal(list(range(19))) == 18


def test_non_negative_least_squares_meets_the_conditions_of_its_optimum() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        system, aim = rng.normal(size=(12, 5)), rng.normal(size=12)
        free = rng.random(5) < 0.3
        weights = non_negative(system, aim, free=free)
        slope = system.T @ (aim - system @ weights)
        assert (weights[~free] >= 0).all()
        assert np.abs(slope[free | (weights > 0)]).max(initial=0) < 1e-9
        assert slope.max(initial=0) < 1e-9


def test_ranks_lines_and_constants() -> None:
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([1.0, 8, 27, 64])) == pytest.approx(1.0)
    assert spearman(np.array([1.0, 1, 2, 2]), np.array([2.0, 2, 1, 1])) == pytest.approx(-1.0)
    assert spearman(np.ones(3), np.arange(3.0)) == 0.0
    flops = np.array([1.0, 2, 5])
    assert line(flops, 3 + 2 * flops) == pytest.approx((3, 2))
    values = np.array([1.0, 2, 4])
    best = min(np.linspace(1, 4, 301), key=lambda one: np.abs(one / values - 1).mean())
    assert constant(values) == pytest.approx(best)


@pytest.mark.parametrize("phase", ["decode", "train"])
def test_what_the_table_holds_is_not_measured_again(space: SpecFile, tmp_path: Path, phase: str) -> None:
    once = Effort(warmup=0, least=1, most=1, seconds=0.1, builds=1)
    site = Site(Place(phase, 1, 16), space.spec.model, "the defaults", 1.0, is_ratio=True)
    known: list[bool] = []
    how = How("cpu", once, tmp_path, lambda done, total, seen: known.append(seen))  # noqa: ARG005
    first = fit_model(space, [site], stacks=10, unseen=2, how=how)
    assert known == [False] * 12
    assert fit_model(space, [site], stacks=10, unseen=2, how=how) == first
    assert known[12:] == [True] * 12
    (fitted,) = first.fits
    assert (fitted.method, fitted.measured, fitted.taken_over) == ("cpu-timer", 10, 0)
    assert fitted.reads is None
    assert (fitted.held_out.margin, fitted.limit_ms) == (None, fitted.reference_ms)
    assert len(fitted.held_out.pairs) == 2
    # On a CPU nobody looks for others.
    assert fitted.timings is not None
    assert (fitted.timings.n, fitted.timings.unchecked, fitted.timings.repeated) == (12, 12, 0)
    first.save(tmp_path / "model.json")
    assert load_model(tmp_path / "model.json") == first


def test_stacks_that_route_read_the_tokens_of_a_task(tmp_path: Path) -> None:
    routed = "{kind: moh, mixer: {kind: attention, heads: 2}, shared_heads: 1, active: 1}"
    file = loads(SPACE.replace("full: {mixer: {kind: attention, heads: 2}", f"full: {{mixer: {routed}"))
    site = Site(Place("decode", 1, 16), file.resolve(layers=["near"] * 6).model, "near alone")
    once = Effort(warmup=0, least=1, most=1, seconds=0.1, builds=1)
    how = How("cpu", once, tmp_path, reads=cache(lambda: asked_of(file).read))
    (fitted,) = fit_model(file, [site], stacks=10, unseen=2, how=how).fits
    assert fitted.reads == (how.reads and how.reads().digest)
    kept = [json.loads(path.read_text()) for path in tmp_path.rglob("*.json") if path.stem != "environment"]
    told = Counter((row["row"]["inputs"], row["inputs"].get("reads")) for row in kept)
    # A stack may be without the block that routes.
    assert told.keys() == {("random", None), ("task", how.reads and how.reads().digest)}
    assert told.total() == 12
    alone = replace(how, folder=tmp_path / "alone", reads=None)
    assert fit_model(file, [site], stacks=10, unseen=2, how=alone).fits[0].reads == RANDOM
