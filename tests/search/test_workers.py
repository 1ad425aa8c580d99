"""Ray workers: errors as data, dead processes noticed and retried, the whole device for a timing, nothing
left over."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle

from heddle.errors import HeddleError
from heddle.search import watch
from heddle.search.workers import RETRIES, Answer, Job, Workers

# The workers cannot import this file.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

# Bytes of a result that lies in the object store; smaller ones come with the message that the call has ended.
LARGE = 1_000_000


class Hearing:
    """A watcher that writes down what it hears, and stops when `stop_after` jobs have begun."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.heard: list[Any] = []
        self.stop_after = stop_after

    def begun(self, jobs: Sequence[Job]) -> None:
        self.heard += [job.tag for job in jobs]

    def tick(self) -> None:
        pass

    def is_stopping(self) -> bool:
        return self.stop_after is not None and len(self.heard) >= self.stop_after


def square(value: int) -> int:
    print(f"squaring {value}")
    return value * value


def fail(kind: str) -> None:
    if kind == "told":
        raise HeddleError("loss-not-finite", "the loss is nan at step 3 of 9", hint="a lower rate")
    raise ZeroDivisionError("by zero")


def die(folder: str, times: int) -> str:
    """Ends its process the first `times` times."""
    marks = Path(folder)
    count = len(list(marks.iterdir()))
    (marks / str(count)).touch()
    if count < times:
        os._exit(1)
    return "alive"


def span(seconds: float) -> tuple[float, float]:
    began = time.time()
    time.sleep(seconds)
    return began, time.time()


def answers(workers: Workers, jobs: list[Job]) -> dict[Any, Answer]:
    return {answer.job.tag: answer for answer in workers.side_by_side(jobs, Hearing())}


def test_answers_carry_value_log_and_time(workers: Workers) -> None:
    found = answers(workers, [Job(square, (n,), n) for n in range(5)])
    assert {tag: answer.value for tag, answer in found.items()} == {n: n * n for n in range(5)}
    assert found[3].log == "squaring 3\n"
    assert all(answer.ok and answer.wall_s >= 0 for answer in found.values())


def test_a_shared_value_arrives_as_itself(workers: Workers) -> None:
    ticket = workers.share(list(range(1000)))
    assert answers(workers, [Job(sum, (ticket,), "sum")])["sum"].value == 499_500


def kept_from_the_collector() -> tuple[int, int]:
    import torch  # noqa: F401

    return os.getpid(), gc.get_freeze_count()


def test_what_a_worker_has_imported_is_not_collected_over_and_over(workers: Workers) -> None:
    found = answers(workers, [Job(kept_from_the_collector, (), n) for n in range(3 * workers.parallel)])
    # A process that had torch before a call has taken it from the collector.
    last = dict(found[n].value for n in sorted(found))
    assert max(last.values()) > 100_000


def test_an_error_of_the_call_is_final_and_keeps_its_code(workers: Workers) -> None:
    found = answers(workers, [Job(fail, ("told",), "told"), Job(fail, ("bug",), "bug")])
    assert (found["told"].code, found["told"].message) == (
        "loss-not-finite",
        "the loss is nan at step 3 of 9",
    )
    assert (found["bug"].code, found["bug"].message) == ("evaluation-failed", "ZeroDivisionError: by zero")
    assert "Traceback" in found["bug"].log
    assert found["bug"].job.attempt == 1


class Unreadable:
    """A call that a worker cannot be handed."""

    def __reduce__(self) -> Any:
        return fail, ("bug",)

    def __call__(self) -> None:
        raise AssertionError


def test_what_a_worker_cannot_read_is_told_by_its_reason(workers: Workers) -> None:
    (answer,) = workers.side_by_side([Job(Unreadable(), (), "lost")], Hearing())
    assert answer.code == "evaluation-failed"
    # And not by the name of Ray's call and the number of its process.
    assert answer.message.endswith("by zero")


@pytest.mark.parametrize("deaths", [1, RETRIES + 1])
def test_a_call_whose_process_dies_is_made_again_twice(workers: Workers, tmp_path: Path, deaths: int) -> None:
    hearing = Hearing()
    (answer,) = workers.side_by_side([Job(die, (str(tmp_path), deaths), "mortal")], hearing)
    if deaths <= RETRIES:
        assert answer.value == "alive"
    else:
        assert answer.code == "worker-died"
        assert answer.message
    assert hearing.heard == ["mortal"] * min(deaths + 1, RETRIES + 1)


def told_to(path: str, size: int) -> bytes:
    Path(path).write_text(str(os.getpid()))
    return bytes(size)


