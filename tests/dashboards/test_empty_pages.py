"""What pages say where there is nothing to show: why, and what to do."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from seen import client, get

from heddle.dashboards import words
from heddle.search.record import read_run

MakeRun = Callable[..., Path]
ROOT = Path(__file__).parents[2]
EVERY = ("", "/trial/4", "/trial/-1", "/compare?t=3&t=4", "/placement", "/latency", "/tools")


def _rewritten(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> Path:
    """The run with each line of its record changed, or left out for None."""
    file = folder / "events.jsonl"
    changed = (change(json.loads(line)) for line in file.read_text().splitlines())
    file.write_text("".join(json.dumps(line) + "\n" for line in changed if line is not None))
    (folder / "confirm.json").unlink(missing_ok=True)
    return folder


def _begun(folder: Path) -> Path:
    """The run as it stood when its trials had begun and nothing was measured."""
    kept = ("search_started", "trial_started")
    return _rewritten(folder, lambda line: line if line["event"] in kept else None)


def _all_failed(folder: Path) -> Path:
    """The run with every trial failed before it was measured."""

    def change(line: dict[str, Any]) -> dict[str, Any] | None:
        if line["event"] == "trial_finished":
            kept = {name: value for name, value in line.items() if name not in ("scores", "latency")}
            lost = {"state": "failed", "reason": "out-of-memory: no memory", "scores": {}, "latency": {}}
            return kept | lost | {"constraints": {}}
        return line | {"best": None, "front": [], "least_violating": []} if line["event"] == "front" else line

    return _rewritten(folder, change)


def test_a_search_that_has_measured_nothing_says_that_it_will(make_run: MakeRun) -> None:
    asked = client(_begun(make_run()))
    front = get(asked, "/run/run").text
    assert "Nothing of this was measured yet." in front
    assert "A click on a point" not in front
    assert "heddle search with --resume" in front
    assert "comes here by itself" in get(asked, "/run/run/trial/4").text
    for page in ("/placement", "/tools"):
        assert "It is shown here as soon as it is there." in get(asked, f"/run/run{page}").text


def test_a_search_whose_trials_all_failed_leads_to_the_reasons(make_run: MakeRun) -> None:
    folder = _all_failed(make_run(feasible=False))
    asked = client(folder)
    assert words.headline(read_run(folder)).startswith("No trial was trained to its end")
    for page in ("/placement", "/tools"):
        seen = get(asked, f"/run/run{page}")
        assert "The search has ended. All trials" in seen.text, page
        assert ("href", "/run/run#trials") in seen.attributes, page
    assert "out-of-memory: no memory" in get(asked, "/run/run").text


def test_a_trial_that_a_stopped_search_left_is_said_to_be_left(make_run: MakeRun) -> None:
    folder = make_run()
    _rewritten(folder, lambda line: None if _ends(line, 4) else line)
    seen = get(client(folder), "/run/run/trial/4").text
    assert "The search ended before this trial did; heddle search with --resume takes it up." in seen


def _ends(line: dict[str, Any], number: int) -> bool:
    return bool(line["event"] == "trial_finished" and line["number"] == number)


@pytest.mark.parametrize("path", ["/run/nowhere", "/run/run/trial/99"])
def test_what_is_not_there_is_told_with_what_is(make_run: MakeRun, path: str) -> None:
    said = get(client(make_run()), path, 404).text
    assert "leads to the runs that there are" in said or "its trials: 0 to" in said


def test_an_open_value_inside_of_a_choice_is_told_once(make_run: MakeRun) -> None:
    window = {"int": [16, 64], "step": 16}

    def change(line: dict[str, Any]) -> dict[str, Any]:
        chosen = {"mixer": {"kind": "attention", "heads": 2, "window": window}, "mixer.window": 32}
        return line | {"params": chosen} if line["event"] == "trial_started" else line

    seen = get(client(_rewritten(make_run(), change)), "/run/run").text
    assert "mixer: attention, heads 2; mixer.window: 32" in seen


def test_an_implementation_keeps_its_colour_from_plot_to_plot(make_run: MakeRun) -> None:
    asked = client(make_run(), ROOT / "tests/bench/results")
    found: dict[str, set[str]] = {}
    for op in ("block_attention", "gated_delta_rule"):
        for figure in get(asked, f"/kernels?device=NVIDIA+H200&op={op}").figures:
            if str(figure["name"]).startswith(("beside", "kernels")):
                for trace in figure["data"]:  # type: ignore[attr-defined]
                    found.setdefault(trace["name"], set()).add(trace["marker"].get("color"))
    assert {"heddle", "fla", "floor"} <= set(found)
    assert all(len(found[name]) == 1 for name in ("heddle", "fla", "floor"))
    assert found["heddle"] != found["fla"]


# Prints every address that the process connects to, or asks a name server for.
WATCHED = """
import sys
from pathlib import Path
sys.addaudithook(lambda event, held: print(event, held[-1] if event == "socket.connect" else held[0])
                 if event in ("socket.connect", "socket.getaddrinfo") else None)
from starlette.testclient import TestClient
from heddle.dashboards import server
from heddle.dashboards.site import open_site
asked = TestClient(server.app(open_site(Path(sys.argv[1])), token=None), base_url="http://localhost")
assert all(asked.get("/run/run" + page).status_code == 200 for page in sys.argv[2:])
"""


def test_no_page_tells_anybody_that_it_was_asked_for(make_run: MakeRun) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(make_run()), *EVERY],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # The page of tools looks whether a Ray of this machine answers.
    told = {line for line in done.stdout.splitlines() if "127.0.0.1" not in line}
    assert not told, told
