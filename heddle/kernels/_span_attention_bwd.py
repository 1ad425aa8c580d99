# mypy: ignore-errors
"""The kernels of the gradients of span_attention: of queries, and of keys and values.

With p_j = 2^(c s_j - lse), c = scale log2(e), μ = o · do and e_j = p_j (v_j · do - μ), over the keys j of a query's span:

    dq = scale Σ_j e_j k_j        dk_j = scale Σ_i e_ij q_i,   dv_j = Σ_i p_ij do_i        d_bias_j = Σ_i e_ij

The first kernel walks over the same tiles of keys as the forward pass and keeps μ. Where few keys are seen, e is small beside
p μ, and an o of 16 bits is not exact enough for μ: what rounding took from o is added, and to what is kept also the sum of all e,
which is 0 for an exact μ. The second one holds a tile of the ordered keys; the queries that see one of them stand side by side,
since both ends of spans rise, and are walked over in their order. A key is in the order once, so its row is written once: nothing
is added by atomics, and gradients are the same to the bit every time. It makes the products with keys as rows: an accumulator
that is turned before it is an operand is silently wrong on Hopper.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels._span_attention_fwd import FAR, load_rows, load_span
from heddle.kernels.common.jit import LOG2_E

LENGTHS = ("T", "N", "S", "tiles")


@triton.jit(do_not_specialize=("T", "N", "tiles"))
def _span_attention_bwd_query_kernel(
    q_ptr, k_ptr, v_ptr, order_ptr, queries_ptr, first_ptr, last_ptr, out_ptr, lost_ptr, d_out_ptr, lse_ptr,
    dq_ptr, d_own_ptr, delta_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot,
    stride_lb, stride_lh, stride_lt,
    stride_gb, stride_gh, stride_gt,
    stride_dqb, stride_dqh, stride_dqt,
    stride_dwb, stride_dwh, stride_dwt,
    T, N, tiles, H, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, LOST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head.

    Shapes:  out, lost (strides l, with LOST), d_out (strides g), d_own (strides dw): [B, H, T, V];  dq: [B, H, T, K]
             lse, delta: [B, H, T] float32
    """
    unit, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    b, h = unit // H, unit % H
    row = tile * ROWS + tl.arange(0, ROWS)
    present = row < T
    token = tl.load(queries_ptr + unit * T + row, mask=present, other=0)
    first, last = load_span(first_ptr, last_ptr, unit, token, present, T)
    columns_k, columns_v, i = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V), tl.arange(0, KEYS)
    in_k, in_v = (columns_k < K)[None, :], (columns_v < V)[None, :]
    q = load_rows(q_ptr + b * stride_qb + h * stride_qh, token, stride_qt, present, columns_k, in_k)
    g = load_rows(d_out_ptr + b * stride_gb + h * stride_gh, token, stride_gt, present, columns_v, in_v)
    out = load_rows(out_ptr + b * stride_ob + h * stride_oh, token, stride_ot, present, columns_v, in_v)
    lse = tl.load(lse_ptr + unit * T + token, mask=present, other=float("inf"))
    delta = tl.sum(out.to(tl.float32) * g.to(tl.float32), axis=1)
    if LOST:
        lost_ptr += b * stride_lb + h * stride_lh
        lost = load_rows(lost_ptr, token, stride_lt, present, columns_v, in_v)
        delta += tl.sum(lost.to(tl.float32) * g.to(tl.float32), axis=1)
    missed = tl.zeros([ROWS], tl.float32)
    k_ptr += b * stride_kb + h * stride_kh
    v_ptr += b * stride_vb + h * stride_vh
    order_ptr += unit * N

    factor = scale * LOG2_E
    dq = tl.zeros([ROWS, ROWS_K], tl.float32)
    low = tl.min(tl.where(last > first, first, FAR), axis=0)
    high = tl.max(tl.where(last > first, last, 0), axis=0)
    for index in range(low // KEYS, tl.cdiv(high, KEYS)):
        slot = index * KEYS + i
        key = tl.load(order_ptr + slot, mask=(slot >= 0) & (slot < N), other=-1)
        k = load_rows(k_ptr, key, stride_kt, key >= 0, columns_k, in_k)
        v = load_rows(v_ptr, key, stride_vt, key >= 0, columns_v, in_v)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [ROWS, KEYS]
        seen = (slot[None, :] >= first[:, None]) & (slot[None, :] < last[:, None]) & (key >= 0)[None, :]
        p = tl.where(seen, tl.exp2(s * factor - lse[:, None]), 0.0)
        e = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        if LOST:
            missed += tl.sum(e, axis=1)
        dq = tl.dot(e.to(k.dtype), k, dq, input_precision=PRECISION)

    tl.store(delta_ptr + unit * T + token, delta + missed, mask=present)
    dq_ptr += b * stride_dqb + h * stride_dqh
    at = dq_ptr + (token.to(tl.int64) * stride_dqt)[:, None] + columns_k[None, :]
    tl.store(at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=present[:, None] & in_k)
    d_own_ptr += b * stride_dwb + h * stride_dwh
    at = d_own_ptr + (token.to(tl.int64) * stride_dwt)[:, None] + columns_v[None, :]
    is_alone = lse == float("inf")
    tl.store(at, tl.where(is_alone[:, None], g, 0.0), mask=present[:, None] & in_v)


@triton.jit(do_not_specialize=LENGTHS)
def _span_attention_bwd_key_kernel(
    q_ptr, k_ptr, v_ptr, order_ptr, queries_ptr, first_ptr, last_ptr, d_out_ptr, lse_ptr, delta_ptr,
    from_ptr, to_ptr, dk_ptr, dv_ptr, d_bias_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt,
    stride_dkb, stride_dkh, stride_dkt,
    stride_dvb, stride_dvh, stride_dvt,
    T, N, S, tiles, H, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the ordered keys of one head.

    Shapes:  from, to: [B, H, tiles], of the queries in their order;  dk: [B, H, S, K];  dv: [B, H, S, V]
             d_bias: [B, H, S] float32, with BIAS
    """
    unit, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    b, h = unit // H, unit % H
    slot = tile * KEYS + tl.arange(0, KEYS)
    key = tl.load(order_ptr + unit * N + slot, mask=(slot >= 0) & (slot < N), other=-1)
    there = key >= 0
    columns_k, columns_v, i = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V), tl.arange(0, ROWS)
    in_k, in_v = (columns_k < K)[None, :], (columns_v < V)[None, :]
    k = load_rows(k_ptr + b * stride_kb + h * stride_kh, key, stride_kt, there, columns_k, in_k)
    v = load_rows(v_ptr + b * stride_vb + h * stride_vh, key, stride_vt, there, columns_v, in_v)
    q_ptr += b * stride_qb + h * stride_qh
    d_out_ptr += b * stride_gb + h * stride_gh
    queries_ptr += unit * T

    factor = scale * LOG2_E
    dk = tl.zeros([KEYS, ROWS_K], tl.float32)
    dv = tl.zeros([KEYS, ROWS_V], tl.float32)
    d_bias = tl.zeros([KEYS], tl.float32)
    begin, end = tl.load(from_ptr + unit * tiles + tile), tl.load(to_ptr + unit * tiles + tile)
    for at_row in range(begin, end, ROWS):
        inside = at_row + i < end
        token = tl.load(queries_ptr + at_row + i, mask=inside, other=0)
        first, last = load_span(first_ptr, last_ptr, unit, token, inside, T)
        lse = tl.load(lse_ptr + unit * T + token, mask=inside, other=float("inf"))
        delta = tl.load(delta_ptr + unit * T + token, mask=inside, other=0.0)
        q = load_rows(q_ptr, token, stride_qt, inside, columns_k, in_k)
        g = load_rows(d_out_ptr, token, stride_gt, inside, columns_v, in_v)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [KEYS, ROWS]
        seen = (slot[:, None] >= first[None, :]) & (slot[:, None] < last[None, :]) & there[:, None]
        p = tl.where(seen, tl.exp2(s * factor - lse[None, :]), 0.0)
        dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
        e = p * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - delta[None, :])
        dk = tl.dot(e.to(q.dtype), q, dk, input_precision=PRECISION)
        if BIAS:
            d_bias += tl.sum(e, axis=1)

    dk_ptr += b * stride_dkb + h * stride_dkh
    at = dk_ptr + (key.to(tl.int64) * stride_dkt)[:, None] + columns_k[None, :]
    tl.store(at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=there[:, None] & in_k)
    dv_ptr += b * stride_dvb + h * stride_dvh
    at = dv_ptr + (key.to(tl.int64) * stride_dvt)[:, None] + columns_v[None, :]
    tl.store(at, dv.to(dv_ptr.dtype.element_ty), mask=there[:, None] & in_v)
    if BIAS:
        tl.store(d_bias_ptr + unit * S + key, d_bias, mask=there)
