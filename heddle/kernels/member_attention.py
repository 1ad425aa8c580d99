"""Softmax attention of each query over a short list of keys of its own, and its reference.

In plain torch on every device: the keys of a block of queries are gathered, nothing of T x S is made, and work and
memory grow with the lists alone. Adding up the gradients of keys is not reproducible to the bit on CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from heddle.errors import HeddleError
from heddle.kernels.common.varlen import check_packing, own_begins
from heddle.kernels.op import check_shapes, check_tensors, register, wide_dtype

# Numbers of gathered keys that stand in memory at once.
GATHERED = 2**22


def member_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    *,
    own: Tensor,
    weight: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`member_attention` in float64, query by query; shares nothing with it."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    ends: list[int] = [] if cu_seqlens is None else cu_seqlens.tolist()
    rows = []
    for place in torch.cartesian_prod(*(torch.arange(size) for size in q.shape[:3])).tolist():
        b, h, t = place
        begin = max((end for end in ends if end <= t), default=0)
        listed = [begin + j for j in index[b, h, t].tolist() if j >= 0]
        if not listed:
            rows.append(own[b, h, t].double())
            continue
        logits = k[b, h, listed].double() @ q[b, h, t].double() * factor
        if weight is not None:
            logits = logits + (weight[b, listed] - weight[b, listed].detach())
        rows.append(torch.softmax(logits, dim=0) @ v[b, h, listed].double())
    return torch.stack(rows).view(*q.shape[:3], -1)


def _parts(index: Tensor, size: int) -> Iterator[slice]:
    """Blocks of queries whose keys fit in memory."""
    batch, heads, length, width = index.shape
    step = max(1, GATHERED // max(1, batch * heads * width * size))
    for first in range(0, length, step):
        yield slice(first, min(first + step, length))


def _weights(q: Tensor, k: Tensor, listed: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The keys of a block of queries and their weights, 0 for none.

    Shapes:  q: [B, H, T, d];  k: [B, H, S, d];  listed: [B, H, T, W];  out: [B, H, T, W, d], [B, H, T, W]
    """
    keys = _gathered(k, listed)
    logits = (keys @ q[..., None])[..., 0] * scale
    logits = logits.masked_fill(listed < 0, -torch.inf)
    most = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    weight = torch.exp(logits - most)
    return keys, weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny)


def _gathered(x: Tensor, listed: Tensor) -> Tensor:
    """Shapes:  x: [B, H, S, d];  listed: [B, H, T, W];  out: [B, H, T, W, d]"""
    flat = listed.clamp(min=0).flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, flat).view(*listed.shape, -1)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    own: Tensor,
    weight: Tensor | None,  # noqa: ARG001
    scale: float,
) -> Tensor:
    wide, found = wide_dtype(q.dtype), []
    k, values = k.to(wide), v.to(wide)
    for rows in _parts(index, max(q.shape[-1], v.shape[-1])):
        listed = index[:, :, rows]
        _, p = _weights(q[:, :, rows].to(wide), k, listed, scale)
        o = (p[..., None, :] @ _gathered(values, listed))[..., 0, :]
        is_alone = (listed < 0).all(-1, keepdim=True)
        found.append(torch.where(is_alone, own[:, :, rows].to(wide), o).to(v.dtype))
    return torch.cat(found, dim=2)


