"""Sink tokens beside a window: what is seen of them; behind padding, in pieces, by each way that computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import EXACT, call_at, left_padded, model_with, noise, padded_call, shaken, tokens

from heddle.compose.build import build
from heddle.compose.cache import Call
from heddle.compose.modules import in_view
from heddle.compose.modules.in_view import attend_in_view, keys_so_far
from heddle.compose.modules.masks import View
from heddle.compose.modules.sliding import attend_sliding
from heddle.compose.modules.softmax import softmax_attention
from heddle.compose.plan import plan
from heddle.compose.position_bias import layer_weights
from heddle.compose.sink_cache import SinkKVLayer
from heddle.errors import HeddleError
from heddle.specs import ModelSpec, Site
from heddle.specs.pattern import layers_of
from heddle.specs.sight import Sight, first_seen, of_either, reach

PADDING = (0, 5, 30, 100)
Sides = tuple[Tensor, Tensor, Tensor]


def sides_of(length: int, rows: int = len(PADDING)) -> Sides:
    q, k, v = (noise(rows, heads, length, 6, seed=heads) for heads in (4, 2, 1))
    return q, k, v.expand(-1, 2, -1, -1)


def behind_padding(length: int) -> Tensor:
    return torch.arange(length) >= torch.tensor(PADDING)[:, None]


def expected(sides: Sides, real: Tensor, view: View, written: Tensor | None = None) -> Tensor:
    """By the places of tokens in their row without its padding."""
    assert view.window is not None
    place = real.long().cumsum(1) - 1
    back = place[:, :, None] - place[:, None]
    seen = (back < view.window) | (place[:, None] < view.sinks)
    seen = seen if written is None else seen & (written[:, None] > 0)
    seen = (seen & (back > 0) & real[:, None]) | torch.eye(real.shape[1], dtype=torch.bool)
    q, k, v = (side.repeat_interleave(4 // side.shape[1], dim=1) for side in sides)
    logits = (q @ k.mT / 6**0.5).masked_fill(~seen[:, None], -torch.inf)
    return torch.softmax(logits, dim=-1) @ v


def by_masks(q: Tensor, keys: tuple[Tensor, Tensor, Tensor | None], call: Call, view: View) -> Tensor:
    return attend_in_view(q, keys, call, view, softmax_attention)


# Windows so short that there are blocks of queries, and longer ones; first tokens that fill no block, and many.
VIEWS = [View(7, sinks=3), View(1, sinks=9), View(50, sinks=20), View(30, sinks=140)]


@pytest.mark.parametrize("view", VIEWS)
def test_a_query_sees_its_window_and_the_first_tokens_that_are_no_padding(
    view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides, real = sides_of(170), behind_padding(170)
    wanted, rows = expected(sides, real, view), real[:, None, :, None]
    q, keys, call = sides[0], (*sides[1:], None), padded_call(real)
    for attend in (by_masks, attend_sliding):
        assert ((attend(q, keys, call, view) - wanted) * rows).abs().max() < EXACT
    monkeypatch.setattr(in_view, "MOST", 1000)
    assert ((by_masks(q, keys, call, view) - wanted) * rows).abs().max() < EXACT
    for attend in (by_masks, attend_sliding):
        # As the first row, which has no padding.
        alone = attend(q[:1], (sides[1][:1], sides[2][:1], None), call_at(0, 170, rows=1), view)
        assert (alone - wanted[:1]).abs().max() < EXACT


@pytest.mark.parametrize("view", VIEWS)
def test_a_first_token_that_is_not_written_is_seen_by_itself_alone(
    view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides, real = sides_of(170), behind_padding(170)
    written = (noise(len(PADDING), 170, seed=9) > 0).double().requires_grad_()
    rows = real[:, None, :, None]
    wanted = expected(sides, real, view, written) * rows

    def both() -> tuple[Tensor, ...]:
        o = by_masks(sides[0], (*sides[1:], written), padded_call(real), view) * rows
        return (o, *torch.autograd.grad(o.sin().sum(), written))

    found, gradient = both()
    assert (found - wanted).abs().max() < EXACT
    # One mask of all queries in the place of one for each block of them, if there were any.
    monkeypatch.setattr(in_view, "block_length", lambda _: 170)
    whole, other = both()
    assert (whole - wanted).abs().max() < EXACT
    assert (gradient - other).abs().max() < EXACT
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("ends", [range(1, 171), [40, 41, 170], [3, 20, 21, 90, 160, 170], [150, 151, 170]])
@pytest.mark.parametrize("view", VIEWS[:3])
def test_rows_of_a_batch_in_pieces_keep_their_own_first_tokens(view: View, ends: Any) -> None:
    sides, real = sides_of(170), behind_padding(170)
    cache, start, pieces = SinkKVLayer(view.window or 0, view.sinks), 0, []
    for end in ends:
        positions = torch.zeros(len(PADDING), end - start, dtype=torch.int64)
        call = Call(positions, real[:, start:end], real[:, :end], cache)
        q, k, v = (one[:, :, start:end] for one in sides)
        pieces.append(by_masks(q, keys_so_far(k, v, call), call, view))
        cache.advance(end - start)
        start = end
        assert cache.keys is not None
        assert cache.keys.shape[2] == min(end, view.sinks + (view.window or 0) - 1)
    wrong = (torch.cat(pieces, dim=2) - expected(sides, real, view)) * real[:, None, :, None]
    assert wrong.abs().max() < EXACT


@pytest.mark.parametrize("attend", [by_masks, attend_sliding])
@pytest.mark.parametrize("ends", [[3, 20, 21, 90, 170], [150, 151, 170]])
def test_keys_as_a_cache_holds_them_are_attended_to_as_all(attend: Callable[..., Tensor], ends: Any) -> None:
    view, sides = View(9, sinks=4), sides_of(170, 2)
    cache, start, pieces = SinkKVLayer(9, 4), 0, []
    for end in ends:
        call = call_at(start, end - start, cache)
        q, k, v = (one[:, :, start:end] for one in sides)
        pieces.append(attend(q, keys_so_far(k, v, call), call, view))
        cache.advance(end - start)
        start = end
    real = torch.ones(2, 170, dtype=torch.bool)
    assert (torch.cat(pieces, dim=2) - expected(sides, real, view)).abs().max() < EXACT


def attending(fields: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "attention", "heads": 4, "kv_heads": 2, **fields}


SUNK = {"window": 6, "sink_tokens": 3}
MODELS: dict[str, list[dict[str, Any]]] = {
    "a window": [attending(SUNK)],
    "keys of another layer": [
        attending(SUNK),
        attending(SUNK | {"keys_from": "b0"}),
        attending({"window": 4, "keys_from": "b0"}),
    ],
    "liger": [{"kind": "liger", "heads": 4, "kv_heads": 2, **SUNK}],
    "moh": [{"kind": "moh", "mixer": attending(SUNK), "shared_heads": 1, "active": 1}],
    "a window beside a memory": [
        {"kind": "parallel", "mixers": [attending(SUNK), {"kind": "ttt", "heads": 2, "chunk": 4}]}
    ],
    "windows of which one is picked": [
        {"kind": "layer_router", "mixers": [attending({}), attending(SUNK)], "router_dim": 4, "pool": 3}
    ],
}


def spec_of(*mixers: dict[str, Any]) -> ModelSpec:
    blocks = {f"b{index}": {"mixer": one, "channel": {"kind": "none"}} for index, one in enumerate(mixers)}
    sizes = {"vocab_size": 256, "hidden_size": 24, "blocks": blocks}
    return ModelSpec.model_validate(sizes | {"layers": [*blocks]})


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_rows_behind_padding_are_generated_as_alone(name: str) -> None:
    spec = spec_of(*MODELS[name])
    model, ids = shaken(build(spec, seed=0)), tokens(30)
    padded, mask = left_padded(ids[:1], 17)
    both = torch.cat((padded, tokens(47, 1, seed=5)))
    marks = torch.cat((mask, torch.ones_like(mask)))
    told = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(both, attention_mask=marks, **told)
    alone = model.generate(ids[:1], attention_mask=torch.ones(1, 30, dtype=torch.int64), **told)
    assert torch.equal(together[0, 17:], alone[0])


def test_sink_tokens_stand_beside_a_causal_window_alone() -> None:
    for kind, fields, hint in (
        ("causal_lm", {}, "a window, or sink_tokens: 0"),
        ("encoder", {"window": 5, "causal": False}, "causal: true, or sink_tokens: 0"),
    ):
        with pytest.raises(HeddleError) as told:
            build(model_with(attending({"sink_tokens": 2, **fields}), 24, kind=kind))
        assert told.value.code == "conflicting-fields"
        assert told.value.where.path == "layers.0.mixer.sink_tokens"
        assert told.value.hint == hint
    with pytest.raises(HeddleError, match="with share 1 there is no softmax"):
        build(model_with({"kind": "liger", "heads": 4, "share": 1.0, "sink_tokens": 2}, 24))


@pytest.mark.parametrize(("source", "asked"), [(3, 2), (0, 2), (3, 4)])
def test_a_reader_of_a_windows_keys_sees_the_first_tokens_that_are_kept(source: int, asked: int) -> None:
    given = attending({"window": 6, "sink_tokens": source})
    taking = attending({"window": 6, "sink_tokens": asked, "keys_from": "b0"})
    with pytest.raises(HeddleError, match=f"keeps {source} first tokens beside its window, and {asked} are"):
        plan(spec_of(given, taking))
    # Of a source that keeps all, any may be seen.
    plan(spec_of(attending({}), taking))


def test_first_tokens_are_heard_from_everywhere_and_carry_no_others() -> None:
    spec, site = spec_of(attending(SUNK), attending({"window": 4})), Site(24)
    layers = layers_of(spec)
    assert (reach(layers, site), first_seen(layers, site)) == (5 + 3, 3)
    weights = layer_weights([Sight(4, sinks=2)], 12)
    assert (weights[11] > 0).nonzero()[0].tolist() == [0, 1, 8, 9, 10, 11]
    assert weights.sum(1) == pytest.approx(np.ones(12))
    either = of_either([[Sight(4, sinks=2)], [Sight(4)]])
    assert [one.sinks for one in either] == [0, 0]
    assert of_either([[Sight()], [Sight(4, sinks=2)]])[1] == Sight(4, sinks=2)
