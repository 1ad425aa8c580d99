"""What the plots show of a search: a mark for each fate, what was spent, what failed, time left, units."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from latency_models import with_model, with_predictions
from recorded_runs import Recorded
from seen import client, get

from heddle.dashboards import data, spent
from heddle.dashboards.axes import axes
from heddle.dashboards.every_figure import every_figure
from heddle.dashboards.figures import Figure, pair, progress
from heddle.search.record import Run, read_run

MakeRun = Callable[..., Path]
ROOT = Path(__file__).parents[2]
TIME = "2026-11-24T03:00:00+00:00"
# What an axis of numbers may be called: each has its unit, or is a count or a share of itself.
UNITS = re.compile(
    r"\bms\b|bits per byte|accuracy|÷|parameters|FLOPs per token|bytes|nats per token|score|minutes|GPU-seconds|worker-seconds"
    r"|^layer$|^step$|^trials?$|share|commit|case"
)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A search in which trials came to every end."""
    return read_run(Recorded(tmp_path_factory.mktemp("runs") / "run", 60, has_all=True).write())


def _marks(figure: Figure) -> dict[str, tuple[Any, Any]]:
    traces = [trace for trace in figure.data if trace.get("x") and "markers" in trace["mode"]]
    return {trace["name"]: (trace["marker"]["symbol"], trace["marker"]["color"]) for trace in traces}


def test_every_fate_of_a_trial_has_a_mark_and_a_colour_of_its_own(recorded: Run) -> None:
    task, budget = axes(recorded)[0], axes(recorded)[2]
    marks = _marks(pair(recorded, budget, task))
    fates = (
        "feasible",
        "over budget",
        "failed",
        "pruned",
        "timed again",
        "Pareto front",
        "winner",
        "reference",
    )
    assert set(fates) == set(marks)
    for look in zip(*(marks[fate] for fate in fates), strict=True):
        assert len(set(look)) >= len(fates) - 1
    assert len(set(marks.values())) == len(fates)
    told = _marks(progress(recorded))
    assert {name: told[name] for name in fates[:4]} == {name: marks[name] for name in fates[:4]}


def test_all_that_is_feasible_lies_within_the_budget_and_nothing_that_is_over_it(recorded: Run) -> None:
    task, budget = axes(recorded)[0], axes(recorded)[2]
    places = {trace["name"]: trace["x"] for trace in pair(recorded, budget, task).data}
    assert budget.limit is not None
    assert max(places["feasible"]) <= budget.limit < min(places["over budget"])
    assert len(places["over budget"]) == recorded.count("infeasible") > 0


def _add(folder: Path, session: str, *told: tuple[float, str, dict[str, Any]]) -> None:
    with open(folder / "events.jsonl", "a") as file:
        for clock, kind, fields in told:
            line = {"event": kind, "session": session, "clock_s": clock, "time": TIME, **fields}
            file.write(json.dumps(line) + "\n")


def _trial(number: int, kind: str, **fields: Any) -> dict[str, Any]:
    return {"number": number, "hash": f"{number + 1:016x}", "stage": kind, "key": "k1", **fields}


def _begun(number: int, clock: float, gpu: str | None) -> list[tuple[float, str, dict[str, Any]]]:
    """A trial whose one evaluation begins at a time, on a GPU if one is told."""
    asked = {"params": {}, "layers": ["full"], "round": 0, "spec": "", "parameters": 1}
    placed = (clock, "evaluation_placed", _trial(number, "text", node="n", gpus=[gpu]))
    found = [
        (clock, "trial_started", _trial(number, "text", **asked)),
        (clock, "evaluation_started", _trial(number, "text")),
    ]
    return [*found, placed] if gpu is not None else found


def _ended(number: int, clock: float, wall_s: float) -> list[tuple[float, str, dict[str, Any]]]:
    told = {"number": number, "state": "complete", "wall_s": wall_s}
    done = _trial(number, "text", ok=True, wall_s=wall_s)
    return [(clock, "evaluation_finished", done), (clock, "trial_finished", told)]


def _two_sessions(folder: Path, gpu: str | None) -> Run:
    """Two trials side by side on one GPU for 4 and 6 s, and in another session one for 5 s."""
    (folder / "events.jsonl").write_text("")
    room = (0.0, "workers", {"parallel": 8, "gpus": 2 if gpu else 0})
    first = [*_begun(0, 1.0, gpu), *_begun(1, 1.0, gpu), *_ended(0, 5.0, 4.0), *_ended(1, 7.0, 6.0)]
    _add(folder, "a", (0.0, "search_started", {}), room, *first)
    second = [*_begun(2, 2.0, gpu), *_ended(2, 7.0, 5.0)]
    _add(folder, "b", (0.0, "search_started", {}), room, *second)
    return read_run(folder)


