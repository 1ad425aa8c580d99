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
        if written is not None or call.cache.written is not None:
            written = k.new_ones(k.shape[0], new) if written is None else written
            written = call.cache.mark(written, k.shape[2] - new)
    return k, v, written


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
