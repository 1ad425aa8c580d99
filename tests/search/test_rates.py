"""Several learning rates of a task: each is trained once, the best score counts, and all of them are kept."""

from __future__ import annotations

import json
import random
import signal
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
from fast_search import entries, fast_file, scored

from heddle.compose.train import Recipe
from heddle.errors import HeddleError, HeddleErrors
from heddle.search.evaluate import Evaluation, Training
from heddle.search.evaluations import weights_path
from heddle.search.objectives import without_unset
from heddle.search.progress import Silent
from heddle.search.record import Run, Trial
from heddle.search.replay import replay
from heddle.search.run import _space_digest, search
from heddle.search.tasks import Task, make_task, recipes_for
from heddle.search.training import train
from heddle.specs import MqarTask, SpecFile, TrainSpec, load, loads, spec_hash

# The workers cannot import this file.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

TASK = "mqar: {pairs: 2, length: 16}"
RATES = [0.001, 0.003, 0.01]
RUNGS = ", rungs: {eta: 2, before: [{share: 0.25}]}"


def with_rates(rates: str = str(RATES), more: str = "", **given: Any) -> SpecFile:
    """The fast search with several learning rates."""
    text = fast_file(**{"trials": 6, "round": 2} | given).text
    text = text.replace("length: 16}", f"length: 16, learning_rates: {rates}}}").rstrip().rstrip("}")
    return loads(f"{text}{more}}}\n", file="rates.yaml")


def by_rate(training: Training, task: Task) -> Evaluation:
    """A score with a luck of its own for each spec and rate; the highest rate is nothing for every second spec."""
    own, rate = spec_hash(training.model), training.recipe.learning_rate
    if rate == RATES[-1] and int(own, 16) % 2 == 0:
        raise HeddleError("loss-not-finite", "the loss is nan at step 7")
    found = scored(training, task).result
    quality = random.Random(f"{own} {rate} {training.recipe.tokens}").random()
    return Evaluation(found | {"normalised": quality, "value": task.chance + quality * (1 - task.chance)})


def always_broken(training: Training, task: Task) -> Evaluation:  # noqa: ARG001
    """The last rate runs into an error of every spec, or all into a loss that is nan."""
    if training.recipe.learning_rate == RATES[-1] and int(spec_hash(training.model), 16) % 2:
        raise RuntimeError("the made-up failure")
    raise HeddleError("loss-not-finite", "the loss is nan at step 7")


@pytest.fixture(scope="module")
def rate_run(workers: object, tmp_path_factory: pytest.TempPathFactory) -> Run:
    assert workers
    return search(with_rates(), tmp_path_factory.mktemp("rates") / "run", evaluate=by_rate)


def keys_of(run: Run) -> Counter[tuple[str, str, str]]:
    """How often each evaluation was begun."""
    begun = (event for event in run.events if event["event"] == "evaluation_started")
    return Counter((event["hash"], event["stage"], event["key"]) for event in begun)


def test_each_rate_is_an_evaluation_of_its_own_and_the_best_score_counts(rate_run: Run) -> None:
    kept = [json.loads(data) for data in entries(rate_run.path).values()]
    told = {(each["spec"], each["inputs"]["recipe"]["learning_rate"]): each for each in kept}
    assert len(told) == len(kept) == 3 * len({trial.hash for trial in rate_run.trials})
    for trial in rate_run.trials:
        results = [told[trial.hash, rate]["result"] for rate in RATES]
        rates = trial.rates["mqar"]
        assert [one.learning_rate for one in rates] == RATES
        assert [one.score and one.score.value for one in rates] == [one and one["value"] for one in results]
        best = max(one["value"] for one in results if one)
        assert trial.scores["mqar"].value == best
        assert [one.score.value for one in rates if one.is_best and one.score] == [best]
    assert rate_run.best_trial is not None
    assert rate_run.best_trial.quality == max(trial.quality or 0.0 for trial in rate_run.trials)


def test_a_rate_that_diverges_is_passed_over(rate_run: Run) -> None:
    diverged = [trial for trial in rate_run.trials if trial.rates["mqar"][-1].score is None]
    assert diverged
    assert all(trial.state == "complete" for trial in rate_run.trials)
    assert all(trial.best_is_at("mqar") != "last" for trial in diverged)


