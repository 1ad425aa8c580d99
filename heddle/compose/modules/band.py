"""Sliding-window attention over a long sequence in blocks: its cost grows with length times window."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Fused kernels want the rows of a mask aligned.
ALIGN = 8
LEAST_BLOCK = 64


def block_length(window: int) -> int:
    """Queries that are worked on together."""
    return max(LEAST_BLOCK, _up(window))


def banded_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int, real: Tensor | None) -> Tensor:
    """Softmax attention of each query over itself and the `window` - 1 keys before it.

    The queries belong to the last T of the S keys. A block of queries looks at its own keys and at as many
    before them as a window can reach, so the work is T * (block + window) instead of T * S. A query always
    sees itself, padding or not.

    Shapes:  q, out: [B, H, T, d];  k, v: [B, KV heads, S, d];  real: [1 or B, S] bool, or None if all keys
    are
    """
    B, H, T, d = q.shape
    S, size, reach = k.shape[2], block_length(window), _up(window - 1)
    blocks = -(-T // size)
    tail = blocks * size - T
    # Keys from `reach` before the first query on; what lies before the first key is masked.
    left = reach - (S - T)
    k, v = (F.pad(side, (0, 0, left, tail)) for side in (k, v))
    real = torch.ones(1, S, dtype=torch.bool, device=q.device) if real is None else real
    seen = _unfold(F.pad(real, (left, tail)), size, reach) & _band(window, size, reach, q.device)
    mask = (seen | _diagonal(size, reach, q.device))[:, :, None].expand(B, blocks, 1, size, reach + size)
    q = F.pad(q, (0, 0, 0, tail)).view(B, H, blocks, size, d).transpose(1, 2)
    k, v = (side.unfold(2, reach + size, size).permute(0, 2, 1, 4, 3) for side in (k, v))
    o = F.scaled_dot_product_attention(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        attn_mask=mask.flatten(0, 1),
        enable_gqa=k.shape[2] != H,
    )
    return o.view(B, blocks, H, size, d).transpose(1, 2).flatten(2, 3)[:, :, :T]


def _unfold(real: Tensor, size: int, reach: int) -> Tensor:
    """Shapes:  real: [B, reach + blocks * size];  out: [B, blocks, 1, reach + size]"""
    return real.unfold(1, reach + size, size)[:, :, None]


def _band(window: int, size: int, reach: int, device: torch.device) -> Tensor:
    """Shapes:  out: [size, reach + size] bool"""
    distance = torch.arange(reach, reach + size, device=device)[:, None] - torch.arange(
        reach + size, device=device
    )
    return (distance >= 0) & (distance < window)


def _diagonal(size: int, reach: int, device: torch.device) -> Tensor:
    """Shapes:  out: [size, reach + size] bool"""
    return torch.arange(reach, reach + size, device=device)[:, None] == torch.arange(
        reach + size, device=device
    )


def _up(number: int) -> int:
    """`number` rounded up to a multiple of the alignment."""
    return -(-number // ALIGN) * ALIGN
