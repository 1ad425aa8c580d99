"""Weights that all models of a space share: whose they are, which path is trained, and what a search makes of them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from heddle.compose.build import build_causal_lm
from heddle.compose.train import Recipe
from heddle.errors import HeddleError
from heddle.search.durable import read_lines
from heddle.search.evaluate import Training, train_and_score
from heddle.search.evaluators import evaluator_of
from heddle.search.evaluators.supernet import Supernet, memory_of
from heddle.search.evaluators.supernet_evaluator import SupernetEvaluator, train_supernet
from heddle.search.evaluators.supernet_paths import paths_of
from heddle.search.run import search
from heddle.search.tasks import Mqar
from heddle.specs import ModelSpec, SpecFile, loads

SPEC = """
version: 1
name: tiny
model:
  vocab_size: 256
  hidden_size: {hidden_size}
  context_length: 64
  blocks:
    near: {{mixer: {{kind: attention, heads: 2, window: {window}}}, channel: {{kind: none}}}}
    full: {{mixer: {{kind: attention, heads: 2}}, channel: {{kind: gelu, ratio: {ratio}}}}}
    state: {{mixer: {{kind: hgrn2, heads: 2}}, channel: {{kind: none}}, shared: {shared}}}
  layers: {{placement: {{length: 3, of: [near, full, state], count: {{full: {full}, state: {state}}}}}}}
train: {{tokens: 1024, batch_tokens: 256, learning_rate: 1.0e-2}}
search:
  tasks: [{{mqar: {{pairs: 2, length: 16}}}}]
  evaluator: supernet
  trials: 4
  round: 2
  confirm_seeds: 0
