# mypy: ignore-errors
"""The kernels of the gradients of head_sparse_attention: of queries and weights, and of keys and values.

With the output o of a head before its weight w, p_j = 2^(c s_j - lse), c = scale log2(e), μ = o · do = out · do / w and
e_j = p_j (v_j · do - μ), over the keys j that a query sees, for queries that chose the head:

    dq = w scale Σ_j e_j k_j        dw = Σ_j p_j v_j · do        dk_j = scale Σ_rows w e_j q,   dv_j = Σ_rows p_j w do

The first kernel walks over the same tiles of keys as the forward pass. It leaves q, w do, lse and w μ in the order of the lists,
so that the second one, which holds a tile of keys and walks over the queries of each head from the first one that sees
any of them on, reads neighbours: nothing is gathered there, and nothing is added by atomics. It makes the products with keys
as rows: an accumulator that is turned before it is an operand is silently wrong on Hopper.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels._head_sparse_attention_fwd import hide, hide_keys, keys_of_tile, rows_of_tile
from heddle.kernels.common.jit import LOG2_E, load_tile

LENGTHS = ("T", "S", "tiles", "stride_sb")


@triton.jit(do_not_specialize=LENGTHS)
def _head_sparse_attention_bwd_query_kernel(
    q_ptr, k_ptr, v_ptr, k_tiles, v_tiles, weights_ptr, entries_ptr, before_ptr, out_ptr, d_out_ptr, lse_ptr,
    dq_ptr, d_weights_ptr, q_rows_ptr, g_rows_ptr, lse_rows_ptr, delta_rows_ptr, begins_ptr, seen_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot,
    stride_gb, stride_gh, stride_gt,
    stride_dqb, stride_dqh, stride_dqt,
    T, S, tiles, stride_sb, H, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr, KEYS: tl.constexpr, WALKED: tl.constexpr,
    SEEN: tl.constexpr, VARLEN: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of a head's list. WALKED: rows that the other kernel reads at a time.

    Shapes:  out, d_out (strides g): [B, H, T, V];  lse: [B, H, T];  dq: [B, H, T, K];  d_weights: [B, T, H] float32
             q_rows: [B, H, T, K];  g_rows: [B, H, T, V];  lse_rows, delta_rows: [B, H, T], all in the order of the list
    """
    unit = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tiles - 1 - tl.program_id(0) % tiles
    b, h = unit // H, unit % H
    n = h // GROUP
    token, _, present, chosen, weight = rows_of_tile(
        weights_ptr, entries_ptr, b, h, tile, T, H, ROWS, ROWS, 1, 1, True
    )
    columns_k, columns_v = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V)
    in_k, in_v = (columns_k < K)[None, :], (columns_v < V)[None, :]
    k_ptr += b * stride_kb + n * stride_kh
    v_ptr += b * stride_vb + n * stride_vh
    seen_ptr += b * stride_sb
    at, here = token.to(tl.int64), chosen[:, None]
    q_at = q_ptr + b * stride_qb + h * stride_qh + (at * stride_qt)[:, None] + columns_k[None, :]
    out_at = out_ptr + b * stride_ob + h * stride_oh + (at * stride_ot)[:, None] + columns_v[None, :]
    d_out_at = d_out_ptr + b * stride_gb + h * stride_gh + (at * stride_gt)[:, None] + columns_v[None, :]
    q = tl.load(q_at, mask=here & in_k, other=0.0)  # [ROWS, ROWS_K]
    d_out = tl.load(d_out_at, mask=here & in_v, other=0.0)  # [ROWS, ROWS_V]
    out = tl.load(out_at, mask=here & in_v, other=0.0)
    lse = tl.load(lse_ptr + unit * T + at, mask=chosen, other=float("inf"))
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), axis=1)
    mean = delta / tl.where(chosen, weight, 1.0)

    # Behind the last query, rows of 0 for as far as the other kernel may read.
    slot = tile * ROWS + tl.arange(0, ROWS)
    kept = present & (slot < tl.load(before_ptr + unit * (T + 1) + T) + WALKED)
    row = unit * T + slot
    rows_at = q_rows_ptr + (row * K)[:, None] + columns_k[None, :]
    tl.store(rows_at, q, mask=kept[:, None] & in_k)
    weighted = (d_out.to(tl.float32) * weight[:, None]).to(d_out.dtype)
    rows_at = g_rows_ptr + (row * V)[:, None] + columns_v[None, :]
    tl.store(rows_at, weighted, mask=kept[:, None] & in_v)
    tl.store(lse_rows_ptr + row, lse, mask=kept)
    tl.store(delta_rows_ptr + row, delta, mask=kept)

    factor = scale * LOG2_E
    dq = tl.zeros([ROWS, ROWS_K], tl.float32)
    d_weight = tl.zeros([ROWS], tl.float32)
    place, begin, low, count, whole = keys_of_tile(begins_ptr, token, chosen, S - T, KEYS, SEEN, VARLEN)
    i = tl.arange(0, KEYS)
    for index in range(0, count):
        first = low + index * KEYS
        inside = first + i < S
        k = load_tile(k_ptr, k_tiles, b, n, first, 0, stride_kt, inside, columns_k, in_k, KEYS, ROWS_K, TILES)
        v = load_tile(v_ptr, v_tiles, b, n, first, 0, stride_vt, inside, columns_v, in_v, KEYS, ROWS_V, TILES)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [ROWS, KEYS]
        if index >= whole:
            s = hide_keys(s, seen_ptr, place, begin, first + i, S, SEEN, VARLEN)
        p = tl.exp2(s * factor - lse[:, None])
        dp = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        d_weight += tl.sum(p * dp, axis=1)
        e = p * (dp - mean[:, None])
        dq = tl.dot(e.to(k.dtype), k, dq, input_precision=PRECISION)
    dq_at = dq_ptr + b * stride_dqb + h * stride_dqh + (at * stride_dqt)[:, None] + columns_k[None, :]
    dq = dq * (scale * weight)[:, None]
    tl.store(dq_at, dq.to(dq_ptr.dtype.element_ty), mask=present[:, None] & in_k)
    tl.store(d_weights_ptr + (b * T + at) * H + h, d_weight, mask=present)


