"""What every task keeps: examples, solver, chance and reach agree, and the held-out set stays unseen."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.train import IGNORE, Recipe
from heddle.errors import HeddleError
from heddle.search.tasks.catalogue import GENERATED, make_task
from heddle.search.tasks.corpus import Corpus
from heddle.search.tasks.masked_bytes import MaskedBytes
from heddle.search.tasks.mqar import Mqar
from heddle.search.tasks.task import Task, batches
from heddle.search.tasks.text import Text
from heddle.search.tasks.tokens import Tokens, tokens_of
from heddle.specs import TASKS as SCHEMAS
from heddle.specs import DataSpec, MaskedBytesTask

VOCAB = 256
CPU = torch.device("cpu")


def noise(size: int, seed: int) -> bytes:
    """Random letters in which every stretch of a window's length is unique, with repeats at short range."""
    generator = torch.Generator().manual_seed(seed)
    return bytes((97 + torch.randint(12, (size,), generator=generator)).tolist())


def text() -> Task:
    return Text(noise_tokens(), sequence_length=32, vocab_size=VOCAB)


def noise_tokens() -> Tokens:
    corpus = Corpus("noise", noise(20_000, 1), noise(5_000, 2), "digest", 1, "block")
    return tokens_of(corpus, "bytes", VOCAB)


def masked(*, of_readout: bool) -> Task:
    spec, tokens = MaskedBytesTask(), noise_tokens()
    return MaskedBytes(spec, tokens, sequence_length=32, vocab_size=VOCAB, of_readout=of_readout)


def drawn(kind: str, **fields: Any) -> Task:
    return make_task(SCHEMAS[kind](**fields), DataSpec(source="none"), vocab_size=VOCAB)


# Small, but large enough that no row is drawn twice.
DRAWN: dict[str, tuple[str, dict[str, Any]]] = {
    "in-context-recall": ("in_context_recall", {"keys": 4, "values": 6, "length": 40}),
    "noisy-recall": ("in_context_recall", {"keys": 3, "values": 3, "length": 48, "noise": 0.4}),
    "fuzzy-recall": ("fuzzy_recall", {"key_symbols": 4, "value_symbols": 5, "pairs": 3, "length": 50}),
    "selective-copying": ("selective_copying", {"symbols": 5, "data_tokens": 8, "length": 40}),
    "memorization": ("memorization", {"keys": 50, "values": 20, "length": 32}),
    "induction-heads": ("induction_heads", {"symbols": 9, "length": 32}),
    "copying": ("copying", {"symbols": 7, "data_tokens": 20}),
    "parity": ("parity", {"length": 40}),
    "word-s3": ("word_problem", {"group": "S3", "length": 32}),
    "word-s5-swaps": ("word_problem", {"group": "S5", "moves": "swaps", "length": 16}),
    "word-a5": ("word_problem", {"group": "A5", "length": 16}),
    "word-z60": ("word_problem", {"group": "Z60", "length": 16}),
    "word-a4xz5": ("word_problem", {"group": "A4xZ5", "length": 16}),
    "modular-arithmetic": ("modular_arithmetic", {"length": 40}),
    "niah": ("niah", {"length": 40}),
    "niah-many": ("niah", {"needles": 5, "width": 2, "keys": 4, "values": 7, "length": 48}),
    "variable-tracking": ("variable_tracking", {"hops": 2, "chains": 3, "names": 12, "length": 40}),
    "multi-hop-recall": (
        "multi_hop_recall",
        {"facts": 9, "hops": 3, "questions": 4, "symbols": 20, "easy_first": 0.2},
    ),
    "common-words": ("common_words", {"symbols": 30, "words": 8, "repeats": 2, "common_repeats": 5}),
    "frequent-words": ("frequent_words", {"symbols": 20, "answers": 2, "length": 66}),
    "in-context-regression": ("in_context_regression", {"examples": 30}),
    "paragraph-topic": ("paragraph_topic", {"paragraphs": 6, "paragraph_length": 7}),
}
TASKS: dict[str, Callable[[], Task]] = {
    "mqar": lambda: Mqar(vocab_size=VOCAB, pairs=4, length=32),
    "mqar-quiet": lambda: Mqar(vocab_size=64, pairs=8, length=47, random_non_queries=False),
    "mqar-even": lambda: Mqar(vocab_size=64, pairs=4, length=40, gap_power=1.0),
    "mqar-tight": lambda: Mqar(vocab_size=VOCAB, pairs=8, length=32),
    "mqar-overwritten": lambda: Mqar(vocab_size=VOCAB, pairs=4, length=40, overwritten=6),
    "mqar-two-token-keys": lambda: Mqar(vocab_size=VOCAB, pairs=7, length=47, key_tokens=2),
    "mqar-both": lambda: Mqar(vocab_size=64, pairs=4, length=34, overwritten=3, key_tokens=2),
    "text": text,
    "masked-bytes": partial(masked, of_readout=False),
    "masked-byte": partial(masked, of_readout=True),
    **{name: partial(drawn, kind, **fields) for name, (kind, fields) in DRAWN.items()},
}
# Scored by the distance to a noisy number, which no solver knows.
NUMERIC = ("in-context-regression",)
EXACT = [name for name in TASKS if name not in NUMERIC]
# Of encoders, whose answers rest on both sides; the last two are of a whole sequence.
BOTH_SIDES = ("masked-bytes", "masked-byte", "paragraph-topic")


