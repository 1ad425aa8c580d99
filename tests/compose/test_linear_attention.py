"""Linear attention: its weights are those of the explicit form, above 0, and of the second-order features near softmax's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import EXACT, call_at, mixer_of, noise, padded_call

from heddle.compose.modules.features import FEATURES, feature_count
from heddle.specs import Site
from heddle.specs.mixers import LinearAttention

HIDDEN, HEADS, KEY, VALUE, LENGTH = 24, 3, 6, 10, 150
SIZES: dict[str, Any] = {"heads": HEADS, "head_dim": KEY, "value_dim": VALUE}


def by_rows(mixer: Any, x: Tensor, seen: Tensor | None = None) -> Tensor:
    """All T x T weights at once, without features.  Shapes:  seen: [T] bool, the tokens that weigh anything"""
    sides = (x @ mixer.qkv_proj.weight.T).split([HEADS * KEY, HEADS * KEY, HEADS * VALUE], dim=-1)
    q, k, v = (side.unflatten(-1, (HEADS, -1)).transpose(1, 2) for side in sides)
    if mixer.feature == "taylor2":
        logits = q @ k.mT / KEY**0.5
        p = 1 + logits + logits.square() / 2
    else:
        q, k = (torch.where(side > 0, side + 1, side.clamp(max=0).exp()) for side in (q, k))
        p = q @ k.mT
    assert (p > 0).all()
    p = p.tril() if seen is None else p.tril() * seen
    p = p / p.sum(-1, keepdim=True).clamp(min=1e-30)
    return (p @ v).transpose(1, 2).flatten(2) @ mixer.o_proj.weight.T


@torch.no_grad()
@pytest.mark.parametrize("feature", FEATURES)
def test_it_equals_all_weights_at_once(feature: str) -> None:
    mixer = mixer_of(HIDDEN, "linear_attention", **SIZES, feature=feature, rope=None)
    x = noise(2, LENGTH, HIDDEN)
    assert (mixer(x, call_at(0, LENGTH)) - by_rows(mixer, x)).abs().max() < EXACT


@torch.no_grad()
@pytest.mark.parametrize("feature", FEATURES)
def test_padding_weighs_nothing_on_either_side(feature: str) -> None:
    mixer, x = mixer_of(HIDDEN, "linear_attention", **SIZES, feature=feature, rope=None), noise(2, 90, HIDDEN)
    real = (torch.arange(90) >= 20) & (torch.arange(90) < 80)
    found = mixer(x, padded_call(real.expand(2, -1)))[:, real]
    assert (found - by_rows(mixer, x, real)[:, real]).abs().max() < EXACT


@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_second_order_features_give_exp_to_the_second_order(size: int) -> None:
    q, k = noise(40, size), noise(40, size, seed=2)
    phi = FEATURES["taylor2"]
    x = q @ k.T / math.sqrt(size)
    assert phi(q).shape == (40, feature_count("taylor2", size))
    assert (phi(q) @ phi(k).T - (1 + x + x.square() / 2)).abs().max() < EXACT
    # Half of the largest cube at the places in question.
    small = x.abs() < 0.1
    assert ((phi(q) @ phi(k).T - x.exp())[small].abs() < 0.1**3 / 5).all()


@torch.no_grad()
def test_with_small_logits_it_is_near_softmax_and_turns_as_it_does() -> None:
    options: dict[str, Any] = {"heads": HEADS, "head_dim": 8, "rope": {"theta": 100.0}, "qk_norm": True}
    taylor = mixer_of(HIDDEN, "linear_attention", **options)
    softmax = mixer_of(HIDDEN, "attention", **options)
    q, k, v = taylor.qkv_proj.weight.split(HEADS * 8)
    held = {"q_proj.weight": q, "k_proj.weight": k, "v_proj.weight": v, "o_proj.weight": taylor.o_proj.weight}
    held |= {f"{name}_norm.weight": torch.full((8,), 0.3, dtype=torch.float64) for name in "qk"}
    softmax.load_state_dict(held)
    taylor.load_state_dict({name: one for name, one in held.items() if "norm" in name}, strict=False)
    x = noise(2, 60, HIDDEN)
    y, expected = taylor(x, call_at(0, 60)), softmax(x, call_at(0, 60))
    # A logit is at most 0.09 · sqrt(8), and exp there 1 + x + x² / 2 but for 0.3 %.
    assert (y - expected).norm() < 3e-3 * expected.norm()
    turned = taylor(x, call_at(50, 60))
    assert (turned - y).abs().max() < 1e-5


def test_it_holds_and_costs_what_the_papers_say() -> None:
    site = Site(hidden_size=1024)
    # The paper's form, with the heads of attention; and Based's, with keys of 16 dimensions.
    wide, based = LinearAttention(heads=16), LinearAttention(heads=16, head_dim=16, value_dim=64)
    assert wide.params(site) == 4 * 1024**2
    assert wide.state_bytes(site, 1, 2) == 16 * (1 + 64 + 64 * 65 // 2) * 65 * 4
    assert based.state_bytes(site, 9, 2) == 16 * 153 * 65 * 4
    assert based.flops(site, 10**6) == 2 * based.params(site) + 5 * 16 * 153 * 65
    elu = LinearAttention(heads=16, feature="elu")
    assert elu.state_bytes(site, 9, 2) == 16 * 64 * 65 * 4