@triton.jit(do_not_specialize=LENGTHS)
def _head_sparse_attention_bwd_key_kernel(
    q_rows_ptr, g_rows_ptr, k_ptr, v_ptr, q_tiles, g_tiles, lse_tiles, delta_tiles, entries_ptr, before_ptr,
    lse_rows_ptr, delta_rows_ptr, dk_ptr, dv_ptr, begins_ptr, ends_ptr, seen_ptr,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_dkb, stride_dkh, stride_dkt,
    stride_dvb, stride_dvh, stride_dvt,
    T, S, tiles, stride_sb, H, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr, KEYS: tl.constexpr,
    SEEN: tl.constexpr, VARLEN: tl.constexpr, TILES: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys of one key head; ROWS queries of a list at a time, head after head.

    SUMS: lse and delta are loaded by descriptors as well, as in sliding_window_attention.

    Shapes:  as those of the other kernel;  dk: [B, N, S, K];  dv: [B, N, S, V];  ends: [T], of each token's sequence
    """
    unit = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * KEYS
    b, n = unit // (H // GROUP), unit % (H // GROUP)
    shift = S - T
    key = first + tl.arange(0, KEYS)
    inside = key < S
    columns_k, columns_v = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V)
    in_k, in_v = (columns_k < K)[None, :], (columns_v < V)[None, :]
    at = key.to(tl.int64)
    k_at = k_ptr + b * stride_kb + n * stride_kh + (at * stride_kt)[:, None] + columns_k[None, :]
    v_at = v_ptr + b * stride_vb + n * stride_vh + (at * stride_vt)[:, None] + columns_v[None, :]
    k = tl.load(k_at, mask=inside[:, None] & in_k, other=0.0)  # [KEYS, ROWS_K]
    v = tl.load(v_at, mask=inside[:, None] & in_v, other=0.0)  # [KEYS, ROWS_V]
    seen = inside
    if SEEN:
        seen = tl.load(seen_ptr + b * stride_sb + key, mask=inside, other=0) != 0
    # Queries from the first that sees any of these keys, up to the end of the last key's sequence.
    from_query, to_query = tl.maximum(first - shift, 0), T
    # From this query on all see all of them; without one, no query does.
    whole_query = tl.minimum(tl.maximum(first + KEYS - 1 - shift, 0), T)
    has_whole = first + KEYS <= S
    if VARLEN:
        last = tl.minimum(first + KEYS, S) - 1
        to_query = tl.load(ends_ptr + last)
        has_whole = has_whole & (tl.load(begins_ptr + last) <= first)
    if SEEN:
        has_whole = False
    factor = scale * LOG2_E
    dk = tl.zeros([KEYS, ROWS_K], tl.float32)
    dv = tl.zeros([KEYS, ROWS_V], tl.float32)
    rows = tl.arange(0, ROWS)
    for one in tl.range(0, GROUP, num_stages=1):
        h = n * GROUP + one
        row = b * H + h
        from_slot = tl.load(before_ptr + row * (T + 1) + from_query)
        to_slot = tl.load(before_ptr + row * (T + 1) + to_query)
        whole_slot = tl.load(before_ptr + row * (T + 1) + whole_query)
        whole_slot = tl.where(has_whole, whole_slot, to_slot)
        if SUMS:
            # Descriptors begin at a multiple of 4. Queries before see none of these keys.
            from_slot = from_slot // 4 * 4
        for index in range(0, tl.cdiv(to_slot - from_slot, ROWS)):
            slot = from_slot + index * ROWS
            present = slot + rows < to_slot
            q = load_tile(
                q_rows_ptr + row * T * K, q_tiles, b, h, slot, 0, K, present, columns_k, in_k, ROWS, ROWS_K, TILES
            )  # fmt: skip
            g = load_tile(
                g_rows_ptr + row * T * V, g_tiles, b, h, slot, 0, V, present, columns_v, in_v, ROWS, ROWS_V, TILES
            )  # fmt: skip
            is_partial = slot < whole_slot
            if SUMS:
                is_partial = is_partial | (slot + ROWS > to_slot)
                lse = lse_tiles.load([b.to(tl.int32), h.to(tl.int32), slot]).reshape([ROWS])
                delta = delta_tiles.load([b.to(tl.int32), h.to(tl.int32), slot]).reshape([ROWS])
            else:
                lse = tl.load(lse_rows_ptr + row * T + slot + rows, mask=present, other=float("inf"))
                delta = tl.load(delta_rows_ptr + row * T + slot + rows, mask=present, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [KEYS, ROWS]
            # A query that is not there has the weight 2^-inf.
            if is_partial:
                token = tl.load(entries_ptr + row * T + slot + rows, mask=present, other=0)
                begin = tl.zeros_like(token)
                if VARLEN:
                    begin = tl.load(begins_ptr + token, mask=present, other=0)
                place = tl.where(present, shift + token, -1)
                s = hide(s, place[None, :], begin[None, :], key[:, None], seen[:, None], SEEN, VARLEN)
            p = tl.exp2(s * factor - lse[None, :])
            dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
            e = p * (tl.dot(v, tl.trans(g), input_precision=PRECISION) - delta[None, :])
            dk = tl.dot(e.to(q.dtype), q, dk, input_precision=PRECISION)
    dk_at = dk_ptr + b * stride_dkb + n * stride_dkh + (at * stride_dkt)[:, None] + columns_k[None, :]
    tl.store(dk_at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside[:, None] & in_k)
    dv_at = dv_ptr + b * stride_dvb + n * stride_dvh + (at * stride_dvt)[:, None] + columns_v[None, :]
    tl.store(dv_at, dv.to(dv_ptr.dtype.element_ty), mask=inside[:, None] & in_v)
