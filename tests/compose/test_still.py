"""STILL as a mixer: its formula token by token, what is chosen, its limits, padding, memory and costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys import EXACT, call_at, mixer_of, noise, padded_call

from heddle.compose.mixers.still import StillModule
from heddle.compose.modules import stretches
from heddle.search.peak import peak_bytes
from heddle.specs import Site as SpecSite
from heddle.specs.mixers.still import Still

HIDDEN, HEADS, KV, SIZE, CHUNK, KEEP, LENGTH = 12, 4, 2, 6, 4, 1, 27


def ready(**fields: Any) -> StillModule:
    sizes = {"heads": HEADS, "kv_heads": KV, "head_dim": SIZE, "chunk": CHUNK, "keep": KEEP, "features": 5}
    made = mixer_of(HIDDEN, "still", **{"rope": None, **sizes, **fields})
    assert isinstance(made, StillModule)
    # Keys begin with the map of their queries; a copy would hide that one stands where the other belongs.
    with torch.no_grad():
        for one in made.maps.parameters():
            one.normal_(generator=torch.Generator().manual_seed(one.numel() + len(one)))
        made.maps.k_weight.mul_(0.3)
    return made


def features(x: Tensor, reflection: Tensor, weight: Tensor) -> Tensor:
    """Of one vector of one head."""
    turned = x - 2 * reflection * (reflection @ x) / (reflection @ reflection)
    z = weight.T @ turned
    z = z * (x @ x).sqrt() / (z @ z).sqrt()
    return torch.cat((z.softmax(0), (-z).softmax(0)))


def sorted_out(p: Tensor, keep: int) -> dict[int, list[int]]:
    """The tokens of each complete chunk that stay keys.  Shapes:  p: [T]"""
    ends = range(CHUNK, len(p) + 1, CHUNK)
    return {
        end // CHUNK - 1: sorted(range(end - CHUNK, end), key=lambda j: (-float(p[j]), -j))[:keep]
        for end in ends
    }


def by_loop(mixer: StillModule, x: Tensor) -> Tensor:
    """Every token and head over explicit lists of keys and of folded tokens, without positions."""
    q, k, v, g = (
        proj(x).unflatten(-1, (-1, SIZE)) for proj in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.g_proj)
    )
    maps, per, length = mixer.maps, HEADS // mixer.stores, x.shape[1]
    s = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(HEADS // KV, dim=2)) / SIZE**0.5
    p = torch.zeros(len(x), HEADS, length, dtype=x.dtype)
    for t in range(length):
        p[:, :, t] = s[:, :, t, max(0, t - CHUNK + 1) : t + 1].softmax(-1)[..., -1]
    p = p.unflatten(1, (-1, per)).mean(2)
    out = torch.zeros_like(q)
    for b, h in ((b, h) for b in range(len(x)) for h in range(HEADS)):
        n, store = h // (HEADS // KV), h // per
        salient = sorted_out(p[b, store].detach(), mixer.form.keep)
        phi_q = [features(q[b, t, h], maps.q_reflection[h], maps.q_weight[h]) for t in range(length)]
        phi_k = [features(k[b, j, n], maps.k_reflection[store], maps.k_weight[store]) for j in range(length)]
        for t in range(length):
            near = [j for j in range(t + 1) if j // CHUNK >= t // CHUNK - 1]
            far = [j for c in range(t // CHUNK - 1) for j in salient[c]]
            folded = sorted(set(range(t + 1)) - {*near, *far})
            # Every token counts exactly once.
            assert sorted(near + far + folded) == list(range(t + 1))
            logits = s[b, h, t, far + near]
            e = (logits - logits.max()).exp()
            total, told = e.sum(), e @ v[b, far + near, n]
            if folded:
                similar = torch.stack([phi_q[t] @ phi_k[j] for j in folded])
                told = told + g[b, t, h].sigmoid() * (similar @ v[b, folded, n])
                total = total + similar.sum()
            out[b, t, h] = told / total
    y: Tensor = mixer.o_proj(out.flatten(2))
    return y


def in_pieces(mixer: StillModule, x: Tensor, ends: list[int], real: Tensor | None = None) -> Tensor:
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
@pytest.mark.parametrize("chosen_by", ["head", "group"])
@pytest.mark.parametrize("keep", [0, 1, 3])
def test_it_equals_its_formula_at_every_token(chosen_by: str, keep: int) -> None:
    mixer, x = ready(chosen_by=chosen_by, keep=keep), noise(2, LENGTH, HIDDEN)
    expected = by_loop(mixer, x)
    assert (mixer(x, call_at(0, LENGTH)) - expected).abs().max() < EXACT
    for ends in (list(range(1, LENGTH + 1)), [2, 3, 8, 9, 24, LENGTH]):
        assert (in_pieces(mixer, x, ends) - expected).abs().max() < EXACT
    for length in (1, CHUNK - 1, 2 * CHUNK):
        found = mixer(x[:, :length], call_at(0, length))
        assert (found - expected[:, :length]).abs().max() < EXACT


@pytest.mark.parametrize("chosen_by", ["head", "group"])
def test_its_gradients_are_those_of_the_formula(chosen_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x, weight = (
        ready(chosen_by=chosen_by),
        noise(2, LENGTH, HIDDEN).requires_grad_(),
        noise(2, LENGTH, HIDDEN, seed=4),
    )
    inputs = [x, *mixer.parameters()]
    expected = torch.autograd.grad((by_loop(mixer, x) * weight).sum(), inputs)
    # In one part, and in parts that are worked out again.
    for chunks in (99, 2):
        monkeypatch.setattr("heddle.compose.modules.salient.CHUNKS", chunks)
        found = torch.autograd.grad((mixer.train()(x, call_at(0, LENGTH)) * weight).sum(), inputs)
        for one, other in zip(found, expected, strict=True):
            assert (one - other).abs().max() < EXACT * max(1.0, other.abs().max())


@torch.no_grad()
def test_who_keeps_every_token_is_softmax_attention() -> None:
    mixer, x = ready(keep=CHUNK, rope={"theta": 500.0}, qk_norm=True), noise(2, LENGTH, HIDDEN)
    dense = mixer_of(
        HIDDEN,
        "attention",
        heads=HEADS,
        kv_heads=KV,
        head_dim=SIZE,
        rope={"theta": 500.0},
        qk_norm=True,
    )
    dense.load_state_dict(
        {name: one for name, one in mixer.state_dict().items() if name in dense.state_dict()}
    )
    expected = dense(x, call_at(0, LENGTH))
    assert (mixer(x, call_at(0, LENGTH)) - expected).abs().max() < EXACT
    assert (in_pieces(mixer, x, list(range(1, LENGTH + 1))) - expected).abs().max() < EXACT
    # So are two chunks, whatever stays.
    few = ready(rope={"theta": 500.0}, qk_norm=True)
    few.load_state_dict(mixer.state_dict())
    apart = (few(x, call_at(0, LENGTH)) - expected).abs().amax((0, 2))
    assert apart[: 2 * CHUNK].max() < EXACT
    assert apart[2 * CHUNK :].min() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("chosen_by", ["head", "group"])
def test_of_equal_tokens_of_a_chunk_the_later_stay(chosen_by: str) -> None:
    mixer, x = ready(chosen_by=chosen_by, keep=2), noise(2, LENGTH, HIDDEN)
    # Queries and keys have no direction in common: a token is one of those that it sees. Those of the first chunk weigh 1, 1/2,
    # 1/3, 1/4, all others 1/4.
    mixer.q_proj.weight.view(HEADS, SIZE, HIDDEN)[:, 3:] = 0.0
    mixer.k_proj.weight.view(KV, SIZE, HIDDEN)[:, :3] = 0.0
    expected = by_loop(mixer, x)
    assert (mixer(x, call_at(0, LENGTH)) - expected).abs().max() < EXACT
    assert (in_pieces(mixer, x, list(range(1, LENGTH + 1))) - expected).abs().max() < EXACT
    for ends in (list(range(1, LENGTH + 1)), [LENGTH]):
        cache, start = mixer.new_cache(), 0
        for end in ends:
            mixer(x[:, start:end], call_at(start, end - start, cache))
            cache.advance(end - start)
            start = end
        stay = [[0, 1], *([last, last - 1] for last in range(7, 20, CHUNK))]
        k = mixer.k_proj(x).unflatten(-1, (KV, -1)).repeat_interleave(mixer.stores // KV, dim=2)
        wanted = k[:, stay].permute(0, 3, 1, 2, 4).flatten(2, 3)
        assert (cache.tensors()["salient_keys"] - wanted).abs().max() < EXACT


@torch.no_grad()
def test_weights_sum_to_one_where_the_gate_is_open() -> None:
    mixer, x, seen = ready(), noise(2, LENGTH, HIDDEN), []
    # A constant feature opens all gates and is the value of every token.
    x[..., 0] = 1.0
    for proj, value in ((mixer.v_proj, 1.0), (mixer.g_proj, 99.0)):
        proj.weight.zero_()
        proj.weight[:, 0] = value
    mixer.heads_out.register_forward_hook(lambda _, __, heads: seen.append(heads))
    mixer(x, call_at(0, LENGTH))
    assert (seen[0] - 1.0).abs().max() < EXACT
    mixer.g_proj.weight.mul_(-1.0)
    mixer(x, call_at(0, LENGTH))
    assert (seen[1][:, : 2 * CHUNK] - 1.0).abs().max() < EXACT
    assert seen[1][:, 2 * CHUNK :].max() < 1.0


@torch.no_grad()
def test_features_have_the_length_of_their_vector_and_are_positive() -> None:
    maps, x = ready(chosen_by="group").maps, noise(2, HEADS, 3, SIZE)
    phi = maps.of_queries(x)
    assert phi.shape == (2, HEADS, 3, 10)
    assert (phi > 0).all()
    assert (phi[..., :5].sum(-1) - 1.0).abs().max() < EXACT
    # Of softmax z and softmax -z the logarithms tell z but for a constant: their difference is 2 z less its own mean.
    z = (phi[..., :5].log() - phi[..., 5:].log()) / 2
    turned = x - 2 * maps.q_reflection[:, None] * torch.einsum("hd,bhtd->bht", maps.q_reflection, x)[
        ..., None
    ] / maps.q_reflection.square().sum(-1).view(HEADS, 1, 1)
    assert (turned.norm(dim=-1) - x.norm(dim=-1)).abs().max() < EXACT
    wanted = turned @ maps.q_weight
    wanted = wanted / wanted.norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True)
    centred = [one - one.mean(-1, keepdim=True) for one in (z, wanted)]
    assert (centred[0] - centred[1]).abs().max() < EXACT


def test_keys_begin_with_the_map_of_their_first_query_head() -> None:
    made = mixer_of(HIDDEN, "still", heads=HEADS, kv_heads=KV, head_dim=SIZE, chosen_by="group").maps
    assert torch.equal(made.k_weight, made.q_weight[::2])
    assert torch.equal(made.k_reflection, made.q_reflection[::2])


@torch.no_grad()
def test_chunks_count_real_tokens() -> None:
    mixer, x = ready(rope={"theta": 500.0}), noise(2, LENGTH, HIDDEN)
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, :6] = False
    alone = [mixer(x[:1, 6:], call_at(0, LENGTH - 6, rows=1)), mixer(x[1:], call_at(0, LENGTH, rows=1))]
    found = [mixer(x, padded_call(real))]
    found += [in_pieces(mixer, x, ends, real) for ends in (list(range(1, LENGTH + 1)), [2, 7, 9, 20, LENGTH])]
    for y in found:
        assert y.isfinite().all()
        assert (y[0, 6:] - alone[0][0]).abs().max() < EXACT
        assert (y[1] - alone[1][0]).abs().max() < EXACT
    right = real.flip(1)
    y = mixer(x, padded_call(right))
    assert (y[0, : LENGTH - 6] - mixer(x, call_at(0, LENGTH))[0, : LENGTH - 6]).abs().max() < EXACT


def test_no_table_of_all_tokens_by_all_tokens_is_held_for_the_gradient() -> None:
    length, held = 1024, [0]
    mixer = mixer_of(8, "still", heads=1, chunk=16, keep=1, features=2).float()
    x = noise(1, length, 8).float().requires_grad_()

    def weigh(one: Tensor) -> Tensor:
        held[0] = max(held[0], one.untyped_storage().nbytes() // one.element_size())
        return one

    with torch.autograd.graph.saved_tensors_hooks(weigh, lambda one: one):
        y = mixer(x, call_at(0, length, rows=1))
    y.sum().backward()
    assert held[0] < length * length / 32


def test_training_holds_few_copies_of_its_input() -> None:
    mixer = mixer_of(64, "still", heads=2, chunk=16, keep=1, features=4).float()
    x = noise(1, 1024, 64).float().requires_grad_()

    def both_directions() -> None:
        y = mixer(x, call_at(0, 1024, rows=1))
        torch.autograd.grad(y.sum(), [x, *mixer.parameters()])

    # 19.8 where each chunk's gradients were as long as all keys, the gate was kept in float32 and keys were gathered.
    assert peak_bytes(both_directions, (), "cpu") < 15 * x.nbytes


def test_long_rows_give_back_what_has_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = mixer_of(64, "still", heads=2, chunk=16, keep=1, features=4).float()
    x = noise(1, 1024, 64).float().requires_grad_()

    def both_directions() -> tuple[Tensor, ...]:
        y = mixer(x, call_at(0, 1024, rows=1))
        return (y, *torch.autograd.grad(y.sin().sum(), [x, *mixer.parameters()]))

    expected, before = both_directions(), peak_bytes(both_directions, (), "cpu")
    monkeypatch.setattr(stretches, "STRETCH", 512)
    assert all(torch.equal(one, other) for one, other in zip(both_directions(), expected, strict=True))
    # Of queries, gates, keys and values and of their gradients one each: those of a piece go when these have come.
    assert peak_bytes(both_directions, (), "cpu") < before - 1.5 * x.nbytes


def test_it_costs_what_its_parts_do() -> None:
    # Llama 3 8B: D 4096, 32 heads of 128, 8 KV heads; f 128, 4 tokens of 64 stay.
    spec, site, D = Still(heads=32, kv_heads=8), SpecSite(4096), 4096
    weights = 3 * D * D + 2 * D * 1024
    assert spec.params(site) == weights + 2 * 32 * 128 * 129
    # A KiB a token where each query head chooses, and about 12 MB besides: 127 recent tokens twice, and a state of 256 x 129.
    grown = spec.state_bytes(site, 65_536 + 64, 2) - spec.state_bytes(site, 65_536, 2)
    assert grown == 64 * 1024 + 4 * 32
    fixed = 32 * (127 * (2 * 128 * 2 + 4) + 256 * 129 * 4)
    assert spec.state_bytes(site, 127, 2) == fixed
    # In a group of 4 heads it is a quarter.
    shared = Still(heads=32, kv_heads=8, chosen_by="group")
    assert 4 * shared.state_bytes(site, 65_536, 2) == spec.state_bytes(site, 65_536, 2)
    # A token at place 65,536, of chunk 1024: itself, the chunk before, and 4 of each of 1,023 chunks.
    one = spec.flops(site, 65_536) - spec.flops(site, 0)
    assert one == 4 * D * (64 + 4 * 1023)
    problem = Still(heads=4, chunk=8, keep=9).problems(SpecSite(48))[0]
    assert (problem.field, problem.code, problem.hint) == ("keep", "out-of-range", "at most 8")


def test_a_group_of_one_head_is_a_head() -> None:
    site = SpecSite(48)
    alone = [Still(heads=4, chosen_by=chosen_by).canonical(site) for chosen_by in ("head", "group")]
    assert alone[0] == alone[1]
    shared = [
        Still(heads=4, kv_heads=2, chosen_by=chosen_by).canonical(site) for chosen_by in ("head", "group")
    ]
    assert shared[0] != shared[1]
