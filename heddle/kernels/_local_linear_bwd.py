# mypy: ignore-errors
"""The backward kernels of local_linear_attention: the right side of the adjoint solve, gradients of queries, and of keys.

By implicit differentiation of the solve, as in `_local_linear_torch`: with g the gradient of the output, a_j = (k_j - kb) · x,

    right     c_j = v_j · g,   cb = E_p[c],   r = Σ_j p_j (c_j - cb) k_j;   y with (Cov_p(k) + ridge I) y = r, or 0 for a given x
    queries   b_j = (k_j - kb) · y,   delta_j = (c_j - b_j) (1 + a_j) - cb a_j,   D = E_p[delta],   dq = y + scale Σ_j p_j (delta_j - D) k_j
    keys      dv_j = Σ_i p_ij (1 + a_ij) g_i,   dk_j = Σ_i scale p_ij (delta_ij - D_i) q_i + p_ij (c_ij - cb_i - b_ij) x_i - p_ij (1 + a_ij) y_i

The weights are made again in each, from the largest product and the logarithm of the sum. Of keys a program has a tile of one key head, and walks
over all queries that see it. In half precision x and y are two numbers where they meet a key, and one, as all that they are summed with, in gradients
of keys and values. Products for a query and key: 3 d + V, 7 d + V, 8 d + 2 V (the last two 4 d + V and 4 d + 2 V for a given x).
"""  # noqa: E501 - an equation a line

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels._local_linear_fwd import (
    LENGTHS,
    along_keys,
    dot_wide,
    less_common,
    load_norm,
    load_rows,
    tile_of_rows,
    weights,
)
from heddle.kernels.common.jit import LOG2_E


@triton.jit
def dot_turned(k, x, SPLIT: tl.constexpr):
    """k xᵀ; in full precision to the bit what the kernels of queries have.  Shapes:  k: [KEYS, K];  x: [ROWS, K]"""
    left = k if SPLIT else x
    right = x if SPLIT else k
    found = tl.dot(left, tl.trans(right), input_precision="ieee")
    return found if SPLIT else tl.trans(found)


