"""Fits latency as a sum, and tells how far it is off on stacks it has not seen.

    t(stack) = constant(frame) + Σ_layers term(layer) + Σ_neighbours pair(layer, next)

The pair terms are of neighbours of different kinds alone. The fit is by least squares of errors relative to what is predicted
(relative to what was measured, stacks that came out fast would weigh more, and all predictions be too low), either with a
penalty on what a layer differs from the mean layer and on the pairs (ridge), or with terms and constants that are not
negative; with the pairs or without; which of them, and with which penalty, five-fold cross validation decides.

The margin is split conformal (arXiv 2107.07511): of n held-out relative errors |measured / predicted - 1| the one of rank
⌈(n + 1) · 0.95⌉. A further stack of the space, drawn as they were, lies within it with at least 95 % probability. With n < 19
there is no such rank, and no margin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from heddle.search.latency_model.design import columns, matrix
from heddle.search.latency_model.stacks import Stack

Array = NDArray[np.float64]
Column = tuple[str, ...]
COVERAGE = 0.95
FOLDS = 5
PENALTIES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
# Keeps a constant apart from its layers where all stacks have one length; too small to be felt anywhere else.
TINY = 1e-9
# Solutions, each relative to what the one before predicted.
ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Way:
    """One way to fit."""

    non_negative: bool
    has_pairs: bool
    penalty: float

    @property
    def told(self) -> str:
        kind = "non-negative least squares" if self.non_negative else "ridge"
        return f"{kind}, {'with' if self.has_pairs else 'without'} pair terms, penalty {self.penalty:g}"


@dataclass(frozen=True, slots=True)
class Sum:
    """A fitted sum: milliseconds for each column of `design.columns`."""

    way: Way
    weights: dict[Column, float]

    def predict(self, stack: Stack) -> float | None:
        """Milliseconds of a stack; None where it has a layer, or a pair, that was never measured."""
        needed = columns([stack])
        if not self.way.has_pairs:
            needed = [name for name in needed if name[0] != "pair"]
        if any(name not in self.weights for name in needed):
            return None
        counts = matrix([stack], needed)[0]
        return float(sum(self.weights[name] * count for name, count in zip(needed, counts, strict=True)))


def fit(stacks: Sequence[Stack], times: Sequence[float] | Array, *, seed: int = 0) -> tuple[Sum, float]:
    """The sum that fits `times` (ms), in the way that cross validation likes best; and that way's error, as a share."""
    names, measured = columns(stacks), np.asarray(times, dtype=float)
    counts = matrix(stacks, names)
    ways = [Way(*one) for one in product((False, True), (True, False), PENALTIES)]
    folds = np.random.default_rng(seed).permutation(len(stacks)) % FOLDS
    errors = [_crossed(counts, measured, names, way, folds) for way in ways]
    best = int(np.argmin(errors))
    weights = _solve(counts, measured, names, ways[best])
    used = {
        name: float(weight)
        for name, weight in zip(names, weights, strict=True)
        if ways[best].has_pairs or name[0] != "pair"
    }
    return Sum(ways[best], used), errors[best]


def _crossed(
    counts: Array, times: Array, names: Sequence[Column], way: Way, folds: NDArray[np.int64]
) -> float:
    """Mean absolute error on the stacks that each fold leaves out, of the logarithm: a share, where it is small."""
    errors = []
    for fold in range(FOLDS):
        kept, left = folds != fold, folds == fold
        weights = _solve(counts[kept], times[kept], names, way)
        shown = (counts[left] @ weights).clip(min=1e-9)
        # Of logarithms: too low by half counts as much as too high by twice.
        errors.append(np.abs(np.log(shown / times[left])))
    return float(np.concatenate(errors).mean())


def _solve(counts: Array, times: Array, names: Sequence[Column], way: Way) -> Array:
    """The weights of the columns, 0 for those that this way leaves out."""
    kinds = np.array([name[0] for name in names])
    used = (kinds != "pair") | way.has_pairs
    used_counts, kinds = counts[:, used], kinds[used]
    weights, size = np.zeros(len(names)), times
    for _ in range(ROUNDS):
        weights[used] = _least(used_counts / size[:, None], times / size, kinds, way)
        size = (used_counts @ weights[used]).clip(min=float(times.min()) / 2)
    return weights


def _least(design: Array, aim: Array, kinds: NDArray[np.str_], way: Way) -> Array:
    """argmin ‖design · w - aim‖² / n + penalties, columns scaled to equal size."""
    count, width = design.shape
    is_term, is_pair = kinds == "term", kinds == "pair"
    scale = np.sqrt((design**2).mean(axis=0))
    # A pair that these stacks have not tells nothing, and gets the weight 0 by its penalty.
    scale[scale == 0] = 1.0
    rows = [design / scale, np.sqrt(count * way.penalty) * np.eye(width)[is_pair]]
    rows.append(np.sqrt(count * TINY) * np.eye(width)[~is_pair])
    if not way.non_negative:
        # What a layer differs from the mean layer, in milliseconds of a typical layer.
        apart = np.eye(width)[is_term] - is_term / max(1, int(is_term.sum()))
        typical = float(np.median(scale[is_term]))
        rows.append(np.sqrt(count * way.penalty) * apart * typical / scale)
    system = np.vstack(rows)
    aim = np.concatenate([aim, np.zeros(len(system) - count)])
    free = is_pair if way.non_negative else np.ones(width, dtype=bool)
    weights: Array = non_negative(system, aim, free=free) / scale
    return weights