made = cache(lambda name: TASKS[name]())


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest) -> Task:
    found: Task = made(request.param)
    return found


@pytest.fixture(params=EXACT)
def exact(request: pytest.FixtureRequest) -> Task:
    """A task whose answers follow from its inputs."""
    found: Task = made(request.param)
    return found


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


class Classifying(Answering):
    """The same with a readout: one answer for a sequence."""

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__(answer)
        self.classifier = nn.Linear(VOCAB, VOCAB, bias=False)

    def classified(self, input_ids: Tensor) -> tuple[Tensor, None]:
        return 60.0 * F.one_hot(self.answer(input_ids)[:, 0], VOCAB).float(), None


def answering(task: Task, answer: Callable[[Tensor], Tensor]) -> Answering:
    _, targets = task.held_out(CPU)
    return Classifying(answer) if targets.shape[1] == 1 else Answering(answer)


def test_examples_have_the_promised_form(task: Task, request: pytest.FixtureRequest) -> None:
    inputs, targets = task.sample(16, seed=0, device=CPU)
    assert inputs.shape == (16, task.sequence_length)
    assert targets.shape == (
        (16, 1) if request.node.callspec.params["task"] in BOTH_SIDES[1:] else inputs.shape
    )
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


def test_the_solver_is_right_at_every_label(exact: Task) -> None:
    for inputs, targets in (exact.sample(64, seed=5, device=CPU), exact.held_out(CPU)):
        asked = targets != IGNORE
        assert torch.equal(exact.oracle(inputs)[asked], targets[asked])


@pytest.mark.parametrize("name", [name for name in EXACT if name not in ("text", *BOTH_SIDES)])
def test_answers_do_not_rest_on_what_stands_behind_the_question(name: str) -> None:
    exact = made(name)
    inputs, targets = exact.sample(16, seed=5, device=CPU)
    other, _ = exact.sample(16, seed=6, device=CPU)
    first = int((targets != IGNORE).any(dim=0).nonzero()[0])
    mixed = torch.cat([inputs[:, : first + 1], other[:, first + 1 :]], dim=1)
    asked = targets[:, first] != IGNORE
    assert torch.equal(exact.oracle(mixed)[asked, first], targets[asked, first])


def test_a_model_that_answers_as_the_solver_does_scores_best(exact: Task) -> None:
    score = exact.evaluate(answering(exact, exact.oracle), device=CPU)
    assert score.value == pytest.approx(exact.best, abs=1e-6)
    assert exact.normalised(score) == pytest.approx(1.0, abs=1e-6)
    assert score.se == pytest.approx(0.0, abs=1e-6)
    assert score.n == len(exact.held_out(CPU)[0])


def test_a_model_that_is_wrong_everywhere_scores_no_better_than_chance(exact: Task) -> None:
    score = exact.evaluate(answering(exact, lambda inputs: (exact.oracle(inputs) + 1) % VOCAB), device=CPU)
    assert exact.normalised(score) < 0


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
        assert len(inputs) == len(targets)
        assert 128 < inputs.numel() <= 256
    assert torch.equal(one(3)[0], batches(task, recipe, CPU)(3)[0])
    assert not torch.equal(one(0)[0], one(1)[0])
    assert not torch.equal(one(0)[0], two(0)[0])


def test_reach_stays_inside_the_sequence_and_the_past(task: Task, request: pytest.FixtureRequest) -> None:
    inputs, targets = task.sample(16, seed=0, device=CPU)
    reach = task.reach(inputs)
    assert reach.shape == targets.shape
    assert reach.dtype == torch.int64
    assert bool((reach >= 0).all())
    if request.node.callspec.params["task"] in BOTH_SIDES:
        assert int(reach.max()) < task.sequence_length
    else:
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
    model = answering(task, task.oracle)
    for training in (True, False):
        model.train(training)
        task.evaluate(model, device=CPU)
        assert model.training is training


@pytest.mark.parametrize("name", [name for name in DRAWN if name not in NUMERIC])
def test_one_who_guesses_scores_chance(name: str) -> None:
    task = made(name)
    generator = torch.Generator().manual_seed(0)
    score = task.evaluate(answering(task, lambda inputs: task.guess(inputs, generator)), device=CPU)
    assert score.value == pytest.approx(task.chance, abs=4 * score.se)
    assert 0 < task.chance < 0.6


