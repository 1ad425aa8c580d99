"""Blocks chosen as InfLLM-V2 does, by means over kernels: the sets, the layer, its padding and its costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys import (
    EXACT,
    Largest,
    call_at,
    gradients,
    in_pieces,
    mixer_of,
    noise,
    padded_call,
    shaken,
    tokens,
)

from heddle.compose.build import build
from heddle.compose.modules.selection import SCORES, Places, Rule, choose_blocks
from heddle.specs import ModelSpec
from heddle.specs import Site as SpecSite
from heddle.specs.mixers.attention import Attention
from heddle.specs.selection import Selection

HIDDEN, LENGTH = 24, 45
HOW: dict[str, Any] = {"block": 4, "count": 4, "sink": 1, "recent": 2, "scores": "kernels"}


def by_loops(q: Tensor, k: Tensor, how: dict[str, Any], written: Tensor | None = None) -> Tensor:
    """Kernel by kernel and query by query.  Shapes:  q: [B, H, T, d];  k: [B, KV, T, d];  out: [B, KV, T, blocks] bool"""
    (B, KV, T, d), block, step = k.shape, how["block"], how["block"] // 4
    found = torch.zeros(B, KV, T, -(-T // block), dtype=torch.bool)
    for b, g, t in torch.cartesian_prod(*(torch.arange(size) for size in (B, KV, T))).tolist():
        own, heads = t // block, q[b, g * q.shape[1] // KV : (g + 1) * q.shape[1] // KV, t]
        kernels: dict[int, Tensor] = {}
        for first in range(0, t + 2 - 2 * step, step):
            keys = [j for j in range(first, first + 2 * step) if written is None or written[b, j] > 0]
            if keys:
                kernels[first] = k[b, g, keys].mean(0)
        total = dict.fromkeys(kernels, 0.0)
        for head in heads:
            weights = {first: float((head @ mean / d**0.5).exp()) for first, mean in kernels.items()}
            for first, weight in weights.items():
                total[first] += weight / sum(weights.values())
        chosen = {n for n in range(own + 1) if n < how["sink"] or n > own - how["recent"]}
        if t < how.get("dense_length", 0):
            chosen = set(range(own + 1))
        score = {
            n: max(
                (
                    one
                    for first, one in total.items()
                    if first < (n + 1) * block and first + 2 * step > n * block
                ),
                default=0.0,
            )
            for n in sorted(set(range(own)) - chosen)
        }
        best = sorted(score, key=lambda n: (-score[n], n))[: max(0, how["count"] - len(chosen))]
        for n in [*chosen, *best]:
            found[b, g, t, n] = True
    return found


def rule(how: dict[str, Any]) -> Rule:
    return Rule(**{name: one for name, one in how.items() if name != "block"})


@pytest.mark.parametrize(
    "how", [HOW, HOW | {"block": 8, "count": 3, "recent": 1}, HOW | {"dense_length": 30}]
)
@pytest.mark.parametrize("length", [1, 4, LENGTH])
def test_chosen_blocks_are_those_of_loops(how: dict[str, Any], length: int) -> None:
    q, k = noise(2, 4, length, 5) * 2, noise(2, 2, length, 5, seed=3)
    places = Places(how["block"], length, None, q.device)
    chosen = choose_blocks(q, k, places, rule(how))
    assert torch.equal(chosen, by_loops(q, k, how))
    assert torch.equal(choose_blocks(q[:, :, -1:], k, places, rule(how)), chosen[:, :, -1:])
    means = choose_blocks(q, k, places, rule({**how, "scores": "mean"}))
    assert (length < LENGTH) == torch.equal(means, chosen)


def test_what_is_not_written_is_in_no_kernel_and_padding_in_no_block() -> None:
    q, k = noise(2, 4, LENGTH, 5) * 2, noise(2, 2, LENGTH, 5, seed=3)
    written = (torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5).double()
    places = Places(4, LENGTH, None, q.device)
    assert torch.equal(choose_blocks(q, k, places, rule(HOW), weights=written), by_loops(q, k, HOW, written))
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, :7] = False
    chosen = choose_blocks(q, k, Places(4, LENGTH, real, q.device), rule(HOW))
    alone = by_loops(q[:1, :, 7:], k[:1, :, 7:], HOW)
    assert torch.equal(chosen[:1, :, 7:, : alone.shape[-1]], alone)


@pytest.mark.parametrize("scores", ["mean", "kernels"])
def test_autocast_rounds_no_score(scores: str) -> None:
    q, k = (noise(2, heads, LENGTH, 5, seed=heads, dtype=torch.float32) for heads in (4, 2))
    places, how = Places(4, LENGTH, None, q.device), rule(HOW | {"scores": scores})
    # Keys that differ by less than bfloat16 tells apart.
    k = k * 1e-3 + 1.0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chosen = choose_blocks(q, k, places, how)
    assert torch.equal(chosen, choose_blocks(q, k, places, how))


@pytest.mark.parametrize("scores", ["mean", "kernels"])
def test_a_long_prompt_is_scored_in_parts(scores: str) -> None:
    # MiniCPM-SALA's heads and blocks; on the meta device nothing is computed.
    length, block = 65_536, 64
    q, k = (torch.empty(1, heads, length, 128, dtype=torch.bfloat16, device="meta") for heads in (32, 2))
    with Largest() as seen:
        chosen = choose_blocks(q, k, Places(block, length, None, q.device), rule(HOW | {"scores": scores}))
    assert chosen.shape == (1, 2, length, length // block)
    # Scores in float32; of the kernels of all heads no fewer queries than `QUERIES` are worked on, which doubles them here.
    assert seen.bytes <= 2 * 4 * SCORES


@torch.no_grad()
def test_the_layer_reads_them_whole_in_pieces_and_behind_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = mixer_of(HIDDEN, "attention", heads=4, kv_heads=2, selection=HOW)
    x = noise(2, LENGTH, HIDDEN)
    whole = mixer(x, call_at(0, LENGTH))
    dense = mixer_of(HIDDEN, "attention", heads=4, kv_heads=2)(x, call_at(0, LENGTH))
    assert (whole - dense).abs().max() > 1e-3
    for change in ({"count": 99}, {"dense_length": LENGTH}):
        every = mixer_of(HIDDEN, "attention", heads=4, kv_heads=2, selection=HOW | change)
        assert (every(x, call_at(0, LENGTH)) - dense).abs().max() < EXACT
    monkeypatch.setattr("heddle.compose.modules.selection.QUERIES", 7)
    cache, start, pieces = mixer.new_cache(), 0, []
    for end in (3, 4, 30, *range(31, LENGTH + 1)):
        pieces.append(mixer(x[:, start:end], call_at(start, end - start, cache)))
        cache.advance(end - start)
        start = end
    assert (torch.cat(pieces, dim=1) - whole).abs().max() < EXACT
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, :7] = False
    padded, alone = mixer(x, padded_call(real)), mixer(x[:1, 7:], call_at(0, LENGTH - 7, rows=1))
    assert padded.isfinite().all()
    assert (padded[:1, 7:] - alone).abs().max() < EXACT


def two_layers(how: dict[str, Any] | None) -> Any:
    """One that chooses and one that reuses its choice, or two dense ones, of the same weights."""
    reuses = how and {"block": how["block"], "count": how["count"], "source": "a"}
    blocks = {
        name: {
            "mixer": {"kind": "attention", "heads": 4, "kv_heads": 2, "selection": one},
            "channel": {"kind": "none"},
        }
        for name, one in (("a", how), ("b", reuses))
    }
    sizes = {"vocab_size": 9, "hidden_size": HIDDEN, "blocks": blocks, "layers": list(blocks)}
    return shaken(build(ModelSpec.model_validate(sizes)))


@pytest.mark.parametrize("scores", ["mean", "kernels"])
def test_with_room_for_every_block_who_chooses_and_who_reuses_the_choice_are_dense(scores: str) -> None:
    # As many as there are at last; before that there is room for more.
    how = HOW | {"count": -(-LENGTH // 4), "scores": scores}
    ids, wanted, told = tokens(LENGTH, vocabulary=9), noise(2, LENGTH, 9), []
    for one in (how, None):
        model = two_layers(one)
        logits = model(ids).logits
        found = gradients(model, (logits * wanted).sum())
        with torch.no_grad():
            found["steps"], _ = in_pieces(model, ids, [7, 30, *range(31, LENGTH + 1)])
        told.append(found | {"logits": logits.detach()})
    assert told[0].keys() == told[1].keys()
    for name, dense in told[1].items():
        assert (told[0][name] - dense).abs().max() < EXACT * max(1.0, dense.abs().max()), name
    fewer = two_layers(how | {"count": how["count"] - 1})(ids).logits
    assert (fewer - told[1]["logits"])[:, -1].abs().max() > 1e-3


@torch.no_grad()
def test_of_decode_only_a_prompt_is_dense_and_a_token_chooses() -> None:
    dense, chooses, both = (
        mixer_of(HIDDEN, "attention", heads=4, kv_heads=2, selection=how)
        for how in (None, HOW, HOW | {"decode_only": True})
    )
    x = noise(2, LENGTH, HIDDEN)
    cut, found = LENGTH - 1, []
    for mixer in (dense, chooses, both):
        cache = mixer.new_cache()
        prompt = mixer(x[:, :cut], call_at(0, cut, cache))
        cache.advance(cut)
        found.append((prompt, mixer(x[:, cut:], call_at(cut, 1, cache))))
    assert torch.equal(found[2][0], found[0][0])
    assert torch.equal(found[2][1], found[1][1])
    assert (found[2][1] - found[0][1]).abs().max() > 1e-3
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found[2][0], found[1][0])
    # Token by token it is what chooses always.
    cache, steps = both.new_cache(), []
    for t in range(LENGTH):
        steps.append(both(x[:, t : t + 1], call_at(t, 1, cache)))
        cache.advance(1)
    assert (torch.cat(steps, dim=1) - chooses(x, call_at(0, LENGTH))).abs().max() < EXACT


def test_of_decode_only_a_pass_costs_what_dense_attention_does() -> None:
    how = {"block": 8, "count": 4, "sink": 1, "recent": 2}
    site = SpecSite(HIDDEN)
    dense, both, chooses = (
        Attention(heads=4, kv_heads=2, selection=one)
        for one in (None, Selection(**how, decode_only=True), Selection(**how))
    )
    assert both.prefill_flops(site, 300) == dense.prefill_flops(site, 300) > chooses.prefill_flops(site, 300)
    assert both.flops(site, 300) == chooses.flops(site, 300) < dense.flops(site, 300)
    assert set(both.exemptions()) == {"step", "chunks"}
    assert "decode_only" in str(Selection(**how).misfit("pick", Selection(**how, decode_only=True)))


@pytest.mark.parametrize(
    "fields", [HOW, HOW | {"dense_length": 13}, {"block": 4, "count": 4, "dense_length": 13}]
)
def test_means_over_a_pass_are_means_over_its_tokens(fields: dict[str, Any]) -> None:
    one, site = Selection(**fields), SpecSite(HIDDEN)
    spec = Attention(heads=4, kv_heads=2, selection=one)
    for length in (1, 3, 4, 5, 13, 14, 40):
        tokens = range(1, length + 1)
        assert one.mean_scored(length) == pytest.approx(sum(map(one.scored, tokens)) / length)
        assert one.mean_keys_read(length) == pytest.approx(sum(map(one.keys_read, tokens)) / length)
        flops = [spec.flops(site, context) for context in range(length)]
        assert spec.prefill_flops(site, length) == pytest.approx(sum(flops) / length)


def test_it_costs_what_the_sheet_says() -> None:
    # 32 heads and 2 key heads of 128, blocks of 64: 96 are read, and the mean of every 16 tokens but the last.
    chosen = Selection(block=64, count=96, recent=32, scores="kernels", dense_length=8192)
    spec, site = Attention(heads=32, kv_heads=2, head_dim=128, selection=chosen), SpecSite(4096)
    weights, tokens = 4096 * 128 * (32 * 2 + 2 * 2), 131_072
    assert spec.flops(site, tokens - 1) == 2 * weights + 4 * 4096 * 6144 + 2 * 4096 * (tokens // 16 - 1)
    assert spec.read_bytes(site, tokens - 1, 2) == 2 * 256 * (2 * 6143 + tokens // 16 - 1)
    assert spec.flops(site, 8191) == 2 * weights + 4 * 4096 * 8192


def test_kernels_ask_for_blocks_with_quarters() -> None:
    problems = Attention(heads=4, selection=Selection(block=6, scores="kernels")).problems(SpecSite(HIDDEN))
    assert [(one.field, one.hint) for one in problems] == [
        ("selection.block", "a multiple of 4, or scores: mean")
    ]
