# mypy: ignore-errors
"""The kernels of the gradients of token_split_attention: of queries and what the state has told, and of keys and values.

With the denominator D, p_j = 2^(c s_j - m) / D, c = scale log2(e), δ = o · do, and φ(q) S, φ(q) z as the state has told them:

    ds_j = p_j (v_j · do - δ) + [j is the key whose logit is m] dm,    dm = ((gate * φ(q) S) · do - δ φ(q) z) / D
    dq = scale Σ_j ds_j k_j,    dk_j = scale Σ_i ds_ij q_i,    dv_j = Σ_i p_ij do_i
    d_gate = φ(q) S * do / D,    d(φ(q) S) = gate * do / D,    d(φ(q) z) = -δ / D

The state is divided by no 2^m, so m sets its share and has a gradient of its own, that of its key's logit. An o of 16 bits is
not exact enough for δ: what rounding took from it is added, and to what is kept also the sum of a query's ds, which is 0 for an
exact δ. The first kernel walks over the same tiles as the forward pass and keeps δ and dm. The second one holds a tile of keys
and walks over the queries that may see one of them, head by head, in order: nothing is added by atomics, and gradients are the
same to the bit every time. It is launched once for the keys where they stand, which two chunks of queries see, and once for the
list of those that stay, which all later ones do. It makes the products with keys as rows: an accumulator that is turned before
it is an operand is silently wrong on Hopper.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels._token_split_attention_fwd import (
    FAR,
    LENGTHS,
    is_near,
    load_rows,
    near_keys,
    rows_of_tile,
    told_at,
)
from heddle.kernels.common.jit import LOG2_E


@triton.jit
def add_to_queries(
    q, k, v, g, seen, index, most, inverse, delta, peak, d_most, dq, missed, factor, PRECISION: tl.constexpr
):
    """What a tile of keys adds to dq / scale and to the sum of ds.  Shapes:  seen: [ROWS, KEYS];  index: [KEYS], keys' numbers"""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
    p = tl.where(seen, tl.exp2(s - most[:, None]), 0.0) * inverse[:, None]
    ds = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    ds += tl.where(index[None, :] == peak[:, None], d_most[:, None], 0.0)
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION), missed + tl.sum(ds, axis=1)


