"""Ray clusters of processes that are no children of any search: started node by node, and ended whole."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from heddle.search import watch

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Head:
    """A Ray cluster, and the environment of its users."""

    address: str
    pid: int
    env: dict[str, str]

    def family(self) -> watch.Processes:
        return family(self.pid)


def family(pid: int) -> watch.Processes:
    return watch.descendants({pid: watch._table()[pid].began})


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def end(process: subprocess.Popen[bytes]) -> None:
    """End `process` and all that came from it, and nothing else: `ray stop` would end every Ray here."""
    left = family(process.pid) if process.poll() is None else {}
    # The parents first, and looked at again: one of them may have started another meanwhile.
    while left:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.poll()
        left = watch.descendants(left)
    process.wait()


@contextlib.contextmanager
def node(*options: str, cores: int, env: dict[str, str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A node with its working directory in `folder`, up and running."""
    start = [
        Path(sys.executable).parent / "ray", "start", "--block", f"--num-cpus={cores}", "--disable-usage-stats",
        "--object-store-memory=100000000", *options,
    ]  # fmt: skip
    log = folder / "start.log"
    (folder / "cwd").mkdir()
    with open(log, "wb") as file:
        process = subprocess.Popen(
            start, env=env, stdout=file, stderr=file, cwd=folder / "cwd", start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield process
    finally:
        end(process)


@contextlib.contextmanager
def head(cores: int, *more: str) -> Iterator[Head]:
    """The first node of a cluster with a token of its own; `more` are options of `ray start`."""
    # Ray's sockets lie in this folder, and their paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="heddle-ray-"))
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PYTHONPATH": str(ROOT)}
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | token
    port = free_port()
    options = (
        "--head", f"--port={port}", "--include-dashboard=false", "--include-log-monitor=false", f"--temp-dir={folder}",
    )  # fmt: skip
    try:
        with node(*options, *more, cores=cores, env=env, folder=folder) as process:
            yield Head(f"127.0.0.1:{port}", process.pid, env)
    finally:
        shutil.rmtree(folder)
