# mypy: ignore-errors
"""The gradients of kda by two kernels; letters as in `_kda_bwd`, whose one kernel gives the same.

    pair   of each chunk R = dO nᵀ up to the diagonal and M = -beta dx nᵀ below it, dv, and what dbeta gets of them
    near   dq, dk, the gradient of the log-decays and what dbeta gets through the state, in tiles of channels
    far    the same for chunks that fade far, by halves as in `_gla_fwd`

A product of two tokens over V is that of all channels: here it is made once, not for each tile of them, and once for what
queries read and what keys leave, which load it turned. In a chunk that fades little exp(G_i - G_j) is exp(G_i - G_C) times
exp(G_C - G_j), and what the forward kernels left serves as operands:

    x = exp(G_C) dO S + R left,                        dq = scale exp(G - G_C) x
    y = -beta exp(G_C) dx S + M left,                  z = exp(G_C) n dS' + Rᵀ seen + Mᵀ read
    dk = exp(G - G_C) y + exp(-G) z,                   dG = exp(-G_C) (seen x + read y - left z)

So x, y and z take an accumulator each, one after the other. Both tokens of a pair get the same product of rounded operands
in dG, which cancels in its sum after them; so does what a token gives itself. No power is above 2^80.

Bytes for a token and value head, K = V = 128, C = 64, bfloat16: pair reads v, dO, dx, n, N and writes dv, R, M (1664);
near reads seen, read, left, G, S, dS and for each of its two tiles dO, dx, n, R, M, and writes dq, dk, dg (5888).
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels._gla_fwd import REACH
from heddle.kernels._kda_bwd import _from_earlier, _from_later, _passed_on
from heddle.kernels._kda_fwd import LENGTHS
from heddle.kernels.common.jit import find_sequence

# A model has one number of heads: known when compiled, as are strides, addresses take fewer registers.
NUMBERS = tuple(name for name in LENGTHS if name != "HV")


@triton.jit(do_not_specialize=LENGTHS)
def _kda_pair_kernel(
    v_ptr, do_ptr, beta_ptr, dx_ptr, new_ptr, keys_ptr, dv_ptr, pairs_ptr, same_ptr, d_beta_ptr, table_ptr, cu_seqlens_ptr,
    stride_vn, stride_vt, stride_vh,
    stride_dn, stride_dt, stride_dh,
    stride_beta, T, HV, per_sequence, scale,
    V: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr, VARLEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one value head.

    Shapes:  pairs: [chunks, HV, 2, C, C], R without its diagonal and M;  same: [B, T, HV], the diagonal of R
             keys: [chunks, HV, C, C];  dv: [B, T, HV, V];  d_beta: [TILES + 1, B, T, HV]
    """
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
    present = i < tl.minimum(length - j * C, C)
    tokens = (row * T + first) * HV + own
    v_ptr += row * stride_vn + first * stride_vt + own * stride_vh
    do_ptr += row * stride_dn + first * stride_dt + own * stride_dh
    beta = tl.load(beta_ptr + tokens + i * HV, mask=present, other=0.0)
    weights = tl.zeros([C, C], tl.float32)
    solves = tl.zeros([C, C], tl.float32)
    d_beta = tl.zeros([C], tl.float32)
    for tile in range(0, V, COLUMNS):
        columns = tile + tl.arange(0, COLUMNS)
        kept = present[:, None] & (columns < V)[None, :]
        dense = tokens * V + (i * (HV * V))[:, None] + columns[None, :]
        do = tl.load(
            do_ptr + (i * stride_dt)[:, None] + columns[None, :], mask=kept, other=0.0
        )  # [C, COLUMNS]
        new = tl.load(new_ptr + dense, mask=kept, other=0.0)  # [C, COLUMNS]
        dx = tl.load(dx_ptr + dense, mask=kept, other=0.0)  # [C, COLUMNS]
        v = tl.load(v_ptr + (i * stride_vt)[:, None] + columns[None, :], mask=kept, other=0.0)
        weights = tl.dot(do, tl.trans(new), weights, input_precision=PRECISION)
        solves = tl.dot(dx, tl.trans(new), solves, input_precision=PRECISION)
        d_beta += tl.sum(dx.to(tl.float32) * v, axis=1)
        tl.store(dv_ptr + dense, (beta[:, None] * dx).to(dx.dtype), mask=kept)
    square = i[:, None] * C + i[None, :]
    keys = tl.load(keys_ptr + place * (C * C) + square).to(tl.float32)  # [C, C], 0 but below the diagonal
    d_beta -= tl.sum(solves * keys, axis=1)
    tl.store(d_beta_ptr + stride_beta.to(tl.int64) * TILES + tokens + i * HV, d_beta, mask=present)
    same = tl.sum(tl.where(i[:, None] == i[None, :], weights, 0.0), axis=1)
    tl.store(same_ptr + tokens + i * HV, same * scale, mask=present)
    lower = i[:, None] > i[None, :]
    pairs_at = pairs_ptr + place * (2 * C * C) + square
    tl.store(pairs_at, tl.where(i[:, None] >= i[None, :], weights, 0.0).to(pairs_ptr.dtype.element_ty))
    tl.store(pairs_at + C * C, tl.where(lower, solves * -beta[:, None], 0.0).to(pairs_ptr.dtype.element_ty))


