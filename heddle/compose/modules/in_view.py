"""Attention of new tokens to the keys so far, as much of them as is in view."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from heddle.compose.cache import Call, KVLayer
from heddle.compose.modules.band import banded_attention, block_length
from heddle.compose.modules.documents import each_document
from heddle.compose.modules.masks import View, attention_mask, distances, key_mask, real_keys

# Entries of a mask that may stand in memory at once for each row of a batch; of a larger one queries that are worked on together.
MOST, QUERIES = 4096 * 4096, 512


def keys_so_far(k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """Adds the new tokens to the cache, if there is one; all keys and values, the new ones last, and which of them are written.

    Shapes:  k, v: [B, KV heads, T, d];  out: twice [B, KV heads, S, d], and [B, S] of 0 and 1, or None for all
    """
    written = call.written
    if isinstance(call.cache, KVLayer):
        new = k.shape[2]
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
    (k, v, written), queries = keys, q.shape[2]
    real = None if call.key_padding is None else call.key_padding[:, -k.shape[2] :]
    if view.window is not None and queries > 2 * block_length(view.window):
        return banded_attention(q, k, v, view=view, real=real, written=written, attend=attend)
    if (real is not None or written is not None) and queries * k.shape[2] > MOST:
        return _by_queries(q, keys, real, view, attend)
    if written is None:
        mask = attention_mask(call, queries, k.shape[2], view)
        return attend(q, k, v, mask, is_causal=view.causal and queries > 1)
    distance, marks = distances(queries, k.shape[2], q.device), written[:, None, None]
    return attend(q, k, v, key_mask(distance, view, real_keys(call, k.shape[2]), written=marks))


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
    real: Tensor | None,
    view: View,
    attend: Callable[..., Tensor],
) -> Tensor:
    """As `attend_in_view`, some queries after the others; training makes their masks and weights a second time.

    Shapes:  q, out: [B, H, T, d];  real: [B, S] or None
    """
    (k, v, written), told = keys, []

    def part(first: int, q: Tensor, k: Tensor, v: Tensor, written: Tensor | None) -> Tensor:
        place = torch.arange(first, first + q.shape[2], device=q.device)
        limit = None if real is None else real[:, None, None, : k.shape[2]]
        marks = None if written is None else written[:, None, None]
        distance = place[:, None] - torch.arange(k.shape[2], device=q.device)
        return attend(q, k, v, key_mask(distance, view, limit, written=marks))

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
