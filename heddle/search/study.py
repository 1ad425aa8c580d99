"""Optuna, asked and told by one driver: storage that survives a kill, and samplers that continue as if
nothing happened.

Every value is drawn by a fresh sampler seeded from (search seed, trial number, parameter), so that a resumed
search asks what the uninterrupted one would have asked. The order of a tell is: ledger, attributes,
constraints, state; a kill between any two is mended from the ledger on resume.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from heddle.errors import HeddleError
from heddle.search.durable import cut_torn_tail
from heddle.search.storage import StudyHold, connect, patiently

JOURNAL_FILE = "study.journal"
LOCK_FILE = ".lock"
Direction = Literal["maximize", "minimize"]
Result = TypeVar("Result")
# These two learn only from trials with values, so that a spec which was timed but never trained must be given
# some.
_NEEDS_VALUES = ("nsga2", "gp")


class RunLock:
    """One driver per run: an flock that the kernel frees when its process dies, however it dies.

    Raises:
        HeddleError: "run-locked", naming the pid of the other driver.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_FILE
        self._file: IO[str] | None = None

    def __enter__(self) -> RunLock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = open(self._path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            pid = file.read().strip() or "unknown"
            file.close()
            raise HeddleError(
                "run-locked",
                f"{self._path.parent} is being written by another search (pid {pid})",
                hint=f"wait for it, or stop it with: kill -INT {pid}",
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self._file = file
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.truncate(0)
        self._file.close()


def open_storage(folder: Path, url: str | None = None) -> BaseStorage:
    """The journal in `folder`, mended if its last writer died, or the storage of an Optuna URL.

    Call it only while holding the `RunLock`: then nobody else writes the journal, so that a lock file beside
    it is a dead driver's, and a last line without an end is one that was never acknowledged. Its bytes go to
    `study.journal.torn`; Optuna itself would refuse the whole study.
    """
    if url is not None:
        return connect(url)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / JOURNAL_FILE
    for stale in folder.glob(JOURNAL_FILE + ".lock*"):
        stale.unlink()
    cut_torn_tail(path)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path))))


def make_sampler(kind: str, seed: int, startup: int) -> BaseSampler:
    """A sampler of spec `search.sampler`, seeded; `startup` trials are random before it models anything."""
    if kind in ("random", "grid", "all"):
        # Of the last two each value is chosen before it is drawn.
        return RandomSampler(seed=seed)
    if kind == "tpe":
        # Independent TPE is what Optuna takes for several objectives; for one objective the multivariate form
        # would fall back to it anyway wherever a parameter exists only under a choice.
        return TPESampler(seed=seed, n_startup_trials=startup, multivariate=False, constant_liar=True)
    if kind == "nsga2":
        return NSGAIISampler(seed=seed, population_size=max(2, startup))
    assert kind == "gp", kind
    if importlib.util.find_spec("scipy") is None:
        raise HeddleError("package-missing", "the gp sampler needs scipy", hint="pip install 'heddle-lm[gp]'")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return GPSampler(seed=seed, n_startup_trials=startup)


class Chosen(BaseSampler):
    """Gives the values that were chosen for a trial, by the names of its parameters."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:  # noqa: ARG002
        return {}

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: Any) -> dict[str, Any]:  # noqa: ARG002
        return {}

    def sample_independent(
        self,
        study: optuna.Study,  # noqa: ARG002
        trial: FrozenTrial,  # noqa: ARG002
        param_name: str,
        param_distribution: Any,  # noqa: ARG002
    ) -> Any:
        return self._values[param_name]


def seed_from(*parts: object) -> int:
    """A 32-bit seed that differs wherever the parts differ."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


