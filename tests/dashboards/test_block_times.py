"""The trial's page of a run with a latency model: what each block is predicted to take, beside the whole that was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from seen import client, get

from heddle import specs
from heddle.dashboards import latency_section
from heddle.dashboards.block_times import FRAME, PAIRS, block_times, stacked
from heddle.dashboards.site import open_site
from heddle.search.latency_model.stacks import stack_of
from heddle.search.record import read_run

MakeRun = Callable[..., Path]
TRIAL = 4
TITLE = "Predicted time of each block"
# Milliseconds: without layers, of a linear and of a full layer, and where they meet.
FRAME_MS, LINEAR_MS, FULL_MS, PAIR_MS = 0.3, 0.1, 0.25, -0.01


def _with_model(folder: Path, *, phases: tuple[str, ...] = ("decode", "prefill"), whole: bool = True) -> Path:
    """A latency model as a search leaves it in its folder; without a term of the full layers unless `whole`."""
    run = read_run(folder)
    stack = stack_of(specs.loads(run.trial(TRIAL).spec).spec.model)
    terms = dict(zip(stack.blocks, stack.terms, strict=True))
    weights: list[dict[str, Any]] = [{"column": ["frame", stack.frame], "ms": FRAME_MS}]
    weights.append({"column": ["term", terms["linear"]], "ms": LINEAR_MS})
    weights += [{"column": ["term", terms["full"]], "ms": FULL_MS}] if whole else []
    weights += [{"column": ["pair", *pair], "ms": PAIR_MS} for pair in stack.pairs]
    assert run.reference is not None
    fits = [
        {
            "place": {"phase": phase, "batch": 1, "context": 4096},
            "reference_hash": run.reference.hash,
            "sum": {"way": {"has_pairs": True}, "weights": weights},
            "held_out": {"margin": 0.1},
        }
        for phase in phases
    ]
    held = {"kind": "latency-model", "format": 1, "fits": fits}
    (folder / "latency_model.json").write_text(json.dumps(held))
    return folder


def test_the_terms_of_the_model_stand_on_one_another_beside_the_measured_whole(make_run: MakeRun) -> None:
    folder = _with_model(make_run())
    run, watched = read_run(folder), open_site(folder).watched("run")
    prefill, decode = block_times(watched, run, run.trial(TRIAL))
    assert (prefill.phase, decode.phase) == ("prefill", "decode")
    layers = run.trial(TRIAL).layers
    linear, full = layers.count("linear"), layers.count("full")
    assert {part.name: part.ms for part in decode.parts} == pytest.approx(
        {FRAME: FRAME_MS, "linear": linear * LINEAR_MS, "full": full * FULL_MS, PAIRS: PAIR_MS}
    )
    assert [when for when, _ in decode.measured] == ["in the search", "at the end"]
    _, figure = stacked([prefill, decode])
    bars = [trace for trace in figure.data if trace["y"] == ["predicted"]]
    assert sum(trace["x"][0] for trace in bars) == pytest.approx(decode.ms)
    assert figure.layout["xaxis"]["title"]["text"] == "ms"
    text = get(client(folder), f"/run/run/trial/{TRIAL}").text
    assert TITLE in text
    assert f"{decode.ms:.4g} ± {0.1 * decode.ms:.3g}" in text


def test_without_a_model_or_with_one_that_does_not_know_a_layer_nothing_is_shown(make_run: MakeRun) -> None:
    folder = make_run()
    assert TITLE not in get(client(folder), f"/run/run/trial/{TRIAL}").text
    assert TITLE not in get(client(_with_model(folder, whole=False)), f"/run/run/trial/{TRIAL}").text


def test_a_damaged_model_is_told_and_one_outside_of_the_run_not_read(
    make_run: MakeRun, tmp_path: Path
) -> None:
    folder = make_run()
    (folder / "latency_model.json").write_text("{")
    assert "cannot be read" in get(client(folder), f"/run/run/trial/{TRIAL}").text
    _with_model(folder)
    (folder / "latency_model.json").rename(tmp_path / "elsewhere.json")
    (folder / "latency_model.json").symlink_to(tmp_path / "elsewhere.json")
    assert TITLE not in get(client(folder), f"/run/run/trial/{TRIAL}").text


def _with_predictions(folder: Path) -> Path:
    """The same run as if its search had gone by a model: 5 % too low for every trial."""
    lines = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    run = read_run(folder)
    for event in lines:
        if event["event"] == "trial_finished" and event["number"] >= 0:
            timed = run.trial(event["number"]).latency.get("decode_ms@1x4096")
            ms = 1.0 if timed is None else timed.median_ms / 1.05
            figure = {"value": ms, "margin": 0.1, "reference": 2.0, "source": "predicted"}
            event["figures"] = {"decode_ms@1x4096": figure}
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    meta = json.loads((folder / "run.json").read_text())
    unseen = dict.fromkeys(("mape", "worst", "constant_mape", "flops_mape", "spearman", "margin"), 0.05)
    unseen |= {"n": 30, "measured_over_predicted": 0.01}
    meta["latency_model"] = [{"label": "decode_ms@1x4096", "method": "cpu-timer", "held_out": unseen}]
    (folder / "run.json").write_text(json.dumps(meta))
    return folder


def test_the_latency_page_sets_every_timed_trial_against_its_prediction(make_run: MakeRun) -> None:
    folder = _with_predictions(make_run())
    (figure,) = latency_section.scatter(read_run(folder))
    named = {trace["name"]: trace for trace in figure.data}
    assert named["Pareto front"]["customdata"] == [2, 3, 4]
    ratios = [y / x for x, y in zip(named["other trials"]["x"], named["other trials"]["y"], strict=True)]
    assert ratios == pytest.approx([1.05] * len(ratios))
    page = get(client(folder), "/run/run/latency")
    assert "MAPE of FLOPs" in page.text
    assert "measured against predicted" in page.text
