# mypy: ignore-errors
"""The kernels of the gradients of rat_attention: of queries and own keys and values, and of summaries.

With p_j = 2^(c s_j - lse), c = scale log2(e), δ = o · do and ds_j = p_j (v_j · do - δ), over the summaries that a query sees, and
p, ds likewise of its own key:

    dq = scale (ds k~ + Σ_j ds_j k_j),   dk~ = scale ds q,   dx~ = p do
    dk_j = scale Σ_rows ds_j q,   dv_j = Σ_rows p_j do

The first walks over the same tiles of summaries as the forward pass. The second holds a tile of summaries and walks over all
queries behind the first of their chunks, in order, so that nothing is added by atomics. It makes the products with summaries as
rows: an accumulator that is turned before it is an operand is silently wrong on Hopper.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels._rat_attention_fwd import LENGTHS, load_rows, place_of
from heddle.kernels.common.jit import LOG2_E


@triton.jit(do_not_specialize=LENGTHS)
def _rat_attention_bwd_query_kernel(
    q_ptr, key_ptr, value_ptr, keys_ptr, values_ptr, keys_tiles, values_tiles, out_ptr, d_out_ptr, lse_ptr, delta_ptr,
    dq_ptr, d_key_ptr, d_value_ptr, table_ptr, cu_seqlens_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_sb, stride_sh, stride_sc,
    stride_wb, stride_wh, stride_wc,
    stride_ob, stride_oh, stride_ot,
    stride_gb, stride_gh, stride_gt,
    stride_db, stride_dh, stride_dt,
    T, tiles, chunk, start, scale,
    G: tl.constexpr, D: tl.constexpr, ROWS_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    VARLEN: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head; leaves δ for the other kernel.

    Shapes:  out, d_out (strides g): [B, H, T, D];  lse, delta: [B, H, T];  dq, d_key, d_value (strides d): [B, H, T, D]
    """
    h = tl.program_id(1).to(tl.int64)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    b, tile, begin, length, base = place_of(pid, table_ptr, cu_seqlens_ptr, T, tiles, chunk, VARLEN)
    t = tile * ROWS + tl.arange(0, ROWS)
    columns, present = tl.arange(0, ROWS_D), t < length
    in_d = (columns < D)[None, :]
    here, token = present[:, None] & in_d, (begin + t).to(tl.int64)
    q_at = q_ptr + b * stride_qb + h % G * stride_qh + (token * stride_qt)[:, None] + columns[None, :]
    key_at = key_ptr + b * stride_kb + h * stride_kh + (token * stride_kt)[:, None] + columns[None, :]
    value_at = value_ptr + b * stride_vb + h * stride_vh + (token * stride_vt)[:, None] + columns[None, :]
    out_at = out_ptr + b * stride_ob + h * stride_oh + (token * stride_ot)[:, None] + columns[None, :]
    d_out_at = d_out_ptr + b * stride_gb + h * stride_gh + (token * stride_gt)[:, None] + columns[None, :]
    gradient_at = b * stride_db + h * stride_dh + (token * stride_dt)[:, None] + columns[None, :]
    keys_ptr += b * stride_sb + h * stride_sh
    values_ptr += b * stride_wb + h * stride_wh
    q = tl.load(q_at, mask=here, other=0.0)  # [ROWS, ROWS_D]
    d_out = tl.load(d_out_at, mask=here, other=0.0)
    wide_out = d_out.to(tl.float32)
    at = (b * tl.num_programs(1) + h) * T + token
    lse = tl.load(lse_ptr + at, mask=present, other=float("inf"))
    delta = tl.sum(tl.load(out_at, mask=here, other=0.0).to(tl.float32) * wide_out, axis=1)
    tl.store(delta_ptr + at, delta, mask=present)

    factor = scale * LOG2_E
    key = tl.load(key_at, mask=here, other=0.0).to(tl.float32)
    value = tl.load(value_at, mask=here, other=0.0).to(tl.float32)
    p_own = tl.exp2(tl.sum(q.to(tl.float32) * key, axis=1) * factor - lse)
    ds_own = p_own * (tl.sum(value * wide_out, axis=1) - delta)
    d_key = (ds_own * scale)[:, None] * q.to(tl.float32)
    tl.store(d_key_ptr + gradient_at, d_key.to(d_key_ptr.dtype.element_ty), mask=here)
    d_value = p_own[:, None] * wide_out
    tl.store(d_value_ptr + gradient_at, d_value.to(d_value_ptr.dtype.element_ty), mask=here)
    dq = ds_own[:, None] * key
    limit = (start + t) // chunk
    first_limit = (start + tile * ROWS) // chunk
    last_limit = (start + tl.minimum(tile * ROWS + ROWS, length) - 1) // chunk
    i = tl.arange(0, KEYS)
    for index in range(0, tl.cdiv(last_limit, KEYS)):
        first = index * KEYS
        inside = first + i < last_limit
        k = load_rows(
            keys_ptr, keys_tiles, b, h, base + first, stride_sc, inside, columns, in_d, KEYS, ROWS_D, TILES
        )
        v = load_rows(
            values_ptr,
            values_tiles,
            b,
            h,
            base + first,
            stride_wc,
            inside,
            columns,
            in_d,
            KEYS,
            ROWS_D,
            TILES,
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [ROWS, KEYS]
        if first + KEYS > first_limit:
            s = tl.where((first + i)[None, :] < limit[:, None], s, float("-inf"))
        p = tl.exp2(s * factor - lse[:, None])
        ds = p * (tl.dot(d_out, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    tl.store(dq_ptr + gradient_at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=LENGTHS)
def _rat_attention_bwd_key_kernel(
    q_ptr, d_out_ptr, keys_ptr, values_ptr, q_tiles, d_out_tiles, lse_ptr, delta_ptr, d_keys_ptr, d_values_ptr,
    table_ptr, cu_seqlens_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_gb, stride_gh, stride_gt,
    stride_sb, stride_sh, stride_sc,
    stride_wb, stride_wh, stride_wc,
    T, S, tiles, chunk, start, scale,
    G: tl.constexpr, D: tl.constexpr, ROWS_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    VARLEN: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of summaries of one head; ROWS queries at a time. The first tiles, which most queries see, are begun first.

    Shapes:  d_keys, d_values: [B, H, S, D]
    """
    h = tl.program_id(1).to(tl.int64)
    b, tile, begin, length, base = place_of(
        tl.program_id(0), table_ptr, cu_seqlens_ptr, T, tiles, chunk, VARLEN
    )
    first = tile * KEYS
    i = tl.arange(0, KEYS)
    inside = first + i < S
    if VARLEN:
        inside = first + i < length // chunk
    columns = tl.arange(0, ROWS_D)
    in_d = (columns < D)[None, :]
    here, row = inside[:, None] & in_d, (base + first + i).to(tl.int64)
    k_at = keys_ptr + b * stride_sb + h * stride_sh + (row * stride_sc)[:, None] + columns[None, :]
    v_at = values_ptr + b * stride_wb + h * stride_wh + (row * stride_wc)[:, None] + columns[None, :]
    k = tl.load(k_at, mask=here, other=0.0)  # [KEYS, ROWS_D]
    v = tl.load(v_at, mask=here, other=0.0)
    q_ptr += b * stride_qb + h % G * stride_qh
    d_out_ptr += b * stride_gb + h * stride_gh
    at_head = (b * tl.num_programs(1) + h) * T + begin

    factor = scale * LOG2_E
    from_query = tl.maximum((first + 1) * chunk - start, 0)
    dk = tl.zeros([KEYS, ROWS_D], tl.float32)
    dv = tl.zeros([KEYS, ROWS_D], tl.float32)
    rows = tl.arange(0, ROWS)
    for index in range(0, tl.cdiv(tl.maximum(length - from_query, 0), ROWS)):
        from_row = from_query + index * ROWS
        t = from_row + rows
        present = t < length
        q = load_rows(
            q_ptr, q_tiles, b, h % G, begin + from_row, stride_qt, present, columns, in_d, ROWS, ROWS_D, TILES
        )
        d_out = load_rows(
            d_out_ptr,
            d_out_tiles,
            b,
            h,
            begin + from_row,
            stride_gt,
            present,
            columns,
            in_d,
            ROWS,
            ROWS_D,
            TILES,
        )
        lse = tl.load(lse_ptr + at_head + t, mask=present, other=float("inf"))
        delta = tl.load(delta_ptr + at_head + t, mask=present, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [KEYS, ROWS]
        if first + KEYS > (start + from_row) // chunk:
            s = tl.where((first + i)[:, None] < ((start + t) // chunk)[None, :], s, float("-inf"))
        # A query that is not there has the weight 2^-inf.
        p = tl.exp2(s * factor - lse[None, :])
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(d_out), input_precision=PRECISION) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    at = ((b * tl.num_programs(1) + h) * S + row)[:, None] * D + columns[None, :]
    tl.store(d_keys_ptr + at, (dk * scale).to(d_keys_ptr.dtype.element_ty), mask=here)
    tl.store(d_values_ptr + at, dv.to(d_values_ptr.dtype.element_ty), mask=here)
