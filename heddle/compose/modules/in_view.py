"""Attention of new tokens to the keys so far, as much of them as is in view."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from heddle.compose.cache import Call, KVLayer
from heddle.compose.modules.band import banded_attention, block_length
from heddle.compose.modules.documents import each_document
from heddle.compose.modules.masks import (
    View,
    attention_mask,
    distances,
    key_mask,
    real_keys,
    sink_columns,
    sink_keys,
)
from heddle.compose.sink_cache import SinkKVLayer

# Entries of a mask that may stand in memory at once for each row of a batch; of a larger one queries that are worked on together.
MOST, QUERIES = 4096 * 4096, 512


def keys_so_far(k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Adds the new tokens to the cache, if there is one; all keys and values, the new ones last, and which of them are written.

    Shapes:  k, v: [B, KV heads, T, d];  out: twice [B, KV heads, S, d], and [B, S] of 0 and 1, or None for all
    """
    written = call.written
    if isinstance(call.cache, KVLayer):
        new = k.shape[2]
        if isinstance(call.cache, SinkKVLayer):
            call.cache.find_first(call, new)
        k, v = call.cache.update(k, v)
        written = marks_so_far(call.cache, call, k, k.shape[2] - new)
    return k, v, written


def marks_so_far(cache: KVLayer, call: Call, like: Tensor, earlier: int) -> Tensor | None:
    """Which keys are written, the call's own behind so many `earlier` ones; None for all.

    Shapes:  like: [B, ...], of the type wanted;  out: [B, S] of 0 and 1
    """
    written = call.written
    if written is None and cache.written is None:
        return None
    if written is None:
        written = like.new_ones(call.positions.shape[-1]).expand(like.shape[0], -1)
    return cache.mark(written, earlier)


def attend_in_view(
    q: Tensor,
    keys: tuple[Tensor, Tensor, Tensor | None],
    call: Call,
    view: View,
    attend: Callable[..., Tensor],
) -> Tensor:
    """What `attend` gives for queries that belong to the last tokens of `keys`, which are as `keys_so_far` gives them.

    Shapes:  q, out: [B, H, T, d]
    """
    if call.packing is not None:
        return _by_documents(q, keys, call, view, attend)
    (k, v, written), queries, held = keys, q.shape[2], keys[0].shape[2]
    if view.window is not None and queries > 2 * block_length(view.window) and not view.sees_all(held):
        real = real_keys(call, held, view.sinks)
        flat = None if real is None else real[:, 0, 0]
        first = sink_columns(call, held, view.sinks) if view.sinks else None
        return banded_attention(q, k, v, view=view, real=flat, written=written, attend=attend, sinks=first)
    if makes_large_mask(call, queries, held, is_written=written is not None):
        return _by_queries(q, keys, call, view, attend)
    if written is None:
        mask = attention_mask(call, queries, held, view)
        return attend(q, k, v, mask, is_causal=view.causal and queries > 1)
    real, sinks = real_keys(call, held, view.sinks), sink_keys(call, held, view.sinks)
    distance, marks = distances(queries, held, q.device), written[:, None, None]
    return attend(q, k, v, key_mask(distance, view, real, sinks=sinks, written=marks))


def makes_large_mask(call: Call, queries: int, keys: int, *, is_written: bool = False) -> bool:
    """Whether one mask of all queries would be larger than may stand in memory: behind padding, or after earlier tokens."""
    is_masked = call.key_padding is not None or is_written or 1 < queries < keys
    return is_masked and queries * keys > MOST


def _by_documents(
    q: Tensor,
    keys: tuple[Tensor, Tensor, Tensor | None],
    call: Call,
    view: View,
    attend: Callable[..., Tensor],
) -> Tensor:
    """As `attend_in_view`, one packed document after the other.  Shapes:  q, out: [1, H, T, d]"""
    assert call.packing is not None
    k, v, written = keys
    if written is None and (view.window is None or view.window >= max(call.packing.lengths)):
        return attend(q, k, v, None, is_causal=view.causal, packing=call.packing)
    calls = each_document(call)
    marks = [None] * len(calls) if written is None else call.packing.each(written, 1)
    sides = zip(*(call.packing.each(side, 2) for side in (q, k, v)), marks, calls, strict=True)
    told = [attend_in_view(q, (k, v, own), one, view, attend) for q, k, v, own, one in sides]
    return torch.cat(told, dim=2)


def _by_queries(
    q: Tensor,
    keys: tuple[Tensor, Tensor, Tensor | None],
    call: Call,
    view: View,
    attend: Callable[..., Tensor],
) -> Tensor:
    """As `attend_in_view`, some queries after the others; training makes their masks and weights a second time.

    Shapes:  q, out: [B, H, T, d]
    """
    (k, v, written), told = keys, []
    marked = (real_keys(call, k.shape[2], view.sinks), sink_keys(call, k.shape[2], view.sinks))

    def part(first: int, q: Tensor, k: Tensor, v: Tensor, written: Tensor | None) -> Tensor:
        place = torch.arange(first, first + q.shape[2], device=q.device)
        real, sinks = (None if side is None else side[..., : k.shape[2]] for side in marked)
        marks = None if written is None else written[:, None, None]
        distance = place[:, None] - torch.arange(k.shape[2], device=q.device)
        mask = key_mask(distance, view, real, sinks=sinks, written=marks)
        return attend(q, k, v, mask if mask.dim() == 4 else mask[None, None])

    # The gradient of a mask is one of each head.
    size = QUERIES if written is None or not written.requires_grad else QUERIES // 4
    first = k.shape[2] - q.shape[2]
    for some in torch.split(q, size, dim=2):
        end = first + some.shape[2] if view.causal else k.shape[2]
        given = (first, some, k[:, :, :end], v[:, :, :end], None if written is None else written[:, :end])
        told.append(
            checkpoint(part, *given, use_reentrant=False, preserve_rng_state=False)
            if torch.is_grad_enabled()
            else part(*given)
        )
        first += some.shape[2]
    return torch.cat(told, dim=2)