def _like(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:  # noqa: ARG001
    return v.new_empty(*q.shape[:3], v.shape[-1])


def _backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    weight: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the own values and, where there is one, `weight`."""
    wide = wide_dtype(q.dtype)
    keys, values = k.to(wide), v.to(wide)
    dq, dk, dv = (torch.zeros_like(x, dtype=wide) for x in (q, k, v))
    d_own = torch.zeros_like(d_out, dtype=wide)
    d_weight = dk.new_zeros(k.shape[0], k.shape[2])
    for rows in _parts(index, max(q.shape[-1], v.shape[-1])):
        listed, g, queries = index[:, :, rows], d_out[:, :, rows].to(wide), q[:, :, rows].to(wide)
        gathered, p = _weights(queries, keys, listed, scale)
        ds = (_gathered(values, listed) @ g[..., None])[..., 0]
        ds = p * (ds - (p * ds).sum(-1, keepdim=True))
        dq[:, :, rows] = scale * (ds[..., None, :] @ gathered)[..., 0, :]
        _add(dk, listed, scale * ds[..., None] * queries[..., None, :])
        _add(dv, listed, p[..., None] * g[..., None, :])
        d_own[:, :, rows] = g * (listed < 0).all(-1, keepdim=True)
        if weight is not None:
            place = listed.clamp(min=0).transpose(1, 2).flatten(1)
            d_weight.scatter_add_(1, place, ds.transpose(1, 2).flatten(1))
    found = None if weight is None else d_weight.to(weight.dtype)
    d_found = q.new_zeros(0) if found is None else found
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_own.to(v.dtype), d_found


def _add(total: Tensor, listed: Tensor, rows: Tensor) -> None:
    """Shapes:  total: [B, H, S, d];  listed: [B, H, T, W];  rows: [B, H, T, W, d], 0 where there is none"""
    flat = listed.clamp(min=0).flatten(2)[..., None].expand(-1, -1, -1, rows.shape[-1])
    total.scatter_add_(2, flat, rows.flatten(2, 3))


def _gradients_like(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,  # noqa: ARG001
    weight: Tensor | None,
    scale: float,  # noqa: ARG001
) -> tuple[Tensor, ...]:
    own = v.new_empty(d_out.shape)
    last = q.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), own, last


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    q, k, v, index, _, weight, scale = inputs
    ctx.save_for_backward(q, k, v, index, weight)
    ctx.scale = scale


def _gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, index, weight = ctx.saved_tensors
    dq, dk, dv, d_own, d_weight = _backward_op(d_out.contiguous(), q, k, v, index, weight, ctx.scale)
    return dq, dk, dv, None, d_own, None if weight is None else d_weight, None


_backward_op = register(
    "member_attention_backward",
    "(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor index, Tensor? weight, float scale) -> "
    f"({', '.join(['Tensor'] * 5)})",
    _backward,
    fake=_gradients_like,
)
_forward_op = register(
    "member_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor index, Tensor own, Tensor? weight, float scale) -> Tensor",
    _forward,
    fake=_like,
    setup_context=_keep,
    backward=_gradients,
)


def member_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    *,
    own: Tensor,
    weight: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """o_t = sum_w softmax_w(scale q_t · k_(i_tw)) v_(i_tw),   and `own`_t where the list i_t is empty.

    An entry of `index` below 0 is none. The list has no gradient; each query's products are taken in an order of their own, so
    that what stands in other lists changes no bit. `weight` has no say but a gradient, that of a bias of each key's logits: one
    for all heads. Gradients have none of their own. `scale` defaults to d^-0.5. With `cu_seqlens`, S = T tokens hold several
    sequences one behind the other: an entry counts from the first token of its query's sequence. Nothing waits for the device.

    Shapes:  q: [B, H, T, d];  k: [B, H, S, d];  v: [B, H, S, V];  own, out: [B, H, T, V];  of one dtype
             index: [B, H, T, W] int64;  weight: [B, S];  cu_seqlens: [sequences + 1] integers, B = 1

    Raises:
        HeddleError: "bad-argument" for shapes or dtypes that do not fit.
    """
    name = "member_attention"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or index.dim() != 4:
        raise HeddleError("bad-argument", f"{name}: q, k, v and index must be [B, heads, tokens, *]")
    sides = {"q": q, "k": k, "v": v, "own": own}
    places = {"index": index, "cu_seqlens": cu_seqlens}
    check_tensors(name, sides, integers=places, masks={"weight": weight})
    (B, H, T, d), S, V = q.shape, k.shape[2], v.shape[-1]
    expected = {"k": (k, (B, H, S, d)), "v": (v, (B, H, S, V)), "own": (own, (B, H, T, V))}
    lists = {"index": (index, (B, H, T, index.shape[-1])), "weight": (weight, (B, S))}
    check_packing(name, B, T, cu_seqlens, keys=S)
    check_shapes(name, {**expected, **lists})
    if cu_seqlens is not None:
        index = torch.where(index < 0, -1, index + own_begins(cu_seqlens, T)[:, None])
    return _forward_op(q, k, v, index, own, weight, d**-0.5 if scale is None else scale)  # type: ignore[no-any-return]
