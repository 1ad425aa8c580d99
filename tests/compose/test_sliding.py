"""Causal windows by their own kernels: the same as by masks, when they are asked for, and compiled."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from toys import EXACT, call_at, mixer_of, noise, padded_call

from heddle.compose.modules.in_view import attend_in_view
from heddle.compose.modules.masks import View
from heddle.compose.modules.sliding import attend_sliding, has_kernels, slides
from heddle.compose.modules.softmax import softmax_attention


@pytest.mark.parametrize("window", [1, 4, 40])
@pytest.mark.parametrize("queries", [3, 11, 30])
def test_it_is_attention_in_view_behind_padding_and_after_a_cache(window: int, queries: int) -> None:
    real = torch.ones(2, 30, dtype=torch.bool)
    real[0, :9], real[1, -2:] = False, False
    call = padded_call(real)
    q, k, v = noise(2, 4, queries, 6), noise(2, 2, 30, 6, seed=1), noise(2, 2, 30, 6, seed=2)
    view, keys = View(window), (k, v, None)
    expected = attend_in_view(q, keys, call, view, partial(softmax_attention, scale=0.3))
    assert (attend_sliding(q, keys, call, view, 0.3) - expected).abs().max() < EXACT


def test_it_is_for_causal_windows_that_leave_keys_out_where_the_kernels_run() -> None:
    q, k = noise(2, 4, 5, 6), noise(2, 2, 30, 6)
    runs = has_kernels(q.device, q.dtype, 6, 2)
    assert not runs, "no kernel takes float64"
    for view, given in (
        (View(), (k, k, None)),
        (View(4, causal=False), (k, k, None)),
        (View(30), (k, k, None)),
        (View(4), (k, k, torch.ones(2, 30))),
        (View(4), (k, k, None)),
    ):
        assert not slides(q, given, view, call_at(25, 5))


def test_a_mixer_with_a_window_compiles_whole_and_tells_its_code() -> None:
    mixer, x = mixer_of(24, "attention", heads=4, kv_heads=2, window=5), noise(2, 13, 24)
    assert mixer.kernel_path(x.device, x.dtype) == "sdpa"
    compiled = torch.compile(lambda x: mixer(x, call_at(0, 13)), fullgraph=True, backend="aot_eager")
    assert (compiled(x) - mixer(x, call_at(0, 13))).abs().max() < EXACT
