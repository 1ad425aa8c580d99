"""Where a call runs: on a cluster that counts two GPUs, workers tell which of them they hold."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import clusters
import pytest

from heddle.search.evaluations import Evaluations, Request
from heddle.search.events import EventLog
from heddle.search.workers import Answer, Job

# Ray counts GPUs as it is told to, so that none has to be there.
CORES, GPUS = 2, 2
CALLS = """
import json, sys, time
from heddle.search.workers import Job, Workers

class Hearing:
    heard, answered = [], []
    def begun(self, jobs): pass
    def tick(self): pass
    def is_stopping(self): return False
    def placed(self, job, place):
        assert job.tag not in self.answered
        self.heard.append([job.tag, place["node"], place["gpus"]])

with Workers(address=sys.argv[1]) as workers:
    hearing = Hearing()
    jobs = [Job(time.sleep, (0.6 * (n < 2),), n) for n in range(3)]
    for answers in (workers.side_by_side(jobs, hearing), workers.on_whole_device([Job(time.sleep, (0,), 3)], hearing)):
        hearing.answered += [answer.job.tag for answer in answers if answer.ok]
    print(json.dumps([workers.device, workers.parallel, workers.gpus, hearing.answered, hearing.heard]))
"""


@pytest.mark.slow
@pytest.mark.long
def test_workers_tell_which_gpus_they_hold() -> None:
    with clusters.head(CORES, "--num-gpus", str(GPUS)) as head:
        command = [sys.executable, "-c", CALLS, head.address]
        told = subprocess.run(command, env=head.env, capture_output=True, text=True, timeout=300, check=False)
    assert told.returncode == 0, told.stderr
    device, parallel, gpus, answered, heard = json.loads(told.stdout.splitlines()[-1])
    assert (device, parallel, gpus) == ("cuda", CORES, GPUS)
    assert sorted(answered) == [0, 1, 2, 3]
    assert Counter(tag for tag, *_ in heard) == Counter(answered)
    assert len({node for _, node, _ in heard}) == 1
    assert all(held in (["0"], ["1"]) for *_, held in heard)


class Placing:
    """Workers of two GPUs that answer at once."""

    device, parallel, gpus = "cuda", 8, 2

    def side_by_side(self, jobs: list[Job], watcher: Any) -> list[Answer]:
        watcher.begun(jobs)
        for job in jobs:
            watcher.placed(job, {"node": "here", "gpus": ["1"]})
        return [Answer(job, code="evaluation-failed", message="none") for job in jobs]


def test_events_tell_room_and_places(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    never: Any = lambda: False  # noqa: E731
    held = Evaluations(tmp_path, log, Placing(), on_tick=never, is_stopping=never)  # type: ignore[arg-type]
    for number in range(2):
        held.train_all([Request(number, secrets.token_hex(8), "text", {}, print, ())])
    log.close()
    kinds = ["evaluation_started", "evaluation_placed", "evaluation_finished"]
    assert [event["event"] for event in log.events] == ["workers", *kinds, *kinds]
    assert (log.events[0]["parallel"], log.events[0]["gpus"]) == (8, 2)
    placed = log.events[2]
    assert (placed["number"], placed["stage"], placed["node"], placed["gpus"]) == (0, "text", "here", ["1"])


class Limited(Placing):
    """Workers that note how long each job may take."""

    def __init__(self) -> None:
        self.limits = list[float | None]()

    def side_by_side(self, jobs: list[Job], watcher: Any) -> list[Answer]:
        self.limits += [job.limit_s for job in jobs]
        return super().side_by_side(jobs, watcher)


def test_a_training_that_is_longer_has_a_timeout_as_much_longer(tmp_path: Path) -> None:
    never: Any = lambda: False  # noqa: E731
    workers: Any = Limited()
    log = EventLog(tmp_path)
    held = Evaluations(tmp_path, log, workers, on_tick=never, is_stopping=never, timeout=2.0)
    inputs = {"tokens": 1}, {"tokens": 4}
    asked = [Request(0, "spec", "mqar", one, len, (), times=one["tokens"]) for one in inputs]
    held.train_all(asked)
    log.close()
    assert workers.limits == [2.0, 8.0]
