"""NAtS-L as a mixer: chunk types token by token, their gradients, eviction, padding and costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from toys import EXACT, Largest, call_at, mixer_of, noise, padded_call

from heddle.compose.mixers.nats_l import NatsLModule
from heddle.compose.modules.norm import l2_norm
from heddle.kernels import gated_delta_rule
from heddle.specs import Site as SpecSite
from heddle.specs.mixers.nats_l import NatsL

HIDDEN, HEADS, K, V, SPLIT, CHUNK, LENGTH = 12, 2, 6, 4, 2, 4, 19


def ready(linear: float = 0.0, **fields: Any) -> NatsLModule:
    """`linear` is added to every head's logit of the type linear, through a constant feature of the input."""
    sizes = {"heads": HEADS, "head_dim": K, "value_dim": V, "split": SPLIT, "chunk": CHUNK}
    made = mixer_of(HIDDEN, "nats_l", **sizes | fields)
    assert isinstance(made, NatsLModule)
    with torch.no_grad():
        made.router.weight.normal_(generator=torch.Generator().manual_seed(5))
        made.router.weight[1::2, 0] += linear
    return made


def inputs(length: int = LENGTH) -> Tensor:
    x = noise(2, length, HIDDEN)
    x[..., 0] = 1.0
    return x


