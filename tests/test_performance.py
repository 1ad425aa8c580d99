"""The page of figures says what the committed rows say."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench"


@pytest.mark.parametrize("script", ["rivals", "encoder_table"])
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
