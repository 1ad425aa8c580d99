"""ContMix as a mixer: its formula token by token, the convolutions it is made of, padding and costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from toys import EXACT, call_at, mixer_of, noise, padded_call

from heddle.compose.mixers.contmix import ContMixModule
from heddle.compose.modules.running_means import affinities
from heddle.specs import Site as SpecSite
from heddle.specs.mixers.contmix import ContMix

HIDDEN, HEADS, SIZE, QUERY, LENGTH = 12, 2, 4, 3, 71


def ready(**fields: Any) -> ContMixModule:
    sizes = {"heads": HEADS, "head_dim": SIZE, "query_dim": QUERY, "taps": 5, "summaries": 3}
    made = mixer_of(HIDDEN, "contmix", **sizes | fields)
    assert isinstance(made, ContMixModule)
    with torch.no_grad():
        made.tap_bias.normal_(generator=torch.Generator().manual_seed(5))
        made.tap_weight.normal_(generator=torch.Generator().manual_seed(6))
    return made


def by_loop(mixer: ContMixModule, x: Tensor) -> Tensor:
    """Token by token: means by their recurrence, kernels as rows of an explicit matrix of all tokens by all tokens."""
    q, k, v, g = (
        proj(x).unflatten(-1, (HEADS, -1))
        for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj)
    )
    length, rows = x.shape[1], []
    means = [x.new_zeros(len(x), HEADS, QUERY)] * mixer.summaries
    for t in range(length):
        rates = [1 - 2.0**-s for s in range(1, mixer.summaries + 1)]
        means = [g_s * one + (1 - g_s) * k[:, t] for g_s, one in zip(rates, means, strict=True)]
        a = torch.stack([(q[:, t] * one).sum(-1) for one in means], -1) / QUERY**0.5
        w = (torch.einsum("bhs,js->bhj", a, mixer.tap_weight) + mixer.tap_bias).softmax(-1)
        told = torch.zeros_like(v[:, t])
        for j in range(min(t, mixer.reach) + 1):
            if j < w.shape[-1]:
                told = told + w[..., j, None] * v[:, t - j]
            if mixer.static is not None and j < mixer.static.shape[-1]:
                told = told + mixer.static[..., j] * v[:, t - j]
        rows.append(told * F.silu(g[:, t]))
    y: Tensor = mixer.o_proj(torch.stack(rows, 1).flatten(2))
    return y


def in_pieces(mixer: ContMixModule, x: Tensor, ends: list[int], real: Tensor | None = None) -> Tensor:
    cache, pieces, start = mixer.new_cache(), [], 0
    for end in ends:
        call = call_at(start, end - start, cache, rows=len(x))
        call.padding = None if real is None else real[:, start:end]
        pieces.append(mixer(x[:, start:end], call))
        cache.advance(end - start)
        start = end
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize(("taps", "static"), [(5, 5), (1, 0), (3, 7), (6, 2), (1, 1)])
def test_it_equals_its_formula_and_so_do_its_gradients(taps: int, static: int) -> None:
    mixer, x = ready(taps=taps, static_taps=static), noise(2, LENGTH, HIDDEN).requires_grad_()
    inputs, weight = [x, *mixer.parameters()], noise(2, LENGTH, HIDDEN, seed=4)
    y, expected = mixer(x, call_at(0, LENGTH)), by_loop(mixer, x)
    assert (y - expected).abs().max() < EXACT
    found, wanted = (
        torch.autograd.grad((one * weight).sum(), inputs, allow_unused=True) for one in (y, expected)
    )
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one - other).abs().max() < EXACT * max(1.0, other.abs().max())
    for ends in (list(range(1, LENGTH + 1)), [2, 3, 68, 70, LENGTH]):
        assert (in_pieces(mixer, x.detach(), ends) - expected).abs().max() < EXACT


@torch.no_grad()
def test_without_a_context_it_is_a_plain_convolution() -> None:
    mixer, x, seen = ready(static_taps=0), noise(2, LENGTH, HIDDEN), []
    mixer.tap_weight.zero_()
    mixer.heads_out.register_forward_hook(lambda _, __, heads: seen.append(heads))
    mixer(x, call_at(0, LENGTH))
    kernel = mixer.tap_bias.softmax(-1).flip(-1).repeat_interleave(SIZE, 0)[:, None]
    v = F.pad(mixer.v_proj(x).mT, (4, 0))
    expected = F.conv1d(v, kernel, groups=HEADS * SIZE).mT * F.silu(mixer.g_proj(x))
    assert (seen[0].flatten(2) - expected).abs().max() < EXACT


@torch.no_grad()
def test_of_one_tap_it_hands_out_its_values_and_of_more_what_lies_between_them() -> None:
    x, seen = noise(2, LENGTH, HIDDEN), []
    for taps in (1, 5):
        mixer = ready(taps=taps, static_taps=0)
        v = mixer.v_proj(x).unflatten(-1, (HEADS, SIZE))
        mixer.heads_out.register_forward_hook(lambda _, __, heads: seen.append(heads))
        mixer(x, call_at(0, LENGTH))
        y = seen[-1] / F.silu(mixer.g_proj(x)).view_as(v)
        held = F.pad(v, (0, 0, 0, 0, taps - 1, 0)).unfold(1, taps, 1)
        assert (y <= held.amax(-1) + EXACT).all()
        assert (y >= held.amin(-1) - EXACT).all()
        assert taps > 1 or (y - v).abs().max() < EXACT


@torch.no_grad()
def test_far_tokens_have_a_say_in_weights_alone() -> None:
    mixer, x = ready(), noise(2, LENGTH, HIDDEN)
    other = x.clone()
    other[:, 10] = -x[:, 10]
    changed = (mixer(x, call_at(0, LENGTH)) - mixer(other, call_at(0, LENGTH))).abs().amax((0, 2))
    assert changed[:10].max() == 0
    assert changed[10:40].min() > 0
    mixer.tap_weight.zero_()
    changed = (mixer(x, call_at(0, LENGTH)) - mixer(other, call_at(0, LENGTH))).abs().amax((0, 2))
    assert changed[15:].max() == 0


@torch.no_grad()
def test_means_over_chunks_are_those_of_the_recurrence() -> None:
    q, k, means = noise(2, 131, 2, 3), noise(2, 131, 2, 3, seed=2), noise(2, 2, 9, 3, seed=3)
    found, after = affinities(q, k, means)
    rate, expected = 1 - 2.0 ** -torch.arange(1, 10, dtype=torch.float64)[:, None], []
    for t in range(131):
        means = rate * means + (1 - rate) * k[:, t, :, None]
        expected.append((q[:, t, :, None] * means).sum(-1))
    assert (found - torch.stack(expected, 1)).abs().max() < EXACT
    assert (after - means).abs().max() < EXACT


@torch.no_grad()
def test_padding_is_in_no_kernel() -> None:
    mixer, x = ready(), noise(2, 20, HIDDEN)
    real = torch.ones(2, 20, dtype=torch.bool)
    real[0, :7] = False
    for y in (mixer(x, padded_call(real)), in_pieces(mixer, x, [3, 9, 20], real)):
        assert (y[0, 7:] - mixer(x[:1, 7:], call_at(0, 13, rows=1))[0]).abs().max() < EXACT
        assert (y[1] - mixer(x, call_at(0, 20))[1]).abs().max() < EXACT


def test_it_costs_what_its_parts_do() -> None:
    spec, site, D = ContMix(heads=16), SpecSite(1024), 1024
    # Queries and keys of half the size; 16 taps from 8 means, and as many of a fixed kernel for each channel.
    assert spec.params(site) == 4 * D * D + 16 * (8 + 16) + 16 * D
    assert spec.state_bytes(site, 1, 2) == spec.state_bytes(site, 10**6, 2) == 4 * 8 * 512 + 2 * 15 * D
    kernels = 2 * 16 * 8 * 16 + 2 * 32 * D
    assert spec.flops(site, 99) == 2 * 4 * D * D + kernels + 5 * 8 * 512
    assert [one.window for one in spec.sights(site)] == [16, None]
