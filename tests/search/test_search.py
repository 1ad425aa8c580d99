"""A whole search, end to end on a tiny space: what its folder holds, and how it goes on, fails and gives
up."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray.cloudpickle

from heddle.errors import HeddleError
from heddle.search.durable import LineLog, full_disk_told
from heddle.search.evaluate import Evaluate, Evaluation, Training, train_and_score
from heddle.search.evaluations import weights_path
from heddle.search.export import export_run
from heddle.search.latency import Effort
from heddle.search.ledger import Entry, Ledger
from heddle.search.progress import Silent
from heddle.search.record import Run, Trial, read_run
from heddle.search.run import search
from heddle.search.study import RunLock
from heddle.search.tasks import Task
from heddle.search.workers import RETRIES
from heddle.specs import SpecFile, expand_layers, load, loads, spec_hash

# The workers cannot import this file.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

QUICK = Effort(warmup=1, least=3, most=5, seconds=0.2)


def of(run: Run, event: str) -> list[dict[str, Any]]:
    return [line for line in run.events if line["event"] == event]


# A finished search.


def test_every_trial_is_told_and_the_count_is_the_one_asked_for(tiny_run: Run) -> None:
    assert tiny_run.status == "finished"
    assert [trial.number for trial in tiny_run.trials] == list(range(6))
    assert {trial.state for trial in tiny_run.trials} == {"complete"}
    assert all(set(trial.scores) == {"mqar", "text"} for trial in tiny_run.trials)


def test_trials_are_different_specs_while_there_are_unseen_ones(tiny_run: Run) -> None:
    assert len({trial.hash for trial in tiny_run.trials}) == 6


def test_each_trial_is_the_spec_it_says(tiny_run: Run) -> None:
    for trial in tiny_run.trials:
        spec = load(tiny_run.path / "trials" / f"{trial.number:04d}.yaml").spec
        assert spec_hash(spec.model) == trial.hash
        assert trial.layers.count("full") == trial.params["layers.placement.count.full"]
        assert [spec.model.blocks[name].mixer.window for name in expand_layers(spec.model)] == [
            None if name == "full" else trial.params["blocks.near.mixer.window"] for name in trial.layers
        ]


def test_no_evaluation_is_begun_twice(tiny_run: Run) -> None:
    begun = Counter((e["hash"], e["stage"], e["key"]) for e in of(tiny_run, "evaluation_started"))
    assert set(begun.values()) == {1}
    ledger = {path.parts[-3:] for path in tiny_run.path.glob("ledger/*/*/*.json")}
    assert ledger == {(spec, stage, f"{key}.json") for spec, stage, key in begun}


def test_nothing_trains_while_something_is_timed(tiny_run: Run) -> None:
    flying: set[tuple[str, str]] = set()
    for event in tiny_run.events:
        if event["event"] == "evaluation_started":
            flying.add((event["stage"], event["key"] + event["hash"]))
            stages = {stage for stage, _ in flying}
            assert "latency" not in stages or len(flying) == 1
        elif event["event"] == "evaluation_finished":
            flying.remove((event["stage"], event["key"] + event["hash"]))


def test_the_reference_is_measured_and_trained_as_a_baseline(tiny_run: Run) -> None:
    baseline = tiny_run.reference
    assert baseline is not None
    assert set(baseline.layers) == {"full"}
    assert set(baseline.scores) == {"mqar", "text"}
    assert baseline.latency["decode_ms@1x64"].reference == "all-full"


def test_weights_are_kept_for_the_front_and_the_reference_alone(tiny_run: Run) -> None:
    kept = set((tiny_run.path / "weights").iterdir())
    assert tiny_run.reference is not None
    trials = [*tiny_run.front_trials, tiny_run.reference]
    assert kept == {weights_path(tiny_run.path, trial.hash) for trial in trials}
    assert tiny_run.best in tiny_run.front


def test_the_front_is_timed_again_in_both_phases(tiny_run: Run) -> None:
    for trial in tiny_run.front_trials:
        assert set(trial.remeasured) == {"decode_ms@1x64", "prefill_ms@1x64"}
        assert trial.remeasured["decode_ms@1x64"] != trial.latency["decode_ms@1x64"]


def test_the_winner_meets_the_uniform_placement_on_fresh_seeds(tiny_run: Run) -> None:
    confirm, best = tiny_run.confirm, tiny_run.best_trial
    assert confirm is not None
    assert best is not None
    assert confirm.hash == best.hash
    assert confirm.seeds == (1, 2)
    assert all(len(values) == 2 for values in confirm.scores.values())
    assert confirm.same == (confirm.layers == confirm.uniform_layers)
    assert Counter(confirm.uniform_layers) == Counter(confirm.layers)
    assert [d.task for d in confirm.differences] == ([] if confirm.same else ["mqar", "text"])


def test_the_best_is_kept_as_spec_weights_and_export(tiny_run: Run) -> None:
    best = tiny_run.best_trial
    assert best is not None
    assert spec_hash(load(tiny_run.path / "best" / "spec.yaml").spec.model) == best.hash
    assert (tiny_run.path / "best" / "model.safetensors").read_bytes() == weights_path(
        tiny_run.path, best.hash
    ).read_bytes()
    assert tiny_run.export is not None
    assert (tiny_run.export / "config.json").exists()
    assert "mqar" in (tiny_run.export / "README.md").read_text()


def test_a_trial_off_the_front_says_how_to_train_it_again(tiny_run: Run, tmp_path: Path) -> None:
    other = next(trial.number for trial in tiny_run.trials if trial.number not in tiny_run.front)
    with pytest.raises(HeddleError, match="heddle train") as caught:
        export_run(tiny_run.path, tmp_path / "out", trial=other)
    assert caught.value.code == "no-weights"
    command = str(caught.value.hint).split("heddle train ")[1].split()
    assert spec_hash(load(command[0]).spec.model) == tiny_run.trial(other).hash


def test_an_unknown_trial_is_bad_input(tiny_run: Run, tmp_path: Path) -> None:
    for trial in ("77", "first"):
        with pytest.raises(HeddleError) as caught:
            export_run(tiny_run.path, tmp_path / "out", trial=trial)
        assert caught.value.code == "bad-argument"


def test_reading_a_run_needs_neither_torch_nor_optuna(tiny_run: Run) -> None:
    script = f"""
