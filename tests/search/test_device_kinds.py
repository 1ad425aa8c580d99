"""Timings stay on nodes of one kind in a cluster of unlike ones. Ray counts GPUs and names accelerators as it is told to, so that
none has to be there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fast_search import fast_file, scored

from heddle.errors import HeddleError
from heddle.search.cores import processor_name
from heddle.search.durable import write_json
from heddle.search.evaluations import LATENCY, Evaluations, Request
from heddle.search.events import EventLog
from heddle.search.latency import Effort, Place, measure
from heddle.search.lock import lock_of
from heddle.search.record import RUN_FILE, read_meta
from heddle.search.run import search
from heddle.search.workers import Workers

SCRIPT = """
import json, sys, time
import ray, ray.cloudpickle
from ray.cluster_utils import Cluster
from heddle.errors import HeddleError
from heddle.search.workers import Job, Workers

ray.cloudpickle.register_pickle_by_value(sys.modules["__main__"])

def where(seconds=0.0):
    time.sleep(seconds)
    context = ray.get_runtime_context()
    held = context.get_assigned_resources()
    return [context.get_node_id(), held.get("CPU", 0), held.get("GPU", 0)]

class Hearing:
    def begun(self, job): pass
    def placed(self, job, place): pass
    def tick(self): pass
    def is_stopping(self): return False