def test_a_trial_fails_where_all_rates_diverge_or_one_fails_otherwise(
    workers: object, tmp_path: Path
) -> None:
    assert workers
    run = search(with_rates(), tmp_path / "run", evaluate=always_broken)
    assert {trial.state for trial in run.trials} == {"failed"}
    for trial in run.trials:
        of_spec = bool(int(trial.hash, 16) % 2)
        assert ("made-up" if of_spec else "loss-not-finite") in str(trial.reason)


def test_an_end_of_the_list_is_told_only_where_it_alone_is_best(rate_run: Run) -> None:
    trial = rate_run.trials[0]
    assert trial.scores["mqar"]
    for values, end in (([1, 2, 3], "last"), ([3, 2, 1], "first"), ([1, 3, 1], None), ([1, 3, 3], None)):
        scores = [replace(trial.scores["mqar"], value=float(value)) for value in values]
        best = values.index(3)
        rates = tuple(
            replace(one, score=score, is_best=at == best)
            for at, (one, score) in enumerate(zip(trial.rates["mqar"], scores, strict=True))
        )
        assert replace(trial, rates={"mqar": rates}).best_is_at("mqar") == end
    assert trial.best_is_at("text") is None


class Killed(Silent):
    """Ends the search at the `at`-th told trial, as an error that nobody catches does."""

    def __init__(self, at: int) -> None:
        self.left = at

    def trial_finished(self, trial: Trial) -> None:  # noqa: ARG002
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("killed")


@pytest.mark.parametrize("more", ["", RUNGS])
def test_a_search_that_goes_on_repeats_no_rate(workers: object, tmp_path: Path, more: str) -> None:
    assert workers
    file, whole, out = with_rates(more=more), tmp_path / "whole", tmp_path / "run"
    expected = search(file, whole, evaluate=by_rate)
    with pytest.raises(RuntimeError, match="killed"):
        search(file, out, evaluate=by_rate, progress=Killed(3))
    run = search(file, out, evaluate=by_rate, resume=True)
    assert [(t.hash, t.state, t.scores, t.rates, t.rungs) for t in run.trials] == [
        (t.hash, t.state, t.scores, t.rates, t.rungs) for t in expected.trials
    ]
    assert entries(out).keys() == entries(whole).keys()
    assert set(keys_of(run).values()) == {1}


def weighing(training: Training, task: Task) -> Evaluation:
    """As `by_rate`, with weights that name their rate."""
    weights = f"{training.recipe.learning_rate:g}".encode() if training.keep_weights else None
    return replace(by_rate(training, task), weights=weights)


class NotExported(Silent):
    """Stops a search before its winner is exported, whose weights are none."""

    def phase(self, name: str, detail: str) -> None:  # noqa: ARG002
        if name == "remeasure":
            signal.raise_signal(signal.SIGINT)


def test_weights_are_those_of_the_best_rate_after_a_kill_too(workers: object, tmp_path: Path) -> None:
    assert workers
    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match="killed"):
        search(with_rates(), out, evaluate=weighing, progress=Killed(3))
    # Of the round in which it died the second trial was not told.
    assert len(list((out / "weights").glob("*.*.safetensors"))) >= 2
    run = search(with_rates(), out, evaluate=weighing, resume=True, progress=NotExported())
    kept = {path.name: path.read_text() for path in (out / "weights").iterdir()}
    assert kept == {f"{trial.hash}.safetensors": f"{trial.best_rate('mqar'):g}" for trial in run.front_trials}
    assert run.best_trial is not None
    assert (out / "best" / "model.safetensors").read_text() == f"{run.best_trial.best_rate('mqar'):g}"


def test_rungs_take_the_best_rate_of_each_spec_and_keep_the_others(workers: object, tmp_path: Path) -> None:
    assert workers
    run = search(with_rates(more=RUNGS), tmp_path / "run", evaluate=by_rate)
    assert run.count("pruned")
    assert run.count("complete")
    for trial in run.trials:
        stages = ["rung-1-mqar", *(["mqar"] if trial.state == "complete" else [])]
        assert list(trial.rates) == stages
        scores = [one.score.value for one in trial.rates["rung-1-mqar"] if one.score]
        assert trial.rungs[0]["mqar"].value == max(scores)


def test_a_replay_finds_every_rate_again(rate_run: Run, tmp_path: Path) -> None:
    again = replay(rate_run.path, tmp_path / "run", evaluate=by_rate)
    assert again.same, again.changes
    lock = json.loads((rate_run.path / "heddle.lock").read_text())
    assert {f"mqar at learning rate {rate:g}" for rate in RATES} < set(lock["trials"][0]["scores"])


