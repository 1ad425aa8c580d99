"""A guard process: when the search's driver dies, however it dies, what it had started ends too.

Ray's raylet and workers end by themselves within seconds of their driver, but its agents stay about a minute
(ray 2.60). The guard reads a pipe that the kernel closes with the driver, and knows by then every process
that descended from it. Run as a script with only the standard library, so that it starts at once.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from typing import NamedTuple

EVERY_S = 0.5
# How long after the driver's death the guard goes on looking for late starters.
LINGER_S = 3.0
RAY_ROOTS = ("raylet", "gcs_server")
RELEASED = b"r"
# In the command line of a raylet, and of a worker that it starts.
SESSION = re.compile(r"session_\d[\d_-]+")
WORKER = "/ray/_private/workers/default_worker.py"

# pid -> when it was started: a number that the system has given to another process since is not ours.
Processes = dict[int, str]


class Row(NamedTuple):
    """A running process."""

    parent: int
    name: str
    began: str


class Guard:
    """Watches over the calling process from now on, until it ends or calls `release`."""

    def __init__(self) -> None:
        reader, self._writer = os.pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(reader)],
            pass_fds=(reader,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # Ctrl-C in the terminal is for the driver alone.
            start_new_session=True,
        )
        os.close(reader)

    def release(self) -> None:
        """The driver has ended its Ray itself: the guard goes without touching anything."""
        os.write(self._writer, RELEASED)
        os.close(self._writer)
        self._process.wait()


def main(driver: int, reader: int) -> None:
    """Follow the Ray processes of `driver` until `reader` closes, then end those that are still there."""
    family: Processes = {}
    sessions: set[str] = set()
    while not select.select([reader], [], [], EVERY_S)[0]:
        roots = ray_roots(driver)
        sessions |= sessions_of(roots)
        family = descendants({**roots, **family})
    if os.read(reader, 1) == RELEASED:
        return
    family = stopped(descendants({**family, **starting(sessions)}))
    end = time.monotonic() + LINGER_S
    while time.monotonic() < end:
        family = descendants({**family, **starting(sessions)})
        for pid in family:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


def stopped(family: Processes) -> Processes:
    """`family`, stopped, and what it had started meanwhile: the child of one that is killed as it starts it is nobody's."""
    seen = 0
    while len(family) > seen:
        seen = len(family)
        for pid in family:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGSTOP)
        # A start that had begun ends first.
        time.sleep(0.05)
        family = descendants(family)
    return family


def ray_roots(driver: int) -> Processes:
    """The raylet and the store that `driver` has started; other children of it are not ours to end."""
    return {pid: row.began for pid, row in _table().items() if row.parent == driver and row.name in RAY_ROOTS}


def sessions_of(roots: Processes) -> set[str]:
    """The names of the Ray sessions that the command lines of `roots` tell; none where there is no /proc."""
    return {name for pid in roots for name in SESSION.findall(_command(pid))}


def starting(sessions: set[str]) -> Processes:
    """Workers of these sessions that have not said yet what they are. Where their raylet has ended they are nobody's children,
    and look for it for a while."""
    if not sessions:
        return {}
    found = {}
    for pid, row in _table().items():
        command = _command(pid)
        if WORKER in command and sessions.intersection(SESSION.findall(command)):
            found[pid] = row.began
    return found


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def descendants(roots: Processes) -> Processes:
    """Those of `roots` that still live, and all processes that came from them."""
    table = _table()
    found = {pid: began for pid, began in roots.items() if pid in table and table[pid].began == began}
    grew = True
    while grew:
        new = {pid: row.began for pid, row in table.items() if row.parent in found and pid not in found}
        found |= new
        grew = bool(new)
    return found


def _table() -> dict[int, Row]:
    """Every process that has not ended, by pid."""
    if not os.path.exists("/proc/self/stat"):
        return _table_of_ps()
    table = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat") as file:
                head, _, rest = file.read().rpartition(")")
        except OSError:
            continue
        fields = rest.split()
        # A zombie has ended; it only waits for its parent to notice.
        if fields[0] not in "ZX":
            table[int(entry)] = Row(int(fields[1]), head.partition("(")[2], fields[19])
    return table


def _table_of_ps() -> dict[int, Row]:
    columns = ["ps", "-axo", "pid=,ppid=,lstart=,comm="]
    out = subprocess.run(columns, capture_output=True, text=True, check=True)
    table = {}
    for line in out.stdout.splitlines():
        # The time takes five words: Mon Nov 24 03:45:12 2026.
        pid, parent, *began, name = line.split(None, 7)
        table[int(pid)] = Row(int(parent), os.path.basename(name), " ".join(began))
    return table


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
