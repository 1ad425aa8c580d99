"""Proposals that know pairs at their place: from eight trials on, from trials of other values too, and as fast in a long run."""

from __future__ import annotations

import time
from itertools import pairwise, permutations, product

import numpy as np
import pytest

from heddle.search.placement import Budget, History, Problem, Question, Seen, propose
from heddle.search.placement.near_best import HOPE, LEAST, MOST, NearBest, chosen_at, in_line, near_best
from heddle.search.placement.proposals import CELLS, STEPS, favourite, window_of
from heddle.specs import uniform_layers

KINDS = ("full", "linear")
EVERY = sorted({*permutations(["full"] * 3 + ["linear"] * 5)})
RNG = np.random.default_rng(4)
TRUTH = Problem(RNG.normal(size=(8, 2)), RNG.normal(size=(2, 8, 2, 2)))


def worth(layers: tuple[str, ...], width: int = 1) -> float:
    return float(TRUTH.value([KINDS.index(name) for name in layers])) + 2.0 * width


def some(count: int, widths: tuple[int, ...] = (1,), seed: int = 0) -> list[Seen]:
    order = np.random.default_rng(seed).permutation(len(EVERY))
    chosen = [(EVERY[index], widths[place % len(widths)]) for place, index in enumerate(order[:count])]
    return [Seen(layers, {"width": width}, worth(layers, width)) for layers, width in chosen]


def question(seen: list[Seen], predicted: tuple[Budget, ...] = ()) -> Question:
    uniform = tuple(uniform_layers(8, "linear", {"full": 3}))
    asked = {one.layers for one in seen} | {uniform}
    return Question({"full": 3, "linear": 5}, {"width": 1}, uniform, asked.__contains__, predicted=predicted)


def test_a_handful_of_trials_says_nothing_of_pairs() -> None:
    assert near_best(History.of(some(LEAST - 1)), KINDS, 2) is None
    assert near_best(History.of(some(LEAST)), KINDS, 2) is not None


def test_pairs_at_their_place_are_learnt_from_trials_of_other_values_too() -> None:
    seen = some(40, (1, 2, 3))
    known = NearBest(KINDS, seen, 2)
    others = [one for one in EVERY if all(one != trial.layers for trial in seen)]
    told = np.array([known.predicted(one, {"width": 2}) for one in others])
    real = np.array([worth(one, 2) for one in others])
    assert np.corrcoef(told, real)[0, 1] > 0.9
    assert abs(float((told - real).mean())) < 0.5
    # What the width does is not laid to the layers.
    assert known.predicted(others[0], {"width": 3}) > known.predicted(others[0], {"width": 1}) + 1.0


def test_a_prior_is_chosen_now_and_then_and_is_the_same_however_the_trials_came() -> None:
    seen, grown, chosen = some(56, (1, 2)) * 2, History(), set[int]()
    for count, one in enumerate(seen, start=1):
        grown.append(one)
        # A search that is asked in rounds, and goes on after some.
        if count % 8 and count > 40:
            continue
        mine, whole = near_best(grown, KINDS, 2), near_best(History.of(seen[:count]), KINDS, 2)
        if mine is not None and whole is not None:
            chosen.add(chosen_at(count))
            first = NearBest(KINDS, seen[: chosen_at(count)], 2).landscape
            assert mine.landscape.prior == whole.landscape.prior == first.prior
            assert mine.landscape.dual.tobytes() == whole.landscape.dual.tobytes()
    assert {*range(LEAST, 33)} <= chosen
    assert all(count / chosen_at(count) < 17 / 16 + 1 / 32 for count in range(1, 5000))


def test_draws_agree_with_trials_of_each_value() -> None:
    seen = some(30, (1, 2))
    known = NearBest(KINDS, seen, 2).landscape
    rng = np.random.default_rng(0)
    layers = np.array([[KINDS.index(name) for name in one.layers] for one in seen])
    drawn = np.std([known.draw(rng).value(layers) for _ in range(20)], axis=0)
    assert drawn.max() < 0.5 * np.std([one.quality for one in seen])


