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

from heddle.kernels._gla_fwd import (
    LENGTHS,
    REACH,
    decay_to_middle,
    most_left,
    power_from,
    power_until,
    sum_up,
)
from heddle.kernels.common.jit import find_sequence


@triton.jit
def _query_gradient(
    q_ptr, k_ptr, v_ptr, do_ptr, log_decay_ptr, totals_ptr, states_ptr, dq_ptr,
    stride_qt, stride_kt, stride_vt, stride_vh, stride_dt, stride_dh, stride_gt, H, scale, i, rows, present, count,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, PRECISE: tl.constexpr, HALVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores dq of a chunk; what it passes back to the sums of log-decays.  Shapes:  [C, ROWS]"""
    TILES: tl.constexpr = (V + COLUMNS - 1) // COLUMNS
    SUM: tl.constexpr = tl.float64 if PRECISE else tl.float32
    in_k = (rows < K)[None, :]
    mask = present[:, None] & in_k
    offsets = (i * (H * K))[:, None] + rows[None, :]
    dq = tl.zeros([C, ROWS], tl.float32)
    weights = tl.zeros([C, C], tl.float32)
    for index in range(0, GROUP * TILES):
        member = index // TILES
        columns = (index % TILES) * COLUMNS + tl.arange(0, COLUMNS)
        in_v = (columns < V)[None, :]
        kept = present[:, None] & in_v
        v_at = v_ptr + member * stride_vh + (i * stride_vt)[:, None] + columns[None, :]
        do_at = do_ptr + member * stride_dh + (i * stride_dt)[:, None] + columns[None, :]
        state_at = states_ptr + member * (K * V) + rows[:, None] * V + columns[None, :]
        v = tl.load(v_at, mask=kept, other=0.0)  # [C, COLUMNS]
        do = tl.load(do_at, mask=kept, other=0.0)  # [C, COLUMNS]
        state = tl.load(state_at, mask=(rows < K)[:, None] & in_v, other=0.0)  # [ROWS, COLUMNS]
        dq = tl.dot(do, tl.trans(state), dq, input_precision=PRECISION)
        weights = tl.dot(do, tl.trans(v), weights, input_precision=PRECISION)
    q = tl.load(q_ptr + (i * stride_qt)[:, None] + rows[None, :], mask=mask, other=0.0)  # [C, ROWS]
    k = tl.load(k_ptr + (i * stride_kt)[:, None] + rows[None, :], mask=mask, other=0.0)  # [C, ROWS]
    weights *= scale
    same = tl.sum(tl.where(i[:, None] == i[None, :], weights, 0.0), axis=1)
    weights = tl.where(i[:, None] > i[None, :], weights, 0.0)
    total, middle, _end, _reach = sum_up(
        log_decay_ptr + (i * stride_gt)[:, None] + rows[None, :], mask, i, C, PRECISE
    )
    # Products are of operands as they were rounded, so that what both tokens of a pair pass on cancels after them.
    if not HALVED:
        since = power_from(middle, total)
        dq *= since * (tl.exp2(middle.to(tl.float32)) * scale)[None, :]
        earlier = (k * power_until(middle, total)).to(k.dtype)
        of_later = tl.dot(weights.to(k.dtype), earlier, input_precision=PRECISION)
        d_total = q.to(SUM) * dq + (q * since).to(q.dtype).to(SUM) * of_later
        dq += of_later * since
    else:
        tl.store(totals_ptr + offsets, total, mask=mask)
        tl.debug_barrier()
        dq *= tl.exp2(total.to(tl.float32)) * scale
        d_total = q.to(SUM) * dq
        NARROW: tl.constexpr = q.dtype == tl.float16
        most = most_left(totals_ptr, total, i, count, H * K, rows, in_k, NARROW)
        over = 1.0 / most
        for level in range(LEVELS):
            fading = decay_to_middle(totals_ptr, total, i, count, H * K, rows, in_k, level)
            second = ((i >> level) & 1)[:, None] != 0
            pair = (i >> (level + 1))[:, None] == (i >> (level + 1))[None, :]
            earlier = tl.where(second, 0.0, k * fading).to(k.dtype)
            corner = tl.where(pair & second, weights, 0.0).to(k.dtype)
            of_later = tl.dot(corner, earlier, input_precision=PRECISION)
            later = (q * (tl.where(second, fading * over, 0.0) if NARROW else fading)).to(q.dtype)
            d_total += later.to(SUM) * (of_later * most)
            dq += of_later * fading
    tl.store(dq_ptr + offsets, (dq + same[:, None] * k).to(q.dtype), mask=mask)
    return d_total


@triton.jit
def _passed_on(
    states_ptr, d_states_ptr, initial_ptr, d_final_ptr, opens, closes, rows,
    K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Of each channel, the product of the state before a chunk with the gradient of that after it, in full where known."""
    TILES: tl.constexpr = (V + COLUMNS - 1) // COLUMNS
    passed = tl.zeros([ROWS], tl.float32)
    for index in range(0, GROUP * TILES):
        columns = (index % TILES) * COLUMNS + tl.arange(0, COLUMNS)
        offsets = (index // TILES) * (K * V) + rows[:, None] * V + columns[None, :]
        mask = (rows < K)[:, None] & (columns < V)[None, :]
        if opens:
            state = tl.load(initial_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        else:
            state = tl.load(states_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if closes:
            d_state = tl.load(d_final_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        else:
            d_state = tl.load(d_states_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        passed += tl.sum(state * d_state, axis=1)
    return passed


@triton.jit
def _key_gradient(
    q_ptr, k_ptr, v_ptr, do_ptr, log_decay_ptr, totals_ptr, d_states_ptr, dk_ptr, passed,
    stride_qt, stride_kt, stride_vt, stride_vh, stride_dt, stride_dh, stride_gt, H, scale, i, rows, present, count,
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
    offsets = (i * (H * K))[:, None] + rows[None, :]
    dk = tl.zeros([C, ROWS], tl.float32)
    # A product of its own: Triton before 3.7.1 gets a transposed accumulator wrong on Hopper.
    weights = tl.zeros([C, C], tl.float32)
    for index in range(0, GROUP * TILES):
        member = index // TILES
        columns = (index % TILES) * COLUMNS + tl.arange(0, COLUMNS)
        in_v = (columns < V)[None, :]
        kept = present[:, None] & in_v
        v_at = v_ptr + member * stride_vh + (i * stride_vt)[:, None] + columns[None, :]
        do_at = do_ptr + member * stride_dh + (i * stride_dt)[:, None] + columns[None, :]
        d_state_at = d_states_ptr + member * (K * V) + rows[:, None] * V + columns[None, :]
        v = tl.load(v_at, mask=kept, other=0.0)  # [C, COLUMNS]
        do = tl.load(do_at, mask=kept, other=0.0)  # [C, COLUMNS]
        d_state = tl.load(d_state_at, mask=(rows < K)[:, None] & in_v, other=0.0)  # [ROWS, COLUMNS]
        dk = tl.dot(v, tl.trans(d_state), dk, input_precision=PRECISION)
        weights = tl.dot(v, tl.trans(do), weights, input_precision=PRECISION)
    q = tl.load(q_ptr + (i * stride_qt)[:, None] + rows[None, :], mask=mask, other=0.0)  # [C, ROWS]
    k = tl.load(k_ptr + (i * stride_kt)[:, None] + rows[None, :], mask=mask, other=0.0)  # [C, ROWS]
    weights *= scale
    same = tl.sum(tl.where(i[:, None] == i[None, :], weights, 0.0), axis=1)
    weights = tl.where(i[:, None] < i[None, :], weights, 0.0)
    total, middle, end, _reach = sum_up(
        log_decay_ptr + (i * stride_gt)[:, None] + rows[None, :], mask, i, C, PRECISE
    )
    if not HALVED:
        until = power_until(middle, total)
        dk *= until * tl.exp2((end - middle).to(tl.float32))[None, :]
        later = (q * power_from(middle, total)).to(q.dtype)
        of_earlier = tl.dot(weights.to(q.dtype), later, input_precision=PRECISION)
        d_total = k.to(SUM) * dk
        at_end = tl.sum(d_total, axis=0)
        d_total += (k * until).to(k.dtype).to(SUM) * of_earlier
        dk += of_earlier * until
    else:
        dk *= tl.exp2((end[None, :] - total).to(tl.float32))
        # No decay lies between the last token and the end.
        d_total = tl.where((i < count - 1)[:, None], k.to(SUM) * dk, 0.0)
        at_end = tl.sum(d_total, axis=0)
        most = most_left(totals_ptr, total, i, count, H * K, rows, in_k, q.dtype == tl.float16)
        over = 1.0 / most
        for level in range(LEVELS):
            fading = decay_to_middle(totals_ptr, total, i, count, H * K, rows, in_k, level)
            second = ((i >> level) & 1)[:, None] != 0
            pair = (i >> (level + 1))[:, None] == (i >> (level + 1))[None, :]
            later = tl.where(second, q * (fading * over), 0.0).to(q.dtype)
            corner = tl.where(pair & (second == 0), weights, 0.0).to(q.dtype)
            of_earlier = tl.dot(corner, later, input_precision=PRECISION) * most
            d_total += (k * fading).to(k.dtype).to(SUM) * of_earlier
            dk += of_earlier * fading
    tl.store(dk_ptr + offsets, (dk + same[:, None] * q).to(k.dtype), mask=mask)
    return d_total, at_end + tl.exp2(end.to(tl.float32)) * passed


@triton.jit(do_not_specialize=LENGTHS)
def _gla_gradient_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, log_decay_ptr, totals_ptr, states_ptr, d_states_ptr, initial_ptr, d_final_ptr,
    dq_ptr, dk_ptr, d_log_decay_ptr, reach_ptr, table_ptr, cu_seqlens_ptr,
    stride_qn, stride_qt, stride_qh,
    stride_kn, stride_kt, stride_kh,
    stride_vn, stride_vt, stride_vh,
    stride_dn, stride_dt, stride_dh,
    stride_gn, stride_gt, stride_gh,
    T, H, per_sequence, has_initial, has_d_final, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, VARLEN: tl.constexpr, PRECISE: tl.constexpr, HALVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS channels of one chunk of one key head; HALVED: where one product does not do for all pairs.

    Shapes:  totals, dq, dk, d_log_decay: [B, T, H, K];  states, d_states: [chunks, HV, K, V];  reach: [chunks, H]
             initial, d_final: [N, HV, K, V], float32
    """
    TILES: tl.constexpr = (K + ROWS - 1) // ROWS
    tile = tl.program_id(0) % TILES
    head = (tl.program_id(0) // TILES) % H
    chunk = tl.program_id(0) // (TILES * H)
    n, j, begin, length = find_sequence(chunk, table_ptr, cu_seqlens_ptr, T, per_sequence, VARLEN)
    # An empty sequence has a chunk as well, without a token.
    if (n < 0) | (j * C >= length):
        return

    own = head.to(tl.int64)
    place = chunk.to(tl.int64) * H + own
    far = tl.load(reach_ptr + place) > REACH
    if far != HALVED:
        return

    row = n.to(tl.int64) if not VARLEN else tl.zeros((), tl.int64)
    first = begin + j * C
    count = tl.minimum(length - j * C, C)
    i = tl.arange(0, C)
    rows = tile * ROWS + tl.arange(0, ROWS)
    present = i < count
    dense = (row * T + first) * (H * K) + own * K
    q_ptr += row * stride_qn + first * stride_qt + own * stride_qh
    k_ptr += row * stride_kn + first * stride_kt + own * stride_kh
    v_ptr += row * stride_vn + first * stride_vt + own * GROUP * stride_vh
    do_ptr += row * stride_dn + first * stride_dt + own * GROUP * stride_dh
    log_decay_ptr += row * stride_gn + first * stride_gt + own * stride_gh
    totals_ptr += dense
    states_ptr += place * (GROUP * K * V)
    d_states_ptr += place * (GROUP * K * V)
    given = (n.to(tl.int64) * H + own) * (GROUP * K * V)
    opens = (j == 0) & (has_initial != 0)
    closes = ((j + 1) * C >= length) & (has_d_final != 0)
    passed = _passed_on(
        states_ptr, d_states_ptr, initial_ptr + given, d_final_ptr + given, opens, closes, rows,
        K, V, ROWS, COLUMNS, GROUP,
    )  # fmt: skip
    d_total = _query_gradient(
        q_ptr, k_ptr, v_ptr, do_ptr, log_decay_ptr, totals_ptr, states_ptr, dq_ptr + dense,
        stride_qt, stride_kt, stride_vt, stride_vh, stride_dt, stride_dh, stride_gt, H, scale, i, rows, present, count,
        K, V, C, LEVELS, ROWS, COLUMNS, GROUP, PRECISE, HALVED, PRECISION,
    )  # fmt: skip
    # Not to be merged: what the second part loads again would otherwise stay in registers.
    tl.debug_barrier()
    d_key, at_end = _key_gradient(
        q_ptr, k_ptr, v_ptr, do_ptr, log_decay_ptr, totals_ptr, d_states_ptr, dk_ptr + dense, passed,
        stride_qt, stride_kt, stride_vt, stride_vh, stride_dt, stride_dh, stride_gt, H, scale, i, rows, present, count,
        K, V, C, LEVELS, ROWS, COLUMNS, GROUP, PRECISE, HALVED, PRECISION,
    )  # fmt: skip
    d_rate = tl.cumsum(d_total - d_key, axis=0, reverse=True) + at_end[None, :]
    d_log_decay_at = d_log_decay_ptr + dense + (i * (H * K))[:, None] + rows[None, :]
    tl.store(d_log_decay_at, d_rate.to(tl.float32), mask=present[:, None] & (rows < K)[None, :])
