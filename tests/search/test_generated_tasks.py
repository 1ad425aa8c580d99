"""What is peculiar to the drawn tasks: layouts, groups, arithmetic, and the lines of regression in closed form."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from heddle.compose.train import IGNORE, Recipe
from heddle.errors import HeddleError
from heddle.search.evaluate import Training, train_and_score
from heddle.search.tasks import GENERATED, batches, make_task, recipe_for
from heddle.search.tasks import regression_lines as lines
from heddle.search.tasks.drawing import distinct, generator_for, picked, places
from heddle.search.tasks.frequent_words import FrequentWords
from heddle.search.tasks.fuzzy_recall import FuzzyRecall
from heddle.search.tasks.in_context_recall import InContextRecall
from heddle.search.tasks.in_context_regression import InContextRegression
from heddle.search.tasks.modular_arithmetic import ModularArithmetic, likely_values
from heddle.search.tasks.multi_hop_recall import MultiHopRecall
from heddle.search.tasks.niah import Niah
from heddle.search.tasks.parity import Parity
from heddle.search.tasks.task import Score
from heddle.search.tasks.word_problem import WordProblem, group_of
from heddle.specs import loads
from heddle.specs.tasks import (
    CopyingTask,
    FrequentWordsTask,
    FuzzyRecallTask,
    InContextRecallTask,
    InContextRegressionTask,
    ModularArithmeticTask,
    MultiHopRecallTask,
    NiahTask,
    ParityTask,
    TaskSchema,
    WordProblemTask,
)
from heddle.specs.tasks.statistics import zeta

CPU = torch.device("cpu")
SPEC = """
version: 1
name: tiny
model:
  vocab_size: 256
  hidden_size: 16
  context_length: 64
  blocks: {{full: {{mixer: {{kind: attention, heads: 2}}, channel: {{kind: gelu, ratio: 1.0}}}}}}
  layers: [full]
