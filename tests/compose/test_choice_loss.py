"""The loss of a choice of blocks: its sum over queries and blocks, its gradient, and what it teaches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys import EXACT, Largest, call_at, mixer_of, noise, padded_call

from heddle.compose.modules import choice_loss as module
from heddle.compose.modules.choice_loss import LOGITS, choice_loss
from heddle.compose.modules.selection import Places, Rule, choose_blocks
from heddle.specs import Site
from heddle.specs.mixers.attention import Attention

HIDDEN, LENGTH = 24, 29
RULE = Rule(count=3, sink=1, recent=2)


def by_loops(q: Tensor, k: Tensor, rule: Rule, block: int, written: Tensor | None = None) -> Tensor:
    """Query by query and block by block."""
    (B, KV, T, d), G = k.shape, q.shape[1] // k.shape[1]
    total = q.new_zeros(())
    for b, g, t in torch.cartesian_prod(*(torch.arange(size) for size in (B, KV, T))).tolist():
        read = [j for j in range(t + 1) if j == t or written is None or written[b, j] > 0]
        heads = q[b, g * G : (g + 1) * G, t]
        p = torch.stack([(k[b, g, read] @ head / d**0.5).softmax(0) for head in heads]).mean(0).detach()
        open_blocks = [c for c in range(t // block - rule.recent + 1) if c >= rule.sink]
        if not open_blocks or t < rule.dense_length:
            continue
        scores = torch.stack([score(heads, k[b, g], c, rule, block, t) for c in open_blocks])
        weights = torch.stack(
            [sum((p[i] for i, j in enumerate(read) if j // block == c), q.new_zeros(())) for c in open_blocks]
        )
        total = total - (weights * scores.log_softmax(0)).sum()
    return total / (B * KV * T)


def score(heads: Tensor, k: Tensor, c: int, rule: Rule, block: int, t: int) -> Tensor:
    """The logit of a block.  Shapes:  heads: [G, d];  k: [T, d]"""
    d = k.shape[-1]
    if rule.scores == "mean":
        return heads.mean(0) @ k[c * block : (c + 1) * block].mean(0) / d**0.5
    step = block // 4
    begins = range(0, t + 2 - 2 * step, step)
    means = torch.stack([k[one : one + 2 * step].mean(0) for one in begins])
    total = torch.stack([(means @ head / d**0.5).softmax(0) for head in heads]).sum(0)
    overlap = [i for i, one in enumerate(begins) if one < (c + 1) * block and one + 2 * step > c * block]
    return total[overlap].max().log()


@pytest.mark.parametrize("how", [{}, {"scores": "kernels"}, {"recent": 1, "sink": 0}, {"dense_length": 20}])
def test_it_and_its_gradient_are_those_of_loops(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rule = Rule(**{"count": 3, "sink": 1, "recent": 2} | how)
    q, k = noise(2, 4, LENGTH, 5).requires_grad_(), noise(2, 2, LENGTH, 5, seed=3).requires_grad_()
    expected = by_loops(q, k, rule, 4)
    wanted = torch.autograd.grad(expected, (q, k))
    for queries in (LENGTH, 7):
        monkeypatch.setattr(module, "QUERIES", queries)
        found = choice_loss(q, k, Places(4, LENGTH, None, q.device), rule, None)
        assert abs(found.item() - expected.item()) < EXACT
        for one, other in zip(torch.autograd.grad(found, (q, k)), wanted, strict=True):
            assert (one - other).abs().max() < EXACT


def test_padding_has_no_part_in_it_and_what_is_not_written_no_weight() -> None:
    q, k = noise(1, 4, LENGTH, 5), noise(1, 2, LENGTH, 5, seed=3)
    real = torch.ones(1, LENGTH, dtype=torch.bool)
    real[0, :7] = False
    padded = choice_loss(q[:, :, 7:], k, Places(4, LENGTH, real, q.device), RULE, None)
    alone = choice_loss(q[:, :, 7:], k[:, :, 7:], Places(4, LENGTH - 7, None, q.device), RULE, None)
    assert abs(padded.item() - alone.item()) < EXACT
    written = torch.ones(1, LENGTH, dtype=q.dtype)
    written[0, 4:8] = 0.0
    places = Places(4, LENGTH, None, q.device)
    k = torch.where(written[:, None, :, None] > 0, k, 0.0)
    found = choice_loss(q, k, places, RULE, written)
    assert abs(found.item() - by_loops(q, k, RULE, 4, written).item()) < EXACT


def test_a_long_row_holds_its_logits_in_parts() -> None:
    q, k = (torch.empty(1, heads, 32_768, 128, dtype=torch.bfloat16, device="meta") for heads in (16, 2))
    with Largest() as seen:
        choice_loss(q.requires_grad_(), k, Places(64, 32_768, None, q.device), RULE, None).backward()
    # The queries themselves, wide, or logits.
    assert seen.bytes <= 4 * max(LOGITS, q.numel())


@pytest.mark.parametrize("scores", ["mean", "kernels"])
def test_it_teaches_to_choose_what_attention_weighs_most(scores: str) -> None:
    torch.manual_seed(0)
    rule, places = Rule(count=2, sink=0, recent=1, scores=scores), Places(8, 64, None, torch.device("cpu"))
    # One key of the third block is what the last eight queries look for; its neighbours point elsewhere, but tell the block.
    keys = torch.randn(1, 1, 64, 16, dtype=torch.float64)
    keys[0, 0, 19] = 0.0
    keys[0, 0, 19, 0] = 6.0
    keys[0, 0, 16:19, 0] = keys[0, 0, 20:24, 0] = -1.0
    keys[..., 1] = 0.0
    keys[0, 0, 16:24, 1] = 1.0
    q = torch.zeros(1, 1, 8, 16, dtype=torch.float64)
    q[..., 0] = 4.0
    turn = torch.eye(16, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.Adam([turn], lr=1e-2)

    def chosen() -> Tensor:
        return choose_blocks(q, keys @ turn, places, rule)[0, 0, :, 2]

    assert not chosen().any()
    # Without another loss the keys drift on, and what is taught with them.
    for _ in range(60):
        optimizer.zero_grad()
        choice_loss(q, keys @ turn, places, rule, None).backward()
        optimizer.step()
    assert chosen().all()


def test_training_alone_adds_it() -> None:
    how = {"block": 4, "count": 3, "sink": 1, "recent": 2}
    plain = mixer_of(HIDDEN, "attention", heads=4, kv_heads=2, selection=how)
    mixer = mixer_of(HIDDEN, "attention", heads=4, kv_heads=2, selection=how | {"distillation": 0.3})
    x, call = noise(2, LENGTH, HIDDEN), call_at(0, LENGTH)
    y = mixer(x, call)
    assert torch.equal(y, plain(x, call_at(0, LENGTH)))
    assert call.losses == []
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, :7] = False
    for call in (call_at(0, LENGTH), padded_call(real)):
        mixer.train()(x, call)
        ((name, value, factor),) = call.losses
        assert (name, factor) == ("choice", 0.3)
        found = torch.autograd.grad(value, [mixer.q_proj.weight, mixer.k_proj.weight])
        assert all(one.abs().max() > 0 for one in found)


@pytest.mark.parametrize("how", [{"source": "other"}, {"decode_only": True}])
@pytest.mark.parametrize("field", ["dense_first", "distillation"])
def test_who_chooses_nothing_in_training_cannot_ask_for_it(field: str, how: dict[str, Any]) -> None:
    site = Site(HIDDEN)
    mixer = Attention(heads=4, selection={"block": 4, "count": 3, field: 0.5, **how})
    (problem,) = mixer.problems(site)
    assert (problem.field, problem.code) == (f"selection.{field}", "conflicting-fields")
