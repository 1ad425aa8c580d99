"""A recurrence that begins again in every chunk of tokens, by doubling, and attention in blocks of queries over what chunks
came to: what the plain torch of rat_scan and rat_attention is made of, and layers whose padding moves the chunks of each row."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.kernels.dense_attention import dense_attention
from heddle.kernels.op import wide_dtype

# Queries of one attention over summaries.
QUERIES = 4096


def gated_scan(written: Tensor, gate: Tensor, begins: Tensor, past: Tensor | None, reach: int) -> Tensor:
    """y_t = g_t * y_{t-1} + w_t, w what is `written`, from 0 at a token that `begins` a chunk.

    A chunk has at most `reach` tokens.

    Doubling: after step s, y_t holds the terms of the last 2^s tokens and a_t is the product of their gates. Nothing is
    divided, so a product that underflows only drops what has no weight.

    Shapes:  written, out: [B, T, N, C];  gate: [B, T, 1, C], both at least float32;  begins: [1 or B, T] bool
             past: [B, N, C], y before the first token
    """
    y, a = written, gate.masked_fill(begins[..., None, None], 0.0)
    if past is not None:
        y = torch.cat((y[:, :1] + a[:, :1] * past[:, None], y[:, 1:]), dim=1)
    step = 1
    while step < reach:
        y = torch.cat((y[:, :step], torch.addcmul(y[:, step:], a[:, step:], y[:, :-step])), dim=1)
        a = torch.cat((a[:, :step], a[:, step:] * a[:, :-step]), dim=1)
        step *= 2
    return y


def gates(raw: Tensor) -> tuple[Tensor, Tensor]:
    """g = sigmoid(raw) and 1 - g, each with all its digits where it is near 0, and so are their gradients."""
    return F.logsigmoid(raw).exp(), F.logsigmoid(-raw).exp()


def attend_with_own(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    own: tuple[Tensor, Tensor],
    *,
    seen: Tensor | None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of each query over shared keys and one key of its own.

        o_t = (sum_j e^l_tj v_j + e^s_t v'_t) / (sum_j e^l_tj + e^s_t),   l_tj = scale q_t · k_j,   s_t = scale q_t · k'_t

    Many queries take one fused attention of slightly wider heads: one key more, (0, 1), meets the query (q_t, q_t · k'_t) with
    the logit s_t, and one value more, (0, 1), hands out its weight w_t, so that o_t = (sum_j p_tj v_j) + w_t v'_t. Narrow
    types carry q_t · k'_t in two numbers, the rounded one and what was rounded off.

    Shapes:  q, out: [B, H, T, d];  k, v: [B, H, S, d];  own: two of [B, H, T, d];  seen: [1 or B, 1, T, S] bool, None for all
    """
    own_key, own_value = own
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if k.shape[2] == 0:
        return own_value
    # The own key is always seen.
    mask = None if seen is None else F.pad(seen, (0, 1), value=True)
    if q.shape[2] == 1:
        k, v = torch.cat((k, own_key), dim=2), torch.cat((v, own_value), dim=2)
        return dense_attention(q, k, v, mask, scale=scale)
    size, wide = q.shape[-1], wide_dtype(q.dtype)
    dot = (q.to(wide) * own_key.to(wide)).sum(-1, keepdim=True)
    parts = [dot.to(q.dtype)]
    if dot.dtype != q.dtype:
        parts.append((dot - parts[0]).to(q.dtype))
    # Fused kernels want a multiple of 8 numbers in narrow types.
    width = size + 1 if len(parts) == 1 else (size + len(parts) + 7) // 8 * 8
    extra = torch.zeros(width, device=q.device, dtype=q.dtype)
    key, value = extra.clone(), extra.clone()
    key[size : size + len(parts)] = 1.0
    value[size] = 1.0
    q = F.pad(torch.cat((q, *parts), dim=-1), (0, width - size - len(parts)))
    k, v = (
        torch.cat((F.pad(side, (0, width - size)), row.expand(*side.shape[:2], 1, width)), dim=2)
        for side, row in ((k, key), (v, value))
    )
    o = dense_attention(q, k, v, mask, scale=scale)
    return o[..., :size] + o[..., size : size + 1] * own_value


def attend_in_blocks(
    q: Tensor,
    summaries: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    rows: tuple[Tensor, Tensor] | None,
    *,
    start: int,
    chunk: int,
    scale: float | None = None,
) -> Tensor:
    """Each token over the summaries in its `rows`, from one to before another (None: over all), and over its own key.

    In blocks of queries, each over those summaries alone that its last one may see: half of the work, and small masks.

    Shapes:  q, out: [B, H, T, d];  summaries: two of [B, H, S, d];  own: two of [B, H, T, d];  rows: two of [1 or B, T]
    """
    tokens, blocks = q.shape[2], []
    for first in range(0, tokens, QUERIES):
        last = min(first + QUERIES, tokens)
        # A token is in a chunk whose summary has at most this number.
        keys, values = (side[:, :, : (start + last - 1) // chunk + 1] for side in summaries)
        seen = None
        if rows is not None:
            low, high = (side[:, None, first:last, None] for side in rows)
            row = torch.arange(keys.shape[2], device=q.device)
            seen = (row >= low) & (row < high)
        mine = (own[0][:, :, first:last], own[1][:, :, first:last])
        blocks.append(attend_with_own(q[:, :, first:last], keys, values, mine, seen=seen, scale=scale))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)
