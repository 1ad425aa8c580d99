# mypy: ignore-errors
"""The kernels of the gradients of sliding_window_attention: of queries, and of keys and values.

With p_j = 2^(c s_j - lse), c = scale log2(e), δ = o · do and ds_j = p_j (v_j · do - δ), over the keys j that a query sees:

    dq = scale Σ_j ds_j k_j        dk_j = scale Σ_rows ds_j q,   dv_j = Σ_rows p_j do

The first walks over the same tiles of keys as the forward pass. The second holds a tile of keys and walks over the queries that
see any of them, head after head of the group, in order, so that nothing is added by atomics: up to a window behind them, and
over all later queries for a tile that begins with a sink. It makes the products with keys as rows: an accumulator that is
turned before it is an operand is silently wrong on Hopper.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels._sliding_window_attention_fwd import (
    FAR,
    LENGTHS,
    hide,
    keys_in_view,
    rows_of_tile,
    tile_of_keys,
)
from heddle.kernels.common.jit import LOG2_E, find_sequence, load_tile


@triton.jit(do_not_specialize=LENGTHS)
def _sliding_window_attention_bwd_query_kernel(
    q_ptr, k_ptr, v_ptr, k_tiles, v_tiles, out_ptr, d_out_ptr, lse_ptr, sums_ptr, dq_ptr,
    table_ptr, cu_seqlens_ptr, seen_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot,
    stride_gb, stride_gh, stride_gt,
    stride_dqb, stride_dqh, stride_dqt,
    T, S, tiles, room, window, sinks, stride_sb, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr, KEYS: tl.constexpr,
    SINKS: tl.constexpr, SEEN: tl.constexpr, VARLEN: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head; leaves log-sum-exp and δ for the other kernel.

    Shapes:  out, d_out (strides g): [B, H, T, V];  lse: [B, H, T];  dq: [B, H, T, K];  sums: [B H, 2, room]
    """
    h = tl.program_id(1).to(tl.int64)
    b, tile, begin, length = find_sequence(tl.program_id(0), table_ptr, cu_seqlens_ptr, T, tiles, VARLEN)
    shift = S - T
    if VARLEN:
        length = tl.where(b < 0, 0, length)
        b = tl.zeros((), tl.int32)
        shift = 0
    b = b.to(tl.int64)
    t, _, present, place = rows_of_tile(tile, shift, length, ROWS, ROWS, 1, 1)
    columns_k, columns_v = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V)
    in_k, in_v = (columns_k < K)[None, :], (columns_v < V)[None, :]
    n = h // GROUP
    k_ptr += b * stride_kb + n * stride_kh + begin * stride_kt
    v_ptr += b * stride_vb + n * stride_vh + begin * stride_vt
    seen_ptr += b * stride_sb + begin
    token, here = (begin + t).to(tl.int64), present[:, None]
    q_at = q_ptr + b * stride_qb + h * stride_qh + (token * stride_qt)[:, None] + columns_k[None, :]
    out_at = out_ptr + b * stride_ob + h * stride_oh + (token * stride_ot)[:, None] + columns_v[None, :]
    d_out_at = d_out_ptr + b * stride_gb + h * stride_gh + (token * stride_gt)[:, None] + columns_v[None, :]
    q = tl.load(q_at, mask=here & in_k, other=0.0)  # [ROWS, ROWS_K]
    d_out = tl.load(d_out_at, mask=here & in_v, other=0.0)  # [ROWS, ROWS_V]
    out = tl.load(out_at, mask=here & in_v, other=0.0)
    row = b * tl.num_programs(1) + h
    lse = tl.load(lse_ptr + row * T + token, mask=present, other=float("inf"))
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), axis=1)
    sums_at = sums_ptr + row * 2 * room + token
    tl.store(sums_at, lse, mask=present)
    tl.store(sums_at + room, delta, mask=present)

    factor = scale * LOG2_E
    dq = tl.zeros([ROWS, ROWS_K], tl.float32)
    first_place = shift + tile * ROWS
    last_place = tl.minimum(first_place + ROWS, shift + length) - 1
    sink_tiles, low, count = keys_in_view(first_place, last_place, window, sinks, KEYS, SINKS)
    i = tl.arange(0, KEYS)
    for index in range(0, count):
        first, end, reach = tile_of_keys(index, sink_tiles, low, last_place, window, sinks, KEYS, SINKS)
        inside = first + i < end
        k = load_tile(
            k_ptr, k_tiles, b, n, first, begin, stride_kt, inside, columns_k, in_k, KEYS, ROWS_K, TILES
        )
        v = load_tile(
            v_ptr, v_tiles, b, n, first, begin, stride_vt, inside, columns_v, in_v, KEYS, ROWS_V, TILES
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [ROWS, KEYS]
        is_whole = (first + KEYS - 1 <= first_place) & (first > last_place - reach) & (first + KEYS <= end)
        if SEEN:
            is_whole = False
        if not is_whole:
            key = tl.where(inside, first + i, FAR)
            seen = inside
            if SEEN:
                seen = tl.load(seen_ptr + first + i, mask=inside, other=0) != 0
            s = hide(s, place[:, None] - key[None, :], reach, seen[None, :], SEEN)
        p = tl.exp2(s * factor - lse[:, None])
        ds = p * (tl.dot(d_out, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    dq_at = dq_ptr + b * stride_dqb + h * stride_dqh + (token * stride_dqt)[:, None] + columns_k[None, :]
    tl.store(dq_at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=here & in_k)


@triton.jit(do_not_specialize=LENGTHS)
def _sliding_window_attention_bwd_key_kernel(
    q_ptr, k_ptr, v_ptr, q_tiles, d_out_tiles, sums_tiles, d_out_ptr, sums_ptr, dk_ptr, dv_ptr,
    table_ptr, cu_seqlens_ptr, seen_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt,
    stride_dkb, stride_dkh, stride_dkt,
    stride_dvb, stride_dvh, stride_dvt,
    T, S, tiles, room, window, sinks, stride_sb, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr, KEYS: tl.constexpr,
    SINKS: tl.constexpr, SEEN: tl.constexpr, VARLEN: tl.constexpr, TILES: tl.constexpr, SUMS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one key head; ROWS queries at a time.

    SUMS: log-sum-exp and δ are loaded by a descriptor as well. By pointers, Triton 3.6 has each thread copy each of the two
    numbers for each of its columns.

    Shapes:  d_out (strides g): [B, H, T, V];  sums: [B H, 2, room], room at least T;  dk: [B, N, S, K];  dv: [B, N, S, V]
    """
    n = tl.program_id(1).to(tl.int64)
    b, tile, begin, length = find_sequence(tl.program_id(0), table_ptr, cu_seqlens_ptr, S, tiles, VARLEN)
    shift, queries = S - T, T
    if VARLEN:
        length = tl.where(b < 0, 0, length)
        b = tl.zeros((), tl.int32)
        shift, queries = 0, length
    b = b.to(tl.int64)
    first = tile * KEYS
    i = tl.arange(0, KEYS)
    inside = first + i < length
    columns_k, columns_v = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V)
    in_k, in_v = (columns_k < K)[None, :], (columns_v < V)[None, :]
    token = (begin + first + i).to(tl.int64)
    k_at = k_ptr + b * stride_kb + n * stride_kh + (token * stride_kt)[:, None] + columns_k[None, :]
    v_at = v_ptr + b * stride_vb + n * stride_vh + (token * stride_vt)[:, None] + columns_v[None, :]
    k = tl.load(k_at, mask=inside[:, None] & in_k, other=0.0)  # [KEYS, ROWS_K]
    v = tl.load(v_at, mask=inside[:, None] & in_v, other=0.0)  # [KEYS, ROWS_V]
    seen = inside
    if SEEN:
        seen = tl.load(seen_ptr + b * stride_sb + begin + first + i, mask=inside, other=0) != 0
    q_ptr += b * stride_qb + n * GROUP * stride_qh + begin * stride_qt
    d_out_ptr += b * stride_gb + n * GROUP * stride_gh + begin * stride_gt
    first_row = (b * tl.num_programs(1) + n) * GROUP
    sums_ptr += first_row * 2 * room + begin

    key = tl.where(inside, first + i, FAR)
    reach = tl.zeros([KEYS], tl.int32) + window
    # The last place that sees the tile, and how far all of its keys are seen.
    last_place, all_reach = first + KEYS + window - 2, window
    if SINKS:
        reach = tl.where(first + i < sinks, FAR, window)
        last_place = tl.where(first < sinks, FAR, last_place)
        all_reach = tl.where(first + KEYS <= sinks, FAR, window)
    from_query = tl.maximum(first - shift, 0)
    to_query = tl.minimum(last_place - shift, queries - 1)
    count = tl.cdiv(tl.maximum(to_query + 1 - from_query, 0), ROWS)
    # A sequence that is not there has no keys, and no queries see any.
    count = tl.where(first < length, count, 0)
    factor = scale * LOG2_E
    dk = tl.zeros([KEYS, ROWS_K], tl.float32)
    dv = tl.zeros([KEYS, ROWS_V], tl.float32)
    rows = tl.arange(0, ROWS)
    for index in range(0, GROUP * count):
        # A head alone has nothing to divide by.
        head = tl.zeros((), tl.int64)
        from_row = from_query + index * ROWS
        if GROUP > 1:
            head = (index // count).to(tl.int64)
            from_row = from_query + index % count * ROWS
        present = from_row + rows < queries
        t = (from_row + rows).to(tl.int64)
        q = load_tile(
            q_ptr + head * stride_qh, q_tiles, b, n * GROUP + head, from_row, begin, stride_qt,
            present, columns_k, in_k, ROWS, ROWS_K, TILES,
        )  # fmt: skip
        d_out = load_tile(
            d_out_ptr + head * stride_gh, d_out_tiles, b, n * GROUP + head, from_row, begin, stride_gt,
            present, columns_v, in_v, ROWS, ROWS_V, TILES,
        )  # fmt: skip
        if SUMS:
            row, place = (first_row + head).to(tl.int32), (begin + from_row).to(tl.int32)
            lse = sums_tiles.load([row, 0, place]).reshape([ROWS])
            delta = sums_tiles.load([row, 1, place]).reshape([ROWS])
        else:
            sums_at = sums_ptr + head * 2 * room + t
            lse = tl.load(sums_at, mask=present, other=float("inf"))
            delta = tl.load(sums_at + room, mask=present, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [KEYS, ROWS]
        first_place = shift + from_row
        is_whole = (
            (first + KEYS - 1 <= first_place)
            & (first_place + ROWS - 1 - first < all_reach)
            & (first + KEYS <= length)
        )
        if SEEN:
            is_whole = False
        places = first_place + rows
        if SUMS:
            # Sums of a query that is not there are zeros, or another's.
            is_whole = is_whole & (from_row + ROWS <= queries)
            places = tl.where(present, places, -1)
        if not is_whole:
            # A query that is not there has the weight 2^-inf.
            s = hide(s, places[None, :] - key[:, None], reach[:, None], seen[:, None], SEEN)
        p = tl.exp2(s * factor - lse[None, :])
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(d_out), input_precision=PRECISION) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    dk_at = dk_ptr + b * stride_dkb + n * stride_dkh + (token * stride_dkt)[:, None] + columns_k[None, :]
    tl.store(dk_at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside[:, None] & in_k)
    dv_at = dv_ptr + b * stride_dvb + n * stride_dvh + (token * stride_dvt)[:, None] + columns_v[None, :]
    tl.store(dv_at, dv.to(dv_ptr.dtype.element_ty), mask=inside[:, None] & in_v)
