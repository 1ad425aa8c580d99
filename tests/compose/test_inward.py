"""Windows to both sides that slide inward: how many keys each query sees, which, behind padding, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys import EXACT, call_at, mixer_of, noise, padded_call

from heddle.compose.modules.inward import inward_range
from heddle.specs import Site as SpecSite
from heddle.specs.mixers.attention import Attention

HIDDEN, LENGTH = 24, 13


def ready(**fields: Any) -> Any:
    return mixer_of(HIDDEN, "attention", heads=4, kv_heads=2, causal=False, **fields)


def by_loop(mixer: Any, x: Tensor, window: int) -> Tensor:
    """Query by query over an explicit list of keys, without positions."""
    q, k, v = (getattr(mixer, f"{name}_proj")(x).unflatten(-1, (-1, 6)) for name in "qkv")
    out, length = torch.zeros_like(q), x.shape[1]
    for b, t, h in ((b, t, h) for b in range(len(x)) for t in range(length) for h in range(4)):
        first = max(0, min(t - window + 1, length - 2 * window + 1))
        keys = list(range(first, min(first + 2 * window - 1, length)))
        p = (k[b, keys, h // 2] @ q[b, t, h] / 6**0.5).softmax(0)
        out[b, t, h] = p @ v[b, keys, h // 2]
    y: Tensor = mixer.o_proj(out.flatten(2))
    return y


@pytest.mark.parametrize("length", [1, 2, 6, 7, 8, 30])
@pytest.mark.parametrize("window", [1, 4, 99])
def test_every_query_sees_as_many_keys(length: int, window: int) -> None:
    first, last = inward_range(call_at(0, length, rows=1), length, window)
    place = torch.arange(length)
    assert (last - first + 1 == min(length, 2 * window - 1)).all()
    assert ((first <= place) & (place <= last) & (first >= 0) & (last < length)).all()
    inner = (place >= window - 1) & (place < length - window + 1)
    assert (first[0, inner] == place[inner] - window + 1).all()


@pytest.mark.parametrize("window", [1, 3, 50])
def test_it_equals_its_formula_and_so_do_its_gradients(window: int) -> None:
    mixer, x = ready(window=window, boundary="inward", rope=None), noise(2, LENGTH, HIDDEN).requires_grad_()
    inputs, weight = [x, *mixer.parameters()], noise(2, LENGTH, HIDDEN, seed=4)
    y, expected = mixer(x, call_at(0, LENGTH)), by_loop(mixer, x, window)
    assert (y - expected).abs().max() < EXACT
    found, wanted = (torch.autograd.grad((one * weight).sum(), inputs) for one in (y, expected))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() < EXACT


@torch.no_grad()
def test_inside_it_is_a_plain_window_and_a_wide_one_sees_all() -> None:
    x = noise(2, LENGTH, HIDDEN)
    slid, clipped = (ready(window=3, boundary=one)(x, call_at(0, LENGTH)) for one in ("inward", "clip"))
    assert (slid - clipped)[:, 2:-2].abs().max() < EXACT
    assert (slid - clipped)[:, [0, 1, -2, -1]].abs().amax((0, 2)).min() > 1e-3
    wide, full = ready(window=8, boundary="inward"), ready()
    assert (wide(x, call_at(0, LENGTH)) - full(x, call_at(0, LENGTH))).abs().max() < EXACT


@torch.no_grad()
def test_padding_on_either_side_is_no_place() -> None:
    mixer, x = ready(window=3, boundary="inward"), noise(2, LENGTH, HIDDEN)
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    real[0, :3] = real[0, -2:] = False
    y = mixer(x, padded_call(real))
    assert y.isfinite().all()
    assert (y[:1, 3:-2] - mixer(x[:1, 3:-2], call_at(0, LENGTH - 5, rows=1))).abs().max() < EXACT
    assert (y[1] - mixer(x, call_at(0, LENGTH))[1]).abs().max() < EXACT


@torch.no_grad()
def test_attention_rows_are_those_of_the_window() -> None:
    mixer, x, seen = ready(window=3, boundary="inward"), noise(2, LENGTH, HIDDEN), []
    mixer.rows_out.queries = (0, 6, -1)
    mixer.rows_out.register_forward_hook(lambda _, __, rows: seen.append(rows))
    mixer(x, call_at(0, LENGTH))
    assert [row.nonzero().flatten().tolist() for row in seen[0][0, 0]] == [
        [0, 1, 2, 3, 4],
        [4, 5, 6, 7, 8],
        [8, 9, 10, 11, 12],
    ]
    assert (seen[0].sum(-1) - 1).abs().max() < EXACT


def test_what_it_costs_and_what_is_refused() -> None:
    site = SpecSite(HIDDEN)
    spec = Attention(heads=4, causal=False, window=8, boundary="inward")
    weights = 4 * HIDDEN * HIDDEN
    for length in (1, 14, 15, 100):
        assert spec.prefill_flops(site, length) == 2 * weights + 4 * HIDDEN * min(length, 15)
    for fields in ({"window": 8}, {"causal": False}, {"causal": False, "window": 8, "sinks": True}):
        problems = Attention.model_validate({"heads": 4, "boundary": "inward", **fields}).problems(site)
        assert [(one.field, one.code) for one in problems] == [("boundary", "conflicting-fields")]
