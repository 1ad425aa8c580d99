"""A search made again from its lockfile, and what then differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from heddle.errors import HeddleError
from heddle.search.evaluate import Evaluate
from heddle.search.evaluations import LATENCY
from heddle.search.latency import Effort
from heddle.search.ledger import Ledger
from heddle.search.lock import Frozen, lock_of, plain, read_lock, told
from heddle.search.progress import Progress
from heddle.search.record import LEDGER_FOLDER, Latency, Run
from heddle.search.run import search
from heddle.specs import loads

ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that is not as the lockfile has it. `part` is "environment", "space", "trials", "scores", "front",
    "winner" or "confirm"."""

    part: str
    what: str
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.part}: {self.what}: {self.then} then, {self.now} now"


class Ratio(NamedTuple):
    """To a reference that took turns, with the ends of its interval."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Moved:
    """A latency in milliseconds as the lockfile has it, and as this machine takes now; and the peak of bytes, None where a
    lockfile of before has none.

    Where both were timed in turns with `relative_to`, the ratios to it with their 95 % intervals too: milliseconds are those of a
    machine and its load, a ratio is the model's.
    """

    number: int
    label: str
    then_ms: float
    now_ms: float
    then_bytes: int | None = None
    now_bytes: int | None = None
    relative_to: str | None = None
    then_ratio: Ratio | None = None
    now_ratio: Ratio | None = None

    @property
    def is_peak_other(self) -> bool:
        """Whether both peaks are known and differ."""
        return None not in (self.then_bytes, self.now_bytes) and self.then_bytes != self.now_bytes


@dataclass(frozen=True, slots=True)
class Replay:
    """A search that was made again. `moved` is told and is no change: no two measurements are the same."""

    run: Run
    changes: tuple[Change, ...]
    moved: tuple[Moved, ...]

    @property
    def same(self) -> bool:
        return not self.changes

    def summary(self) -> dict[str, Any]:
        """What `heddle search --replay --json` prints: plain data."""
        return {"same": self.same, "changes": self.changes, "moved": self.moved, **self.run.summary()}


def replay(
    path: Path,
    out: Path,
    *,
    resume: bool = False,
    deterministic: bool = False,
    storage: str | None = None,
    ray_address: str | None = None,
    progress: Progress | None = None,
    evaluate: Evaluate | None = None,
    effort: Effort | None = None,
) -> Replay:
    """Make the search of the lockfile at `path`, or of the run in the folder `path`, again in the folder `out`.

    Latencies come from the lockfile; what it does not have, since another spec is asked for, is measured.

    Raises:
        HeddleError: "file-not-found", "lock-broken", "bad-argument" where the lockfile has no trial that ended; as `search`.
    """
    frozen = Frozen(read_lock(path))
    lock = frozen.lock
    if not frozen.trials:
        raise HeddleError("bad-argument", f"{path} holds no trial that ended", hint="let its search go on")
    run = search(
        loads(lock["spec"]["text"], file=lock["spec"]["file"], beside=lock["spec"].get("texts")),
        out,
        resume=resume,
        deterministic=deterministic,
        frozen=frozen,
        storage=storage,
        ray_address=ray_address,
        progress=progress,
        evaluate=evaluate,
        effort=Effort(**lock["effort"]) if effort is None else effort,
    )
    return Replay(run, tuple(compare(lock, plain(lock_of(run)))), tuple(_moved(run)))


def compare(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    """What `now` has otherwise than `then`, two lockfiles as they were read."""
    yield from _fields("environment", _flat(then["environment"]), _flat(now["environment"]))
    spaces = ({"digest": each["spec"]["space"], **each["spec"].get("beside", {})} for each in (then, now))
    yield from _fields("space", *spaces)
    yield from _fields("environment", *({"deterministic": each["deterministic"]} for each in (then, now)))
    after = {trial["number"]: trial for trial in now["trials"]}
    for trial in told(then):
        other = after.get(trial["number"], {})
        name = f"trial {trial['number']}"
        if not other:
            yield Change("trials", name, trial["hash"], ABSENT)
            continue
        asked = ("params", "layers", "hash", "state")
        yield from _fields(
            "trials", *({f"{name}, {key}": each[key] for key in asked} for each in (trial, other))
        )
        scores = (
            {f"{name}, {task}": value for task, value in each["scores"].items()} for each in (trial, other)
        )
        yield from _fields("scores", *scores)
    yield from _fields("front", {"trials": then["front"]}, {"trials": now["front"]})
    yield from _fields("winner", then["winner"] or {}, now["winner"] or {})
    if then["confirm"] and now["confirm"]:
        yield from _fields("confirm", then["confirm"]["scores"], now["confirm"]["scores"])
    if then.get("longer") and now.get("longer"):
        yield from _fields("confirm", then["longer"], now["longer"])


def _fields(part: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[Change]:
    for name in dict.fromkeys([*then, *now]):
        pair = then.get(name, ABSENT), now.get(name, ABSENT)
        if pair[0] != pair[1]:
            yield Change(part, name, *pair)


def _flat(machine: Mapping[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in machine.items() if name != "packages"}
    return rest | dict(machine["packages"])


def _moved(run: Run) -> Iterator[Moved]:
    """The timings of the front and the reference that were taken at the end, beside those of the lockfile."""
    trials = {trial.number: trial for trial in (*run.trials, *([run.reference] if run.reference else []))}
    last = {event["number"]: event for event in run.events if event["event"] == "timed_now"}
    ledger = Ledger(run.path / LEDGER_FOLDER)
    beside = {budget.timing: budget.relative_to for budget in run.budgets}
    for number, event in last.items():
        trial = trials[number]
        for label, key in event["latency"].items():
            entry = ledger.get(trial.hash, LATENCY, key)
            if label in trial.latency and entry is not None and entry.result is not None:
                then, now = trial.latency[label], Latency(**entry.result)
                ratios = _ratio(then), _ratio(now)
                told = (beside.get(label), *ratios) if None not in ratios else ()
                peaks = then.peak_bytes, now.peak_bytes
                yield Moved(number, label, then.median_ms, now.median_ms, *peaks, *told)


def _ratio(row: Latency) -> Ratio | None:
    return None if row.ratio is None else Ratio(row.ratio, row.ratio_low, row.ratio_high)
