"""The loss of a choice of blocks: its sum over queries and blocks, its gradient, and what it teaches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys import EXACT, Largest, call_at, mixer_of, noise, padded_call

from heddle.compose.modules import choice_loss as module
from heddle.compose.modules.choice_loss import LOGITS, attend_through, choice_loss
from heddle.compose.modules.selection import Places, Rule, attend_blocks, choose_blocks
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


@pytest.mark.parametrize("scores", ["mean", "kernels"])
def test_what_blocks_were_worth_goes_straight_through_the_choice(
    scores: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "QUERIES", 7)
    rule, places = (
        Rule(count=3, sink=1, recent=1, scores=scores),
        Places(4, LENGTH, None, torch.device("cpu")),
    )
    q, k, v = (noise(2, heads, LENGTH, 5, seed=heads + 1) for heads in (4, 2, 2))
    q, k, v = q.requires_grad_(), k.requires_grad_(), v.detach().roll(1, 2).requires_grad_()
    chosen, grad = choose_blocks(q, k, places, rule), noise(2, 4, LENGTH, 5, seed=9)
    o = attend_through(q, (k, v, None), places, chosen, rule)
    assert (o - attend_blocks(q, (k, v, None), places, chosen, None)).abs().max() < EXACT
    # The same by loops, with the scores of chosen blocks among the logits.
    rows = []
    for b, h, t in torch.cartesian_prod(*(torch.arange(size) for size in (2, 4, LENGTH))).tolist():
        g, read = h // 2, [j for j in range(t + 1) if chosen[b, h // 2, t, j // 4]]
        logits = k[b, g, read] @ q[b, h, t] / 5**0.5
        for c in {j // 4 for j in read if 1 <= j // 4 < t // 4}:
            s = score(q[b, 2 * g : 2 * g + 2, t], k[b, g], c, rule, 4, t)
            logits = logits + (s - s.detach()) * q.new_tensor([float(j // 4 == c) for j in read])
        rows.append(logits.softmax(0) @ v[b, g, read])
    expected = torch.stack(rows).view_as(o)
    assert (o - expected).abs().max() < EXACT
    wanted = torch.autograd.grad((expected * grad).sum(), (q, k, v))
    for one, other in zip(torch.autograd.grad((o * grad).sum(), (q, k, v)), wanted, strict=True):
        assert (one - other).abs().max() < EXACT


def test_the_layer_trains_straight_through_and_evaluates_as_ever() -> None:
    how = {"block": 4, "count": 3, "sink": 1, "recent": 1}
    plain = mixer_of(HIDDEN, "attention", heads=4, kv_heads=2, selection=how)
    mixer = mixer_of(HIDDEN, "attention", heads=4, kv_heads=2, selection=how | {"straight_through": True})
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, :7] = False
    x = noise(2, LENGTH, HIDDEN)
    for call in (lambda: call_at(0, LENGTH), lambda: padded_call(real)):
        expected = plain(x, call())
        assert torch.equal(mixer.eval()(x, call()), expected)
        difference = (mixer.train()(x, call()) - expected)[real]
        assert difference.abs().max() < EXACT
    found, other = (
        torch.autograd.grad(one.train()(x, call_at(0, LENGTH)).square().sum(), one.k_proj.weight)[0]
        for one in (mixer, plain)
    )
    assert (found - other).abs().max() > 1e-6
    assert torch.isfinite(found).all()


def test_logits_that_are_capped_have_no_way_through() -> None:
    mixer = Attention(heads=4, softcap=5.0, selection={"block": 4, "count": 3, "straight_through": True})
    assert [one.field for one in mixer.problems(Site(HIDDEN))] == ["selection.straight_through"]


@pytest.mark.parametrize("field", ["dense_first", "distillation", "straight_through"])
def test_who_takes_blocks_of_another_layer_cannot_ask_for_it(field: str) -> None:
    site, value = Site(HIDDEN), True if field == "straight_through" else 0.5
    mixer = Attention(heads=4, selection={"block": 4, "count": 3, "source": "other", field: value})
    (problem,) = mixer.problems(site)
    assert (problem.field, problem.code) == (f"selection.{field}", "conflicting-fields")