def by_loop(mixer: NatsLModule, x: Tensor, gates: Tensor | None = None) -> Tensor:
    """Token by token: explicit lists of keys, a state and the state at its chunk's start. `gates` [B, chunks, H, 2] are m."""
    flat = mixer.conv(mixer.qkv_proj(x), call_at(0, x.shape[1], rows=len(x))).split(mixer.sizes, dim=-1)
    q, k, v = (side.unflatten(-1, (HEADS, -1)) for side in flat)
    q_part, k_part, v_part = (side.unflatten(-1, (HEADS * SPLIT, -1)) for side in flat)
    q_part, k_part = mixer.q_norm(q_part), mixer.k_norm(k_part)
    decay = torch.exp(-torch.exp(mixer.A_log) * F.softplus(mixer.a_proj(x) + mixer.dt_bias))
    beta, (q, k) = torch.sigmoid(mixer.b_proj(x)), (l2_norm(side) for side in (q, k))
    shares = mixer.share_proj(flat[0]).unflatten(-1, (HEADS * SPLIT, 2)).softmax(-1)
    rows = []
    for b in range(len(x)):
        state = start = x.new_zeros(HEADS, K, V)
        faded, kept, told = x.new_ones(HEADS), [[] for _ in range(HEADS)], []
        for t in range(x.shape[1]):
            state, faded = decay[b, t, :, None, None] * state, faded * decay[b, t]
            wrong = v[b, t] - torch.einsum("hk,hkv->hv", k[b, t], state)
            state = state + torch.einsum("hk,hv->hkv", k[b, t], beta[b, t, :, None] * wrong)
            recalled = mixer.norm(
                (torch.einsum("hk,hkv->hv", q[b, t], state) / K**0.5).reshape(HEADS * SPLIT, -1)
            )
            own, read = list(range(t // CHUNK * CHUNK, t + 1)), []
            for part in range(HEADS * SPLIT):
                far = kept[part // SPLIT]
                keys = [j for j, _ in far] + own
                weight = torch.stack([one for _, one in far] + [x.new_tensor(1.0)] * len(own))
                logits = k_part[b, keys, part] @ q_part[b, t, part] / (K // SPLIT) ** 0.5
                p = weight * (logits - logits.max()).exp()
                read.append((p / p.sum()) @ v_part[b, keys, part])
            attended = mixer.norm(torch.stack(read))
            told.append((shares[b, t, :, :1] * recalled + shares[b, t, :, 1:] * attended).flatten())
            if t % CHUNK == CHUNK - 1:
                c = t // CHUNK
                z = mixer.router(x[b, own].mean(0)).view(HEADS, 2)
                m = F.one_hot(z.argmax(-1), 2).to(x.dtype) if gates is None else gates[b, c]
                for h in range(HEADS):
                    if m[h, 0] > 0.5:
                        kept[h] += [(j, m[h, 0]) for j in own]
                undone = faded[:, None, None] * start
                state = start = undone + m[:, 1, None, None] * (state - undone)
                faded = x.new_ones(HEADS)
        rows.append(torch.stack(told))
    y: Tensor = mixer.o_proj(torch.stack(rows) * F.silu(mixer.z_proj(x)))
    return y


def in_pieces(
    mixer: NatsLModule, x: Tensor, ends: list[int], real: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    cache, pieces, start = mixer.new_cache(), [], 0
    for end in ends:
        call = call_at(start, end - start, cache, rows=len(x))
        if real is not None:
            call.padding, call.key_padding = real[:, start:end], real[:, :end]
        pieces.append(mixer(x[:, start:end], call))
        cache.advance(end - start)
        start = end
    return torch.cat(pieces, dim=1), cache.tensors()


class Copies(TorchDispatchMode):
    """Ops that pick numbers by their places, and of whose results one has so many at least."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.names = least, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if str(func).startswith(("aten.gather", "aten.scatter", "aten.where")) and out.numel() >= self.least:
            self.names.add(str(func))
        return out


def routes_of(mixer: NatsLModule, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    hook = mixer.routes_out.register_forward_hook(lambda _, __, out: seen.append(out))
    mixer(x, call_at(0, x.shape[1], rows=len(x)))
    hook.remove()
    return seen[0]


@torch.no_grad()
def test_it_equals_its_formula_at_every_token() -> None:
    mixer, x = ready(), inputs()
    expected, m = by_loop(mixer, x), routes_of(mixer, x)
    # Both types are there in both heads, and none of the chunk that is open.
    assert (m[:, :4].sum((0, 1)) > 0).all()
    assert (m[:, :4].sum(-1) == 1).all()
    assert (m[:, 4:] == 0).all()
    assert (mixer(x, call_at(0, LENGTH)) - expected).abs().max() < EXACT
    # Calls that begin and end amid a chunk or with one.
    for ends in (list(range(1, LENGTH + 1)), [2, 3, 4, 11, 16, LENGTH], [8, LENGTH], [3, 17, LENGTH]):
        assert (in_pieces(mixer, x, ends)[0] - expected).abs().max() < EXACT


@pytest.mark.parametrize("length", [LENGTH, 4 * CHUNK])
def test_gradients_are_those_of_the_formula_and_routes_have_those_of_a_weight(length: int) -> None:
    mixer, x, weight = ready().train(), inputs(length), noise(2, length, HIDDEN, seed=4)
    m = routes_of(mixer, x).detach()[:, :4]
    others = [one for name, one in mixer.named_parameters() if name != "router.weight"]
    leaf = m.clone().requires_grad_()
    *expected, wanted = torch.autograd.grad((by_loop(mixer, x, leaf) * weight).sum(), [*others, leaf])
    *found, router = torch.autograd.grad(
        (mixer(x, call_at(0, length)) * weight).sum(), [*others, mixer.router.weight]
    )
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < EXACT * max(1.0, other.abs().max())
    # Straight through to the softmax over types, from the chosen one alone.
    again = mixer.router.weight.detach().clone().requires_grad_()
    means = x[:, : 4 * CHUNK].unflatten(1, (4, CHUNK)).mean(2)
    p = F.linear(means, again).unflatten(-1, (HEADS, 2)).softmax(-1)
    (told,) = torch.autograd.grad((p * wanted * m).sum(), again)
    assert (told - router).abs().max() < EXACT * max(1.0, told.abs().max())
    assert told.abs().max() > 1e-3


def of_one_type(mixer: NatsLModule, x: Tensor, *, softmax: bool) -> Tensor:
    """All chunks remembered by attention, beside a memory of the own chunk; or by Gated DeltaNet, beside attention to it."""
    length = x.shape[1]
    flat = mixer.conv(mixer.qkv_proj(x), call_at(0, length, rows=len(x))).split(mixer.sizes, dim=-1)
    q, k, v = (side.unflatten(-1, (HEADS, -1)) for side in flat)
    gates = (-mixer.A_log.exp() * F.softplus(mixer.a_proj(x) + mixer.dt_bias), mixer.b_proj(x).sigmoid())
    sides = [one.split(CHUNK if softmax else length, dim=1) for one in (l2_norm(q), l2_norm(k), v, *gates)]
    recalled = torch.cat([gated_delta_rule(*part)[0] for part in zip(*sides, strict=True)], dim=1)
    q, k, v = (side.unflatten(-1, (HEADS * SPLIT, -1)) for side in flat)
    q, k, v = (side.transpose(1, 2) for side in (mixer.q_norm(q), mixer.k_norm(k), v))
    place = torch.arange(length)
    seen = (place <= place[:, None]) & (softmax | (place // CHUNK == place[:, None] // CHUNK))
    attended = F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2)
    recalled, attended = mixer.norm(recalled.reshape_as(attended)), mixer.norm(attended)
    shares = mixer.share_proj(flat[0]).unflatten(-1, (HEADS * SPLIT, 2)).softmax(-1)
    told = shares[..., :1] * recalled + shares[..., 1:] * attended
    y: Tensor = mixer.o_proj(told.flatten(2) * F.silu(mixer.z_proj(x)))
    return y


@pytest.mark.parametrize("softmax", [True, False])
def test_all_of_one_type_is_dense_attention_or_gated_deltanet(softmax: bool) -> None:
    mixer, x = ready(-99.0 if softmax else 99.0), inputs()
    weight = noise(2, LENGTH, HIDDEN, seed=4)
    others = [one for name, one in mixer.named_parameters() if name != "router.weight"]
    results = []
    for y in (mixer(x, call_at(0, LENGTH)), of_one_type(mixer, x, softmax=softmax)):
        results.append((y.detach(), *torch.autograd.grad((y * weight).sum(), others)))
    for found, expected in zip(*results, strict=True):
        assert (found - expected).abs().max() < EXACT * max(1.0, expected.abs().max())
    with torch.no_grad():
        for ends in (list(range(1, LENGTH + 1)), [3, 17, LENGTH]):
            assert (in_pieces(mixer, x, ends)[0] - results[1][0]).abs().max() < EXACT


def test_of_equal_types_softmax_is_chosen_and_told() -> None:
    mixer, x = ready().train(), inputs(4 * CHUNK)
    with torch.no_grad():
        # All logits are one number, through the constant feature.
        mixer.router.weight.zero_()[:, 0] = 3.0
    m = routes_of(mixer, x)
    assert torch.equal(m.detach(), torch.tensor([1.0, 0.0]).to(m).expand_as(m))
    call = call_at(0, 4 * CHUNK)
    y = mixer(x, call)
    assert {name: value.item() for name, value, _ in call.losses}["nats_l_share"] == 1.0
    assert (y - of_one_type(mixer, x, softmax=True)).abs().max() < EXACT
    assert (in_pieces(mixer.eval(), x, list(range(1, 4 * CHUNK + 1)))[0] - y).abs().max() < EXACT


def test_whole_chunks_are_not_picked_out_and_memory_grows_with_tokens_alone() -> None:
    length, chunk, width = 16_384, 64, HEADS * (2 * K + V)
    mixer = ready(chunk=chunk).to("meta").train()
    x = torch.empty(1, length, HIDDEN, device="meta", dtype=torch.float64, requires_grad=True)
    with Largest() as most, Copies(length * HEADS * V) as copies:
        y = mixer(x, call_at(0, length, rows=1))
        torch.autograd.grad(y.sum(), [x, *mixer.parameters()])
    # Products of two tokens of a chunk are the largest there are; a gate a token and chunk would be as many again.
    assert most.numbers <= length * max(width, 2 * HEADS * chunk)
    assert not copies.names


@torch.no_grad()
def test_the_cache_drops_what_no_head_keeps_and_tells_the_same() -> None:
    x = inputs()
    for linear, kept in ((99.0, 0), (-99.0, 4)):
        mixer = ready(linear)
        whole = mixer(x, call_at(0, LENGTH))
        for ends in (list(range(1, LENGTH + 1)), [9, LENGTH]):
            y, held = in_pieces(mixer, x, ends)
            assert (y - whole).abs().max() < EXACT
            assert held["types"].shape[2] == kept
            assert held["keys"].shape[2] == held["written"].shape[2] == kept * CHUNK + LENGTH % CHUNK
    mixer = ready()
    m = routes_of(mixer, x[:1])[0, :4, :, 0]
    _, held = in_pieces(mixer, x[:1], [7, LENGTH])
    assert held["types"].shape[2] == int(m.any(-1).sum()) < 4 or bool(m.any(-1).all())


@torch.no_grad()
def test_padding_shifts_the_chunks_of_its_row() -> None:
    mixer, x = ready(), inputs()
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, :7] = False
    alone, other = mixer(x[:1, 7:], call_at(0, LENGTH - 7, rows=1)), mixer(x, call_at(0, LENGTH))
    ends = [3, 9, 12, *range(13, LENGTH + 1)]
    for y in (mixer(x, padded_call(real)), in_pieces(mixer, x, ends, real)[0]):
        assert (y[:1, 7:] - alone).abs().max() < EXACT
        assert (y[1] - other[1]).abs().max() < EXACT


@torch.no_grad()
def test_training_tells_the_share_of_softmax_and_asks_for_a_budget() -> None:
    mixer, x = ready(budget=0.25, budget_factor=0.5), inputs()
    share = routes_of(mixer, x)[:, :4, :, 0].mean().item()
    call = call_at(0, LENGTH)
    mixer(x, call)
    assert call.losses == []
    for length, expected in ((LENGTH, share), (CHUNK - 1, 0.0)):
        call = call_at(0, length)
        mixer.train()(x[:, :length], call)
        told = {name: (value.item(), factor) for name, value, factor in call.losses}
        assert told["nats_l_share"] == (pytest.approx(expected), 0.0)
        assert told["nats_l_budget"] == (pytest.approx((expected - 0.25) ** 2), 0.5)


@pytest.mark.parametrize("linear", [-4.0, 4.0])
def test_training_on_the_budget_alone_reaches_it(linear: float) -> None:
    # From all chunks of one type: those that are linear hear of it as well.
    mixer, x = ready(linear, budget=0.5).train(), inputs(400)
    optimizer = torch.optim.SGD(mixer.router.parameters(), lr=3.0)
    for _ in range(300):
        call = call_at(0, 400)
        mixer(x, call)
        losses = {name: value for name, value, _ in call.losses}
        optimizer.zero_grad()
        losses["nats_l_budget"].backward()
        optimizer.step()
    assert losses["nats_l_share"].item() == pytest.approx(0.5, abs=0.1)


def test_it_costs_what_its_parts_do() -> None:
    # The 340M model of the paper: D 1024, 6 heads of 128 and 256, each split in two.
    spec, site, D = NatsL(heads=6, head_dim=128, value_dim=256), SpecSite(1024), 1024
    key, value = 6 * 128, 6 * 256
    weights = D * (2 * key + 3 * value + 4 * 6) + key * 24
    assert spec.params(site) == weights + 4 * (2 * key + value) + 12 + 2 * 64 + 128
    grown = spec.state_bytes(site, 65_536, 2) - spec.state_bytes(site, 1, 2)
    # 4,608 bytes a token in bfloat16, a mark, and a type of each head for 64 tokens.
    assert grown == 65_535 * 4609 + 1024 * 6 * 4
    assert spec.flops(site, 101) - spec.flops(site, 100) == 2 * (key + value)
    problems = NatsL(heads=2, head_dim=6, value_dim=9).problems(site)
    assert [(one.field, one.hint) for one in problems] == [("split", "1 or 3 do")]
