"""Liger: the layer is its formula, token by token, and has the weights of softmax attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import EXACT, call_at, mixer_of, noise

from heddle.specs import Site as SpecSite
from heddle.specs.mixers import Liger

HIDDEN, HEADS, GROUPS, DIM, WINDOW, LENGTH = 48, 4, 2, 8, 7, 80
# Angles of RoPE are float32, and so wrong by a rounding of the last position.
ANGLE = LENGTH * torch.finfo(torch.float32).eps
FIELDS: dict[str, Any] = {"heads": HEADS, "kv_heads": GROUPS, "head_dim": DIM, "window": WINDOW}


def turned(x: Tensor, theta: float) -> Tensor:
    """Pairs (j, j + d/2) turned by position · theta^(-2j/d).  Shapes:  x, out: [B, T, H, d]"""
    low, high = x.chunk(2, dim=-1)
    place = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None]
    angle = place * theta ** (-2 * torch.arange(DIM // 2, dtype=torch.float64) / DIM)
    return torch.cat((low * angle.cos() - high * angle.sin(), high * angle.cos() + low * angle.sin()), dim=-1)


def by_loop(mixer: Any, x: Tensor, share: float, theta: float | None) -> Tensor:
    """Token by token and head by head, from the weights alone."""
    q, k, v = (
        (x @ one.weight.T + (0 if one.bias is None else one.bias)).view(2, LENGTH, -1, DIM)
        for one in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    if not isinstance(mixer.q_norm, nn.Identity):
        q, k = (
            side / (side.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
            for side, norm in ((q, mixer.q_norm), (k, mixer.k_norm))
        )
    near, nearby = (q, k) if theta is None else (turned(q, theta), turned(k, theta))
    outputs = torch.zeros(2, LENGTH, HEADS, DIM, dtype=torch.float64)
    for row in range(2):
        for head in range(HEADS):
            group, state = head // (HEADS // GROUPS), torch.zeros(DIM, DIM, dtype=torch.float64)
            for t in range(LENGTH):
                key, value = k[row, t, group], v[row, t, group]
                decay = (1 / (1 + torch.exp(-key))) ** (1 / 16)
                state = torch.diag(decay) @ state + torch.outer(key.softmax(0), value)
                seen = slice(max(0, t - WINDOW + 1), t + 1)
                logits = nearby[row, seen, group] @ near[row, t, head] / DIM**0.5
                window = logits.softmax(0) @ v[row, seen, group]
                read = q[row, t, head].softmax(0) @ state
                outputs[row, t, head] = share * read + (1 - share) * window
    return outputs.flatten(2) @ mixer.o_proj.weight.T + (
        0 if mixer.o_proj.bias is None else mixer.o_proj.bias
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("share", "theta", "more"),
    [(0.5, 1e4, {}), (0.3, None, {"qk_norm": True, "bias": "all"}), (1.0, None, {"bias": "qkv"})],
    ids=["as published", "normed", "recurrence alone"],
)
def test_it_equals_its_formula(share: float, theta: float | None, more: dict[str, Any]) -> None:
    rope = None if theta is None else {"theta": theta}
    mixer, x = mixer_of(HIDDEN, "liger", **FIELDS, rope=rope, share=share, **more), noise(2, LENGTH, HIDDEN)
    for name, weight in mixer.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight)
    # Keys from those that forget to those that keep.
    nn.init.normal_(mixer.k_proj.weight, std=0.5)
    bound = EXACT if theta is None else ANGLE
    assert (mixer(x, call_at(0, LENGTH)) - by_loop(mixer, x, share, theta)).abs().max() < bound


@torch.no_grad()
def test_it_has_the_weights_of_attention_and_its_window_is_that_attention() -> None:
    softmax = mixer_of(HIDDEN, "attention", **FIELDS)
    mixer, bare = (mixer_of(HIDDEN, "liger", **FIELDS, share=share) for share in (0.5, 1.0))
    for one in (mixer, bare):
        one.load_state_dict(softmax.state_dict())
    x = noise(2, LENGTH, HIDDEN)
    whole, window, recurrence = (one(x, call_at(0, LENGTH)) for one in (mixer, softmax, bare))
    assert (whole - 0.5 * (window + recurrence)).abs().max() < EXACT


@torch.no_grad()
def test_the_recurrence_alone_decodes_as_it_reads_and_keeps_no_keys() -> None:
    mixer, x = mixer_of(HIDDEN, "liger", **FIELDS, share=1.0), noise(2, LENGTH, HIDDEN)
    whole, cache = mixer(x, call_at(0, LENGTH)), mixer.new_cache()
    start = 0
    for end in (3, 70, *range(71, LENGTH + 1)):
        piece = mixer(x[:, start:end], call_at(start, end - start, cache))
        assert (piece - whole[:, start:end]).abs().max() < EXACT
        cache.advance(end - start)
        start = end
    assert cache.tensors().keys() == mixer.filled_cache(2, 9, x).tensors().keys() == {"memory"}


@torch.no_grad()
def test_a_cache_keeps_a_memory_and_the_window_and_cannot_be_cropped() -> None:
    mixer = mixer_of(HIDDEN, "liger", **FIELDS)
    cache = mixer.new_cache()
    mixer(noise(2, 30, HIDDEN), call_at(0, 30, cache))
    cache.advance(30)
    shapes = {name: tuple(held.shape) for name, held in cache.tensors().items()}
    row = (2, GROUPS, WINDOW - 1, DIM)
    assert shapes == {"memory": (2, HEADS, DIM, DIM), "window.keys": row, "window.values": row}
    assert not cache.is_croppable
    with pytest.raises(RuntimeError):
        cache.crop(-1)


def test_it_costs_what_the_sheet_says() -> None:
    # Llama 3 8B: a state of 2 MiB and a ring of 256 KiB a layer; 115 kFLOP a token and head beside the projections, of chunks
    # the causal half, which are counted whole here.
    site = SpecSite(hidden_size=4096)
    spec = Liger.model_validate({"heads": 32, "kv_heads": 8})
    projections = 2 * 4096 * (2 * 4096 + 2 * 1024)
    assert spec.params(site) == projections // 2
    # The own token is no part of the ring.
    assert spec.state_bytes(site, 10_000, 2) == 2 * 2**20 + 2**18 * 63 // 64
    assert (spec.prefill_flops(site, 10**6) - projections) / 32 == pytest.approx(115e3 + 16e3, rel=0.01)
    assert spec.flops(site, 10_000) - projections == 32 * (5 * 128**2 + 4 * 64 * 128)
