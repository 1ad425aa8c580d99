"""`kill -9` of a driver at a random moment: the resumed search is the one that would have been, and nothing
runs on."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from heddle.search import watch
from heddle.search.durable import read_lines
from heddle.search.latency import Effort
from heddle.search.record import EVENTS_FILE, Run
from heddle.search.run import search
from heddle.specs import load

DRIVER = """
import sys
from pathlib import Path
from heddle.search.latency import Effort
from heddle.search.run import search
from heddle.specs import load
search(load(sys.argv[1]), Path(sys.argv[2]), effort=Effort(warmup=1, least=3, most=5, seconds=0.2))
"""


def ledger(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.glob("ledger/*/*/*.json")}


def followed_until(driver: subprocess.Popen[bytes], folder: Path, moment: int) -> watch.Processes:
    """The driver's processes, gathered until it has written `moment` events."""
    family: watch.Processes = {}
    while len(read_lines(folder / EVENTS_FILE)) < moment:
        assert driver.poll() is None, "the driver ended by itself"
        family |= watch.descendants({driver.pid: watch._table()[driver.pid].began})
        time.sleep(0.02)
    return family


def nothing_finished_was_evaluated_again(run: Run, finished: dict[Path, bytes]) -> None:
    assert {path: data for path, data in ledger(run.path).items() if path in finished} == finished
    begun = Counter(
        (event["hash"], event["stage"], event["key"] + ".json")
        for event in run.events
        if event["event"] == "evaluation_started"
    )
    assert all(begun[path.parts[-3], path.parts[-2], path.parts[-1]] == 1 for path in finished)
    # What was in flight at the kill may have been begun twice.
    assert set(begun.values()) <= {1, 2}


@pytest.mark.slow
@pytest.mark.usefixtures("workers")
def test_a_killed_search_resumes_as_if_nothing_had_happened(
    tiny_run: Run, tiny_text: str, tmp_path: Path
) -> None:
    spec, folder = tmp_path / "tiny.yaml", tmp_path / "run"
    spec.write_text(tiny_text)
    # Event 4 is the first timing, event 90 near the end: any of it may be cut, also the middle of a line.
    moment = random.SystemRandom().randint(4, 70)
    print(f"killed after event {moment}")
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(spec), str(folder)])
    try:
        family = followed_until(driver, folder, moment)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    deadline = time.monotonic() + 20
    while (left := watch.descendants(family)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left, f"still running after the kill: {left}"
    finished = ledger(folder)

    effort = Effort(warmup=1, least=3, most=5, seconds=0.2)
    run = search(load(spec), folder, resume=True, effort=effort)

    assert run.status == "finished"
    assert [trial.number for trial in run.trials] == [trial.number for trial in tiny_run.trials]
    # What was asked and how it scored is that of the uninterrupted search, to the last bit.
    for ours, theirs in zip(run.trials, tiny_run.trials, strict=True):
        assert (ours.params, ours.layers, ours.hash) == (theirs.params, theirs.layers, theirs.hash)
        assert {t: s.value for t, s in ours.scores.items()} == {t: s.value for t, s in theirs.scores.items()}
    nothing_finished_was_evaluated_again(run, finished)
