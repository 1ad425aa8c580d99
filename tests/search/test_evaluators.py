"""How candidates are judged: rung 0, which trains nothing, and functions of the user's."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import cloudpickle

from heddle.compose.train import Recipe
from heddle.errors import HeddleError
from heddle.search.evaluate import Training, train_and_score
from heddle.search.evaluators import evaluator_of, random_feature_score, reach_score
from heddle.search.evaluators import random_features as probe
from heddle.search.record import score_from
from heddle.search.tasks import Mqar, make_task
from heddle.search.tasks.task import Task
from heddle.specs import TASKS, DataSpec, ModelSpec, SearchSpec, SpecFile, loads

SEARCH = "search: {{tasks: [{task}], evaluator: {evaluator}, trials: 1}}\n"
SPEC = """
version: 1
name: tiny
model:
  vocab_size: 256
  hidden_size: 32
  context_length: 64
  blocks: {{one: {{mixer: {mixer}, channel: {{kind: gelu, ratio: 1.0}}}}}}
  layers: [{layers}]
"""


def model(mixer: str, layers: int = 1) -> ModelSpec:
    return loads(SPEC.format(mixer=mixer, layers=", ".join(["one"] * layers))).spec.model


def window(size: int) -> str:
    return f"{{kind: attention, heads: 2, window: {size}}}"


def drawn(kind: str, **fields: object) -> Task:
    return make_task(TASKS[kind](**fields), DataSpec(source="none"), vocab_size=256)  # type: ignore[arg-type]


@pytest.mark.parametrize(("pairs", "share"), [(4, 0.53), (8, 0.29), (16, 0.02)])
def test_windows_hear_the_share_of_queries_that_trained_ones_answer(pairs: int, share: float) -> None:
    # Two trained layers of window 8 scored .51, .29 and .04 here; the shares of lags up to 14 are these.
    task = Mqar(vocab_size=256, pairs=pairs, length=64)
    score = reach_score(model(window(8), layers=2), task)
    assert score.extras == {"tokens_back": 14.0}
    assert task.normalised(score) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("mixer", ["{kind: attention, heads: 2}", "{kind: gated_deltanet, heads: 2}"])
def test_what_sees_all_may_answer_all(mixer: str) -> None:
    task = drawn("niah", length=64)
    score = reach_score(model(mixer), task)
    assert (score.value, score.se) == (1.0, 0.0)


def test_what_sees_one_token_is_left_to_chance() -> None:
    task = drawn("copying", data_tokens=16)
    assert reach_score(model(window(1), layers=3), task).value == pytest.approx(task.chance)


def test_a_window_scores_best_from_the_size_that_its_task_needs() -> None:
    task = drawn("copying", data_tokens=16)
    assert reach_score(model(window(16)), task).value == pytest.approx(task.chance)
    assert reach_score(model(window(17)), task).value == 1.0


@pytest.mark.parametrize(("first", "share"), [(1, 1 / 16), (8, 0.5), (16, 1.0)])
def test_first_tokens_that_stay_in_sight_are_heard(first: int, share: float) -> None:
    task = drawn("copying", data_tokens=16)
    beside = f"{{kind: attention, heads: 2, window: 1, sink_tokens: {first}}}"
    assert task.normalised(reach_score(model(beside), task)) == pytest.approx(share)


@pytest.mark.parametrize("score", [reach_score, random_feature_score])
def test_rung_zero_asks_for_a_task_of_accuracy(score: object) -> None:
    task = drawn("in_context_regression", examples=8)
    with pytest.raises(HeddleError, match="scored by mean_squared_error") as caught:
        score(model(window(4)), task)  # type: ignore[operator]
    assert caught.value.code == "bad-argument"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "LABELS", 512)


@pytest.mark.usefixtures("short")
def test_random_features_tell_a_window_that_sees_the_answer_from_one_that_does_not() -> None:
    task = drawn("copying", data_tokens=6, symbols=4)
    blind = random_feature_score(model(window(4)), task)
    seeing = random_feature_score(model(window(8)), task)
    assert blind.value == pytest.approx(task.chance, abs=5 * blind.se + 0.02)
    assert task.normalised(seeing) > 0.05 > task.normalised(blind)
    # Two heads of size 16 and the hidden state of size 32.
    assert seeing.extras == {"features": 64.0}


@pytest.mark.usefixtures("short")
def test_random_features_count_words_without_training_and_the_same_each_time() -> None:
    task = drawn("common_words", symbols=8, words=4, repeats=1, common_repeats=8)
    first, second = (random_feature_score(model("{kind: attention, heads: 2}"), task) for _ in range(2))
    assert first == second
    assert task.normalised(first) > 0.9


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("call", [0, 1, 2])
def test_features_that_are_no_numbers_have_no_score(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """In what is fitted, in what the penalty is chosen on, and in what is judged."""
    calls: list[int] = []
    features = probe._features

    def broken(*given: Any) -> torch.Tensor:
        found = features(*given)
        if len(calls) == call:
            found[-1, -1] = torch.nan
        calls.append(len(found))
        return found

    monkeypatch.setattr(probe, "_features", broken)
    task = drawn("common_words", symbols=8, words=4, repeats=1, common_repeats=8)
    with pytest.raises(
        HeddleError, match="features that the random-feature probe reads are not finite"
    ) as told:
        random_feature_score(model("{kind: attention, heads: 2}"), task)
    assert told.value.code == "loss-not-finite"


def test_the_readout_is_the_ridge_regression_of_the_answers() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    answers = torch.arange(40) % 3
    rows = probe._Rows(features, answers, torch.zeros(40, dtype=torch.int64))
    weights = probe._best_readout(rows, rows, 3)
    wanted = torch.nn.functional.one_hot(answers, 3).double()
    scale = features.square().sum(0).mean()
    # Ridge regression is least squares with √λ·I below the features.
    fits = [
        torch.linalg.lstsq(
            torch.cat([features, (penalty * scale) ** 0.5 * torch.eye(5, dtype=torch.float64)]),
            torch.cat([wanted, torch.zeros(5, 3, dtype=torch.float64)]),
        ).solution
        for penalty in probe.PENALTIES
    ]
    assert min(float((weights - one).abs().max()) for one in fits) < 1e-9


def test_many_features_are_mixed_down_alike_each_time() -> None:
    features = torch.ones(3, probe.FEATURES + 1, dtype=torch.float64)
    mixed = probe._Mixing(0)(features)
    assert mixed.shape == (3, probe.FEATURES)
    assert torch.equal(mixed, probe._Mixing(0)(features))


OWN = """
from heddle.search.tasks import Score

