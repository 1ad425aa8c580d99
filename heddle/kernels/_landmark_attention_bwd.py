# mypy: ignore-errors
"""The kernels of the gradients of landmark_attention: of queries, and of keys, values and landmarks.

With the weights π_j inside of block b, its weight G_b = 2^(g_b - lse), δ = o · do and c_b = Σ_{j in b} π_j v_j · do,

    own block:  ds_j = G_b π_j (v_j · do - δ)        others:  ds_j = G_b π_j (v_j · do - c_b),   dg_b = G_b (c_b - δ)
    dq = scale (Σ_j ds_j k_j + Σ_b dg_b l_b),   dk_j = scale Σ_rows ds_j q
    dl_b = scale Σ_rows dg_b q,                 dv_j = Σ_rows G_b π_j do

What a block's keys come to is worked out again from the whole block, which every program holds. The second kernel holds a block
and walks over the queries behind it, head by head, in order: nothing is added by atomics. It makes the products with keys as
rows: an accumulator that is turned before it is an operand is silently wrong on Hopper.  dg_b stands in two rows of a landmark's
tile, as rounded and what that left: rounded once, the gradient of landmarks was further off than twice that of PyTorch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels._landmark_attention_fwd import (
    LENGTHS,
    MARK,
    gate_of,
    is_chosen,
    keys_of_block,
    load_landmark,
    softmax_of_block,
)
from heddle.kernels.common.jit import LOG2_E


@triton.jit(do_not_specialize=LENGTHS)
def _landmark_attention_bwd_query_kernel(
    q_ptr, k_ptr, v_ptr, marks_ptr, out_ptr, d_out_ptr, lse_ptr, delta_ptr, dq_ptr, start_ptr, bits_ptr, seen_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_mb, stride_mh, stride_mt,
    T, S, C, N, tiles, words, stride_sb, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    SELECT: tl.constexpr, SEEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head; leaves δ for the other kernel.

    Shapes:  out, d_out: [B, H, T, V], dense;  lse, delta: [B, H, T];  dq: [B, H, T, K]
    """
    tile = tiles - 1 - tl.program_id(1)
    unit = tl.program_id(0).to(tl.int64)
    h, b = unit % (N * GROUP), unit // (N * GROUP)
    n = h // GROUP
    start = tl.load(start_ptr + b)
    t = tile * ROWS + tl.arange(0, ROWS)
    present = t < T
    place = tl.where(present, start + t, -1)
    own = place // BLOCK
    at = unit * T + t
    columns_k, columns_v = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V)
    in_k, in_v = (columns_k < K)[None, :], (columns_v < V)[None, :]
    here = present[:, None]
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + n * stride_kh
    v_ptr += b * stride_vb + n * stride_vh
    marks_ptr += b * stride_mb + n * stride_mh
    seen_ptr += b * stride_sb
    q_at = q_ptr + (t.to(tl.int64) * stride_qt)[:, None] + columns_k[None, :]
    out_at = (at * V)[:, None] + columns_v[None, :]
    q = tl.load(q_at, mask=here & in_k, other=0.0)  # [ROWS, ROWS_K]
    d_out = tl.load(d_out_ptr + out_at, mask=here & in_v, other=0.0)  # [ROWS, ROWS_V]
    out = tl.load(out_ptr + out_at, mask=here & in_v, other=0.0)
    lse_all = tl.load(lse_ptr + at, mask=present, other=float("inf"))
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), axis=1)
    tl.store(delta_ptr + at, delta, mask=present)

    factor = scale * LOG2_E
    dq = tl.zeros([ROWS, ROWS_K], tl.float32)
    first_own = tl.maximum(start + tile * ROWS, 0) // BLOCK
    last_place = start + tl.minimum(tile * ROWS + ROWS, T) - 1
    count = tl.minimum(tl.where(last_place < 0, 0, last_place // BLOCK + 1), C)
    is_mark = (tl.arange(0, MARK) == 0)[None, :]
    for c in range(0, count):
        inside, key, seen = keys_of_block(seen_ptr, c, S, BLOCK, KEYS, SEEN)
        token = (c * BLOCK + tl.arange(0, KEYS)).to(tl.int64)[:, None]
        k = tl.load(k_ptr + token * stride_kt + columns_k[None, :], mask=inside[:, None] & in_k, other=0.0)
        v = tl.load(v_ptr + token * stride_vt + columns_v[None, :], mask=inside[:, None] & in_v, other=0.0)
        landmark = load_landmark(marks_ptr, c, stride_mt, columns_k, in_k)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor  # [ROWS, KEYS]
        mark = tl.sum(tl.dot(q, tl.trans(landmark), input_precision=PRECISION), axis=1) * factor
        is_whole = c < first_own
        if SEEN or KEYS > BLOCK:
            is_whole = False
        if not is_whole:
            distance = place[:, None] - key[None, :]
            s = tl.where((distance >= 0) & (seen[None, :] | (distance == 0)), s, float("-inf"))
        weight, inverse, lse = softmax_of_block(s, 1)
        kept = present
        if SELECT:
            kept = is_chosen(bits_ptr, at, c, words, present)
        is_own = own == c
        share = tl.exp2(gate_of(mark, lse, is_own, kept) - lse_all)
        inner = weight * inverse[:, None]
        dp = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        mean = tl.sum(inner * dp, axis=1)
        ds = inner * share[:, None] * (dp - tl.where(is_own, delta, mean)[:, None])
        d_gate = tl.where(is_own, 0.0, share * (mean - delta))
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        d_gates = tl.where(is_mark, d_gate[:, None], 0.0)  # [ROWS, MARK]
        dq = tl.dot(d_gates.to(k.dtype), landmark, dq, input_precision=PRECISION)
    dq_at = dq_ptr + (at * K)[:, None] + columns_k[None, :]
    tl.store(dq_at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=here & in_k)


@triton.jit(do_not_specialize=LENGTHS)
def _landmark_attention_bwd_key_kernel(
    q_ptr, k_ptr, v_ptr, marks_ptr, d_out_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, d_marks_ptr, d_bias_ptr,
    start_ptr, bits_ptr, seen_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_mb, stride_mh, stride_mt,
    T, S, C, N, words, stride_sb, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    SELECT: tl.constexpr, SEEN: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of one key head; ROWS queries at a time. The first blocks, which most queries read, begin first.

    Shapes:  lse, delta: [B, H, T];  dk: [B, N, S, K];  dv: [B, N, S, V];  d_marks: [B, N, C, K]
             d_bias: [B, N, S], without own keys, with BIAS
    """
    unit = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0)
    n, b = unit % N, unit // N
    start = tl.load(start_ptr + b)
    seen_ptr += b * stride_sb
    inside, key, seen = keys_of_block(seen_ptr, c, S, BLOCK, KEYS, SEEN)
    columns_k, columns_v = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V)
    in_k, in_v = (columns_k < K)[None, :], (columns_v < V)[None, :]
    token = (c * BLOCK + tl.arange(0, KEYS)).to(tl.int64)
    k_at = k_ptr + b * stride_kb + n * stride_kh + (token * stride_kt)[:, None] + columns_k[None, :]
    v_at = v_ptr + b * stride_vb + n * stride_vh + (token * stride_vt)[:, None] + columns_v[None, :]
    k = tl.load(k_at, mask=inside[:, None] & in_k, other=0.0)  # [KEYS, ROWS_K]
    v = tl.load(v_at, mask=inside[:, None] & in_v, other=0.0)  # [KEYS, ROWS_V]
    landmark = load_landmark(marks_ptr + b * stride_mb + n * stride_mh, c, stride_mt, columns_k, in_k)
    q_ptr += b * stride_qb + n * GROUP * stride_qh
    first_row = unit * GROUP * T

    from_query = tl.maximum(c * BLOCK - start, 0)
    count = tl.cdiv(tl.maximum(T - from_query, 0), ROWS)
    factor = scale * LOG2_E
    dk = tl.zeros([KEYS, ROWS_K], tl.float32)
    dv = tl.zeros([KEYS, ROWS_V], tl.float32)
    d_marks = tl.zeros([MARK, ROWS_K], tl.float32)
    d_bias = tl.zeros([KEYS], tl.float32)
    mark_row = tl.arange(0, MARK)[:, None]
    for index in range(0, GROUP * count):
        head = (index // count).to(tl.int64)
        t = from_query + index % count * ROWS + tl.arange(0, ROWS)
        present = t < T
        place = tl.where(present, start + t, -1)
        at = first_row + head * T + t
        q_at = q_ptr + head * stride_qh + (t.to(tl.int64) * stride_qt)[:, None] + columns_k[None, :]
        d_out_at = d_out_ptr + (at * V)[:, None] + columns_v[None, :]
        q = tl.load(q_at, mask=present[:, None] & in_k, other=0.0)  # [ROWS, ROWS_K]
        d_out = tl.load(d_out_at, mask=present[:, None] & in_v, other=0.0)  # [ROWS, ROWS_V]
        lse_all = tl.load(lse_ptr + at, mask=present, other=float("inf"))
        delta = tl.load(delta_ptr + at, mask=present, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * factor  # [KEYS, ROWS]
        mark = tl.sum(tl.dot(landmark, tl.trans(q), input_precision=PRECISION), axis=0) * factor
        distance = place[None, :] - key[:, None]
        s = tl.where((distance >= 0) & (seen[:, None] | (distance == 0)), s, float("-inf"))
        weight, inverse, lse = softmax_of_block(s, 0)
        kept = present
        if SELECT:
            kept = is_chosen(bits_ptr, at, c, words, present)
        is_own = place // BLOCK == c
        share = tl.exp2(gate_of(mark, lse, is_own, kept) - lse_all)
        inner = weight * inverse[None, :]
        p = inner * share[None, :]
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
        mean = tl.sum(inner * dp, axis=0)
        ds = p * (dp - tl.where(is_own, delta, mean)[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        d_gate = tl.where(is_own, 0.0, share * (mean - delta))
        rounded = d_gate.to(q.dtype).to(tl.float32)
        d_gates = tl.where(mark_row == 0, rounded[None, :], (d_gate - rounded)[None, :])
        d_gates = tl.where(mark_row < 2, d_gates, 0.0)  # [MARK, ROWS]
        d_marks = tl.dot(d_gates.to(q.dtype), q, d_marks, input_precision=PRECISION)
        if BIAS:
            d_bias += tl.sum(tl.where(distance == 0, 0.0, ds), axis=1)

    at_key = unit * S + token
    dk_at = dk_ptr + (at_key * K)[:, None] + columns_k[None, :]
    tl.store(dk_at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside[:, None] & in_k)
    dv_at = dv_ptr + (at_key * V)[:, None] + columns_v[None, :]
    tl.store(dv_at, dv.to(dv_ptr.dtype.element_ty), mask=inside[:, None] & in_v)
    marks_at = d_marks_ptr + (unit * C + c) * K + columns_k
    d_mark = tl.sum(d_marks, axis=0) * scale
    tl.store(marks_at, d_mark.to(d_marks_ptr.dtype.element_ty), mask=columns_k < K)
    if BIAS:
        tl.store(d_bias_ptr + at_key, d_bias, mask=inside)