def name_of(node):
    (resources,) = (one["Resources"] for one in ray.nodes() if one["NodeID"] == node)
    return next((name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")), "")

def told(answers):
    return sorted([name_of(one.value[0]), *one.value[1:]] for one in answers)

def timed(workers):
    return [*told(workers.on_whole_device([Job(where, (), n) for n in range(2)], Hearing())), name_of(workers.call(where)[0])]

def trained(workers):
    jobs = [Job(where, (0.5,), n) for n in range(2 * workers.parallel)]
    return sorted({one[0] for one in told(workers.side_by_side(jobs, Hearing()))})

def node(name, **sizes):
    named = {"accelerator_type:" + name: 1} if name else {}
    return {"resources": named, "object_store_memory": 80_000_000, **sizes}

found = {}
cluster = Cluster(initialize_head=True, head_node_args=node("", num_cpus=1))
small = cluster.add_node(**node("SMALL", num_cpus=1, num_gpus=1))
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False)
with Workers("cpu", timed_on="SMALL") as workers:
    found["bound"] = [workers.timed_on, *timed(workers)]
    cluster.add_node(**node("LARGE", num_cpus=2, num_gpus=2))
    cluster.wait_for_nodes()
    found["later"] = timed(workers)
    found["trained"] = trained(workers)
    for name, wanted in (("most", None), ("asked", sys.argv[1]), ("unknown", "NEITHER")):
        with Workers("cpu", timed_on=wanted) as others:
            found[name] = [others.timed_on, *timed(others)]
    with Workers(per_gpu=1) as others:
        found["most GPUs"] = [others.device, others.timed_on, *timed(others)]
        found["trained on GPUs"] = trained(others)
    with Workers(per_gpu=1, timed_on="SMALL") as others:
        found["bound GPU"] = [others.timed_on, *timed(others)]
    cluster.remove_node(small, allow_graceful=False)
    try:
        timed(workers)
    except HeddleError as error:
        found["left"] = [error.code, error.what]
print(json.dumps(found))
"""
QUICK = Effort(warmup=1, least=3, most=4, seconds=0.1, builds=1)


@pytest.fixture(scope="module")
def found() -> dict[str, list[Any]]:
    """What ran where in a cluster of a node without a name, one called SMALL, and later one called LARGE."""
    command = [sys.executable, "-c", SCRIPT, processor_name()]
    # Ray's sockets lie in this folder, and their paths must be short.
    folder = tempfile.mkdtemp(prefix="heddle-ray-")
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # Ray asks a node five times before it takes it for dead, by default all three seconds.
    env["RAY_health_check_period_ms"] = "200"
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env=env | {"RAY_TMPDIR": folder},
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    # Ray tells of the dead node on the same stream.
    (line,) = (one for one in done.stdout.splitlines() if one.startswith('{"bound"'))
    told: dict[str, list[Any]] = json.loads(line)
    return told


@pytest.mark.slow
def test_timings_stay_on_processors_of_one_kind_and_take_all_cores_of_a_node(
    found: dict[str, list[Any]],
) -> None:
    assert found["bound"] == ["SMALL", *[["SMALL", 1, 0]] * 2, "SMALL"]
    # A larger node of another kind came: it is none of theirs, and trains.
    assert found["later"] == [*[["SMALL", 1, 0]] * 2, "SMALL"]
    assert found["trained"] == ["", "LARGE", "SMALL"]
    assert found["most"] == ["LARGE", *[["LARGE", 2, 0]] * 2, "LARGE"]
    assert found["unknown"] == found["most"]


@pytest.mark.slow
def test_a_node_without_a_name_tells_its_processor(found: dict[str, list[Any]]) -> None:
    assert found["asked"] == [processor_name(), *[["", 1, 0]] * 2, ""]


@pytest.mark.slow
def test_timings_stay_on_gpus_of_one_name_and_trainings_do_not(found: dict[str, list[Any]]) -> None:
    assert found["most GPUs"] == ["cuda", "LARGE", *[["LARGE", 1, 1]] * 2, "LARGE"]
    assert found["trained on GPUs"] == ["LARGE", "SMALL"]
    assert found["bound GPU"] == ["SMALL", *[["SMALL", 1, 1]] * 2, "SMALL"]


@pytest.mark.slow
def test_a_kind_that_has_left_is_told_beside_those_that_are_there(found: dict[str, list[Any]]) -> None:
    code, what = found["left"]
    assert code == "other-device"
    assert what.endswith(f"SMALL; there are: {', '.join(sorted([processor_name(), 'LARGE']))}")


def test_a_timing_of_another_device_ends_the_search_and_is_not_kept(workers: Workers, tmp_path: Path) -> None:
    model = fast_file(trials=1, round=1).spec.model
    with closing(EventLog(tmp_path)) as log:
        engine = Evaluations(tmp_path, log, workers, on_tick=lambda: None, is_stopping=lambda: False)
        asked = []
        for device in ("another processor", processor_name()):
            inputs = {"purpose": "search", "environment": {"device": device}}
            call = partial(measure, device="cpu", effort=QUICK)
            asked.append(Request(0, "a" * 8, LATENCY, inputs, call, (model, Place("decode", 1, 16))))
        with pytest.raises(HeddleError) as caught:
            engine.time_all(asked[:1])
        assert caught.value.code == "other-device"
        assert f"timed on {processor_name()}, and this search is of another processor" in caught.value.what
        assert engine.get(asked[0]) is None
        engine.time_all(asked[1:])
        entry = engine.get(asked[1])
        assert entry is not None
        assert entry.ok


def test_a_run_says_what_it_was_timed_on_and_goes_on_there_alone(workers: Workers, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = search(fast_file(trials=2, round=2), out, evaluate=scored)
    assert run.meta["timed_on"] == workers.timed_on == processor_name()
    assert lock_of(run)["timed_on"] == processor_name()
    meta = read_meta(out)
    write_json(out / RUN_FILE, meta | {"timed_on": "H100"})
    with pytest.raises(HeddleError) as caught:
        search(fast_file(trials=3, round=2), out, evaluate=scored, resume=True)
    assert caught.value.code == "run-mismatch"
    assert "kind of node to time on" in caught.value.what
    # A run of before kinds were written down goes on as ever.
    del meta["timed_on"]
    write_json(out / RUN_FILE, meta)
    again = search(fast_file(trials=2, round=2), out, evaluate=scored, resume=True, trials=3)
    assert len(again.trials) == 3
