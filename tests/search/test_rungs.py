"""Rungs: what is promoted, that a stopped search goes on as if nothing had happened, and how far rungs agree."""

from __future__ import annotations

import random
import signal
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle
from fast_search import entries, fast_file, scored
from optuna.trial import TrialState

from heddle.errors import HeddleErrors
from heddle.search.evaluate import Evaluation, Training
from heddle.search.progress import Silent
from heddle.search.rank_correlation import interval, tau_b
from heddle.search.record import Run, Trial, read_run
from heddle.search.replay import replay
from heddle.search.run import _space_digest, search
from heddle.search.rungs import at_one_rung, crowding, front_ranks, promoted
from heddle.search.study import Study, open_storage
from heddle.search.tasks import Task
from heddle.specs import SpecFile, loads, spec_hash

# The workers cannot import this file.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

RUNGS = "rungs: {eta: 2, before: [{tasks: [{mqar: {pairs: 2, length: 16, tokens: 1k}}]}, {share: 0.5}]}"
ONE, TWO = "mqar: {pairs: 2, length: 16}", "parity: {length: 16}"


def rung_file(rungs: str = RUNGS, *, tasks: tuple[str, ...] = (ONE,), **given: Any) -> SpecFile:
    """The fast search with rungs: 16 trials in rounds of 4."""
    text = fast_file(trials=16, **given).text.replace(f"{{{ONE}}}", ", ".join(f"{{{one}}}" for one in tasks))
    return loads(text.rstrip().rstrip("}") + f", {rungs}}}\n", file="rungs.yaml")


def judged(training: Training, task: Task) -> Evaluation:
    """A score that is off by less the longer the training, and another one for each task."""
    found = scored(training, task).result
    luck = random.Random(f"{spec_hash(training.model)} {task.name} {training.recipe.tokens}")
    quality = found["normalised"] + luck.gauss(0, 400 / training.recipe.tokens)
    if task.name == "parity":
        quality = 1 - quality
    found |= {"normalised": quality, "value": task.chance + quality * (task.best - task.chance)}
    return Evaluation(found | {"tokens": training.recipe.tokens})


def failing_at_first(training: Training, task: Task) -> Evaluation:
    if training.recipe.tokens == 1000 and int(spec_hash(training.model), 16) % 3 == 0:
        raise RuntimeError("the made-up failure")
    return judged(training, task)


@pytest.fixture(scope="module")
def rung_run(workers: object, tmp_path_factory: pytest.TempPathFactory) -> Run:
    assert workers
    return search(rung_file(), tmp_path_factory.mktemp("rungs") / "run", evaluate=judged)


# The rule.


def dominates(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))


def peeled(scores: list[tuple[float, ...]]) -> list[int]:
    """Ranks by taking off one front after the other, each by comparing all with all."""
    ranks, left, rank = [0] * len(scores), set(range(len(scores))), 0
    while left:
        front = {at for at in left if not any(dominates(scores[other], scores[at]) for other in left)}
        for at in front:
            ranks[at] = rank
        left, rank = left - front, rank + 1
    return ranks


@pytest.mark.parametrize("places", [1, 2, 3, 4])
def test_ranks_are_those_of_fronts_taken_off_one_by_one(places: int) -> None:
    rng = random.Random(places)
    for size in (1, 2, 7, 40):
        for grid in (3, 1000):
            scores = [tuple(float(rng.randrange(grid)) for _ in range(places)) for _ in range(size)]
            assert front_ranks(scores) == peeled(scores)


@pytest.mark.parametrize("eta", [1.1, 2, 3, 4.5])
def test_the_best_of_one_objective_go_on(eta: float) -> None:
    rng = random.Random(0)
    for size in range(1, 40):
        scores = [(float(rng.randrange(12)),) for _ in range(size)]
        best = sorted(range(size), key=lambda at: (-scores[at][0], at))
        assert promoted(scores, eta) == sorted(best[: max(1, int(size / eta + 1e-9))])
    assert promoted([], eta) == []


