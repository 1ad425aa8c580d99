"""Softmax attention of given queries over given keys: fused, unless its logits are changed on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from heddle.compose.modules.masks import View, distances
from heddle.compose.modules.packing import Packing
from heddle.compose.modules.precision import wide
from heddle.compose.modules.stretches import is_long
from heddle.kernels.dense_attention import dense_attention

# Weights that stand in memory at once; of more than these some queries are worked on after the others.
MOST = 1 << 26


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    packing: Packing | None = None,
) -> Tensor:
    """o_i = sum_j p_ij v_j,   p_ij = e^l_ij / (sum_j e^l_ij + e^sink),   l_ij = cap · tanh(scale · q_i · k_j / cap)

    Without a cap l = scale · q_i · k_j (arXiv 2408.00118); without sinks there is no such term (GPT-OSS). `scale` None is
    1 / sqrt(d). `mask` is bool, or a bias of the logits; None lets all through, or with `is_causal` (S = T) all before. A cap
    or sinks take the explicit path: logits stand in memory in at least float32, at most `MOST` of them, or those of one query,
    at once, and where there are more training makes them a second time. With `packing` (S = T, no mask) documents are each on
    their own.

    Shapes:  q, out: [B, H, T, d];  k, v: [B, KV heads, S, d];  mask: [1 or B, 1 or KV heads, T, S];  sinks: [H]
    """
    if packing is not None:
        return _packed(q, k, v, packing, is_causal=is_causal, scale=scale, softcap=softcap, sinks=sinks)
    if softcap is not None or sinks is not None:
        return _explicit(q, (k, v), mask, is_causal=is_causal, scale=scale, softcap=softcap, sinks=sinks)
    # A branch, not an argument: under a compiler with dynamic shapes the condition is symbolic.
    if mask is None and is_causal:
        return dense_attention(q, k, v, is_causal=True, scale=scale)
    if mask is not None:
        mask = mask if mask.dtype == torch.bool else mask.to(q.dtype)
        mask = mask if mask.shape[1] == 1 else mask.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        if mask.requires_grad and k.shape[1] < q.shape[1] and is_long(k.shape[2]):
            # The one fused backend that gives a mask gradients takes no groups of heads (torch 2.11). The math path would repeat
            # keys and values in float32 and hold all weights several times.
            k, v = (side.repeat_interleave(q.shape[1] // side.shape[1], dim=1) for side in (k, v))
    return dense_attention(q, k, v, mask, scale=scale)


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    *,
    is_causal: bool,
    scale: float | None,
    **rest: Any,
) -> Tensor:
    """Shapes:  as those of `softmax_attention`, of one row"""
    if all(one is None for one in rest.values()):
        ends, lengths = packing.cu_seqlens, packing.lengths
        return dense_attention(q, k, v, is_causal=is_causal, scale=scale, cu_seqlens=ends, lengths=lengths)
    sides = zip(*(packing.each(side, 2) for side in (q, k, v)), strict=True)
    told = [softmax_attention(q, k, v, None, is_causal=is_causal, scale=scale, **rest) for q, k, v in sides]
    return torch.cat(told, dim=2)


def _explicit(
    q: Tensor, keys: tuple[Tensor, Tensor], mask: Tensor | None, *, is_causal: bool, **rest: Any
) -> Tensor:
    """`softmax_attention` with all its weights at once, or those of some queries after the others.

    Shapes:  as there
    """

    def part(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None and is_causal:
            mask = View().of(distances(q.shape[2], k.shape[2], q.device))[None, None]
        p = softmax_weights(q, k, mask, **rest)
        return (p.to(v.dtype) @ v[:, :, None]).flatten(1, 2)

    (k, v), (batch, heads, queries), held = keys, q.shape[:3], keys[0].shape[2]
    if batch * heads * queries * held <= MOST:
        return part(q, k, v, mask)
    size, end, told = max(1, MOST // (batch * heads * held)), held - queries, []
    some = torch.split(q, size, dim=2)
    masks = [None] * len(some) if mask is None else torch.split(mask, size, dim=2)
    for one, own in zip(some, masks, strict=True):
        end += one.shape[2]
        seen = end if mask is None and is_causal else held
        given = (one, k[:, :, :seen], v[:, :, :seen], own)
        told.append(
            checkpoint(part, *given, use_reentrant=False, preserve_rng_state=False)
            if torch.is_grad_enabled()
            else part(*given)
        )
    return torch.cat(told, dim=2)


def softmax_weights(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The p_ij of `softmax_attention`, in at least float32, of products of q and k that are rounded to their dtype. In groups of
    query heads, so that no key is repeated.

    Shapes:  as there;  out: [B, KV heads, group, T, S]
    """
    q = q.view(q.shape[0], k.shape[1], -1, *q.shape[2:])
    logits = wide(q @ k[:, :, None].mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask[:, :, None], -torch.inf)
    elif mask is not None:
        logits = logits + mask[:, :, None].to(logits.dtype)
    if sinks is not None:
        sink = sinks.to(logits.dtype).view(1, q.shape[1], q.shape[2], 1, 1)
        logits = torch.cat((logits, sink.expand(*logits.shape[:-1], 1)), dim=-1)
    return torch.softmax(logits, dim=-1)[..., : k.shape[2]]
