"""heddle.lock: one file from which a search can be made again, and against which what it then finds is held.

It repeats the spec, the files and the latency model that it names, the digests, the seeds and the environment of the run, and
freezes what cannot be computed again: every latency that was measured, by spec and place. docs/decisions/0011-lockfile.md
describes it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heddle.errors import HeddleError
from heddle.search import space
from heddle.search.durable import write_json
from heddle.search.latency_model.find import of_run
from heddle.search.ledger import key_of
from heddle.search.longer_results import Longer
from heddle.search.record import LEDGER_FOLDER, RUN_FILE, Run, Trial, read_run
from heddle.search.timing_subject import routes

if TYPE_CHECKING:
    from heddle.search.driver import Driver
    from heddle.search.evaluate import Evaluation, Training
    from heddle.search.tasks import Task

LOCK_FILE = "heddle.lock"
# The lock that a replay follows, kept in its own folder so that it can be resumed.
FOLLOWED_FILE = "followed.lock"
FORMAT = 1
# Why a spec was timed: while the search went on, and once more at its end. A replay takes both from the table.
SEARCH, AGAIN, NOW = "search", "again", "now"
# A running search spends at most this share of its time on keeping its lockfile true.
SHARE = 0.05
# For every worker of a deterministic search: cuBLAS reads it once, when its process first multiplies.
DETERMINISTIC_ENV = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
_PLACE = ("phase", "batch", "context", "beside", "purpose")


class Frozen:
    """A lockfile that was read, with its latencies by spec and place."""

    def __init__(self, lock: Mapping[str, Any]) -> None:
        self.lock = lock
        self._rows = {(row["spec"], *(row[name] for name in _PLACE)): row for row in lock["latencies"]}

    def row(self, spec: str, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """The latency of `spec` that a request with these inputs asks for, or why it had none; None if it never was timed."""
        return self._rows.get((spec, *(inputs[name] for name in _PLACE)))

    @cached_property
    def timed_again(self) -> bool:
        """Whether the front was timed again at the end: a search that was stopped chose its winner without."""
        return any(row["purpose"] == AGAIN for row in self.lock["latencies"])

    @property
    def trials(self) -> int:
        """How many trials a replay asks for: up to the last one that was told."""
        return max((trial["number"] + 1 for trial in told(self.lock)), default=0)


def told(lock: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The trials of a lockfile that had ended."""
    return [trial for trial in lock["trials"] if trial["state"] != "running"]


def lock_of(run: Run) -> dict[str, Any]:
    """The lockfile of `run` as plain data."""
    meta, best = run.meta, run.best_trial
    kept = meta["lock"]
    confirm = None if run.confirm is None else {"seeds": run.confirm.seeds, "scores": run.confirm.scores}
    return {
        "format": FORMAT,
        "kind": "lock",
        "run": {"id": meta["id"], "name": run.name, "created": meta["created"], "status": run.status},
        "time": datetime.now(UTC).isoformat(),
        "spec": {
            "file": meta["file"],
            "text": meta["spec"],
            "space": kept["space"],
            "beside": kept.get("beside", {}),
            "texts": kept.get("texts", {}),
        },
        "data": kept["data"],
        "seeds": kept["seeds"],
        "sampler": {name: meta[name] for name in ("sampler", "round", "startup")},
        "deterministic": meta.get("deterministic", False),
        "effort": meta.get("effort", {}),
        "environment": meta["environment"],
        "timed_on": meta.get("timed_on"),
        "budgets": meta["budgets"],
        "latency_model": of_run(run.path).data() if meta.get("latency") == "model" else None,
        "trials": [_trial(trial) for trial in run.trials],
        "front": run.front,
        "winner": None if best is None else {"number": best.number, "hash": best.hash},
        "confirm": confirm,
        **({} if run.longer is None else {"longer": _longer(run.longer)}),
        "latencies": sorted(_latencies(run.path / LEDGER_FOLDER), key=_order),
    }


def _longer(longer: Longer) -> dict[str, Any]:
    return {
        f"{row.name}, {task}, {longer.times:g} times": values
        for row in longer.rows
        for task, values in row.values.items()
    }


def _trial(trial: Trial) -> dict[str, Any]:
    return {
        "number": trial.number,
        "params": trial.params,
        "layers": trial.layers,
        "hash": trial.hash,
        "state": trial.state,
        "scores": {task: score.value for task, score in trial.scores.items()}
        | {
            f"rung {at + 1}, {task}": one.value
            for at, rung in enumerate(trial.rungs)
            for task, one in rung.items()
        }
        | {
            f"{stage} at learning rate {one.learning_rate:g}": one.score and one.score.value
            for stage, rates in trial.rates.items()
            for one in rates
        },
    }


def _latencies(ledger: Path) -> Iterator[dict[str, Any]]:
    """Each timing of the ledger, also one that failed; of two at one place the later in time is taken for it."""
    entries = [json.loads(path.read_bytes()) for path in ledger.glob("*/latency/[!.]*.json")]
    for entry in sorted(entries, key=lambda entry: str(entry["time"])):
        inputs = entry["inputs"]
        if inputs["purpose"] == NOW:
            continue
        place = {name: inputs[name] for name in _PLACE}
        yield {"spec": entry["spec"], **place} | {name: entry[name] for name in ("key", "result", "reason")}


