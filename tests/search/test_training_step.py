"""The training step that is timed is that of a training without its optimizer, and its memory has the gradients in it."""

from __future__ import annotations

import pytest
import torch
from predicted_search import DECODE, QUICK, spec_with

from heddle.compose.build import build_causal_lm
from heddle.compose.plan import plan
from heddle.compose.train import Recipe, Trainer
from heddle.search.latency import Place, measure
from heddle.search.limits import budgets_on
from heddle.search.training_step import TrainingStep
from heddle.specs import ModelSpec, loads

ROUTED = """
version: 1
name: routed
model:
  vocab_size: 256
  hidden_size: 32
  blocks:
    one:
      mixer: {kind: attention, heads: 2}
      channel: {kind: moe, experts: 4, active: 2, width: 16}
  layers: [one, one]
"""


def model() -> ModelSpec:
    return loads(spec_with(DECODE)).spec.model


def test_its_gradients_are_those_of_a_training_with_what_layers_add_to_the_loss() -> None:
    spec = loads(ROUTED).spec.model
    ids = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))
    one, other = (build_causal_lm(spec, seed=0) for _ in range(2))
    step = TrainingStep(one, ids)
    step()
    # A training whose clipping clips nothing leaves the gradients as they came.
    trainer = Trainer(other.train(), Recipe(tokens=32, grad_clip=1e9), 1, torch.device("cpu"))
    trainer.step(0, ids, ids.roll(-1, dims=1), graph=False)
    assert trainer.aux
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert mine.grad is not None, name
        assert theirs.grad is not None
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=0)
    step.clear()
    assert all(parameter.grad is None for parameter in one.parameters())


def test_its_peak_holds_weights_gradients_and_activations() -> None:
    place = Place("train", 4, 64)
    row = measure(model(), place, device="cpu", effort=QUICK)
    prefill = measure(model(), Place("prefill", 4, 64), device="cpu", effort=QUICK)
    assert (row.label, row.dtype, row.method) == ("train_ms@4x64", "float32", "cpu-timer")
    assert row.peak_bytes is not None
    assert prefill.peak_bytes is not None
    logits = 4 * 64 * 256 * 4
    assert row.peak_bytes > 2 * 4 * plan(model()).parameters + logits
    assert row.peak_bytes > prefill.peak_bytes
    assert measure(model(), place, device="cpu", effort=QUICK).peak_bytes == row.peak_bytes


@pytest.mark.alone
def test_a_forward_and_a_backward_take_longer_than_a_forward() -> None:
    times = {
        phase: measure(model(), Place(phase, 16, 128), device="cpu", effort=QUICK).p10_ms
        for phase in ("prefill", "train")
    }
    assert times["train"] > 1.3 * times["prefill"]


def test_a_training_step_has_budgets_of_its_time_and_of_its_peak() -> None:
    budgets = (
        "train_ms: {at_most: 50, batch: 8, context: 64}",
        "peak_bytes: {of: train, at_most: 1G, batch: 8, context: 64}",
    )
    time, peak = budgets_on(loads(spec_with(*budgets)), "cpu")
    assert (time.label, time.phase, time.is_timed) == ("train_ms@8x64", "train", True)
    assert (peak.label, peak.phase, peak.timing) == ("train_peak_bytes@8x64", "train", "train_ms@8x64")


@pytest.mark.parametrize("phase", ["decode", "prefill", "train"])
def test_what_is_timed_is_told_in_flops_too(phase: str) -> None:
    """The line in FLOPs that a latency model is held against needs them for every phase."""
    assert plan(model()).cost(64, 2)[f"{phase}_flops_per_token"] > 0