def parameters(model, task, *, seed, device):
    return Score(1.0 / model.hidden_size, 0.0, 1, {"seed": float(seed)})

def wrong(model, task, *, seed, device):
    return 1.0

number = 3
"""


def search_file(evaluator: str, task: str = "parity") -> SpecFile:
    text = SPEC.format(mixer=window(4), layers="one") + SEARCH.format(task=task, evaluator=evaluator)
    return loads(text, file="a.yaml")


def training() -> Training:
    return Training(model(window(4)), Recipe(tokens=1, seed=5), "cpu")


def test_a_search_trains_unless_it_is_told_otherwise() -> None:
    assert evaluator_of(search_file("train")) is train_and_score
    assert SearchSpec(tasks=[TASKS["parity"]()]).evaluator == "train"  # type: ignore[list-item]


def test_what_is_not_trained_is_recorded_as_a_training_of_no_steps() -> None:
    task = drawn("parity", length=16)
    found = evaluator_of(search_file("reach"))(training(), task)
    assert found.weights is None
    score = score_from(found.result)
    assert (score.steps, score.losses, score.seed) == (0, (), 5)
    assert score.value == reach_score(model(window(4)), task).value


def test_a_function_of_the_users_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_judge.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    evaluate = evaluator_of(search_file("own_judge:parameters"))
    task = drawn("parity", length=16)
    assert evaluate(training(), task).result["value"] == 1 / 32
    # A process that does not have the module gets its code with the function.
    sent = cloudpickle.dumps(evaluate)
    with monkeypatch.context() as elsewhere:
        elsewhere.delitem(sys.modules, "own_judge")
        elsewhere.setattr(sys, "path", [one for one in sys.path if one != str(tmp_path)])
        got = pickle.loads(sent)
        assert got(training(), task).result["extras"] == {"seed": 5.0}
    with pytest.raises(HeddleError, match="own_judge:wrong gave float, not a heddle"):
        evaluator_of(search_file("own_judge:wrong"))(training(), task)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no_such_module:score", "cannot import no_such_module: ModuleNotFoundError"),
        ("math:no_such", "math has no function 'no_such'"),
        ("math:pi", "math:pi is no function"),
    ],
)
def test_a_function_that_cannot_be_had_is_told_where_it_is_named(name: str, told: str) -> None:
    with pytest.raises(HeddleError) as caught:
        evaluator_of(search_file(name))
    assert caught.value.code == "bad-argument"
    assert caught.value.what.startswith(told)
    assert caught.value.where is not None
    assert (caught.value.where.file, caught.value.where.path) == ("a.yaml", "search.evaluator")
    assert caught.value.where.line == 10


@pytest.mark.parametrize(
    ("evaluator", "task", "told"),
    [
        ("reech", "parity", "there is no evaluator 'reech'"),
        ("reach", "text", "reach scores right and wrong answers, and text has none"),
    ],
)
def test_an_evaluator_that_does_not_fit_is_found_in_the_spec(evaluator: str, task: str, told: str) -> None:
    with pytest.raises(HeddleError, match=told) as caught:
        search_file(evaluator, task)
    assert "a.yaml:10:" in str(caught.value)