"""
GIVEN = {"hidden_size": 32, "window": 2, "ratio": 1.0, "shared": "false", "full": "{int: [0, 3]}", "state": 0}
TASK = Mqar(vocab_size=256, pairs=2, length=16)
INPUTS = torch.randint(256, (2, 24), generator=torch.Generator().manual_seed(0))


def file(**fields: object) -> SpecFile:
    return loads(SPEC.format(**{**GIVEN, **fields}), file="a.yaml")


def logits(net: nn.Module) -> Tensor:
    net.eval()
    with torch.no_grad():
        found: Tensor = net(input_ids=INPUTS, use_cache=False).logits
    return found


def training(model: ModelSpec, *, seed: int = 0, tokens: int = 1024) -> Training:
    recipe = Recipe(tokens=tokens, batch_tokens=256, learning_rate=1e-2, seed=seed)
    return Training(model, recipe, "cpu")


@pytest.fixture(scope="module")
def three() -> SpecFile:
    """Three layers of three kinds, whose parameters differ in shape and of which one asks for lower bounds."""
    return file(state="{int: [0, 3]}")


@pytest.fixture(scope="module")
def net(three: SpecFile) -> Supernet:
    return Supernet(paths_of(three).columns, seed=1)


def test_a_path_is_the_model_with_the_copied_weights(three: SpecFile, net: Supernet) -> None:
    for layers in product(("near", "full", "state"), repeat=3):
        model = three.resolve(layers=layers).model
        alone = net.copied(model)
        assert alone.state_dict().keys() == build_causal_lm(model).state_dict().keys()
        assert torch.equal(logits(alone), logits(net.select(net.path_of(model))))


def test_the_first_column_begins_as_the_model_of_its_seed(three: SpecFile, net: Supernet) -> None:
    model = three.resolve(layers=["near"] * 3).model
    assert torch.equal(logits(build_causal_lm(model, seed=1)), logits(net.copied(model)))


def test_memory_is_that_of_all_kinds(three: SpecFile, net: Supernet) -> None:
    models = (three.resolve(layers=[kind] * 3).model for kind in ("near", "full", "state"))
    alone = [sum(one.numel() for one in build_causal_lm(model).parameters()) for model in models]
    told = memory_of(net)
    assert max(alone) <= told["of_one_path"] < told["parameters"] < sum(alone)
    assert told["training_bytes"] == 16 * told["parameters"]


def test_every_model_of_a_space_is_as_likely_as_any_other() -> None:
    paths = paths_of(file(full="{int: [1, 2]}"))
    assert (paths.count, len(paths.columns)) == (6, 2)
    drawn = Counter(paths.draw(seed=5, step=step) for step in range(6000))
    assert len(drawn) == 6
    # Five standard deviations of a binomial count.
    assert max(abs(count - 1000) for count in drawn.values()) < 5 * (6000 * 1 / 6 * 5 / 6) ** 0.5
    assert [paths.draw(seed=5, step=step) for step in range(9)] != [
        paths.draw(seed=6, step=step) for step in range(9)
    ]


def test_what_a_block_leaves_open_makes_kinds_of_its_own() -> None:
    paths = paths_of(file(window="{choice: [2, 4]}"))
    # Two windows; where no layer has one, the two settings are the same model.
    assert paths.count == 2 * 8
    net = Supernet(paths.columns)
    assert [len(net.kinds[layer]) for layer in range(3)] == [3, 3, 3]  # type: ignore[arg-type]
    assert net.most_kinds == 3


def test_a_step_trains_one_path_and_a_seed_decides_all() -> None:
    paths = paths_of(file(full=1))
    asked = training(paths.columns[0], tokens=256)
    first, again = (train_supernet(paths, asked, TASK) for _ in range(2))
    assert first.weights == again.weights
    assert first.result["losses"] == again.result["losses"]
    # Two kinds at a layer: twice the tokens of a training.
    assert (first.result["steps"], first.result["tokens"], first.result["kinds"]) == (2, 512, [2, 2, 2])
    begun, ended = (Supernet(paths.columns) for _ in range(2))
    assert first.weights is not None
    ended.load(first.weights)
    drawn = {
        (layer, column) for step in range(2) for layer, column in enumerate(paths.draw(seed=0, step=step))
    }
    assert 0 < len(drawn) < 6
    for layer, column in product(range(3), range(2)):
        sides = (one.kinds[layer][column].parameters() for one in (begun, ended))  # type: ignore[index]
        same = all(torch.equal(one, other) for one, other in zip(*sides, strict=True))
        assert same == ((layer, column) not in drawn)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"shared": "true", "state": "{int: [0, 3]}"}, "this model has a shared block"),
        ({"hidden_size": "{choice: [32, 64]}"}, "these in hidden_size"),
    ],
)
def test_models_that_cannot_share_weights_are_refused(fields: dict[str, object], told: str) -> None:
    with pytest.raises(HeddleError, match=told) as caught:
        Supernet(paths_of(file(**fields)).columns)
    assert caught.value.code == "bad-argument"


def test_a_space_without_an_end_is_refused_where_the_evaluator_is_named() -> None:
    with pytest.raises(HeddleError, match=r"channel\.ratio has no end of values") as caught:
        evaluator_of(file(ratio="{float: [1.0, 2.0]}"))
    assert caught.value.where is not None
    assert caught.value.where.path == "search.evaluator"


def test_text_may_be_scored_by_shared_weights_and_rungs_may_not() -> None:
    text = SPEC.format(**GIVEN)
    loads(text.replace("tasks: [{mqar: {pairs: 2, length: 16}}]", "tasks: [text]"))
    with pytest.raises(HeddleError, match="evaluator supernet trains no spec alone"):
        loads(text + "  rungs: {before: [{share: 0.1}]}\n")


def test_a_model_and_weights_of_another_space_are_refused(net: Supernet) -> None:
    with pytest.raises(HeddleError, match="none of those of the supernet"):
        net.path_of(file(window=3).spec.model)
    with pytest.raises(HeddleError, match="of another supernet") as caught:
        net.load(Supernet(paths_of(file()).columns).saved())
    assert caught.value.code == "no-weights"


def test_a_spec_is_scored_by_its_path_and_confirmed_by_a_training_of_its_own() -> None:
    spec = file()
    evaluate = evaluator_of(spec)
    assert isinstance(evaluate, SupernetEvaluator)
    model = spec.resolve(layers=["near", "full", "near"]).model
    found = evaluate(training(model), TASK)
    weights = train_supernet(evaluate.paths, training(model), TASK).weights
    assert weights is not None
    net = Supernet(evaluate.paths.columns, seed=7)
    net.load(weights)
    assert found.result["value"] == TASK.evaluate(net.copied(model), device="cpu").value
    assert (found.result["steps"], found.weights) == (0, None)
    other = training(model, seed=1, tokens=256)
    wanted = train_and_score(other, TASK).result
    assert evaluate(other, TASK).result["losses"] == wanted["losses"]


@pytest.mark.usefixtures("workers")
def test_a_search_trains_its_supernet_once_and_keeps_it(tmp_path: Path) -> None:
    run = search(file(), tmp_path / "run", trials=2)
    again = search(file(), tmp_path / "run", trials=3, resume=True)
    assert [trial.state for trial in again.trials] == ["complete"] * 3
    assert again.trials[:2] == run.trials
    shared = list((tmp_path / "run" / "weights").glob("*.safetensors"))
    assert len(shared) == 1
    begun = [
        event
        for event in read_lines(tmp_path / "run" / "events.jsonl")
        if event["event"] == "evaluation_started"
    ]
    assert [event["hash"] for event in begun if event["number"] == -2] == [shared[0].stem]
    net = Supernet(paths_of(file()).columns)
    net.load(shared[0].read_bytes())
    best = again.best_trial
    assert best is not None
    alone = net.copied(file().resolve(best.params, layers=best.layers).model)
    assert TASK.evaluate(alone, device="cpu").value == best.scores["mqar"].value


@pytest.mark.usefixtures("workers")
def test_each_learning_rate_has_shared_weights_and_longer_trainings_share_none(tmp_path: Path) -> None:
    text = SPEC.format(**GIVEN).replace("length: 16}", "length: 16, learning_rates: [1.0e-4, 1.0e-2]}")
    text += "  confirm_longer: {best: 1, times: 2}\n"
    run = search(loads(text, file="a.yaml"), tmp_path / "run", trials=2)
    shared = sorted(path.stem for path in (tmp_path / "run" / "weights").glob("*.safetensors"))
    begun = [event for event in run.events if event["event"] == "evaluation_started"]
    assert sorted(event["hash"] for event in begun if event["number"] == -2) == shared
    assert len(shared) == 2
    for trial in run.trials:
        scores = [one.score for one in trial.rates["mqar"]]
        assert trial.scores["mqar"].value == max(score.value for score in scores if score)
    longer = run.longer
    assert longer is not None
    assert longer.rows[0].number == run.best
    kept = (tmp_path / "run").glob(f"ledger/{longer.rows[0].hash}/longer-mqar/*.json")
    results = [json.loads(path.read_bytes())["result"] for path in kept]
    assert [result["tokens"] >= 2048 and result["steps"] > 0 for result in results] == [True, True]


@pytest.mark.long
def test_a_placement_with_the_mixer_that_recall_needs_scores_higher() -> None:
    spec = file(full="{int: [0, 3]}")
    evaluate = evaluator_of(spec)
    values = {}
    for layers in product(("near", "full"), repeat=3):
        asked = replace(training(spec.resolve(layers=layers).model), recipe=Recipe(500_000, 2048, 1e-2))
        values[layers] = evaluate(asked, TASK).result["value"]
    blind = values.pop(("near",) * 3)
    assert max(values.values()) > 0.9
    assert all(value > blind + 0.05 for value in values.values())
