"""What this run's scores say about where each block stands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from heddle.search.placement.counts import Array
from heddle.search.placement.history import History, Seen, Sums

# Of standardised qualities: what the model leaves unexplained, and by how much of the prior it is multiplied.
NOISE = 0.3
SCALES = (0.03, 0.1, 0.3, 1.0, 3.0)


class QualityModel:
    """Bayesian linear regression of quality on where each block stands, which pairs meet, and the other
    parameters.

        y = w · x + ε,   w ~ N(0, s² P),   ε ~ N(0, 0.3)   (y standardised; s² by marginal likelihood)

    x is that of `Sums`. The prior P of a kind's indicators falls off with the
    distance between layers, because neighbouring layers do similar work: a handful of trials then says
    something about all of them.
    """

    def __init__(self, kinds: Sequence[str], length: int, seen: Iterable[Seen]) -> None:
        self.kinds, self.length = tuple(kinds), length
        sums = History.of(seen).sums(self.kinds, length)
        self._width = sums.width
        # Its rows times independent normal numbers are a draw: to factor the covariance for each one would take longer.
        self.mean, self._factor = _posterior(sums, self._prior())
        self.covariance = self._factor @ self._factor.T

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
        weights = self.mean + self._factor @ rng.standard_normal(self._width)
        kinds = len(self.kinds)
        split = (kinds - 1) * self.length
        unary = np.zeros((self.length, kinds))
        unary[:, : kinds - 1] = weights[:split].reshape(kinds - 1, self.length).T
        pair = weights[split : split + kinds * kinds].reshape(kinds, kinds) / max(1, self.length - 1)
        return unary, pair


def _posterior(sums: Sums, prior: Array) -> tuple[Array, Array]:
    """Mean of the weights, and a factor F of their covariance F Fᵀ, under the prior scale with the highest marginal likelihood.

    With P = L Lᵀ and Lᵀ (Σ x xᵀ) L = V λ Vᵀ all of it follows from sums, and costs the same however many trials there are:

        posterior precision = (Σ x xᵀ + σ² (s P)⁻¹) / σ²,   so its covariance is  L V diag(s σ² / (s λ + σ²)) Vᵀ Lᵀ
        log evidence = -½ [Σ log(1 + s λ / σ²) + (Σ t² - Σ c² s / (s λ + σ²)) / σ²] + constant,   c = Vᵀ Lᵀ Σ x t
    """
    gram, moment, square = sums.standardised()
    root = np.linalg.cholesky(prior)
    sizes, turned = np.linalg.eigh(root.T @ gram @ root)
    sizes, axes = np.maximum(sizes, 0.0), root @ turned
    seen = axes.T @ moment

    def evidence(scale: float) -> float:
        explained = np.square(seen) @ (scale / (scale * sizes + NOISE))
        return float(-np.log1p(scale * sizes / NOISE).sum() - (square - explained) / NOISE)

    scale = max(SCALES, key=evidence) if sums.count else 1.0
    kept = scale / (scale * sizes + NOISE)
    return axes @ (kept * seen), axes * np.sqrt(NOISE * kept)
