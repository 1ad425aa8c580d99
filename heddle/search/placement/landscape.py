"""What evaluated placements say about every other: worth of kinds at layers, and of pairs of layers close to each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import numpy as np
from numpy.typing import NDArray

from heddle.search.placement.counts import Array
from heddle.search.placement.problem import Budget, Problem

# How alike close layers are, what pairs weigh beside single layers, how much is noise, what all else weighs: those that explain
# the values best.
ALIKE, PAIRS, NOISE, OTHER = (0.0, 0.5), (0.01, 0.1, 0.4), (1e-3, 1e-2, 1e-1), (0.01, 0.1, 1.0)
# How many times the noise of others is that of values out of line: as layers explain them, or as they do not.
APART = (1.0, 1e4)
# Digits, to the base 2, of what is expected; a sum of float64 holds 53.
DIGITS = 40


@dataclass(frozen=True, slots=True)
class Prior:
    """cov(unary[l, k], unary[l', k]) = ((1 - alike) [l = l'] + alike e^(-4|l - l'|/L)) / L;

    each pair term at distance d has a variance of pairs · 2^(1-d) / (L - d), and all else, together, one of `other`.
    """

    alike: float
    pairs: float
    noise: float
    other: float
    apart: float = 1.0

    def unary(self, length: int) -> Array:
        place = np.arange(length)
        close = np.exp(-4.0 * np.abs(place[:, None] - place[None, :]) / length)
        return np.asarray(((1 - self.alike) * np.eye(length) + self.alike * close) / length)

    def pair(self, length: int, distance: int) -> float:
        return self.pairs * 2.0 ** (1 - distance) / max(1, length - distance)


class Landscape:
    """Bayesian linear regression of values on placements, with single layers and pairs up to `window` layers apart:

        y = c + Σ_l unary[l, k_l] + Σ_d Σ_l pair[d-1, l, k_{l-d}, k_l] + ε

    The weights have a Gaussian prior of mean 0, chosen among a few by marginal likelihood. Worked in the space of the
    placements evaluated, so many kinds and layers cost little. `beside` is how alike all else is that the values depend on:
    the covariance of what that adds to each. `apart` says which values are out of line, such as those of trainings that
    diverged: their noise may be far more than that of others. `prior` is one that was chosen before, all but for how much.

    Shapes:  layers: [n, L] of kinds;  values, apart: [n];  beside: [n, n].
    """

    def __init__(
        self,
        layers: NDArray[np.int64],
        values: Array,
        kinds: int,
        window: int,
        *,
        beside: Array | None = None,
        apart: NDArray[np.bool_] | None = None,
        prior: Prior | None = None,
    ) -> None:
        self.kinds, self.window = kinds, window
        self.layers, self.length = layers, int(layers.shape[1])
        self.centre = float(values.mean()) if len(values) else 0.0
        self._hot, self._beside = np.eye(kinds)[layers], beside
        self._apart = np.zeros(len(values), np.bool_) if apart is None else apart
        self._alike = {alike: self._unary_kernel(alike, layers, layers) for alike in ALIKE}
        self._shared = self._pair_kernels(layers, layers)
        target = values - self.centre
        self.prior, self.scale = Prior(0.5, 0.1, 1e-2, 1.0), 1.0
        best = -np.inf
        for one in self._priors(prior) if len(values) > 1 else ():
            evidence, scale = _evidence(self._covariance(one), target)
            if evidence > best:
                best, self.prior, self.scale = evidence, one, scale
        # Without values it has no rows.
        self._inverse: Array = np.asarray(np.linalg.inv(self._covariance(self.prior)))
        self.dual = self._inverse @ target

    def inverse(self, told: NDArray[np.int64], beside: Array) -> Array:
        """Of the covariance of the values of the placements `told`: [n, n] of [n, L].

        `beside` is how alike all else is of them: [n, n].
        """
        known = len(self.layers)
        among = self._kernel(told[known:], told) + self.prior.other * beside[known:]
        among[:, known:] += self.prior.noise * np.eye(len(told) - known)
        mine = np.zeros((known, known)) if self._beside is None else self._beside
        if np.array_equal(told[:known], self.layers) and np.array_equal(beside[:known, :known], mine):
            return _bordered(self._inverse, among[:, :known], among[:, known:])
        whole = self._kernel(told, told) + self.prior.other * beside
        noise = np.full(len(told), self.prior.noise)
        noise[:known] = self._noise(self.prior)
        return np.asarray(np.linalg.inv(whole + np.diag(noise)))

    def spread(
        self, placed: NDArray[np.int64], told: NDArray[np.int64], beside: tuple[Array, float], inverse: Array
    ) -> Array:
        """The deviation of what is expected of `placed`, once the placements `told` have values: [m] of [m, L] and [n, L].

        `beside` is how alike all else is of `placed` and `told`, [m, n], and of `placed` itself; `inverse` that of `told`.
        """
        cross = self._kernel(placed, told) + self.prior.other * beside[0]
        hot = np.moveaxis(np.eye(self.kinds)[placed], 2, 0)
        own = self.prior.other * beside[1] + ((hot @ self.prior.unary(self.length)) * hot).sum(axis=(0, 2))
        for d in range(1, min(self.window, self.length - 1) + 1):
            own = own + (self.length - d) * self.prior.pair(self.length, d)
        left = own - (cross @ inverse * cross).sum(axis=1)
        return np.asarray(np.sqrt(self.scale * np.maximum(left, 0.0)))

    def _kernel(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Array:
        """The covariance of placements, as a share of the scale: [m, n] of [m, L] and [n, L]."""
        total = self._unary_kernel(self.prior.alike, rows, columns)
        for distance, shared in enumerate(self._pair_kernels(rows, columns), start=1):
            total = total + self.prior.pair(self.length, distance) * shared
        return total

    def _unary_kernel(self, alike: float, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Array:
        """How far placements have the same kinds at the same or at close layers: [m, n] of [m, L] and [n, L]."""
        hot, width = np.eye(self.kinds), self.kinds * self.length
        first, second = (np.moveaxis(hot[each], 2, 1).reshape(-1, self.length) for each in (rows, columns))
        wide = (first @ Prior(alike, 0.0, 0.0, 0.0).unary(self.length)).reshape(len(rows), width)
        return np.asarray(wide @ second.reshape(len(columns), width).T)

    def _pair_kernels(self, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> list[Array]:
        """How many pairs of layers at each distance placements share: [m, n] of [m, L] and [n, L] each."""
        made, kinds = list[Array](), np.arange(self.kinds**2)
        for d in range(1, min(self.window, self.length - 1) + 1):
            # Numbers of pairs are whole: half the digits hold them, in half the time.
            first, second = (
                ((each[:, :-d] * self.kinds + each[:, d:])[..., None] == kinds)
                .reshape(len(each), (self.length - d) * self.kinds**2)
                .astype(np.float32)
                for each in (rows, columns)
            )
            made.append((first @ second.T).astype(np.float64))
        return made

    def _priors(self, chosen: Prior | None) -> Iterator[Prior]:
        """Those to choose from."""
        # What is the same in all trials is as good at any weight.
        others = (1.0,) if self._beside is None or np.ptp(self._beside) == 0 else OTHER
        grid = (Prior(*one) for one in product(ALIKE, PAIRS, NOISE, others))
        for prior in grid if chosen is None else (chosen,):
            yield from (replace(prior, apart=apart) for apart in (APART if self._apart.any() else APART[:1]))

    def _noise(self, prior: Prior) -> Array:
        """The variance of each value about what is true, as a share of the scale: [n]."""
        return np.where(self._apart, prior.apart, 1.0) * prior.noise

    def _covariance(self, prior: Prior) -> Array:
        """Of the values: [n, n]."""
        total = self._alike[prior.alike] + np.diag(self._noise(prior))
        total = total if self._beside is None else total + prior.other * self._beside
        for distance, shared in enumerate(self._shared, start=1):
            total = total + prior.pair(self.length, distance) * shared
        return total

    def _weights(self, dual: Array) -> tuple[Array, Array]:
        """The weights that dual coefficients of the placements stand for."""
        unary = self.prior.unary(self.length) @ np.einsum("n,nlk->lk", dual, self._hot)
        pair = np.zeros((self.window, self.length, self.kinds, self.kinds))
        for distance in range(1, min(self.window, self.length - 1) + 1):
            back, here = self._hot[:, :-distance], self._hot[:, distance:]
            summed = np.einsum("n,nla,nlb->lab", dual, back, here, optimize=True)
            pair[distance - 1, distance:] = self.prior.pair(self.length, distance) * summed
        return unary, pair

    def mean(self, budgets: tuple[Budget, ...] = ()) -> Problem:
        """The expected landscape."""
        return Problem(*self._expected, budgets)

    @cached_property
    def _expected(self) -> tuple[Array, Array]:
        """Its terms, cut to digits that all their sums hold: so equals are equal in whatever order they are summed up."""
        unary, pair = self._weights(self.dual)
        most = np.abs(unary).max(axis=1).sum() + np.abs(pair).max(axis=(2, 3)).sum()
        step = np.ldexp(1.0, np.frexp(most)[1] - DIGITS)
        return np.rint(unary / step) * step, np.rint(pair / step) * step

    def draw(self, rng: np.random.Generator, budgets: tuple[Budget, ...] = ()) -> Problem:
        """One landscape of the posterior: a draw of the prior, corrected by what it gets wrong (Matheron's rule)."""
        root = np.linalg.cholesky(self.prior.unary(self.length))
        spread = np.sqrt(self.scale)
        unary = spread * (root @ rng.normal(size=(self.length, self.kinds)))
        pair = spread * rng.normal(size=(self.window, self.length, self.kinds, self.kinds))
        for distance in range(1, self.window + 1):
            pair[distance - 1] *= np.sqrt(self.prior.pair(self.length, distance))
            pair[distance - 1, :distance] = 0.0
        told = Problem(unary, pair).value(self.layers)
        told = told + np.sqrt(self.scale * self._noise(self.prior)) * rng.normal(size=told.shape)
        if self._beside is not None:
            other = np.sqrt(self.prior.other) * rng.normal(size=told.shape)
            told = told + spread * (self._beside_root @ other)
        more_unary, more_pair = self._weights(self.dual - self._inverse @ told)
        return Problem(unary + more_unary, pair + more_pair, budgets)

    @cached_property
    def _beside_root(self) -> Array:
        """F with F Fᵀ = beside, which need not have full rank."""
        assert self._beside is not None
        sizes, axes = np.linalg.eigh(self._beside)
        return np.asarray(axes * np.sqrt(np.maximum(sizes, 0.0)))

    def predicted(self, layers: Sequence[int], beside: Array | None = None) -> float:
        """The expected value of a placement; `beside` is how alike all else is to that of each placement evaluated: [n]."""
        return (
            self.centre + float(self.mean().value(layers)) + (0.0 if beside is None else self.beside(beside))
        )

    def beside(self, alike: Array) -> float:
        """What all else is expected to add where it is so alike to that of each placement evaluated: [n]."""
        return self.prior.other * float(alike @ self.dual)


def _evidence(covariance: Array, target: Array) -> tuple[float, float]:
    """Log marginal likelihood up to a constant, at the best scale of everything, and that scale."""
    # The root of the covariance C = R Rᵀ with the target below it has R⁻¹ target as its last row. What stands in the corner
    # plays no part, and is as large as the target's square over all that noise leaves C.
    count = len(target)
    bordered = np.zeros((count + 1, count + 1))
    bordered[:count, :count], bordered[count, :count] = covariance, target
    bordered[count, count] = 1.0 + 2.0 * float(target @ target) / min(NOISE)
    root = np.linalg.cholesky(bordered)
    scale = max(float(np.square(root[count, :count]).sum()) / count, 1e-30)
    return -0.5 * count * np.log(scale) - float(np.log(np.diag(root)[:count]).sum()), scale


def _bordered(inverse: Array, border: Array, corner: Array) -> Array:
    """The inverse of [[C, borderᵀ], [border, corner]] from that of C: [n + a, n + a] of [n, n], [a, n] and [a, a]."""
    if not len(corner):
        return inverse
    across = border @ inverse
    below = np.linalg.inv(corner - across @ border.T)
    beside = below @ across
    return np.block([[inverse + across.T @ beside, -beside.T], [-beside, below]])


def unseen(
    ranked: Iterator[tuple[int, ...]], seen: set[tuple[int, ...]], most: int
) -> Iterator[tuple[int, ...]]:
    """The first `most` of a ranking that were not seen."""
    for layers in ranked:
        if most <= 0:
            return
        if layers not in seen:
            most -= 1
            yield layers
