"""What a report says of rungs, and of latencies that the search's own model expects."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from heddle.dashboards import rungs_section, words
from heddle.dashboards.report import page
from heddle.live import trial_line
from heddle.search.expected_latency import expected_latencies, left_out_errors
from heddle.search.ledger import Entry, Ledger
from heddle.search.record import Run, read_run, rung_stage

MakeRun = Callable[..., Path]
LABEL = "decode_ms@1x4096"
TAU = {"rung": 1, "task": None, "n": 7, "tau": 0.6190476, "low": 0.1, "high": 1.0}


def text_of(run: Run) -> str:
    return re.sub(
        r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"<(script|style)\b.*?</\1>", "", page(run), flags=re.S))
    )


def rewritten(folder: Path, change: Any) -> Run:
    """The run with each event changed by `change(event)`."""
    path = folder / "events.jsonl"
    events = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return read_run(folder)


def with_meta(folder: Path, **changes: Any) -> None:
    path = folder / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def with_rungs(make_run: MakeRun) -> Run:
    """The made-up run, in which trial 7 was left at a rung with a score of 45 %, and the others went on from it."""
    folder = make_run()
    ledger = Ledger(folder / "ledger")
    tasks = json.loads((folder / "run.json").read_text())["tasks"][:1]
    with_meta(folder, rungs={"eta": 3.0, "before": [{"tasks": tasks, "tokens": [100_000]}]})

    def change(event: dict[str, Any]) -> dict[str, Any]:
        if event["event"] == "search_finished":
            return event | {"event": "rungs_compared", "ranks": [TAU]}
        if event["event"] != "trial_finished" or event["number"] < 0 or event["state"] == "failed":
            return event
        score = {"task": "mqar", "metric": "accuracy", "value": 0.45, "se": 0.01, "n": 500, "normalised": 0.4}
        score |= {"seed": 0, "steps": 9, "tokens": 100_000, "wall_s": 1.0, "losses": [[1, 5.5]]}
        spec = f"{event['number'] + 1:016x}"
        ledger.put(Entry(spec=spec, stage=rung_stage(0, "mqar"), key="k0", inputs={}, result=score))
        pruned = {"state": "pruned", "scores": {}, "reason": None} if event["number"] == 7 else {}
        return event | pruned | {"rungs": [{"mqar": "k0"}]}

    return rewritten(folder, change)


def test_a_pruned_trial_is_told_with_its_rung_and_its_score(with_rungs: Run) -> None:
    trial = with_rungs.trial(7)
    assert (trial.state, trial.quality, trial.quality_at(0)) == ("pruned", None, 0.4)
    said = "left at rung 1: mqar 45.0 ± 1.0 %"
    assert words.rungs_text(trial) == said
    assert trial_line(trial).startswith("trial 7 pruned")
    assert said in trial_line(trial)
    seen = text_of(with_rungs)
    assert said in seen
    assert "1 pruned" in seen


def test_the_report_says_how_far_rungs_agree_and_of_whom(with_rungs: Run) -> None:
    assert rungs_section.rows(with_rungs)[0] == [1, "mqar (100 k)", 12, 1]
    seen = text_of(with_rungs)
    assert "mean normalised score 7 0.62 0.10 to 1.00" in seen
    assert "restricted" in seen


def test_a_run_without_rungs_says_nothing_of_them(make_run: MakeRun) -> None:
    run = read_run(make_run())
    assert "pruned" not in text_of(run)
    assert "Rungs" not in text_of(run)
    assert "rungs" not in run.summary()


# Latencies that the other timings expect.

PLACED = """version: 1
name: made-up
model:
  vocab_size: 256
  hidden_size: 64
  blocks:
    linear: {mixer: {kind: gated_deltanet, heads: 2}, channel: {kind: swiglu}}
    full: {mixer: {kind: attention, heads: 2}, channel: {kind: swiglu}}
  layers: {placement: {length: 8, of: [linear, full], count: {full: {int: [1, 7]}}}}
"""


def test_the_front_stands_beside_what_the_other_timings_expect(make_run: MakeRun) -> None:
    folder = make_run()
    with_meta(folder, spec=PLACED)
    run = read_run(folder)
    expected = expected_latencies(run)
    assert set(expected) == set(run.front)
    for number in run.front:
        # The made-up ratio is a line in the number of full layers, which the model knows.
        measured = run.trial(number).latency[LABEL].ratio
        assert expected[number] == {LABEL: pytest.approx(measured, rel=0.02)}
    seen = text_of(run)
    assert "Predicted latencies" in seen
    assert "trial 4 ★ winner decode_ms@1x4096" in seen


def test_what_a_spec_took_itself_is_not_in_its_prediction(make_run: MakeRun) -> None:
    folder = make_run()
    with_meta(folder, spec=PLACED)
    before = expected_latencies(read_run(folder))[4]

    def change(event: dict[str, Any]) -> dict[str, Any]:
        if event["event"] == "trial_finished" and event["number"] == 4:
            return event | {"constraints": {LABEL: -0.9}}
        return event

    assert expected_latencies(rewritten(folder, change))[4] == before


def test_the_report_tells_how_far_proposals_were_off_for_specs_left_out(make_run: MakeRun) -> None:
    folder = make_run()
    with_meta(folder, spec=PLACED)
    run = read_run(folder)
    (one,) = left_out_errors(run)
    assert one.label == LABEL
    assert 3 <= one.n <= len({trial.hash for trial in run.trials if trial.latency})
    # The made-up ratio is a line in the number of full layers.
    assert one.mape < 0.02
    assert one.spearman > 0.9
    assert f"Each of {one.n} specs predicted from the others: MAPE" in text_of(run)


def test_the_report_tells_how_wide_timings_are_and_that_nobody_looked_for_others(make_run: MakeRun) -> None:
    run = read_run(make_run())
    seen = text_of(run)
    assert "How good the timings are" in seen
    assert "95 % intervals" in seen
    assert "wider than 1 %" in seen
    assert "not checked for" in seen


def test_a_run_that_places_no_layers_predicts_nothing(make_run: MakeRun) -> None:
    run = read_run(make_run())
    assert expected_latencies(run) == {}
    assert "Predicted latencies" not in text_of(run)
