"""Made-up landscapes of two kinds in 8 layers: scores of three seeds and latencies of every placement.

Settings of a search are looked at on these, never on rows of trained models. Each seed gives another landscape; L is the number
of layers, S the set of those that are full, n = |S|.

`plain`: single layers, pairs that fall off with distance, returns that lessen with each full layer, and little noise.

    score = tanh(Σ_S u_i / 2) + 0.3 Σ_{i<j in S} J_ij + 0.02 ε,   u ~ U(0, 1),   J_ij ~ N(0, 1) 2^-|i-j|

`crowded`: many placements close to the best, a few far below.

    score = 1 - e^(-z / 2) + noise,   z = profile + counts + 0.6 pairs + 0.3 exceptions

Each part has mean 0 and spread 1 over all placements, and so has z; the noise of a seed is a third of the spread of scores. The
mean of three seeds is the truth, so noise stays in it.

* profile: Σ_S w_i, where w rises, falls, or is U-shaped or arched with depth, each as likely, to a power of 1/2 to 2, with
  mean 0 and spread 1, plus 0.5 N(0, 1) at each layer;
* counts: -(n - n*)², with n* from 0.2 L to 0.7 L, so that the best count is inside;
* pairs: Σ_{i<j} J_ij x_i x_j with x = 1 for full layers, else -1, J_ij ~ N(0, 1) 2^(1-|i-j|), and N(0, 1) for three of the
  pairs that are L/2 or more apart;
* exceptions: six triples of layers with kinds drawn for each; a placement that has all three gets N(0, 1). It holds in an eighth
  of the placements, and no model of single layers and pairs says so.

Latencies of both are 0.3 ms, 0.08 ms for each full layer, and `boundary` ms for each change of kind.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

LENGTH, SEEDS = 8, 3
# What the parts of `crowded` weigh, and its noise beside the spread of the scores.
PROFILE, COUNTS, PAIRS, EXCEPTIONS, NOISE = 1.0, 1.0, 0.6, 0.3, 1 / 3
LONG_PAIRS, TRIPLES = 3, 6
Layers = tuple[int, ...]
Array = NDArray[np.float64]
Made = tuple[dict[Layers, list[float]], dict[Layers, float]]

EVERY = np.array(list(product((0, 1), repeat=LENGTH)))


def plain(seed: int, boundary: float) -> Made:
    """Single layers, pairs that fall off with distance, returns that lessen with each full layer, and noise of seeds."""
    rng = np.random.default_rng([seed, 3])
    alone = rng.uniform(0.0, 1.0, LENGTH)
    distance = np.abs(np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH)))
    pair = np.triu(rng.normal(size=(LENGTH, LENGTH)) * 2.0 ** (-distance), 1)
    scores = {}
    for layers in product((0, 1), repeat=LENGTH):
        full = np.flatnonzero(layers)
        worth = float(np.tanh(alone[full].sum() / 2) + 0.3 * pair[np.ix_(full, full)].sum())
        scores[layers] = [worth + float(noise) for noise in 0.02 * rng.normal(size=SEEDS)]
    return scores, latencies(boundary)


def crowded(seed: int, boundary: float) -> Made:
    """Many placements close to the best: a smooth profile of depth, a best count inside, pairs, exceptions, much noise."""
    rng = np.random.default_rng([seed, 17])
    worth = PROFILE * _unit(EVERY @ profile(rng))
    worth += COUNTS * _unit(-((EVERY.sum(axis=1) - rng.uniform(0.2, 0.7) * LENGTH) ** 2))
    signs = 2.0 * EVERY - 1.0
    worth += PAIRS * _unit(np.einsum("ni,ij,nj->n", signs, _pairs(rng), signs))
    worth += EXCEPTIONS * _unit(_exceptions(rng))
    value = 1.0 - np.exp(-_unit(worth) / 2)
    noise = NOISE * value.std() * rng.normal(size=(len(EVERY), SEEDS))
    told = value[:, None] + noise
    scores = {tuple(layers): row for layers, row in zip(EVERY.tolist(), told.tolist(), strict=True)}
    return scores, latencies(boundary)


def profile(rng: np.random.Generator) -> Array:
    """What a full layer at each depth is worth: [L]."""
    depth = np.linspace(0.0, 1.0, LENGTH)
    shape = [depth, 1.0 - depth, np.abs(2 * depth - 1), 1.0 - np.abs(2 * depth - 1)][int(rng.integers(4))]
    return _unit(shape ** rng.uniform(0.5, 2.0)) + 0.5 * rng.normal(size=LENGTH)


def _pairs(rng: np.random.Generator) -> Array:
    """What pairs of layers of one kind are worth, each pair once: [L, L]."""
    distance = np.abs(np.subtract.outer(np.arange(LENGTH), np.arange(LENGTH)))
    pair = np.triu(rng.normal(size=(LENGTH, LENGTH)) * 2.0 ** (1 - distance), 1)
    far = np.argwhere(np.triu(distance, 1) >= LENGTH // 2)
    for lower, upper in far[rng.permutation(len(far))[:LONG_PAIRS]]:
        pair[lower, upper] = rng.normal()
    return pair


def _exceptions(rng: np.random.Generator) -> Array:
    """What triples add to each placement: [placements]."""
    total = np.zeros(len(EVERY))
    for _ in range(TRIPLES):
        places, kinds = rng.choice(LENGTH, 3, replace=False), rng.integers(0, 2, 3)
        total += rng.normal() * (EVERY[:, places] == kinds).all(axis=1)
    return total


def _unit(values: Array) -> Array:
    """With a mean of 0 and a spread of 1."""
    return np.asarray((values - values.mean()) / values.std())


def latencies(boundary: float) -> dict[Layers, float]:
    found = {}
    for layers in product((0, 1), repeat=LENGTH):
        changes = sum(one != other for one, other in pairwise(layers))
        found[layers] = 0.3 + 0.08 * sum(layers) + boundary * changes
    return found


LANDSCAPES: dict[str, Callable[[int, float], Made]] = {"plain": plain, "crowded": crowded}