def test_no_promoted_score_is_dominated_by_one_that_is_left() -> None:
    rng = random.Random(1)
    for size in range(1, 30):
        scores = [(rng.random(), float(rng.randrange(4))) for _ in range(size)]
        on = promoted(scores, 3)
        left = [scores[at] for at in range(size) if at not in on]
        assert len(on) == max(1, size // 3)
        assert not any(dominates(one, scores[at]) for one in left for at in on)


def test_inside_a_front_the_ends_and_then_the_lonelier_go_on() -> None:
    front = [(0.0, 10.0), (1.0, 9.0), (2.0, 8.5), (6.0, 4.0), (10.0, 0.0)]
    assert crowding(front) == [float("inf"), 0.35, pytest.approx(1.0), pytest.approx(1.65), float("inf")]
    assert promoted(front, 1.6) == [0, 3, 4]
    assert promoted([(1.0, 1.0)] * 4, 2) == [0, 1]


# A search.


def asynchronous(run: Run, eta: float) -> dict[int, int]:
    """How many rungs each trial of a run without duplicates was scored at, by a plain replay of its scores, round by round."""
    told: list[dict[int, tuple[float, ...]]] = [{}, {}]
    reached = {}
    for number in sorted({trial.round for trial in run.trials}):
        group = [trial for trial in run.trials if trial.round == number]
        for rung in range(2):
            for trial in group:
                told[rung][trial.number] = tuple(one.normalised for one in trial.rungs[rung].values())
                reached[trial.number] = rung + 1
            order = sorted(told[rung], key=lambda one: (-told[rung][one][0], one))
            group = [trial for trial in group if trial.number in order[: max(1, int(len(order) / eta))]]
        reached |= {trial.number: 3 for trial in group}
    return reached


def test_a_trial_goes_on_if_it_is_among_the_best_told_at_its_rung(rung_run: Run) -> None:
    assert len({trial.hash for trial in rung_run.trials}) == 16
    reached = asynchronous(rung_run, 2)
    for trial in rung_run.trials:
        assert trial.state == ("complete" if reached[trial.number] == 3 else "pruned")
        assert len(trial.rungs) == min(2, reached[trial.number])
        assert set(trial.scores) == ({"mqar"} if trial.state == "complete" else set())
        assert [each["mqar"].tokens for each in trial.rungs] == [1000, 4000][: len(trial.rungs)]
    assert Counter(trial.state for trial in rung_run.trials).keys() == {"complete", "pruned"}


def test_all_in_one_round_it_is_synchronous_successive_halving(workers: object, tmp_path: Path) -> None:
    assert workers
    run = search(rung_file(round=8), tmp_path / "run", evaluate=judged, trials=8)
    left = {trial.number: trial for trial in run.trials}
    for rung, most in enumerate((4, 2)):
        scores = {number: trial.quality_at(rung) or 0.0 for number, trial in left.items()}
        assert len(scores) == (8, 4)[rung]
        best = sorted(scores, key=lambda number: -scores[number])[:most]
        left = {number: left[number] for number in best}
    assert {trial.number for trial in run.trials if trial.state == "complete"} == set(left)


def test_what_was_left_is_kept_and_never_wins(rung_run: Run) -> None:
    pruned = {trial.number for trial in rung_run.trials if trial.state == "pruned"}
    assert not pruned & {*rung_run.front, rung_run.best}
    assert rung_run.summary()["trials"]["pruned"] == len(pruned)
    finished = [event for event in rung_run.events if event["event"] == "evaluation_finished"]
    kept = [path for path in entries(rung_run.path) if path.parts[2] in ("rung-1-mqar", "rung-2-mqar")]
    assert len(kept) == sum(len(trial.rungs) for trial in rung_run.trials)
    assert len({(event["hash"], event["stage"], event["key"]) for event in finished}) == len(finished)


def test_optuna_is_told_what_was_left_as_pruned_with_its_rung(rung_run: Run) -> None:
    study = Study(
        open_storage(rung_run.path),
        f"{rung_run.name}-{rung_run.meta['id']}",
        ["maximize"],
        sampler="tpe",
        seed=0,
        startup=3,
    )
    for trial, told in zip(rung_run.trials, study.trials, strict=True):
        if trial.state == "complete":
            assert (told.state, told.values) == (TrialState.COMPLETE, [trial.scores["mqar"].value])
        else:
            rung = len(trial.rungs)
            assert told.state == TrialState.PRUNED
            assert told.intermediate_values == {rung: trial.quality_at(rung - 1)}


class Broken(Silent):
    """Ends the search at the `at`-th training phase: by Ctrl-C, or by an error that nobody catches."""

    def __init__(self, at: int, how: str) -> None:
        self.left, self.how = at, how

    def phase(self, name: str, detail: str) -> None:  # noqa: ARG002
        self.left -= name == "training"
        if self.left == 0 and name == "training":
            if self.how == "killed":
                raise RuntimeError("killed")
            signal.raise_signal(signal.SIGINT)


def plain(trial: Trial) -> tuple[Any, ...]:
    return trial.number, trial.state, trial.hash, trial.rungs, trial.scores


@pytest.mark.parametrize(
    ("at", "how"),
    [
        (5, "killed"),
        pytest.param(2, "stopped", marks=pytest.mark.long),
        pytest.param(6, "stopped", marks=pytest.mark.long),
    ],
)
def test_a_broken_search_goes_on_to_the_same_trials(rung_run: Run, tmp_path: Path, at: int, how: str) -> None:
    out = tmp_path / "run"
    if how == "killed":
        with pytest.raises(RuntimeError, match="killed"):
            search(rung_file(), out, evaluate=judged, progress=Broken(at, how))
    else:
        assert search(rung_file(), out, evaluate=judged, progress=Broken(at, how)).status == "stopped"
    before = entries(out)
    assert any(trial.state == "running" for trial in read_run(out).trials)
    run = search(rung_file(), out, evaluate=judged, resume=True)
    assert list(map(plain, run.trials)) == list(map(plain, rung_run.trials))
    assert (run.front, run.best, run.ranks) == (rung_run.front, rung_run.best, rung_run.ranks)
    assert all(entries(out)[path] == data for path, data in before.items())
    assert len(entries(out)) == len(entries(rung_run.path))


@pytest.mark.long
def test_a_replay_finds_the_scores_of_all_rungs_again(rung_run: Run, tmp_path: Path) -> None:
    again = replay(rung_run.path, tmp_path / "run", evaluate=judged)
    assert again.same, again.changes
    assert [trial.rungs for trial in again.run.trials] == [trial.rungs for trial in rung_run.trials]


def test_several_objectives_are_ranked_by_fronts(workers: object, tmp_path: Path) -> None:
    assert workers
    rungs = "rungs: {eta: 2, before: [{share: 0.25}]}"
    run = search(rung_file(rungs, tasks=(ONE, TWO), round=6), tmp_path / "run", evaluate=judged, trials=6)
    scores = [tuple(one.normalised for one in trial.rungs[0].values()) for trial in run.trials]
    assert {len(score) for score in scores} == {2}
    assert [trial.number for trial in run.trials if trial.state == "complete"] == promoted(scores, 2)
    assert run.count("pruned") == 3
    assert {(one.rung, one.task) for one in run.ranks} == {(1, None), (1, "mqar"), (1, "parity")}
    assert all(set(trial.scores) == {"mqar", "parity"} for trial in run.front_trials)


def test_a_spec_that_fails_at_a_rung_is_a_failed_trial_and_nobody_s_rival(
    workers: object, tmp_path: Path
) -> None:
    assert workers
    run = search(rung_file(), tmp_path / "run", evaluate=failing_at_first, trials=8)
    failed = [trial for trial in run.trials if trial.state == "failed"]
    assert failed
    assert all("rung 1 mqar: " in str(trial.reason) and not trial.rungs for trial in failed)
    assert {trial.state for trial in run.trials} == {"failed", "pruned", "complete"}


def test_a_placement_is_learnt_from_scores_of_one_rung(rung_run: Run) -> None:
    few = at_one_rung(rung_run.trials, 2)
    assert [quality for _, quality in few] == [trial.quality_at(0) for trial in rung_run.trials]
    whole = [trial for trial in rung_run.trials if trial.state == "complete"]
    many = at_one_rung(whole * 9, 2)
    assert [quality for _, quality in many] == [trial.quality for trial in whole] * 9


# How far rungs agree.


def counted(first: list[float], second: list[float]) -> float:
    """tau-b by looking at each pair."""
    same = first_differ = second_differ = 0
    for at in range(len(first)):
        for other in range(at):
            a, b = first[at] - first[other], second[at] - second[other]
            same += (a * b > 0) - (a * b < 0)
            first_differ += a != 0
            second_differ += b != 0
    return float(same / (first_differ * second_differ) ** 0.5)


def test_tau_b_counts_pairs() -> None:
    rng = random.Random(0)
    for size in (5, 30):
        first, second = ([float(rng.randrange(6)) for _ in range(size)] for _ in range(2))
        assert tau_b(first, second) == pytest.approx(counted(first, second))
    assert tau_b([1, 2, 3], [3, 2, 1]) == -1.0
    assert tau_b([1, 1, 1], [3, 2, 1]) is None


def test_the_interval_is_the_same_each_time_and_narrows() -> None:
    rng = random.Random(2)
    widths = []
    for size in (10, 40, 160):
        first = [rng.gauss(0, 1) for _ in range(size)]
        second = [one + rng.gauss(0, 1) for one in first]
        told = interval(first, second)
        tau = tau_b(first, second)
        assert told is not None
        assert tau is not None
        assert told == interval(first, second)
        assert told[0] < tau < told[1]
        widths.append(told[1] - told[0])
    assert all(wide > narrow for wide, narrow in pairwise(widths))


def test_the_run_tells_how_far_its_rungs_agree(rung_run: Run) -> None:
    first, second = rung_run.ranks
    both = [trial for trial in rung_run.trials if len(trial.rungs) == 2]
    assert (first.rung, first.task, first.n) == (1, None, len(both))
    pairs = [[trial.quality_at(rung) or 0.0 for trial in both] for rung in (0, 1)]
    assert first.tau == pytest.approx(counted(*pairs))
    assert second.n == rung_run.count("complete")
    assert rung_run.summary()["rungs"]["ranks"][0]["tau"] == first.tau


# The spec.


def test_other_rungs_are_another_search() -> None:
    assert _space_digest(rung_file()) != _space_digest(fast_file(trials=16))
    assert _space_digest(rung_file()) != _space_digest(rung_file(RUNGS.replace("eta: 2", "eta: 3")))


@pytest.mark.parametrize(
    ("rungs", "path", "what"),
    [
        ("{eta: 1, before: [{share: 0.1}]}", "eta", "1 is not above 1"),
        ("{before: [{share: 0.3}, {share: 0.3}]}", "before.0", "rungs must grow"),
        (f"{{before: [{{share: 0.1}}, {{tasks: [{{{ONE}}}]}}]}}", "before.1", "search.tasks after it on 8,000"),
        ("{before: [{}]}", "before.0", "one of the two"),
        ("{before: [{share: 0.1, tasks: [text]}]}", "before.0", "one of the two"),
        ("{before: [{tasks: [mqr]}]}", "before.0.tasks.0", "there is no task 'mqr'"),
        ("{before: [{tasks: [{mqar: {pairs: 9, length: 16, tokens: 1k}}]}]}", "before.0.tasks.0.mqar.pairs", "need 36"),
        ("{before: [{share: 0.1}]}, evaluator: reach", "", "trains nothing"),
    ],
)  # fmt: skip
def test_rungs_that_make_no_sense_are_told_with_their_place(rungs: str, path: str, what: str) -> None:
    with pytest.raises(HeddleErrors) as caught:
        rung_file(f"rungs: {rungs}")
    (error,) = caught.value.errors
    assert what in error.what
    assert error.where is not None
    assert error.where.line == 13
    assert error.where.path == ".".join(["search.rungs", *([path] if path else [])])