def test_gpu_seconds_count_a_gpu_once_and_worker_seconds_every_evaluation(make_run: MakeRun) -> None:
    folder = make_run()
    run = _two_sessions(folder, "0")
    assert spent.overs(run)["device"] == "GPU-seconds"
    assert spent.positions(run, "device") == {0: 4.0, 1: 6.0, 2: 11.0}
    run = _two_sessions(folder, None)
    assert spent.overs(run)["device"] == "worker-seconds"
    assert spent.positions(run, "device") == {0: 4.0, 1: 10.0, 2: 15.0}
    assert spent.positions(run, "time") == pytest.approx({0: 5 / 60, 1: 7 / 60, 2: 14 / 60})


def test_a_run_that_an_older_heddle_began_on_a_gpu_is_drawn_over_worker_seconds(make_run: MakeRun) -> None:
    folder = make_run()
    run = _two_sessions(folder, "0")
    kept = [event for event in run.events if (event["event"], event["session"]) != ("evaluation_placed", "a")]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in kept))
    assert spent.overs(read_run(folder))["device"] == "worker-seconds"


def test_the_time_left_is_told_at_the_pace_of_the_session(make_run: MakeRun) -> None:
    folder = make_run()
    meta = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(meta | {"trials": 43}))
    lines = (folder / "events.jsonl").read_text().splitlines()
    before = [line for line in lines if json.loads(line)["event"] not in ("search_finished", "front")]
    (folder / "events.jsonl").write_text("\n".join(before) + "\n")
    # 13 of 43 trials are told; in a new session two more in 100 s, so that 28 take 1,400.
    _add(folder, "b", (0.0, "search_started", {}))
    assert data.pace(read_run(folder)).seconds_left is None
    told = [
        event for number in (13, 14) for event in (*_begun(number, 1.0, None), *_ended(number, 100.0, 9.0))
    ]
    _add(folder, "b", *told)
    pace = data.pace(read_run(folder))
    assert (pace.told, pace.total, pace.seconds_left) == (15, 43, 1400.0)
    assert "23 min 20 s left of the rounds, at this pace" in get(client(folder), "/run/run").text
    _add(folder, "b", (101.0, "search_finished", {"status": "stopped"}))
    assert data.pace(read_run(folder)).seconds_left is None


def test_failures_are_counted_by_the_code_of_their_reasons(recorded: Run) -> None:
    reasons = ("loss-not-finite", "out-of-memory", "worker-died")
    held = {code: sum(code in str(trial.reason) for trial in recorded.trials) for code in reasons}
    counted = data.failures(recorded)
    assert counted == {code: count for code, count in held.items() if count}
    assert sum(counted.values()) == recorded.count("failed") > 1
    assert list(counted.values()) == sorted(counted.values(), reverse=True)
    text = get(client(recorded.path), "/run/run").text
    for code, count in counted.items():
        assert f"{code} {count}" in text.partition("Failures by class")[2]
    drawn = next(figure for figure in every_figure(recorded) if figure.name == "failures")
    assert dict(zip(drawn.data[0]["y"], drawn.data[0]["x"], strict=True)) == counted


def test_every_axis_of_numbers_has_its_unit(make_run: MakeRun, two_runs: Path) -> None:
    folder = with_predictions(with_model(make_run()))
    figures = [figure.plain() for figure in every_figure(read_run(folder))]
    one = client(folder, ROOT / "tests/bench/results")
    for page in ("", "?x=parameters&over=time", "/trial/4", "/compare?t=3&t=4", "/placement", "/latency"):
        figures += get(one, f"/run/run{page}").figures
    figures += get(one, "/kernels").figures
    figures += get(client(two_runs), "/").figures
    assert len({figure["name"] for figure in figures}) > 25
    for figure in figures:
        for side in "xy":
            held = [trace.get(side) for trace in figure["data"] if "yaxis" not in trace]  # type: ignore[union-attr, attr-defined]
            if any(isinstance(value, int | float) for values in held for value in values or ()):
                title = figure["layout"][f"{side}axis"]["title"]["text"]  # type: ignore[index, call-overload]
                assert UNITS.search(title), f"{figure['name']}: {side} is called {title!r}"
