"""`kill -9` of a driver at random moments, also in its last phases, and of a worker that trains: the resumed search is the one
that would have been, and nothing runs on."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import psutil
import pytest

from heddle import api
from heddle.search import watch
from heddle.search.durable import read_lines
from heddle.search.latency import Effort
from heddle.search.record import EVENTS_FILE
from heddle.search.replay import replay
from heddle.search.run import search
from heddle.search.workers import Workers
from heddle.specs import load

DRIVER = """
import sys
from pathlib import Path
from heddle import api
from heddle.search.latency import Effort
from heddle.search.run import search
from heddle.specs import load
folder = Path(sys.argv[2])
effort = Effort(warmup=1, least=3, most=5, seconds=0.2)
search(load(sys.argv[1]), folder, resume=(folder / "run.json").exists(), effort=effort)
print("now the report", flush=True)
api.report(folder)
"""

# Of the tiny search: its trials, and the events by which the last of them has ended, three rounds of some twenty each.
TRIALS, ROUNDS_END = 6, 70
Events = list[dict[str, Any]]
Moment = Callable[[Events], bool]
RANDOM = random.SystemRandom()


@dataclass(frozen=True, slots=True)
class Left:
    """What a killed driver had finished: the entries of the ledger, and how often each had been begun."""

    ledger: dict[Path, bytes]
    begun: Counter[Path]


def ledger(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.glob("ledger/*/*/*.json")}


def begun(folder: Path) -> Counter[Path]:
    """How often each evaluation was begun, by the file of its result."""
    started = [event for event in read_lines(folder / EVENTS_FILE) if event["event"] == "evaluation_started"]
    return Counter(folder / "ledger" / e["hash"] / e["stage"] / f"{e['key']}.json" for e in started)


def family_of(driver: subprocess.Popen[bytes]) -> watch.Processes:
    return watch.descendants({driver.pid: watch._table()[driver.pid].began})


def followed_until(driver: subprocess.Popen[bytes], folder: Path, moment: Moment) -> watch.Processes:
    """The driver's processes, gathered until `moment`."""
    family: watch.Processes = {}
    looked = -inf
    while not moment(read_lines(folder / EVENTS_FILE)):
        assert driver.poll() is None, "the driver ended by itself"
        # All processes of the machine are read for it, which takes from the driver's own time.
        if time.monotonic() - looked > watch.EVERY_S:
            family |= family_of(driver)
            looked = time.monotonic()
        time.sleep(0.02)
    return family


def kill_a_worker(driver: int) -> None:
    """Of those that have something to do, the first that is found."""
    while True:
        for child in psutil.Process(driver).children(recursive=True):
            with contextlib.suppress(psutil.Error, IndexError):
                if child.cmdline()[0].startswith("ray::guarded"):
                    return child.kill()
        time.sleep(0.02)


def killed_at(
    moment: Moment, spec: Path, folder: Path, *, delay: float = 0.0, worker_at: Moment | None = None
) -> Left:
    """What a driver, new or resumed, leaves when it is killed `delay` seconds after `moment`: no process.

    Before it a worker of its is killed at `worker_at`.
    """
    with open(folder.parent / "told.txt", "wb") as told:
        driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(spec), str(folder)], stdout=told)
    try:
        family: watch.Processes = {}
        if worker_at is not None:
            family |= followed_until(driver, folder, worker_at)
            kill_a_worker(driver.pid)
        family |= followed_until(driver, folder, moment)
        time.sleep(delay)
        assert driver.poll() is None, "the driver ended before it was killed"
        family |= family_of(driver)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    deadline = time.monotonic() + 20
    while (left := watch.descendants(family)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, f"still running after the kill: {left}"
    return Left(ledger(folder), begun(folder))


def of_this_session(events: Events) -> Events:
    return [event for event in events if event["session"] == events[-1]["session"]] if events else []


def after(count: int) -> Moment:
    return lambda events: len(events) >= count


def in_phase(name: str, begun: int = 0) -> Moment:
    """In that phase of the session at hand, when `begun` of its evaluations have been begun."""

    def moment(events: Events) -> bool:
        events = of_this_session(events)
        entered = [n for n, event in enumerate(events) if event.get("phase") == name]
        later = events[entered[-1] :] if entered else []
        return bool(later) and sum(event["event"] == "evaluation_started" for event in later) >= begun

    return moment


@pytest.mark.slow
def test_a_search_killed_in_every_phase_ends_as_if_nothing_had_happened(
    workers: Workers, tiny_text: str, tmp_path: Path, full_counts: bool
) -> None:
    spec, folder = tmp_path / "tiny.yaml", tmp_path / "run"
    spec.write_text(tiny_text)
    # Event 4 is the first timing; any of what follows may be cut, also the middle of a line.
    moment, trainings, delays = (
        RANDOM.randint(4, ROUNDS_END),
        RANDOM.randint(0, 2),
        (RANDOM.random(), RANDOM.random()),
    )
    ends = ("export", "report") if full_counts else (RANDOM.choice(("export", "report")),)
    print(
        f"killed after event {moment}, after {trainings + 2} trainings of the confirmation, in {ends} after {delays} s"
    )

    def reports(_: Events) -> bool:
        return (tmp_path / "told.txt").read_bytes() != b""

    left = [
        killed_at(after(moment), spec, folder),
        killed_at(in_phase("confirm", trainings + 2), spec, folder, worker_at=in_phase("confirm", begun=1)),
    ]
    # A clean process that loads the export takes seconds, and the report at least a third of one.
    if "export" in ends:
        left.append(killed_at(in_phase("export"), spec, folder, delay=2.0 * delays[0]))
    if "report" in ends:
        left.append(killed_at(reports, spec, folder, delay=0.3 * delays[1]))

    run = search(load(spec), folder, resume=True, effort=Effort(warmup=1, least=3, most=5, seconds=0.2))

    assert run.status == "finished"
    assert len(run.trials) == TRIALS
    # A search that nobody kills, and that measures the same latencies, asks the same and scores the same, to the last bit.
    assert replay(folder, tmp_path / "uninterrupted").changes == ()
    kept, times = ledger(folder), begun(folder)
    for each in left:
        assert {path: data for path, data in kept.items() if path in each.ledger} == each.ledger
        assert {path: times[path] for path in each.ledger} == {path: each.begun[path] for path in each.ledger}
    # After the confirmation nothing was left to evaluate.
    assert left[2].ledger == kept
    # What was begun and not written at a kill was begun anew, and what the killed worker trained; nothing else. Workers are
    # handed the next before the answers of others are written, so twice as many as run side by side may be lost.
    lost = [len(each.begun.keys() - each.ledger.keys()) for each in left]
    assert max(lost) <= 2 * workers.parallel
    assert 0 <= sum(times.values()) - len(kept) - sum(lost) <= 1
    assert run.confirm is not None
    assert sorted(path.name for path in (folder / "best").iterdir()) == [
        "export",
        "model.safetensors",
        "spec.yaml",
    ]
    assert api.report(folder).read_text().rstrip().endswith("</html>")
