"""What a run's trials say about placement, added up as they come: to look at all of them again for each new one would take a
long search ever longer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from heddle.search.placement.counts import Array

# Values of parameters with a term of their own, the first that came: an open float has a new one in each trial.
MOST_VALUES = 200

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Seen:
    """A finished trial as the model sees it: its layers, its other parameters, its mean normalised score."""

    layers: tuple[str, ...]
    params: Mapping[str, Any]
    quality: float


class Sums:
    """Sums over trials of the features x and the qualities y of a linear model: all that its posterior depends on.

    x holds layer-by-kind indicators (all kinds but the last, the baseline), the share of each neighbouring pair, and one
    indicator for each value of each parameter.
    """

    def __init__(self, kinds: Sequence[str], length: int) -> None:
        self.length = length
        self._index = {kind: place for place, kind in enumerate(kinds)}
        self._own = (len(kinds) - 1) * length + len(kinds) ** 2
        self._values: dict[tuple[str, str], int] = {}
        self.count, self._shift = 0, 0.0
        # Room grows in steps; qualities are counted from the first one, so that close ones keep their digits.
        self._xx, self._xy, self._x = _room(self._own)
        self._y = self._yy = 0.0

    @property
    def width(self) -> int:
        return self._own + len(self._values)

    def add(self, one: Seen) -> None:
        if self.count == 0:
            self._shift = one.quality
        places, amounts = self._features(one)
        quality = one.quality - self._shift
        self._xx[np.ix_(places, places)] += np.outer(amounts, amounts)
        self._xy[places] += quality * amounts
        self._x[places] += amounts
        self.count, self._y, self._yy = self.count + 1, self._y + quality, self._yy + quality**2

    def standardised(self) -> tuple[Array, Array, float]:
        """Σ x xᵀ, Σ x t and Σ t² of the standardised qualities t = (y - mean) / deviation; all 0 before the first trial.

        Shapes:  [width, width];  [width].
        """
        width, mean = self.width, self._y / max(1, self.count)
        variance = max(0.0, self._yy / max(1, self.count) - mean**2)
        scale = variance**0.5 if variance > 1e-18 else 1.0
        centred = (self._xy[:width] - mean * self._x[:width]) / scale
        return self._xx[:width, :width], centred, self.count * variance / scale**2

    def _features(self, one: Seen) -> tuple[list[int], Array]:
        """Where x of a trial is not 0, and what it is there."""
        kinds, found = len(self._index), dict[int, float]()
        index = [self._index[name] for name in one.layers]
        for position, kind in enumerate(index):
            if kind < kinds - 1:
                found[kind * self.length + position] = 1.0
        first = (kinds - 1) * self.length
        for lower, upper in pairwise(index):
            place = first + lower * kinds + upper
            found[place] = found.get(place, 0.0) + 1.0 / max(1, self.length - 1)
        for name, value in one.params.items():
            own = self._place((name, repr(value)))
            if own is not None:
                found[own] = 1.0
        return list(found), np.array(list(found.values()))

    def _place(self, value: tuple[str, str]) -> int | None:
        if value not in self._values:
            if len(self._values) >= MOST_VALUES:
                return None
            self._values[value] = self.width
            if self.width > len(self._x):
                old, self._x = self._x, np.zeros(2 * self.width)
                held, self._x[: len(old)] = len(old), old
                xx, xy = self._xx, self._xy
                self._xx, self._xy, _ = _room(2 * self.width)
                self._xx[:held, :held], self._xy[:held] = xx, xy
        return self._values[value]


def _room(width: int) -> tuple[Array, Array, Array]:
    return np.zeros((width, width)), np.zeros(width), np.zeros(width)


@dataclass(slots=True)
class Group:
    """The trials with equal counts and parameters: how many, and which of them is the best."""

    count: int = 0
    best: int = 0
    quality: float = -np.inf
    layers: tuple[str, ...] = ()


@dataclass(slots=True)
class History(Sequence[Seen]):
    """The trials in the order of their numbers."""

    trials: list[Seen] = field(default_factory=list)
    _sums: dict[tuple[tuple[str, ...], int], tuple[Sums, int]] = field(default_factory=dict)
    _groups: dict[Any, Group] = field(default_factory=dict)
    _made: dict[Any, tuple[Any, int]] = field(default_factory=dict)
    # Each trial's layers, as numbers that stand for their names, a row a trial; room grows in steps.
    _names: dict[str, int] = field(default_factory=dict)
    _layers: NDArray[np.int16] = field(
        default_factory=lambda: np.zeros((0, 0), dtype=np.int16), compare=False
    )
    # The first of the best ones.
    _best: int = 0

    @staticmethod
    def of(trials: Iterable[Seen]) -> History:
        """`trials` as a history; one that is a history already is given back."""
        if isinstance(trials, History):
            return trials
        made = History()
        for one in trials:
            made.append(one)
        return made

    def append(self, one: Seen) -> None:
        self._note(one)
        self.trials.append(one)
        counts = {kind: one.layers.count(kind) for kind in set(one.layers)}
        group = self._groups.setdefault(_key(counts, one.params), Group())
        if one.quality > group.quality:
            group.best, group.quality, group.layers = group.count, one.quality, one.layers
        group.count += 1

    def _note(self, one: Seen) -> None:
        """Remember the layers of the next trial, and whether it is the best so far."""
        row = [self._names.setdefault(name, len(self._names)) for name in one.layers]
        count, (room, width) = len(self.trials), self._layers.shape
        if count == room or len(row) > width:
            shape = max(64, 2 * count, room), max(width, len(row))
            held, self._layers = self._layers, np.full(shape, -1, dtype=np.int16)
            self._layers[:room, :width] = held
        # Without a placement specs may be of different depth; what is not there is no layer.
        self._layers[count, : len(row)] = row
        if count and one.quality > self.trials[self._best].quality:
            self._best = count

    def closest(self, most: int, first: int | None = None) -> list[Seen]:
        """The trials, of the first so many, that differ in the fewest layers from the best one, in the order of their numbers.

        Of equally good ones the first is the best; of equally close ones the latest are taken.
        """
        count, best = len(self.trials) if first is None else first, self._best
        if best >= count:
            best = max(range(count), key=lambda place: self.trials[place].quality)
        placed = self._layers[:count]
        differ = (placed != placed[best]).sum(axis=1)
        kept = np.sort(np.lexsort((-np.arange(count), differ))[:most])
        return [self.trials[place] for place in kept]

    def group(self, counts: Mapping[str, int], params: Mapping[str, Any]) -> Group | None:
        """The trials with these counts of each kind and these parameters; None without any."""
        return self._groups.get(_key(counts, params))

    def sums(self, kinds: Sequence[str], length: int) -> Sums:
        """The sums over all trials."""
        made, done = self._sums.get((tuple(kinds), length), (Sums(kinds, length), 0))
        for one in self.trials[done:]:
            made.add(one)
        self._sums[tuple(kinds), length] = made, len(self.trials)
        return made

    def once(self, key: Any, make: Callable[[], Made], *, count: int | None = None) -> Made:
        """What `make` gives, made again only when trials have come since; with `count` only for another one."""
        count = len(self.trials) if count is None else count
        if key not in self._made or self._made[key][1] != count:
            self._made[key] = make(), count
        made: Made = self._made[key][0]
        return made

    def __len__(self) -> int:
        return len(self.trials)

    @overload
    def __getitem__(self, place: int) -> Seen: ...

    @overload
    def __getitem__(self, place: slice) -> list[Seen]: ...

    def __getitem__(self, place: int | slice) -> Seen | list[Seen]:
        return self.trials[place]


def _key(counts: Mapping[str, int], params: Mapping[str, Any]) -> Any:
    held = frozenset((kind, count) for kind, count in counts.items() if count)
    return held, frozenset((name, repr(value)) for name, value in params.items())
