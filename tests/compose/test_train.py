"""The training loop: it learns, repeats itself, decays what it should, and says what went wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.train import (
    IGNORE,
    Batches,
    Fit,
    Recipe,
    autocast,
    fit,
    labelled_logits,
    labelled_loss,
    labelled_positions,
    learning_rate_at,
    parameter_groups,
)
from heddle.compose.train_many import fit_many
from heddle.errors import HeddleError

VOCAB, WIDTH, LENGTH = 11, 16, 8
RECIPE = Recipe(tokens=200 * 8 * LENGTH, batch_tokens=8 * LENGTH, learning_rate=1e-2)


class Backbone(nn.Module):
    """Sees this token and the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.mix = nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.A_log = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        now = self.embedding(input_ids)
        before = F.pad(now, (0, 0, 1, 0))[:, :-1]
        hidden = self.norm(torch.tanh(self.mix(torch.cat([now, before], dim=-1)))) * self.A_log.exp()
        return SimpleNamespace(last_hidden_state=hidden)


class Tiny(nn.Module):
    def __init__(self, seed: int = 0, *, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.model = Backbone()
        self.lm_head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.model.embedding.weight

    def logits(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.lm_head(hidden)
        return found


def echoes(step: int) -> tuple[Tensor, Tensor]:
    """Each target is the token before; every other position is asked."""
    inputs = torch.randint(VOCAB, (8, LENGTH), generator=torch.Generator().manual_seed(step))
    targets = F.pad(inputs, (1, 0))[:, :-1].clone()
    targets[:, ::2] = IGNORE
    return inputs, targets


def train(recipe: Recipe = RECIPE, *, seed: int = 0) -> tuple[Tiny, Fit]:
    model = Tiny(seed)
    return model, fit(model, echoes, recipe)


def test_loss_falls_from_the_uniform_guess() -> None:
    model, result = train()
    assert result.losses[0] == pytest.approx(math.log(VOCAB), rel=0.25)
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert not model.training


def test_steps_and_tokens_follow_from_the_recipe() -> None:
    _, result = train(replace(RECIPE, tokens=1000))
    assert result.steps == round(1000 / (8 * LENGTH)) == len(result.losses)
    assert result.tokens == result.steps * 8 * LENGTH
    assert result.launch == "eager"


def test_fewer_tokens_than_one_batch_still_take_one_step() -> None:
    _, result = train(replace(RECIPE, tokens=1))
    assert result.steps == 1


def test_a_row_longer_than_the_batch_is_one_row() -> None:
    assert Recipe(tokens=1, batch_tokens=4096).rows(512) == 8
    assert Recipe(tokens=1, batch_tokens=4096).rows(8192) == 1


def test_two_trainings_are_bit_equal_and_another_start_differs() -> None:
    short = replace(RECIPE, tokens=2000)
    first, second, other = train(short), train(short), train(short, seed=1)
    assert first[1].losses == second[1].losses
    for one, two in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(one, two)
    assert first[1].losses != other[1].losses


def test_loss_at_labelled_positions_equals_the_full_loss() -> None:
    model = Tiny()
    inputs, targets = echoes(0)
    whole = model.lm_head(model.model(inputs, use_cache=False).last_hidden_state)
    expected = F.cross_entropy(whole.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    torch.testing.assert_close(labelled_loss(model, inputs, targets), expected, rtol=1e-6, atol=1e-6)


def test_head_sees_only_the_labelled_positions() -> None:
    inputs, targets = echoes(0)
    positions = labelled_positions(targets)
    assert positions is not None
    assert labelled_logits(Tiny(), inputs, positions).shape == (int((targets != IGNORE).sum()), VOCAB)
    assert labelled_positions(inputs) is None
    assert labelled_logits(Tiny(), inputs, None).shape == (inputs.numel(), VOCAB)


def test_only_matrices_outside_the_embedding_decay() -> None:
    model = Tiny()
    decayed, kept = parameter_groups(model, 0.1)
    assert {id(p) for p in decayed["params"]} == {id(model.model.mix.weight), id(model.lm_head.weight)}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))


def test_a_tied_head_and_a_marked_parameter_do_not_decay() -> None:
    model = Tiny(tied=True)
    model.model.mix.weight._no_weight_decay = True  # type: ignore[assignment]
    groups = parameter_groups(model, 0.1)
    assert [group["weight_decay"] for group in groups] == [0.0]


def test_frozen_parameters_stay_as_they_are() -> None:
    model = Tiny()
    model.model.mix.requires_grad_(False)
    before = model.model.mix.weight.clone()
    fit(model, echoes, replace(RECIPE, tokens=1000))
    assert torch.equal(model.model.mix.weight, before)


def test_learning_rate_climbs_to_its_peak_and_falls_to_a_tenth() -> None:
    recipe = replace(RECIPE, learning_rate=1.0, warmup=0.1)
    rates = [learning_rate_at(step, 100, recipe) for step in range(100)]
    assert rates[10] == max(rates) == 1.0
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
    assert min(rates) > 0


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_learning_rate_is_sound_for_a_handful_of_steps(steps: int) -> None:
    for warmup in (0.0, 0.1, 0.9):
        recipe = replace(RECIPE, learning_rate=1.0, warmup=warmup)
        assert all(0 < learning_rate_at(step, steps, recipe) <= 1 for step in range(steps))


def test_a_loss_that_is_not_finite_names_its_step() -> None:
    model = Tiny()

    def poisoned(step: int) -> tuple[Tensor, Tensor]:
        if step == 3:
            with torch.no_grad():
                model.model.norm.weight.fill_(float("nan"))
        return echoes(step)

    with pytest.raises(HeddleError, match=r"the loss is nan at step 4 of 200") as caught:
        fit(model, poisoned, RECIPE)
    assert caught.value.code == "loss-not-finite"


def test_a_gradient_that_is_not_finite_is_caught_before_it_is_believed() -> None:
    model = Tiny()
    model.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(HeddleError, match=r"its gradient's norm is (inf|nan) at step 1 of") as caught:
        fit(model, echoes, RECIPE)
    assert caught.value.code == "loss-not-finite"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["cuda", "cpu"],
)
def test_memory_that_runs_out_is_told_with_the_step(error: Exception) -> None:
    def greedy(step: int) -> tuple[Tensor, Tensor]:
        if step == 2:
            raise error
        return echoes(step)

    with pytest.raises(HeddleError, match="at step 3 of 200") as caught:
        fit(Tiny(), greedy, RECIPE)
    assert caught.value.code == "out-of-memory"


