"""Trials of several runs beside each other, and the fronts of all runs in one picture."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import quote

import pytest
from seen import client, get


def _add_a_shallow_trial(folder: Path) -> None:
    """A trial 13 of five layers, and no budget kept anywhere: what a run of another space may hold."""
    lines = (folder / "events.jsonl").read_text().splitlines()
    asked = next(event for event in map(json.loads, lines) if event.get("number") == 4)
    spec = asked["spec"].replace(", ".join(asked["layers"]), ", ".join(asked["layers"][:5]))
    asked |= {"number": 13, "layers": asked["layers"][:5], "spec": spec}
    with open(folder / "events.jsonl", "a") as file:
        file.write(json.dumps(asked) + "\n")


def test_trials_of_two_runs_stand_beside_each_other(two_runs: Path) -> None:
    _add_a_shallow_trial(two_runs / "two")
    answer = client(two_runs).get("/compare?t=one:3&t=two:4&t=two:13&t=one:-1")
    seen = get(client(two_runs), "/compare?t=one:3&t=two:4&t=two:13&t=one:-1")
    assert "two: trial 4 against one: trial 3" in seen.text
    assert "one: all-full against one: trial 3" in seen.text
    assert "layers.4.mixer.window" in seen.text
    assert "Test CPU search two" in seen.text
    # Five layers stand below the first five of eight.
    assert answer.text.count('<span class="none"></span>') == 3
    names = [figure["name"] for figure in seen.figures]
    assert names == [
        "compared",
        "curve-mqar",
        "curve-text",
        "fronts-task-mqar-against-budget-decode-ms-1x4096",
    ]
    assert [line["name"] for line in seen.figures[1]["data"]] == [
        "one: trial 3",
        "two: trial 4",
        "one: all-full",
    ]  # type: ignore[attr-defined]


def test_quantities_that_one_run_lacks_are_not_compared(two_runs: Path) -> None:
    meta = json.loads((two_runs / "two/run.json").read_text())
    meta["budgets"][0] |= {"relative_to": None, "at_most": 1.0}
    (two_runs / "two/run.json").write_text(json.dumps(meta))
    seen = get(client(two_runs), "/compare?t=one:3&t=two:4")
    compared, *_, fronts = seen.figures
    assert not {"decode ÷ all-full", "decode ms"} & set(compared["data"][0]["x"])  # type: ignore[index]
    # A ratio and milliseconds are no one axis.
    assert [trace["name"] for trace in fronts["data"]] == ["one"]  # type: ignore[attr-defined]


def test_fronts_of_all_runs_are_one_picture_whose_points_lead_to_their_trials(two_runs: Path) -> None:
    seen = get(client(two_runs), "/?x=parameters&y=task:text")
    front = seen.figures[1]
    assert front["name"] == "fronts-task-text-against-parameters"
    one, two = front["data"]  # type: ignore[misc]
    assert one["customdata"] == [f"/run/one/trial/{number}" for number in (2, 3, 4)]
    assert two["marker"]["symbol"] == ["square", "square", "star"]
    boxes = [value for name, value in seen.attributes if name == "value" and ":" in value]
    assert {f"{run}:{number}" for run in ("one", "two") for number in (2, 3, 4)} <= set(boxes)


def test_a_comparison_of_one_run_leads_on_to_other_runs(two_runs: Path) -> None:
    seen = get(client(two_runs), "/run/one/compare?t=7&t=4")
    address = next(
        value for name, value in seen.attributes if name == "href" and value.startswith("/compare")
    )
    beside = get(client(two_runs), address)
    assert "one: trial 4 against one: trial 7" in beside.text
    assert beside.attributes.count(("checked", "")) == 2
    assert ("value", "one:7") in beside.attributes


@pytest.mark.parametrize("place", ["three:4", "one:99", "one", "../one:4", f"{quote('<b>')}:1", "one:4x"])
def test_what_is_no_trial_of_a_run_is_told(two_runs: Path, place: str) -> None:
    assert "<b>" not in client(two_runs).get(f"/compare?t={place}").text
    assert "That cannot be shown" in get(client(two_runs), f"/compare?t={place}", 404).text


def test_hostile_names_of_runs_stay_text(two_runs: Path) -> None:
    name = "<img src=x>:\"&'"
    (two_runs / "two").rename(two_runs / name)
    seen = get(client(two_runs), f"/compare?t=one:3&t={quote(name)}:4")
    assert "img" not in seen.tags
    assert f"{name}: trial 4 against one: trial 3" in seen.text
    assert "<img" not in json.dumps(seen.figures)