def killed(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    while pid in watch._table():
        time.sleep(0.05)


def test_a_result_outlives_the_process_that_made_it(workers: Workers, tmp_path: Path) -> None:
    """Its copy lies with the node until the driver lets go of it."""
    reference = workers._one.remote(told_to, "cpu", str(tmp_path / "pid"), LARGE)
    ray.wait([reference], fetch_local=False)
    killed(int((tmp_path / "pid").read_text()))
    assert ray.get(reference).value == bytes(LARGE)
    # Ray may hand the dead process one more call; this one is made again.
    assert answers(workers, [Job(square, (3,), 3)])[3].value == 9


def test_nothing_runs_beside_a_call_with_the_whole_device(workers: Workers) -> None:
    """Trainings are in flight when the timing is asked for: it waits for them, and they for it."""
    beside = [workers._one.remote(span, "cpu", 0.3) for _ in range(2 * workers.parallel)]
    (timing,) = workers.on_whole_device([Job(span, (0.3,), "timing")], Hearing())
    spans = [outcome.value for outcome in ray.get(beside)]
    began, ended = timing.value
    assert all(end <= began or start >= ended for start, end in spans)


def test_workers_go_on_before_an_answer_is_written_and_a_timing_waits_for_that(workers: Workers) -> None:
    count = workers.parallel + 1
    for run, begun in ((workers.side_by_side, count), (workers.on_whole_device, 1)):
        hearing = Hearing()
        found = run([Job(span, (0.0,), n) for n in range(count)], hearing)
        assert next(found).ok
        assert len(hearing.heard) == begun
        assert len([answer for answer in found if answer.ok]) == count - 1


def test_after_a_stop_what_runs_is_answered_and_nothing_else_begins(workers: Workers) -> None:
    jobs = [Job(span, (0.2,), n) for n in range(10)]
    hearing = Hearing(stop_after=workers.parallel)
    assert len(list(workers.side_by_side(jobs, hearing))) == workers.parallel
    assert hearing.heard == list(range(workers.parallel))


DRIVER = """
import time
from heddle.search.workers import Workers
with Workers("cpu") as workers:
    for _ in range(workers.parallel):
        workers._one.remote(time.sleep, "cpu", 600)
    time.sleep(1.0)
    print("ready", flush=True)
    time.sleep(600)
"""


def test_nothing_runs_on_when_the_driver_is_killed() -> None:
    process = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    family = watch.descendants({process.pid: watch._table()[process.pid].began})
    assert len(family) > 4
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 15
    while (left := watch.descendants(family)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


STARTER = """
import subprocess, time
while True:
    subprocess.Popen(["sleep", "600"])
    time.sleep(0.01)
"""


def test_who_starts_others_is_stopped_before_they_are_counted() -> None:
    with subprocess.Popen([sys.executable, "-c", STARTER]) as process:
        time.sleep(0.5)
        found = watch.stopped(watch.descendants({process.pid: watch._table()[process.pid].began}))
        time.sleep(0.2)
        left = watch.descendants(found)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert len(found) > 1
    assert left == found


def hang(folder: str, times: int) -> str:
    """Hangs the first `times` times."""
    marks = Path(folder)
    count = len(list(marks.iterdir()))
    (marks / str(count)).touch()
    if count < times:
        time.sleep(600)
    return "done"


@pytest.mark.parametrize("hangs", [1, RETRIES + 1])
def test_a_call_that_hangs_is_ended_and_made_again_twice(
    workers: Workers, tmp_path: Path, hangs: int
) -> None:
    hearing = Hearing()
    job = Job(hang, (str(tmp_path), hangs), "hung", limit_s=0.5)
    (answer,) = workers.side_by_side([job], hearing)
    if hangs <= RETRIES:
        assert answer.value == "done"
    else:
        assert (answer.code, answer.message) == ("timed-out", "it took more than 0.5 s")
        assert answer.job.attempt == RETRIES + 1
    assert len(hearing.heard) == min(hangs, RETRIES) + 1


def speak_and(end: str) -> None:
    print("a word of Python's")
    os.write(2, b"a word of C's\n")
    if end == "hang":
        time.sleep(600)
    os.kill(os.getpid(), signal.SIGKILL if end == "killed" else signal.SIGSEGV)


@pytest.mark.parametrize(
    ("end", "code"), [("hang", "timed-out"), ("killed", "worker-died"), ("crash", "worker-died")]
)
def test_what_a_dead_or_hung_worker_said_is_told_of_each_attempt(
    workers: Workers, end: str, code: str
) -> None:
    job = Job(speak_and, (end,), end, limit_s=0.5 if end == "hang" else None)
    (answer,) = workers.side_by_side([job], Hearing())
    assert answer.code == code
    for word in ("a word of Python's\n", "a word of C's\n"):
        assert answer.log.count(word) == RETRIES + 1
    assert [f"--- attempt {n}: {code}: " in answer.log for n in (1, 2)] == [True, True]
    if end != "killed":
        assert answer.log.count("in speak_and") >= RETRIES + 1


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="other systems tell no command lines")
def test_a_worker_that_is_starting_is_known_by_its_session() -> None:
    """Its raylet may have ended: then it is nobody's child."""
    raylet = "--raylet-name=/tmp/ray/session_2026-11-26_19-40-10_1_2/sockets/raylet"
    told = ["-c", "import time; time.sleep(60)", f"/x{watch.WORKER}", raylet]
    process = subprocess.Popen([sys.executable, *told])
    try:
        while "default_worker" not in watch._command(process.pid):
            time.sleep(0.01)
        sessions = watch.sessions_of({process.pid: ""})
        assert sessions == {"session_2026-11-26_19-40-10_1_2"}
        assert process.pid in watch.starting(sessions)
        assert process.pid not in watch.starting({"session_2026-11-26_19-40-10_1_3"})
    finally:
        process.kill()
        process.wait()
