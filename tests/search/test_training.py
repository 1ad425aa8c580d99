"""`heddle train`: a spec becomes a run folder that can be read back, and a failure leaves nothing half done."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import ray.cloudpickle
import torch

from heddle.errors import HeddleError
from heddle.search.evaluate import Evaluation, Training, train_and_score
from heddle.search.record import trial_file
from heddle.search.run import search
from heddle.search.tasks import Task, make_task, recipe_for
from heddle.search.training import TrainRun, is_train_run, load_run, train
from heddle.specs import MqarTask, SpecFile, TextTask, load, loads, spec_hash

# The workers cannot import this file.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

SPEC = """
version: 1
name: small
model:
  vocab_size: 256
  hidden_size: 16
  blocks:
    full: {{mixer: {{kind: attention, heads: 2}}, channel: {{kind: gelu, ratio: 1.0}}}}
    near: {{mixer: {{kind: attention, heads: 2, window: 8}}, channel: {{kind: none}}}}
  layers: [near, full]
data: {{source: {corpus}, sequence_length: 32}}
train: {{tokens: 16384, batch_tokens: 256, learning_rate: 1.0e-2}}
"""


@pytest.fixture(scope="module")
def spec_file(tmp_path_factory: pytest.TempPathFactory) -> SpecFile:
    corpus = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    corpus.write_text("".join(f"line {number} of {number * 7919 % 1000}\n" for number in range(3000)))
    return loads(SPEC.format(corpus=corpus))


@pytest.fixture(scope="module")
def run(spec_file: SpecFile, tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    return train(spec_file, tmp_path_factory.mktemp("runs") / "run", device="cpu")


def test_a_training_is_kept_as_three_files(run: TrainRun) -> None:
    assert sorted(path.name for path in run.path.iterdir()) == [
        "model.safetensors",
        "spec.yaml",
        "train.json",
    ]
    assert is_train_run(run.path)
    assert load_run(run.path) == run


def test_the_record_says_what_was_trained_and_how_well(run: TrainRun, spec_file: SpecFile) -> None:
    assert run.hash == spec_hash(spec_file.spec.model) == spec_hash(run.spec_file().spec.model)
    assert run.record["steps"] == len(run.losses) == 64
    assert run.losses[-1] < 0.7 * run.losses[0]
    assert run.score.value < 4.5 < run.record["task"]["chance"]
    assert 0 < run.record["normalised"] < 1
    assert run.record["recipe"]["learning_rate"] == 1e-2
    assert run.record["environment"]["device"] == "cpu"


def test_the_model_read_back_scores_what_the_record_says(run: TrainRun) -> None:
    spec = run.spec_file().spec
    task = make_task(TextTask(), spec.data, vocab_size=spec.model.vocab_size)
    assert task.digest == run.record["task"]["digest"]
    assert task.evaluate(run.model(), device="cpu").value == pytest.approx(run.score.value, abs=1e-6)
    assert not run.model().training


def test_the_same_seed_gives_the_same_model_and_another_does_not(
    run: TrainRun, spec_file: SpecFile, tmp_path: Path
) -> None:
    again = train(spec_file, tmp_path / "again", device="cpu")
    other = train(spec_file, tmp_path / "other", device="cpu", seed=7)
    assert again.losses == run.losses
    assert (again.path / "model.safetensors").read_bytes() == (run.path / "model.safetensors").read_bytes()
    assert other.record["recipe"]["seed"] == 7
    assert other.losses != run.losses


def test_a_stopped_training_is_no_run_and_may_start_anew(spec_file: SpecFile, tmp_path: Path) -> None:
    def stop(step: int, *_: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(spec_file, tmp_path / "run", device="cpu", on_step=stop)
    with pytest.raises(HeddleError) as caught:
        load_run(tmp_path / "run")
    assert caught.value.code == "run-not-found"
    assert is_train_run(train(spec_file, tmp_path / "run", device="cpu").path)


def test_a_finished_run_and_a_strangers_folder_are_not_written_over(
    run: TrainRun, spec_file: SpecFile, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").touch()
    (tmp_path / "file").touch()
    for folder in (run.path, tmp_path, tmp_path / "file"):
        with pytest.raises(HeddleError) as caught:
            train(spec_file, folder, device="cpu")
        assert caught.value.code == "run-exists"


@pytest.mark.parametrize("damage", ["gone", "cut", "other"])
def test_weights_that_cannot_be_loaded_say_how_to_get_them_back(
    run: TrainRun, tmp_path: Path, damage: str
) -> None:
    for name in ("spec.yaml", "train.json", "model.safetensors"):
        (tmp_path / name).write_bytes((run.path / name).read_bytes())
    weights = tmp_path / "model.safetensors"
    if damage == "gone":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        spec = (tmp_path / "spec.yaml").read_text()
        (tmp_path / "spec.yaml").write_text(spec.replace("hidden_size: 16", "hidden_size: 32"))
    with pytest.raises(HeddleError, match="heddle train") as caught:
        load_run(tmp_path).model()
    assert caught.value.code == "no-weights"


def test_a_damaged_record_is_told(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text('{"format": 1, ')
    with pytest.raises(HeddleError, match="damaged") as caught:
        load_run(tmp_path)
    assert caught.value.code == "run-not-found"


def test_the_record_is_plain_json(run: TrainRun) -> None:
    record = json.loads((run.path / "train.json").read_text())
    assert (record["kind"], record["format"], record["name"]) == ("train", 1, "small")


def test_a_task_may_name_its_own_tokens_and_learning_rate(spec_file: SpecFile) -> None:
    own = recipe_for(MqarTask(tokens=5000, learning_rate=0.5), spec_file.spec.train, seed=3)
    assert (own.tokens, own.learning_rate, own.seed) == (5000, 0.5, 3)
    shared = recipe_for(MqarTask(), spec_file.spec.train)
    assert (shared.tokens, shared.learning_rate, shared.seed) == (16_384, 1e-2, 0)
    assert shared.batch_tokens == 256


def test_a_spec_names_the_tasks(spec_file: SpecFile) -> None:
    data = spec_file.spec.data
    mqar = make_task(MqarTask(pairs=4, length=32), data, vocab_size=256)
    text = make_task(TextTask(), data, vocab_size=256)
    assert (mqar.name, mqar.sequence_length, mqar.metric) == ("mqar", 32, "accuracy")
    assert (text.name, text.sequence_length, text.metric) == ("text", 32, "bits_per_byte")
    inputs, _ = text.sample(2, seed=0, device=torch.device("cpu"))
    assert inputs.shape == (2, 32)


def without_weights(training: Training, task: Task) -> Evaluation:
    """Trained for real; nothing to export."""
    return train_and_score(replace(training, keep_weights=False), task)


@pytest.mark.slow
@pytest.mark.usefixtures("workers")
def test_the_file_of_a_trial_trains_as_the_trial_did(tiny_text: str, tmp_path: Path) -> None:
    own = tiny_text.replace(
        "length: 16}}, text]", "length: 16}}, {text: {tokens: 4k, learning_rate: 1.0e-3}}]"
    )
    assert own != tiny_text
    own = own.replace("confirm_seeds: 2", "confirm_seeds: 0")
    text = "".join(line for line in own.splitlines(keepends=True) if "budgets" not in line)
    found = search(loads(text), tmp_path / "run", trials=1, evaluate=without_weights)
    (trial,) = found.trials
    threads = torch.get_num_threads()
    # As in a worker: the number of threads decides the last bits.
    torch.set_num_threads(1)
    try:
        again = train(load(trial_file(found.path, 0)), tmp_path / "again", device="cpu")
    finally:
        torch.set_num_threads(threads)
    recipe = again.record["recipe"]
    assert (recipe["tokens"], recipe["learning_rate"]) == (4_000, 1e-3)
    (path,) = found.path.glob(f"ledger/{trial.hash}/text/*.json")
    assert json.loads(path.read_bytes())["inputs"]["recipe"] == recipe
    assert again.score.value == trial.scores["text"].value