@pytest.mark.slow
@pytest.mark.usefixtures("workers")
def test_weights_spec_and_retraining_are_those_of_the_best_rate(tiny_text: str, tmp_path: Path) -> None:
    text = tiny_text.replace(
        "length: 16}}, text]", "length: 16}}, {text: {learning_rates: [1.0e-5, 3.0e-3]}}]"
    )
    text = text.replace("trials: 6", "trials: 2")
    text = text[: text.index("  budgets:")] + text[text.index("  confirm_seeds:") :]
    assert text.count("learning_rates") == 1
    run = search(loads(text, file="tiny.yaml"), tmp_path / "run")
    best = run.best_trial
    assert best is not None
    assert best.best_rate("text") == 3e-3
    assert best.best_is_at("text") == "last"
    kept = [path.name for path in (run.path / "weights").glob("*.safetensors")]
    assert kept == [weights_path(run.path, trial.hash).name for trial in run.front_trials]
    again = train(load(run.path / "best" / "spec.yaml"), tmp_path / "again", device="cpu")
    assert again.score.value == best.scores["text"].value
    weights = run.path / "best" / "model.safetensors"
    assert weights.read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()
    assert run.confirm is not None
    assert run.confirm.learning_rates == {"text": 3e-3}
    confirmed = [
        json.loads(data)["inputs"]["recipe"]
        for path, data in entries(run.path).items()
        if path.parts[2] == "text"
    ]
    assert {recipe["learning_rate"] for recipe in confirmed if recipe["seed"]} == {3e-3}


# The spec.


def test_a_recipe_for_each_rate_and_one_without() -> None:
    train_spec = TrainSpec(learning_rate=0.5)
    several = recipes_for(MqarTask(learning_rates=RATES, tokens=100), train_spec)
    assert [(one.learning_rate, one.tokens) for one in several] == [(rate, 100) for rate in RATES]
    assert [one.learning_rate for one in recipes_for(MqarTask(), train_spec)] == [0.5]
    assert isinstance(several[0], Recipe)


def test_rates_change_neither_the_task_s_data_nor_the_digest_of_a_search_without_them() -> None:
    plain = fast_file(trials=6).spec.data
    digests = {
        make_task(task, plain, vocab_size=256).digest for task in (MqarTask(), MqarTask(learning_rates=RATES))
    }
    assert len(digests) == 1
    # As it was before a task could have several: a run that was begun then goes on.
    for file, named in ((fast_file(trials=6), False), (with_rates(), True)):
        assert ("learning_rates" in repr(without_unset(file.spec.model_dump()))) is named
    assert _space_digest(with_rates()) != _space_digest(with_rates("[0.001, 0.003]"))


@pytest.mark.parametrize(
    ("rates", "more", "path", "what"),
    [
        ("[0.001, 0.01], learning_rate: 0.1", "", "tasks.0.mqar.learning_rates", "one of the two"),
        ("[0.01, 0.001]", "", "tasks.0.mqar.learning_rates", "must rise"),
        ("[0.01, 0.01]", "", "tasks.0.mqar.learning_rates", "must rise"),
        ("[0.01]", "", "tasks.0.mqar.learning_rates", "at least 2"),
        ("[0.01, 20]", "", "tasks.0.mqar.learning_rates.1", "20 is"),
        ("[0.01, 0.1]", ", evaluator: reach", "tasks.0.mqar.learning_rates", "is given no learning rate"),
        ("[0.01, 0.1]", ", evaluator: 'a.b:c'", "tasks.0.mqar.learning_rates", "is given no learning rate"),
        (
            "[0.01, 0.1]",
            ", rungs: {before: [{tasks: [{mqar: {tokens: 1k, learning_rates: [0.1, 0.01]}}]}]}",
            "rungs.before.0.tasks.0.mqar.learning_rates",
            "must rise",
        ),
    ],
)
def test_rates_that_make_no_sense_are_told_with_their_place(
    rates: str, more: str, path: str, what: str
) -> None:
    with pytest.raises(HeddleErrors) as caught:
        with_rates(rates, more)
    (error,) = caught.value.errors
    assert what in error.what
    assert error.where is not None
    assert error.where.line == 13
    assert error.where.path == f"search.{path}"
