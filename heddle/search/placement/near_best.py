"""What the trials around the best found say about placements: worth of single layers, and of close pairs at their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from heddle.search.placement.counts import Array
from heddle.search.placement.history import History, Seen
from heddle.search.placement.landscape import Landscape

# Trials of which fewer say nothing of pairs; of more than MOST those closest to the best are taken, as each is held to each.
LEAST, MOST = 8, 256


class NearBest:
    """The landscape of the `MOST` trials that differ least from the best one, those of other parameters too.

    What the other parameters do is one term for each value of each: trials share as much of it as they have equal values.
    """

    def __init__(self, kinds: Sequence[str], trials: Sequence[Seen], window: int) -> None:
        self._index = {name: place for place, name in enumerate(kinds)}
        placed = np.array([self._kinds(one.layers) for one in trials], dtype=np.int64)
        quality = np.array([one.quality for one in trials])
        best = int(quality.argmax())
        differ = (placed != placed[best]).sum(axis=1)
        # Of equally close ones the latest.
        kept = np.sort(np.lexsort((-np.arange(len(trials)), differ))[:MOST])
        self._params = [_marks(trials[place].params) for place in kept]
        beside = np.array([self._alike(one) for one in self._params])
        self.landscape = Landscape(placed[kept], quality[kept], len(kinds), window, beside=beside)

    def _kinds(self, layers: Sequence[str]) -> list[int]:
        return [self._index[name] for name in layers]

    def _alike(self, marks: frozenset[tuple[str, str]]) -> Array:
        """The share of equal values, of each trial here with one of these values."""
        most = max(1, len(marks), *(len(one) for one in self._params))
        return np.array([len(marks & one) / most for one in self._params])

    def predicted(self, layers: Sequence[str], params: Mapping[str, Any]) -> float:
        """The expected quality of a placement with these parameters."""
        return self.landscape.predicted(self._kinds(layers), self._alike(_marks(params)))


def _marks(params: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
    return frozenset((name, repr(value)) for name, value in params.items())


def near_best(history: History, kinds: Sequence[str], window: int) -> NearBest | None:
    """What a history says around its best trial; None while it has too few."""
    if len(history) < LEAST:
        return None
    return history.once((tuple(kinds), window), lambda: NearBest(kinds, history.trials, window))