def test_of_a_long_run_the_trials_closest_to_the_best_are_looked_at() -> None:
    best = Seen(EVERY[0], {}, 1.0)
    far = [Seen(EVERY[-1], {}, 0.0)] * 600
    close = [Seen(EVERY[1], {}, 0.5)] * (MOST - 1)
    known = NearBest(KINDS, [*far, best, *close, *far], 2).landscape
    assert len(known.layers) == MOST
    assert not (known.layers == [KINDS.index(name) for name in EVERY[-1]]).all(axis=1).any()


def test_a_trial_takes_what_may_be_hoped_most_of() -> None:
    seen = some(30)
    known = NearBest(KINDS, seen, 2)
    left = [one for one in EVERY if not question(seen).is_seen(one)]
    placed = np.array([[KINDS.index(name) for name in one] for one in left])
    hoped = known.hoped(placed, {"width": 1}, [])
    assert propose(question(seen), seen, seed=0, number=4) == left[int(hoped.argmax())]
    # What is expected of them is at most that, and most where little is known.
    expected = np.array([known.predicted(one, {"width": 1}) for one in left])
    assert (hoped >= expected - 1e-12).all()


def test_deviations_are_those_of_draws() -> None:
    rng = np.random.default_rng(0)
    every = rng.permutation(np.array(list(product((0, 1), repeat=8))))
    seen = [Seen(tuple(KINDS[kind] for kind in one), {}, float(TRUTH.value(one))) for one in every[:12]]
    known, placed = NearBest(KINDS, seen, 2), every[12:]
    expected = np.array([known.predicted([KINDS[kind] for kind in one], {}) for one in placed])
    told = (known.hoped(placed, {}, []) - expected) / HOPE
    drawn = np.array([known.landscape.draw(rng).value(placed) for _ in range(4000)])
    assert np.abs(told / drawn.std(axis=0) - 1.0).max() < 0.1


def _features(layers: tuple[str, ...], width: int, depth: int) -> np.ndarray:
    """A placement and its values as a linear model sees them: single layers, pairs at their place, and each value."""
    hot = np.array([[name == kind for kind in KINDS] for name in layers], dtype=float)
    pairs = [np.outer(hot[place - d], hot[place]) for d in (1, 2) for place in range(d, len(layers))]
    values = [float(width == one) for one in (1, 2, 3)] + [float(depth == one) for one in (1, 2)]
    return np.concatenate([hot.ravel(), *(one.ravel() for one in pairs), values])


def test_deviations_are_those_of_a_linear_model_whatever_else_is_open() -> None:
    rng = np.random.default_rng(2)
    drawn = [
        (EVERY[int(rng.integers(len(EVERY)))], int(rng.integers(1, 4)), int(rng.integers(1, 3)))
        for _ in range(20)
    ]
    told, asked = drawn[:16], drawn[16:]
    seen = [Seen(layers, {"width": w, "depth": d}, worth(layers, w) - d) for layers, w, d in told]
    known = NearBest(KINDS, seen, 2)
    prior, placed = known.landscape.prior, np.array([[KINDS.index(name) for name in one] for one in EVERY])
    under_way = [(layers, {"width": w, "depth": d}) for layers, w, d in asked]
    hoped = known.hoped(placed, {"width": 2, "depth": 1}, under_way)
    expected = np.array([known.predicted(one, {"width": 2, "depth": 1}) for one in EVERY])
    # Two values each: a placement has one of widths and one of depths, which say half of what else is open.
    pairs = [np.full(4, prior.pair(8, d)) for d in (1, 2) for _ in range(d, 8)]
    weights = np.diag(np.concatenate([np.zeros(16), *pairs, np.full(5, prior.other / 2)]))
    weights[:16, :16] = np.kron(prior.unary(8), np.eye(2))
    x = np.array([_features(*one) for one in drawn])
    new = np.array([_features(one, 2, 1) for one in EVERY])
    gain = np.linalg.solve(x @ weights @ x.T + prior.noise * np.eye(len(x)), x @ weights)
    left = np.einsum("nf,fg,ng->n", new, weights - weights @ x.T @ gain, new)
    assert np.allclose((hoped - expected) / HOPE, np.sqrt(known.landscape.scale * left), rtol=1e-6)
    assert left.min() > 0


