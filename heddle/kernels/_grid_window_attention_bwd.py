# mypy: ignore-errors
"""The kernels of the gradients of grid_window_attention: of queries, and of keys and values.

With p_j = 2^(c s_j - lse), c = scale log2(e), δ = o · do and ds_j = p_j (v_j · do - δ), over the keys j that a query sees:

    dq = scale Σ_j ds_j k_j        dk_j = scale Σ_rows ds_j q,   dv_j = Σ_rows p_j do

An o of 16 bits is not exact enough for δ where few keys are seen: what rounding took from it is added. The first kernel walks
over the same boxes of keys as the forward pass. The second holds a box of keys and walks over the box of queries whose windows
hold any of them: along each axis those are neighbours, near an end as many as stand still there. It goes head after head of the
group, in order, so that nothing is added by atomics. It makes the products with keys as rows: an accumulator that is turned
before it is an operand is silently wrong on Hopper.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels._grid_window_attention_fwd import (
    LENGTHS,
    boxes_of,
    corner,
    extent,
    hide,
    places_in_box,
    real_tokens,
    seers_of,
    token_of,
    walked_box,
    window_of,
)
from heddle.kernels.common.jit import LOG2_E


@triton.jit(do_not_specialize=LENGTHS)
def _grid_window_attention_bwd_query_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lost_ptr, d_out_ptr, lse_ptr, delta_ptr, dq_ptr, begin_ptr, count_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot,
    stride_lb, stride_lh, stride_lt,
    stride_gb, stride_gh, stride_gt,
    stride_dqb, stride_dqh, stride_dqt,
    T, rows, columns, tiles, down, across, reach_f, reach_r, reach_c, H, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, BOX_C: tl.constexpr, WALKED_C: tl.constexpr, GROUP: tl.constexpr, FRAMES: tl.constexpr,
    ROW_WINDOW: tl.constexpr, COLUMN_WINDOW: tl.constexpr, INWARD: tl.constexpr, PADDED: tl.constexpr,
    LOST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One box of queries of one head, as in the forward pass; leaves δ for the other kernel.

    Shapes:  out, lost (strides l, with LOST), d_out (strides g): [B, H, T, V];  lse, delta: [B, H, T] float32;  dq: [B, H, T, K]
    """
    unit, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    b, h = unit // H, unit % H
    begin, count = real_tokens(begin_ptr, count_ptr, b, T, PADDED)
    frames, height = extent(count, rows, columns, FRAMES)
    f, r0, c0 = corner(tile, down, across, ROWS // BOX_C, BOX_C)
    r, c, place, on_grid = places_in_box(f, r0, c0, rows, columns, T, ROWS, BOX_C, FRAMES)
    present, token = on_grid & (place < count), token_of(place, begin, T)
    columns_k, columns_v, i = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V), tl.arange(0, KEYS)
    in_k, in_v = (columns_k < K)[None, :], (columns_v < V)[None, :]
    q_at = q_ptr + b * stride_qb + h * stride_qh + (token * stride_qt)[:, None] + columns_k[None, :]
    out_at = out_ptr + b * stride_ob + h * stride_oh + (token * stride_ot)[:, None] + columns_v[None, :]
    g_at = d_out_ptr + b * stride_gb + h * stride_gh + (token * stride_gt)[:, None] + columns_v[None, :]
    q = tl.load(q_at, mask=present[:, None] & in_k, other=0.0)  # [ROWS, ROWS_K]
    g = tl.load(g_at, mask=present[:, None] & in_v, other=0.0)  # [ROWS, ROWS_V]
    out = tl.load(out_at, mask=present[:, None] & in_v, other=0.0)
    lse = tl.load(lse_ptr + unit * T + token, mask=present, other=float("inf"))
    delta = tl.sum(out.to(tl.float32) * g.to(tl.float32), axis=1)
    if LOST:
        lost_at = lost_ptr + b * stride_lb + h * stride_lh + (token * stride_lt)[:, None] + columns_v[None, :]
        lost = tl.load(lost_at, mask=present[:, None] & in_v, other=0.0)
        delta += tl.sum(lost.to(tl.float32) * g.to(tl.float32), axis=1)
    tl.store(delta_ptr + unit * T + token, delta, mask=on_grid)
    k_ptr += b * stride_kb + h // GROUP * stride_kh
    v_ptr += b * stride_vb + h // GROUP * stride_vh

    first_r, end_r = window_of(r, reach_r, height, INWARD)
    first_c, end_c = window_of(c, reach_c, columns, INWARD)
    from_f, to_f = window_of(f, reach_f, frames, INWARD)
    from_r, all_end_r = window_of(r0, reach_r, height, INWARD)
    all_r, to_r = window_of(tl.minimum(r0 + ROWS // BOX_C, height) - 1, reach_r, height, INWARD)
    from_c, all_end_c = window_of(c0, reach_c, columns, INWARD)
    all_c, to_c = window_of(tl.minimum(c0 + BOX_C, columns) - 1, reach_c, columns, INWARD)
    by_c = boxes_of(from_c, to_c, WALKED_C)
    in_frame = by_c * boxes_of(from_r, to_r, KEYS // WALKED_C)
    walked = tl.where((f < frames) & (r0 < height), (to_f - from_f) * in_frame, 0)
    ahead = (i // WALKED_C * columns + i % WALKED_C).to(tl.int64)
    k_ahead, v_ahead = (ahead * stride_kt)[:, None], (ahead * stride_vt)[:, None]

    factor = scale * LOG2_E
    dq = tl.zeros([ROWS, ROWS_K], tl.float32)
    for index in range(0, walked):
        key_r, key_c, key, inside, is_whole = walked_box(
            index, from_f, from_r, to_r, from_c, to_c, rows, columns, count, by_c, in_frame,
            all_r, all_end_r, all_c, all_end_c, KEYS, WALKED_C, FRAMES,
        )  # fmt: skip
        at = (begin + key).to(tl.int64)
        k_at = k_ptr + at * stride_kt + k_ahead + columns_k[None, :]
        v_at = v_ptr + at * stride_vt + v_ahead + columns_v[None, :]
        k = tl.load(k_at, mask=inside[:, None] & in_k, other=0.0)
        v = tl.load(v_at, mask=inside[:, None] & in_v, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [ROWS, KEYS]
        if not is_whole:
            s = hide(
                s, key_r[None, :], key_c[None, :], inside[None, :], first_r[:, None], (end_r - first_r)[:, None],
                first_c[:, None], (end_c - first_c)[:, None], ROW_WINDOW, COLUMN_WINDOW,
            )  # fmt: skip
        p = tl.exp2(s * factor - lse[:, None])
        ds = p * (tl.dot(g, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    dq_at = dq_ptr + b * stride_dqb + h * stride_dqh + (token * stride_dqt)[:, None] + columns_k[None, :]
    tl.store(dq_at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=on_grid[:, None] & in_k)


@triton.jit(do_not_specialize=LENGTHS)
def _grid_window_attention_bwd_key_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, begin_ptr, count_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_gb, stride_gh, stride_gt,
    stride_dkb, stride_dkh, stride_dkt,
    stride_dvb, stride_dvh, stride_dvt,
    T, rows, columns, tiles, down, across, reach_f, reach_r, reach_c, N, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, BOX_C: tl.constexpr, WALKED_C: tl.constexpr, GROUP: tl.constexpr, FRAMES: tl.constexpr,
    ROW_WINDOW: tl.constexpr, COLUMN_WINDOW: tl.constexpr, INWARD: tl.constexpr, PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One box of KEYS keys of one key head, BOX_C columns wide; WALKED_C columns has a box of ROWS queries.

    Shapes:  lse, delta: [B, H, T] float32;  dk: [B, N, T, K];  dv: [B, N, T, V]
    """
    unit, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    b, n = unit // N, unit % N
    begin, count = real_tokens(begin_ptr, count_ptr, b, T, PADDED)
    frames, height = extent(count, rows, columns, FRAMES)
    f, r0, c0 = corner(tile, down, across, KEYS // BOX_C, BOX_C)
    r, c, place, on_grid = places_in_box(f, r0, c0, rows, columns, T, KEYS, BOX_C, FRAMES)
    present, token = on_grid & (place < count), token_of(place, begin, T)
    columns_k, columns_v, i = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V), tl.arange(0, ROWS)
    in_k, in_v = (columns_k < K)[None, :], (columns_v < V)[None, :]
    k_at = k_ptr + b * stride_kb + n * stride_kh + (token * stride_kt)[:, None] + columns_k[None, :]
    v_at = v_ptr + b * stride_vb + n * stride_vh + (token * stride_vt)[:, None] + columns_v[None, :]
    k = tl.load(k_at, mask=present[:, None] & in_k, other=0.0)  # [KEYS, ROWS_K]
    v = tl.load(v_at, mask=present[:, None] & in_v, other=0.0)  # [KEYS, ROWS_V]
    q_ptr += b * stride_qb + n * GROUP * stride_qh
    d_out_ptr += b * stride_gb + n * GROUP * stride_gh
    lse_ptr += unit * GROUP * T
    delta_ptr += unit * GROUP * T

    # A key that is not there has no seers.
    first_r, end_r = seers_of(r, reach_r, height, INWARD)
    first_c, end_c = seers_of(c, reach_c, columns, INWARD)
    from_f, to_f = seers_of(f, reach_f, frames, INWARD)
    from_r, all_end_r = seers_of(r0, reach_r, height, INWARD)
    all_r, to_r = seers_of(tl.minimum(r0 + KEYS // BOX_C, height) - 1, reach_r, height, INWARD)
    from_c, all_end_c = seers_of(c0, reach_c, columns, INWARD)
    all_c, to_c = seers_of(tl.minimum(c0 + BOX_C, columns) - 1, reach_c, columns, INWARD)
    by_c = boxes_of(from_c, to_c, WALKED_C)
    in_frame = by_c * boxes_of(from_r, to_r, ROWS // WALKED_C)
    walked = tl.where((f < frames) & (r0 < height), (to_f - from_f) * in_frame, 0)
    ahead = (i // WALKED_C * columns + i % WALKED_C).to(tl.int64)
    q_ahead, g_ahead = (ahead * stride_qt)[:, None], (ahead * stride_gt)[:, None]

    factor = scale * LOG2_E
    dk = tl.zeros([KEYS, ROWS_K], tl.float32)
    dv = tl.zeros([KEYS, ROWS_V], tl.float32)
    for turn in range(0, GROUP * walked):
        # A head alone has nothing to divide by.
        head, index = tl.zeros((), tl.int64), turn
        if GROUP > 1:
            head, index = (turn // walked).to(tl.int64), turn % walked
        query_r, query_c, query, inside, is_whole = walked_box(
            index, from_f, from_r, to_r, from_c, to_c, rows, columns, count, by_c, in_frame,
            all_r, all_end_r, all_c, all_end_c, ROWS, WALKED_C, FRAMES,
        )  # fmt: skip
        at = (begin + query).to(tl.int64)
        q_at = q_ptr + head * stride_qh + at * stride_qt + q_ahead + columns_k[None, :]
        g_at = d_out_ptr + head * stride_gh + at * stride_gt + g_ahead + columns_v[None, :]
        q = tl.load(q_at, mask=inside[:, None] & in_k, other=0.0)  # [ROWS, ROWS_K]
        g = tl.load(g_at, mask=inside[:, None] & in_v, other=0.0)  # [ROWS, ROWS_V]
        lse = tl.load(lse_ptr + head * T + at + ahead, mask=inside, other=float("inf"))
        delta = tl.load(delta_ptr + head * T + at + ahead, mask=inside, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [KEYS, ROWS]
        if not is_whole:
            s = hide(
                s, query_r[None, :], query_c[None, :], inside[None, :], first_r[:, None], (end_r - first_r)[:, None],
                first_c[:, None], (end_c - first_c)[:, None], ROW_WINDOW, COLUMN_WINDOW,
            )  # fmt: skip
        p = tl.exp2(s * factor - lse[None, :])
        dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    dk_at = dk_ptr + b * stride_dkb + n * stride_dkh + (token * stride_dkt)[:, None] + columns_k[None, :]
    dk = tl.where(present[:, None], dk * scale, 0.0)
    tl.store(dk_at, dk.to(dk_ptr.dtype.element_ty), mask=on_grid[:, None] & in_k)
    dv_at = dv_ptr + b * stride_dvb + n * stride_dvh + (token * stride_dvt)[:, None] + columns_v[None, :]
    dv = tl.where(present[:, None], dv, 0.0)
    tl.store(dv_at, dv.to(dv_ptr.dtype.element_ty), mask=on_grid[:, None] & in_v)
