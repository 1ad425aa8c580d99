"""What is peculiar to MQAR and to text: their layout, chance levels, errors, slices."""

from __future__ import annotations

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from heddle.compose.train import IGNORE, Recipe
from heddle.errors import HeddleError
from heddle.search.tasks.corpus import Corpus
from heddle.search.tasks.mqar import Mqar
from heddle.search.tasks.scoring import judge, ratio_with_error
from heddle.search.tasks.task import batches
from heddle.search.tasks.text import GRAM, Text, previous_gram
from heddle.search.tasks.tokens import Tokens, tokens_of
from heddle.specs import MqarTask

CPU = torch.device("cpu")
LINES = "".join(f"line {number} of {number * 7919 % 1000}\n" for number in range(4000)).encode()


class Fixed(nn.Module):
    """Gives the same logits at every position."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.lm_head = nn.Linear(1, len(logits), bias=False)
        self.lm_head.weight.data = logits[:, None]

    def logits(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.lm_head(hidden)
        return found

    def model(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        return SimpleNamespace(last_hidden_state=torch.ones(*input_ids.shape, 1))


def text_task(*, length: int = 64, vocab_size: int = 256) -> Text:
    corpus = Corpus("lines", LINES[:60_000], LINES[60_000:], "digest", 1, "block")
    return Text(tokens_of(corpus, "bytes", vocab_size), sequence_length=length, vocab_size=vocab_size)


def test_mqar_writes_distinct_keys_and_values_in_pairs() -> None:
    task = Mqar(vocab_size=64, pairs=8, length=64)
    inputs, _ = task.sample(200, seed=0, device=CPU)
    keys, values = inputs[:, 0:16:2], inputs[:, 1:16:2]
    assert int(keys.min()) == 1
    assert int(keys.max()) == 31
    assert int(values.min()) == 32
    assert int(values.max()) == 63
    for row in torch.cat([keys, values], dim=1).tolist():
        assert len(set(row)) == 16


def test_mqar_asks_each_key_once_at_the_first_token_of_a_slot() -> None:
    task = Mqar(vocab_size=64, pairs=8, length=64)
    inputs, targets = task.sample(100, seed=0, device=CPU)
    rows, places = (targets != IGNORE).nonzero(as_tuple=True)
    assert bool(((places >= 16) & (places % 2 == 0)).all())
    assert torch.equal(torch.bincount(rows), torch.full((100,), 8))
    asked = inputs[rows, places].view(100, 8).sort(dim=1).values
    assert torch.equal(asked, inputs[:, 0:16:2].sort(dim=1).values)


def test_mqar_puts_queries_close_behind_the_context() -> None:
    task = Mqar(vocab_size=256, pairs=2, length=64)
    _, targets = task.sample(4000, seed=0, device=CPU)
    asked = (targets[:, 4::2] != IGNORE).float().mean(dim=0)
    # The first draw takes slot g with p(g) ~ 1/(g+1)^0.99; two draws of 30 slots take slot 0 with about this
    # chance.
    weights = torch.arange(1, 31).pow(-0.99)
    shares = weights / weights.sum()
    expected = shares[0] + (shares[1:] * shares[0] / (1 - shares[1:])).sum()
    assert float(asked[0]) == pytest.approx(float(expected), abs=4 * math.sqrt(0.25 / 4000))
    assert asked[0] > 2 * asked[3] > 3 * asked[20:].mean()


def test_mqar_fills_with_zeros_when_told_to() -> None:
    inputs, targets = Mqar(vocab_size=64, pairs=4, length=40, random_non_queries=False).sample(
        50, seed=0, device=CPU
    )
    fillers = inputs[:, 8:][targets[:, 8:] == IGNORE]
    assert not fillers.any()
    noisy, targets = Mqar(vocab_size=64, pairs=4, length=40).sample(50, seed=0, device=CPU)
    assert len(noisy[:, 8:][targets[:, 8:] == IGNORE].unique()) == 64


def test_mqar_trains_on_easier_rows_too_and_is_scored_on_full_ones_alone() -> None:
    task = Mqar(vocab_size=64, pairs=8, length=64)
    seen = Counter[tuple[int, int]]()
    for seed in range(400):
        inputs, targets = task.training_batch(512, seed=seed, device=CPU)
        assert inputs.numel() == 512
        labels = (targets != IGNORE).sum(dim=1)
        assert len(labels.unique()) == 1
        seen[(inputs.shape[1], int(labels[0]))] += 1
    assert set(seen) == {(64, 8), (32, 4), (16, 2)}
    assert seen[(64, 8)] == pytest.approx(200, abs=40)
    assert seen[(32, 4)] == pytest.approx(100, abs=35)
    inputs, targets = task.held_out(CPU)
    assert inputs.shape == (512, 64)
    assert torch.equal((targets != IGNORE).sum(dim=1), torch.full((512,), 8))


def test_mqar_can_ask_anywhere_behind_the_context() -> None:
    task = Mqar(vocab_size=256, pairs=2, length=64, gap_power=1.0)
    _, targets = task.sample(4000, seed=0, device=CPU)
    asked = (targets[:, 4::2] != IGNORE).float().mean(dim=0)
    assert torch.allclose(asked, torch.full((30,), 2 / 30), atol=4 * math.sqrt(0.0625 / 4000))
    assert task.chance == pytest.approx(0.5, abs=0.03)
    assert task.digest != Mqar(vocab_size=256, pairs=2, length=64).digest


def test_a_training_that_begins_easily_has_eighths_alone_for_its_first_share() -> None:
    task, plain = (
        Mqar(vocab_size=64, pairs=8, length=64, easy_first=0.4),
        Mqar(vocab_size=64, pairs=8, length=64),
    )
    recipe = Recipe(tokens=5120, batch_tokens=512, seed=3)
    drawn = [batches(task, recipe, CPU)(step) for step in range(10)]
    shapes = [tuple(inputs.shape) for inputs, _ in drawn]
    assert shapes[:4] == [(64, 8)] * 4
    assert all(length >= 16 for _, length in shapes[4:])
    assert int((drawn[0][1] != IGNORE).sum()) == 64
    for step in range(4, 10):
        assert torch.equal(drawn[step][0], batches(plain, recipe, CPU)(step)[0])
    assert torch.equal(task.held_out(CPU)[0], plain.held_out(CPU)[0])
    assert task.digest != plain.digest


def test_mqar_of_one_pair_has_no_easier_form() -> None:
    inputs, targets = Mqar(vocab_size=64, pairs=1, length=8).training_batch(64, seed=0, device=CPU)
    assert inputs.shape == (8, 8)
    assert int((targets != IGNORE).sum()) == 8


def test_mqar_chance_is_what_a_guesser_by_position_scores() -> None:
    task = Mqar(vocab_size=64, pairs=4, length=32)
    _, targets = task.sample(20_000, seed=0, device=CPU)
    inputs, _ = task.sample(20_000, seed=0, device=CPU)
    # By position alone: at each place the pair index that is most often right there, judged on rows of its
    # own.
    index = (inputs[:, None, 1:8:2] == targets[:, :, None]).int().argmax(dim=-1)
    asked = targets != IGNORE
    hits = total = 0
    for place in range(8, 32, 2):
        known, judged = (
            index[:10_000, place][asked[:10_000, place]],
            index[10_000:, place][asked[10_000:, place]],
        )
        hits += int((judged == known.mode().values).sum())
        total += len(judged)
    assert task.chance == pytest.approx(hits / total, abs=0.01)
    assert task.chance > 1 / task.pairs


def test_mqar_reach_is_the_distance_to_the_key() -> None:
    task = Mqar(vocab_size=64, pairs=4, length=32, random_non_queries=False)
    inputs, targets = task.sample(20, seed=0, device=CPU)
    reach = task.reach(inputs)
    for row, place in (targets != IGNORE).nonzero().tolist():
        lag = int(reach[row, place])
        assert inputs[row, place - lag] == inputs[row, place]
        assert inputs[row, place - lag + 1] == targets[row, place]
    assert torch.equal(reach > 0, targets != IGNORE)


def test_mqar_that_overwrites_tells_every_key_and_asks_for_the_last_value() -> None:
    task = Mqar(vocab_size=64, pairs=4, length=40, overwritten=3, random_non_queries=False)
    inputs, targets = task.sample(200, seed=0, device=CPU)
    times = Counter[int]()
    for row, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
        told = list(zip(row[0:14:2], row[1:14:2], strict=True))
        assert len({value for _, value in told}) == 7
        last = dict(told)
        times.update(Counter(key for key, _ in told).values())
        asked = {token: answer for token, answer in zip(row, answers, strict=True) if answer != IGNORE}
        assert asked == last
    assert set(times) == {1, 2, 3, 4}


def test_mqar_asks_near_the_context_for_keys_that_were_told_early() -> None:
    task = Mqar(vocab_size=256, pairs=4, length=40, overwritten=4)
    inputs, targets = task.sample(20_000, seed=0, device=CPU)
    # The first slot holds the key that was told first more often than any other, so chance is that of plain rows.
    asked = targets[:, 16] != IGNORE
    first = (inputs[:, 16] == inputs[:, 0])[asked].double().mean()
    plain = Mqar(vocab_size=256, pairs=4, length=32)
    inputs, targets = plain.sample(20_000, seed=1, device=CPU)
    asked = targets[:, 8] != IGNORE
    assert float(first) == pytest.approx(
        float((inputs[:, 8] == inputs[:, 0])[asked].double().mean()), abs=0.03
    )
    assert task.chance == plain.chance


def test_overwritten_keys_are_scored_apart() -> None:
    task = Mqar(vocab_size=64, pairs=4, length=32, overwritten=3)
    score = task.evaluate(Fixed(torch.zeros(64)), device=CPU)
    assert score.extras == {"overwritten_accuracy": 0.0}
    inputs, targets = task.held_out(CPU)
    again = torch.tensor([task._told_again(row) for row in inputs.tolist()]) & (targets != IGNORE)
    # Three pairs tell again one to three of the four keys.
    assert set(again.sum(dim=1).tolist()) == {1, 2, 3}


def test_neither_token_of_a_key_of_two_says_which_key_it_is() -> None:
    task = Mqar(vocab_size=64, pairs=9, length=60, key_tokens=2, random_non_queries=False)
    inputs, targets = task.sample(50, seed=0, device=CPU)
    for row, answers in zip(inputs.tolist(), targets.tolist(), strict=True):
        keys = list(zip(row[0:27:3], row[1:27:3], strict=True))
        assert len(set(keys)) == 9
        first, second = (Counter(key[at] for key in keys) for at in (0, 1))
        assert first.keys().isdisjoint(second)
        assert set(first.values()) == set(second.values()) == {3}
        value_of = dict(zip(keys, row[2:27:3], strict=True))
        places = [place for place, answer in enumerate(answers) if answer != IGNORE]
        assert all(place % 3 == 1 and place > 27 for place in places)
        assert {(row[place - 1], row[place]): answers[place] for place in places} == value_of


def test_easier_rows_of_mqar_have_their_share_of_overwritten_keys() -> None:
    task = Mqar(vocab_size=64, pairs=8, length=72, overwritten=4, key_tokens=2)
    shapes = {
        (inputs.shape[1], int((targets != IGNORE)[0].sum()))
        for inputs, targets in (task.training_batch(144, seed=seed, device=CPU) for seed in range(40))
    }
    assert shapes == {(72, 8), (36, 4), (18, 2)}


@pytest.mark.parametrize("fields", [{"overwritten": 9}, {"key_tokens": 2, "overwritten": 3}])
def test_mqar_needs_exactly_the_vocabulary_and_the_length_that_its_schema_says(
    fields: dict[str, int],
) -> None:
    schema = MqarTask.model_validate({"pairs": 8, "length": 256, **fields})
    (misfit,) = MqarTask.model_validate({"pairs": 8, "length": 32, **fields}).misfits()
    length = int(misfit[2].split(",")[0].removeprefix("length: "))
    Mqar(vocab_size=schema.ids, pairs=8, length=length, **fields).sample(4, seed=0, device=CPU)
    for vocab, tokens in ((schema.ids - 1, length), (schema.ids, length - 1)):
        with pytest.raises(HeddleError, match="hint:") as caught:
            Mqar(vocab_size=vocab, pairs=8, length=tokens, **fields)
        assert caught.value.code == "out-of-range"


@pytest.mark.parametrize(("pairs", "length", "vocab"), [(9, 32, 256), (16, 128, 32)])
def test_mqar_that_cannot_be_laid_out_is_refused_with_a_way_out(pairs: int, length: int, vocab: int) -> None:
    with pytest.raises(HeddleError, match="hint:") as caught:
        Mqar(vocab_size=vocab, pairs=pairs, length=length)
    assert caught.value.code == "out-of-range"


def test_text_targets_are_the_next_tokens() -> None:
    inputs, targets = text_task().sample(32, seed=0, device=CPU)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_text_trains_on_the_train_split_and_is_scored_on_the_other() -> None:
    task = text_task()
    for split, (inputs, targets) in (
        ("train", task.sample(64, seed=0, device=CPU)),
        ("validation", task.held_out(CPU)),
    ):
        data = getattr(task.tokens, split).tobytes()
        for row, last in zip(inputs.tolist(), targets[:, -1].tolist(), strict=True):
            assert bytes([*row, last]) in data


def test_text_windows_can_start_at_both_ends_of_the_train_split() -> None:
    tokens = Tokens(
        *(torch.arange(80, dtype=torch.uint8).numpy() for _ in range(2)), torch.ones(80).numpy(), "digest"
    )
    inputs, targets = Text(tokens, sequence_length=8, vocab_size=256).sample(3000, seed=0, device=CPU)
    assert (int(inputs.min()), int(targets.max())) == (0, 79)
    assert int(inputs[:, 0].max()) == 71


def test_held_out_windows_do_not_overlap() -> None:
    tokens = Tokens(
        *(torch.arange(100, dtype=torch.uint8).numpy() for _ in range(2)), torch.ones(100).numpy(), "digest"
    )
    inputs, targets = Text(tokens, sequence_length=8, vocab_size=256).held_out(CPU)
    windows = torch.cat([inputs, targets[:, -1:]], dim=1)
    assert len(windows) == 11
    assert len(windows.unique()) == windows.numel()


def test_a_uniform_model_scores_eight_bits_a_byte_which_is_chance() -> None:
    task = text_task()
    score = task.evaluate(Fixed(torch.zeros(256)), device=CPU)
    assert score.value == pytest.approx(8.0)
    assert task.chance == 8.0
    assert task.normalised(score) == pytest.approx(0.0, abs=1e-6)


def test_bits_are_counted_by_the_byte_also_when_tokens_are_longer() -> None:
    ids = torch.arange(4).repeat(200).to(torch.uint8).numpy()
    sizes = torch.tensor([1, 2, 3, 6]).repeat(200).numpy()
    task = Text(Tokens(ids, ids, sizes, "digest"), sequence_length=7, vocab_size=1024)
    assert task.chance == pytest.approx(10 / 3)
    _, targets = task.held_out(CPU)
    in_bytes = torch.tensor([1, 2, 3, 6])[targets].sum()
    score = task.evaluate(Fixed(torch.zeros(1024)), device=CPU)
    assert score.value == pytest.approx(10 * targets.numel() / int(in_bytes))


def test_a_window_with_few_tokens_left_is_too_small_a_corpus() -> None:
    corpus = Corpus("lines", LINES, LINES[:100], "digest", 1, "block")
    with pytest.raises(HeddleError, match="validation split has 100 tokens") as caught:
        Text(tokens_of(corpus, "bytes", 256), sequence_length=64, vocab_size=256)
    assert caught.value.code == "corpus-too-small"


@pytest.mark.parametrize("vocabulary", [12, 70_000])
def test_repeats_are_found_where_a_plain_search_finds_them(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(3, (8, 60), generator=generator) * (vocabulary // 3)
    previous = previous_gram(inputs)
    for row, found in zip(inputs.tolist(), previous.tolist(), strict=True):
        for place, earlier in enumerate(found):
            gram = row[place - GRAM + 1 : place + 1]
            ends = [end for end in range(GRAM - 1, place) if row[end - GRAM + 1 : end + 1] == gram]
            assert earlier == (max(ends, default=-1) if place >= GRAM - 1 else -1)


def test_text_slices_add_up_to_the_whole() -> None:
    task = text_task()
    logits = torch.zeros(256)
    logits[list(b"line of0123456789\n")] = 3.0
    score = task.evaluate(Fixed(logits), device=CPU)
    share = score.extras["repeated_share"]
    mixed = share * score.extras["repeated_bits_per_byte"] + (1 - share) * score.extras["other_bits_per_byte"]
    assert 0.05 < share < 0.95
    assert mixed == pytest.approx(score.value)


def test_the_error_counts_sequences_and_not_labels() -> None:
    # Ten labels of a sequence that all agree say no more than one.
    hits = [10.0, 0.0] * 50
    value, se = ratio_with_error(hits, [10.0] * 100)
    assert value == 0.5
    assert se == pytest.approx(0.5 / math.sqrt(99))
    assert se == pytest.approx(ratio_with_error([1.0, 0.0] * 50, [1.0] * 100)[1])


def test_the_error_of_a_ratio_covers_the_truth_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(400):
        counts = torch.randint(1, 20, (60,), generator=generator).double()
        sums = counts * (2.0 + torch.randn(60, generator=generator, dtype=torch.float64))
        value, se = ratio_with_error(sums.tolist(), counts.tolist())
        covered += abs(value - 2.0) < 1.96 * se
    assert 0.90 < covered / 400 < 0.98


def test_judging_in_pieces_equals_judging_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    task = text_task()
    inputs, targets = task.held_out(CPU)
    model = Fixed(torch.linspace(-2, 2, 256))
    whole = judge(model, inputs, targets)
    monkeypatch.setattr("heddle.search.tasks.scoring.TOKENS_AT_ONCE", 3 * 64)
    pieces = judge(model, inputs, targets)
    torch.testing.assert_close(pieces[0], whole[0])
    assert torch.equal(pieces[1], whole[1])


def test_a_model_of_nan_is_an_error_and_not_a_score() -> None:
    task = Mqar(vocab_size=64, pairs=4, length=32)
    with pytest.raises(HeddleError) as caught:
        task.evaluate(Fixed(torch.full((64,), float("nan"))), device=CPU)
    assert caught.value.code == "loss-not-finite"
