"""The report: one page that needs nothing else, tells all numbers without scripts, shows names as text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from shutil import copytree, rmtree
from tempfile import mkdtemp

import pytest
from latency_models import UNSEEN, with_model, with_predictions
from recorded_runs import Recorded

from heddle.dashboards import data, words
from heddle.dashboards.every_figure import every_figure
from heddle.dashboards.report import page, write_report
from heddle.errors import HeddleError
from heddle.search.record import Run, read_run

MakeRun = Callable[..., Path]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'`{{7*7}}"
LARGEST = 2_000_000


class _Page(HTMLParser):
    """Tags, attributes and the visible text of a page, scripts and styles left out."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self._inside: str | None = None
        self.feed(markup)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._inside = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002
        self._inside = None

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside is None:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_the_page_is_one_file_that_asks_the_network_for_nothing(make_run: MakeRun, tmp_path: Path) -> None:
    path = write_report(read_run(make_run()), tmp_path / "report.html")
    assert path.stat().st_size < LARGEST
    seen = _Page(path.read_text())
    assert not {"link", "img", "iframe", "object", "embed"} & set(seen.tags)
    assert not [pair for pair in seen.attributes if pair[0] in ("src", "href", "srcset", "action", "data")]
    style = re.findall(r"<style>(.*?)</style>", path.read_text(), re.DOTALL)
    assert not any("url(" in sheet or "@import" in sheet for sheet in style)


def test_every_number_of_the_run_stands_in_the_tables(make_run: MakeRun) -> None:
    run = read_run(make_run())
    text = _Page(page(run)).text
    for trial in data.with_reference(run):
        for score in trial.scores.values():
            assert words.score_text(score) in text
        for latency in [*trial.latency.values(), *trial.remeasured.values()]:
            assert words.latency_text(latency) in text
            assert words.ratio_text(latency) in text
        assert not trial.reason or trial.reason in text
    assert run.confirm is not None
    for difference in run.confirm.differences:
        for value in (*difference.winner, *difference.uniform):
            assert words.value_text(difference.metric, value) in text
        assert words.difference_text(difference) in text


def test_the_winner_its_spec_the_budget_and_the_kernel_paths_are_shown(make_run: MakeRun) -> None:
    run = read_run(make_run())
    text = _Page(page(run)).text
    assert "trial 4 ★ winner" in text
    assert "decode at most 0.8 × all-full (batch 1, context 4096)" in text
    assert " ".join(run.trial(4).spec.split()) in text
    assert "gated_deltanet plain PyTorch" in text
    assert "attention PyTorch scaled_dot_product_attention" in text
    assert "heddle export" in text


def test_infeasible_and_failed_trials_are_drawn_and_listed(make_run: MakeRun) -> None:
    run = read_run(make_run())
    seen = _Page(page(run))
    figures = json.loads(next(script for script in seen.scripts if script.lstrip().startswith("[")))
    against_budget = figures[0]
    refused = next(trace for trace in against_budget["data"] if trace["name"] == "over budget")
    assert len(refused["x"]) == run.count("infeasible") == 2
    # The trial that failed was not timed, so that it has no place in this plot.
    assert against_budget["caption"].endswith("Nothing was measured of 1 more.")
    so_far = next(figure for figure in figures if figure["name"] == "best-so-far-by-trial")
    assert next(len(trace["x"]) for trace in so_far["data"] if trace["name"] == "failed") == 1
    assert against_budget["layout"]["shapes"][0]["x0"] == 0.8
    assert "loss-not-finite: the loss is nan at step 7 of 90" in seen.text


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A thousand trials, written by the engine's own recorder, with all that a run may hold."""
    # The recorder waits for the disk at each event, which is no part of what is tested.
    memory = Path("/dev/shm")
    folder = Path(mkdtemp(dir=memory)) if memory.is_dir() else tmp_path_factory.mktemp("runs")
    try:
        written = Recorded(folder / "run", 1000, has_all=True).write()
        copytree(written, kept := tmp_path_factory.mktemp("thousand") / "run")
    finally:
        rmtree(folder)
    run = read_run(kept)
    assert run.best is not None
    return read_run(with_model(kept, number=run.best))


