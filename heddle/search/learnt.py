"""What a placement may learn from: the trials of the rounds before its own, each gathered once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from heddle.search import space
from heddle.search.placement import History, Seen, Timed
from heddle.search.record import Trial
from heddle.specs import SpecFile


class Learnt:
    """The trained and the timed trials of a run, in the order of their numbers."""

    def __init__(self, file: SpecFile) -> None:
        self._file, self._next = file, 0
        self.history, self.timed = History(), list[Timed]()
        self._tried = set[tuple[str, tuple[str, ...]]]()
        # The best trained trial of each setting of the parameters besides the numbers of layers: its quality and its values.
        self._settings = dict[str, tuple[float, Mapping[str, Any]]]()

    def until(self, number: int, trials: Mapping[int, Trial]) -> Learnt:
        """This with all trials up to `number`, itself left out: they have ended, and change no more."""
        for trial in (trials[each] for each in range(self._next, number) if each in trials):
            outer = space.outer(self._file, trial.params)
            self._tried.add((_key(trial.params), trial.layers))
            if trial.quality is not None:
                self.history.append(Seen(trial.layers, outer, trial.quality))
                best = self._settings.get(_key(outer))
                if best is None or trial.quality > best[0]:
                    self._settings[_key(outer)] = trial.quality, trial.params
            if trial.constraints:
                shares = {name: 1.0 + over for name, over in trial.constraints.items()}
                self.timed.append(Timed(trial.layers, outer, shares))
        self._next = max(self._next, number)
        return self

    def is_tried(self, values: Mapping[str, Any], layers: tuple[str, ...]) -> bool:
        """Whether one of these trials had those very values and layers: known without making its spec."""
        return (_key(values), layers) in self._tried

    def settings(self, most: int) -> list[Mapping[str, Any]]:
        """The values of the best trained trial of each setting of the other parameters, the best first."""
        ranked = sorted(self._settings.values(), key=lambda one: -one[0])
        return [values for _, values in ranked[:most]]


def _key(values: Mapping[str, Any]) -> str:
    return repr(sorted(values.items()))
