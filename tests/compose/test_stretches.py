"""What long sequences hold in training: stretches of them are worked out again, and no mask of all tokens by all is made."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import EXACT, Largest, call_at, mixer_of, noise, padded_call

from heddle.compose.modules import in_view, selection, softmax, stretches
from heddle.compose.modules.in_view import attend_in_view
from heddle.compose.modules.masks import View
from heddle.compose.modules.softmax import softmax_attention
from heddle.kernels.accuracy import EPSILON, worst_error
from heddle.search.peak import peak_bytes

HIDDEN, LENGTH, STRETCH = 32, 300, 64
MIXERS: dict[str, dict[str, Any]] = {
    "liger": {"heads": 4, "kv_heads": 2, "window": 8},
    "contmix": {"heads": 4},
}
DELTA: dict[str, Any] = {"kind": "gated_deltanet", "heads": 2, "head_dim": 8}
CHUNKS: dict[str, Any] = {"heads": 2, "head_dim": 8, "chunk": 8}
FAST: dict[str, Any] = {"heads": 2, "chunk": 32, "memory": "linear", "rate": 0.05}
ROUTED: dict[str, Any] = {"mixers": [{"kind": "attention", "heads": 4, "kv_heads": 2}, DELTA], "chunk": 8}


def both_directions(mixer: Any, x: Tensor) -> tuple[Tensor, ...]:
    y = mixer(x, call_at(0, x.shape[1], rows=len(x)))
    return (y, *torch.autograd.grad(y.sin().sum(), [x, *mixer.parameters()]))


@pytest.mark.parametrize("kind", [*MIXERS, "nats_l", "token_router", "ttt"])
def test_a_mixer_in_stretches_is_the_mixer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixers = MIXERS | {"nats_l": CHUNKS, "token_router": ROUTED, "ttt": FAST}
    mixer = mixer_of(HIDDEN, kind, **mixers[kind])
    x = noise(2, LENGTH, HIDDEN).requires_grad_()
    expected = both_directions(mixer, x)
    monkeypatch.setattr(stretches, "STRETCH", STRETCH)
    for found, wanted in zip(both_directions(mixer, x), expected, strict=True):
        assert (found - wanted).abs().max() < EXACT * wanted.abs().max().clamp(min=1.0)


@pytest.mark.parametrize("kind", MIXERS)
def test_a_mixer_in_stretches_holds_less(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer, x = mixer_of(HIDDEN, kind, **MIXERS[kind]).float(), noise(1, 2048, HIDDEN).float().requires_grad_()
    call = partial(both_directions, mixer, x)
    whole = peak_bytes(call, (), "cpu")
    monkeypatch.setattr(stretches, "STRETCH", 128)
    assert peak_bytes(call, (), "cpu") < whole / 2


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_memory_that_a_router_shares_tokens_with_holds_less(
    is_shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixer, x = mixer_of(HIDDEN, **DELTA).float(), noise(1, 2048, HIDDEN).float().requires_grad_()
    written = torch.ones(1, 2048, requires_grad=True) if is_shared else None

    def call() -> None:
        y = mixer(x, call_at(0, 2048, rows=1, written=written))
        torch.autograd.grad(y.sin().sum(), [x, *mixer.parameters()])

    whole = peak_bytes(call, (), "cpu")
    monkeypatch.setattr(stretches, "STRETCH", 128)
    assert is_shared == (peak_bytes(call, (), "cpu") < whole / 2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_long_mask_has_gradients_as_near_as_a_short_one(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = [noise(2, heads, count, 64, seed=heads) for heads, count in ((8, 70), (2, 90), (2, 90))]
    mask = noise(2, 1, 70, 90, seed=5)
    given = [*sides, mask.masked_fill(mask < -0.5, -torch.inf)]

    def graded(dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
        leaves = [one.to(device, dtype).requires_grad_() for one in given]
        o = softmax_attention(*leaves)
        return (o.detach(), *torch.autograd.grad(o.double().square().sum(), leaves))

    exact, plain = graded(torch.float64, "cpu"), graded(torch.bfloat16, device)
    monkeypatch.setattr(stretches, "STRETCH", 64)
    for found, other, wanted in zip(graded(torch.bfloat16, device), plain, exact, strict=True):
        error, allowed = (
            worst_error(one.transpose(1, 2), wanted.transpose(1, 2), timed=True)[0] for one in (found, other)
        )
        assert error <= 2 * allowed + EPSILON[torch.bfloat16]


def masked(causal: bool, keys: int, is_written: bool) -> tuple[list[Tensor], Any]:
    """Queries, keys, values and perhaps marks, behind padding; and both directions of attention to them."""
    real = torch.ones(2, keys, dtype=torch.bool)
    real[0, :9], real[1, -2:] = False, False
    sides = [noise(2, heads, count, 6, seed=heads) for heads, count in ((4, 70), (2, keys), (1, keys))]
    q, k, v = sides[0], sides[1], sides[2].expand(-1, 2, -1, -1)
    marks = [(noise(2, keys, seed=7) > 0.0).double()] if is_written else []
    leaves = [one.detach().clone().requires_grad_() for one in (q, k, v, *marks)]

    def call() -> tuple[Tensor, ...]:
        given = (leaves[1], leaves[2], leaves[3] if is_written else None)
        o = attend_in_view(leaves[0], given, padded_call(real), View(causal=causal), softmax_attention)
        return (o, *torch.autograd.grad(o.sin().sum(), leaves))

    return leaves, call


@pytest.mark.parametrize("is_written", [False, True])
@pytest.mark.parametrize("keys", [70, 90])
@pytest.mark.parametrize("causal", [True, False])
def test_masks_of_some_queries_do_what_one_of_all_does(
    causal: bool, keys: int, is_written: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, call = masked(causal, keys, is_written)
    expected = call()
    monkeypatch.setattr(in_view, "MOST", 1000)
    monkeypatch.setattr(in_view, "QUERIES", 32)
    for found, wanted in zip(call(), expected, strict=True):
        assert (found - wanted).abs().max() < EXACT


@torch.no_grad()
def test_a_later_piece_of_a_prompt_makes_masks_of_some_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (noise(2, heads, count, 6, seed=heads) for heads, count in ((4, 70), (2, 90), (2, 90)))
    call = call_at(20, 70)

    def attended() -> Tensor:
        return attend_in_view(q, (k, v, None), call, View(), softmax_attention)

    expected = attended()
    call.memo.clear()
    monkeypatch.setattr(in_view, "MOST", 1000)
    monkeypatch.setattr(in_view, "QUERIES", 16)
    assert (attended() - expected).abs().max() < EXACT
    assert not call.memo


def test_no_mask_of_all_queries_by_all_keys_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    _, call = masked(True, 70, True)
    monkeypatch.setattr(in_view, "MOST", 1000)
    monkeypatch.setattr(in_view, "QUERIES", 16)
    with Largest() as seen:
        call()
    # Marks have gradients, so 4 queries at once; the math path has logits of 2 rows of 4 heads.
    assert seen.numbers <= 2 * 4 * 70 * 6, "queries and their outputs are the largest"


@pytest.mark.parametrize("given", ["causal", "all", "mask", "bias"])
@pytest.mark.parametrize("how", ["cap", "sinks", "both"])
def test_weights_of_some_queries_do_what_those_of_all_do(
    given: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (noise(2, heads, 70, 6, seed=heads).requires_grad_() for heads in (4, 2, 1))
    mask = None if given in ("causal", "all") else noise(2, 1, 70, 70, seed=5)
    mask = (mask > -0.5) | torch.eye(70, dtype=torch.bool) if mask is not None and given == "mask" else mask
    sinks = noise(4, seed=8).requires_grad_()
    form: dict[str, Any] = {
        "softcap": None if how == "sinks" else 1.5,
        "sinks": None if how == "cap" else sinks,
    }
    leaves = [q, k, v, *([] if how == "cap" else [sinks])]
    if mask is not None and given == "bias":
        leaves.append(mask.requires_grad_())

    def call() -> tuple[Tensor, ...]:
        o = softmax_attention(q, k, v.expand(-1, 2, -1, -1), mask, is_causal=given == "causal", **form)
        return (o, *torch.autograd.grad(o.sin().sum(), leaves))

    expected = call()
    monkeypatch.setattr(softmax, "MOST", 2 * 4 * 70 * 16)
    with Largest() as seen:
        found = call()
    for one, wanted in zip(found, expected, strict=True):
        assert (one - wanted).abs().max() < EXACT
    # A bias has as many gradients as there are pairs.
    assert seen.numbers <= max(2 * 70 * 70 if given == "bias" else 0, 2 * 4 * 71 * 16)


def test_attention_with_a_soft_cap_and_sinks_makes_no_weights_of_all_pairs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    length = 1024
    mixer, x = mixer_of(8, "attention", heads=2, softcap=5.0, sinks=True), noise(1, length, 8)
    monkeypatch.setattr(softmax, "MOST", 1 << 15)
    with Largest() as seen:
        both_directions(mixer, x.requires_grad_())
    assert seen.numbers < 2 * length * length / 32


def test_chosen_blocks_beside_a_soft_cap_make_masks_of_some_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    length, form = 256, {"heads": 4, "kv_heads": 2, "softcap": 5.0, "selection": {"block": 8, "count": 3}}
    mixer, x = mixer_of(8, "attention", **form), noise(1, length, 8).requires_grad_()
    expected = both_directions(mixer, x)
    monkeypatch.setattr(selection, "MOST", 1000)
    monkeypatch.setattr(selection, "QUERIES", 16)
    monkeypatch.setattr(softmax, "MOST", 1 << 15)
    with Largest() as seen:
        found = both_directions(mixer, x)
    for one, wanted in zip(found, expected, strict=True):
        assert (one - wanted).abs().max() < EXACT
    assert seen.numbers < 4 * length * length / 8