import sys
from heddle.search.record import read_run
run = read_run({str(tiny_run.path)!r})
assert len(run.trials) == 6, run
assert not {{"torch", "optuna", "ray", "numpy", "pydantic"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# Going on with one.


@pytest.mark.usefixtures("workers")
def test_a_finished_search_resumed_evaluates_nothing(tiny_run: Run, tiny_file: SpecFile) -> None:
    before = len(of(tiny_run, "evaluation_started"))
    again = search(tiny_file, tiny_run.path, resume=True, effort=QUICK)
    assert len(of(again, "evaluation_started")) == before
    assert again.status == "finished"
    assert (again.trials, again.front, again.best) == (tiny_run.trials, tiny_run.front, tiny_run.best)


def test_a_folder_with_a_search_is_not_overwritten(tiny_run: Run, tiny_file: SpecFile) -> None:
    with pytest.raises(HeddleError, match="--resume") as caught:
        search(tiny_file, tiny_run.path)
    assert caught.value.code == "run-exists"


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("hidden_size: 32", "hidden_size: 16", "spec space"),
        ("[1, 2]", "[0, 2]", "spec space"),
        ("8k", "9k", "spec space"),
        ("round: 2", "round: 3", "spec space"),
    ],
)
@pytest.mark.usefixtures("workers")
def test_another_spec_does_not_go_on_with_a_run(
    tiny_run: Run, tiny_text: str, old: str, new: str, what: str
) -> None:
    assert old in tiny_text
    with pytest.raises(HeddleError, match=what) as caught:
        search(loads(tiny_text.replace(old, new)), tiny_run.path, resume=True)
    assert caught.value.code == "run-mismatch"