@pytest.mark.parametrize("name", [name for name in DRAWN if name not in BOTH_SIDES])
def test_answers_rest_no_further_back_than_the_schema_says(name: str) -> None:
    kind, fields = DRAWN[name]
    task = made(name)
    inputs, targets = task.sample(400, seed=0, device=CPU)
    lags = task.reach(inputs)[targets != IGNORE]
    back = SCHEMAS[kind](**fields).back
    assert 0 < int(lags.min()) <= int(lags.max()) <= back
    # And no nearer: some row asks for nearly as much.
    assert int(lags.max()) >= 0.8 * back


@pytest.mark.parametrize("name", DRAWN)
def test_all_symbols_and_no_others_are_drawn(name: str) -> None:
    kind, fields = DRAWN[name]
    inputs, targets = made(name).sample(400, seed=0, device=CPU)
    seen = torch.cat([inputs.flatten(), targets[targets != IGNORE]])
    ids = SCHEMAS[kind](**fields).ids
    assert int(seen.max()) < ids
    if kind not in ("word_problem", "memorization", "in_context_regression"):
        assert len(seen.unique()) == ids


# Fields by which the answers are those of the task of that length, whatever the length.
LONGER: dict[str, tuple[str, dict[str, Any], list[int]]] = {
    "selective-copying": ("selective_copying", {"symbols": 5, "data_tokens": 8, "length": 40}, [20, 80]),
    "induction-heads": ("induction_heads", {"symbols": 9, "length": 32}, [64]),
    "copying": ("copying", {"symbols": 7, "data_tokens": 20}, [40]),
    "parity": ("parity", {"length": 40}, [80]),
    "word-s5-swaps": ("word_problem", {"group": "S5", "moves": "swaps", "length": 16}, [32]),
    "modular-arithmetic": ("modular_arithmetic", {"length": 20}, [40]),
    "niah": ("niah", {"needles": 3, "length": 40}, [80, 160]),
    "variable-tracking": ("variable_tracking", {"hops": 2, "chains": 3, "names": 12, "length": 40}, [80]),
    "frequent-words": ("frequent_words", {"symbols": 20, "answers": 2, "length": 66}, [132]),
}


@pytest.mark.parametrize("name", LONGER)
def test_scores_at_other_lengths_are_told_and_change_no_other(name: str) -> None:
    kind, fields, lengths = LONGER[name]
    plain, task = drawn(kind, **fields), drawn(kind, **fields, test_lengths=lengths)
    same = {length: drawn(kind, **{**fields, SCHEMAS[kind].length_field: length}) for length in lengths}
    by_tokens = {one.sequence_length: one for one in (plain, *same.values())}
    generator = torch.Generator()

    def solved(inputs: Tensor) -> Tensor:
        return by_tokens[inputs.shape[1]].oracle(inputs)

    def guessed(inputs: Tensor) -> Tensor:
        return by_tokens[inputs.shape[1]].guess(inputs, generator.manual_seed(0))

    for answer in (solved, guessed):
        found, alone = (one.evaluate(answering(one, answer), device=CPU) for one in (task, plain))
        assert (found.value, found.se, found.n) == (alone.value, alone.se, alone.n)
        told = {}
        for length, one in same.items():
            told[f"accuracy_at_{length}"] = one.evaluate(answering(one, answer), device=CPU).value
            told[f"chance_at_{length}"] = one.chance
        assert found.extras == {**alone.extras, **told}
        for length, one in same.items():
            expected, error = (1.0, 1e-6) if answer is solved else (one.chance, 0.08)
            assert found.extras[f"accuracy_at_{length}"] == pytest.approx(expected, abs=error)
    assert torch.equal(
        task.training_batch(500, seed=3, device=CPU)[0], plain.training_batch(500, seed=3, device=CPU)[0]
    )
    assert task.digest != plain.digest


def test_all_tasks_with_other_lengths_are_held_to_it() -> None:
    asked = {kind for kind, schema in SCHEMAS.items() if "test_lengths" in schema.model_fields}
    assert asked == {kind for kind, _, _ in LONGER.values()}


def test_every_task_of_the_schema_is_held_to_these_contracts() -> None:
    assert {kind for kind, _ in DRAWN.values()} | {"mqar", "text", "masked_bytes"} == set(SCHEMAS)
    assert {kind for kind, _ in DRAWN.values()} == set(GENERATED)


@pytest.mark.parametrize("kind", GENERATED)
def test_a_task_fits_together_as_it_is_by_default(kind: str) -> None:
    schema = SCHEMAS[kind]()
    assert not list(schema.misfits())
    assert schema.ids <= VOCAB
    task = make_task(schema, DataSpec(source="none"), vocab_size=schema.ids)
    inputs, _ = task.sample(4, seed=0, device=CPU)
    assert int(inputs.max()) < schema.ids
    with pytest.raises(HeddleError, match=r"hint: model\.vocab_size") as caught:
        make_task(schema, DataSpec(source="none"), vocab_size=schema.ids - 1)
    assert caught.value.code == "out-of-range"
