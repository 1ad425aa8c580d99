"""How many trainings share a GPU, and what becomes of one that finds no memory there. Ray counts GPUs as it is told to, so that
none has to be there."""

from __future__ import annotations

import json
import subprocess
import sys

CALLS = """
import json, sys
import ray, ray.cloudpickle
from heddle.errors import HeddleError
from heddle.search.workers import Job, Workers

ray.cloudpickle.register_pickle_by_value(sys.modules["__main__"])

def share():
    return ray.get_runtime_context().get_assigned_resources()["GPU"]

def wide(least):
    if share() < least:
        raise HeddleError("out-of-memory", f"a share of {share():g} is too little")
    return share()

class Hearing:
    def __init__(self): self.heard = []
    def begun(self, jobs): self.heard += [job.tag for job in jobs]
    def placed(self, job, place): pass
    def tick(self): pass
    def is_stopping(self): return False

def told(workers):
    hearing = Hearing()
    jobs = [Job(wide, (least,), name) for name, least in (("wide", 1), ("never", 2), ("small", 0))]
    answers = {a.job.tag: [a.value, a.code, a.job.attempt] for a in workers.side_by_side(jobs, hearing)}
    return [workers.parallel, answers, hearing.heard]

ray.init(address="local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False)
found = {}
for per_gpu in (2, 1):
    with Workers(per_gpu=per_gpu) as workers:
        found[per_gpu] = told(workers)
print(json.dumps(found))
"""


def test_what_finds_no_memory_beside_others_is_made_once_more_on_the_whole_gpu() -> None:
    command = [sys.executable, "-c", CALLS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    parallel, answers, heard = found["2"]
    assert parallel == 2
    assert answers == {"small": [0.5, None, 1], "wide": [1.0, None, 2], "never": [None, "out-of-memory", 2]}
    # After all that share it, and only once more.
    assert sorted(heard[:3]) == ["never", "small", "wide"]
    assert sorted(heard[3:]) == ["never", "wide"]
    # Who had the whole GPU at first is not asked again.
    parallel, answers, heard = found["1"]
    assert parallel == 1
    assert answers == {"wide": [1.0, None, 1], "never": [None, "out-of-memory", 1], "small": [1.0, None, 1]}
    assert len(heard) == 3
