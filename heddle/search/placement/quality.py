"""What this run's scores say about where each block stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from heddle.search.placement.counts import Array


@dataclass(frozen=True, slots=True)
class Seen:
    """A finished trial as the model sees it: its layers, its other parameters, its mean normalised score."""

    layers: tuple[str, ...]
    params: Mapping[str, Any]
    quality: float


class QualityModel:
    """Bayesian linear regression of quality on where each block stands, which pairs meet, and the other
    parameters.

        y = w · x + ε,   w ~ N(0, s² P),   ε ~ N(0, 1)   (y standardised; s² by marginal likelihood)

    x holds layer-by-kind indicators (all kinds but the last, the baseline), the share of each neighbouring
    pair, and one indicator per value of each parameter. The prior P of a kind's indicators falls off with the
    distance between layers, because neighbouring layers do similar work: a handful of trials then says
    something about all of them.
    """

    def __init__(self, kinds: Sequence[str], length: int, seen: Sequence[Seen]) -> None:
        self.kinds, self.length = tuple(kinds), length
        self._params = sorted({(name, repr(value)) for one in seen for name, value in one.params.items()})
        quality = np.array([one.quality for one in seen], dtype=np.float64)
        self._scale = float(quality.std()) if len(seen) > 1 and quality.std() > 1e-9 else 1.0
        features = np.array([self._features(one) for one in seen]).reshape(len(seen), self._width)
        target = (quality - quality.mean()) / self._scale if len(seen) else quality
        self.mean, self.covariance = _posterior(features, target, self._prior())

    @property
    def _width(self) -> int:
        kinds = len(self.kinds)
        return (kinds - 1) * self.length + kinds * kinds + len(self._params)

    def _features(self, one: Seen) -> Array:
        index = [self.kinds.index(name) for name in one.layers]
        layer = np.zeros((len(self.kinds) - 1, self.length))
        for position, kind in enumerate(index):
            if kind < len(self.kinds) - 1:
                layer[kind, position] = 1.0
        pair = np.zeros((len(self.kinds), len(self.kinds)))
        for first, second in pairwise(index):
            pair[first, second] += 1.0 / max(1, self.length - 1)
        mine = {(name, repr(value)) for name, value in one.params.items()}
        return np.concatenate([layer.ravel(), pair.ravel(), [float(item in mine) for item in self._params]])

    def _prior(self) -> Array:
        kinds = len(self.kinds)
        position = np.arange(self.length)
        distance = np.abs(position[:, None] - position[None, :])
        smooth = 0.5 * np.exp(-distance / max(1.0, self.length / 4)) + 0.5 * np.eye(self.length)
        prior = np.eye(self._width)
        for kind in range(kinds - 1):
            block = slice(kind * self.length, (kind + 1) * self.length)
            prior[block, block] = smooth
        return prior

    def draw(self, rng: np.random.Generator) -> tuple[Array, Array]:
        """One plausible landscape: the worth of each kind at each layer, and of each pair of neighbours.

        Shapes:  unary: [L, kinds];  pair: [kinds, kinds].
        """
        weights = rng.multivariate_normal(self.mean, self.covariance, method="eigh")
        kinds = len(self.kinds)
        split = (kinds - 1) * self.length
        unary = np.zeros((self.length, kinds))
        unary[:, : kinds - 1] = weights[:split].reshape(kinds - 1, self.length).T
        pair = weights[split : split + kinds * kinds].reshape(kinds, kinds) / max(1, self.length - 1)
        return unary, pair


def _posterior(features: Array, target: Array, prior: Array) -> tuple[Array, Array]:
    """Mean and covariance of the weights under the prior scale with the highest marginal likelihood."""
    if not len(target):
        return np.zeros(len(prior)), prior
    best, chosen = -np.inf, 1.0
    for scale in (0.03, 0.1, 0.3, 1.0, 3.0):
        covariance = scale * features @ prior @ features.T + 0.3 * np.eye(len(target))
        evidence = -0.5 * (target @ np.linalg.solve(covariance, target) + np.linalg.slogdet(covariance)[1])
        if evidence > best:
            best, chosen = float(evidence), scale
    prior = chosen * prior
    gain = np.linalg.solve(features @ prior @ features.T + 0.3 * np.eye(len(target)), features @ prior).T
    covariance = prior - gain @ features @ prior
    return gain @ target, (covariance + covariance.T) / 2
