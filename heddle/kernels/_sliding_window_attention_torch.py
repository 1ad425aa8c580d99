"""sliding_window_attention in plain torch: blocks of queries over the keys in view of any of them, and over the sinks.

Sums are float32 (float64 for float64); weights are rounded to the dtype before they multiply values, as in the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.kernels.op import wide_dtype

# Queries that are worked on together.
QUERIES = 64


def attend(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor | None, scale: float, *, window: int, sinks: int
) -> Tensor:
    """The last T of S places are the queries'; gradients are autograd's.

    Shapes:  q: [B, H, T, d];  k: [B, N, S, d];  v: [B, N, S, V];  real: [1 or B, S] bool;  out: [B, H, T, V]
    """
    (T, S), wide = (q.shape[2], k.shape[2]), wide_dtype(q.dtype)
    reach, sinks, device = min(window, S) - 1, min(sinks, S), q.device
    blocks = -(-T // QUERIES)
    tail, left = blocks * QUERIES - T, reach - (S - T)
    width = reach + QUERIES
    real = torch.ones(1, S, dtype=torch.bool, device=device) if real is None else real
    # Keys from `reach` before the first query on: of block c those from place c QUERIES + S - T - reach on.
    near_k, near_v = (F.pad(x.to(wide), (0, 0, left, tail)).unfold(2, width, QUERIES) for x in (k, v))
    query = torch.arange(blocks * QUERIES, device=device).view(blocks, QUERIES, 1) + S - T
    key = torch.arange(width, device=device) + query[:, :1] - reach
    distance, is_real = query - key, F.pad(real, (left, tail)).unfold(1, width, QUERIES)[:, :, None]
    seen = (distance >= 0) & (distance <= reach) & (key >= sinks) & (is_real | (distance == 0))
    # A query that is only there to fill its block would see nothing, and its gradients be no numbers.
    seen = seen | (query >= S)
    grouped = F.pad(q.to(wide), (0, 0, 0, tail)).unflatten(1, (k.shape[1], -1))  # type: ignore[no-untyped-call]
    grouped = grouped.unflatten(3, (blocks, QUERIES))  # [B, N, G, blocks, QUERIES, d]
    logits = grouped @ near_k[:, :, None]
    logits = logits.masked_fill(~seen[:, None, None], -torch.inf)
    if sinks:
        key = torch.arange(sinks, device=device)
        seen = (key <= query) & (real[:, None, None, :sinks] | (key == query))
        to_sinks = grouped @ k[:, :, None, None, :sinks].to(wide).mT
        logits = torch.cat((to_sinks.masked_fill(~seen[:, None, None], -torch.inf), logits), dim=-1)
    p = torch.softmax(logits * scale, dim=-1).to(q.dtype).to(wide)
    o = p[..., sinks:] @ near_v[:, :, None].mT
    if sinks:
        o = o + p[..., :sinks] @ v[:, :, None, None, :sinks].to(wide)
    return o.flatten(3, 4)[:, :, :, :T].flatten(1, 2).to(v.dtype)
