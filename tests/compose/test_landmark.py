"""Landmark attention as a mixer: its formula token by token, retrieval, padding, cache and costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys import EXACT, Largest, call_at, mixer_of, noise, padded_call

from heddle.compose.cache import cache_bytes
from heddle.compose.host_cache import FEW, in_host_memory
from heddle.compose.mixers.landmark import LandmarkModule
from heddle.specs import Site as SpecSite
from heddle.specs.mixers.landmark import Landmark

HIDDEN, HEADS, KV, SIZE, BLOCK, LENGTH = 12, 4, 2, 6, 3, 11


def ready(top: int | None = None, rope: Any = None) -> LandmarkModule:
    made = mixer_of(
        HIDDEN, "landmark", heads=HEADS, kv_heads=KV, head_dim=SIZE, rope=rope, block=BLOCK, top=top
    )
    assert isinstance(made, LandmarkModule)
    return made


def by_loop(mixer: LandmarkModule, x: Tensor, top: int | None) -> Tensor:
    """The paper's groups for every token and head, without positions."""
    q, k, v, marks = (
        proj(x).unflatten(-1, (-1, SIZE))
        for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.landmark_proj)
    )
    out = torch.zeros_like(q)
    for b, t, h in ((b, t, h) for b in range(len(x)) for t in range(x.shape[1]) for h in range(HEADS)):
        n, own = h // (HEADS // KV), t // BLOCK * BLOCK
        blocks = {c: marks[b, c * BLOCK : (c + 1) * BLOCK, n].mean(0) for c in range(t // BLOCK)}
        logit = {c: q[b, t, h] @ one / SIZE**0.5 for c, one in blocks.items()}
        read = sorted(logit, key=lambda c: -float(logit[c].detach()))[:top]
        gates = torch.stack(
            [q[b, t, h] @ k[b, j, n] / SIZE**0.5 for j in range(own, t + 1)] + [logit[c] for c in read]
        ).softmax(0)
        out[b, t, h] = gates[: t + 1 - own] @ v[b, own : t + 1, n]
        for c, gate in zip(read, gates[t + 1 - own :], strict=True):
            rows = slice(c * BLOCK, (c + 1) * BLOCK)
            out[b, t, h] += gate * ((k[b, rows, n] @ q[b, t, h] / SIZE**0.5).softmax(0) @ v[b, rows, n])
    y: Tensor = mixer.o_proj(out.flatten(2))
    return y


def in_pieces(mixer: LandmarkModule, x: Tensor, ends: list[int], real: Tensor | None = None) -> Tensor:
    cache, pieces, start = mixer.new_cache(), [], 0
    for end in ends:
        call = call_at(start, end - start, cache, rows=len(x))
        if real is not None:
            call = padded_call(real[:, :end])
            call.positions, call.padding, call.cache = call.positions[:, start:], real[:, start:end], cache
        pieces.append(mixer(x[:, start:end], call))
        cache.advance(end - start)
        start = end
    return torch.cat(pieces, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("top", [None, 1, 2, 99])
def test_it_equals_its_formula_at_every_token(top: int | None) -> None:
    mixer, x = ready(top), noise(2, LENGTH, HIDDEN)
    expected = by_loop(mixer, x, top)
    assert (mixer(x, call_at(0, LENGTH)) - expected).abs().max() < EXACT
    for ends in (list(range(1, LENGTH + 1)), [2, 3, 8, 9, LENGTH]):
        assert (in_pieces(mixer, x, ends) - expected).abs().max() < EXACT


def test_its_gradients_are_those_of_the_formula() -> None:
    mixer, x, weight = ready(), noise(2, LENGTH, HIDDEN).requires_grad_(), noise(2, LENGTH, HIDDEN, seed=4)
    inputs = [x, *mixer.parameters()]
    expected = torch.autograd.grad((by_loop(mixer, x, None) * weight).sum(), inputs)
    found = torch.autograd.grad((mixer.train()(x, call_at(0, LENGTH)) * weight).sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < EXACT


@torch.no_grad()
def test_evaluation_with_room_for_all_blocks_is_the_training_form() -> None:
    x = noise(2, LENGTH, HIDDEN)
    trained = ready(1).train()(x, call_at(0, LENGTH))
    assert torch.equal(ready(LENGTH // BLOCK)(x, call_at(0, LENGTH)), trained)
    assert (ready(1)(x, call_at(0, LENGTH)) - trained).abs().max() > 1e-3


@torch.no_grad()
def test_blocks_count_real_tokens() -> None:
    mixer, x = ready(1, rope={"theta": 500.0, "fraction": 1.0}), noise(2, LENGTH, HIDDEN)
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, :4] = False
    alone = [mixer(x[:1, 4:], call_at(0, LENGTH - 4, rows=1)), mixer(x[1:], call_at(0, LENGTH, rows=1))]
    found = [mixer(x, padded_call(real))]
    found += [in_pieces(mixer, x, ends, real) for ends in (list(range(1, LENGTH + 1)), [2, 6, 8, LENGTH])]
    for y in found:
        assert y.isfinite().all()
        assert (y[0, 4:] - alone[0][0]).abs().max() < EXACT
        assert (y[1] - alone[1][0]).abs().max() < EXACT
    right = real.flip(1)
    y = mixer(x, padded_call(right))
    assert (y[0, : LENGTH - 4] - mixer(x, call_at(0, LENGTH))[0, : LENGTH - 4]).abs().max() < EXACT


def offloading(top: int | None) -> LandmarkModule:
    made = mixer_of(
        HIDDEN, "landmark", heads=HEADS, kv_heads=KV, head_dim=SIZE, rope={"theta": 500.0, "fraction": 1.0},
        qk_norm=True, block=BLOCK, top=top, offload=True,
    )  # fmt: skip
    assert isinstance(made, LandmarkModule)
    return made


@torch.no_grad()
@pytest.mark.parametrize("top", [None, 2])
@pytest.mark.parametrize("padded", [0, 7])
def test_blocks_in_host_memory_change_nothing(top: int | None, padded: int) -> None:
    mixer, length = offloading(top), 40
    x, real = noise(2, length, HIDDEN), torch.ones(2, length, dtype=torch.bool)
    real[0, :padded] = False
    whole = mixer(x, padded_call(real))
    # Steps, few tokens that choose, and many that read all; the first ones are padding in one row.
    for ends in ([9, 20, *range(21, length + 1)], [*range(1, 30), 34, length], [3, 8, 16, 36, 39, length]):
        y = in_pieces(mixer, x, ends, real if padded else None)
        assert (y[real] - whole[real]).abs().max() < EXACT


@torch.no_grad()
def test_a_cache_in_host_memory_moves_with_its_rows_and_is_counted_apart() -> None:
    mixer, x = offloading(2), noise(2, 40, HIDDEN)
    cache, spec = (
        mixer.new_cache(),
        Landmark(heads=HEADS, kv_heads=KV, head_dim=SIZE, block=BLOCK, top=2, offload=True),
    )
    for start, end in ((0, 24), (24, 29), (29, 30)):
        mixer(x[:, start:end], call_at(start, end - start, cache))
        cache.advance(end - start)
        held = cache.tensors()
        host = sum(one.nbytes for name, one in held.items() if ".host_" in name)
        assert host == 2 * spec.host_bytes(SpecSite(HIDDEN), end, 8)
        assert held["tokens.keys"].shape[2] < 2 * BLOCK + FEW
    # The open sum is float64 here, and counted as float32.
    site, total = SpecSite(HIDDEN), cache_bytes([cache]) - cache.tensors()["open"].nbytes // 2
    assert 0 < host < total == 2 * spec.state_bytes(site, 30, 8)
    assert Landmark(heads=HEADS).host_bytes(site, 10_000, 2) == 0
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([2, 1, 0, 3]))
    x = x.repeat_interleave(2, dim=0)[[2, 1, 0, 3]]
    for t in range(30, 36):
        found = mixer(x[:, t : t + 1], call_at(t, 1, cache, rows=4))
        cache.advance(1)
        assert (found - mixer(x[:, : t + 1], call_at(0, t + 1, rows=4))[:, -1:]).abs().max() < EXACT
    part = cache.parts["tokens"]
    kept, before = part.update(x.new_zeros(4, KV, 0, SIZE), x.new_zeros(4, KV, 0, SIZE))[0], part.tokens
    part.crop(5)
    assert torch.equal(
        part.update(x.new_zeros(4, KV, 0, SIZE), x.new_zeros(4, KV, 0, SIZE))[0], kept[:, :, :-5]
    )
    assert part.tokens == before - 5
    cache.reset()
    assert cache_bytes([cache]) == 0


@torch.no_grad()
def test_a_filled_cache_in_host_memory_repeats_its_step() -> None:
    mixer, x = offloading(2), noise(3, 1, HIDDEN)
    cache = mixer.filled_cache(3, 40, x)
    told = [mixer(x, call_at(40, 1, cache, rows=3)) for _ in range(2)]
    assert torch.equal(*told)
    assert cache.tensors()["tokens.host_keys"].shape[2] == in_host_memory(41, BLOCK) > 0


def test_no_table_of_all_tokens_by_all_tokens_is_made() -> None:
    length = 1024
    mixer = mixer_of(8, "landmark", heads=1, block=16, top=2).float()
    x = noise(1, length, 8).float().requires_grad_()
    with Largest() as seen:
        mixer(x, call_at(0, length, rows=1)).sum().backward()
    assert seen.numbers < length * length / 8


def test_it_costs_what_its_parts_do() -> None:
    # D 2048, 16 heads of 128, 4 key heads: attention and one more projection of the keys' size.
    spec, site, D = Landmark(heads=16, kv_heads=4), SpecSite(2048), 2048
    weights = 2 * D * D + 3 * D * 512
    assert spec.params(site) == weights
    # Keys and values, a landmark for 64 tokens, a sum with its count.
    assert spec.state_bytes(site, 65_536, 2) == 2 * 512 * (2 * 65_536 + 1024) + 4 * 4 * 129
    # After 65,536 others a token is the first of its block: 32 blocks of 64 are read, and 1,024 landmarks.
    assert spec.flops(site, 65_536) == 2 * weights + 4 * D * (32 * 64 + 1) + 2 * D * 1024
    assert spec.read_bytes(site, 65_536, 2) == 2 * 512 * (2 * 32 * 64 + 1024) + 4 * 4 * 129
    assert Landmark(heads=16, top=None).flops(site, 129) == 2 * 5 * D * D + 4 * D * 130 + 2 * D * 2
