"""The trial's page of a run with a latency model: what each block is predicted to take, beside the whole that was measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from latency_models import FRAME_MS, FULL_MS, LINEAR_MS, PAIR_MS, TRIAL, UNSEEN, with_model, with_predictions
from seen import client, get

from heddle.dashboards import latency_section
from heddle.dashboards.block_times import FRAME, PAIRS, block_times, stacked
from heddle.dashboards.site import open_site
from heddle.search.record import read_run

MakeRun = Callable[..., Path]
TITLE = "Predicted time of each block"


def test_the_terms_of_the_model_stand_on_one_another_beside_the_measured_whole(make_run: MakeRun) -> None:
    folder = with_model(make_run())
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
    assert TITLE not in get(client(with_model(folder, whole=False)), f"/run/run/trial/{TRIAL}").text


def test_a_damaged_model_is_told_and_one_outside_of_the_run_not_read(
    make_run: MakeRun, tmp_path: Path
) -> None:
    folder = make_run()
    (folder / "latency_model.json").write_text("{")
    assert "cannot be read" in get(client(folder), f"/run/run/trial/{TRIAL}").text
    with_model(folder)
    (folder / "latency_model.json").rename(tmp_path / "elsewhere.json")
    (folder / "latency_model.json").symlink_to(tmp_path / "elsewhere.json")
    assert TITLE not in get(client(folder), f"/run/run/trial/{TRIAL}").text


def test_the_latency_page_sets_every_timed_trial_against_its_prediction(make_run: MakeRun) -> None:
    folder = with_predictions(make_run())
    (figure,) = latency_section.scatter(read_run(folder))
    named = {trace["name"]: trace for trace in figure.data}
    assert named["Pareto front"]["customdata"] == [2, 3, 4]
    ratios = [y / x for x, y in zip(named["other trials"]["x"], named["other trials"]["y"], strict=True)]
    assert ratios == pytest.approx([1.05] * len(ratios))
    page = get(client(folder), "/run/run/latency")
    assert "MAPE of FLOPs" in page.text
    (dots,) = (one["data"][1] for one in page.figures if one["name"] == "held-out-decode-ms-1x4096")  # type: ignore[index]
    assert list(map(list, zip(dots["x"], dots["y"], strict=True))) == UNSEEN
    assert "measured against predicted" in page.text
