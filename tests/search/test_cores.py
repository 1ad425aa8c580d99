"""How many cores a search counts on: no more than the control groups leave it."""

from __future__ import annotations

from pathlib import Path

import pytest

from heddle.search.cores import cpu_quota, usable_cores

V1 = {"cpu.cfs_quota_us": "150000\n", "cpu.cfs_period_us": "100000\n"}
OPEN_V1 = {"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}


def fake(folder: Path, lines: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A folder like /sys/fs/cgroup with `files`, and a file like /proc/self/cgroup."""
    for name, text in files.items():
        path = folder / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "self").write_text(lines)
    return folder / "cgroup", folder / "self"


def under(group: str, files: dict[str, str]) -> dict[str, str]:
    return {f"{group}/{name}": text for name, text in files.items()}


@pytest.mark.parametrize(
    ("lines", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        # The least of a group and of those above it counts.
        (
            "0::/a/b\n",
            {"a/b/cpu.max": "300000 100000", "a/cpu.max": "200000 100000", "cpu.max": "max 1"},
            2.0,
        ),
        ("0::/a/b\n", {"a/b/cpu.max": "50000 100000", "a/cpu.max": "200000 100000"}, 0.5),
        # A container sees its own group at the root, under the host's path or above it.
        ("0::/docker/123\n", {"cpu.max": "250000 100000\n"}, 2.5),
        ("0::/../..\n", {"cpu.max": "250000 100000\n"}, 2.5),
        ("2:cpu,cpuacct:/docker/123\n0::/\n", under("cpu,cpuacct", V1), 1.5),
        ("2:cpu:/slice\n1:memory:/other\n", under("cpu/slice", V1) | under("cpu", OPEN_V1), 1.5),
        ("1:cpu:/\n", under("cpu", OPEN_V1), None),
        ("3:cpuset:/\n2:cpuacct:/\n", under("cpu", V1), None),
        ("1:name=systemd:/\n0::/\n", {"unified/cpu.max": "100000 100000"}, 1.0),
    ],
)
def test_the_quota_of_the_control_groups(
    tmp_path: Path, lines: str, files: dict[str, str], quota: float | None
) -> None:
    assert cpu_quota(*fake(tmp_path, lines, files)) == quota


@pytest.mark.parametrize(
    ("quota", "most"), [("10000", 1), ("100000", 1), ("150000", 2), ("max", 10**6), ("0", 10**6)]
)
def test_no_more_cores_than_the_quota_and_at_least_one(tmp_path: Path, quota: str, most: int) -> None:
    without = usable_cores(tmp_path, tmp_path / "none")
    assert without >= 1
    assert usable_cores(*fake(tmp_path, "0::/\n", {"cpu.max": f"{quota} 100000\n"})) == min(without, most)
