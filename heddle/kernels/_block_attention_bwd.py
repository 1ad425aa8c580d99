# mypy: ignore-errors
"""The kernels of the gradients of block_attention: of queries along the same lists, of keys and values along turned ones.

With p_j = 2^(s_j - lse), δ = o · do and ds_j = p_j (v_j · do - δ), over the keys j that a query sees, its own among them:

    dq = scale Σ_j ds_j k_j        dk_j = scale Σ_rows ds_j q,   dv_j = Σ_rows p_j do

The second kernel holds a block of keys and walks over the tiles of queries that read it, in order, so that nothing is added by
atomics. It makes the products with keys as rows: an accumulator that is turned before it is an operand is silently wrong
on Hopper. ds_j is also the gradient of a bias of the logit of key j, and summed over a block that of its gate.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels._block_attention_fwd import LENGTHS, find_entries, read_entry, reads, rows_of, seen_keys
from heddle.kernels.common.jit import LOG2_E


@triton.jit(do_not_specialize=LENGTHS)
def _block_attention_bwd_query_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, d_out_ptr, lse_ptr, delta_ptr, dq_ptr, start_ptr, offsets_ptr, entries_ptr, seen_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    T, S, N, tiles, stride_sb, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr,
    QUERIES: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    GATED: tl.constexpr, SEEN: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one key head; leaves δ for the other kernel. GATED is as in `_block_attention_fwd_kernel`.

    What rounding took from the output is not in δ, and as large as gradients of biases may be that are sums over many
    logits. With BIAS the other kernel gets it added: it is Σ_j ds_j, which is 0 with the exact δ.

    Shapes:  out, d_out: [B, H, T, V], dense;  lse, delta: [B, H, T];  dq: [B, H, T, K]
    """
    row = tl.program_id(0).to(tl.int64)
    tile = (row % tiles).to(tl.int32)
    n = row // tiles % N
    b = row // tiles // N
    if GATED:
        tile = tiles - 1 - tile
        row += tiles - 1 - 2 * (row % tiles)
    start = tl.load(start_ptr + b)
    query, head, present, place = rows_of(tile, start, T, ROWS, QUERIES, HEADS, GROUP)
    columns_k, columns_v = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V)
    in_k, in_v = (columns_k < K)[None, :], (columns_v < V)[None, :]
    first_query = tile.to(tl.int64) * QUERIES
    q_ptr += b * stride_qb + n * GROUP * stride_qh + first_query * stride_qt
    k_ptr += b * stride_kb + n * stride_kh
    v_ptr += b * stride_vb + n * stride_vh
    seen_ptr += b * stride_sb
    here = present[:, None]
    at = ((b * N + n) * GROUP + head) * T + first_query + query
    q_at = q_ptr + (query * stride_qt + head.to(tl.int64) * stride_qh)[:, None] + columns_k[None, :]
    out_at = (at * V)[:, None] + columns_v[None, :]
    q = tl.load(q_at, mask=here & in_k, other=0.0)  # [ROWS, ROWS_K]
    d_out = tl.load(d_out_ptr + out_at, mask=here & in_v, other=0.0)  # [ROWS, ROWS_V]
    out = tl.load(out_ptr + out_at, mask=here & in_v, other=0.0)
    lse = tl.load(lse_ptr + at, mask=present, other=float("inf"))
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), axis=1)
    if not BIAS:
        tl.store(delta_ptr + at, delta, mask=present)

    factor = scale * LOG2_E
    has_own = (place >= 0) & (place < S)
    own = place.to(tl.int64)[:, None]
    k_own = tl.load(k_ptr + own * stride_kt + columns_k[None, :], mask=has_own[:, None] & in_k, other=0.0)
    v_own = tl.load(v_ptr + own * stride_vt + columns_v[None, :], mask=has_own[:, None] & in_v, other=0.0)
    s_own = tl.sum(q.to(tl.float32) * k_own.to(tl.float32), axis=1) * factor
    p_own = tl.where(has_own, tl.exp2(s_own - lse), 0.0)
    ds_own = p_own * (tl.sum(d_out.to(tl.float32) * v_own.to(tl.float32), axis=1) - delta)
    dq = ds_own[:, None] * k_own.to(tl.float32)  # [ROWS, ROWS_K]
    missed = tl.zeros([ROWS], tl.float32)

    begin, count = find_entries(offsets_ptr, row, 0, 0, 1, False, False, False)
    entries_ptr += begin
    i = tl.arange(0, KEYS)
    PARTS: tl.constexpr = (BLOCK + KEYS - 1) // KEYS
    for index in range(0, count * PARTS):
        c, mark = read_entry(entries_ptr + index // PARTS, False)
        part = index % PARTS
        first = c * BLOCK + part * KEYS
        inside, key = seen_keys(seen_ptr, first, part, S, BLOCK, KEYS, SEEN)
        k_at = k_ptr + first.to(tl.int64) * stride_kt + (i * stride_kt)[:, None] + columns_k[None, :]
        v_at = v_ptr + first.to(tl.int64) * stride_vt + (i * stride_vt)[:, None] + columns_v[None, :]
        k = tl.load(k_at, mask=inside[:, None] & in_k, other=0.0)  # [KEYS, ROWS_K]
        v = tl.load(v_at, mask=inside[:, None] & in_v, other=0.0)  # [KEYS, ROWS_V]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor  # [ROWS, KEYS]
        reach = tl.where(reads(mark, c, query, place, BLOCK, GATED), place, -1)
        p = tl.where(key[None, :] < reach[:, None], tl.exp2(s - lse[:, None]), 0.0)
        ds = p * (tl.dot(d_out, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        if BIAS:
            missed += tl.sum(ds, axis=1)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    if BIAS:
        tl.store(delta_ptr + at, delta + ds_own + missed, mask=present)
    dq_at = dq_ptr + (at * K)[:, None] + columns_k[None, :]
    tl.store(dq_at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=here & in_k)


@triton.jit(do_not_specialize=LENGTHS)
def _block_attention_bwd_key_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, d_bias_ptr, d_gates_ptr,
    start_ptr, offsets_ptr, entries_ptr, seen_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    T, S, N, count, stride_sb, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr,
    QUERIES: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    GATED: tl.constexpr, SEEN: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """KEYS keys of one of the `count` blocks of one key head.

    Shapes:  delta, lse: [B, H, T];  dk: [B, N, S, K];  dv: [B, N, S, V]
             d_bias: [B, N, S], without own keys, and with GATED only if SEEN;  d_gates: [B, N, S], of queries in later blocks:
             both only with BIAS
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    c = (row % count).to(tl.int32)
    n = row // count % N
    b = row // count // N
    start = tl.load(start_ptr + b)
    first = c * BLOCK + part * KEYS
    seen_ptr += b * stride_sb
    inside, key = seen_keys(seen_ptr, first, part, S, BLOCK, KEYS, SEEN)
    columns_k, columns_v = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V)
    in_k, in_v = (columns_k < K)[None, :], (columns_v < V)[None, :]
    place_of_key = first + tl.arange(0, KEYS)
    at_key = place_of_key.to(tl.int64)[:, None]
    q_ptr += b * stride_qb + n * GROUP * stride_qh
    k_at = k_ptr + b * stride_kb + n * stride_kh + at_key * stride_kt + columns_k[None, :]
    v_at = v_ptr + b * stride_vb + n * stride_vh + at_key * stride_vt + columns_v[None, :]
    k = tl.load(k_at, mask=inside[:, None] & in_k, other=0.0)  # [KEYS, ROWS_K]
    v = tl.load(v_at, mask=inside[:, None] & in_v, other=0.0)  # [KEYS, ROWS_V]
    dk = tl.zeros([KEYS, ROWS_K], tl.float32)
    dv = tl.zeros([KEYS, ROWS_V], tl.float32)
    d_bias, d_gate = tl.zeros([KEYS], tl.float32), tl.zeros([KEYS], tl.float32)
    factor = scale * LOG2_E
    head_at = (b * N + n) * GROUP * T

    begin, length = find_entries(offsets_ptr, row, 0, 0, 1, False, False, False)
    entries_ptr += begin
    for index in range(0, length):
        tile, mark = read_entry(entries_ptr + index, False)
        query, head, present, place = rows_of(tile, start, T, ROWS, QUERIES, HEADS, GROUP)
        t = tile.to(tl.int64) * QUERIES + query
        q_at = q_ptr + (t * stride_qt + head.to(tl.int64) * stride_qh)[:, None] + columns_k[None, :]
        at = head_at + head.to(tl.int64) * T + t
        d_out_at = d_out_ptr + (at * V)[:, None] + columns_v[None, :]
        q = tl.load(q_at, mask=present[:, None] & in_k, other=0.0)  # [ROWS, ROWS_K]
        d_out = tl.load(d_out_at, mask=present[:, None] & in_v, other=0.0)  # [ROWS, ROWS_V]
        lse = tl.load(lse_ptr + at, mask=present, other=float("inf"))
        delta = tl.load(delta_ptr + at, mask=present, other=0.0)
        reach = tl.where(reads(mark, c, query, place, BLOCK, GATED), place, -1)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * factor  # [KEYS, ROWS]
        p = tl.where(key[:, None] < reach[None, :], tl.exp2(s - lse[None, :]), 0.0)
        dv = tl.dot(p.to(d_out.dtype), d_out, dv, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(d_out), input_precision=PRECISION) - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
        if BIAS:
            if SEEN or not GATED:
                d_bias += tl.sum(ds, axis=1)
            d_gate += tl.sum(tl.where((place // BLOCK > c)[None, :], ds, 0.0), axis=1)

    # Each key is the own one of at most one query, whatever that chose.
    t = place_of_key - start
    has_own = inside & (t >= 0) & (t < T)
    own = has_own[:, None]
    at = head_at + t
    q_at = q_ptr + t.to(tl.int64)[:, None] * stride_qt + columns_k[None, :]
    for _ in tl.range(0, GROUP, num_stages=1):
        q = tl.load(q_at, mask=own & in_k, other=0.0).to(tl.float32)
        d_out_at = d_out_ptr + (at * V)[:, None] + columns_v[None, :]
        d_out = tl.load(d_out_at, mask=own & in_v, other=0.0).to(tl.float32)
        lse = tl.load(lse_ptr + at, mask=has_own, other=float("inf"))
        delta = tl.load(delta_ptr + at, mask=has_own, other=0.0)
        p_own = tl.exp2(tl.sum(q * k.to(tl.float32), axis=1) * factor - lse)
        ds_own = p_own * (tl.sum(d_out * v.to(tl.float32), axis=1) - delta)
        dv += p_own[:, None] * d_out
        dk += ds_own[:, None] * q
        # The next head of the group.
        q_at += stride_qh
        at += T

    at_out = (b * N + n) * S + place_of_key
    dk_at = dk_ptr + (at_out * K)[:, None] + columns_k[None, :]
    tl.store(dk_at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside[:, None] & in_k)
    dv_at = dv_ptr + (at_out * V)[:, None] + columns_v[None, :]
    tl.store(dv_at, dv.to(dv_ptr.dtype.element_ty), mask=inside[:, None] & in_v)
    if BIAS:
        tl.store(d_bias_ptr + at_out, d_bias, mask=inside)
        tl.store(d_gates_ptr + at_out, d_gate, mask=inside)
