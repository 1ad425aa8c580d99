"""What this run's timings say about the latency of a placement that was not timed yet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from heddle.search.placement.counts import Array
from heddle.search.placement.problem import Budget

# Timings of which fewer say nothing about the next.
LEAST_TIMED = 4
# Of so many at most, the latest, so that a long search does not grow slow.
MOST_TIMED = 500
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True, slots=True)
class Timed:
    """A timed trial: its layers, its other parameters, and for each budget its figure as a share of the limit."""

    layers: tuple[str, ...]
    params: Mapping[str, Any]
    shares: Mapping[str, float]


class TimedTrials(list[Timed]):
    """Timed trials as they come, fitted once for all that is asked before the next one comes."""

    def __init__(self) -> None:
        super().__init__()
        self._fits: dict[tuple[str, ...], tuple[Timings, int]] = {}

    def fit(self, kinds: tuple[str, ...]) -> Timings:
        """The fit of all of them."""
        if kinds not in self._fits or self._fits[kinds][1] != len(self):
            self._fits[kinds] = Timings(self, kinds), len(self)
        return self._fits[kinds][0]


def fit_of(timed: Sequence[Timed], kinds: tuple[str, ...]) -> Timings:
    """The fit of timed trials with layers of these kinds."""
    return timed.fit(kinds) if isinstance(timed, TimedTrials) else Timings(timed, kinds)


def latency_budgets(
    timed: Sequence[Timed], counts: Mapping[str, int], params: Mapping[str, Any], steps: int
) -> tuple[Budget, ...]:
    """For each budget that was timed often enough, what a placement with these counts and parameters is predicted to take.

        share = c + Σ_k a_k n_k / L + Σ_{l>0} p[k_{l-1}, k_l] / (L - 1) + Σ_i b[param_i]  ≤  1

    Ridge regression of the shares timed, its strength chosen by the errors of each trial predicted from the others. With
    the counts given, only the boundaries between kinds differ from placement to placement.
    """
    return fit_of(timed, tuple(counts)).budgets(counts, params, steps)


class Timings:
    """Timed trials with layers of these kinds, fitted once for whatever counts and parameters are asked about.

    `labels` are the budgets that any of them was timed beside.
    """

    def __init__(self, timed: Sequence[Timed], kinds: tuple[str, ...]) -> None:
        self._kinds = kinds
        self.labels = sorted({label for one in timed for label in one.shares})
        latest = {label: [one for one in timed if label in one.shares][-MOST_TIMED:] for label in self.labels}
        fitted = {label: mine for label, mine in latest.items() if len(mine) >= LEAST_TIMED}
        every = {id(one): one for mine in fitted.values() for one in mine}.values()
        often = Counter((name, repr(value)) for one in every for name, value in one.params.items())
        # What a value that was timed once takes is not known apart from its trial, and says nothing of another.
        self._known = sorted(mark for mark, count in often.items() if count > 1)
        # By label: the mean of the shares, the means of the features, the weights.
        self._fits: dict[str, tuple[float, Array, Array]] = {}
        for label, mine in fitted.items():
            features = _features(mine, kinds, self._known)
            target = np.array([one.shares[label] for one in mine])
            fit = float(target.mean()), features.mean(axis=0), _ridge(features, target)
            self._fits[label] = fit

    def budgets(
        self, counts: Mapping[str, int], params: Mapping[str, Any], steps: int | None = None
    ) -> tuple[Budget, ...]:
        """As `latency_budgets` gives them."""
        first, length, found = len(self._kinds), sum(counts.values()), []
        # All that the counts and the parameters settle, with no boundary yet.
        own = np.concatenate([_counted(counts, length), np.zeros(first**2), _marks(params, self._known)])
        for label, (mean, centre, weights) in self._fits.items():
            constant = float(mean + (own - centre) @ weights)
            pair = weights[first : first + first * first].reshape(first, first) / max(1, length - 1)
            found.append(
                Budget(label, np.zeros((length, first)), 1.0, pair=pair, constant=constant, steps=steps)
            )
        return tuple(found)


def _features(timed: Sequence[Timed], kinds: Sequence[str], known: Sequence[tuple[str, str]]) -> Array:
    """A row for each trial: shares of kinds, shares of pairs that meet, and which values it had: [n, features]."""
    length, index = len(timed[0].layers), {kind: place for place, kind in enumerate(kinds)}
    hot = np.eye(len(kinds))[[[index[name] for name in one.layers] for one in timed]]
    pairs = hot[:, :-1].transpose(0, 2, 1) @ hot[:, 1:] / max(1, length - 1)
    marks = np.zeros((len(timed), len(known)))
    places = {value: place for place, value in enumerate(known)}
    for row, one in zip(marks, timed, strict=True):
        row[
            [places[mark] for name, value in one.params.items() if (mark := (name, repr(value))) in places]
        ] = 1.0
    return np.concatenate([hot.mean(axis=1), pairs.reshape(len(timed), len(kinds) ** 2), marks], axis=1)


def _counted(counts: Mapping[str, int], length: int) -> Array:
    return np.array([count / length for count in counts.values()])


def _marks(params: Mapping[str, Any], known: Sequence[tuple[str, str]]) -> Array:
    mine = {(name, repr(value)) for name, value in params.items()}
    return np.array([float(item in mine) for item in known])


def _ridge(features: Array, target: Array) -> Array:
    """The weights of centred features whose left-out errors are smallest."""
    left, sizes, right = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
    wanted = left.T @ (target - target.mean())
    best, chosen = np.inf, np.zeros(features.shape[1])
    for ridge in RIDGES:
        kept = sizes**2 / (sizes**2 + ridge)
        missed = target - target.mean() - left @ (kept * wanted)
        # What each trial adds to its own prediction, its share of the mean included.
        own = (left**2) @ kept + 1.0 / len(target)
        error = float(np.square(missed / np.maximum(1.0 - own, 1e-9)).sum())
        if error < best:
            best, chosen = error, right.T @ (sizes / (sizes**2 + ridge) * wanted)
    return chosen
