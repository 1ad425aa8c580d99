"""A node of a cluster ends in the middle of a search: what it was doing is done again elsewhere, and nothing finished is lost.

The driver and each node stand in working directories of their own, and every path that the search is given is relative: what
a worker opened of the run or of the data would not be there.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import clusters
import psutil
import pytest
from bench.faults import Tally, begun, events, same
from fast_search import fast_file, scored

from heddle.search.durable import read_lines
from heddle.search.record import EVENTS_FILE, read_run
from heddle.search.run import search

TRIALS, ROUND = 16, 4
# So many losses take more than 100 KB: they lie with the node of the worker until the driver has them.
DRIVER = f"""
import os, sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from fast_search import fast_file, scored
from heddle.search.run import search

def heavy(training, task):
    found = scored(training, task, seconds=2.0)
    own = {{"extras": {{"node": float(os.getppid())}}, "losses": [(n, 1 / (n + 1)) for n in range(10**4)]}}
    return replace(found, result=found.result | own)

import ray.cloudpickle
ray.cloudpickle.register_pickle_by_value(sys.modules["__main__"])
folder = Path("run")
search(fast_file(trials={TRIALS}, round={ROUND}), folder, evaluate=heavy, ray_address=sys.argv[1])
"""


def nodes_of(folder: Path) -> Counter[float]:
    """How many evaluations each node, known by its raylet, has finished."""
    run = read_run(folder)
    return Counter(score.extras["node"] for trial in run.trials for score in trial.scores.values())


def is_busy(node: int) -> bool:
    """Whether a worker of that node has an evaluation."""
    for child in psutil.Process(node).children(recursive=True):
        with contextlib.suppress(psutil.Error, IndexError):
            if child.cmdline()[0].startswith("ray::guarded"):
                return True
    return False


# Joins while the head is alone, and has work when it is told to.
EARLY = """
import sys
from heddle.search.workers import Job, Workers

class Hearing:
    def begun(self, jobs): pass
    def tick(self): pass
    def is_stopping(self): return False

with Workers("cpu", address=sys.argv[1]) as workers:
    print("joined", flush=True)
    input()
    list(workers.side_by_side([Job(len, ("",), 0)], Hearing()))
"""
REFUSED = r"the Ray node [\d.]+ has heddle's files \w{12} instead of \w{12}\b"


@pytest.mark.long
def test_a_node_with_another_heddle_is_refused_by_its_name_also_when_it_comes_late(tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(clusters.ROOT / "heddle", other / "heddle", ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "heddle" / "search" / "evaluate.py").open("a") as file:
        file.write("# changed\n")
    (tmp_path / "second").mkdir()
    with ExitStack() as stack:
        head = stack.enter_context(clusters.head(1))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, "-c", EARLY, head.address]
        early = subprocess.Popen(command, env=head.env, cwd=tmp_path, text=True, **pipes)
        stack.callback(early.kill)
        assert early.stdout is not None
        assert early.stdout.readline() == "joined\n"
        node = clusters.node(
            f"--address={head.address}",
            cores=1,
            env=head.env | {"PYTHONPATH": str(other)},
            folder=tmp_path / "second",
        )
        stack.enter_context(node)
        join = "import sys; from heddle.search.cluster import join; join(sys.argv[1], {})"
        # Ray has workers look for modules in the driver's working directory first: heddle must not lie there.
        command = [sys.executable, "-c", join, head.address]
        told = subprocess.run(
            command, env=head.env, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert told.returncode == 1
        assert re.search(REFUSED, told.stderr), told.stderr
        _, late = early.communicate("now\n", timeout=120)
        assert early.returncode == 1
        assert re.search(REFUSED, late), late


# Long: half a minute of an idle machine, most of it for starting nodes.
@pytest.mark.long
def test_a_node_that_ends_in_mid_search_costs_no_result(tmp_path: Path) -> None:
    driver, folder = tmp_path / "driver", tmp_path / "driver" / "run"
    for name in ("driver", "second"):
        (tmp_path / name).mkdir()
    with ExitStack() as stack:
        head = stack.enter_context(clusters.head(1))
        second = stack.enter_context(
            clusters.node(f"--address={head.address}", cores=1, env=head.env, folder=tmp_path / "second")
        )
        env = head.env | {"PYTHONPATH": f"{clusters.ROOT}:{clusters.ROOT / 'tests'}"}
        command = [sys.executable, "-c", DRIVER, head.address]
        searching = subprocess.Popen(command, env=env, cwd=driver, stderr=subprocess.PIPE)
        stack.callback(searching.kill)
        # In the second round, with an evaluation in flight on the node.
        while len(begun(folder)) <= ROUND or not is_busy(second.pid):
            assert searching.poll() is None, searching.stderr and searching.stderr.read().decode()
            time.sleep(0.05)
        tally = Tally(folder)
        tally.note()
        before = len(events(folder))
        clusters.end(second)
        _, told = searching.communicate(timeout=600)
        assert searching.returncode == 0, told.decode()
        tally.note()
        assert not list((tmp_path / "second" / "cwd").iterdir())

    run = read_run(folder)
    assert run.status == "finished"
    assert (tally.lost, tally.again) == (0, 0)
    # What was in flight on the node was asked for again, and a result that still lay there; nothing else.
    again = sum(count - 1 for count in begun(folder).values())
    assert 1 <= again <= 2
    late = [e for e in read_lines(folder / EVENTS_FILE)[before:] if e["event"] == "evaluation_finished"]
    assert all(event["ok"] for event in late)
    assert all(trial.state == "complete" for trial in run.trials)
    assert len(nodes_of(folder)) == 2
    undisturbed = search(fast_file(trials=TRIALS, round=ROUND), tmp_path / "whole", evaluate=scored)
    assert same(undisturbed, run)