@triton.jit(do_not_specialize=LENGTHS)
def _local_linear_bwd_right_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, norm_ptr, mean_ptr, right_ptr, middle_ptr, common_ptr, seen_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_db, stride_dh, stride_dt,
    H, T, S, window, stride_sb, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    GROUP: tl.constexpr, SEEN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Shapes:  right: [B, H, T, K], float32;  middle: [2, B, H, T], of which the first half gets cb"""
    b, h, t, place, low, high = tile_of_rows(H, T, S, window, ROWS)
    columns, columns_v = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V)
    unit = tl.program_id(1).to(tl.int64)
    batch, head, shared = b.to(tl.int64), h.to(tl.int64), (h // GROUP).to(tl.int64)
    k_ptr += batch * stride_kb + shared * stride_kh
    v_ptr += batch * stride_vb + shared * stride_vh
    q = load_rows(q_ptr + batch * stride_qb + head * stride_qh, t, stride_qt, T, columns, K)
    g = load_rows(d_out_ptr + batch * stride_db + head * stride_dh, t, stride_dt, T, columns_v, V)
    seen_ptr += batch * stride_sb
    largest, norm = load_norm(norm_ptr, unit, t, T)
    middle = tl.zeros([ROWS], tl.float32)
    right = tl.zeros([ROWS, ROWS_K], tl.float32)
    for start in range(low, high, KEYS):
        key = start + tl.arange(0, KEYS)
        k = load_rows(k_ptr, key, stride_kt, S, columns, K)  # [KEYS, ROWS_K]
        v = load_rows(v_ptr, key, stride_vt, S, columns_v, V)  # [KEYS, ROWS_V]
        p = weights(q, k, largest, norm, place, key, window, S, seen_ptr, scale * LOG2_E, SEEN)
        weighted = p * tl.dot(g, tl.trans(v), input_precision="ieee")
        middle += tl.sum(weighted, axis=1)
        k = less_common(k, common_ptr, unit, columns, K, GROUP, SPLIT)
        right = dot_wide(weighted, k, right, SPLIT)
    mean = load_rows(mean_ptr + unit * T * K, t, K, T, columns, K)
    at = right_ptr + (unit * T + t)[:, None] * K + columns[None, :]
    tl.store(at, right - middle[:, None] * mean, mask=(t < T)[:, None] & (columns < K)[None, :])
    tl.store(middle_ptr + unit * T + t, middle, mask=t < T)


@triton.jit(do_not_specialize=LENGTHS)
def _local_linear_bwd_query_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, norm_ptr, mean_ptr, x_ptr, of_x_ptr, y_ptr, of_y_ptr, middle_ptr, dq_ptr,
    common_ptr, seen_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_db, stride_dh, stride_dt,
    H, T, S, window, stride_sb, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    GROUP: tl.constexpr, SEEN: tl.constexpr, SPLIT: tl.constexpr, PARTS: tl.constexpr, SOLVED: tl.constexpr,
):  # fmt: skip
    """Shapes:  x, y: [PARTS, B, H, T, K];  of_x, of_y: [B, H, T], kb · x and kb · y;  dq: [B, H, T, K];
    middle: [2, B, H, T], cb, and of which the second half gets D, float32
    """
    b, h, t, place, low, high = tile_of_rows(H, T, S, window, ROWS)
    columns, columns_v = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V)
    unit = tl.program_id(1).to(tl.int64)
    batch, head, shared = b.to(tl.int64), h.to(tl.int64), (h // GROUP).to(tl.int64)
    k_ptr += batch * stride_kb + shared * stride_kh
    v_ptr += batch * stride_vb + shared * stride_vh
    q = load_rows(q_ptr + batch * stride_qb + head * stride_qh, t, stride_qt, T, columns, K)
    g = load_rows(d_out_ptr + batch * stride_db + head * stride_dh, t, stride_dt, T, columns_v, V)
    seen_ptr += batch * stride_sb
    largest, norm = load_norm(norm_ptr, unit, t, T)
    middle = tl.load(middle_ptr + unit * T + t, mask=t < T, other=0.0)
    rows = unit * T * K
    second = rows + tl.num_programs(1).to(tl.int64) * T * K
    x = load_rows(x_ptr + rows, t, K, T, columns, K)
    x_low = x
    if PARTS > 1:
        x_low = load_rows(x_ptr + second, t, K, T, columns, K)
    of_x = tl.load(of_x_ptr + unit * T + t, mask=t < T, other=0.0)
    y = x
    y_low = x
    of_y = of_x
    if SOLVED:
        y = load_rows(y_ptr + rows, t, K, T, columns, K)
        of_y = tl.load(of_y_ptr + unit * T + t, mask=t < T, other=0.0)
        if PARTS > 1:
            y_low = load_rows(y_ptr + second, t, K, T, columns, K)
    total = tl.zeros([ROWS], tl.float32)
    dq = tl.zeros([ROWS, ROWS_K], tl.float32)
    for start in range(low, high, KEYS):
        key = start + tl.arange(0, KEYS)
        k = load_rows(k_ptr, key, stride_kt, S, columns, K)  # [KEYS, ROWS_K]
        v = load_rows(v_ptr, key, stride_vt, S, columns_v, V)  # [KEYS, ROWS_V]
        p = weights(q, k, largest, norm, place, key, window, S, seen_ptr, scale * LOG2_E, SEEN)
        c = tl.dot(g, tl.trans(v), input_precision="ieee")
        k = less_common(k, common_ptr, unit, columns, K, GROUP, SPLIT)
        a = along_keys(x, x_low, k, PARTS) - of_x[:, None]
        if SOLVED:
            c -= along_keys(y, y_low, k, PARTS) - of_y[:, None]
        weighted = p * (c * (1.0 + a) - middle[:, None] * a)
        total += tl.sum(weighted, axis=1)
        dq = dot_wide(weighted, k, dq, SPLIT)
    mean = load_rows(mean_ptr + rows, t, K, T, columns, K)
    dq = (dq - total[:, None] * mean) * scale
    if SOLVED:
        dq += load_rows(y_ptr + rows, t, K, T, columns, K).to(tl.float32)
        if PARTS > 1:
            dq += load_rows(y_ptr + second, t, K, T, columns, K).to(tl.float32)
    at = dq_ptr + (unit * T + t)[:, None] * K + columns[None, :]
    tl.store(at, dq.to(dq_ptr.dtype.element_ty), mask=(t < T)[:, None] & (columns < K)[None, :])
    tl.store(middle_ptr + (tl.num_programs(1).to(tl.int64) + unit) * T + t, total, mask=t < T)


@triton.jit(do_not_specialize=LENGTHS)
def _local_linear_bwd_key_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, norm_ptr, x_ptr, of_x_ptr, y_ptr, of_y_ptr, middle_ptr, dk_ptr, dv_ptr, d_seen_ptr,
    common_ptr, seen_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_db, stride_dh, stride_dt,
    H, T, S, window, stride_sb, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    GROUP: tl.constexpr, SEEN: tl.constexpr, SPLIT: tl.constexpr, PARTS: tl.constexpr, SOLVED: tl.constexpr,
):  # fmt: skip
    """A tile of keys of one key head; all that is between keys and queries is [KEYS, ROWS] here.

    Shapes:  x, y: [PARTS, B, H, T, K];  of_x, of_y: [B, H, T];  middle: [2, B, H, T];
             dk: [B, N, S, K];  dv: [B, N, S, V];  d_seen: [B, N, S], of a bias of the logits, but of a query's own key
    """
    N = H // GROUP
    batch, shared = (tl.program_id(1) // N).to(tl.int64), (tl.program_id(1) % N).to(tl.int64)
    unit = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * KEYS
    key = first + tl.arange(0, KEYS)
    columns, columns_v = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V)
    k = load_rows(
        k_ptr + batch * stride_kb + shared * stride_kh, key, stride_kt, S, columns, K
    )  # [KEYS, ROWS_K]
    v = load_rows(
        v_ptr + batch * stride_vb + shared * stride_vh, key, stride_vt, S, columns_v, V
    )  # [KEYS, ROWS_V]
    seen = key < S
    if SEEN:
        seen = tl.load(seen_ptr + batch * stride_sb + key, mask=key < S, other=0) != 0
    centred = less_common(k, common_ptr, unit * GROUP, columns, K, GROUP, SPLIT)
    dk = tl.zeros([KEYS, ROWS_K], tl.float32)
    dv = tl.zeros([KEYS, ROWS_V], tl.float32)
    d_seen = tl.zeros([KEYS], tl.float32)
    # Of all query heads: where the second of two numbers, or of two parts, of each query begins.
    heads = tl.num_programs(1).to(tl.int64) * GROUP
    low = tl.maximum(first - (S - T), 0)
    high = tl.minimum(first + KEYS - 1 + window - (S - T), T)
    tiles = tl.maximum(tl.cdiv(high - low, ROWS), 0)
    for turn in range(0, GROUP * tiles):
        head = shared * GROUP + turn // tiles
        t = low + turn % tiles * ROWS + tl.arange(0, ROWS)
        present = t < T
        along = batch * H + head
        rows = along * T * K
        q = load_rows(
            q_ptr + batch * stride_qb + head * stride_qh, t, stride_qt, T, columns, K
        )  # [ROWS, ROWS_K]
        g = load_rows(
            d_out_ptr + batch * stride_db + head * stride_dh, t, stride_dt, T, columns_v, V
        )  # [ROWS, ROWS_V]
        x = load_rows(x_ptr + rows, t, K, T, columns, K)
        largest = tl.load(norm_ptr + along * T + t, mask=present, other=0.0)
        norm = tl.load(norm_ptr + (heads + along) * T + t, mask=present, other=0.0)
        of_x = tl.load(of_x_ptr + along * T + t, mask=present, other=0.0)
        middle = tl.load(middle_ptr + along * T + t, mask=present, other=0.0)
        total = tl.load(middle_ptr + (heads + along) * T + t, mask=present, other=0.0)
        distance = (S - T + t)[None, :] - key[:, None]
        visible = (distance >= 0) & (distance < window) & present[None, :] & (seen[:, None] | (distance == 0))
        s = dot_turned(k, q, SPLIT)  # [KEYS, ROWS]
        s = (s - largest[None, :]) * (scale * LOG2_E) - norm[None, :]
        p = tl.exp2(tl.where(visible, s, float("-inf")))
        c = tl.dot(v, tl.trans(g), input_precision="ieee")
        a = dot_turned(centred, x, SPLIT)
        if PARTS > 1:
            x_low = load_rows(x_ptr + heads * T * K + rows, t, K, T, columns, K)
            a = tl.dot(centred, tl.trans(x_low), a, input_precision="ieee")
        a -= of_x[None, :]
        share = p * (1.0 + a)
        if SOLVED:
            y = load_rows(y_ptr + rows, t, K, T, columns, K)
            b = dot_turned(centred, y, SPLIT)
            if PARTS > 1:
                y_low = load_rows(y_ptr + heads * T * K + rows, t, K, T, columns, K)
                b = tl.dot(centred, tl.trans(y_low), b, input_precision="ieee")
            c -= b - tl.load(of_y_ptr + along * T + t, mask=present, other=0.0)[None, :]
            dk = dot_wide(-share, y, dk, False)
        ds = p * (c * (1.0 + a) - middle[None, :] * a - total[None, :])
        d_seen += tl.sum(tl.where(distance == 0, 0.0, ds), axis=1)
        dv = dot_wide(share, g, dv, False)
        dk = dot_wide(ds * scale, q, dk, False)
        dk = dot_wide(p * (c - middle[None, :]), x, dk, False)
    at = unit * S + key
    inside = key < S
    tl.store(d_seen_ptr + at, d_seen, mask=inside)
    tl.store(
        dk_ptr + at[:, None] * K + columns[None, :],
        dk.to(dk_ptr.dtype.element_ty),
        mask=inside[:, None] & (columns < K)[None, :],
    )
    tl.store(
        dv_ptr + at[:, None] * V + columns_v[None, :],
        dv.to(dv_ptr.dtype.element_ty),
        mask=inside[:, None] & (columns_v < V)[None, :],
    )
