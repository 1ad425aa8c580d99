"""The best trials trained for longer at the end: in both orders, told beside the search's ranking, and changing nothing."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
from fast_search import entries, fast_file, scored

from heddle.dashboards.longer_section import rows
from heddle.dashboards.report import page
from heddle.dashboards.words import longer_texts
from heddle.errors import HeddleError, HeddleErrors
from heddle.search.evaluate import Evaluation, Training
from heddle.search.record import Run, read_run
from heddle.search.replay import replay
from heddle.search.run import _space_digest, search
from heddle.search.tasks import Task
from heddle.specs import SpecFile, expand_layers, loads

# The workers cannot import this file.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

LONGER = "confirm_longer: {best: 3, times: 4, seeds: 2}"
SHORT = 8000


def long_file(more: str = LONGER, *, rates: str = "", **given: Any) -> SpecFile:
    text = fast_file(**{"trials": 6, "round": 3} | given).text.replace("length: 16}", f"length: 16{rates}}}")
    return loads(text.rstrip().rstrip("}") + f", {more}}}\n", file="longer.yaml")


def turned(training: Training, task: Task) -> Evaluation:
    """In a search late full layers are good, after a longer training early ones; a seed adds its own."""
    found = scored(training, task).result
    quality, recipe = found["normalised"], training.recipe
    if recipe.tokens > SHORT:
        names = expand_layers(training.model)
        if names[0] == "full" and recipe.learning_rate == 1.0:
            raise HeddleError("loss-not-finite", "the loss is nan at step 7")
        quality = 1 - quality + 0.001 * recipe.seed
    value = task.chance + quality * (task.best - task.chance)
    return Evaluation(found | {"normalised": quality, "value": value, "se": 0.0, "tokens": recipe.tokens})


def steady(training: Training, task: Task) -> Evaluation:
    return Evaluation(scored(training, task).result)


@pytest.fixture(scope="module")
def long_run(workers: object, tmp_path_factory: pytest.TempPathFactory) -> Run:
    assert workers
    return search(long_file(), tmp_path_factory.mktemp("longer") / "run", evaluate=turned)


def test_the_best_and_their_reverses_are_trained_for_longer_with_new_seeds(long_run: Run) -> None:
    longer = long_run.longer
    assert longer is not None
    own = [row for row in longer.rows if not row.is_reversed]
    ranked = sorted({t.hash: t for t in long_run.trials}.values(), key=lambda t: -(t.quality or 0.0))
    assert [row.hash for row in own] == [trial.hash for trial in ranked[:3]]
    assert own[0].number == long_run.best == longer.number
    reverses = [row for row in longer.rows if row.is_reversed]
    assert reverses
    for row in reverses:
        assert row.layers == long_run.trial(row.number).layers[::-1] != long_run.trial(row.number).layers
    kept = {path: json.loads(data) for path, data in entries(long_run.path).items()}
    recipes = [one["inputs"]["recipe"] for path, one in kept.items() if path.parts[2] == "longer-mqar"]
    assert len(recipes) == 2 * len(longer.rows)
    assert {(recipe["tokens"], recipe["seed"]) for recipe in recipes} == {(4 * SHORT, 1), (4 * SHORT, 2)}


def test_a_ranking_that_does_not_hold_is_told_and_changes_no_winner(long_run: Run) -> None:
    longer, best = long_run.longer, long_run.best_trial
    assert longer is not None
    assert best is not None
    assert best.quality == max(trial.quality or 0.0 for trial in long_run.trials)
    assert longer.holds is False
    assert longer.ahead
    warned = [event["text"] for event in long_run.events if event["event"] == "message"]
    assert sum(f"ahead of the winner, trial {best.number}" in text for text in warned) == 1
    said = " ".join(longer_texts(longer))
    assert "is not that of the search" in said
    assert "The winner stays the search's" in said
    shown = re.sub(r"<[^>]+>", " ", page(long_run))
    assert "The best, trained for longer" in shown
    assert f"trial {best.number} in reverse order" in shown or longer.rows[1].number != best.number
    assert [row[2] for row in rows(long_run) if row[2] != "–"] == [1, 2, 3]
    assert long_run.summary()["longer"]["times"] == 4


def test_a_ranking_that_holds_is_told_so(workers: object, tmp_path: Path) -> None:
    assert workers
    run = search(long_file("confirm_longer: {}"), tmp_path / "run", evaluate=steady)
    longer = run.longer
    assert longer is not None
    assert longer.holds is True
    assert not [row for row in longer.ahead if not row.is_reversed]
    said = " ".join(longer_texts(longer))
    assert "is that of the search" in said
    assert "One new seed each" in said


def test_it_goes_on_without_training_anything_again_and_replays(long_run: Run, tmp_path: Path) -> None:
    before = entries(long_run.path)
    again = search(long_file(), long_run.path, evaluate=turned, resume=True)
    assert entries(again.path) == before
    assert again.longer == long_run.longer
    repeated = replay(long_run.path, tmp_path / "run", evaluate=turned)
    assert repeated.same, repeated.changes
    assert repeated.run.longer == long_run.longer
    lock = json.loads((long_run.path / "heddle.lock").read_text())
    assert len(lock["longer"]) == len(long_run.longer.rows if long_run.longer else ())


def test_a_finished_search_takes_it_up_later(workers: object, tmp_path: Path) -> None:
    assert workers
    plain = long_file("time: 1h")
    assert search(plain, tmp_path / "run", evaluate=steady).longer is None
    assert _space_digest(plain) == _space_digest(long_file("time: 1h, confirm_longer: {best: 2}"))
    run = search(
        long_file("time: 1h, confirm_longer: {best: 2}"), tmp_path / "run", evaluate=steady, resume=True
    )
    assert run.longer is not None
    assert len([row for row in run.longer.rows if not row.is_reversed]) == 2


def test_every_learning_rate_is_tried_and_a_failure_at_one_is_told(workers: object, tmp_path: Path) -> None:
    assert workers
    file = long_file("confirm_longer: {best: 2, times: 2}", rates=", learning_rates: [0.1, 1.0]")
    run = search(file, tmp_path / "run", evaluate=turned)
    longer = run.longer
    assert longer is not None
    assert all(row.learning_rates == {"mqar": 0.1} for row in longer.rows)
    early = [row for row in longer.rows if row.layers[0] == "full"]
    assert len(longer.failures) == len(early)
    for row in early:
        assert any(
            failure.startswith(f"{row.name}, mqar, learning rate 1, seed 1") for failure in longer.failures
        )


def test_the_longer_trainings_of_an_earlier_winner_are_out_of_date(long_run: Run) -> None:
    assert long_run.longer is not None
    path = long_run.path / "longer.json"
    text = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(text) | {"number": 99}))
        assert read_run(long_run.path).longer is None
    finally:
        path.write_text(text)


def test_a_placement_whose_training_failed_has_no_place(long_run: Run) -> None:
    longer = long_run.longer
    assert longer is not None
    first = replace(longer.rows[0], qualities=(), values={}, learning_rates={})
    broken = replace(long_run, longer=replace(longer, rows=(first, *longer.rows[1:])))
    assert rows(broken)[0][3:] == ["failed", f"{first.before:.4f}", "–", "failed"]
    assert broken.longer is not None
    assert broken.longer.ahead == ()


def test_what_lies_within_two_standard_errors_is_no_other_order(long_run: Run) -> None:
    longer = long_run.longer
    assert longer is not None
    assert longer.rows[0].se == 0.0
    vague = replace(longer, rows=tuple(replace(row, se=1.0) for row in longer.rows))
    assert (vague.holds, vague.is_same_order, vague.ahead) == (True, False, ())
    assert "within two standard errors that of the search" in longer_texts(vague)[0]


def test_the_error_is_that_of_a_mean_of_normalised_scores(workers: object, tmp_path: Path) -> None:
    """Two seeds of one task, each off by 0.01 of the way from chance to the best."""
    assert workers
    run = search(long_file("confirm_longer: {best: 1, seeds: 2}"), tmp_path / "run", evaluate=steady)
    assert run.longer is not None
    scale = run.tasks[0].best - run.tasks[0].chance
    assert run.longer.rows[0].se == pytest.approx(0.01 / scale / 2**0.5)


@pytest.mark.parametrize(
    ("more", "path", "what"),
    [
        ("confirm_longer: {times: 1}", "confirm_longer.times", "1 is not above 1"),
        ("confirm_longer: {best: 0}", "confirm_longer.best", "0 is"),
        ("confirm_longer: {}, evaluator: random_features", "confirm_longer", "is not told for how long"),
    ],
)
def test_longer_trainings_that_make_no_sense_are_told_with_their_place(
    more: str, path: str, what: str
) -> None:
    with pytest.raises(HeddleErrors) as caught:
        long_file(more)
    (error,) = caught.value.errors
    assert what in error.what
    assert error.where is not None
    assert (error.where.line, error.where.path) == (13, f"search.{path}")
