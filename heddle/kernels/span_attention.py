"""Softmax attention of each query over a run of neighbours in an order of the keys, and its reference.

What members of clusters see of each other, once keys are ordered by cluster and time; what a window sees, in the order that is
there. The kernels gather each key once for a tile of queries that stand side by side; plain torch gathers the keys of
each query (`member_attention`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from heddle.errors import HeddleError
from heddle.kernels.common.varlen import check_packing, own_begins
from heddle.kernels.member_attention import member_attention
from heddle.kernels.op import (
    Inputs,
    Shape,
    Traits,
    check_shapes,
    check_tensors,
    normal,
    op,
    register_composite,
)

try:
    from heddle.kernels._span_attention_op import kernels

    HAS_KERNELS = True
except ImportError:
    HAS_KERNELS = False

# Of a key and of a value head, in the kernels.
MAX_HEAD_SIZE = 256
# Results are the same to the bit whatever stands elsewhere in the order, if what is seen begins at a multiple of this.
TILE = 64


def span_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    *,
    first: Tensor,
    last: Tensor,
    own: Tensor,
    width: int,  # noqa: ARG001
    queries: Tensor | None = None,  # noqa: ARG001
    weight: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`span_attention` in float64, query by query; shares nothing with it."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    ends: list[int] = [] if cu_seqlens is None else cu_seqlens.tolist()
    rows = []
    for place in torch.cartesian_prod(*(torch.arange(size) for size in q.shape[:3])).tolist():
        b, h, t = place
        begin = max((end for end in ends if end <= t), default=0)
        those = order[b, h, begin + int(first[b, h, t]) : begin + int(last[b, h, t])].tolist()
        keys = [begin + j for j in those if j >= 0]
        if not keys:
            rows.append(own[b, h, t].double())
            continue
        logits = k[b, h, keys].double() @ q[b, h, t].double() * factor
        if weight is not None:
            logits = logits + (weight[b, keys] - weight[b, keys].detach())
        rows.append(torch.softmax(logits, dim=0) @ v[b, h, keys].double())
    return torch.stack(rows).view(*q.shape[:3], -1)


def _lists(order: Tensor, first: Tensor, last: Tensor, width: int) -> Tensor:
    """The keys of each query, -1 for none.  Shapes:  out: [B, H, T, width]"""
    place = last[..., None] - width + torch.arange(width, device=last.device)
    at = place.clamp(min=0, max=order.shape[-1] - 1).flatten(2)
    return order.gather(-1, at).view(place.shape).masked_fill(place < first[..., None], -1)


def _dispatch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    first: Tensor,
    last: Tensor,
    queries: Tensor | None,
    own: Tensor,
    weight: Tensor | None,
    width: int,
    scale: float,
) -> Tensor:
    if span_attention.choose(q.device, q.dtype, K=q.shape[3], V=v.shape[3]) == "triton":
        sides = (q, k, v) if weight is None else (q, k, v, weight)
        trains = torch.is_grad_enabled() and any(x.requires_grad for x in sides)
        return kernels(q, k, v, order, first, last, queries, own, weight, scale, trains)[0]  # type: ignore[no-any-return]
    index = _lists(order, first, last, width)
    return member_attention(q, k, v, index, own=own, weight=weight, scale=scale)


_op = register_composite(
    "span_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor order, Tensor first, Tensor last, Tensor? queries, Tensor own, "
    "Tensor? weight, int width, float scale) -> Tensor",
    _dispatch,
)


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    """Tokens in `clusters` by chance, each seeing up to `width` earlier ones of its own."""
    B, H, T, K, V = (shape[name] for name in ("B", "H", "T", "K", "V"))
    z = torch.randint(shape["clusters"], (B, H, T), generator=generator, device=generator.device)
    sides = {"q": (T, K), "k": (T, K), "v": (T, V), "own": (T, V)}
    return {name: normal(generator, B, H, *size) for name, size in sides.items()} | {"z": z}


_WIDE = {"H": 16, "K": 128, "V": 128, "width": 127}
_CASES = Traits(
    inputs=_draw,
    # Attention has no state.
    initial_state=lambda shape, generator: normal(generator, 0),  # noqa: ARG005
    sequence=("q", "k", "v", "own"),
    rounded=("q", "k", "v", "own"),
    differentiable=("q", "k", "v", "own"),
    output_like="q",
    test_shapes=({"B": 2, "H": 2, "T": 37, "K": 16, "V": 24, "width": 7, "clusters": 3},),
    bench_shapes=(
        {"B": 8, "T": 4096, "clusters": 64, **_WIDE},
        {"B": 1, "T": 32768, "clusters": 256, **_WIDE},
    ),
)


def _fits(shape: Shape) -> bool:
    return HAS_KERNELS and max(shape["K"], shape["V"]) <= MAX_HEAD_SIZE


_LIMITS = f"K and V up to {MAX_HEAD_SIZE}"


@op(span_attention_reference, _CASES, kernel=_fits, limits=_LIMITS)
def span_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    *,
    first: Tensor,
    last: Tensor,
    own: Tensor,
    width: int,
    queries: Tensor | None = None,
    weight: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """o_t = sum_n softmax_n(scale q_t · k_(π_n)) v_(π_n) over first_t <= n < last_t,   and `own`_t where there is none.

    `order` is π: places of keys, each at most once, -1 for none. `queries` is an order of the queries in which `first` and `last`
    both rise, None if they do so as they stand; spans have at most `width` places. None of them has a gradient. `weight` has no
    say but a gradient, that of a bias of each key's logits: one for all heads. Gradients have none of their own; from the
    kernels they are the same to the bit every time. `scale` defaults to d^-0.5. Nothing waits for the device, so the ends
    of spans are not looked at.

    With `cu_seqlens`, N = S = T tokens hold several sequences one behind the other, and each has its own order where its tokens
    are: `order`, `first`, `last` and `queries` count from its first token. An order with more places than keys counts over
    the whole row, without `cu_seqlens`, to the same effect.

    Shapes:  q: [B, H, T, d];  k: [B, H, S, d];  v: [B, H, S, V];  own, out: [B, H, T, V];  of one dtype
             order: [B, H, N];  first, last, queries: [B, H, T];  integers;  weight: [B, S]
             cu_seqlens: [sequences + 1] integers, B = 1

    Raises:
        HeddleError: "bad-argument" for shapes, dtypes or numbers that do not fit.
    """
    name = "span_attention"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or order.dim() != 3:
        raise HeddleError(
            "bad-argument", f"{name}: q, k, v must be [B, heads, tokens, *], order [B, heads, places]"
        )
    places = {"order": order, "first": first, "last": last, "queries": queries, "cu_seqlens": cu_seqlens}
    sides = {"q": q, "k": k, "v": v, "own": own}
    check_tensors(name, sides, integers=places, masks={"weight": weight})
    if width < 1:
        raise HeddleError("bad-argument", f"{name}: width {width} must be at least 1")
    if scale is not None and scale <= 0:
        raise HeddleError("bad-argument", f"{name}: scale {scale} must be positive")
    (B, H, T, d), S, V = q.shape, k.shape[2], v.shape[-1]
    expected = {"k": (k, (B, H, S, d)), "v": (v, (B, H, S, V)), "own": (own, (B, H, T, V))}
    spans = {"first": (first, (B, H, T)), "last": (last, (B, H, T)), "queries": (queries, (B, H, T))}
    check_packing(name, B, T, cu_seqlens, keys=S)
    held = order.shape[-1] if cu_seqlens is None else T
    lists = {"order": (order, (B, H, held)), "weight": (weight, (B, S))}
    check_shapes(name, {**expected, **spans, **lists})
    if cu_seqlens is not None:
        begins = own_begins(cu_seqlens, T)
        order = torch.where(order < 0, -1, order + begins)
        first, last = first + begins, last + begins
        queries = None if queries is None else queries + begins
    factor = d**-0.5 if scale is None else scale
    return _op(q, k, v, order, first, last, queries, own, weight, width, factor)  # type: ignore[no-any-return]
