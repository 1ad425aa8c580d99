"""What a worker says, in a file beside it while the call runs: of a process that dies or hangs nothing else is left to ask.

The file lies in the temporary folder of the worker's machine, under the number of Ray's task. A call that returns takes it along;
of one that does not, the driver asks the nodes for it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

# Of what was said the last so many bytes are kept.
MOST_BYTES = 1_000_000
# For the nodes to answer; one that has died does not.
PATIENCE_S = 20.0
STDOUT, STDERR = 1, 2


@contextlib.contextmanager
def kept() -> Iterator[Path]:
    """In a worker: all that this process writes goes to the file, its stack at a fatal signal too; then the file is gone."""
    path = _path(ray.get_runtime_context().get_task_id())
    with open(path, "a", buffering=1, errors="replace") as file:
        before = [os.dup(number) for number in (STDOUT, STDERR)]
        for number in (STDOUT, STDERR):
            os.dup2(file.fileno(), number)
        faulthandler.enable(file=STDERR)
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield path
        finally:
            for number, old in zip((STDOUT, STDERR), before, strict=True):
                os.dup2(old, number)
                os.close(old)
            path.unlink(missing_ok=True)


def read(path: Path) -> str:
    """What was said to the file until now, its end if it is long; "" without one."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - MOST_BYTES))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def of_dead(reference: Any) -> str:
    """What the worker of a call said whose process has ended, from whichever node has it; "" where that is gone, too."""
    task = reference.task_id().hex()
    ask = ray.remote(num_cpus=0, max_retries=0)(_taken)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    asked = [
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(task)
        for node in nodes
    ]
    ready, _ = ray.wait(asked, num_returns=len(asked), timeout=PATIENCE_S) if asked else ([], [])
    said = []
    for each in ready:
        with contextlib.suppress(RayError):
            said.append(ray.get(each))
    return "".join(said)


def _taken(task: str) -> str:
    """On a node: what lies there of that task."""
    path = _path(task)
    text = read(path)
    path.unlink(missing_ok=True)
    return text


def _path(task: str | None) -> Path:
    return Path(tempfile.gettempdir(), f"heddle-said-{task}.log")