@triton.jit(do_not_specialize=LENGTHS)
def _token_split_attention_bwd_query_kernel(
    q_ptr, k_ptr, v_ptr, kept_k_ptr, kept_v_ptr, since_ptr, seen_ptr, start_ptr, told_ptr, gate_ptr,
    out_ptr, lost_ptr, d_out_ptr, most_ptr, total_ptr, peak_ptr,
    dq_ptr, d_told_ptr, d_gate_ptr, delta_ptr, d_most_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_eb, stride_eh, stride_et,
    stride_wb, stride_wh, stride_wt,
    stride_gb, stride_gh, stride_gt,
    stride_ob, stride_oh, stride_ot,
    stride_lb, stride_lh, stride_lt,
    stride_db, stride_dh, stride_dt,
    stride_dqb, stride_dqh, stride_dqt,
    stride_dgb, stride_dgh, stride_dgt,
    T, S, E, far, slots, chunks, chunk, keep, tiles, N, group, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SEEN: tl.constexpr, KEPT: tl.constexpr, LOST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head; leaves δ and dm for the other kernel.

    Shapes:  d_out (strides d), d_gate: [B, H, T, V];  d_told: as told, 0 where nothing is written;  delta, d_most: [B, H, T]
    """
    tile = tiles - 1 - tl.program_id(1)
    unit = tl.program_id(0).to(tl.int64)
    h, b = unit % (N * group), unit // (N * group)
    n = h // group
    start = tl.load(start_ptr + b)
    t, place, present, low, high = rows_of_tile(start, tile, T, S, ROWS)
    valid = place >= 0
    base = tl.maximum(start + S - T, 0) // chunk
    columns_k, columns_v, i = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V), tl.arange(0, KEYS)
    in_k, in_v = (columns_k < K)[None, :], (columns_v < V)[None, :]
    q = load_rows(q_ptr + b * stride_qb + h * stride_qh, t, stride_qt, valid, columns_k, in_k)
    g = load_rows(d_out_ptr + b * stride_db + h * stride_dh, t, stride_dt, valid, columns_v, in_v)
    out = load_rows(out_ptr + b * stride_ob + h * stride_oh, t, stride_ot, valid, columns_v, in_v)
    row = unit * T + t
    most = tl.load(most_ptr + row, mask=valid, other=float("inf"))
    inverse = 1.0 / tl.load(total_ptr + row, mask=valid, other=1.0)
    peak = tl.load(peak_ptr + row, mask=valid, other=-1)
    g_wide = g.to(tl.float32)
    delta = tl.sum(out.to(tl.float32) * g_wide, axis=1)
    if LOST:
        lost = load_rows(lost_ptr + b * stride_lb + h * stride_lh, t, stride_lt, valid, columns_v, in_v)
        delta += tl.sum(lost.to(tl.float32) * g_wide, axis=1)

    at_told = told_at(unit, b * N, n, place, base, chunks, slots, chunk, group) * (V + 1)
    at, here = at_told[:, None] + columns_v[None, :], valid[:, None] & in_v
    told = tl.load(told_ptr + at, mask=here, other=0.0)
    gate = load_rows(gate_ptr + b * stride_gb + h * stride_gh, t, stride_gt, valid, columns_v, in_v)
    share = g_wide * inverse[:, None]
    counted = tl.load(told_ptr + at_told + V, mask=valid, other=0.0) * inverse
    d_most = tl.sum(gate * told * share, axis=1) - delta * counted
    tl.store(d_told_ptr + at, gate * share, mask=here)
    d_gate_ptr += b * stride_dgb + h * stride_dgh
    d_gate_at = (t.to(tl.int64) * stride_dgt)[:, None] + columns_v[None, :]
    tl.store(d_gate_ptr + d_gate_at, told * share, mask=present[:, None] & in_v)

    factor = scale * LOG2_E
    dq = tl.zeros([ROWS, ROWS_K], tl.float32)
    missed = tl.zeros([ROWS], tl.float32)
    k_ptr += b * stride_kb + n * stride_kh
    v_ptr += b * stride_vb + n * stride_vh
    seen_ptr += b * S
    since = tl.maximum(low // chunk - 1, 0) * chunk
    for index in range(since // KEYS, tl.cdiv(high + 1, KEYS)):
        key_place = index * KEYS + i
        key, inside, may = near_keys(seen_ptr, key_place, start, S, SEEN)
        k = load_rows(k_ptr, key, stride_kt, inside, columns_k, in_k)
        v = load_rows(v_ptr, key, stride_vt, inside, columns_v, in_v)
        seen = is_near(place[:, None], key_place[None, :], inside[None, :], may[None, :], chunk)
        number = tl.where(inside, key, -2)
        dq, missed = add_to_queries(
            q, k, v, g, seen, number, most, inverse, delta, peak, d_most, dq, missed, factor, PRECISION
        )
    if KEPT:
        kept_k_ptr += b * stride_eb + n * stride_eh
        kept_v_ptr += b * stride_wb + n * stride_wh
        since_ptr += (b * N + n) * E
        count = tl.where(high < 0, 0, tl.minimum(far + (high // chunk - base) * keep, E))
        for index in range(0, tl.cdiv(count, KEYS)):
            entry = index * KEYS + i
            there = entry < count
            k = load_rows(kept_k_ptr, entry, stride_et, there, columns_k, in_k)
            v = load_rows(kept_v_ptr, entry, stride_wt, there, columns_v, in_v)
            from_place = tl.load(since_ptr + entry, mask=there, other=FAR)
            seen = valid[:, None] & (place[:, None] >= from_place[None, :])
            dq, missed = add_to_queries(
                q, k, v, g, seen, S + entry, most, inverse, delta, peak, d_most, dq, missed, factor, PRECISION
            )
    tl.store(delta_ptr + row, delta + missed, mask=present)
    tl.store(d_most_ptr + row, d_most - missed * counted, mask=present)
    tl.store(d_told_ptr + at_told + V, -(delta + missed) * inverse, mask=valid)
    dq_ptr += b * stride_dqb + h * stride_dqh
    dq_at = (t.to(tl.int64) * stride_dqt)[:, None] + columns_k[None, :]
    tl.store(dq_ptr + dq_at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=present[:, None] & in_k)


@triton.jit(do_not_specialize=LENGTHS)
def _token_split_attention_bwd_key_kernel(
    q_ptr, k_ptr, v_ptr, since_ptr, seen_ptr, start_ptr, d_out_ptr, most_ptr, total_ptr, peak_ptr, delta_ptr, d_most_ptr,
    dk_ptr, dv_ptr, d_bias_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_db, stride_dh, stride_dt,
    stride_dkb, stride_dkh, stride_dkt,
    stride_dvb, stride_dvh, stride_dvt,
    T, S, E, far, chunk, keep, N, group, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SEEN: tl.constexpr, KEPT: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one key head, where they stand or, with KEPT, of the list of those that stay.

    Shapes:  k, dk: [B, N, S, K];  v, dv: [B, N, S, V];  with KEPT E of them;  d_bias: [B, N, S or E] float32, with BIAS, without
             own keys
    """
    tile = tl.program_id(1)
    unit = tl.program_id(0).to(tl.int64)
    n, b = unit % N, unit // N
    start = tl.load(start_ptr + b)
    first = start + S - T
    columns_k, columns_v, i = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V), tl.arange(0, KEYS)
    in_k, in_v = (columns_k < K)[None, :], (columns_v < V)[None, :]
    begin, end = tl.maximum(first, 0), tl.maximum(start + S, 0)
    if KEPT:
        row = tile * KEYS + i
        inside = row < E
        number, length = S + row, E
        from_place = tl.load(since_ptr + unit * E + row, mask=inside, other=FAR)
        if tile * KEYS >= far:
            begin = (begin // chunk + (tile * KEYS - far) // keep + 1) * chunk
    else:
        key_place = (tl.maximum(start, 0) // KEYS + tile) * KEYS + i
        row, inside, may = near_keys(seen_ptr + b * S, key_place, start, S, SEEN)
        number, length = tl.where(inside, row, -2), S
        low = (tl.maximum(start, 0) // KEYS + tile) * KEYS
        begin = tl.maximum(begin, low)
        end = tl.minimum(end, ((low + KEYS - 1) // chunk + 2) * chunk)
    k = load_rows(k_ptr + b * stride_kb + n * stride_kh, row, stride_kt, inside, columns_k, in_k)
    v = load_rows(v_ptr + b * stride_vb + n * stride_vh, row, stride_vt, inside, columns_v, in_v)
    q_ptr += b * stride_qb + n * group * stride_qh
    d_out_ptr += b * stride_db + n * group * stride_dh

    factor = scale * LOG2_E
    dk = tl.zeros([KEYS, ROWS_K], tl.float32)
    dv = tl.zeros([KEYS, ROWS_V], tl.float32)
    d_bias = tl.zeros([KEYS], tl.float32)
    count = tl.maximum(tl.cdiv(end, ROWS) - begin // ROWS, 0)
    for index in range(0, group * count):
        head = (index // count).to(tl.int64)
        place = (begin // ROWS + index % count) * ROWS + tl.arange(0, ROWS)
        t = place - first
        there = (t >= 0) & (t < T)
        at = (unit * group + head) * T + t
        q = load_rows(q_ptr + head * stride_qh, t, stride_qt, there, columns_k, in_k)
        g = load_rows(d_out_ptr + head * stride_dh, t, stride_dt, there, columns_v, in_v)
        most = tl.load(most_ptr + at, mask=there, other=float("inf"))
        inverse = 1.0 / tl.load(total_ptr + at, mask=there, other=1.0)
        peak = tl.load(peak_ptr + at, mask=there, other=-1)
        delta = tl.load(delta_ptr + at, mask=there, other=0.0)
        d_most = tl.load(d_most_ptr + at, mask=there, other=0.0)
        if KEPT:
            seen = there[None, :] & (place[None, :] >= from_place[:, None])
        else:
            seen = is_near(place[None, :], key_place[:, None], inside[:, None], may[:, None], chunk)
            seen = seen & there[None, :]
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * factor  # [KEYS, ROWS]
        p = tl.where(seen, tl.exp2(s - most[None, :]), 0.0) * inverse[None, :]
        dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - delta[None, :])
        ds += tl.where(number[:, None] == peak[None, :], d_most[None, :], 0.0)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        if BIAS:
            if not KEPT:
                ds = tl.where(key_place[:, None] == place[None, :], 0.0, ds)
            d_bias += tl.sum(ds, axis=1)

    dk_ptr += b * stride_dkb + n * stride_dkh
    dv_ptr += b * stride_dvb + n * stride_dvh
    row = row.to(tl.int64)
    at = (row * stride_dkt)[:, None] + columns_k[None, :]
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside[:, None] & in_k)
    at = (row * stride_dvt)[:, None] + columns_v[None, :]
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=inside[:, None] & in_v)
    if BIAS:
        tl.store(d_bias_ptr + unit * length + row, d_bias, mask=inside)