def test_other_errors_pass_through() -> None:
    def broken(_: int) -> tuple[Tensor, Tensor]:
        raise RuntimeError("shapes disagree")

    with pytest.raises(RuntimeError, match="shapes disagree"):
        fit(Tiny(), broken, RECIPE)


def test_progress_is_told_and_may_stop_the_run() -> None:
    told: list[tuple[int, int]] = []

    def until_five(step: int, steps: int, loss: float) -> None:
        assert math.isfinite(loss)
        told.append((step, steps))
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(Tiny(), echoes, RECIPE, on_step=until_five)
    assert told == [(step, 200) for step in range(1, 6)]


def test_precision_decides_the_dtype_of_a_product() -> None:
    cpu = torch.device("cpu")
    for precision, expected in (
        ("auto", torch.float32),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
    ):
        with autocast(cpu, precision):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected


def test_bfloat16_learns_too() -> None:
    _, result = train(replace(RECIPE, precision="bfloat16"))
    assert result.losses[-1] < 0.6 * result.losses[0]


@pytest.mark.gpu
def test_a_captured_step_trains_like_an_eager_one() -> None:
    def on_cuda(step: int) -> tuple[Tensor, Tensor]:
        inputs, targets = echoes(step)
        return inputs.cuda(), targets.cuda()

    def two_shapes(step: int) -> tuple[Tensor, Tensor]:
        inputs, targets = on_cuda(step)
        return (inputs, targets) if step % 3 else (inputs[:, :-2], targets[:, :-2])

    recipe = replace(RECIPE, precision="float32")
    for draw in (on_cuda, two_shapes):
        eager = fit(Tiny().cuda(), draw, recipe)
        graph = fit(Tiny().cuda(), draw, recipe, launch="graph")
        assert graph.launch == "graph"
        told, expected = (torch.tensor(found.losses) for found in (graph, eager))
        torch.testing.assert_close(told, expected, rtol=1e-3, atol=1e-3)


def shifted(step: int) -> tuple[Tensor, Tensor]:
    """Other batches of the same task."""
    return echoes(step + 1000)


def test_trainings_side_by_side_are_those_alone() -> None:
    recipes = [replace(RECIPE, tokens=20 * 8 * LENGTH, learning_rate=rate) for rate in (1e-3, 3e-2)]
    models, draws = [Tiny(0, tied=True), Tiny(1, tied=True)], (echoes, shifted)
    many = fit_many(models, draws, recipes)
    for seed, (model, draw, recipe, found) in enumerate(zip(models, draws, recipes, many, strict=True)):
        alone = Tiny(seed, tied=True)
        fitted = fit(alone, draw, recipe)
        assert isinstance(found, Fit)
        assert (found.steps, found.tokens) == (fitted.steps, fitted.tokens)
        torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(fitted.losses))
        assert not model.training
        for one, other in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_one_training_that_fails_leaves_the_others() -> None:
    recipe = replace(RECIPE, tokens=20 * 8 * LENGTH)
    broken = Tiny(1)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    ended = fit_many([Tiny(0), broken, Tiny(2)], [echoes] * 3, [recipe] * 3)
    assert [type(each) for each in ended] == [Fit, HeddleError, Fit]
    assert isinstance(ended[1], HeddleError)
    assert ended[1].code == "loss-not-finite"
    assert "step 1 of 20" in str(ended[1])


def test_trainings_side_by_side_take_the_same_steps() -> None:
    with pytest.raises(AssertionError, match="same number of steps"):
        fit_many([Tiny(), Tiny()], [echoes] * 2, [RECIPE, replace(RECIPE, tokens=64)])


@pytest.mark.gpu
def test_trainings_of_one_graph_are_those_alone() -> None:
    def drawn(start: int) -> Batches:
        return lambda step: tuple(each.cuda() for each in echoes(start + step))  # type: ignore[return-value]

    recipes = [replace(RECIPE, precision="float32", learning_rate=rate) for rate in (1e-3, 3e-3, 1e-2)]
    draws = [drawn(start) for start in (0, 1000, 2000)]
    many = fit_many([Tiny(seed).cuda() for seed in range(3)], draws, recipes, launch="graph")
    for seed, (draw, recipe, found) in enumerate(zip(draws, recipes, many, strict=True)):
        alone = fit(Tiny(seed).cuda(), draw, recipe)
        assert isinstance(found, Fit)
        assert found.launch == "graph"
        torch.testing.assert_close(
            torch.tensor(found.losses), torch.tensor(alone.losses), rtol=1e-3, atol=1e-3
        )
