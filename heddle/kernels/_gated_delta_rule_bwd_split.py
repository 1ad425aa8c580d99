# mypy: ignore-errors
"""The gradients of gated_delta_rule and delta_rule by several kernels; letters as in `_gated_delta_rule_bwd`, whose one
kernel gives the same.

    pair    of each chunk and value head R and M, dv, and what the log-decays and dbeta get of products of two tokens
    token   dq, dk, and what the log-decays and dbeta get through the state, in tiles of channels of keys
    gate    the gradients of the log-decays and dbeta, of sums that the others leave

A product of two tokens over V takes registers of its own; apart from the products with the state it is made once and not once
for each direction, for what is in memory can be loaded turned. The tiles of a chunk share nothing.

Bytes for a token and head, K = V = 128, C = 64, bfloat16: pair reads q, k, v, dO, dx, n and writes dv, R, M (2048); token
reads q, k, dO, dx, n, R, M, S, dS and writes dq, dk (3072), and again dO, dx, n, R, M (1024, of the cache) for a second tile.
Products: 2 C (2 V + 2 K) and 2 (3 K V + 4 C K).
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels._gated_delta_rule_bwd import _product_with_gradient, _rest_of_last
from heddle.kernels._gated_delta_rule_fwd import LENGTHS, decays
from heddle.kernels.common.jit import find_sequence

# A model has one number of heads: known when compiled, as are strides, addresses take fewer registers.
NUMBERS = (*(name for name in LENGTHS if name not in ("H", "HV")), "sums_stride")


@triton.jit(do_not_specialize=NUMBERS)
def _gated_delta_rule_bwd_pair_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, log_decay_ptr, beta_ptr, dx_ptr, new_ptr, dv_ptr, products_ptr, pair_sums_ptr,
    table_ptr, cu_seqlens_ptr,
    stride_qn, stride_qt: tl.constexpr, stride_qh,
    stride_kn, stride_kt: tl.constexpr, stride_kh,
    stride_vn, stride_vt: tl.constexpr, stride_vh,
    stride_dn, stride_dt: tl.constexpr, stride_dh,
    sums_stride, T, H: tl.constexpr, per_sequence, scale,
    K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    GATED: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one value head.

    Shapes:  products: [chunks, HV, 2, C, C], R and M;  dx, new, dv: [B, T, HV, V]
             pair_sums: [2, B, T, HV], of products of two tokens: for beta and for the sums of log-decays
    """
    HV: tl.constexpr = H * GROUP
    head = tl.program_id(0) % HV
    chunk = tl.program_id(0) // HV
    n, j, begin, length = find_sequence(chunk, table_ptr, cu_seqlens_ptr, T, per_sequence, VARLEN)
    # An empty sequence has a chunk as well, without a token.
    if (n < 0) | (j * C >= length):
        return

    own = head.to(tl.int64)
    place = chunk.to(tl.int64) * HV + own
    row = n.to(tl.int64) if not VARLEN else tl.zeros((), tl.int64)
    first = begin + j * C
    i = tl.arange(0, C)
    rows = tl.arange(0, ROWS)
    present = i < length - j * C
    tokens = (row * T + first) * HV + own
    at = tokens + i * HV
    q_ptr += row * stride_qn + first * stride_qt + (head // GROUP).to(tl.int64) * stride_qh
    k_ptr += row * stride_kn + first * stride_kt + (head // GROUP).to(tl.int64) * stride_kh
    v_ptr += row * stride_vn + first * stride_vt + own * stride_vh
    do_ptr += row * stride_dn + first * stride_dt + own * stride_dh
    beta = tl.load(beta_ptr + at, mask=present, other=0.0)
    weights = tl.zeros([C, C], tl.float32)
    solves = tl.zeros([C, C], tl.float32)
    d_beta = tl.zeros([C], tl.float32)
    for tile in range(0, V, COLUMNS):
        columns = tile + tl.arange(0, COLUMNS)
        kept = present[:, None] & (columns < V)[None, :]
        dense = tokens * V + (i * (HV * V))[:, None] + columns[None, :]
        do = tl.load(do_ptr + (i * stride_dt)[:, None] + columns[None, :], mask=kept, other=0.0)
        new = tl.load(new_ptr + dense, mask=kept, other=0.0)  # [C, COLUMNS]
        dx = tl.load(dx_ptr + dense, mask=kept, other=0.0)  # [C, COLUMNS]
        v = tl.load(v_ptr + (i * stride_vt)[:, None] + columns[None, :], mask=kept, other=0.0)
        weights = tl.dot(do, tl.trans(new), weights, input_precision=PRECISION)
        solves = tl.dot(dx, tl.trans(new), solves, input_precision=PRECISION)
        d_beta += tl.sum(dx.to(tl.float32) * v, axis=1)
        tl.store(dv_ptr + dense, (beta[:, None] * dx).to(dx.dtype), mask=kept)

    mask = present[:, None] & (rows < K)[None, :]
    k = tl.load(k_ptr + (i * stride_kt)[:, None] + rows[None, :], mask=mask, other=0.0)  # [C, ROWS]
    below = i[:, None] > i[None, :]
    square = products_ptr + place * (2 * C * C) + i[:, None] * C + i[None, :]
    if GATED:
        q = tl.load(q_ptr + (i * stride_qt)[:, None] + rows[None, :], mask=mask, other=0.0)  # [C, ROWS]
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        total, rest, _, _, _ = decays(log_decay_ptr, at, present)
        power = (total[:, None] - total[None, :]) + (rest[:, None] - rest[None, :])
        # 0 but below the diagonal: no decay lies between a token and itself, and it would drown the others.
        within = tl.exp2(tl.where(below, power, float("-inf")))
        solves *= within
        same = tl.where(i[:, None] == i[None, :], weights, 0.0)
        weights *= within
        passed = weights * scores
        weights += same
    else:
        weights = tl.where(below | (i[:, None] == i[None, :]), weights, 0.0)
        solves = tl.where(below, solves, 0.0)
    weights *= scale
    tl.store(square, weights.to(products_ptr.dtype.element_ty))
    tl.store(square + C * C, (solves * -beta[:, None]).to(products_ptr.dtype.element_ty))
    solves *= tl.dot(k, tl.trans(k), input_precision=PRECISION)
    tl.store(pair_sums_ptr + at, d_beta - tl.sum(solves, axis=1), mask=present)
    if GATED:
        # Both tokens of a pair get the same number, which cancels in all sums over both.
        passed = passed * scale - solves * beta[:, None]
        d_total = tl.sum(passed, axis=1) - tl.sum(passed, axis=0)
        tl.store(pair_sums_ptr + sums_stride.to(tl.int64) + at, d_total, mask=present)


@triton.jit
def _against_state(
    x_at, states_at, stride, i, rows, present, in_k,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The products of tokens with a state.  Shapes:  x: [C, V];  state: [V, K];  out: [C, ROWS]"""
    found = tl.zeros([C, ROWS], tl.float32)
    for tile in range(0, V, COLUMNS):
        columns = tile + tl.arange(0, COLUMNS)
        in_v = columns < V
        x = tl.load(
            x_at + (i * stride)[:, None] + columns[None, :], mask=present[:, None] & in_v[None, :], other=0.0
        )
        state_at = states_at + columns[:, None] * K + rows[None, :]
        state = tl.load(state_at, mask=in_v[:, None] & in_k, other=0.0)  # [COLUMNS, ROWS]
        found = tl.dot(x, state, found, input_precision=PRECISION)
    return found


@triton.jit
def _against_gradient(
    x_at, states_at, d_states_at, stride, i, rows, present, in_k,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GATED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The products of tokens with the gradient of a state, and where it fades that of the state before with it, a number."""
    found = tl.zeros([C, ROWS], tl.float32)
    product = tl.zeros([COLUMNS], tl.float32)
    for tile in range(0, V, COLUMNS):
        columns = tile + tl.arange(0, COLUMNS)
        in_v = columns < V
        state_mask = in_v[:, None] & in_k
        state_offsets = columns[:, None] * K + rows[None, :]
        x = tl.load(
            x_at + (i * stride)[:, None] + columns[None, :], mask=present[:, None] & in_v[None, :], other=0.0
        )
        d_state = tl.load(d_states_at + state_offsets, mask=state_mask, other=0.0)  # [COLUMNS, ROWS]
        if GATED:
            state = tl.load(states_at + state_offsets, mask=state_mask, other=0.0)  # [COLUMNS, ROWS]
            product += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), axis=1)
        found = tl.dot(x, d_state, found, input_precision=PRECISION)
    return found, tl.sum(product, axis=0)


@triton.jit(do_not_specialize=NUMBERS)
def _gated_delta_rule_bwd_token_kernel(
    q_ptr, k_ptr, do_ptr, gates_ptr, dx_ptr, new_ptr, products_ptr, states_ptr, d_states_ptr, initial_ptr, last_ptr,
    rest_ptr, d_final_ptr, routes_ptr, dq_ptr, dk_ptr, tile_sums_ptr, passed_ptr, table_ptr, cu_seqlens_ptr,
    stride_qn, stride_qt: tl.constexpr, stride_qh,
    stride_kn, stride_kt: tl.constexpr, stride_kh,
    stride_dn, stride_dt: tl.constexpr, stride_dh,
    sums_stride, T, H: tl.constexpr, per_sequence, has_initial, has_d_final, scale,
    K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    GATED: tl.constexpr, ROUTED: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS channels of one chunk of one key head.

    Shapes:  products: [chunks, HV, 2, C, C], R and M;  gates: [chunks, HV, 3, C];  states, d_states: [chunks, HV, V, K]
             initial, last, d_final: [N, HV, V, K];  rest: [N, C, HV, V]
             tile_sums: [tiles, 3, B, T, HV], over the channels of a tile: for beta, for the sums of log-decays, of what a token
             leaves to the state but for a route
             passed: [chunks, HV, tiles], of a chunk;  routes: [chunks, HV], with ROUTED
    """
    TILES: tl.constexpr = (K + ROWS - 1) // ROWS
    HV: tl.constexpr = H * GROUP
    HALF: tl.constexpr = new_ptr.dtype.element_ty != tl.float32
    tile = tl.program_id(0) % TILES
    head = (tl.program_id(0) // TILES) % H
    chunk = tl.program_id(0) // (TILES * H)
    n, j, begin, length = find_sequence(chunk, table_ptr, cu_seqlens_ptr, T, per_sequence, VARLEN)
    # An empty sequence has a chunk as well, without a token.
    if (n < 0) | (j * C >= length):
        return

    row = n.to(tl.int64) if not VARLEN else tl.zeros((), tl.int64)
    first = begin + j * C
    ends = (j + 1) * C >= length
    i = tl.arange(0, C)
    rows = tile * ROWS + tl.arange(0, ROWS)
    in_k = (rows < K)[None, :]
    present = i < length - j * C
    mask = present[:, None] & in_k
    q_at = q_ptr + row * stride_qn + first * stride_qt + head.to(tl.int64) * stride_qh
    k_at = k_ptr + row * stride_kn + first * stride_kt + head.to(tl.int64) * stride_kh
    q_at += (i * stride_qt)[:, None] + rows[None, :]
    k_at += (i * stride_kt)[:, None] + rows[None, :]
    own_key = ((row * T + first) * H + head) * K + (i * (H * K))[:, None] + rows[None, :]
    turned = i[:, None] + i[None, :] * C
    square = i[:, None] * C + i[None, :]

    dq = tl.zeros([C, ROWS], tl.float32)
    dk = tl.zeros([C, ROWS], tl.float32)
    for member in range(GROUP):
        own = (head * GROUP + member).to(tl.int64)
        place = chunk.to(tl.int64) * HV + own
        tokens = (row * T + first) * HV + own
        states_at = states_ptr + place * (K * V)
        gates_at = gates_ptr + place * (3 * C) + i
        products_at = products_ptr + place * (2 * C * C)
        beta = tl.load(gates_at)
        do_at = do_ptr + row * stride_dn + first * stride_dt + own * stride_dh

        # What queries read. Loaded ahead of a loop is what its end wants, as far as there are registers.
        q = tl.load(q_at, mask=mask, other=0.0)  # [C, ROWS]
        k = tl.load(k_at, mask=mask, other=0.0)  # [C, ROWS]
        weights = tl.load(products_at + square)  # [C, C]
        found = _against_state(
            do_at, states_at, stride_dt, i, rows, present, in_k, K, V, C, ROWS, COLUMNS, PRECISION
        )
        found *= scale
        if GATED:
            seen = tl.load(gates_at + C)
            found *= seen[:, None]
            d_total = tl.sum(q * found, axis=1)
        dq = tl.dot(weights, k, dq + found, input_precision=PRECISION)
        if GROUP == 1:
            # Its registers are wanted for what follows.
            tl.store(dq_ptr + own_key, dq.to(dq_ptr.dtype.element_ty), mask=mask)

        # What keys read, to be overwritten.
        solves = tl.load(products_at + C * C + square)  # [C, C]
        found = _against_state(
            dx_ptr + tokens * V, states_at, HV * V, i, rows, present, in_k, K, V, C, ROWS, COLUMNS, PRECISION
        )
        if GATED:
            found *= seen[:, None]
        d_beta = -tl.sum(k * found, axis=1)
        dk -= found * beta[:, None]
        dk = tl.dot(solves, k, dk, input_precision=PRECISION)
        # Not to be merged: what the next part loads again would otherwise stay in registers.
        tl.debug_barrier()

        # What keys leave for later tokens and for the state.
        found, product = _against_gradient(
            new_ptr + tokens * V, states_at, d_states_ptr + place * (K * V), HV * V, i, rows, present, in_k,
            K, V, C, ROWS, COLUMNS, GATED, PRECISION,
        )  # fmt: skip
        k = tl.load(k_at, mask=mask, other=0.0)  # [C, ROWS]
        q = tl.load(q_at, mask=mask, other=0.0)  # [C, ROWS]
        solves = tl.load(products_at + C * C + turned)  # [C, C]
        weights = tl.load(products_at + turned)  # [C, C]
        if GATED:
            found *= tl.load(gates_at + 2 * C)[:, None]
            per_token = tl.sum(k * found, axis=1)
        if ROUTED:
            found *= tl.load(routes_ptr + place)
        dk += found
        dk = tl.dot(solves, k, dk, input_precision=PRECISION)
        dk = tl.dot(weights, q, dk, input_precision=PRECISION)
        if GROUP == 1:
            tl.store(dk_ptr + own_key, dk.to(dk_ptr.dtype.element_ty), mask=mask)

        sums_at = tile_sums_ptr + tile.to(tl.int64) * 3 * sums_stride + tokens + i * HV
        tl.store(sums_at, d_beta, mask=present)
        if GATED:
            tl.store(sums_at + sums_stride, d_total + d_beta * beta, mask=present)
            given = (n.to(tl.int64) * HV + own) * (K * V)
            if HALF & ends & (has_d_final != 0):
                k = tl.load(k_at, mask=mask, other=0.0)  # [C, ROWS]
                left = tl.load(gates_at + 2 * C)
                per_token += left * _rest_of_last(
                    k, new_ptr + tokens * V, rest_ptr + n.to(tl.int64) * (C * HV * V) + own * V, d_final_ptr + given,
                    HV * V, i, rows, present, in_k, K, V, C, ROWS, COLUMNS, PRECISION,
                )  # fmt: skip
            tl.store(sums_at + 2 * sums_stride, per_token, mask=present)
            if (j == 0) | ends:
                # Known in full.
                product = _product_with_gradient(
                    states_ptr, d_states_ptr, initial_ptr, last_ptr, d_final_ptr, place, given, j, ends, has_initial,
                    has_d_final, rows, in_k, K, V, ROWS, COLUMNS,
                )  # fmt: skip
            tl.store(passed_ptr + place * TILES + tile, product)
    if GROUP > 1:
        tl.store(dq_ptr + own_key, dq.to(dq_ptr.dtype.element_ty), mask=mask)
        tl.store(dk_ptr + own_key, dk.to(dk_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=NUMBERS)
def _gated_delta_rule_bwd_gate_kernel(
    pair_sums_ptr, tile_sums_ptr, passed_ptr, gates_ptr, routes_ptr, d_log_decay_ptr, d_beta_ptr, d_routes_ptr,
    table_ptr, cu_seqlens_ptr,
    sums_stride, T, per_sequence,
    HV: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr, C: tl.constexpr,
    GATED: tl.constexpr, ROUTED: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """The gradients of the log-decays, of beta and with ROUTED of the routes, of one chunk of HEADS value heads.

    Shapes:  pair_sums: [2, B, T, HV];  tile_sums: [tiles, 3, B, T, HV];  passed: [chunks, HV, tiles];  gates: [chunks, HV, 3, C]
             routes, d_routes: [chunks, HV]
    """
    BLOCKS: tl.constexpr = (HV + HEADS - 1) // HEADS
    chunk = tl.program_id(0) // BLOCKS
    n, j, begin, length = find_sequence(chunk, table_ptr, cu_seqlens_ptr, T, per_sequence, VARLEN)
    # An empty sequence has a chunk as well, without a token.
    if (n < 0) | (j * C >= length):
        return

    row = n.to(tl.int64) if not VARLEN else tl.zeros((), tl.int64)
    i = tl.arange(0, C)
    heads = (tl.program_id(0) % BLOCKS) * HEADS + tl.arange(0, HEADS)
    in_h = heads < HV
    mask = (i < length - j * C)[:, None] & in_h[None, :]
    at = (row * T + begin + j * C) * HV + (i * HV)[:, None] + heads[None, :]
    place = chunk.to(tl.int64) * HV + heads
    stride = sums_stride.to(tl.int64)
    d_beta = tl.load(pair_sums_ptr + at, mask=mask, other=0.0)  # [C, HEADS]
    # In float64, as were the sums of log-decays: what passes through a strong decay is the rest of a difference.
    if GATED:
        d_total = tl.load(pair_sums_ptr + stride + at, mask=mask, other=0.0).to(tl.float64)
        written = tl.zeros([C, HEADS], tl.float64)
        product = tl.zeros([HEADS], tl.float32)
    for tile in tl.static_range(TILES):
        sums_at = tile_sums_ptr + 3 * tile * stride + at
        d_beta += tl.load(sums_at, mask=mask, other=0.0)
        if GATED:
            d_total += tl.load(sums_at + stride, mask=mask, other=0.0)
            written += tl.load(sums_at + 2 * stride, mask=mask, other=0.0)
            product += tl.load(passed_ptr + place * TILES + tile, mask=in_h, other=0.0)
    tl.store(d_beta_ptr + at, d_beta, mask=mask)
    if GATED:
        if ROUTED:
            tl.store(d_routes_ptr + place, tl.sum(written, axis=0).to(tl.float32), mask=in_h)
            written *= tl.load(routes_ptr + place, mask=in_h, other=0.0)[None, :]
        over = tl.load(gates_ptr + place * (3 * C) + 2 * C - 1, mask=in_h, other=0.0)
        d_rate = tl.cumsum(d_total - written, axis=0, reverse=True) + tl.sum(written, axis=0)[None, :]
        d_rate += (over * product)[None, :]
        tl.store(d_log_decay_ptr + at, d_rate.to(tl.float32), mask=mask)