def test_a_report_of_a_thousand_trials_holds_every_plot_in_five_megabytes(
    thousand: Run, tmp_path: Path
) -> None:
    path = write_report(thousand, tmp_path / "report.html")
    assert path.stat().st_size < 5_000_000
    seen = _Page(path.read_text())
    assert {"link", "img", "iframe", "object", "embed"}.isdisjoint(seen.tags)
    figures = json.loads(next(script for script in seen.scripts if script.lstrip().startswith("[")))
    names = [figure["name"] for figure in figures]
    assert names == [figure.name for figure in every_figure(thousand)]
    assert seen.tags.count("figure") == len(names)
    kinds = (
        "task",
        "best",
        "failures",
        "placement",
        "terms",
        "held",
        "predicted",
        "twice",
        "layers",
        "blocks",
        "curve",
    )
    assert {name.partition("-")[0] for name in names} == {*kinds, "latency"}


def test_a_latency_model_stands_with_its_bias_over_all_and_near_the_budget(make_run: MakeRun) -> None:
    run = read_run(with_predictions(with_model(make_run())))
    text = _Page(page(run)).text
    assert "Bias Bias near the budget (stacks)" in text
    assert "-1.2 % -3.4 % (7)" in text
    run.meta["latency_model"][0]["held_out"] |= {"bias_near_budget": None, "near_budget": 2}
    assert "-1.2 % – (2)" in _Page(page(run)).text


def test_numbers_that_stand_in_no_table_are_told_where_scripts_are_off(make_run: MakeRun) -> None:
    run = read_run(with_predictions(with_model(make_run())))
    hidden = _Page("".join(re.findall(r"<noscript>(.*?)</noscript>", page(run), re.DOTALL))).text
    assert "The plots need scripts" in hidden
    best = run.best_trial
    assert best is not None
    for task, score in best.scores.items():
        for step, loss in score.losses:
            assert f"trial 4 {step} {loss:g}" in hidden, task
    for predicted, measured in UNSEEN:
        assert f"held-out stack {predicted:.6g} {measured:.6g}" in hidden
    assert "mixer layer 0 layer 1" in hidden
    assert "failed 1 loss-not-finite" in hidden


def test_hostile_names_are_shown_as_text(make_run: MakeRun, tmp_path: Path) -> None:
    tame = _Page(page(read_run(make_run(name="tame"))))
    (tmp_path / "run").rename(tmp_path / "tame")
    hostile = _Page(page(read_run(make_run(name=HOSTILE))))
    assert hostile.tags == tame.tags
    assert HOSTILE in hostile.text
    assert not [name for name, _ in hostile.attributes if name.startswith("on")]
    # Plotly reads tags in its texts as well, so that these are escaped twice over.
    figures = next(script for script in hostile.scripts if script.lstrip().startswith("["))
    assert "<" not in figures
    assert "<script" not in json.dumps(json.loads(figures)).replace("<br>", "")


def test_layers_of_a_strip_name_their_mixers(make_run: MakeRun) -> None:
    cells = data.strip(read_run(make_run()).trial(3))
    assert [cell.mixer for cell in cells] == ["gated_deltanet"] * 4 + ["attention (window 16)"] * 4


def test_a_run_without_a_feasible_spec_shows_the_least_violating(make_run: MakeRun) -> None:
    text = _Page(page(read_run(make_run(feasible=False)))).text
    assert "No spec kept every budget" in text
    assert "Closest to the budget" in text


def test_a_winner_that_lost_against_uniform_is_called_worse(make_run: MakeRun) -> None:
    text = _Page(page(read_run(make_run(mean=-0.04)))).text
    assert "-4.00 percentage points" in text
    assert "the found placement is worse than uniform" in text


def test_a_winner_that_is_uniform_is_said_to_be(make_run: MakeRun) -> None:
    text = _Page(page(read_run(make_run(same=True)))).text
    assert "The winner is itself the uniform placement" in text
    assert "Trained again with 3 fresh seeds it scores mqar" in text


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(HeddleError) as caught:
        read_run(tmp_path)
    assert caught.value.code == "run-not-found"
