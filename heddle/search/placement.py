"""Which layer gets which block: an exact solver, and a model of this run's scores that tells it what to try
next.

Optuna chooses how many layers each block gets; where they stand is decided here, never by L free binaries.
The first placement of every new count is the uniform one. After that a Bayesian linear model of the finished
trials' quality is drawn from (Thompson sampling) and the draw is maximised exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise, product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heddle.specs.order import Order

Array = NDArray[np.float64]
# Draws from the posterior before neighbours of the last draw are walked through instead.
DRAWS = 16


# Whether a kind may follow where so many layers of each kind stand already.
Allows = Callable[[tuple[int, ...], int], bool]


def best_assignment(
    unary: Array,
    pair: Array,
    counts: Sequence[int],
    allows: Allows = lambda used, kind: True,  # noqa: ARG005
) -> list[int]:
    """The kinds k_1 … k_L with exactly `counts[k]` layers of each kind k that maximise

        Σ_l unary[l, k_l] + Σ_{l>1} pair[k_{l-1}, k_l]

    among those that `allows` lets stand, of which there must be one. Exact, by dynamic programming over (layer, counts used,
    last kind). Ties go to the lowest kind, earliest layer.

    Shapes:  unary: [L, kinds];  pair: [kinds, kinds];  counts: kinds numbers that add up to L.
    """
    length, kinds = unary.shape
    assert sum(counts) == length, f"counts {list(counts)} do not add up to {length} layers"
    # Filled from the last layer back, so that the choices can be read forward and ties go to the lowest kind.
    state = tuple[tuple[int, ...], int]
    tail: dict[state, tuple[float, int]] = {}
    for layer in reversed(range(length)):
        tail.update(_extend(tail, unary, pair, (counts, allows), layer))
    used, last, chosen = (0,) * kinds, -1, []
    for _ in range(length):
        kind = tail[used, last][1]
        chosen.append(kind)
        used, last = _plus(used, kind), kind
    return chosen


def _extend(
    tail: Mapping[tuple[tuple[int, ...], int], tuple[float, int]],
    unary: Array,
    pair: Array,
    rules: tuple[Sequence[int], Allows],
    layer: int,
) -> dict[tuple[tuple[int, ...], int], tuple[float, int]]:
    """The best value of layers `layer` … L-1, and its first choice, for every way to have come to `layer`."""
    (length, kinds), (counts, allows) = unary.shape, rules
    best: dict[tuple[tuple[int, ...], int], tuple[float, int]] = {}
    for used in _uses(counts, layer):
        # From some places no way leads to an end.
        options = [
            kind
            for kind in range(kinds)
            if used[kind] < counts[kind]
            and allows(used, kind)
            and (layer + 1 == length or (_plus(used, kind), kind) in tail)
        ]
        if not options:
            continue
        rest = {
            kind: float(unary[layer, kind])
            + (tail[_plus(used, kind), kind][0] if layer + 1 < length else 0.0)
            for kind in options
        }
        for last in range(kinds) if layer else (-1,):
            if layer and used[last] == 0:
                continue
            value = {kind: rest[kind] + (float(pair[last, kind]) if layer else 0.0) for kind in options}
            kind = max(options, key=lambda option: (value[option], -option))
            best[used, last] = (value[kind], kind)
    return best


def _uses(counts: Sequence[int], total: int) -> Iterator[tuple[int, ...]]:
    """Every way to have used `total` of `counts`."""
    for head in product(*(range(count + 1) for count in counts[:-1])):
        last = total - sum(head)
        if 0 <= last <= counts[-1]:
            yield (*head, last)


def _plus(used: tuple[int, ...], kind: int) -> tuple[int, ...]:
    return (*used[:kind], used[kind] + 1, *used[kind + 1 :])


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


@dataclass(frozen=True, slots=True)
class Question:
    """What Optuna asked for: how many layers of each block, and what else is set in this trial.

    `uniform` is the placement tried first. `is_seen` says whether the spec with these layers was asked for
    before. `order` is what the layers take from each other; where no placement keeps it, none is spared.
    """

    counts: Mapping[str, int]
    params: Mapping[str, Any]
    uniform: tuple[str, ...]
    is_seen: Callable[[tuple[str, ...]], bool]
    order: Order = field(default_factory=Order)


def propose(question: Question, history: Sequence[Seen], *, seed: int, number: int) -> tuple[str, ...]:
    """The layers of trial `number`: the same for equal (question, history, seed, number).

    Never a spec that was asked for before, while one with these counts and parameters is left.
    """
    if not question.is_seen(question.uniform):
        return question.uniform
    kinds = tuple(question.counts)
    counts = [question.counts[kind] for kind in kinds]
    order = question.order if question.order.keeps(question.uniform) else Order()

    def allows(used: tuple[int, ...], kind: int) -> bool:
        return order.allows(kinds[kind], dict(zip(kinds, used, strict=True)), question.counts)

    rng = np.random.default_rng([seed, number])
    model = QualityModel(kinds, sum(counts), history)
    layers = question.uniform
    unary, pair = np.zeros((sum(counts), len(kinds))), np.zeros((len(kinds), len(kinds)))
    for _ in range(DRAWS):
        unary, pair = model.draw(rng)
        chosen = best_assignment(unary, pair, counts, allows)
        layers = tuple(kinds[kind] for kind in chosen)
        if not question.is_seen(layers):
            return layers
    return (
        _nearest_unseen(layers, question.is_seen, lambda one: _worth(one, kinds, unary, pair), order)
        or layers
    )


def _nearest_unseen(
    start: tuple[str, ...],
    is_seen: Callable[[tuple[str, ...]], bool],
    worth: Callable[[tuple[str, ...]], float],
    order: Order,
) -> tuple[str, ...] | None:
    """The best unseen placement at the fewest swaps from `start`, through those that keep the order; None when there is none.

    Swaps connect all placements of equal counts, and only seen ones are walked through, so this ends quickly.
    """
    visited, ring = {start}, [start]
    while ring:
        swapped = sorted({other for one in ring for other in _swaps(one) if order.keeps(other)} - visited)
        unseen = [other for other in swapped if not is_seen(other)]
        if unseen:
            return max(unseen, key=worth)
        visited.update(swapped)
        ring = swapped
    return None


def _swaps(layers: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    for first, second in combinations(range(len(layers)), 2):
        if layers[first] != layers[second]:
            swapped = list(layers)
            swapped[first], swapped[second] = swapped[second], swapped[first]
            yield tuple(swapped)


def _worth(layers: tuple[str, ...], kinds: tuple[str, ...], unary: Array, pair: Array) -> float:
    index = [kinds.index(name) for name in layers]
    neighbours = sum(float(pair[a, b]) for a, b in pairwise(index))
    return sum(float(unary[layer, kind]) for layer, kind in enumerate(index)) + neighbours
