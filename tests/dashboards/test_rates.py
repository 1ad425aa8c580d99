"""What a report and a trial's page say of several learning rates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from seen import client, get

from heddle.dashboards import rates_section, words
from heddle.dashboards.report import page
from heddle.live import trial_line
from heddle.search.ledger import Entry, Ledger
from heddle.search.record import read_run

BEST = 4


@pytest.fixture
def folder(make_run: Callable[..., Path]) -> Path:
    """The made-up run, whose trials had a lower rate too, at which recall was at chance, and one that failed for the best."""
    found = make_run()
    ledger = Ledger(found / "ledger")

    def change(event: dict[str, Any]) -> dict[str, Any]:
        if event["event"] != "trial_finished" or "mqar" not in event["scores"]:
            return event
        spec, key = f"{event['number'] + 1:016x}", event["scores"]["mqar"]
        score = {
            "task": "mqar",
            "metric": "accuracy",
            "value": 0.125,
            "se": 0.01,
            "n": 500,
            "normalised": 0.0,
        }
        score |= {"seed": 0, "steps": 9, "tokens": 100_000, "wall_s": 1.0, "losses": [[1, 5.5]]}
        ledger.put(Entry(spec=spec, stage="mqar", key="low", inputs={}, result=score))
        rates = [[0.001, "low"], [0.003, key], *([[0.01, "none"]] if event["number"] == BEST else [])]
        return event | {"rates": {"mqar": rates}}

    path = found / "events.jsonl"
    events = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return found


def test_the_report_tells_which_rate_was_best_and_that_it_is_the_last(folder: Path) -> None:
    run = read_run(folder)
    assert run.best == BEST
    many = len({trial.hash for trial in run.trials if trial.rates})
    assert [row[1:] for row in rates_section.rows(run)] == [
        ["0.001", f"0 of {many} specs", 0],
        ["0.003", f"{many} of {many} specs", 0],
        ["0.01", f"0 of {many} specs", 1],
    ]
    # Of the winner's three the best is in the middle.
    assert rates_section.sentences(run) == []
    assert "at learning rate 0.003" in words.headline(run)
    other = next(trial for trial in run.trials if trial.rates and trial.number != BEST)
    assert "at learning rate 0.003 (the last of its list)" in trial_line(other)
    assert run.summary()["best"]["learning_rates"]["mqar"][0] == (0.001, 0.125)


def test_a_winner_at_an_end_of_the_list_is_told_so(folder: Path) -> None:
    path = folder / "events.jsonl"
    path.write_text(path.read_text().replace(', [0.01, "none"]', ""))
    (said,) = rates_section.sentences(read_run(folder))
    assert "the last of the list" in said
    assert said in page(read_run(folder)).replace("&#x27;", "'").replace("&#39;", "'")


def test_the_page_of_a_trial_shows_every_rate(folder: Path) -> None:
    text = get(client(folder), f"/run/run/trial/{BEST}").text
    for word in ("Learning rates", "0.001", "12.5", "failed"):
        assert word in text


def test_a_run_with_one_rate_says_nothing_of_them(make_run: Callable[..., Path]) -> None:
    run = read_run(make_run())
    assert "earning rate" not in page(run).replace("learning_rate", "")
    assert "learning_rates" not in json.dumps(run.summary()["best"])
