# mypy: ignore-errors
"""The kernel of the gradients of gla, chunk by chunk; letters as in `_gla_fwd`.

From S, the state before a chunk, and dS', the gradient of that after it, with dP = dO vᵀ up to the diagonal:

    dq_i = scale (exp(G_i) (dO Sᵀ)_i + Σ_{j ≤ i} dP_ij k_j exp(G_i - G_j))
    dk_j = exp(G_C - G_j) (v dS'ᵀ)_j + scale Σ_{i ≥ j} dP_ij q_i exp(G_i - G_j)

The gradient of a sum of log-decays G_i is q_i dq_i - k_i dk_i, of G_C besides Σ_j of what k_j gets of dS', and
exp(G_C) Σ_v S dS'; a log-decay has the sum of those from its token to the end of the chunk. No decay lies between a token
and itself: what it gives itself joins dq and dk after that. dq and dk are made one after the other, each with a loop of its
own over V: with the accumulators of both, registers would not do.

Bytes for a token and head, K = V = 128, C = 64, bfloat16: reads q, k, v, dO, g, S, dS', writes dq, dk, dg (3584).
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels._gla_fwd import LENGTHS, REACH, decay_to_middle, sum_up
from heddle.kernels.common.jit import find_sequence


@triton.jit
def _query_gradient(
    q_at, k_at, v_ptr, do_ptr, log_decay_at, totals_at, states_ptr, dq_ptr,
    stride_vt, stride_vh, stride_dt, stride_dh, H, scale, own, place, i, rows, present, count, dense,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, PRECISE: tl.constexpr, HALVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores dq of a chunk; what it passes back to the sums of log-decays.  Shapes:  [C, ROWS]"""
    TILES: tl.constexpr = (V + COLUMNS - 1) // COLUMNS
    SUM: tl.constexpr = tl.float64 if PRECISE else tl.float32
    in_k = (rows < K)[None, :]
    mask = present[:, None] & in_k
    dq = tl.zeros([C, ROWS], tl.float32)
    weights = tl.zeros([C, C], tl.float32)
    for index in range(0, GROUP * TILES):
        member = own * GROUP + index // TILES
        columns = (index % TILES) * COLUMNS + tl.arange(0, COLUMNS)
        in_v = (columns < V)[None, :]
        kept = present[:, None] & in_v
        v_at = v_ptr + member * stride_vh + (i * stride_vt)[:, None] + columns[None, :]
        do_at = do_ptr + member * stride_dh + (i * stride_dt)[:, None] + columns[None, :]
        state_at = states_ptr + (place * GROUP + member - own * GROUP) * (K * V)
        state_at += rows[:, None] * V + columns[None, :]
        v = tl.load(v_at, mask=kept, other=0.0)  # [C, COLUMNS]
        do = tl.load(do_at, mask=kept, other=0.0)  # [C, COLUMNS]
        state = tl.load(state_at, mask=(rows < K)[:, None] & in_v, other=0.0)  # [ROWS, COLUMNS]
        dq = tl.dot(do, tl.trans(state), dq, input_precision=PRECISION)
        weights = tl.dot(do, tl.trans(v), weights, input_precision=PRECISION)
    q = tl.load(q_at, mask=mask, other=0.0)  # [C, ROWS]
    k = tl.load(k_at, mask=mask, other=0.0)  # [C, ROWS]
    weights *= scale
    same = tl.sum(tl.where(i[:, None] == i[None, :], weights, 0.0), axis=1)
    weights = tl.where(i[:, None] > i[None, :], weights, 0.0)
    total, middle, _end, reach = sum_up(log_decay_at, mask, i, C, PRECISE)
    # Products are of operands as they were rounded, so that what both tokens of a pair pass on cancels after them.
    if (reach <= REACH) & (not HALVED):
        since = tl.exp2((total - middle[None, :]).to(tl.float32))
        dq *= since * (tl.exp2(middle.to(tl.float32)) * scale)[None, :]
        earlier = (k * tl.exp2((middle[None, :] - total).to(tl.float32))).to(k.dtype)
        of_later = tl.dot(weights.to(k.dtype), earlier, input_precision=PRECISION)
        d_total = q.to(SUM) * dq + (q * since).to(q.dtype).to(SUM) * of_later
        dq += of_later * since
    else:
        tl.store(totals_at, total, mask=mask)
        tl.debug_barrier()
        dq *= tl.exp2(total.to(tl.float32)) * scale
        d_total = q.to(SUM) * dq
        for level in range(LEVELS):
            fading = decay_to_middle(
                totals_at - (i * (H * K))[:, None] - rows[None, :], total, i, count, H * K, rows, in_k, level
            )
            second = ((i >> level) & 1)[:, None] != 0
            pair = (i >> (level + 1))[:, None] == (i >> (level + 1))[None, :]
            earlier = tl.where(second, 0.0, k * fading).to(k.dtype)
            corner = tl.where(pair & second, weights, 0.0).to(k.dtype)
            of_later = tl.dot(corner, earlier, input_precision=PRECISION)
            d_total += (q * fading).to(q.dtype).to(SUM) * of_later
            dq += of_later * fading
    tl.store(dq_ptr + dense, (dq + same[:, None] * k).to(q.dtype), mask=mask)
    return d_total


