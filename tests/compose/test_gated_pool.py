"""Gated pooling is a softmax whose logits are the same in every row, whatever their size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toys import EXACT, call_at, mixer_of, noise, padded_call

HIDDEN, HEADS, SIZE, LENGTH = 24, 3, 10, 150


def by_rows(mixer: object, x: Tensor, seen: Tensor | None = None) -> Tensor:
    """All T x T weights at once.  Shapes:  seen: [T] bool, the tokens that weigh anything"""
    q, k, v = (
        (x @ getattr(mixer, f"{name}_proj").weight.T).view(*x.shape[:2], HEADS, SIZE)
        for name in ("q", "k", "v")
    )
    if mixer.q_norm is not None:
        q, k = (
            one / (one.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
            for one, norm in ((q, mixer.q_norm), (k, mixer.k_norm))
        )
    scores = (q / (1 + torch.exp(-q)) * k).sum(-1) / SIZE**0.5
    logits = scores.transpose(1, 2)[:, :, None].expand(-1, -1, x.shape[1], -1)
    hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    hidden = hidden if seen is None else hidden | ~seen
    p = torch.softmax(logits.masked_fill(hidden, -torch.inf), dim=-1).nan_to_num(0.0)
    o = torch.einsum("bhij,bjhd->bihd", p, v)
    return o.flatten(2) @ mixer.o_proj.weight.T


@torch.no_grad()
@pytest.mark.parametrize("qk_norm", [False, True])
def test_it_equals_all_weights_at_once(qk_norm: bool) -> None:
    mixer = mixer_of(HIDDEN, "gated_pool", heads=HEADS, head_dim=SIZE, qk_norm=qk_norm)
    x = noise(2, LENGTH, HIDDEN)
    assert (mixer(x, call_at(0, LENGTH)) - by_rows(mixer, x)).abs().max() < EXACT


def test_logits_of_thousands_neither_overflow_nor_lose_the_gradient() -> None:
    mixer = mixer_of(HIDDEN, "gated_pool", heads=HEADS, head_dim=SIZE)
    x = 30 * noise(2, LENGTH, HIDDEN)
    y = mixer(x, call_at(0, LENGTH))
    scale = y.abs().max()
    assert (y - by_rows(mixer, x)).abs().max() < EXACT * scale
    y.sum().backward()
    assert all(one.grad is not None and one.grad.isfinite().all() for one in mixer.parameters())


@torch.no_grad()
def test_padding_weighs_nothing_on_either_side() -> None:
    mixer, x = mixer_of(HIDDEN, "gated_pool", heads=HEADS, head_dim=SIZE), noise(2, LENGTH, HIDDEN)
    real = (torch.arange(LENGTH) >= 70) & (torch.arange(LENGTH) < 140)
    found = mixer(x, padded_call(real.expand(2, -1)))[:, real]
    assert (found - by_rows(mixer, x, real)[:, real]).abs().max() < EXACT