class Study:
    """The Optuna study of one run, for one driver. Trials are spoken of by number.

    `directions` holds one direction for each task. A storage that does not answer is waited for, and `on_outage` told of it;
    `hold` is renewed then.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        directions: Sequence[Direction],
        *,
        sampler: str,
        seed: int,
        startup: int,
        hold: StudyHold | None = None,
        on_outage: Callable[[str], None] = lambda _: None,
    ) -> None:
        # Optuna reports each trial it makes and ends; so do we, in the words of the search.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._kind, self._seed, self._startup = sampler, seed, startup
        self._hold, self.on_outage = hold, on_outage
        self._study = self._patiently(
            lambda: optuna.create_study(
                storage=storage, study_name=name, directions=list(directions), load_if_exists=True
            )
        )
        self._live: dict[int, optuna.Trial] = {}
        self._chosen: dict[int, Mapping[str, Any]] = {}
        # Of this driver's own: to list all trials takes a storage as long as they are many.
        trials = self.trials
        # One that waits was put there by a driver that died before it asked for it.
        self._waiting = {trial.number for trial in trials if trial.state == TrialState.WAITING}
        self._count = len(trials) - len(self._waiting)
        self._unfinished = {trial.number for trial in trials if trial.state == TrialState.RUNNING}
        self._adopted: set[int] = set()

    def _patiently(self, action: Callable[[], Result], number: int | None = None) -> Result:
        """`action()` as `storage.patiently` does it; trial `number` is read anew first, as a write may or may not be in."""

        def mend() -> None:
            if self._hold is not None:
                self._hold.renew()
            if number is not None:
                self.adopt(number)

        return patiently(action, mend=mend, tell=self.on_outage)

    @property
    def trials(self) -> list[FrozenTrial]:
        """All trials by number, as Optuna stores them now."""
        return self._patiently(lambda: self._study.get_trials(deepcopy=False))

    @property
    def count(self) -> int:
        """How many trials were asked for."""
        return self._count

    @property
    def unfinished(self) -> list[int]:
        """The numbers of the trials that were asked for and not told, in their order."""
        return sorted(self._unfinished)

    def ask(self, fixed: Mapping[str, Any] | None = None) -> int:
        """The number of a new trial; its values are drawn by `suggest`, but those of `fixed`, which go to Optuna as a seed."""
        number, tries = self._count, count()

        def attempt() -> int:
            if self._hold is not None:
                self._hold.renew()
            made = self.trials[number:] if next(tries) else []
            if made and made[0].state != TrialState.WAITING:
                # The storage made it, and went away before it could say so.
                self.adopt(number)
                return number
            if fixed and not made and number not in self._waiting:
                self._study.enqueue_trial(dict(fixed))
            return self._open(number, self._study.ask)

        self._count = self._patiently(attempt) + 1
        self._unfinished.add(number)
        return number

    def adopt(self, number: int) -> None:
        """Take over a RUNNING trial of a driver that died, as if it had just been asked for.

        What it had drawn stays; what it had not is drawn from the same seeds.
        """
        # Optuna has no public way to continue a running trial; tests/search/test_study.py holds this one.
        trial_id = self.trials[number]._trial_id
        self._adopted.add(number)
        self._open(number, lambda: optuna.Trial(self._study, trial_id))

    def _open(self, number: int, make: Callable[[], optuna.Trial]) -> int:
        self._reseed(number, "ask")
        trial = make()
        assert trial.number == number, (
            f"asked for trial {number}, got {trial.number}: another driver writes here"
        )
        # Drawn lazily by Optuna; drawn here so that its seed does not depend on which parameter comes first.
        _ = trial.relative_params
        self._live[number] = trial
        return number

    def suggest(self, number: int, name: str, draw: Callable[[optuna.Trial], Any]) -> Any:
        """`draw(trial)` with the sampler's randomness decided by the trial's number and `name` alone."""

        def attempt() -> Any:
            self._reseed(number, name)
            return draw(self._live[number])

        return self._patiently(attempt, number)

    def choose(self, number: int, values: Mapping[str, Any]) -> None:
        """Let `suggest` draw these values in trial `number`."""
        self._chosen[number] = values

    def _reseed(self, number: int, step: str) -> None:
        if number in self._chosen:
            self._study.sampler = Chosen(self._chosen[number])
            return
        self._study.sampler = make_sampler(self._kind, seed_from(self._seed, number, step), self._startup)

    def attr(self, number: int, name: str) -> Any:
        """A user attribute of a running trial, as it was when it was asked for or adopted; None without."""
        return self._live[number].user_attrs.get(name)

    def set_attr(self, number: int, name: str, value: Any) -> None:
        """A user attribute of a running trial, in plain JSON data."""
        self._patiently(lambda: self._live[number].set_user_attr(name, value), number)

    def tell_complete(self, number: int, values: Sequence[float], constraints: Mapping[str, float]) -> None:
        """A trained trial: its task values and its constraints (at most 0 is kept)."""
        self._constrain(number, constraints)
        self._tell(number, values, None)

    def tell_infeasible(
        self, number: int, constraints: Mapping[str, float], neutral: Sequence[float]
    ) -> None:
        """A trial that broke a budget and was never trained.

        TPE counts a PRUNED trial with a violated constraint as infeasible and ranks it by its violation.
        NSGA-II and GP learn from COMPLETE trials only; for them it is told COMPLETE, with the mean of the
        trained trials' values (`neutral` while there are none) and the attribute `untrained`. NSGA-II's
        constrained domination never looks at those values; for the GP's objective they say nothing new, and
        its constraint model gets the point.
        """
        assert any(value > 0 for value in constraints.values())
        self._constrain(number, constraints)
        if self._kind not in _NEEDS_VALUES:
            self._tell(number, None, TrialState.PRUNED)
            return
        trained = [
            trial.values
            for trial in self.trials
            if trial.state == TrialState.COMPLETE and "untrained" not in trial.user_attrs
        ]
        self.set_attr(number, "untrained", True)
        values = [sum(column) / len(column) for column in zip(*trained, strict=True)] if trained else neutral
        self._tell(number, values, None)

    def tell_pruned(
        self, number: int, constraints: Mapping[str, float], rung: int, quality: float | None
    ) -> None:
        """A trial that kept its budgets and was left at a rung, counted from 1, with its mean normalised score there.

        With one objective TPE ranks it behind every complete trial, by its rung and then by that score, which is therefore
        told in the direction of the objective. With several it ranks it behind them all, since Optuna has no
        scores of rungs then. NSGA-II and GP read complete trials alone: a score of a shorter training is no value to them.
        """
        self._constrain(number, constraints)
        if len(self._study.directions) == 1 and quality is not None:
            up = self._study.direction == optuna.study.StudyDirection.MAXIMIZE
            self._patiently(partial(self._report, number, quality if up else -quality, rung), number)
        self._tell(number, None, TrialState.PRUNED)

    def _report(self, number: int, value: float, step: int) -> None:
        if number not in self._adopted or step not in self.trials[number].intermediate_values:
            self._live[number].report(value, step)

    def tell_failed(self, number: int, reason: str) -> None:
        """A trial without values: samplers pass over it, and the reason stays in its attributes."""
        self.set_attr(number, "reason", reason)
        self._tell(number, None, TrialState.FAIL)

    def _constrain(self, number: int, constraints: Mapping[str, float]) -> None:
        present = self.trials[number].constraints if number in self._adopted else {}
        for name, value in constraints.items():
            if name not in present:
                self._patiently(partial(self._set_constraint, number, name, value), number)

    def _set_constraint(self, number: int, name: str, value: float) -> None:
        if number not in self._adopted or name not in self.trials[number].constraints:
            self._live[number].set_constraint(name, value)

    def _tell(self, number: int, values: Sequence[float] | None, state: TrialState | None) -> None:
        self._patiently(lambda: self._study.tell(number, values, state=state, skip_if_finished=True))
        del self._live[number]
        self._chosen.pop(number, None)
        self._unfinished.discard(number)
