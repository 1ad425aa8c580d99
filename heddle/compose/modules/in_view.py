"""Attention of new tokens to the keys so far, as much of them as is in view."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from heddle.compose.cache import Call, KVLayer
from heddle.compose.modules.band import banded_attention, block_length
from heddle.compose.modules.masks import View, attention_mask, distances, key_mask, real_keys


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
    (k, v, written), queries = keys, q.shape[2]
    if view.window is not None and queries > 2 * block_length(view.window):
        real = None if call.key_padding is None else call.key_padding[:, -k.shape[2] :]
        return banded_attention(q, k, v, view=view, real=real, written=written, attend=attend)
    if written is None:
        mask = attention_mask(call, queries, k.shape[2], view)
        return attend(q, k, v, mask, is_causal=view.causal and queries > 1)
    distance, marks = distances(queries, k.shape[2], q.device), written[:, None, None]
    return attend(q, k, v, key_mask(distance, view, real_keys(call, k.shape[2]), written=marks))
