"""What a placement may learn from: the trials of the rounds before its own, each gathered once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import inf
from typing import Any

from heddle.search import space
from heddle.search.placement import History, Seen, Timed
from heddle.search.placement.limits import TimedTrials
from heddle.search.record import Trial
from heddle.search.rungs import at_one_rung
from heddle.specs import SpecFile


class Learnt:
    """The trained and the timed trials of a run, in the order of their numbers. With `rungs` before the last one, those that
    were scored at one rung (`heddle.search.rungs.at_one_rung`). `best` are the values of the best of them.

    A spec teaches once: the same score again, from the ledger, would say that scores have no noise.
    """

    def __init__(self, file: SpecFile, rungs: int = 0) -> None:
        self._file, self._rungs, self._next = file, rungs, 0
        self.history, self.timed = History(), TimedTrials()
        self._ended, self._taught = list[Trial](), set[str]()
        self.best: Mapping[str, Any] = {}
        self._quality = -inf

    def until(self, number: int, trials: Mapping[int, Trial]) -> Learnt:
        """This with all trials up to `number`, itself left out: they have ended, and change no more."""
        new = [trials[each] for each in range(self._next, number) if each in trials]
        for trial in new:
            if trial.constraints:
                shares = {name: 1.0 + over for name, over in trial.constraints.items()}
                self.timed.append(Timed(trial.layers, space.outer(self._file, trial.params), shares))
        self._next = max(self._next, number)
        if not self._rungs:
            self._learn((trial, trial.quality) for trial in new if trial.quality is not None)
        elif new:
            # Which rung they learn from may have changed for all.
            self._ended += new
            self.history, self._quality, self._taught = History(), -inf, set()
            self._learn(at_one_rung(self._ended, self._rungs))
        return self

    def _learn(self, scored: Iterable[tuple[Trial, float]]) -> None:
        for trial, quality in scored:
            if trial.hash in self._taught:
                continue
            self._taught.add(trial.hash)
            self.history.append(Seen(trial.layers, space.outer(self._file, trial.params), quality))
            if quality > self._quality:
                self._quality, self.best = quality, trial.params
