"""Heads that a router left out: the same as by factors of 0, when they are left out, and compiled."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from toys import EXACT, call_at, mixer_of, noise, padded_call

from heddle.compose.cache import Call
from heddle.compose.modules import chosen_heads
from heddle.compose.modules.chosen_heads import attend_chosen, has_routed_kernels, skips
from heddle.compose.modules.in_view import attend_in_view
from heddle.compose.modules.masks import View
from heddle.compose.modules.softmax import softmax_attention

SOFTMAX = {"kind": "attention", "heads": 4, "kv_heads": 2}


def test_it_is_attention_in_view_times_factors_behind_padding_and_after_a_cache() -> None:
    real = torch.ones(2, 30, dtype=torch.bool)
    real[0, :9], real[1, -2:] = False, False
    for queries in (1, 11, 30):
        call = padded_call(real)
        q, k, v = noise(2, 4, queries, 6), noise(2, 2, 30, 6, seed=1), noise(2, 2, 30, 6, seed=2)
        call.head_gates = noise(2, queries, 4, seed=3).relu()
        heads = attend_in_view(q, (k, v, None), call, View(), partial(softmax_attention, scale=0.3))
        found = attend_chosen(q, (k, v, None), call, View(), 0.3)
        assert (found.transpose(1, 2) - call.gated(heads.transpose(1, 2))).abs().max() < EXACT


def test_it_is_for_all_earlier_keys_where_the_kernels_run() -> None:
    q, k = noise(2, 4, 5, 6), noise(2, 2, 30, 6)
    assert not has_routed_kernels(q.device, q.dtype, 6, 2), "no kernel takes float64"
    for view, given in (
        (View(), (k, k, None)),
        (View(causal=False), (k, k, None)),
        (View(4), (k, k, None)),
        (View(), (k, k, torch.ones(2, 30))),
    ):
        assert not skips(q, given, view)


@torch.no_grad()
def test_steps_behind_padding_count_no_sink_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    sliding = {**SOFTMAX, "window": 6, "sink_tokens": 3}
    moh, x = mixer_of(24, "moh", mixer=sliding, shared_heads=1, active=2), noise(2, 20, 24)
    padding = torch.arange(20) >= torch.tensor([5, 0])[:, None]

    def steps() -> torch.Tensor:
        cache, told = moh.new_cache(), []
        for t in range(20):
            call = Call(
                (padding.cumsum(1) - 1).clamp(min=0)[:, t : t + 1],
                padding[:, t : t + 1],
                padding[:, : t + 1],
                cache,
            )
            told.append(moh(x[:, t : t + 1], call))
            cache.advance(1)
        return torch.cat(told, dim=1) * padding[..., None]

    expected = steps()
    monkeypatch.setattr(chosen_heads, "_runs_kernels", lambda *_: True)
    assert (steps() - expected).abs().max() < EXACT


def test_a_routed_mixer_compiles_whole_and_tells_its_code() -> None:
    x = noise(2, 13, 24)
    for router in ("learned", "norms"):
        moh = mixer_of(24, "moh", mixer=SOFTMAX, shared_heads=1, active=2, router=router)
        assert moh.kernel_path(x.device, x.dtype) == "sdpa"
        compiled = torch.compile(
            lambda x, moh=moh: moh(x, call_at(0, 13)), fullgraph=True, backend="aot_eager"
        )
        assert (compiled(x) - moh(x, call_at(0, 13))).abs().max() < EXACT
