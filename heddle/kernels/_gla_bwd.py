# mypy: ignore-errors
"""The kernel of the gradients of gla, chunk by chunk; letters as in `_gla_fwd`.

From S, the state before a chunk, and dS', the gradient of that after it, with dP = dO vᵀ up to the diagonal:

    dq_i = scale (exp(G_i) (dO Sᵀ)_i + Σ_{j ≤ i} dP_ij k_j exp(G_i - G_j))
    dk_j = exp(G_C - G_j) (v dS'ᵀ)_j + scale Σ_{i ≥ j} dP_ij q_i exp(G_i - G_j)

The gradient of a sum of log-decays G_i is q_i dq_i - k_i dk_i, of G_C besides Σ_j of what k_j gets of dS', and
exp(G_C) Σ_v S dS'; a log-decay has the sum of those from its token to the end of the chunk. No decay lies between a token
and itself: what it gives itself joins dq and dk after that.

Bytes for a token and head, K = V = 128, C = 64, bfloat16: reads q, k, v, dO, G, S, dS', writes dq, dk, dg (3584).
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels._gla_fwd import LENGTHS, decay_to_middle
from heddle.kernels.common.jit import find_sequence


@triton.jit(do_not_specialize=LENGTHS)
def _gla_gradient_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, totals_ptr, states_ptr, d_states_ptr, initial_ptr, d_final_ptr,
    dq_ptr, dk_ptr, d_log_decay_ptr, table_ptr, cu_seqlens_ptr,
    stride_qn, stride_qt, stride_qh,
    stride_kn, stride_kt, stride_kh,
    stride_vn, stride_vt, stride_vh,
    stride_dn, stride_dt, stride_dh,
    T, H, per_sequence, has_initial, has_d_final, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, VARLEN: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one key head.

    Shapes:  totals, dq, dk, d_log_decay: [B, T, H, K];  states, d_states: [chunks, HV, K, V]
             initial, d_final: [N, HV, K, V], float32
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
    own = head.to(tl.int64)
    count = tl.minimum(length - j * C, C)
    i = tl.arange(0, C)
    rows = tl.arange(0, ROWS)
    in_k = (rows < K)[None, :]
    present = i < count
    mask = present[:, None] & in_k
    v_ptr += row * stride_vn + first * stride_vt
    do_ptr += row * stride_dn + first * stride_dt

    dq = tl.zeros([C, ROWS], tl.float32)
    dk = tl.zeros([C, ROWS], tl.float32)
    weights = tl.zeros([C, C], tl.float32)
    weights_t = tl.zeros([C, C], tl.float32)
    passed = tl.zeros([ROWS], tl.float32)
    opens = (j == 0) & (has_initial != 0)
    closes = ((j + 1) * C >= length) & (has_d_final != 0)
    for index in range(0, GROUP * ((V + COLUMNS - 1) // COLUMNS)):
        member = own * GROUP + index // ((V + COLUMNS - 1) // COLUMNS)
        columns = (index % ((V + COLUMNS - 1) // COLUMNS)) * COLUMNS + tl.arange(0, COLUMNS)
        in_v = (columns < V)[None, :]
        kept = present[:, None] & in_v
        v_at = v_ptr + member * stride_vh + (i * stride_vt)[:, None] + columns[None, :]
        do_at = do_ptr + member * stride_dh + (i * stride_dt)[:, None] + columns[None, :]
        state_at = (chunk.to(tl.int64) * HV + member) * (K * V) + rows[:, None] * V + columns[None, :]
        state_mask = (rows < K)[:, None] & in_v
        v = tl.load(v_at, mask=kept, other=0.0)  # [C, COLUMNS]
        do = tl.load(do_at, mask=kept, other=0.0)  # [C, COLUMNS]
        state = tl.load(states_ptr + state_at, mask=state_mask, other=0.0)  # [ROWS, COLUMNS]
        d_state = tl.load(d_states_ptr + state_at, mask=state_mask, other=0.0)  # [ROWS, COLUMNS]
        dq = tl.dot(do, tl.trans(state), dq, input_precision=PRECISION)
        dk = tl.dot(v, tl.trans(d_state), dk, input_precision=PRECISION)
        weights = tl.dot(do, tl.trans(v), weights, input_precision=PRECISION)
        # A product of its own: Triton before 3.7.1 gets a transposed accumulator wrong on Hopper.
        weights_t = tl.dot(v, tl.trans(do), weights_t, input_precision=PRECISION)
        # In full where they are known.
        given = (n.to(tl.int64) * HV + member) * (K * V) + rows[:, None] * V + columns[None, :]
        initial = tl.load(initial_ptr + given, mask=state_mask & opens, other=0.0)
        d_final = tl.load(d_final_ptr + given, mask=state_mask & closes, other=0.0)
        product = tl.where(opens, initial, state.to(tl.float32)) * tl.where(
            closes, d_final, d_state.to(tl.float32)
        )
        passed += tl.sum(product, axis=1)

    dense = (row * T + first) * (H * K) + own * K
    offsets = (i * (H * K))[:, None] + rows[None, :]
    totals_at = totals_ptr + dense
    total = tl.load(totals_at + offsets, mask=mask, other=0.0)  # [C, ROWS]
    end = tl.load(totals_at + (count - 1) * (H * K) + rows, mask=rows < K, other=0.0)
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
    q = tl.load(q_at, mask=mask, other=0.0)  # [C, ROWS]
    k = tl.load(k_at, mask=mask, other=0.0)  # [C, ROWS]
    dq *= tl.exp2(total.to(tl.float32)) * scale
    dk *= tl.exp2((end[None, :] - total).to(tl.float32))
    SUM: tl.constexpr = tl.float64 if PRECISE else tl.float32
    passed_back = k.to(SUM) * dk
    at_end = tl.sum(passed_back, axis=0) + tl.exp2(end.to(tl.float32)) * passed
    d_total = q.to(SUM) * dq - passed_back
    for level in tl.static_range(LEVELS):
        fading = decay_to_middle(totals_at, total, i, count, H * K, rows, in_k, level)
        second = ((i >> level) & 1)[:, None] != 0
        pair = (i >> (level + 1))[:, None] == (i >> (level + 1))[None, :]
        later = tl.where(second, q * fading, 0.0).to(q.dtype)
        earlier = tl.where(second, 0.0, k * fading).to(k.dtype)
        corner = tl.where(pair, weights, 0.0).to(k.dtype)
        of_later = tl.dot(corner, earlier, input_precision=PRECISION) * scale
        corner = tl.where(pair, weights_t, 0.0).to(k.dtype)
        of_earlier = tl.dot(corner, later, input_precision=PRECISION) * scale
        # Of operands as they were rounded, so that what both tokens of a pair pass on cancels after them.
        d_total += later.to(SUM) * of_later - earlier.to(SUM) * of_earlier
        dq += tl.where(second, of_later * fading, 0.0)
        dk += tl.where(second, 0.0, of_earlier * fading)
    d_rate = tl.cumsum(d_total, axis=0, reverse=True) + at_end[None, :]
    tl.store(d_log_decay_ptr + dense + offsets, d_rate.to(tl.float32), mask=mask)
    same = tl.sum(tl.where(i[:, None] == i[None, :], weights, 0.0), axis=1)[:, None] * scale
    tl.store(dq_ptr + dense + offsets, (dq + same * k).to(q.dtype), mask=mask)
    tl.store(dk_ptr + dense + offsets, (dk + same * q).to(k.dtype), mask=mask)
