"""What the trials around the best found say about placements: worth of single layers, and of close pairs at their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heddle.search.placement.counts import Array
from heddle.search.placement.history import History, Seen
from heddle.search.placement.landscape import Landscape, Prior

# Trials of which fewer say nothing of pairs; of more than MOST those closest to the best are taken, as each is held to each.
LEAST, MOST = 4, 256
# Deviations that may be hoped for beyond what is expected.
HOPE = 2.0
# So many times as far below the middle as the lower quartile is lies what is out of line, such as a training that diverged.
# Where layers explain it, too, the best of others is found sooner by taking it for noise, though more of such is asked for.
OUT_OF_LINE = 6.0
# Up to EVERY_ONE trials the prior of a landscape is chosen anew with each, then whenever they are 17 / 16 times as many.
EVERY_ONE, GROWN = 32, (17, 16)

Marks = frozenset[tuple[str, str]]


class NearBest:
    """The landscape of the `MOST` trials that differ least from the best one, those of other parameters too.

    What the other parameters do is one term for each value of each: trials share as much of it as they have equal values.
    """

    def __init__(
        self, kinds: Sequence[str], trials: Sequence[Seen], window: int, *, prior: Prior | None = None
    ) -> None:
        self._index = {name: place for place, name in enumerate(kinds)}
        placed = np.array([self._kinds(one.layers) for one in trials], dtype=np.int64)
        quality = np.array([one.quality for one in trials])
        best = int(quality.argmax())
        differ = (placed != placed[best]).sum(axis=1)
        # Of equally close ones the latest.
        kept = np.sort(np.lexsort((-np.arange(len(trials)), differ))[:MOST])
        self._params = [_marks(trials[place].params) for place in kept]
        beside = self._alike(self._params, self._params)
        values, apart = in_line(quality[kept])
        self.landscape = Landscape(
            placed[kept], values, len(kinds), window, beside=beside, apart=apart, prior=prior
        )
        self._held: tuple[Any, Array] | None = None

    def _kinds(self, layers: Sequence[str]) -> list[int]:
        return [self._index[name] for name in layers]

    def _alike(self, some: Sequence[Marks], others: Sequence[Marks]) -> Array:
        """The share of equal values, of trials with some of these values: [some, others]."""
        places = {
            mark: place for place, mark in enumerate(frozenset[tuple[str, str]]().union(*some, *others))
        }
        most = max(1, *map(len, self._params))
        marked = [np.zeros((len(group), len(places))) for group in (some, others)]
        for group, rows in zip((some, others), marked, strict=True):
            at = [row for row, one in enumerate(group) for _ in one]
            rows[at, [places[mark] for one in group for mark in one]] = 1.0
        return np.asarray(marked[0] @ marked[1].T / most)

    def predicted(self, layers: Sequence[str], params: Mapping[str, Any]) -> float:
        """The expected quality of a placement with these parameters."""
        return self.landscape.predicted(self._kinds(layers), self._alike([_marks(params)], self._params)[0])

    def hoped(
        self,
        placed: NDArray[np.int64],
        params: Mapping[str, Any],
        asked: Sequence[tuple[Sequence[str], Mapping[str, Any]]],
    ) -> Array:
        """What placements with these parameters may reach: what is expected, and HOPE times its deviation. [m] of [m, L].

        `asked` are layers and parameters of trials that are under way, whose values will be known: there is less to hope for
        close to them (the confidence bound of arXiv 1206.6402, batches by the deviation alone).
        """
        known = self.landscape
        marks = [*self._params, *(_marks(others) for _, others in asked)]
        told = np.array([*known.layers, *(self._kinds(layers) for layers, _ in asked)], dtype=np.int64)
        mine = _marks(params)
        alike = self._alike([mine], [*marks, mine])
        beside, own = alike[:, :-1], float(alike[0, -1])
        other = known.beside(beside[0, : len(self._params)])
        expected = known.centre + known.mean().value(placed) + other
        return np.asarray(
            expected + HOPE * known.spread(placed, told, (beside, own), self._inverse(told, marks))
        )

    def _inverse(self, told: NDArray[np.int64], marks: Sequence[Marks]) -> Array:
        """The landscape's, the same for all counts that are looked at beside each other."""
        key = (told.tobytes(), tuple(marks))
        if self._held is None or self._held[0] != key:
            self._held = key, self.landscape.inverse(told, self._alike(marks, marks))
        return self._held[1]


def in_line(values: Array) -> tuple[Array, NDArray[np.bool_]]:
    """Values, and which of them are out of line: far below the middle. [n] and [n] of [n].

    Those come no lower than twice as far, so that neither their mean nor their spread is that of a few. None is out of line
    where a quarter lie as high as the middle and say nothing of how far values spread, or where a quarter and more are so low.
    """
    low, middle = np.quantile(values, [0.25, 0.5])
    far = OUT_OF_LINE * float(middle - low)
    if far <= 1e-9 * abs(float(middle)):
        return values, np.zeros(len(values), np.bool_)
    return np.maximum(values, middle - 2 * far), np.asarray(values < middle - far)


def _marks(params: Mapping[str, Any]) -> Marks:
    return frozenset((name, repr(value)) for name, value in params.items())


def near_best(history: History, kinds: Sequence[str], window: int) -> NearBest | None:
    """What a history says around its best trial; None while it has too few."""
    count, asked = len(history), (tuple(kinds), window)
    if count < LEAST:
        return None
    # However a search came to have so many trials: one that goes on has the same.
    first = chosen_at(count)

    def chosen() -> Prior:
        return NearBest(kinds, history.closest(MOST, first), window).landscape.prior

    def made() -> NearBest:
        prior = history.once(("prior", *asked), chosen, count=first) if first < count else None
        return NearBest(kinds, history.closest(MOST), window, prior=prior)

    return history.once(asked, made)


def chosen_at(count: int) -> int:
    """The prior of `count` trials is that of so many first ones: of all of them up to EVERY_ONE, and then of as many as there
    were when they had last become GROWN times as many."""
    first = min(count, EVERY_ONE)
    while (after := -(-first * GROWN[0] // GROWN[1])) <= count:
        first = after
    return first if count > EVERY_ONE else count
