"""The page of figures says what the committed rows say."""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench"


@pytest.mark.parametrize("script", ["rivals", "encoder_table", "sparse_table"])
def test_a_table_is_of_the_committed_rows(script: str) -> None:
    done = subprocess.run([sys.executable, str(BENCH / f"{script}.py"), "--check"], check=False)
    assert done.returncode == 0, f"python tests/bench/{script}.py writes it anew"


@pytest.mark.parametrize(
    ("impl", "times", "expected"),
    [
        ("fla", (1.0, 1.04, 1.1), 1.04),
        ("fla", (1.0, 1.1, 1.2), 1.0),
        ("fla, guard lifted", (1.0, 1.02, 2.0), 1.0),
        ("heddle", (1.0, 1.1, 2.0), 1.1),
    ],
)
def test_a_rival_that_waited_for_its_host_is_told_by_its_fastest_tenth(
    impl: str, times: tuple[float, float, float], expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    rivals = importlib.import_module("rivals")
    row = dict(zip(("ms_p10", "ms", "ms_p90"), times, strict=True))
    assert rivals.steadied({"impl": impl, "shape": {"T": 4096}, **row})["ms"] == expected
    # An eager step is the host's time.
    assert rivals.steadied({"impl": impl, "shape": {"T": 1}, **row})["ms"] == times[1]


def test_a_shape_that_the_last_run_left_out_is_of_the_last_run_that_timed_both(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    rivals = importlib.import_module("rivals")
    short, long = ({"B": 1, "T": T, "H": 16} for T in (4096, 32768))
    runs = {
        run: [
            {"run": run, "commit": "c", "op": "gla", "phase": "fwd", "impl": impl, "shape": shape, "ms": ms}
            for impl, shape, ms in timed
        ]
        for run, timed in {
            "first": [("heddle", short, 3.0), ("heddle", long, 4.0), ("fla", short, 5.0), ("fla", long, 6.0)],
            "second": [("heddle", short, 1.0), ("heddle", long, 2.0), ("fla, guard lifted", short, 5.0)],
        }.items()
    }
    monkeypatch.setattr(rivals, "all_runs", lambda: runs)
    pairs = list(rivals.pairs("gla", "fwd"))
    told = [(ours["run"], theirs["run"], theirs["earlier"]) for ours, theirs in pairs]
    assert told == [("second", "second", False), ("first", "first", True)]
    assert rivals.alone_since("gla", "fwd", pairs[1][0])["ms"] == 2.0
    assert "at 1 × 32,768 `first` at `c`, ours alone since 2.000 ms in `second` at `c`" in rivals.earlier()[0]


def timed_run(run: str, time: str, ours: float, rival: float | None, device: str) -> list[dict[str, object]]:
    about = {"run": run, "time": time, "commit": f"of {run}", "device": device, "op": "an op", "phase": "fwd"}
    told = {"heddle": ours} if rival is None else {"heddle": ours, "fla": rival}
    return [
        {**about, "impl": impl, "ms": ms, "dtype": "bfloat16", "shape": {"B": 1, "T": 64, "extra": 3}}
        for impl, ms in told.items()
    ]


def test_a_goal_is_told_of_the_newest_run_that_timed_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    table, goals = (importlib.import_module(name) for name in ("sparse_table", "sparse_goals"))
    line = goals.Line(
        "what", "1 × 64", "a file", "an op", "fwd", {"B": 1, "T": 64}, "fla",
        goal=2.0, limit="something", noted={"of new": "then", "of old": "before"},
    )  # fmt: skip
    runs = (
        ("new", "2026-11-28T03:10:00Z", 2.0, 5.0, "NVIDIA H200"),
        ("old", "2026-11-27T03:10:00Z", 1.0, 9.0, "NVIDIA H200"),
        ("alone", "2026-11-29T03:10:00Z", 1.0, None, "NVIDIA H200"),
        ("elsewhere", "2026-11-29T03:10:00Z", 1.0, 9.0, "NVIDIA H100 80GB HBM3"),
    )
    rows = [row for run in runs for row in timed_run(*run)]
    monkeypatch.setattr(table, "rows_of", lambda _: rows)
    told = table.cells(line, table.runs_of(line.file))
    assert told[2:] == ["2.00", "fla", "5.00", "**2.50**", "≥ 2", "something; then", "`new` at `of new`"]
    rows[:] = [row for row in rows if row["run"] == "alone"]
    assert table.cells(line, table.runs_of(line.file))[2:4] == ["not timed", "fla"]
    assert table.cells(replace(line, told_once_timed=True), table.runs_of(line.file)) is None


def test_times_of_parts_are_added_up_unless_a_run_timed_them_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    table, goals = (importlib.import_module(name) for name in ("sparse_table", "sparse_goals"))
    line = goals.Line(
        "", "", "a file", "an op", "fwd", {"B": 1}, "fla", ours=("heddle", "router"), instead="both"
    )
    rows = timed_run("a run", "2026-11-28T03:10:00Z", 2.0, 6.0, "NVIDIA H200")
    rows.append({**rows[0], "impl": "router", "ms": 1.0})
    monkeypatch.setattr(table, "rows_of", lambda _: rows)
    assert table.cells(line, table.runs_of(line.file))[2:6] == ["3.00", "fla", "6.00", "2.00"]
    rows.append({**rows[0], "impl": "both", "ms": 2.5})
    assert table.cells(line, table.runs_of(line.file))[2:6] == ["2.50", "fla", "6.00", "2.40"]


@pytest.mark.parametrize(
    ("at_most", "times", "expected"),
    [
        (False, (1.0, 1.5), "**1.50**"), (False, (1.0, 1.4), "1.40"), (False, (1.0, 15.0), "**15.0**"),
        (True, (1.5, 1.0), "**1.50**"), (True, (1.6, 1.0), "1.60"),
    ],
)  # fmt: skip
def test_a_goal_that_is_kept_is_bold(
    at_most: bool, times: tuple[float, float], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    table, goals = (importlib.import_module(name) for name in ("sparse_table", "sparse_goals"))
    line = goals.Line("", "", "", "", "", {}, "fla", goal=1.5, at_most=at_most)
    assert table.ratio_of(line, *times) == expected