@triton.jit
def _key_gradient(
    q_at, k_at, v_ptr, do_ptr, log_decay_at, totals_at, states_ptr, d_states_ptr, initial_ptr, d_final_ptr, dk_ptr,
    stride_vt, stride_vh, stride_dt, stride_dh, H, scale, own, place, n, opens, closes, i, rows, present, count, dense,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, PRECISE: tl.constexpr, HALVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores dk of a chunk; what it passes back to the sums of log-decays, and besides to the last.

    Shapes:  d_total: [C, ROWS];  at_end: [ROWS]
    """
    TILES: tl.constexpr = (V + COLUMNS - 1) // COLUMNS
    SUM: tl.constexpr = tl.float64 if PRECISE else tl.float32
    in_k = (rows < K)[None, :]
    mask = present[:, None] & in_k
    dk = tl.zeros([C, ROWS], tl.float32)
    # A product of its own: Triton before 3.7.1 gets a transposed accumulator wrong on Hopper.
    weights = tl.zeros([C, C], tl.float32)
    passed = tl.zeros([ROWS], tl.float32)
    for index in range(0, GROUP * TILES):
        member = own * GROUP + index // TILES
        columns = (index % TILES) * COLUMNS + tl.arange(0, COLUMNS)
        in_v = (columns < V)[None, :]
        kept = present[:, None] & in_v
        v_at = v_ptr + member * stride_vh + (i * stride_vt)[:, None] + columns[None, :]
        do_at = do_ptr + member * stride_dh + (i * stride_dt)[:, None] + columns[None, :]
        offsets = rows[:, None] * V + columns[None, :]
        state_at = (place * GROUP + member - own * GROUP) * (K * V) + offsets
        given = (n.to(tl.int64) * (H * GROUP) + member) * (K * V) + offsets
        state_mask = (rows < K)[:, None] & in_v
        v = tl.load(v_at, mask=kept, other=0.0)  # [C, COLUMNS]
        do = tl.load(do_at, mask=kept, other=0.0)  # [C, COLUMNS]
        d_state = tl.load(d_states_ptr + state_at, mask=state_mask, other=0.0)  # [ROWS, COLUMNS]
        dk = tl.dot(v, tl.trans(d_state), dk, input_precision=PRECISION)
        weights = tl.dot(v, tl.trans(do), weights, input_precision=PRECISION)
        # In full where they are known.
        state = tl.load(states_ptr + state_at, mask=state_mask, other=0.0).to(tl.float32)
        state = tl.where(opens, tl.load(initial_ptr + given, mask=state_mask & opens, other=0.0), state)
        d_final = tl.load(d_final_ptr + given, mask=state_mask & closes, other=0.0)
        passed += tl.sum(state * tl.where(closes, d_final, d_state.to(tl.float32)), axis=1)
    q = tl.load(q_at, mask=mask, other=0.0)  # [C, ROWS]
    k = tl.load(k_at, mask=mask, other=0.0)  # [C, ROWS]
    weights *= scale
    same = tl.sum(tl.where(i[:, None] == i[None, :], weights, 0.0), axis=1)
    weights = tl.where(i[:, None] < i[None, :], weights, 0.0)
    total, middle, end, reach = sum_up(log_decay_at, mask, i, C, PRECISE)
    if (reach <= REACH) & (not HALVED):
        until = tl.exp2((middle[None, :] - total).to(tl.float32))
        dk *= until * tl.exp2((end - middle).to(tl.float32))[None, :]
        later = (q * tl.exp2((total - middle[None, :]).to(tl.float32))).to(q.dtype)
        of_earlier = tl.dot(weights.to(q.dtype), later, input_precision=PRECISION)
        d_total = k.to(SUM) * dk
        at_end = tl.sum(d_total, axis=0)
        d_total += (k * until).to(k.dtype).to(SUM) * of_earlier
        dk += of_earlier * until
    else:
        dk *= tl.exp2((end[None, :] - total).to(tl.float32))
        d_total = k.to(SUM) * dk
        at_end = tl.sum(d_total, axis=0)
        for level in range(LEVELS):
            fading = decay_to_middle(
                totals_at - (i * (H * K))[:, None] - rows[None, :], total, i, count, H * K, rows, in_k, level
            )
            second = ((i >> level) & 1)[:, None] != 0
            pair = (i >> (level + 1))[:, None] == (i >> (level + 1))[None, :]
            later = tl.where(second, q * fading, 0.0).to(q.dtype)
            corner = tl.where(pair & (second == 0), weights, 0.0).to(q.dtype)
            of_earlier = tl.dot(corner, later, input_precision=PRECISION)
            d_total += (k * fading).to(k.dtype).to(SUM) * of_earlier
            dk += of_earlier * fading
    tl.store(dk_ptr + dense, (dk + same[:, None] * q).to(k.dtype), mask=mask)
    return d_total, at_end + tl.exp2(end.to(tl.float32)) * passed


@triton.jit(do_not_specialize=LENGTHS)
def _gla_gradient_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, log_decay_ptr, totals_ptr, states_ptr, d_states_ptr, initial_ptr, d_final_ptr,
    dq_ptr, dk_ptr, d_log_decay_ptr, table_ptr, cu_seqlens_ptr,
    stride_qn, stride_qt, stride_qh,
    stride_kn, stride_kt, stride_kh,
    stride_vn, stride_vt, stride_vh,
    stride_dn, stride_dt, stride_dh,
    stride_gn, stride_gt, stride_gh,
    T, H, per_sequence, has_initial, has_d_final, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, VARLEN: tl.constexpr, PRECISE: tl.constexpr, HALVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one key head. `totals` is room for what threads tell each other.

    Shapes:  totals, dq, dk, d_log_decay: [B, T, H, K];  states, d_states: [chunks, HV, K, V]
             initial, d_final: [N, HV, K, V], float32
    """
    head = tl.program_id(0) % H
    chunk = tl.program_id(0) // H
    n, j, begin, length = find_sequence(chunk, table_ptr, cu_seqlens_ptr, T, per_sequence, VARLEN)
    # An empty sequence has a chunk as well, without a token.
    if (n < 0) | (j * C >= length):
        return

    row = n.to(tl.int64) if not VARLEN else tl.zeros((), tl.int64)
    first = begin + j * C
    own = head.to(tl.int64)
    place = chunk.to(tl.int64) * H + own
    count = tl.minimum(length - j * C, C)
    i = tl.arange(0, C)
    rows = tl.arange(0, ROWS)
    present = i < count
    q_at = (
        q_ptr
        + row * stride_qn
        + first * stride_qt
        + own * stride_qh
        + (i * stride_qt)[:, None]
        + rows[None, :]
    )
    k_at = (
        k_ptr
        + row * stride_kn
        + first * stride_kt
        + own * stride_kh
        + (i * stride_kt)[:, None]
        + rows[None, :]
    )
    log_decay_at = log_decay_ptr + row * stride_gn + first * stride_gt + own * stride_gh
    log_decay_at += (i * stride_gt)[:, None] + rows[None, :]
    v_ptr += row * stride_vn + first * stride_vt
    do_ptr += row * stride_dn + first * stride_dt
    dense = (row * T + first) * (H * K) + own * K + (i * (H * K))[:, None] + rows[None, :]
    totals_at = totals_ptr + dense
    d_total = _query_gradient(
        q_at, k_at, v_ptr, do_ptr, log_decay_at, totals_at, states_ptr, dq_ptr,
        stride_vt, stride_vh, stride_dt, stride_dh, H, scale, own, place, i, rows, present, count, dense,
        K, V, C, LEVELS, ROWS, COLUMNS, GROUP, PRECISE, HALVED, PRECISION,
    )  # fmt: skip
    # Not to be merged: what the second part loads again would otherwise stay in registers.
    tl.debug_barrier()
    opens = (j == 0) & (has_initial != 0)
    closes = ((j + 1) * C >= length) & (has_d_final != 0)
    d_key, at_end = _key_gradient(
        q_at, k_at, v_ptr, do_ptr, log_decay_at, totals_at, states_ptr, d_states_ptr, initial_ptr, d_final_ptr, dk_ptr,
        stride_vt, stride_vh, stride_dt, stride_dh, H, scale, own, place, n, opens, closes, i, rows, present, count, dense,
        K, V, C, LEVELS, ROWS, COLUMNS, GROUP, PRECISE, HALVED, PRECISION,
    )  # fmt: skip
    d_rate = tl.cumsum(d_total - d_key, axis=0, reverse=True) + at_end[None, :]
    tl.store(d_log_decay_ptr + dense, d_rate.to(tl.float32), mask=present[:, None] & (rows < K)[None, :])