@triton.jit
def _two_against_state(
    x_at, y_at, states_ptr, rows, stride, other_stride, i, present,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The products of two rows of each token with a state.  Shapes:  x, y: [C, V];  state: [V, K];  out: [C, ROWS], twice"""
    of_x = tl.zeros([C, ROWS], tl.float32)
    of_y = tl.zeros([C, ROWS], tl.float32)
    for tile in range(0, V, COLUMNS):
        columns = tile + tl.arange(0, COLUMNS)
        in_v = columns < V
        kept = present[:, None] & in_v[None, :]
        state_mask = in_v[:, None] & (rows < K)[None, :]
        x = tl.load(x_at + (i * stride)[:, None] + columns[None, :], mask=kept, other=0.0)  # [C, COLUMNS]
        y = tl.load(y_at + (i * other_stride)[:, None] + columns[None, :], mask=kept, other=0.0)
        state = tl.load(states_ptr + columns[:, None] * K + rows[None, :], mask=state_mask, other=0.0)
        of_x = tl.dot(x, state, of_x, input_precision=PRECISION)
        of_y = tl.dot(y, state, of_y, input_precision=PRECISION)
    return of_x, of_y


@triton.jit
def _against_state(
    x_at, states_ptr, rows, stride, i, present,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The products of tokens with a state.  Shapes:  x: [C, V];  state: [V, K];  out: [C, ROWS]"""
    found = tl.zeros([C, ROWS], tl.float32)
    for tile in range(0, V, COLUMNS):
        columns = tile + tl.arange(0, COLUMNS)
        in_v = columns < V
        state_mask = in_v[:, None] & (rows < K)[None, :]
        x = tl.load(
            x_at + (i * stride)[:, None] + columns[None, :], mask=present[:, None] & in_v[None, :], other=0.0
        )
        state = tl.load(states_ptr + columns[:, None] * K + rows[None, :], mask=state_mask, other=0.0)
        found = tl.dot(x, state, found, input_precision=PRECISION)
    return found


@triton.jit(do_not_specialize=NUMBERS)
def _kda_near_kernel(
    do_ptr, seen_ptr, read_ptr, left_ptr, beta_ptr, totals_ptr, dx_ptr, new_ptr, pairs_ptr, states_ptr, d_states_ptr,
    initial_ptr, d_final_ptr, dq_ptr, dk_ptr, d_log_decay_ptr, d_beta_ptr, reach_ptr, table_ptr, cu_seqlens_ptr,
    stride_dn, stride_dt: tl.constexpr, stride_dh,
    stride_beta, T, HV: tl.constexpr, per_sequence, has_initial, has_d_final, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VARLEN: tl.constexpr,
    PRECISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS channels of one chunk of one value head, where the chunk fades little.

    Shapes:  seen, read, left, totals, dq, dk, d_log_decay: [B, T, HV, K];  dx, new: [B, T, HV, V]
             states, d_states: [chunks, HV, V, K];  pairs: [chunks, HV, 2, C, C];  d_beta: [TILES + 1, B, T, HV]
             reach: [chunks, HV];  initial, d_final: [N, HV, V, K]
    """
    TILES: tl.constexpr = (K + ROWS - 1) // ROWS
    SUM: tl.constexpr = tl.float64 if PRECISE else tl.float32
    tile = tl.program_id(0) % TILES
    head = (tl.program_id(0) // TILES) % HV
    chunk = tl.program_id(0) // (TILES * HV)
    n, j, begin, length = find_sequence(chunk, table_ptr, cu_seqlens_ptr, T, per_sequence, VARLEN)
    # An empty sequence has a chunk as well, without a token.
    if (n < 0) | (j * C >= length):
        return

    own = head.to(tl.int64)
    place = chunk.to(tl.int64) * HV + own
    if tl.load(reach_ptr + place) > REACH:
        return

    row = n.to(tl.int64) if not VARLEN else tl.zeros((), tl.int64)
    first = begin + j * C
    count = tl.minimum(length - j * C, C)
    i = tl.arange(0, C)
    rows = tile * ROWS + tl.arange(0, ROWS)
    in_k = rows < K
    present = i < count
    mask = present[:, None] & in_k[None, :]
    tokens = (row * T + first) * HV + own
    offsets = (i * (HV * K))[:, None] + rows[None, :]
    do_ptr += row * stride_dn + first * stride_dt + own * stride_dh
    seen_ptr += tokens * K
    read_ptr += tokens * K
    left_ptr += tokens * K
    totals_ptr += tokens * K
    dx_ptr += tokens * V
    new_ptr += tokens * V
    states_ptr += place * (K * V)
    d_states_ptr += place * (K * V)
    square = pairs_ptr + place * (2 * C * C) + i[:, None] * C + i[None, :]
    turned = pairs_ptr + place * (2 * C * C) + i[:, None] + i[None, :] * C
    given = (n.to(tl.int64) * HV + own) * (K * V)
    opens = (j == 0) & (has_initial != 0)
    closes = ((j + 1) * C >= length) & (has_d_final != 0)
    end = tl.load(totals_ptr + (count - 1) * (HV * K) + rows, mask=in_k, other=0.0)
    fade = tl.exp2(end.to(tl.float32))[None, :]
    beta = tl.load(beta_ptr + tokens + i * HV, mask=present, other=0.0)

    # What queries read.
    found = _against_state(do_ptr, states_ptr, rows, stride_dt, i, present, K, V, C, ROWS, COLUMNS, PRECISION)
    left = tl.load(left_ptr + offsets, mask=mask, other=0.0)  # [C, ROWS]
    found = tl.dot(tl.load(square), left, found * fade, input_precision=PRECISION)
    seen = tl.load(seen_ptr + offsets, mask=mask, other=0.0)  # [C, ROWS]
    d_total = seen.to(SUM) * found
    total = tl.load(totals_ptr + offsets, mask=mask, other=0.0)  # [C, ROWS]
    since = tl.exp2((total - end[None, :]).to(tl.float32))
    tl.store(dq_ptr + tokens * K + offsets, (found * (since * scale)).to(dq_ptr.dtype.element_ty), mask=mask)

    # What keys read, to be overwritten.
    found = _against_state(dx_ptr, states_ptr, rows, HV * V, i, present, K, V, C, ROWS, COLUMNS, PRECISION)
    read = tl.load(read_ptr + offsets, mask=mask, other=0.0)  # [C, ROWS]
    d_beta = -tl.sum(found * read, axis=1)
    tl.store(d_beta_ptr + tile.to(tl.int64) * stride_beta + tokens + i * HV, d_beta, mask=present)
    found = tl.dot(tl.load(square + C * C), left, found * fade * -beta[:, None], input_precision=PRECISION)
    d_total += read.to(SUM) * found
    dk = found * since
    # Not to be merged: what the next part loads again would otherwise stay in registers.
    tl.debug_barrier()

    # What keys leave for later tokens and for the state.
    found = _against_state(new_ptr, d_states_ptr, rows, HV * V, i, present, K, V, C, ROWS, COLUMNS, PRECISION)
    left = tl.load(left_ptr + offsets, mask=mask, other=0.0)  # [C, ROWS]
    at_end = tl.sum(left.to(SUM) * found, axis=0)
    seen = tl.load(seen_ptr + offsets, mask=mask, other=0.0)  # [C, ROWS]
    read = tl.load(read_ptr + offsets, mask=mask, other=0.0)  # [C, ROWS]
    found = tl.dot(tl.load(turned), seen, found * fade, input_precision=PRECISION)
    found = tl.dot(tl.load(turned + C * C), read, found, input_precision=PRECISION)
    d_total -= left.to(SUM) * found
    total = tl.load(totals_ptr + offsets, mask=mask, other=0.0)  # [C, ROWS]
    dk += found * tl.exp2((-total).to(tl.float32))
    tl.store(dk_ptr + tokens * K + offsets, dk.to(dk_ptr.dtype.element_ty), mask=mask)
    passed = _passed_on(
        states_ptr, d_states_ptr, initial_ptr + given, d_final_ptr + given, opens, closes, rows, K, V, COLUMNS, ROWS
    )  # fmt: skip
    at_end += tl.exp2(end.to(tl.float32)) * passed
    d_total *= tl.exp2((-end).to(tl.float32))[None, :]
    d_rate = tl.cumsum(d_total, axis=0, reverse=True) + at_end[None, :]
    tl.store(d_log_decay_ptr + tokens * K + offsets, d_rate.to(tl.float32), mask=mask)


@triton.jit(do_not_specialize=NUMBERS)
def _kda_far_kernel(
    q_ptr, k_ptr, do_ptr, beta_ptr, totals_ptr, dx_ptr, new_ptr, pairs_ptr, same_ptr, states_ptr, d_states_ptr,
    initial_ptr, d_final_ptr, dq_ptr, dk_ptr, d_log_decay_ptr, d_beta_ptr, reach_ptr, table_ptr, cu_seqlens_ptr,
    stride_qn, stride_qt: tl.constexpr, stride_qh,
    stride_kn, stride_kt: tl.constexpr, stride_kh,
    stride_dn, stride_dt: tl.constexpr, stride_dh,
    stride_beta, T, HV: tl.constexpr, per_sequence, has_initial, has_d_final, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, VARLEN: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS channels of one chunk of one value head, where one product does not do for all pairs.

    Shapes:  totals, dq, dk, d_log_decay: [B, T, HV, K];  dx, new: [B, T, HV, V];  states, d_states: [chunks, HV, V, K]
             pairs: [chunks, HV, 2, C, C];  same: [B, T, HV];  d_beta: [TILES + 1, B, T, HV];  reach: [chunks, HV]
             initial, d_final: [N, HV, V, K]
    """
    TILES: tl.constexpr = (K + ROWS - 1) // ROWS
    tile = tl.program_id(0) % TILES
    head = (tl.program_id(0) // TILES) % HV
    chunk = tl.program_id(0) // (TILES * HV)
    n, j, begin, length = find_sequence(chunk, table_ptr, cu_seqlens_ptr, T, per_sequence, VARLEN)
    # An empty sequence has a chunk as well, without a token.
    if (n < 0) | (j * C >= length):
        return

    own = head.to(tl.int64)
    place = chunk.to(tl.int64) * HV + own
    if tl.load(reach_ptr + place) <= REACH:
        return

    row = n.to(tl.int64) if not VARLEN else tl.zeros((), tl.int64)
    first = begin + j * C
    shared = (head // GROUP).to(tl.int64)
    count = tl.minimum(length - j * C, C)
    i = tl.arange(0, C)
    rows = tile * ROWS + tl.arange(0, ROWS)
    in_k = (rows < K)[None, :]
    present = i < count
    mask = present[:, None] & in_k
    tokens = (row * T + first) * HV + own
    offsets = (i * (HV * K))[:, None] + rows[None, :]
    q_at = (
        q_ptr
        + row * stride_qn
        + first * stride_qt
        + shared * stride_qh
        + (i * stride_qt)[:, None]
        + rows[None, :]
    )
    k_at = (
        k_ptr
        + row * stride_kn
        + first * stride_kt
        + shared * stride_kh
        + (i * stride_kt)[:, None]
        + rows[None, :]
    )
    do_ptr += row * stride_dn + first * stride_dt + own * stride_dh
    totals_ptr += tokens * K
    dx_ptr += tokens * V
    new_ptr += tokens * V
    states_ptr += place * (K * V)
    d_states_ptr += place * (K * V)
    pairs_ptr += place * (2 * C * C)
    square = i[:, None] * C + i[None, :]
    turned = i[:, None] + i[None, :] * C
    given = (n.to(tl.int64) * HV + own) * (K * V)
    opens = (j == 0) & (has_initial != 0)
    closes = ((j + 1) * C >= length) & (has_d_final != 0)
    middle_at = totals_ptr + (tl.minimum(C // 2, count) - 1) * (HV * K) + rows
    middle = tl.load(middle_at, mask=rows < K, other=0.0)
    end = tl.load(totals_ptr + (count - 1) * (HV * K) + rows, mask=rows < K, other=0.0)

    # What queries read, and what keys read, to be overwritten.
    seen, erased = _two_against_state(
        do_ptr, dx_ptr, states_ptr, rows, stride_dt, HV * V, i, present, K, V, C, ROWS, COLUMNS, PRECISION
    )
    total = tl.load(totals_ptr + offsets, mask=mask, other=0.0)  # [C, ROWS]
    since = tl.exp2(total.to(tl.float32))
    seen *= since * scale
    erased *= since
    k = tl.load(k_at, mask=mask, other=0.0)  # [C, ROWS]
    beta = tl.load(beta_ptr + tokens + i * HV, mask=present, other=0.0)
    same = tl.load(same_ptr + tokens + i * HV, mask=present, other=0.0)
    q = tl.load(q_at, mask=mask, other=0.0)  # [C, ROWS]
    weights = tl.load(pairs_ptr + square).to(tl.float32) * scale  # [C, C]
    dq, d_total = _from_earlier(
        q, k, weights, seen, total, middle, totals_ptr, i, count, HV * K, rows, in_k,
        LEVELS, PRECISE, True, PRECISION,
    )  # fmt: skip
    tl.store(dq_ptr + tokens * K + offsets, (dq + same[:, None] * k).to(dq_ptr.dtype.element_ty), mask=mask)
    d_beta = -tl.sum(erased * k, axis=1)
    tl.store(d_beta_ptr + tile.to(tl.int64) * stride_beta + tokens + i * HV, d_beta, mask=present)
    solves = tl.load(pairs_ptr + C * C + square)  # [C, C]
    dk, passed = _from_earlier(
        k, k, solves, erased * -beta[:, None], total, middle, totals_ptr, i, count, HV * K, rows, in_k,
        LEVELS, PRECISE, True, PRECISION,
    )  # fmt: skip
    d_total += passed
    # Put aside: the compiler would sum it up at the end, and keep all that it sums in registers until then.
    if not PRECISE:
        tl.store(d_log_decay_ptr + tokens * K + offsets, d_total, mask=mask)
    # Not to be merged: what the next part loads again would otherwise stay in registers.
    tl.debug_barrier()

    # What keys leave for later tokens and for the state.
    left = _against_state(new_ptr, d_states_ptr, rows, HV * V, i, present, K, V, C, ROWS, COLUMNS, PRECISION)
    total = tl.load(totals_ptr + offsets, mask=mask, other=0.0)  # [C, ROWS]
    left *= tl.exp2((end[None, :] - total).to(tl.float32))
    k = tl.load(k_at, mask=mask, other=0.0)  # [C, ROWS]
    # No decay lies between the last token and the end.
    d_left = tl.where((i < count - 1)[:, None], k.to(total.dtype) * left, 0.0)
    at_end = tl.sum(d_left, axis=0)
    q = tl.load(q_at, mask=mask, other=0.0)  # [C, ROWS]
    weights = tl.load(pairs_ptr + turned).to(tl.float32) * scale  # [C, C]
    solves = tl.load(pairs_ptr + C * C + turned)  # [C, C]
    dk, passed = _from_later(
        q, k, weights, solves, dk + left, total, middle, totals_ptr, i, count, HV * K, rows, in_k,
        LEVELS, PRECISE, True, PRECISION,
    )  # fmt: skip
    d_left += passed
    tl.store(dk_ptr + tokens * K + offsets, (dk + same[:, None] * q).to(dk_ptr.dtype.element_ty), mask=mask)
    passed = _passed_on(
        states_ptr, d_states_ptr, initial_ptr + given, d_final_ptr + given, opens, closes, rows, K, V, COLUMNS, ROWS
    )  # fmt: skip
    at_end += tl.exp2(end.to(tl.float32)) * passed
    if not PRECISE:
        d_total = tl.load(d_log_decay_ptr + tokens * K + offsets, mask=mask, other=0.0)
    d_rate = tl.cumsum(d_total - d_left, axis=0, reverse=True) + at_end[None, :]
    tl.store(d_log_decay_ptr + tokens * K + offsets, d_rate.to(tl.float32), mask=mask)
