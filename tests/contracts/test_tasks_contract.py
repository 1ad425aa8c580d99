"""What every task keeps: examples, solver, chance and reach agree, and the held-out set stays unseen."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.train import IGNORE, Recipe
from heddle.search.tasks.corpus import Corpus
from heddle.search.tasks.mqar import Mqar
from heddle.search.tasks.task import Task, batches
from heddle.search.tasks.text import Text
from heddle.search.tasks.tokens import tokens_of

VOCAB = 256
CPU = torch.device("cpu")


def noise(size: int, seed: int) -> bytes:
    """Random letters in which every stretch of a window's length is unique, with repeats at short range."""
    generator = torch.Generator().manual_seed(seed)
    return bytes((97 + torch.randint(12, (size,), generator=generator)).tolist())


def text() -> Task:
    corpus = Corpus("noise", noise(20_000, 1), noise(5_000, 2), "digest", 1, "block")
    return Text(tokens_of(corpus, "bytes", VOCAB), sequence_length=32, vocab_size=VOCAB)


TASKS: dict[str, Callable[[], Task]] = {
    "mqar": lambda: Mqar(vocab_size=VOCAB, pairs=4, length=32),
    "mqar-quiet": lambda: Mqar(vocab_size=64, pairs=8, length=47, random_non_queries=False),
    "mqar-tight": lambda: Mqar(vocab_size=VOCAB, pairs=8, length=32),
    "text": text,
}


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> Task:
    return TASKS[request.param]()


class Answering(nn.Module):
    """A model that says what `answer` gives for its inputs."""

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.answer = answer
        self.lm_head = nn.Linear(VOCAB, VOCAB, bias=False)
        nn.init.eye_(self.lm_head.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.lm_head(hidden)
        return found

    def model(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        answers = self.answer(input_ids).clamp(min=0)
        return SimpleNamespace(last_hidden_state=60.0 * F.one_hot(answers, VOCAB).float())


def test_examples_have_the_promised_form(task: Task) -> None:
    inputs, targets = task.sample(16, seed=0, device=CPU)
    assert inputs.shape == targets.shape == (16, task.sequence_length)
    assert inputs.dtype == targets.dtype == torch.int64
    assert int(inputs.min()) >= 0
    assert int(inputs.max()) < VOCAB
    labels = targets[targets != IGNORE]
    assert labels.numel() > 0
    assert int(labels.min()) >= 0
    assert int(labels.max()) < VOCAB


def test_every_row_has_as_many_labels_as_every_other(task: Task) -> None:
    # A CUDA graph of the training step rests on it.
    counts = torch.cat([(task.sample(8, seed=seed, device=CPU)[1] != IGNORE).sum(1) for seed in range(4)])
    assert len(counts.unique()) == 1


def test_the_solver_is_right_at_every_label(task: Task) -> None:
    for inputs, targets in (task.sample(64, seed=5, device=CPU), task.held_out(CPU)):
        asked = targets != IGNORE
        assert torch.equal(task.oracle(inputs)[asked], targets[asked])


def test_a_model_that_answers_as_the_solver_does_scores_best(task: Task) -> None:
    score = task.evaluate(Answering(task.oracle), device=CPU)
    assert score.value == pytest.approx(task.best, abs=1e-6)
    assert task.normalised(score) == pytest.approx(1.0, abs=1e-6)
    assert score.se == pytest.approx(0.0, abs=1e-6)
    assert score.n == len(task.held_out(CPU)[0])


def test_a_model_that_is_wrong_everywhere_scores_no_better_than_chance(task: Task) -> None:
    score = task.evaluate(Answering(lambda inputs: (task.oracle(inputs) + 1) % VOCAB), device=CPU)
    assert task.normalised(score) < 0


def test_equal_seeds_give_equal_examples_and_others_do_not(task: Task) -> None:
    one, two, other = (task.sample(8, seed=seed, device=CPU) for seed in (7, 7, 8))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], other[0])


def test_the_held_out_examples_are_always_the_same(task: Task) -> None:
    first, second = task.held_out(CPU), task.held_out(CPU)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_no_held_out_row_is_ever_sampled(task: Task) -> None:
    held_out = {tuple(row) for row in task.held_out(CPU)[0].tolist()}
    for seed in range(50):
        inputs, _ = task.sample(64, seed=seed, device=CPU)
        assert held_out.isdisjoint(map(tuple, inputs.tolist()))


def test_batches_differ_by_step_and_by_seed(task: Task) -> None:
    recipe = Recipe(tokens=1, batch_tokens=256, seed=0)
    other = Recipe(tokens=1, batch_tokens=256, seed=1)
    one, two = batches(task, recipe, CPU), batches(task, other, CPU)
    for step in range(8):
        inputs, targets = one(step)
        assert inputs.shape == targets.shape
        assert 128 < inputs.numel() <= 256
    assert torch.equal(one(3)[0], batches(task, recipe, CPU)(3)[0])
    assert not torch.equal(one(0)[0], one(1)[0])
    assert not torch.equal(one(0)[0], two(0)[0])


def test_reach_stays_inside_the_sequence_and_the_past(task: Task) -> None:
    inputs, _ = task.sample(16, seed=0, device=CPU)
    reach = task.reach(inputs)
    assert reach.shape == inputs.shape
    assert bool((reach >= 0).all())
    assert bool((reach <= torch.arange(task.sequence_length)).all())


def test_a_task_travels_by_pickle_and_keeps_its_examples(task: Task) -> None:
    before = task.sample(4, seed=1, device=CPU)
    copy = pickle.loads(pickle.dumps(task))
    assert copy.digest == task.digest
    assert torch.equal(copy.sample(4, seed=1, device=CPU)[0], before[0])


def test_the_digest_is_stable_and_names_the_task(task: Task, request: pytest.FixtureRequest) -> None:
    again = TASKS[request.node.callspec.params["task"]]()
    assert again.digest == task.digest
    assert sum(make().digest == task.digest for make in TASKS.values()) == 1


def test_evaluation_leaves_the_mode_of_the_model_alone(task: Task) -> None:
    model = Answering(task.oracle)
    for training in (True, False):
        model.train(training)
        task.evaluate(model, device=CPU)
        assert model.training is training
