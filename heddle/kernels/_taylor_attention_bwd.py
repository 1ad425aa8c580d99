# mypy: ignore-errors
"""The gradients of taylor_attention: of queries, and of keys and values.

With f = 1 + y + y² / 2, n = Σ f w v, d = Σ f w and o = n / d, what o gets is do, so n gets do / d and d gets g = -(do · n) / d².
With p_ts = w_s (do_t · v_s) over the keys s that t sees,

    dq_t = scale (Σ_s p (1 + y) k_s + d_t g_t Σ_s w_s (1 + y) k_s) / d_t,       do · n = Σ_s f p
    dk_s = scale w_s Σ_t (do_t · v_s / d_t + g_t) (1 + y) q_t,   dv_s = w_s Σ_t f do_t / d_t

The first kernel makes do · n of the same p as dq, so that what rounding took from a stored o is in neither; it keeps g and 1 / d.
Other segments are met through their states, as `_taylor_attention_fwd.py` has them, made of queries for what comes later.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels._taylor_attention_fwd import (
    FEATURES,
    GROUP,
    LENGTHS,
    OWN,
    PAIRS,
    K,
    add_product,
    add_state,
    by_state,
    load_heads,
    load_numbers,
    load_ones,
    pairs_of,
)
from heddle.kernels.common.jit import find_sequence


@triton.jit
def by_dimension(four, products, ROWS: tl.constexpr):
    """Σ_i four_i products_ij.  Shapes:  four: [ROWS, GROUP];  products: [ROWS, PAIRS];  out: [ROWS, K]"""
    return tl.sum(four[:, :, None] * tl.reshape(products, [ROWS, GROUP, K]), axis=1)


@triton.jit(do_not_specialize=LENGTHS)
def _taylor_attention_bwd_query_kernel(
    q_ptr, k_ptr, v_ptr, w_ptr, d_out_ptr, total_ptr, before_ptr, own_ptr, dq_ptr, r_ptr, g_ptr, table_ptr, cu_seqlens_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_wb, stride_wt, stride_wh, stride_gb, stride_gt, stride_gh,
    T, H, per_sequence, size, rest, scale,
    V: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr,
    WEIGHTED: tl.constexpr, VARLEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one segment and head.

    Shapes:  d_out (strides g): [B, T, H, V];  before, own: as forward;  dq: [B, T, H, K];  total, r, g: [B, T, H]
    """
    segment, h = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    n, j, begin, length = find_sequence(segment, table_ptr, cu_seqlens_ptr, T, per_sequence, VARLEN)
    segment = segment.to(tl.int64)
    first, end = j * size, tl.minimum(length, (j + 1) * size)
    start = first + tl.program_id(1) * ROWS
    if (n < 0) | (start >= end):
        return
    b = tl.zeros((), tl.int64) if VARLEN else n.to(tl.int64)
    q_ptr += b * stride_qb + begin * stride_qt + h * stride_qh
    k_ptr += b * stride_kb + begin * stride_kt + h * stride_kh
    v_ptr += b * stride_vb + begin * stride_vt + h * stride_vh
    w_ptr += b * stride_wb + begin * stride_wt + h * stride_wh
    d_out_ptr += b * stride_gb + begin * stride_gt + h * stride_gh
    dims, columns, i = tl.arange(0, K), tl.arange(0, ROWS_V), tl.arange(0, KEYS)
    in_v = (columns < V)[None, :]
    row = start + tl.arange(0, ROWS)
    present, at = row < end, row.to(tl.int64)
    rows = (b * T + begin + at) * H + h
    q = load_heads(q_ptr, at, stride_qt, present, dims, (dims < K)[None, :], WIDE)
    d_out = load_heads(d_out_ptr, at, stride_gt, present, columns, in_v, WIDE)
    total = tl.load(total_ptr + rows, mask=present, other=1.0)
    read = tl.zeros([ROWS, K], tl.float32)
    weights = tl.zeros([ROWS, K], tl.float32)
    both = tl.zeros([ROWS], tl.float32)
    for key in range(first, tl.minimum(end, start + ROWS), KEYS):
        column = key + i
        there, from_ = column < end, column.to(tl.int64)
        k = load_heads(k_ptr, from_, stride_kt, there, dims, (dims < K)[None, :], WIDE)
        v = load_heads(v_ptr, from_, stride_vt, there, columns, in_v, WIDE)
        y = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        p = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        seen = tl.where((column[None, :] <= row[:, None]) & there[None, :], 1.0, 0.0)
        if WEIGHTED:
            seen *= load_numbers(w_ptr, from_, stride_wt, there, 0.0)[None, :]
        both += tl.sum(seen * p * (1.0 + y + 0.5 * y * y), axis=1)
        slope = seen * (1.0 + y)
        # A difference of both is what counts.
        read = add_product(slope * p, k, read, PRECISION)
        weights = add_product(slope, k, weights, PRECISION)
    if BEFORE:
        unit = segment * H + h
        before_ptr += unit * (FEATURES * V)
        own_ptr += unit * OWN
        for group in tl.static_range(K // GROUP):
            two, four = pairs_of(q_ptr, q, at, stride_qt, present, group, WIDE)
            pair = group * PAIRS + tl.arange(0, PAIRS)
            p = by_state(d_out, before_ptr, rest, pair, columns, in_v, V, SPLIT, PRECISION)
            own = tl.load(own_ptr + pair)[None, :] + tl.zeros([ROWS, PAIRS], tl.float32)
            both += tl.sum(two * p, axis=1) * (0.5 * scale * scale)
            read += by_dimension(four, p, ROWS) * scale
            weights += by_dimension(four, own, ROWS) * scale
        p = by_state(d_out, before_ptr, rest, dims + K * K, columns, in_v, V, SPLIT, PRECISION)
        both += tl.sum(q.to(tl.float32) * p, axis=1) * scale
        read += p
        weights += tl.load(own_ptr + dims + K * K)[None, :]
        both += tl.sum(d_out.to(tl.float32) * load_ones(before_ptr, rest, columns, V, SPLIT)[None, :], axis=1)
    # A query that sees nothing has an output of 0, and hands nothing on.
    inverse = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    dq = (read - (both * inverse)[:, None] * weights) * (scale * inverse)[:, None]
    tl.store(
        dq_ptr + rows[:, None] * K + dims[None, :], dq.to(dq_ptr.dtype.element_ty), mask=present[:, None]
    )
    tl.store(r_ptr + rows, inverse, mask=present)
    tl.store(g_ptr + rows, -both * inverse * inverse, mask=present)


@triton.jit(do_not_specialize=LENGTHS)
def _taylor_attention_bwd_key_kernel(
    q_ptr, k_ptr, v_ptr, w_ptr, d_out_ptr, r_ptr, g_ptr, after_ptr, own_ptr, dk_ptr, dv_ptr, table_ptr, cu_seqlens_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_wb, stride_wt, stride_wh, stride_gb, stride_gt, stride_gh,
    T, H, per_sequence, size, rest, scale,
    V: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr,
    WEIGHTED: tl.constexpr, VARLEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """A tile of KEYS keys of one segment and head, over the later queries of the segment, ROWS at a time.

    Shapes:  d_out (strides g): [B, T, H, V];  r, g: [B, T, H];  after, own: as `before` and `own`
             dk: [B, T, H, K];  dv: [B, T, H, V]
    """
    segment, h = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    n, j, begin, length = find_sequence(segment, table_ptr, cu_seqlens_ptr, T, per_sequence, VARLEN)
    segment = segment.to(tl.int64)
    first, end = j * size, tl.minimum(length, (j + 1) * size)
    start = first + tl.program_id(1) * KEYS
    if (n < 0) | (start >= end):
        return
    b = tl.zeros((), tl.int64) if VARLEN else n.to(tl.int64)
    q_ptr += b * stride_qb + begin * stride_qt + h * stride_qh
    k_ptr += b * stride_kb + begin * stride_kt + h * stride_kh
    v_ptr += b * stride_vb + begin * stride_vt + h * stride_vh
    w_ptr += b * stride_wb + begin * stride_wt + h * stride_wh
    d_out_ptr += b * stride_gb + begin * stride_gt + h * stride_gh
    dims, columns, i = tl.arange(0, K), tl.arange(0, ROWS_V), tl.arange(0, ROWS)
    in_v = (columns < V)[None, :]
    column = start + tl.arange(0, KEYS)
    there, from_ = column < end, column.to(tl.int64)
    k = load_heads(k_ptr, from_, stride_kt, there, dims, (dims < K)[None, :], WIDE)
    v = load_heads(v_ptr, from_, stride_vt, there, columns, in_v, WIDE)
    dk = tl.zeros([KEYS, K], tl.float32)
    dv = tl.zeros([KEYS, ROWS_V], tl.float32)
    for query in range(first + tl.program_id(1) * KEYS // ROWS * ROWS, end, ROWS):
        row = query + i
        present, at = row < end, row.to(tl.int64)
        rows = (b * T + begin + at) * H + h
        q = load_heads(q_ptr, at, stride_qt, present, dims, (dims < K)[None, :], WIDE)
        d_out = load_heads(d_out_ptr, at, stride_gt, present, columns, in_v, WIDE)
        r = tl.load(r_ptr + rows, mask=present, other=0.0)
        g = tl.load(g_ptr + rows, mask=present, other=0.0)
        # Keys are rows: an accumulator that is turned before it is an operand is silently wrong on Hopper.
        y = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        p = tl.dot(v, tl.trans(d_out), input_precision=PRECISION) * r[None, :] + g[None, :]
        seen = (column[:, None] <= row[None, :]) & present[None, :]
        f = tl.where(seen, (1.0 + y + 0.5 * y * y) * r[None, :], 0.0)
        e = tl.where(seen, (1.0 + y) * p, 0.0)
        dv = tl.dot(f.to(v.dtype), d_out, dv, input_precision=PRECISION)
        dk = tl.dot(e.to(q.dtype), q, dk, input_precision=PRECISION)
    if AFTER:
        unit = segment * H + h
        after_ptr += unit * (FEATURES * V)
        own_ptr += unit * OWN
        half = 0.5 * scale * scale
        for group in tl.static_range(K // GROUP):
            two, four = pairs_of(k_ptr, k, from_, stride_kt, there, group, WIDE)
            pair = group * PAIRS + tl.arange(0, PAIRS)
            p = by_state(v, after_ptr, rest, pair, columns, in_v, V, SPLIT, PRECISION)
            dk += by_dimension(four, p + tl.load(own_ptr + pair)[None, :], KEYS) * scale
            dv = add_state(two * half, after_ptr, rest, pair, columns, in_v, dv, V, SPLIT, PRECISION)
        p = by_state(v, after_ptr, rest, dims + K * K, columns, in_v, V, SPLIT, PRECISION)
        dk += p + tl.load(own_ptr + dims + K * K)[None, :]
        dv = add_state(
            k.to(tl.float32) * scale, after_ptr, rest, dims + K * K, columns, in_v, dv, V, SPLIT, PRECISION
        )
        dv += load_ones(after_ptr, rest, columns, V, SPLIT)[None, :]
    dk *= scale
    if WEIGHTED:
        w = load_numbers(w_ptr, from_, stride_wt, there, 0.0)
        dk *= w[:, None]
        dv *= w[:, None]
    rows = (b * T + begin + from_) * H + h
    tl.store(dk_ptr + rows[:, None] * K + dims[None, :], dk.to(dk_ptr.dtype.element_ty), mask=there[:, None])
    tl.store(
        dv_ptr + rows[:, None] * V + columns[None, :],
        dv.to(dv_ptr.dtype.element_ty),
        mask=there[:, None] & in_v,
    )