@pytest.mark.usefixtures("workers")
def test_other_data_does_not_go_on_with_a_run(tiny_run: Run, tiny_file: SpecFile, corpus: Path) -> None:
    text = corpus.read_text()
    try:
        corpus.write_text(text.replace("square", "circle"))
        with pytest.raises(HeddleError, match="training data") as caught:
            search(tiny_file, tiny_run.path, resume=True)
        assert caught.value.code == "run-mismatch"
    finally:
        corpus.write_text(text)


def test_nothing_to_resume_is_bad_input(tiny_file: SpecFile, tmp_path: Path) -> None:
    with pytest.raises(HeddleError) as caught:
        search(tiny_file, tmp_path / "none", resume=True)
    assert caught.value.code == "run-not-found"
    with pytest.raises(HeddleError):
        read_run(tmp_path)


# What can go wrong. These evaluators take the place of training.


def scored(training: Training, task: Task) -> Evaluation:
    """A score without training: the later a full layer stands, the better."""
    places = [index for index, name in enumerate(expand_layers(training.model)) if name == "full"]
    quality = sum(places) / 12
    value = task.chance + quality * (task.best - task.chance)
    result = {
        "task": task.name,
        "metric": task.metric,
        "value": value,
        "se": 0.01,
        "n": 10,
        "normalised": quality,
        "seed": training.recipe.seed,
        "steps": 1,
        "tokens": 1,
        "wall_s": 0.0,
        "losses": [(1, 1.0)],
    }
    return Evaluation(result)


def die_at_text(training: Training, task: Task) -> Evaluation:
    if task.metric == "bits_per_byte":
        os._exit(9)
    return scored(training, task)


def explode_in_training(training: Training, task: Task) -> Evaluation:
    """Trains for real, at a rate that no model survives."""
    recipe = replace(training.recipe, learning_rate=1e30, grad_clip=1e30, warmup=0.0)
    return train_and_score(replace(training, recipe=recipe), task)


def no_memory(_training: Training, _task: Task) -> Evaluation:
    raise HeddleError("out-of-memory", "training ran out of memory at step 1 of 9")


def quick(text: str, out: Path, **changes: Any) -> Run:
    """A search of two trials without training and, as nothing limits it, without timing."""
    text = "".join(line for line in text.splitlines(keepends=True) if "at_most: 1000000.0" not in line)
    given = {"evaluate": scored, "trials": 2, **changes}
    return search(loads(text, file="tiny.yaml"), out, effort=QUICK, **given)


@pytest.mark.usefixtures("workers")
def test_when_nothing_keeps_the_budget_the_nearest_misses_are_listed(tiny_text: str, tmp_path: Path) -> None:
    run = quick(tiny_text.replace("at_most: 1000000.0", "at_most: 1.0e-06"), tmp_path / "run", trials=3)
    assert run.status == "nothing-feasible"
    assert {trial.state for trial in run.trials} == {"infeasible"}
    assert run.best is None
    assert not run.front
    violations = [run.trial(number).violation for number in run.least_violating]
    assert len(violations) == 3
    assert violations == sorted(violations)
    assert not any(
        event["stage"] != "latency" and event["number"] >= 0 for event in of(run, "evaluation_started")
    )


@pytest.mark.usefixtures("workers")
def test_a_worker_that_dies_is_retried_and_then_a_failed_trial(tiny_text: str, tmp_path: Path) -> None:
    run = quick(tiny_text, tmp_path / "run", evaluate=die_at_text, trials=1)
    (trial,) = run.trials
    assert trial.state == "failed"
    assert str(trial.reason).startswith("text: worker-died:")
    assert trial.attempts == RETRIES + 1
    assert trial.scores["mqar"].task == "mqar"
    assert run.status == "nothing-feasible"


