"""The landscape's matrices: kernels by products of features, roots and inverses by their borders, against plain loops."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from heddle.search.placement.landscape import ALIKE, NOISE, OTHER, PAIRS, Landscape, Prior, _evidence

RNG = np.random.default_rng(7)


def by_hand(prior: Prior, rows: np.ndarray, columns: np.ndarray, window: int) -> np.ndarray:
    """The covariance, placement by placement and layer by layer."""
    length = rows.shape[1]
    unary = prior.unary(length)
    found = np.zeros((len(rows), len(columns)))
    for place in np.ndindex(found.shape):
        one, other = rows[place[0]], columns[place[1]]
        for here, there in product(range(length), repeat=2):
            found[place] += unary[here, there] * (one[here] == other[there])
        for d in range(1, min(window, length - 1) + 1):
            shared = ((one == other)[d:] & (one == other)[:-d]).sum()
            found[place] += prior.pair(length, d) * shared
    return found


@pytest.mark.parametrize(("length", "kinds", "window"), [(8, 2, 2), (6, 3, 1), (5, 3, 2), (1, 2, 2)])
def test_kernels_and_inverses_are_those_of_plain_loops(length: int, kinds: int, window: int) -> None:
    layers, more = RNG.integers(kinds, size=(20, length)), RNG.integers(kinds, size=(3, length))
    told, beside = np.concatenate([layers, more]), 0.3 * np.ones((23, 23))
    known = Landscape(layers, RNG.normal(size=20), kinds, window, beside=beside[:20, :20])
    assert np.allclose(known._kernel(more, told), by_hand(known.prior, more, told, window), atol=1e-12)
    whole = by_hand(known.prior, told, told, window) + beside + known.prior.noise * np.eye(23)
    assert np.allclose(known.inverse(told, beside) @ whole, np.eye(23), atol=1e-9)
    # What is asked of other placements, or of others beside them, is not taken from the landscape's own.
    swapped = told[::-1].copy()
    whole = by_hand(known.prior, swapped, swapped, window) + 2 * beside + known.prior.noise * np.eye(23)
    assert np.allclose(known.inverse(swapped, 2 * beside) @ whole, np.eye(23), atol=1e-9)


@pytest.mark.parametrize("is_other_open", [False, True])
def test_the_prior_is_that_of_the_highest_evidence(is_other_open: bool) -> None:
    layers, values = RNG.integers(2, size=(40, 8)), RNG.normal(size=40)
    # Each trial has a value of its own, as of an open float; or all have the same.
    beside = np.eye(40) if is_other_open else np.ones((40, 40))
    known, found = Landscape(layers, values, 2, 2, beside=beside), {}
    target = values - values.mean()
    for prior in (Prior(*one) for one in product(ALIKE, PAIRS, NOISE, OTHER if is_other_open else (1.0,))):
        covariance = by_hand(prior, layers, layers, 2) + prior.other * beside + prior.noise * np.eye(40)
        scale = float(target @ np.linalg.solve(covariance, target)) / 40
        found[prior] = -20.0 * np.log(scale) - 0.5 * float(np.linalg.slogdet(covariance)[1])
        assert np.allclose(_evidence(covariance, target), (found[prior], scale), rtol=1e-9)
    assert known.prior == max(found, key=found.__getitem__)