@pytest.mark.parametrize("value", ["float", "choice"])
def test_what_an_idle_value_takes_is_little(value: str) -> None:
    rng = np.random.default_rng(0)
    plain = some(40)
    seen = [
        Seen(
            one.layers,
            {value: float(rng.random()) if value == "float" else int(rng.integers(3))},
            one.quality,
        )
        for one in plain
    ]
    others = [one for one in EVERY if all(one != trial.layers for trial in seen)]
    told = np.array([NearBest(KINDS, seen, 2).predicted(one, {value: 0}) for one in others])
    real = np.array([worth(one) for one in others])
    assert np.abs(told - real).mean() < 0.1 * real.std()


@pytest.mark.parametrize("far", [30, 3000, 1e6])
def test_a_training_that_diverged_hides_nothing_of_the_others(far: float) -> None:
    seen = some(30)
    qualities = np.array([one.quality for one in seen])
    seen[7] = Seen(seen[7].layers, seen[7].params, float(qualities.mean() - far * qualities.std()))
    others = [one for one in EVERY if all(one != trial.layers for trial in seen)]
    told = np.array([NearBest(KINDS, seen, 2).predicted(one, {"width": 1}) for one in others])
    assert np.corrcoef(told, [worth(one) for one in others])[0, 1] > 0.9


def test_scores_at_a_cap_put_no_others_out_of_line() -> None:
    for values in ([1.0] * 10 + [0.9, 0.8], [0.0] * 12):
        kept, apart = in_line(np.array(values))
        assert kept.tolist() == values
        assert not apart.any()
    kept, apart = in_line(np.array([0.9, 1.0, 1.1, 1.2, -50.0]))
    assert apart.tolist() == [False] * 4 + [True]
    assert kept[:4].tolist() == [0.9, 1.0, 1.1, 1.2]
    assert -1.0 < kept[4] < 0.0


def test_less_may_be_hoped_close_to_what_is_under_way() -> None:
    seen = some(10)
    known = NearBest(KINDS, seen, 2)
    left = [one for one in EVERY if not question(seen).is_seen(one)]
    placed = np.array([[KINDS.index(name) for name in one] for one in left])
    alone = known.hoped(placed, {"width": 1}, [])
    after = known.hoped(placed, {"width": 1}, [(left[0], {"width": 1})])
    assert (after <= alone + 1e-9).all()
    assert (alone - after).argmax() == 0


def test_the_favourite_may_have_been_trained() -> None:
    seen = some(len(EVERY) - 2)
    best = max((one.layers for one in seen), key=worth)
    assert favourite(question(seen), seen) == best
    assert favourite(question(seen), seen[: LEAST - 1]) is None


def test_costs_of_a_latency_model_go_before_the_timings_of_the_run() -> None:
    # A boundary costs a tenth of what is given: three at most are kept.
    pair = 0.1 * (1.0 - np.eye(2))
    budget = Budget("decode_ms", np.zeros((8, 2)), 1.0, pair=pair, constant=0.65)
    seen = some(20)
    for number in range(8):
        layers = propose(question(seen, (budget,)), seen, seed=1, number=number)
        assert sum(one != two for one, two in pairwise(layers)) <= 3


def test_a_large_table_knows_neighbours_alone() -> None:
    counts = dict.fromkeys("abcdefgh", 3)
    wide = Question(counts, {}, tuple("abcdefgh" * 3), lambda _: False)
    assert 25 * 4.0**7 * STEPS * 8**2 > CELLS
    assert window_of(wide) == 1
    assert window_of(question([])) == 2


@pytest.mark.alone
def test_a_proposal_of_a_long_run_takes_a_fifth_of_a_second_at_most() -> None:
    rng, history = np.random.default_rng(0), History()
    names = np.array(["full", "linear", "linear", "linear"])
    for _ in range(2000):
        layers = tuple(rng.permutation(np.repeat(names, 6)))
        history.append(Seen(layers, {"width": int(rng.integers(4))}, float(rng.random())))
    uniform = tuple(uniform_layers(24, "linear", {"full": 6}))
    asked = Question({"full": 6, "linear": 18}, {"width": 1}, uniform, {uniform}.__contains__)
    propose(asked, history, seed=0, number=0)
    started = time.process_time()
    for number in range(10):
        propose(asked, history, seed=0, number=number)
    assert (time.process_time() - started) / 10 < 0.2
