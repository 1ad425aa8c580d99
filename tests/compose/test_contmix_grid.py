"""ContMix on images: its formula place by place, what it is made of, padding, costs and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from toys import EXACT, call_at, mixer_of, noise, padded_call

from heddle.compose.mixers.contmix import ContMixModule
from heddle.compose.modules.canvas import Canvas
from heddle.errors import HeddleError
from heddle.specs import Site as SpecSite
from heddle.specs.mixers.contmix import ContMix

HIDDEN, HEADS, SIZE, QUERY, WIDTH, REGIONS = 12, 2, 5, 3, 4, 2


def ready(**fields: Any) -> ContMixModule:
    sizes = {"heads": HEADS, "head_dim": SIZE, "query_dim": QUERY, "taps": 3, "summaries": REGIONS}
    made = mixer_of(HIDDEN, "contmix", **{**sizes, "grid": {"width": WIDTH, "small_taps": 1}, **fields})
    assert isinstance(made, ContMixModule)
    with torch.no_grad():
        made.tap_bias.normal_(generator=torch.Generator().manual_seed(5))
        made.tap_weight.normal_(generator=torch.Generator().manual_seed(6))
    return made


def by_loop(mixer: ContMixModule, x: Tensor) -> Tensor:
    """Place by place: means over the tokens that lie in each region, and sums over those that lie in each square."""
    q, k, v, g = (
        proj(x).unflatten(-1, (HEADS, -1))
        for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj)
    )
    length, small = x.shape[1], mixer.grid["small_taps"]
    high, means, rows = -(-length // WIDTH), [], []
    for i, j in ((i, j) for i in range(REGIONS) for j in range(REGIONS)):
        inside = [
            t
            for t in range(length)
            if i * high // REGIONS <= t // WIDTH < -(-(i + 1) * high // REGIONS)
            and j * WIDTH // REGIONS <= t % WIDTH < -(-(j + 1) * WIDTH // REGIONS)
        ]
        means.append(k[:, inside].mean(1) if inside else torch.zeros_like(k[:, 0]))
    for t in range(length):
        a = torch.stack([(q[:, t] * one).sum(-1) for one in means], -1) / QUERY**0.5
        w = torch.einsum("bhs,js->bhj", a, mixer.tap_weight) + mixer.tap_bias
        parts = (w[..., : mixer.taps**2].softmax(-1), w[..., mixer.taps**2 :].softmax(-1))
        told = torch.zeros_like(v[:, t])
        for n, row, column in ((n, n // WIDTH, n % WIDTH) for n in range(length)):
            away = (row - t // WIDTH, column - t % WIDTH)

            def tap(side: int, away: tuple[int, int] = away) -> int | None:
                down, right = (one + side // 2 for one in away)
                return down * side + right if 0 <= down < side and 0 <= right < side else None

            half = SIZE // 2
            for part, side, of in zip(
                parts, (mixer.taps, small), (slice(half), slice(half, None)), strict=True
            ):
                at = tap(side)
                if at is not None:
                    told[..., of] = told[..., of] + part[..., at, None] * v[:, n][..., of]
            at = tap(mixer.static_taps)
            if mixer.static is not None and at is not None:
                told = told + mixer.static[..., at] * v[:, n]
        rows.append(told * F.silu(g[:, t]))
    y: Tensor = mixer.o_proj(torch.stack(rows, 1).flatten(2))
    return y


@pytest.mark.parametrize(("taps", "small", "static"), [(3, 1, None), (5, 3, 1), (1, 1, 0)])
@pytest.mark.parametrize("length", [1, 3, 12, 18])
def test_it_equals_its_formula_and_so_do_its_gradients(
    length: int, taps: int, small: int, static: int | None
) -> None:
    mixer = ready(taps=taps, static_taps=static, grid={"width": WIDTH, "small_taps": small})
    x, weight = noise(2, length, HIDDEN).requires_grad_(), noise(2, length, HIDDEN, seed=4)
    inputs = [x, *mixer.parameters()]
    y, expected = mixer(x, call_at(0, length)), by_loop(mixer, x)
    assert (y - expected).abs().max() < EXACT
    found, wanted = (
        torch.autograd.grad((one * weight).sum(), inputs, allow_unused=True, materialize_grads=True)
        for one in (y, expected)
    )
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() < EXACT * max(1.0, other.abs().max())


def test_regions_are_those_of_adaptive_pooling() -> None:
    image, weight = noise(2, 9, 7, 4), torch.ones(2, 9, 7, 1, dtype=torch.float64)
    for regions in (1, 2, 7, 11):
        found = Canvas(7, 63, None, None).region_means(image, weight, regions)
        expected = F.adaptive_avg_pool2d(image.permute(0, 3, 1, 2), regions).flatten(2).mT
        assert (found - expected).abs().max() < EXACT


@torch.no_grad()
def test_without_a_context_it_is_a_plain_convolution_over_the_image() -> None:
    mixer, x, seen = ready(static_taps=0), noise(2, 20, HIDDEN), []
    mixer.tap_weight.zero_()
    mixer.heads_out.register_forward_hook(lambda _, __, heads: seen.append(heads))
    mixer(x, call_at(0, 20))
    v = mixer.v_proj(x).unflatten(-1, (HEADS, SIZE))
    image = v.unflatten(1, (5, WIDTH)).permute(0, 3, 4, 1, 2)
    half, told = SIZE // 2, v.clone()
    kernel = mixer.tap_bias[:, :9].softmax(-1).view(HEADS, 1, 3, 3).repeat_interleave(half, 0)
    large = F.conv2d(image[:, :, :half].flatten(1, 2), kernel, padding=1, groups=HEADS * half)
    told[..., :half] = large.unflatten(1, (HEADS, half)).permute(0, 3, 4, 1, 2).flatten(1, 2)
    expected = told * F.silu(mixer.g_proj(x)).view_as(told)
    assert (seen[0] - expected).abs().max() < EXACT


@torch.no_grad()
def test_padding_is_in_no_kernel_and_no_region() -> None:
    mixer, x = ready(), noise(3, 20, HIDDEN)
    real = torch.ones(3, 20, dtype=torch.bool)
    real[0, :7], real[1, 9:] = False, False
    y = mixer(x, padded_call(real))
    assert y.isfinite().all()
    assert (y[0, 7:] - mixer(x[:1, 7:], call_at(0, 13, rows=1))[0]).abs().max() < EXACT
    assert (y[1, :9] - mixer(x[1:2, :9], call_at(0, 9, rows=1))[0]).abs().max() < EXACT
    assert (y[2] - mixer(x, call_at(0, 20, rows=3))[2]).abs().max() < EXACT


@torch.no_grad()
def test_what_is_not_written_is_heard_by_itself_alone() -> None:
    mixer, x, call = ready(), noise(2, 12, HIDDEN), call_at(0, 12)
    call.written = torch.ones(2, 12)
    call.written[:, 5] = 0.0
    other = x.clone()
    other[:, 5] += 1.0
    changed = (mixer(x, call) - mixer(other, call)).abs().amax((0, 2))
    assert changed[5] > 0
    assert changed[:5].max() == changed[6:].max() == 0


def test_it_costs_what_its_parts_do_and_keeps_nothing() -> None:
    D, grid = 1024, {"width": 32, "small_taps": 5}
    spec, site = ContMix.model_validate({"heads": 16, "taps": 7, "summaries": 7, "grid": grid}), SpecSite(D)
    # Two kernels of 49 and 25 taps from 49 means, and one of 49 for each channel.
    assert spec.params(site) == 4 * D * D + 74 * (49 + 16) + 49 * D
    mixed = 16 * 49 * 74 + (49 + 25) * D // 2 + 49 * D
    assert spec.prefill_flops(site, 1024) == 2 * (4 * D * D + mixed) + 2 * 512 * 50
    assert spec.state_bytes(site, 99, 2) == 0
    assert [one.is_causal for one in spec.sights(site)] == [False]


def test_what_has_no_middle_is_refused() -> None:
    def told(**fields: Any) -> list[tuple[str, str]]:
        spec = ContMix.model_validate({"heads": 4, "grid": {"width": 4}, "taps": 7, **fields})
        return [(one.field, one.hint or "") for one in spec.problems(SpecSite(64))]

    assert told() == []
    assert told(taps=8) == [("taps", "7 or 9")]
    assert told(static_taps=4) == [("static_taps", "3 or 5")]
    assert told(grid={"width": 4, "small_taps": 2}) == [("grid.small_taps", "1 or 3")]
    assert told(head_dim=1) == [("head_dim", "a head_dim of at least 2")]
    mixer, cache = ready(), ready().new_cache()
    cache.advance(3)
    with pytest.raises(HeddleError, match="cannot go on from a cache"):
        mixer(noise(2, 3, HIDDEN), call_at(3, 3, cache))
