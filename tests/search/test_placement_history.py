"""What is added up as trials come says the same as all trials looked at together, in whatever pieces they came."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from heddle.search.placement import History, QualityModel, Seen
from heddle.search.placement.history import MOST_VALUES
from heddle.search.placement.proposals import PATIENCE, Question, trust_budget
from heddle.search.placement.quality import NOISE, SCALES

KINDS, LENGTH = ("full", "near", "linear"), 7


def drawn(count: int, seed: int, values: int = 3) -> list[Seen]:
    rng = np.random.default_rng(seed)
    return [
        Seen(
            tuple(str(kind) for kind in rng.choice(KINDS, LENGTH)),
            {"window": int(rng.integers(values)), "wide": "yes"},
            0.9 + 1e-4 * float(rng.normal()),
        )
        for _ in range(count)
    ]


def features(seen: list[Seen]) -> np.ndarray:
    """Indicators of kinds at layers, shares of pairs, indicators of values in the order in which they came."""
    values = list(dict.fromkeys((name, repr(value)) for one in seen for name, value in one.params.items()))
    rows = []
    for one in seen:
        own = {(name, repr(value)) for name, value in one.params.items()}
        pairs = list(pairwise(one.layers))
        rows.append(
            [float(name == kind) for kind in KINDS[:-1] for name in one.layers]
            + [pairs.count((lower, upper)) / (LENGTH - 1) for lower in KINDS for upper in KINDS]
            + [float(value in own) for value in values]
        )
    return np.array(rows)


@pytest.mark.parametrize("count", [2, 12, 90])
def test_the_posterior_is_that_of_all_trials_together(count: int, random_seed: int) -> None:
    """Against the form with a row for each trial: K = s X P Xᵀ + σ² I."""
    seen = drawn(count, random_seed)
    model = QualityModel(KINDS, LENGTH, seen)
    x, prior = features(seen), model._prior()
    quality = np.array([one.quality for one in seen])
    target = (quality - quality.mean()) / quality.std()

    def spread(scale: float) -> np.ndarray:
        return scale * x @ prior @ x.T + NOISE * np.eye(count)

    def evidence(scale: float) -> float:
        return -0.5 * float(
            target @ np.linalg.solve(spread(scale), target) + np.linalg.slogdet(spread(scale))[1]
        )

    scale = max(SCALES, key=evidence)
    gain = np.linalg.solve(spread(scale), scale * x @ prior).T
    size = np.abs(scale * prior).max()
    assert np.abs(model.mean - gain @ target).max() < 1e-8 * max(1.0, np.abs(model.mean).max())
    assert np.abs(model.covariance - (scale * prior - gain @ (scale * x @ prior))).max() < 1e-10 * size


def test_a_history_that_grew_is_one_that_was_there_from_the_start(random_seed: int) -> None:
    """To the last bit: a resumed search adds up all at once what the uninterrupted one added up round by round."""
    seen, grown = drawn(40, random_seed), History()
    for one in seen:
        grown.append(one)
        if len(grown) % 8 == 0:
            QualityModel(KINDS, LENGTH, grown)
    whole = QualityModel(KINDS, LENGTH, History.of(seen))
    assert (QualityModel(KINDS, LENGTH, grown).mean == whole.mean).all()
    assert (QualityModel(KINDS, LENGTH, grown).covariance == whole.covariance).all()
    assert list(grown) == seen


def test_values_that_never_come_twice_do_not_make_the_model_grow() -> None:
    seen = [Seen(one.layers, {"rate": n}, one.quality) for n, one in enumerate(drawn(3 * MOST_VALUES, 1))]
    width = len(QualityModel(KINDS, LENGTH, seen).mean)
    assert width == len(QualityModel(KINDS, LENGTH, seen[:MOST_VALUES]).mean)


def test_the_trust_region_is_around_the_first_of_equally_good_ones() -> None:
    best, other = ("full", "near", "near", "near"), ("near", "near", "near", "full")
    history = [
        Seen(best, {}, 0.5),
        *(Seen(other, {}, 0.5) for _ in range(PATIENCE)),
        Seen(("full",) * 4, {}, 0.9),
    ]
    question = Question({"full": 1, "near": 3}, {}, best, lambda _: False)
    region = trust_budget(question, history)
    assert region is not None
    assert region.of([0, 1, 1, 1]) == 0
    assert region.of([1, 1, 1, 0]) == 2


def test_the_trials_closest_to_the_best_are_those_of_all_trials_gone_through() -> None:
    seen = drawn(300, 5)
    grown = History()
    for count, one in enumerate(seen, start=1):
        grown.append(one)
        if count % 37:
            continue
        best = max(seen[:count], key=lambda trial: trial.quality)
        apart = [sum(a != b for a, b in zip(each.layers, best.layers, strict=True)) for each in seen[:count]]
        kept = sorted(sorted(range(count), key=lambda place: (apart[place], -place))[:50])
        assert grown.closest(50) == [seen[place] for place in kept]


def test_specs_of_different_depth_are_remembered_side_by_side() -> None:
    # As of a spec that leaves its whole list of layers open.
    history = History()
    for number in range(130):
        history.append(Seen(("a", "b", "a", "b")[: 2 + number % 3], {}, float(number == 64)))
    assert len(history) == 130
    # The best has three layers; its equals differ in none, and the others in the one that is there or not.
    assert [one.layers for one in history.closest(43)] == [("a", "b", "a")] * 43