def non_negative(system: Array, aim: Array, *, free: NDArray[np.bool_]) -> Array:
    """argmin ‖system · w - aim‖ with w ≥ 0 but for the `free` ones: the active sets of Lawson and Hanson (1974)."""
    width = system.shape[1]
    active, weights = free.copy(), np.zeros(width)
    weights = _on(system, aim, active)
    for _ in range(3 * width):
        slope = system.T @ (aim - system @ weights)
        slope[active] = -np.inf
        best = int(np.argmax(slope))
        if slope[best] <= 1e-10:
            break
        active[best] = True
        while True:
            trial = _on(system, aim, active)
            bound = active & ~free & (trial <= 0)
            if not bound.any():
                break
            step = (weights[bound] / (weights[bound] - trial[bound]).clip(min=1e-300)).min()
            weights = weights + step * (trial - weights)
            active &= free | (weights > 1e-12)
            weights[~active] = 0.0
        weights = trial
    return weights


def _on(system: Array, aim: Array, active: NDArray[np.bool_]) -> Array:
    weights = np.zeros(system.shape[1])
    if active.any():
        weights[active] = np.linalg.lstsq(system[:, active], aim, rcond=None)[0]
    return weights


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Errors on stacks that the fit has not seen, as shares of the measured time.

    `bias` is the mean of predicted / measured - 1; near the budget it is that of the stacks within a fifth of the limit, None
    where fewer than three are. `constant_mape` and `flops_mape` are the errors of one number for all, and of a line in FLOPs,
    fitted on the same stacks. `span` is the slowest over the fastest.
    `measured_over_predicted` is the mean of that ratio less 1. `margin` is None where too few were held out. `pairs` are
    milliseconds, predicted and measured, of each stack; none in a file of an older heddle.
    """

    n: int
    mape: float
    worst: float
    spearman: float
    bias: float
    bias_near_budget: float | None
    near_budget: int
    constant_mape: float
    flops_mape: float
    span: float
    measured_over_predicted: float
    margin: float | None
    pairs: tuple[tuple[float, float], ...] = ()

    def near(self, limit: float) -> HeldOut:
        """The same with its bias near another budget, of `limit` ms; without one where no pairs are known."""
        predicted, measured = np.array(self.pairs).reshape(-1, 2).T
        bias, count = _bias_near(measured, predicted, limit)
        return replace(self, bias_near_budget=bias, near_budget=count)


def conformal(errors: Sequence[float] | Array, coverage: float = COVERAGE) -> float | None:
    """The error that a further one stays below with probability `coverage`, by ranks alone; None with too few to say."""
    rank = math.ceil((len(errors) + 1) * coverage)
    return None if rank > len(errors) else float(np.sort(np.asarray(errors))[rank - 1])


def held_out(
    measured: Array, predicted: Array, baselines: tuple[Array, Array], limit: float | None
) -> HeldOut:
    """How far `predicted` is off; `baselines` are the predictions of a constant and of FLOPs, `limit` the budget in ms."""
    relative = predicted / measured - 1
    bias_near, near = _bias_near(measured, predicted, limit)
    constant, flops = (float(np.abs(one / measured - 1).mean()) for one in baselines)
    return HeldOut(
        n=len(measured),
        mape=float(np.abs(relative).mean()),
        worst=float(np.abs(relative).max()),
        spearman=spearman(measured, predicted),
        bias=float(relative.mean()),
        bias_near_budget=bias_near,
        near_budget=near,
        constant_mape=constant,
        flops_mape=flops,
        span=float(measured.max() / measured.min()),
        measured_over_predicted=float((measured / predicted - 1).mean()),
        margin=conformal(np.abs(measured / predicted - 1)),
        pairs=tuple(zip(predicted.tolist(), measured.tolist(), strict=True)),
    )


def _bias_near(measured: Array, predicted: Array, limit: float | None) -> tuple[float | None, int]:
    """The bias over what was measured within a fifth of `limit`, None of fewer than three; and how many were."""
    if limit is None:
        return None, 0
    near = np.abs(measured / limit - 1) <= 0.2
    count = int(near.sum())
    return (float((predicted / measured - 1)[near].mean()) if count >= 3 else None), count


def spearman(one: Array, other: Array) -> float:
    """The correlation of ranks, equal values sharing the mean of theirs; 0 where one of both does not vary."""
    left, right = (_ranks(values) - (len(values) + 1) / 2 for values in (one, other))
    size = math.sqrt(float(left @ left) * float(right @ right))
    return float(left @ right) / size if size > 0 else 0.0


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Array = (ends - (counts - 1) / 2)[inverse]
    return ranks


def line(flops: Array, times: Array) -> tuple[float, float]:
    """Offset and slope of the line through (flops, times) of the least relative errors."""
    system = np.stack([1 / times, flops / times], axis=1)
    scale = np.sqrt((system**2).mean(axis=0)).clip(min=1e-300)
    offset, slope = np.linalg.lstsq(system / scale, np.ones(len(times)), rcond=None)[0] / scale
    return float(offset), float(slope)


def constant(times: Array) -> float:
    """The number with the least mean relative error for all of `times`: their median, each weighed by 1 / time."""
    order = np.argsort(times)
    heavy = np.cumsum(1 / times[order])
    return float(times[order][np.searchsorted(heavy, heavy[-1] / 2)])