def _order(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (row["spec"], *(str(row[name]) for name in _PLACE))


class LockKeeper:
    """Writes the lockfile of a run again and again while it goes on; `run` gives it as it stands."""

    def __init__(self, run: Callable[[], Run]) -> None:
        self._run, self._next = run, 0.0

    def keep(self) -> None:
        """Write the lockfile, unless that was done so lately that it would slow the search."""
        if time.monotonic() >= self._next:
            self.write()

    def write(self) -> None:
        """Write the lockfile. Raises HeddleError "disk-full"."""
        began, run = time.monotonic(), self._run()
        write_json(run.path / LOCK_FILE, lock_of(run))
        ended = time.monotonic()
        self._next = ended + (ended - began) / SHARE


def read_lock(path: Path) -> dict[str, Any]:
    """The lockfile at `path`, or of the run in the folder `path`.

    Raises:
        HeddleError: "file-not-found", or "lock-broken" where the file is no lockfile that this heddle reads.
    """
    if (path / RUN_FILE).exists():
        return plain(lock_of(read_run(path)))
    path = path / LOCK_FILE if path.is_dir() else path
    try:
        lock = json.loads(path.read_bytes())
    except FileNotFoundError:
        hint = f"a search writes {LOCK_FILE} into its folder"
        raise HeddleError("file-not-found", f"no such file: {path}", hint=hint) from None
    except ValueError as error:
        raise HeddleError("lock-broken", f"{path} is damaged: {error}") from None
    if not isinstance(lock, dict) or lock.get("kind") != "lock":
        raise HeddleError("lock-broken", f"{path} is no lockfile of a search")
    if lock.get("format") != FORMAT:
        raise HeddleError(
            "lock-broken", f"{path} has format {lock.get('format')}; this heddle reads {FORMAT}"
        )
    missing = [name for name in ("spec", "data", "sampler", "trials", "latencies") if name not in lock]
    if missing:
        raise HeddleError("lock-broken", f"{path} has no {', '.join(missing)}")
    return lock


def plain(lock: Mapping[str, Any]) -> dict[str, Any]:
    """`lock` as it reads once it was written: lists for tuples, so that two can be compared."""
    value: dict[str, Any] = json.loads(json.dumps(lock))
    return value


def digest(lock: Mapping[str, Any]) -> str:
    """16 hex digits that name a lockfile."""
    return key_of(plain(lock))


def begun_as(frozen: Frozen) -> dict[str, Any]:
    """What of run.json a replay takes from its lockfile, since what is asked depends on it."""
    lock = frozen.lock
    kept = {"deterministic": lock["deterministic"], "seconds": None, "trials": frozen.trials}
    return {**lock["sampler"], **kept, "follows": digest(lock)}


def followed(folder: Path, meta: Mapping[str, Any]) -> Frozen | None:
    """Where the search in `folder` takes its latencies from: the lockfile it follows, or its own if it is deterministic."""
    if "follows" in meta:
        return Frozen(read_lock(folder / FOLLOWED_FILE))
    own = folder / LOCK_FILE
    return Frozen(read_lock(own)) if meta.get("deterministic") and own.exists() else None


def refuse_other_data(frozen: Frozen, digests: Mapping[str, str]) -> None:
    """Raise "run-mismatch" where the tasks' data are not those of the lockfile: no score could be the same."""
    other = [task for task, digest in digests.items() if frozen.lock["data"].get(task) != digest]
    if other:
        raise HeddleError(
            "run-mismatch",
            f"the data of {', '.join(other)} are not those of the lockfile",
            hint="put the files of its `data` where its spec says they are, as they were",
        )


def time_now(driver: Driver) -> None:
    """Time the front and the reference of a replay on this machine, beside what the table says. Decides nothing."""
    front, setting = set(driver.log.last("front")["front"]), driver.setting
    for number in [number for number in driver.trials if number in front or number < 0]:
        trial = driver.trials[number]
        one = space.candidate(setting.file, trial.params, trial.layers) if number >= 0 else None
        one = one or next(iter(setting.references.values()))
        weights = driver.evaluations.kept_weights(one.hash) if number >= 0 and routes(one.model) else None
        timing = partial(setting.timing, purpose=NOW, weights=weights)
        requests = {budget.timing: timing(number, one, budget) for budget in setting.timed}
        driver.evaluations.time_all(requests.values())
        driver.log.write("timed_now", number=number, latency={at: each.key for at, each in requests.items()})


def deterministically(
    evaluate: Callable[[Training, Task], Evaluation], training: Training, task: Task
) -> Evaluation:
    """`evaluate(training, task)` with deterministic kernels alone; an operation that has none fails. Runs in the worker."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return evaluate(training, task)
    finally:
        torch.use_deterministic_algorithms(before)
