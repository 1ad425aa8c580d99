"""Sliding-window attention over a long sequence in blocks: its cost grows with length times window."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.compose.modules.masks import View, key_mask

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
) -> Tensor:
    """Softmax attention of each query over the keys of its `view`, which must have a window.

    The queries belong to the last T of the S keys. A block of queries looks at its own keys and at as many
    before them (without `causal` after them, too) as a window can reach, so the work is T * (block + reach) instead of
    T * S. A query always sees itself, padding or not.

    Shapes:  q: [B, H, T, d];  k: [B, KV heads, S, d];  v: [B, KV heads, S, V];  out: [B, H, T, V];
             real: [1 or B, S] bool, or None if all keys are;  written: [B, S], as in `key_mask`
    """
    assert view.window is not None
    B, H, T, d = q.shape
    S, size, reach = k.shape[2], block_length(view.window), _up(view.window - 1)
    blocks = -(-T // size)
    tail = blocks * size - T
    ahead = 0 if view.causal else reach
    # Keys from `reach` before the first query on; what lies before the first key or after the last is masked.
    left, right, width = reach - (S - T), tail + ahead, reach + size + ahead
    k, v = (F.pad(side, (0, 0, left, right)) for side in (k, v))
    real = torch.ones(1, S, dtype=torch.bool, device=q.device) if real is None else real
    marks = None if written is None else _unfold(F.pad(written, (left, right)), size, width)
    distance = torch.arange(reach, reach + size, device=q.device)[:, None] - torch.arange(
        width, device=q.device
    )
    mask = key_mask(distance, view, _unfold(F.pad(real, (left, right)), size, width), written=marks)
    mask = mask[:, :, None].expand(B, blocks, 1, size, width)
    q = F.pad(q, (0, 0, 0, tail)).view(B, H, blocks, size, d).transpose(1, 2)
    k, v = (side.unfold(2, width, size).permute(0, 2, 1, 4, 3) for side in (k, v))
    o = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask.flatten(0, 1))
    return o.view(B, blocks, H, size, v.shape[-1]).transpose(1, 2).flatten(2, 3)[:, :, :T]


def _unfold(keys: Tensor, size: int, width: int) -> Tensor:
    """Shapes:  keys: [B, width + (blocks - 1) * size];  out: [B, blocks, 1, width]"""
    return keys.unfold(1, width, size)[:, :, None]


def _up(number: int) -> int:
    """`number` rounded up to a multiple of the alignment."""
    return -(-number // ALIGN) * ALIGN
