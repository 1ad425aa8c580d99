# mypy: ignore-errors
"""The backward kernels of gated_delta_rule and delta_rule; letters as in `_gated_delta_rule_fwd`.

    state      dn = Pᵀ dO + left (K dS'),   dx = Tᵀ dn,   dS = over dS' + scale (seen Q)ᵀ dO - (beta seen K)ᵀ dx
    gradient   all else, chunk by chunk, from dx and dS' and from what the forward pass kept: S and n

The first kernel walks over a sequence from its end, with the chain K dS', Tᵀ dn, Kᵀ dx, and holds the gradient of the state
transposed, as the forward kernel does the state. The second, with R = scale D (dO nᵀ) up to the diagonal and
M = -beta D (dx nᵀ) below it:

    dq = scale seen (dO Sᵀ) + R K
    dk = left (n dS'ᵀ) - beta seen (dx Sᵀ) + Rᵀ Q + (M + Mᵀ) K
    dv = beta dx,   dbeta = Σ dx (v - seen K S) - Σ D (dx nᵀ) (K Kᵀ)

The gradient of a log-decay sums up, from its token to the end of the chunk, what each decay of the forward pass passes back.
Transposes of products are products of their own: Triton before 3.7.1 gets a transposed accumulator wrong on Hopper.

Bytes for a token and head, K = V = 128, C = 64, bfloat16: state reads q, k, dO, T, P and writes dx, dS (1808); gradient
reads q, k, v, dO, dx, n, S, dS and writes dq, dk, dv (3328). Products: 2 (3 K V + 2 C V) and 2 (3 K V + C (4 V + 5 K)).
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels._gated_delta_rule_fwd import LENGTHS, decay_from_column, decay_from_row, decays
from heddle.kernels.common.jit import find_sequence


@triton.jit(do_not_specialize=LENGTHS)
def _gated_delta_rule_bwd_state_kernel(
    q_ptr, k_ptr, do_ptr, pairs_ptr, gates_ptr, d_final_ptr, dx_ptr, d_initial_ptr, d_states_ptr,
    summary_ptr, ends_ptr, table_ptr, offsets_ptr, cu_seqlens_ptr,
    stride_qn, stride_qt, stride_qh,
    stride_kn, stride_kt, stride_kh,
    stride_dn, stride_dt, stride_dh,
    T, H, per_sequence, segments_per_sequence, segment_size, has_d_final, scale,
    K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    GATED: tl.constexpr, VARLEN: tl.constexpr, SEGMENTED: tl.constexpr, SUMMARY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dx of one segment, the gradient of the state after each chunk, and that of the initial state where a sequence begins.

    With SUMMARY only the gradient of the state before the segment, of its own outputs.

    Shapes:  dx: [B, T, HV, V];  d_states: [chunks, HV, V, K];  ends, summary: [segments, HV, V, K]
    """
    TILES: tl.constexpr = (V + COLUMNS - 1) // COLUMNS
    HV = H * GROUP
    tile = tl.program_id(0) % TILES
    head = (tl.program_id(0) // TILES) % HV
    segment = tl.program_id(0) // (TILES * HV)
    n, j, begin, whole = find_sequence(segment, table_ptr, cu_seqlens_ptr, T, segments_per_sequence, VARLEN)
    # Nothing comes before the first segment of a sequence.
    if (n < 0) | (SUMMARY & (j == 0)):
        return

    row = n.to(tl.int64) if not VARLEN else tl.zeros((), tl.int64)
    place = tl.load(offsets_ptr + n).to(tl.int64) if VARLEN else row * per_sequence
    place = (place + j * (segment_size // C)) * HV + head
    begin += j * segment_size
    length = tl.minimum(whole - j * segment_size, segment_size)
    chunks = (length + C - 1) // C
    last = begin + tl.maximum(chunks - 1, 0) * C
    place += tl.maximum(chunks - 1, 0).to(tl.int64) * HV
    i = tl.arange(0, C)
    rows = tl.arange(0, ROWS)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    q_ptr += row * stride_qn + last * stride_qt + (head // GROUP).to(tl.int64) * stride_qh
    k_ptr += row * stride_kn + last * stride_kt + (head // GROUP).to(tl.int64) * stride_kh
    do_ptr += row * stride_dn + last * stride_dt + head.to(tl.int64) * stride_dh
    dx_ptr += (row * T + last) * (HV * V) + head.to(tl.int64) * V
    q_offsets = (i * stride_qt)[:, None] + rows[None, :]
    k_offsets = (i * stride_kt)[:, None] + rows[None, :]
    do_offsets = columns[:, None] + (i * stride_dt)[None, :]
    dx_offsets = columns[:, None] + (i * (HV * V))[None, :]
    square = i[:, None] * C + i[None, :]
    in_k = (rows < K)[None, :]
    in_v = (columns < V)[:, None]

    state_mask = in_v & in_k
    own_state = (n.to(tl.int64) * HV + head) * (K * V) + columns[:, None] + (rows * V)[None, :]
    state_offsets = columns[:, None] * K + rows[None, :]
    own_segment = (segment.to(tl.int64) * HV + head) * (K * V) + state_offsets
    if SUMMARY:
        d_state = tl.zeros([COLUMNS, ROWS], tl.float32)
    elif SEGMENTED:
        d_state = tl.load(ends_ptr + own_segment, mask=state_mask, other=0.0)
    else:
        d_state = tl.load(d_final_ptr + own_state, mask=state_mask & (has_d_final != 0), other=0.0)
    over = 1.0
    if GATED:
        # One chunk ahead: nothing hides the latency of a scalar.
        over = tl.load(gates_ptr + place * (3 * C) + 2 * C - 1, mask=chunks > 0, other=1.0)
    for index in range(0, chunks):
        present = i < length - (chunks - 1 - index) * C
        narrow = present[:, None] if K == ROWS else present[:, None] & in_k
        kept = in_v & present[None, :]
        q = tl.load(q_ptr + q_offsets, mask=narrow, other=0.0)  # [C, ROWS]
        k = tl.load(k_ptr + k_offsets, mask=narrow, other=0.0)  # [C, ROWS]
        do = tl.load(do_ptr + do_offsets, mask=kept, other=0.0)  # [COLUMNS, C]
        pairs_at = pairs_ptr + place * (2 * C * C) + square
        solved = tl.load(pairs_at)  # [C, C]
        attention = tl.load(pairs_at + C * C)  # [C, C]
        gates_at = gates_ptr + place * (3 * C) + i
        erasing = tl.load(gates_at)
        half = d_state.to(k.dtype)
        if not SUMMARY:
            tl.store(d_states_ptr + place * (K * V) + state_offsets, half, mask=state_mask)
        d_new = tl.dot(half, tl.trans(k), input_precision=PRECISION)  # [COLUMNS, C]
        if GATED:
            d_new *= tl.load(gates_at + 2 * C)[None, :]
            seen = tl.load(gates_at + C)
            erasing *= seen
            read = (do * (seen * scale)[None, :]).to(k.dtype)
            d_state *= over
            ahead = gates_ptr + (place - HV) * (3 * C) + 2 * C - 1
            over = tl.load(ahead, mask=index + 1 < chunks, other=1.0)
        else:
            read = (do * scale).to(k.dtype)
        d_new = tl.dot(do, attention, d_new, input_precision=PRECISION)
        dx = tl.dot(d_new.to(k.dtype), solved, d_new, input_precision=PRECISION)  # [COLUMNS, C]
        if not SUMMARY:
            tl.store(dx_ptr + dx_offsets, dx.to(k.dtype), mask=kept)
        d_state = tl.dot(read, q, d_state, input_precision=PRECISION)
        d_state = tl.dot((dx * -erasing[None, :]).to(k.dtype), k, d_state, input_precision=PRECISION)
        q_ptr -= C * stride_qt
        k_ptr -= C * stride_kt
        do_ptr -= C * stride_dt
        dx_ptr -= C * HV * V
        place -= HV
    if SUMMARY:
        tl.store(summary_ptr + own_segment, d_state, mask=state_mask)
    elif j == 0:
        tl.store(d_initial_ptr + own_state, d_state, mask=state_mask)


@triton.jit
def _query_gradient(
    q_at, k_at, do_ptr, log_decay_ptr, new_ptr, states_ptr, dq_ptr, d_log_decay_ptr,
    stride_dn, stride_dt, stride_dh, T, scale, own_key,
    row, first, chunk, head, i, rows, present, in_k, mask, HV,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, GATED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores dq of a chunk, and in d_log_decay for each token what dq passes back to the sums of log-decays."""
    lower = i[:, None] >= i[None, :]
    q = tl.load(q_at, mask=mask, other=0.0)  # [C, ROWS]
    k = tl.load(k_at, mask=mask, other=0.0)  # [C, ROWS]
    dq = tl.zeros([C, ROWS], tl.float32)
    for member in range(GROUP):
        own = head * GROUP + member
        at = (row * T + first + i) * HV + own
        place = chunk.to(tl.int64) * HV + own
        do_at = do_ptr + row * stride_dn + first * stride_dt + own.to(tl.int64) * stride_dh
        dense = (row * T + first + i).to(tl.int64)[:, None] * (HV * V) + own * V
        weights = tl.zeros([C, C], tl.float32)
        read = tl.zeros([C, ROWS], tl.float32)
        for tile in range(0, V, COLUMNS):
            columns = tile + tl.arange(0, COLUMNS)
            kept = present[:, None] & (columns < V)[None, :]
            state_at = states_ptr + place * (K * V) + columns[:, None] * K + rows[None, :]
            do = tl.load(do_at + (i * stride_dt)[:, None] + columns[None, :], mask=kept, other=0.0)
            state = tl.load(state_at, mask=(columns < V)[:, None] & in_k, other=0.0)  # [COLUMNS, ROWS]
            new = tl.load(new_ptr + dense + columns[None, :], mask=kept, other=0.0)  # [C, COLUMNS]
            read = tl.dot(do, state, read, input_precision=PRECISION)
            weights = tl.dot(do, tl.trans(new), weights, input_precision=PRECISION)
        if GATED:
            total, rest, seen, _, _ = decays(log_decay_ptr, at, present)
            read *= (seen * scale)[:, None]
            weights *= decay_from_column(total, rest, lower) * scale
            # No decay lies between a token and itself, and it would drown the others.
            passed = weights * tl.dot(q, tl.trans(k), input_precision=PRECISION)
            passed = tl.where(i[:, None] > i[None, :], passed, 0.0)
            d_total = tl.sum(q * read, axis=1) + tl.sum(passed, axis=1) - tl.sum(passed, axis=0)
            # For the second loop.
            tl.store(d_log_decay_ptr + at, d_total, mask=present)
        else:
            read *= scale
            weights = tl.where(lower, weights * scale, 0.0)
        dq = tl.dot(weights.to(k.dtype), k, dq + read, input_precision=PRECISION)
    tl.store(dq_ptr + own_key, dq.to(q.dtype), mask=mask)


@triton.jit
def _product_with_gradient(
    states_ptr, d_states_ptr, initial_ptr, last_ptr, d_final_ptr, place, given, j, ends, has_initial, has_d_final,
    rows, in_k,
    K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The product of the state before a chunk with the gradient of that after it, in full where they are known."""
    product = tl.zeros([COLUMNS, ROWS], tl.float32)
    for tile in range(0, V, COLUMNS):
        columns = tile + tl.arange(0, COLUMNS)
        state_mask = (columns < V)[:, None] & in_k
        offsets = columns[:, None] * K + rows[None, :]
        own_state = place * (K * V) + offsets
        if j == 0:
            state = tl.load(initial_ptr + given + offsets, mask=state_mask & (has_initial != 0), other=0.0)
        elif ends:
            state = tl.load(last_ptr + given + offsets, mask=state_mask, other=0.0)
        else:
            state = tl.load(states_ptr + own_state, mask=state_mask, other=0.0).to(tl.float32)
        if ends:
            d_state = tl.load(d_final_ptr + given + offsets, mask=state_mask & (has_d_final != 0), other=0.0)
        else:
            d_state = tl.load(d_states_ptr + own_state, mask=state_mask, other=0.0).to(tl.float32)
        product += state * d_state
    return tl.sum(tl.sum(product, axis=1), axis=0)


@triton.jit
def _rest_of_last(
    k, x_at, rest_at, d_final_at, stride, i, rows, present, in_k,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the log-decays of the last chunk get of what rounding takes from x and from the gradient of the final state, with kxᵀ.

    Shapes:  k: [C, ROWS];  x, rest: [C, V];  d_final: [V, K], float32;  out: [C]
    """
    found = tl.zeros([C, ROWS], tl.float32)
    for tile in range(0, V, COLUMNS):
        columns = tile + tl.arange(0, COLUMNS)
        kept = present[:, None] & (columns < V)[None, :]
        state_mask = (columns < V)[:, None] & in_k
        x = tl.load(x_at + (i * stride)[:, None] + columns[None, :], mask=kept, other=0.0)
        whole = tl.load(d_final_at + columns[:, None] * K + rows[None, :], mask=state_mask, other=0.0)
        found = tl.dot(x, (whole - whole.to(x.dtype)).to(x.dtype), found, input_precision=PRECISION)
    # In one loop both products would spill registers.
    for tile in range(0, V, COLUMNS):
        columns = tile + tl.arange(0, COLUMNS)
        kept = present[:, None] & (columns < V)[None, :]
        state_mask = (columns < V)[:, None] & in_k
        rest = tl.load(rest_at + (i * stride)[:, None] + columns[None, :], mask=kept, other=0.0)
        whole = tl.load(d_final_at + columns[:, None] * K + rows[None, :], mask=state_mask, other=0.0)
        found = tl.dot(rest, whole.to(rest.dtype), found, input_precision=PRECISION)
    return tl.sum(k * found, axis=1)


@triton.jit
def _key_gradient(
    q_at, k_at, v_ptr, do_ptr, log_decay_ptr, beta_ptr, new_ptr, states_ptr, d_states_ptr, initial_ptr, last_ptr,
    rest_ptr, d_final_ptr, routes_ptr, dk_ptr, dv_ptr, d_log_decay_ptr, d_beta_ptr, d_routes_ptr,
    stride_vn, stride_vt, stride_vh, stride_dn, stride_dt, stride_dh, T, scale, own_key,
    n, j, length, has_initial, has_d_final,
    row, first, chunk, head, i, rows, present, in_k, mask, HV,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, GATED: tl.constexpr, ROUTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores dk, dv, d_beta and d_log_decay of a chunk, and where it has a route that one's gradient.

    Each part has loops of its own over V: with the accumulators of all, registers would not do.
    """
    HALF: tl.constexpr = new_ptr.dtype.element_ty != tl.float32
    lower = i[:, None] >= i[None, :]
    upper = i[:, None] <= i[None, :]
    ends = (j + 1) * C >= length
    dk = tl.zeros([C, ROWS], tl.float32)
    for member in range(GROUP):
        own = head * GROUP + member
        at = (row * T + first + i) * HV + own
        place = chunk.to(tl.int64) * HV + own
        beta = tl.load(beta_ptr + at, mask=present, other=0.0)
        v_at = v_ptr + row * stride_vn + first * stride_vt + own.to(tl.int64) * stride_vh
        do_at = do_ptr + row * stride_dn + first * stride_dt + own.to(tl.int64) * stride_dh
        dense = (row * T + first + i).to(tl.int64)[:, None] * (HV * V) + own * V
        if GATED:
            total, rest, seen, left, over = decays(log_decay_ptr, at, present)

        erased = tl.zeros([C, ROWS], tl.float32)
        for tile in range(0, V, COLUMNS):
            columns = tile + tl.arange(0, COLUMNS)
            kept = present[:, None] & (columns < V)[None, :]
            state_at = states_ptr + place * (K * V) + columns[:, None] * K + rows[None, :]
            dx = tl.load(dv_ptr + dense + columns[None, :], mask=kept, other=0.0)  # [C, COLUMNS]
            state = tl.load(state_at, mask=(columns < V)[:, None] & in_k, other=0.0)  # [COLUMNS, ROWS]
            erased = tl.dot(dx, state, erased, input_precision=PRECISION)
        k = tl.load(k_at, mask=mask, other=0.0)  # [C, ROWS]
        if GATED:
            erased *= seen[:, None]
        read_back = tl.sum(k * erased, axis=1)
        dk -= erased * beta[:, None]

        solves = tl.zeros([C, C], tl.float32)
        solves_t = tl.zeros([C, C], tl.float32)
        d_beta = -read_back
        for tile in range(0, V, COLUMNS):
            columns = tile + tl.arange(0, COLUMNS)
            kept = present[:, None] & (columns < V)[None, :]
            dx = tl.load(dv_ptr + dense + columns[None, :], mask=kept, other=0.0)  # [C, COLUMNS]
            new = tl.load(new_ptr + dense + columns[None, :], mask=kept, other=0.0)  # [C, COLUMNS]
            v = tl.load(v_at + (i * stride_vt)[:, None] + columns[None, :], mask=kept, other=0.0)
            solves = tl.dot(dx, tl.trans(new), solves, input_precision=PRECISION)
            solves_t = tl.dot(new, tl.trans(dx), solves_t, input_precision=PRECISION)
            d_beta += tl.sum(dx.to(tl.float32) * v, axis=1)
            tl.store(dv_ptr + dense + columns[None, :], (beta[:, None] * dx).to(dx.dtype), mask=kept)
        if GATED:
            solves *= decay_from_column(total, rest, lower)
            solves_t *= decay_from_row(total, rest, upper)
        solves = tl.where(i[:, None] > i[None, :], solves, 0.0)
        both = solves * -beta[:, None] - tl.where(i[:, None] < i[None, :], solves_t, 0.0) * beta[None, :]
        k = tl.load(k_at, mask=mask, other=0.0)  # [C, ROWS]
        dk = tl.dot(both.to(k.dtype), k, dk, input_precision=PRECISION)
        solves *= tl.dot(k, tl.trans(k), input_precision=PRECISION)
        tl.store(d_beta_ptr + at, d_beta - tl.sum(solves, axis=1), mask=present)
        if GATED:
            solves *= beta[:, None]
            d_total = tl.load(d_log_decay_ptr + at, mask=present, other=0.0)
            d_total -= read_back * beta + tl.sum(solves, axis=1) - tl.sum(solves, axis=0)

        written = tl.zeros([C, ROWS], tl.float32)
        for tile in range(0, V, COLUMNS):
            columns = tile + tl.arange(0, COLUMNS)
            kept = present[:, None] & (columns < V)[None, :]
            state_at = d_states_ptr + place * (K * V) + columns[:, None] * K + rows[None, :]
            new = tl.load(new_ptr + dense + columns[None, :], mask=kept, other=0.0)  # [C, COLUMNS]
            d_state = tl.load(state_at, mask=(columns < V)[:, None] & in_k, other=0.0)  # [COLUMNS, ROWS]
            written = tl.dot(new, d_state, written, input_precision=PRECISION)
        if GATED:
            given = (n.to(tl.int64) * HV + own) * (K * V)
            k = tl.load(k_at, mask=mask, other=0.0)  # [C, ROWS]
            written *= left[:, None]
            per_token = tl.sum(k * written, axis=1)
            if HALF & ends & (has_d_final != 0):
                new_at = new_ptr + (row * T + first).to(tl.int64) * (HV * V) + own * V
                rest_at = rest_ptr + n.to(tl.int64) * (C * HV * V) + own * V
                per_token += left * _rest_of_last(
                    k, new_at, rest_at, d_final_ptr + given, HV * V, i, rows, present, in_k,
                    K, V, C, ROWS, COLUMNS, PRECISION,
                )  # fmt: skip
            # In float64, as were the sums of log-decays: what passes through a strong decay is the rest of a difference.
            per_token = per_token.to(tl.float64)
            of_all = tl.sum(per_token, axis=0)
            if ROUTED:
                tl.store(d_routes_ptr + place, of_all.to(tl.float32))
                route = tl.load(routes_ptr + place)
                written *= route
                per_token *= route
                of_all *= route
            d_rate = tl.cumsum(d_total.to(tl.float64) - per_token, axis=0, reverse=True) + of_all
        dk += written

        weights_t = tl.zeros([C, C], tl.float32)
        for tile in range(0, V, COLUMNS):
            columns = tile + tl.arange(0, COLUMNS)
            kept = present[:, None] & (columns < V)[None, :]
            new = tl.load(new_ptr + dense + columns[None, :], mask=kept, other=0.0)  # [C, COLUMNS]
            do = tl.load(do_at + (i * stride_dt)[:, None] + columns[None, :], mask=kept, other=0.0)
            weights_t = tl.dot(new, tl.trans(do), weights_t, input_precision=PRECISION)
        if GATED:
            weights_t *= decay_from_row(total, rest, upper) * scale
        else:
            weights_t = tl.where(upper, weights_t * scale, 0.0)
        q = tl.load(q_at, mask=mask, other=0.0)  # [C, ROWS]
        dk = tl.dot(weights_t.to(q.dtype), q, dk, input_precision=PRECISION)

        if GATED:
            product = _product_with_gradient(
                states_ptr, d_states_ptr, initial_ptr, last_ptr, d_final_ptr, place, given, j, ends, has_initial,
                has_d_final, rows, in_k, K, V, ROWS, COLUMNS,
            )  # fmt: skip
            d_rate += over * product
            tl.store(d_log_decay_ptr + at, d_rate.to(tl.float32), mask=present)
    tl.store(dk_ptr + own_key, dk.to(dk_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=LENGTHS)
def _gated_delta_rule_bwd_gradient_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, log_decay_ptr, beta_ptr, new_ptr, states_ptr, d_states_ptr, initial_ptr, last_ptr, rest_ptr,
    d_final_ptr, routes_ptr, dq_ptr, dk_ptr, dv_ptr, d_log_decay_ptr, d_beta_ptr, d_routes_ptr, table_ptr, cu_seqlens_ptr,
    stride_qn, stride_qt, stride_qh,
    stride_kn, stride_kt, stride_kh,
    stride_vn, stride_vt, stride_vh,
    stride_dn, stride_dt, stride_dh,
    T, H, per_sequence, has_initial, has_d_final, scale,
    K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    GATED: tl.constexpr, ROUTED: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk and key head: first dq, then the others. `dv` holds dx and gets beta dx.

    Shapes:  initial, last, d_final: [N, HV, V, K];  rest: [N, C, HV, V];  routes, d_routes: [chunks, HV], with ROUTED
    """
    head = tl.program_id(0) % H
    chunk = tl.program_id(0) // H
    n, j, begin, length = find_sequence(chunk, table_ptr, cu_seqlens_ptr, T, per_sequence, VARLEN)
    # An empty sequence has a chunk as well, without a token.
    if (n < 0) | (j * C >= length):
        return

    HV = H * GROUP
    row = n.to(tl.int64) if not VARLEN else tl.zeros((), tl.int64)
    first = begin + j * C
    i = tl.arange(0, C)
    rows = tl.arange(0, ROWS)
    in_k = (rows < K)[None, :]
    present = i < length - j * C
    mask = present[:, None] & in_k
    q_at = q_ptr + row * stride_qn + first * stride_qt + head.to(tl.int64) * stride_qh
    k_at = k_ptr + row * stride_kn + first * stride_kt + head.to(tl.int64) * stride_kh
    q_at += (i * stride_qt)[:, None] + rows[None, :]
    k_at += (i * stride_kt)[:, None] + rows[None, :]
    own_key = (row * T + first + i).to(tl.int64)[:, None] * (H * K) + head * K + rows[None, :]
    _query_gradient(
        q_at, k_at, do_ptr, log_decay_ptr, new_ptr, states_ptr, dq_ptr, d_log_decay_ptr,
        stride_dn, stride_dt, stride_dh, T, scale, own_key,
        row, first, chunk, head, i, rows, present, in_k, mask, HV, K, V, C, ROWS, COLUMNS, GROUP, GATED, PRECISION,
    )  # fmt: skip
    # What threads stored in d_log_decay, others load.
    tl.debug_barrier()
    _key_gradient(
        q_at, k_at, v_ptr, do_ptr, log_decay_ptr, beta_ptr, new_ptr, states_ptr, d_states_ptr, initial_ptr, last_ptr,
        rest_ptr, d_final_ptr, routes_ptr, dk_ptr, dv_ptr, d_log_decay_ptr, d_beta_ptr, d_routes_ptr,
        stride_vn, stride_vt, stride_vh, stride_dn, stride_dt, stride_dh, T, scale, own_key,
        n, j, length, has_initial, has_d_final,
        row, first, chunk, head, i, rows, present, in_k, mask, HV,
        K, V, C, ROWS, COLUMNS, GROUP, GATED, ROUTED, PRECISION,
    )  # fmt: skip
