"""Sliding-window attention over a long sequence in blocks: its cost grows with length times window."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.compose.modules.masks import View, columns_of, key_mask

# Fused kernels want the rows of a mask aligned.
ALIGN = 8
LEAST_BLOCK = 64


def block_length(window: int) -> int:
    """Queries that are worked on together."""
    return max(LEAST_BLOCK, _up(window))


def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    view: View,
    real: Tensor | None,
    written: Tensor | None,
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention of each query over the keys of its `view`, which must have a window.

    The queries belong to the last T of the S keys. A block of queries looks at its own keys and at as many
    before them (without `causal` after them, too) as a window can reach, so the work is T * (block + reach) instead of
    T * S. A query always sees itself, padding or not. What stands at `sinks` every block looks at, too.

    Shapes:  q: [B, H, T, d];  k: [B, KV heads, S, d];  v: [B, KV heads, S, V];  out: [B, H, T, V];
             real: [1 or B, S] bool, or None if all keys are;  written: [B, S], as in `key_mask`;
             sinks: [1 or B, n], as of `sink_columns`, or None
    """
    assert view.window is not None
    B, H, T, d = q.shape
    S, size, reach = k.shape[2], block_length(view.window), _up(view.window - 1)
    blocks = -(-T // size)
    tail = blocks * size - T
    ahead = 0 if view.causal else reach
    # Keys from `reach` before the first query on; what lies before the first key or after the last is masked.
    left, right, width = reach - (S - T), tail + ahead, reach + size + ahead
    real = torch.ones(1, S, dtype=torch.bool, device=q.device) if real is None else real
    padded = (F.pad(side, (0, 0, left, right)) for side in (k, v))
    near_k, near_v = (side.unfold(2, width, size).permute(0, 2, 1, 4, 3) for side in padded)
    marks = None if written is None else _unfold(F.pad(written, (left, right)), size, width)
    distance = torch.arange(reach, reach + size, device=q.device)[:, None] - torch.arange(
        width, device=q.device
    )
    mask = key_mask(distance, view, _unfold(F.pad(real, (left, right)), size, width), written=marks)
    if sinks is not None:
        place = torch.arange(S - T, S + tail, device=q.device).view(blocks, size)
        near_k, near_v, mask = _with_sinks(
            (near_k, near_v, mask), (k, v), sinks, place, window=view.window, marked=(real, written)
        )
    mask = mask[:, :, None].expand(B, blocks, 1, size, mask.shape[-1])
    q = F.pad(q, (0, 0, 0, tail)).view(B, H, blocks, size, d).transpose(1, 2)
    o = attend(q.flatten(0, 1), near_k.flatten(0, 1), near_v.flatten(0, 1), mask.flatten(0, 1))
    return o.view(B, blocks, H, size, v.shape[-1]).transpose(1, 2).flatten(2, 3)[:, :, :T]


def _with_sinks(
    near: tuple[Tensor, Tensor, Tensor],
    keys: tuple[Tensor, Tensor],
    columns: Tensor,
    place: Tensor,
    *,
    window: int,
    marked: tuple[Tensor, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and mask of blocks with the sinks at their ends, each for the queries that have it not in their window.

    Shapes:  near, out: twice [B, blocks, KV heads, keys of a block, *], and [1 or B, blocks, size, keys of a block];
             columns: [1 or B, n], S for none;  place: [blocks, size];  marked: real and written, as of `banded_attention`
    """
    (real, written), S = marked, keys[0].shape[2]
    columns = F.pad(columns, (0, -columns.shape[1] % ALIGN), value=S)
    distance = place[..., None] - columns[:, None, None]
    distance = torch.where(distance < window, -1, distance)
    index = columns.clamp(max=S - 1)
    real = real.gather(1, index)[:, None, None]
    if written is not None:
        written = written.gather(1, index.expand(written.shape[0], -1))[:, None, None]
    mask = key_mask(distance, View(), real, written=written)
    mask = mask.expand(*near[2].shape[:3], -1)
    firsts = (columns_of(side, columns)[:, None].expand(-1, place.shape[0], -1, -1, -1) for side in keys)
    k, v = (torch.cat(both, dim=3) for both in zip(near[:2], firsts, strict=True))
    return k, v, torch.cat((near[2], mask), dim=3)


def _unfold(keys: Tensor, size: int, width: int) -> Tensor:
    """Shapes:  keys: [B, width + (blocks - 1) * size];  out: [B, blocks, 1, width]"""
    return keys.unfold(1, width, size)[:, :, None]


def _up(number: int) -> int:
    """`number` rounded up to a multiple of the alignment."""
    return -(-number // ALIGN) * ALIGN
