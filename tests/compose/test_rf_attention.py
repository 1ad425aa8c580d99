"""Random-feature attention: the layer is its formula, its queries and keys are frozen, what is trained is a convex problem."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import EXACT, call_at, mixer_of, model_with, noise, tokens

from heddle.compose.build import build
from heddle.compose.modules.frozen import FrozenProjection
from heddle.compose.modules.site import Site
from heddle.compose.plan import plan
from heddle.specs import Site as SpecSite
from heddle.specs.mixers import Attention, RfAttention

HIDDEN, HEADS, DIM, LENGTH = 48, 3, 8, 40
FIELDS: dict[str, Any] = {"heads": HEADS, "head_dim": DIM}


def weights_of(mixer: Any, x: Tensor, score: str, scale: float) -> Tensor:
    """p of every query and key, from the frozen matrices alone.  Shapes:  x: [B, T, D];  out: [B, H, T, T]"""
    q, k = (
        (x @ one.weight.T).view(*x.shape[:2], HEADS, DIM).transpose(1, 2)
        for one in (mixer.q_proj, mixer.k_proj)
    )
    factor = 1.0 if mixer.temperature is None else mixer.temperature.double()[:, None, None]
    logits = factor * scale * (q @ k.transpose(-1, -2))
    past = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    if score == "softmax":
        return logits.masked_fill(~past, -math.inf).softmax(-1)
    kept = logits * (logits > 0) * past
    if score == "relu":
        return kept / torch.arange(1, x.shape[1] + 1)[:, None]
    return kept / (1e-6 + kept.sum(-1, keepdim=True))


def by_formula(mixer: Any, x: Tensor, p: Tensor) -> Tensor:
    v = (x @ mixer.v_proj.weight.T).view(*x.shape[:2], HEADS, DIM).transpose(1, 2)
    return (p @ v).transpose(1, 2).flatten(2) @ mixer.o_proj.weight.T


@torch.no_grad()
@pytest.mark.parametrize(
    ("fields", "scale"),
    [
        ({"key_noise": 0.5, "learned_scale": True}, DIM**-0.5),
        ({"score": "relu", "scale": 2.0}, 2.0),
        ({"score": "relu_norm", "learned_scale": True}, DIM**-0.5),
    ],
    ids=["softmax", "relu", "relu_norm"],
)
def test_it_equals_its_formula(fields: dict[str, Any], scale: float) -> None:
    mixer, x = mixer_of(HIDDEN, "rf_attention", **FIELDS, **fields), noise(2, LENGTH, HIDDEN)
    if mixer.temperature is not None:
        mixer.temperature.uniform_(0.5, 3.0)
    score = fields.get("score", "softmax")
    expected = by_formula(mixer, x, weights_of(mixer, x, score, scale))
    assert (mixer(x, call_at(0, LENGTH)) - expected).abs().max() < EXACT


@torch.no_grad()
@pytest.mark.parametrize("rope", [None, {"theta": 1e4}])
def test_with_softmax_it_is_attention_of_those_weights(rope: dict[str, Any] | None) -> None:
    mixer = mixer_of(HIDDEN, "rf_attention", **FIELDS, rope=rope)
    softmax = mixer_of(HIDDEN, "attention", **FIELDS, rope=rope)
    softmax.load_state_dict(mixer.state_dict())
    x = noise(2, LENGTH, HIDDEN)
    assert (mixer(x, call_at(0, LENGTH)) - softmax(x, call_at(0, LENGTH))).abs().max() < EXACT


@torch.no_grad()
def test_a_first_token_gives_its_value_or_as_much_of_it_as_its_logit() -> None:
    x = noise(2, 1, HIDDEN)
    for score in ("softmax", "relu"):
        mixer = mixer_of(HIDDEN, "rf_attention", **FIELDS, score=score)
        q, k, v = (
            (x @ one.weight.T).view(2, 1, HEADS, DIM) for one in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
        )
        p = F.relu((q * k).sum(-1, keepdim=True) * DIM**-0.5) if score == "relu" else 1.0
        expected = (p * v).flatten(2) @ mixer.o_proj.weight.T
        assert (mixer(x, call_at(0, 1)) - expected).abs().max() < EXACT


def test_matrices_have_their_variance_and_share_what_the_noise_leaves() -> None:
    many: dict[str, Any] = {"heads": 8, "head_dim": 256, "seed": 5}
    site = Site(512, 3, 9)

    def drawn(noise: float, **other: Any) -> Tensor:
        made = FrozenProjection(other.pop("site", site), **many | other, noise=noise)
        made.initialise(0.02)
        return made.weight

    first = drawn(0.0)
    # Four standard deviations of a mean of squares.
    bound = 4 * math.sqrt(2 / first.numel())
    for xi in (0.0, 0.5, 1.0):
        second = drawn(xi)
        assert abs(second.square().mean() * 512 - 1) < bound
        assert abs((first * second).mean() * 512 - math.sqrt(1 - xi**2)) < bound
    assert torch.equal(first, drawn(0.0))
    assert not torch.equal(first, drawn(0.0, seed=6))
    assert not torch.equal(first, drawn(0.0, site=Site(512, 4, 9)))
    heads = first.view(8, 256, 512)
    assert not any(torch.equal(heads[0], one) for one in heads[1:])


def test_training_leaves_the_weights_of_a_fixed_input_and_a_checkpoint_brings_them_back(
    tmp_path: Path,
) -> None:
    spec = model_with({"kind": "rf_attention", "heads": 4, "seed": 7}, HIDDEN, vocab_size=256)
    model = build(spec, seed=1).train()
    mixer = model.model.layers[0].mixer
    frozen = {name: one.clone() for name, one in mixer.named_buffers()}
    assert frozen.keys() == {"q_proj.weight", "k_proj.weight"}
    assert not any("q_proj" in name or "k_proj" in name for name, _ in model.named_parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=1.0)
    for _ in range(2):
        model(tokens(9), labels=tokens(9)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # Another seed of the model: the matrices are those of the mixer's own.
    others = dict(build(spec, seed=2).model.layers[0].mixer.named_buffers())
    with torch.no_grad():
        # What is saved counts, not what would be drawn again.
        mixer.q_proj.weight.mul_(2.0)
    model.save_pretrained(tmp_path)
    again = dict(type(model).from_pretrained(tmp_path).model.layers[0].mixer.named_buffers())
    for name, one in frozen.items():
        assert torch.equal(others[name], one)
        assert torch.equal(again[name], one * 2.0 if name.startswith("q") else one)


def test_detached_the_gradient_of_the_input_is_that_of_the_values() -> None:
    for score in ("softmax", "relu"):
        mixer = mixer_of(HIDDEN, "rf_attention", **FIELDS, score=score, detached=True, learned_scale=True)
        x = noise(2, LENGTH, HIDDEN).requires_grad_()
        other = x.detach().clone().requires_grad_()
        target = noise(2, LENGTH, HIDDEN, seed=5)
        (mixer(x, call_at(0, LENGTH)) * target).sum().backward()
        assert mixer.temperature.grad.abs().min() > 0
        (
            by_formula(mixer, other, weights_of(mixer, other.detach(), score, DIM**-0.5)) * target
        ).sum().backward()
        assert (x.grad - other.grad).abs().max() < EXACT


def test_gradient_descent_on_values_finds_the_optimum_in_closed_form() -> None:
    size, ridge = 6, 2.0
    mixer = mixer_of(size, "rf_attention", heads=1, score="relu")
    nn.init.eye_(mixer.o_proj.weight)
    x, target = noise(4, 30, size), noise(4, 30, size, seed=5)
    call = call_at(0, 30, rows=4)
    with torch.no_grad():
        # The layer with values of the identity gives the features of which it is a linear map.
        mixer.v_proj.weight.copy_(torch.eye(size))
        features = mixer(x, call).flatten(0, 1)
        gram = features.T @ features + ridge * torch.eye(size, dtype=torch.float64)
        best = torch.linalg.solve(gram, features.T @ target.flatten(0, 1)).T
        mixer.v_proj.weight.zero_()
    weight = mixer.v_proj.weight
    # The step of the steepest direction, and as many as the flattest needs.
    rates = torch.linalg.eigvalsh(gram)
    step, steps = 0.5 / rates[-1], 40 * int(rates[-1] / rates[0] + 1)
    for _ in range(steps):
        loss = (mixer(x, call) - target).square().sum() + ridge * weight.square().sum()
        (slope,) = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            weight -= step * slope
    assert (weight - best).abs().max() < EXACT


def test_half_of_its_weights_are_parameters_and_all_are_read() -> None:
    D, site = 2048, SpecSite(hidden_size=2048)
    spec, softmax = RfAttention.model_validate({"heads": 16}), Attention.model_validate({"heads": 16})
    assert spec.params(site) == 2 * D * D
    assert spec.params(site) + spec.frozen_params(site) == softmax.params(site)
    assert spec.flops(site, 100) == softmax.flops(site, 100)
    assert spec.prefill_flops(site, 100) == softmax.prefill_flops(site, 100)
    moved = [
        plan(model_with({"kind": kind, "heads": 4}, HIDDEN)).cost(100)["decode_bytes"]
        for kind in ("rf_attention", "attention")
    ]
    assert moved[0] == moved[1]
