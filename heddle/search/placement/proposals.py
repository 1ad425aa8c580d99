"""Which placement a search tries next.

Optuna chooses how many layers each block gets; where they stand is decided here, never by L free binaries.
The first placement of every new count is the uniform one. After that a Bayesian linear model of the finished
trials' quality is drawn from (Thompson sampling) and the draw is maximised exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from heddle.search.placement.counts import Array, best_assignment
from heddle.search.placement.quality import QualityModel, Seen
from heddle.specs.order import Order

# Draws from the posterior before neighbours of the last draw are walked through instead.
DRAWS = 16


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
