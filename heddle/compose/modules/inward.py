"""Windows to both sides that slide inward at the ends, so that every query sees as many keys."""

from __future__ import annotations

import torch
from torch import Tensor

from heddle.compose.cache import Call
from heddle.kernels.span_attention import span_attention


def inward_range(call: Call, tokens: int, window: int) -> tuple[Tensor, Tensor]:
    """The keys that each token sees: those at first … last, which are min(N, 2 r + 1) of the N real ones.    (arXiv 2511.14712)

        first_i = clamp(i - r, 0, N - 2 r - 1),   r = window - 1,   places counted from the row's first real token

    Shapes:  out: twice [1 or B, T] int64, places in the whole row
    """
    places, reach = torch.arange(tokens, device=call.positions.device)[None], window - 1
    if call.key_padding is None:
        shift, count = torch.zeros_like(places[:, :1]), torch.full_like(places[:, :1], tokens)
    else:
        real = (call.key_padding > 0).long()
        shift, count = real.argmax(dim=-1, keepdim=True), real.sum(dim=-1, keepdim=True)
    most = (count - 2 * reach - 1).clamp(min=0)
    first = torch.minimum((places - shift - reach).clamp(min=0), most)
    last = torch.minimum(first + 2 * reach, count - 1)
    return first + shift, last + shift


def inward_attention(
    q: Tensor, k: Tensor, v: Tensor, call: Call, *, window: int, scale: float | None
) -> Tensor:
    """Softmax attention of each token over the keys of its inward window.

    Shapes:  q, out: [B, H, T, d];  k, v: [B, KV heads, T, d]
    """
    first, last = inward_range(call, q.shape[2], window)
    group, tokens = q.shape[1] // k.shape[1], q.shape[2]
    k, v = (side.repeat_interleave(group, dim=1) for side in (k, v))
    first, last, order = (
        x[:, None].expand(*q.shape[:2], -1)
        for x in (first, last + 1, torch.arange(tokens, device=q.device)[None])
    )
    width = min(2 * window - 1, tokens)
    return span_attention(q, k, v, order, first=first, last=last, own=v, width=width, scale=scale)
