"""How many CPU cores this process may use, by its affinity and by the quota of its control groups, and of what processor."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def processor_name() -> str:
    """The model of the processor, as it says itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Cores this process may use, two hardware threads of one core counted once, and no more than its quota, rounded up."""
    cores, quota = _physical_cores(), cpu_quota(cgroups, membership)
    return max(1, cores if quota is None else min(cores, math.ceil(quota)))


def cpu_quota(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> float | None:
    """CPUs' worth of time a second that the control groups leave this process; None without a limit.

    The least of its own group and of those above it. In a container the path of a group may be the host's: what of it is
    not there is passed over, and the container's own limit stands at the root.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    limits = [limit for line in lines for folder in _folders(cgroups, line) if (limit := _limit(folder))]
    return min(limits, default=None)


def _folders(cgroups: Path, line: str) -> Iterator[Path]:
    """The group of a line of /proc/self/cgroup, "number:controllers:path", and those above it; none without CPU control."""
    _, controllers, path = line.split(":", 2)
    parts = [part for part in path.split("/") if part not in ("", "..")]
    bases = []
    if controllers == "":
        # Version 2; "unified" beside version 1.
        bases = [cgroups, cgroups / "unified"]
    elif "cpu" in controllers.split(","):
        bases = [cgroups / "cpu", cgroups / controllers]
    for base in bases:
        yield from (base.joinpath(*parts[:depth]) for depth in range(len(parts) + 1))


def _limit(folder: Path) -> float | None:
    """The limit of one group, of version 2 or 1."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError):
        # No such file, or "max".
        return None


def _physical_cores() -> int:
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = set()
    for cpu in usable:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings.add(path.read_text().strip())
        except OSError:
            siblings.add(str(cpu))
    return len(siblings)