data: {{source: none, sequence_length: 16}}
train: {{tokens: 5k, batch_tokens: 256, learning_rate: 1.0e-3}}
search: {{tasks: [{task}], trials: 1}}
"""


@pytest.mark.parametrize("below", [9, 1 << 19])
def test_distinct_numbers_are_distinct_and_in_no_order(below: int) -> None:
    drawn = distinct(200, below, 6, generator_for("test", "distinct", 0, CPU))
    assert int(drawn.min()) >= 0
    assert int(drawn.max()) < below
    assert all(len(set(row)) == 6 for row in drawn.tolist())
    assert 0.3 < float((drawn[:, 0] < drawn[:, 1]).float().mean()) < 0.7


def test_places_are_distinct_in_order_and_reach_both_ends() -> None:
    drawn = places(300, 10, 4, generator_for("test", "places", 0, CPU))
    assert bool((drawn[:, 1:] > drawn[:, :-1]).all())
    assert torch.bincount(drawn.flatten(), minlength=10).min() > 80


def test_noisy_recall_has_as_much_noise_as_it_says_and_shows_each_key_before_it_asks() -> None:
    task = InContextRecall(InContextRecallTask(keys=4, values=4, length=64, noise=0.25), vocab_size=64)
    inputs, targets = task.sample(100, seed=0, device=CPU)
    assert torch.equal((inputs[:, ::2] >= 8).sum(dim=1), torch.full((100,), 8))
    assert torch.equal((targets != IGNORE).sum(dim=1), torch.full((100,), 12))
    for row, asked in zip(inputs.tolist(), (targets != IGNORE).tolist(), strict=True):
        first = asked.index(True)
        assert {0, 1, 2, 3} <= set(row[:first:2])


def test_fuzzy_recall_has_words_of_all_widths() -> None:
    task = FuzzyRecall(FuzzyRecallTask(pairs=4, length=53), vocab_size=64)
    inputs, _ = task.sample(200, seed=0, device=CPU)
    widths = Counter[tuple[int, int]]()
    for row in inputs.tolist():
        widths.update((len(key), len(value)) for _, key, value in task._pairs(row)[:-1])
    assert set(widths) == set(product((1, 2, 3), repeat=2))


@pytest.mark.parametrize("name", ["S3", "S5", "A5", "Z60", "A4xZ5"])
def test_a_group_is_a_group(name: str) -> None:
    group = group_of(name)
    table = group.table()
    n = len(group.elements)
    numbers = torch.arange(n)
    # The identity is the first, every row and column holds each element once, and products may be grouped at will.
    assert torch.equal(table[0], numbers)
    assert torch.equal(table[:, 0], numbers)
    assert torch.equal(table.sort(dim=0).values, numbers[:, None].expand(-1, n))
    assert torch.equal(table.sort(dim=1).values, numbers.expand(n, -1))
    assert torch.equal(table[table], table[:, table])
    is_abelian = torch.equal(table, table.T)
    assert is_abelian == (name == "Z60")


def test_swaps_move_two_or_none() -> None:
    task = WordProblem(WordProblemTask(group="S5", moves="swaps", length=16), vocab_size=120)
    inputs, _ = task.sample(64, seed=0, device=CPU)
    elements = group_of("S5").elements
    tokens = [elements[index] for index in inputs.unique().tolist()]
    assert len(tokens) == 11
    assert {sum(a != b for a, b in enumerate(one)) for one in tokens} == {0, 2}
    # After eight moves the product is nearly uniform, but not yet.
    assert 1 / 120 < task.chance < 3 / 120


def test_parity_is_taught_at_every_position_and_scored_at_the_later_half() -> None:
    task = Parity(ParityTask(length=32), vocab_size=2)
    inputs, targets = task.training_batch(320, seed=0, device=CPU)
    assert torch.equal(targets, inputs.cumsum(dim=1) % 2)
    _, scored = task.held_out(CPU)
    assert torch.equal((scored != IGNORE).any(dim=0), torch.arange(32) >= 16)


def test_expressions_have_the_value_that_python_gives_them() -> None:
    task = ModularArithmetic(ModularArithmeticTask(length=24), vocab_size=9)
    words = "01234+-*"
    for seed in range(8):
        inputs, targets = task.training_batch(480, seed=seed, device=CPU)
        for row, answer in zip(inputs.tolist(), targets[:, -1].tolist(), strict=True):
            assert answer == eval("".join(words[token] for token in row[:-1])) % 5


def test_training_expressions_have_all_lengths() -> None:
    task = ModularArithmetic(ModularArithmeticTask(length=12), vocab_size=9)
    lengths = {task.training_batch(240, seed=seed, device=CPU)[0].shape[1] for seed in range(60)}
    assert lengths == {4, 6, 8, 10, 12}


def test_the_likely_values_of_short_expressions_are_counted() -> None:
    values = Counter(
        eval(f"{a}{op}{b}{also}{c}") % 5
        for a, b, c in product(range(5), repeat=3)
        for op, also in product("+-*", repeat=2)
    )
    assert likely_values(3) == pytest.approx([values[value] / (9 * 125) for value in range(5)])


def test_facts_are_one_cycle_so_that_no_chain_comes_back() -> None:
    task = MultiHopRecall(MultiHopRecallTask(facts=7, hops=3, questions=3, symbols=9), vocab_size=16)
    inputs, targets = task.sample(64, seed=0, device=CPU)
    assert inputs.shape == (64, 3 * 7 + 3 * 3)
    for row, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
        facts = dict(zip(row[0:21:3], row[1:21:3], strict=True))
        assert set(row[2:21:3]) == {0}
        assert len(facts) == len(set(facts.values())) == 7
        assert len(set(row[21::3])) == 3
        for start in range(21, 30, 3):
            assert row[start + 1 : start + 3] == [1, 2]
            chain = [row[start], *answers[start : start + 3]]
            assert chain[1:] == [facts[symbol] for symbol in chain[:-1]]
            assert len(set(chain)) == 4


def test_a_training_of_several_hops_sees_easier_rows_and_is_scored_on_full_ones_alone() -> None:
    spec = MultiHopRecallTask(facts=16, hops=2, questions=8, easy_first=0.4)
    task = MultiHopRecall(spec, vocab_size=128)
    drawn = [
        batches(task, Recipe(tokens=12_800, batch_tokens=640, seed=3), CPU)(step)[0] for step in range(20)
    ]
    # Three facts are the least of two hops.
    assert {inputs.shape[1] for inputs in drawn[:8]} == {3 * 3 + 2}
    assert {inputs.shape[1] for inputs in drawn[8:]} == {64, 32, 16}
    assert task.held_out(CPU)[0].shape == (512, 64)


def test_marks_of_hops_are_no_symbols_in_easier_rows_either() -> None:
    task = MultiHopRecall(MultiHopRecallTask(facts=16, hops=4, questions=8), vocab_size=128)
    inputs = torch.cat([task.training_batch(640, seed=seed, device=CPU)[0].flatten() for seed in range(20)])
    facts = inputs[inputs >= 4]
    assert set(range(4, 4 + 64)) == set(facts.unique().tolist())
    for seed in range(20):
        rows, targets = task.batch_at(0.0, 640, seed=seed, device=CPU)
        assert int(rows[:, 0].min()) >= 4
        assert int(targets[targets >= 0].min()) >= 4


def test_several_hops_are_scored_each() -> None:
    task = MultiHopRecall(MultiHopRecallTask(facts=5, hops=2, questions=2), vocab_size=128)
    hits = torch.zeros(4, task.sequence_length, dtype=torch.bool)
    hits[:, 15::2] = True
    hits[0, 16] = True
    assert task.parts(hits) == {"hop_1_accuracy": 1.0, "hop_2_accuracy": 0.125}


def test_frequent_words_stand_as_often_as_the_zeta_law_says() -> None:
    task = FrequentWords(FrequentWordsTask(), vocab_size=128)
    inputs, targets = task.sample(20, seed=0, device=CPU)
    expected = [int(253 * 6 / math.pi**2 / rank**2) for rank in range(2, 13)]
    for row, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert row[-3:] == [0, 1, 2]
        (noise, most), *words = Counter(row[:-3]).most_common()
        assert (noise, most) == (3, 253 - sum(expected))
        assert [count for _, count in words] == expected
        assert answers[-3:] == [word for word, _ in words[:3]]
    # Its words stand anywhere.
    assert bool(((inputs[:, :-3] > 3).float().mean(dim=0) > 0).float().mean() > 0.95)


def test_one_who_names_a_drawn_word_scores_what_is_told() -> None:
    task = FrequentWords(FrequentWordsTask(), vocab_size=128)
    inputs, targets = task.held_out(CPU)
    generator = torch.Generator().manual_seed(0)
    drawn = picked([[token for token in row if token > 3] for row in inputs.tolist()], 256, generator)
    right = float((drawn == targets)[:, -3:].double().mean())
    told = task.baselines(inputs, targets)["drawn_token_accuracy"]
    assert right == pytest.approx(told, abs=0.04)
    assert task.chance < told < 0.5


def test_the_zeta_function_is_what_its_sum_comes_to() -> None:
    assert zeta(2.0) == pytest.approx(math.pi**2 / 6, rel=1e-9)
    assert zeta(4.0) == pytest.approx(math.pi**4 / 90, rel=1e-9)
    # Between the sum and the integrals on either side of what is left of it.
    head = sum(n**-1.1 for n in range(1, 10_000))
    assert head + 10_000**-0.1 / 0.1 < zeta(1.1) < head + 9_999**-0.1 / 0.1


@pytest.mark.parametrize(
    ("fields", "field"),
    [({"length": 40}, "length"), ({"symbols": 10}, "symbols"), ({"alpha": 8.0}, "length")],
)
def test_frequent_words_whose_order_or_number_cannot_be_are_refused(
    fields: dict[str, float], field: str
) -> None:
    (misfit,) = FrequentWordsTask.model_validate(fields).misfits()
    assert misfit[0] == field
    with pytest.raises(HeddleError, match="frequent_words: " + field):
        FrequentWords(FrequentWordsTask.model_validate(fields), vocab_size=128)


def test_a_model_that_fails_at_a_length_that_was_not_trained_keeps_its_score() -> None:
    task = Parity(ParityTask(length=8, test_lengths=[4, 16]), vocab_size=4)

    class Short(nn.Module):
        lm_head = nn.Linear(4, 4, bias=False)

        def model(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
            assert not use_cache
            fill = 1.0 if input_ids.shape[1] <= 8 else float("nan")
            return SimpleNamespace(last_hidden_state=torch.full((*input_ids.shape, 4), fill))

        def logits(self, hidden: Tensor) -> Tensor:
            return hidden

    score = task.evaluate(Short(), device=CPU)
    assert 0.4 < score.value < 0.6
    assert {"accuracy_at_4", "chance_at_4"} < set(score.extras)
    assert "accuracy_at_16" not in score.extras


@pytest.mark.parametrize(
    ("spec", "what"),
    [
        (ParityTask(length=8, test_lengths=[32, 16]), "they rise, and none is the length that is trained, 8"),
        (ParityTask(length=8, test_lengths=[8, 16]), "they rise, and none is the length that is trained, 8"),
        (NiahTask(length=64, test_lengths=[4]), "at 4: 1 needles and a question need 7 tokens"),
        (ModularArithmeticTask(length=8, test_lengths=[16, 33]), "at 33: digits, the operators"),
        (CopyingTask(test_lengths=[10**6]), "at 1000000: data_tokens: Input should be less than or equal to"),
    ],
)
def test_lengths_that_a_task_cannot_have_are_refused(spec: TaskSchema, what: str) -> None:
    with pytest.raises(HeddleError, match="test_lengths: " + what) as caught:
        GENERATED[str(spec.plain()["kind"])](spec, vocab_size=256)
    assert caught.value.code == "out-of-range"


def test_needles_fill_the_haystack_where_there_is_no_room_for_noise() -> None:
    spec = NiahTask(needles=4, width=2, keys=3, length=4 * 6 + 5)
    inputs, _ = Niah(spec, vocab_size=64).sample(50, seed=0, device=CPU)
    assert not bool((inputs >= 2 + 3 + 16).any())


def gaussian_examples(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The data of arXiv 2503.12734: d = 5, 40 examples, noise of variance 0.1."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    x, beta = draw(rows, 41, 5), draw(rows, 5, 1) / 5**0.5
    y = (x @ beta).squeeze(2) + 0.1**0.5 * draw(rows, 41)
    return x[:, :-1], y[:, :-1], x[:, -1], y[:, -1]


# Squared errors of the predictors on Gaussian data, from Monte-Carlo runs of an independent script.
LINES = {
    "ridge": 0.114,
    "gradient_1": 0.241,
    "gradient_2": 0.144,
    "gradient_3": 0.124,
    "gradient_4": 0.118,
    "delta_rule": 0.141,
}


@pytest.mark.parametrize("line", LINES)
def test_regression_lines_lie_where_they_were_found(line: str) -> None:
    *known, truth = gaussian_examples(4000, 0)
    *chosen_on, chosen_truth = gaussian_examples(1000, 1)
    if line == "ridge":
        predicted = lines.ridge(*known, 0.5)
    else:
        form = lines.delta_rule_pass
        if line != "delta_rule":
            form = partial(lines.gradient_steps, steps=int(line[-1]))
        rate = lines.best_rate(partial(form, *chosen_on), chosen_truth)
        predicted = form(*known, rate=rate)
    errors = (predicted - truth).square()
    spread = float(errors.std()) / len(errors) ** 0.5
    assert float(errors.mean()) == pytest.approx(LINES[line], abs=4 * spread)


def test_a_rate_at_which_a_line_diverges_is_not_the_best() -> None:
    def predict(*, rate: float) -> torch.Tensor:
        return torch.full((3,), torch.nan if rate < 0.08 or rate > 1.5 else rate)

    assert lines.best_rate(predict, torch.full((3,), 0.4)) == pytest.approx(0.4)


def test_regression_scores_the_lines_in_their_order() -> None:
    task = InContextRegression(InContextRegressionTask(), vocab_size=256)
    found = {name: task.normalised(Score(value, 0.0, 1)) for name, value in task.line_scores.items()}
    order = [found[f"line_{name}"] for name in ("gradient_1", "gradient_2", "gradient_3", "gradient_4")]
    assert order == sorted(order)
    assert 0.8 < order[0] < order[-1] < 1.0
    assert order[0] < found["line_delta_rule"] < 1.0
    assert task.normalised(Score(task.best, 0.0, 1)) == 1.0
    # Rounding y to 64 levels costs little: the Bayes line of ±1 inputs lies where that of Gaussian ones does.
    assert task.best == pytest.approx(0.114, abs=0.012)
    assert task.chance == pytest.approx(1.1, abs=0.12)


def test_the_solver_of_regression_scores_next_to_the_bound() -> None:
    task = InContextRegression(InContextRegressionTask(), vocab_size=256)
    inputs, targets = task.held_out(CPU)
    numbers = task.levels[task.oracle(inputs)[:, -1] - 32]
    truth = task.examples(inputs, targets)[3]
    assert float((numbers - truth).square().mean()) == pytest.approx(task.best, rel=0.03)


@pytest.mark.parametrize(
    "task", ["{parity: {length: 8, test_lengths: [24]}}", "{in_context_regression: {examples: 8}}"]
)
def test_a_model_is_trained_and_scored_at_a_drawn_task(task: str) -> None:
    spec = loads(SPEC.format(task=task)).spec
    assert spec.search is not None
    made = make_task(spec.search.tasks[0], spec.data, vocab_size=spec.model.vocab_size)
    recipe = recipe_for(spec.search.tasks[0], spec.train)
    result = train_and_score(Training(spec.model, recipe, "cpu"), made).result
    assert result["metric"] == made.metric
    # Twenty steps teach little; a model that knows nothing scores chance, or a little less.
    assert -0.5 < result["normalised"] < 0.5
    assert result["n"] == made.held_out_rows
    assert ("accuracy_at_24" in result["extras"]) == (made.name == "parity")


def test_fields_that_do_not_go_together_are_refused_with_a_way_out() -> None:
    with pytest.raises(HeddleError, match="hint: length: 51") as caught:
        Niah(NiahTask(needles=12, length=50), vocab_size=256)
    assert caught.value.code == "out-of-range"
