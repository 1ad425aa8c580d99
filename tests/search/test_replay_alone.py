"""A replay from nothing but the lockfile and the data: no folder of the first run, no cache, no file that its spec names."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from predicted_search import QUICK, model_of, scored, spec_with

from heddle.dashboards.report import write_report
from heddle.errors import HeddleError
from heddle.search.latency import Place
from heddle.search.latency_model.find import RUN_COPY
from heddle.search.latency_model.model import load_model
from heddle.search.latency_model.table import timing_environment
from heddle.search.lock import LOCK_FILE, read_lock
from heddle.search.record import Run
from heddle.search.replay import replay
from heddle.search.run import search
from heddle.search.workers import Workers
from heddle.specs import load

BESIDE_FULL = "decode_ms: {at_most: 1.1, relative_to: all-full, context: 64}"
BUDGETS = (
    BESIDE_FULL,
    "decode_ms: {at_most: 1e3, relative_to: small.yaml, context: 64}",
    "parameters: {at_most: 30.0, relative_to: small.yaml}",
    "cache_bytes: {at_most: 1M, context: 64}",
)
BY_MODEL = "  latency: model\n  latency_model: model.json"


def searched(folder: Path, *budgets: str, **machine: str) -> Run:
    """A search of eight trials in `folder` that goes by a model which was fitted with `machine`."""
    folder.mkdir()
    text = spec_with(*budgets, more=BY_MODEL).replace("trials: 12\n  round: 12", "trials: 8\n  round: 8")
    (folder / "small.yaml").write_text(
        text.partition("search:")[0].replace("hidden_size: 32", "hidden_size: 16")
    )
    (folder / "spec.yaml").write_text(text)
    file = load(folder / "spec.yaml")
    model_of(file, machine=timing_environment("cpu") | machine).save(folder / "model.json")
    return search(file, folder / "run", effort=QUICK, evaluate=scored)


@pytest.fixture(scope="module")
def lock_alone(workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lockfile of a search whose folder is gone: its spec names a latency model and another spec."""
    assert workers.parallel
    folder, alone = tmp_path_factory.mktemp("first") / "a", tmp_path_factory.mktemp("alone") / LOCK_FILE
    run = searched(folder, *BUDGETS)
    assert {bool(trial.latency) for trial in run.trials} == {True, False}
    alone.write_bytes((run.path / LOCK_FILE).read_bytes())
    shutil.rmtree(folder)
    return alone


@pytest.fixture
def again(lock_alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with an empty cache."""
    assert lock_alone.exists()
    monkeypatch.setenv("HEDDLE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "again"


def test_a_replay_needs_nothing_but_the_lockfile(lock_alone: Path, again: Path) -> None:
    made = replay(lock_alone, again, evaluate=scored)
    assert made.changes == ()
    lock = read_lock(lock_alone)
    assert made.run.meta["lock"]["texts"] == lock["spec"]["texts"]
    assert json.loads((again / RUN_COPY).read_bytes()) == lock["latency_model"]
    # Of costs nothing is timed, now or then.
    phases = {
        json.loads(path.read_bytes())["inputs"]["phase"] for path in again.glob("ledger/*/latency/*.json")
    }
    assert phases == {"decode", "prefill"}
    assert {moved.label for moved in made.moved} == {"decode_ms@1x64", "decode_ms@1x64#2"}


def test_a_replay_predicts_by_the_lockfile_and_not_by_a_newer_fit(lock_alone: Path, again: Path) -> None:
    """The spec's own path leads to a model by which all specs would keep the budget."""
    lock = read_lock(lock_alone)
    (again.parent / "model.json").write_text(json.dumps(lock["latency_model"] | {"fits": []}))
    lock["spec"]["file"] = str(again.parent / "spec.yaml")
    (again.parent / "moved.lock").write_text(json.dumps(lock))
    made = replay(again.parent / "moved.lock", again, evaluate=scored)
    assert [trial.state for trial in made.run.trials] == [trial["state"] for trial in lock["trials"]]


@pytest.mark.parametrize("phase", ["parameters", "cache_bytes", "generate"])
def test_nothing_is_timed_in_an_unknown_phase(phase: str) -> None:
    with pytest.raises(HeddleError, match=phase) as caught:
        Place(phase, 1, 64)
    assert caught.value.code == "bad-argument"


@pytest.mark.usefixtures("workers")
def test_a_model_of_other_software_rules_nothing_out_and_says_so(tmp_path: Path) -> None:
    run = searched(tmp_path / "a", BESIDE_FULL, torch="1.0")
    for trial in run.trials:
        assert trial.latency
        assert trial.figures["decode_ms@1x64"].margin is None
    warned = [event["text"] for event in run.events if event.get("level") == "warning"]
    assert any("torch 1.0 then" in text for text in warned)
    assert load_model(run.path / RUN_COPY).fits[0].held_out.margin is None
    assert "With other software" in write_report(run, tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("workers")
def test_a_run_that_goes_on_with_other_software_distrusts_its_model(tmp_path: Path) -> None:
    run = searched(tmp_path / "a", BESIDE_FULL)
    held = load_model(run.path / RUN_COPY)
    assert held.fits[0].held_out.margin is not None
    replace(held, environment=held.environment | {"driver": "1.0"}).save(run.path / RUN_COPY)
    file = load(tmp_path / "a" / "spec.yaml")
    on = search(file, run.path, resume=True, trials=9, effort=QUICK, evaluate=scored)
    assert on.meta["latency_changed"] == {"driver": ["1.0", held.environment["driver"]]}
    assert load_model(on.path / RUN_COPY).fits[0].held_out.margin is None
    assert on.trials[-1].latency
