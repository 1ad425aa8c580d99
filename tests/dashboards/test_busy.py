"""Workers and GPUs that a running search keeps busy, as its events tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from seen import client, get

from heddle.dashboards.busy import busy
from heddle.search.record import read_run

MakeRun = Callable[..., Path]
TIME = "2026-11-24T03:00:00+00:00"
HOSTILE = "<img src=x>"


def _add(folder: Path, *told: tuple[float, str, dict[str, Any]]) -> None:
    """Events of a new session: seconds, kind, fields."""
    with open(folder / "events.jsonl", "a") as file:
        for clock, kind, fields in told:
            line = {"event": kind, "session": "b", "clock_s": clock, "time": TIME, **fields}
            file.write(json.dumps(line) + "\n")


def _evaluation(number: int, stage: str = "text") -> dict[str, Any]:
    return {"number": number, "hash": f"{number + 1:016x}", "stage": stage, "key": "k1"}


def _on(number: int, gpu: str, node: str = "left") -> dict[str, Any]:
    return {**_evaluation(number), "node": node, "gpus": [gpu]}


def test_gpus_are_busy_from_where_they_told_to_where_the_last_on_them_ends(make_run: MakeRun) -> None:
    folder = make_run()
    # Of a session that was killed nothing flies any more.
    _add(folder, (0, "search_started", {}), (1, "evaluation_started", _evaluation(9)))
    start = [(float(n), "evaluation_started", _evaluation(n)) for n in range(3)]
    _add(
        folder,
        (0.0, "search_started", {}),
        (0.0, "workers", {"parallel": 8, "gpus": 3}),
        *start,
        (2.0, "evaluation_placed", _on(0, "0")),
        (2.0, "evaluation_placed", _on(1, "0")),
        (4.0, "evaluation_placed", _on(2, "1", HOSTILE)),
        (5.0, "evaluation_finished", {**_evaluation(0), "ok": True, "wall_s": 1.0}),
        (7.0, "evaluation_finished", {**_evaluation(1), "ok": True, "wall_s": 1.0}),
        (10.0, "message", {"level": "info", "text": "on"}),
    )
    found = busy(read_run(folder))
    assert [one.number for one in found.flying.values()] == [2]
    assert found.busy_gpus == {(HOSTILE, "1")}
    assert found.share(("left", "0")) == pytest.approx(0.5)
    assert found.share((HOSTILE, "1")) == pytest.approx(0.6)
    seen = get(client(folder), "/run/run")
    assert "1 of 8 workers busy" in seen.text
    assert "1 of 3 GPUs busy" in seen.text
    assert f"trial 2 text 2026-11-24 03:00:00 {HOSTILE} GPU 1" in seen.text
    assert "left GPU 0 idle 50 %" in seen.text
    assert "1 of 3 GPUs took no evaluation yet" in seen.text
    assert "img" not in seen.tags


def test_a_cpu_shows_workers_alone_and_an_older_record_how_many_work(make_run: MakeRun) -> None:
    folder = make_run()
    assert "Workers" not in get(client(folder), "/run/run").text
    begun = (1.0, "evaluation_started", _evaluation(3, "latency"))
    _add(folder, (0.0, "search_started", {}), begun)
    seen = get(client(folder), "/run/run").text
    assert "1 workers busy" in seen
    assert "trial 3 timing" in seen
    assert "GPU" not in seen
    _add(folder, (2.0, "workers", {"parallel": 4, "gpus": 0}))
    seen = get(client(folder), "/run/run").text
    assert "1 of 4 workers busy" in seen
    assert "GPU" not in seen
