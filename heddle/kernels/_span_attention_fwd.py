# mypy: ignore-errors
"""The forward kernel of span_attention.

A program holds a tile of queries that stand side by side by their spans, so that members of one cluster are together, and walks
over the tiles of the ordered keys from the first that one of them sees to the last: each key is gathered once for all of them.

    m' = max(m, c max_j s_j),   l' = 2^(m - m') l + Σ_j 2^(c s_j - m'),   a' = 2^(m - m') a + Σ_j 2^(c s_j - m') v_j

with s_j = q · k_j and c = scale log2(e); then out = a / l, or the query's own value where nothing is seen, and m + log2(l) is
kept for the gradients. Tiles of keys begin at multiples of their size. A tile of which a query sees nothing changes no bit of
its sums, so what it gets depends on its own keys and on their places in their tiles alone, not on who else is in its tile.

FLOP: 2 (K + V) for a query and a key of the tiles that are read: a tile of M rows whose spans have W keys reads W + M or so.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels.common.jit import LOG2_E

# A new length must not mean a new compilation.
LENGTHS = ("T", "N", "tiles")
# A place behind every key.
FAR = tl.constexpr(1 << 30)


@triton.jit
def load_span(first_ptr, last_ptr, unit, token, present, T):
    """The span of each row, empty where there is no row."""
    first = tl.load(first_ptr + unit * T + token, mask=present, other=0)
    last = tl.load(last_ptr + unit * T + token, mask=present, other=0)
    return first, last


@triton.jit
def load_rows(x_ptr, row, stride, there, columns, in_columns):
    """Gathered rows of one head.  Shapes:  row, there: [R];  out: [R, C]"""
    at = x_ptr + (row.to(tl.int64) * stride)[:, None] + columns[None, :]
    return tl.load(at, mask=there[:, None] & in_columns, other=0.0)


@triton.jit(do_not_specialize=LENGTHS)
def _span_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, own_ptr, order_ptr, queries_ptr, first_ptr, last_ptr, out_ptr, lost_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_wb, stride_wh, stride_wt,
    stride_ob, stride_oh, stride_ot,
    stride_lb, stride_lh, stride_lt,
    T, N, tiles, H, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, LOST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head.

    Shapes:  own (strides w), out: [B, H, T, V];  order: [B, H, N];  queries, first, last: [B, H, T];  lse: [B, H, T], base 2,
             inf where nothing is seen;  lost (strides l): what rounding took from out, with LOST
    """
    unit, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    b, h = unit // H, unit % H
    row = tile * ROWS + tl.arange(0, ROWS)
    present = row < T
    token = tl.load(queries_ptr + unit * T + row, mask=present, other=0)
    first, last = load_span(first_ptr, last_ptr, unit, token, present, T)
    columns_k, columns_v, i = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V), tl.arange(0, KEYS)
    in_k, in_v = (columns_k < K)[None, :], (columns_v < V)[None, :]
    q = load_rows(
        q_ptr + b * stride_qb + h * stride_qh, token, stride_qt, present, columns_k, in_k
    )  # [ROWS, ROWS_K]
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    order_ptr += unit * N

    factor = scale * LOG2_E
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, ROWS_V], tl.float32)
    low = tl.min(tl.where(last > first, first, FAR), axis=0)
    high = tl.max(tl.where(last > first, last, 0), axis=0)
    for index in range(low // KEYS, tl.cdiv(high, KEYS)):
        slot = index * KEYS + i
        key = tl.load(order_ptr + slot, mask=(slot >= 0) & (slot < N), other=-1)
        k = load_rows(k_ptr, key, stride_kt, key >= 0, columns_k, in_k)
        v = load_rows(v_ptr, key, stride_vt, key >= 0, columns_v, in_v)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [ROWS, KEYS]
        seen = (slot[None, :] >= first[:, None]) & (slot[None, :] < last[:, None]) & (key >= 0)[None, :]
        s = tl.where(seen, s * factor, float("-inf"))
        higher = tl.maximum(most, tl.max(s, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - base[:, None])
        faded = tl.exp2(most - base)
        total = total * faded + tl.sum(p, axis=1)
        sums = tl.dot(p.to(v.dtype), v, sums * faded[:, None], input_precision=PRECISION)
        most = higher

    # NaN as well, which is handed on.
    some = total != 0.0
    own_ptr += b * stride_wb + h * stride_wh
    own = load_rows(own_ptr, token, stride_wt, present & (total == 0.0), columns_v, in_v)
    out = tl.where(some[:, None], sums / tl.where(some, total, 1.0)[:, None], own.to(tl.float32))
    lse = tl.where(some, most + tl.log2(tl.where(some, total, 1.0)), float("inf"))
    tl.store(lse_ptr + unit * T + token, lse, mask=present)
    out_ptr += b * stride_ob + h * stride_oh
    at = out_ptr + (token.to(tl.int64) * stride_ot)[:, None] + columns_v[None, :]
    rounded = out.to(out_ptr.dtype.element_ty)
    tl.store(at, rounded, mask=present[:, None] & in_v)
    if LOST:
        lost_ptr += b * stride_lb + h * stride_lh
        at = lost_ptr + (token.to(tl.int64) * stride_lt)[:, None] + columns_v[None, :]
        lost = out - rounded.to(tl.float32)
        tl.store(at, lost.to(lost_ptr.dtype.element_ty), mask=present[:, None] & in_v)