@pytest.mark.parametrize(
    ("evaluate", "code"), [(explode_in_training, "loss-not-finite"), (no_memory, "out-of-memory")]
)
@pytest.mark.usefixtures("workers")
def test_a_failed_training_is_a_failed_trial_with_its_reason(
    tiny_text: str, tmp_path: Path, evaluate: Evaluate, code: str
) -> None:
    run = quick(tiny_text, tmp_path / "run", evaluate=evaluate, trials=1)
    (trial,) = run.trials
    assert trial.state == "failed"
    assert f"mqar: {code}: " in str(trial.reason)
    again = quick(tiny_text, tmp_path / "run", evaluate=evaluate, trials=1, resume=True)
    assert len(of(again, "evaluation_started")) == len(of(run, "evaluation_started"))


@pytest.mark.usefixtures("workers")
def test_a_full_disk_ends_the_search_and_a_resume_finishes_it(
    tiny_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, calls = Ledger.put, Counter[str]()

    def full_at_the_fifth(self: Ledger, entry: Entry) -> Entry:
        calls["put"] += 1
        if calls["put"] == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return put(self, entry)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "put", full_at_the_fifth)
        with pytest.raises(HeddleError, match="no space") as caught:
            quick(tiny_text, tmp_path / "run")
    assert caught.value.code == "disk-full"
    kept = {path: path.read_bytes() for path in tmp_path.glob("run/ledger/*/*/*.json")}
    assert len(kept) == 4
    run = quick(tiny_text, tmp_path / "run", resume=True, evaluate=scored)
    assert run.count("complete") == 2
    assert all(path.read_bytes() == data for path, data in kept.items())


@pytest.mark.usefixtures("workers")
def test_an_event_that_finds_no_space_ends_the_search_and_a_resume_finishes_it(
    tiny_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = LineLog.write

    def full_at_the_second_trial(self: LineLog, *values: dict[str, Any]) -> None:
        if all((value["event"], value.get("number")) != ("trial_finished", 1) for value in values):
            write(self, *values)
            return
        with full_disk_told(self.path):
            # A part of the line was written when the disk was full.
            self._file.write(b'{"event": "trial_fin')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(LineLog, "write", full_at_the_second_trial)
        with pytest.raises(HeddleError, match=r"no space to write .*events\.jsonl") as caught:
            quick(tiny_text, tmp_path / "run")
    assert caught.value.code == "disk-full"
    begun = len(of(read_run(tmp_path / "run"), "evaluation_started"))
    run = quick(tiny_text, tmp_path / "run", resume=True)
    assert run.count("complete") == 2
    trained = [event for event in of(run, "evaluation_started")[begun:] if event["number"] < 2]
    assert {event["hash"] for event in trained} <= {run.best_trial.hash, *confirmed(run)}  # type: ignore[union-attr]


def confirmed(run: Run) -> set[str]:
    return set() if run.confirm is None else {run.confirm.hash, run.confirm.uniform_hash}


def no_number(training: Training, task: Task) -> Evaluation:
    """A score that is none, of an evaluator of the user's."""
    found = scored(training, task)
    found.result["value"] = float("nan")
    return found


def hang_at_text(training: Training, task: Task) -> Evaluation:
    if task.metric == "bits_per_byte":
        time.sleep(600)
    return scored(training, task)


@pytest.mark.usefixtures("workers")
def test_a_score_that_is_no_number_is_a_failed_trial(tiny_text: str, tmp_path: Path) -> None:
    run = quick(tiny_text, tmp_path / "run", evaluate=no_number, trials=1)
    (trial,) = run.trials
    assert trial.state == "failed"
    assert "mqar: evaluation-failed: value is nan" in str(trial.reason)


@pytest.mark.usefixtures("workers")
def test_a_training_that_hangs_is_ended_and_then_a_failed_trial(tiny_text: str, tmp_path: Path) -> None:
    text = tiny_text.replace("confirm_seeds: 2", "confirm_seeds: 2\n  timeout: 1")
    run = quick(text, tmp_path / "run", evaluate=hang_at_text, trials=1)
    (trial,) = run.trials
    assert trial.state == "failed"
    assert str(trial.reason) == "text: timed-out: it took more than 1 s"
    (said,) = (tmp_path / "run" / "logs").glob("0000-text-*.log")
    assert said.read_text().count("in hang_at_text") == RETRIES + 1
    assert trial.attempts == RETRIES + 1
    assert set(trial.scores) == {"mqar"}


@pytest.mark.usefixtures("workers")
def test_more_trials_continue_a_finished_search(tiny_text: str, tmp_path: Path) -> None:
    first = quick(tiny_text, tmp_path / "run", evaluate=scored)
    more = quick(tiny_text, tmp_path / "run", resume=True, trials=4)
    whole = quick(tiny_text, tmp_path / "whole", trials=4)
    assert more.trials[:2] == first.trials
    assert [trial.hash for trial in more.trials] == [trial.hash for trial in whole.trials]


def scored_in_a_second(training: Training, task: Task) -> Evaluation:
    time.sleep(1.0)
    return scored(training, task)


@pytest.mark.usefixtures("workers")
def test_no_round_is_begun_after_the_time(tiny_text: str, tmp_path: Path) -> None:
    run = quick(tiny_text, tmp_path / "run", trials=6, time="1s", evaluate=scored_in_a_second)
    assert 2 <= len(run.trials) < 6
    assert run.status == "finished"
    told = [event["text"] for event in run.events if event["event"] == "message"]
    up = f"the time (1 s) was up after {len(run.trials)} of 6 trials"
    assert f"{up}; --resume with a longer --time goes on" in told


class InterruptedAtTrial(Silent):
    """Presses Ctrl-C when trial `number` is told, `times` times."""

    def __init__(self, number: int, times: int) -> None:
        self.number, self.times, self.said = number, times, list[str]()

    def trial_finished(self, trial: Trial) -> None:
        for _ in range(self.times * (trial.number == self.number)):
            signal.raise_signal(signal.SIGINT)

    def message(self, text: str, level: str = "info") -> None:
        self.said.append(f"{level}: {text}")


@pytest.mark.usefixtures("workers")
def test_ctrl_c_once_finishes_what_runs_and_tells_how_to_go_on(tiny_text: str, tmp_path: Path) -> None:
    progress = InterruptedAtTrial(2, times=1)
    run = quick(tiny_text, tmp_path / "run", trials=6, progress=progress)
    assert run.status == "stopped"
    assert [trial.state for trial in run.trials] == ["complete"] * 4
    begun, stopping, *_ = progress.said
    assert begun.startswith("info: the defaults of the space fit ")
    assert "remote" in begun
    assert f"heddle search tiny.yaml --out {tmp_path / 'run'} --resume" in stopping
    assert (tmp_path / "run" / "best" / "spec.yaml").exists()
    assert quick(tiny_text, tmp_path / "run", trials=6, resume=True).count("complete") == 6


@pytest.mark.usefixtures("workers")
def test_ctrl_c_twice_stops_at_once_and_loses_nothing_finished(tiny_text: str, tmp_path: Path) -> None:
    with pytest.raises(HeddleError, match="stopped") as caught:
        quick(tiny_text, tmp_path / "run", trials=6, progress=InterruptedAtTrial(2, times=2))
    assert caught.value.code == "interrupted"
    assert "--resume" in str(caught.value.hint)
    assert read_run(tmp_path / "run").count("complete") == 3
    assert quick(tiny_text, tmp_path / "run", trials=6, resume=True).count("complete") == 6


@pytest.mark.usefixtures("workers")
def test_a_second_search_of_one_folder_is_refused(tiny_text: str, tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"), pytest.raises(HeddleError, match=f"pid {os.getpid()}"):
        quick(tiny_text, tmp_path / "run")


def test_a_run_from_before_a_field_was_there_goes_on(tiny_run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(tiny_run.path, folder)
    meta = json.loads((folder / "run.json").read_text())
    # The digest of a language with fewer fields is another; the text of the spec is what it was.
    meta["lock"]["space"] = "0" * 16
    (folder / "run.json").write_text(json.dumps(meta))
    again = search(loads(meta["spec"], file=tiny_run.meta.get("file")), folder, resume=True)
    assert len(again.trials) == len(tiny_run.trials)
