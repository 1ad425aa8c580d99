# mypy: ignore-errors
"""The backward kernels of kda; letters as in `_kda_fwd`.

    sweep     dn = Pᵀ dO + left dS'ᵀ,   dx = Tᵀ dn,   dS = exp(G_C) dS' + seenᵀ dO - (beta read)ᵀ dx
    gradient  all else, chunk by chunk and in tiles of channels, from dx and dS' and from S and n, which a sweep forward left

The sweep walks over a sequence from its end and holds the gradient of the state transposed, as the forward sweep does the
state. With R = scale dO nᵀ up to the diagonal and M = -beta dx nᵀ below it,

    dq_i = scale exp(G_i) (dO Sᵀ)_i + Σ_{j ≤ i} R_ij k_j exp(G_i - G_j)
    dk_i = -beta_i exp(G_i) (dx Sᵀ)_i + Σ_{j < i} M_ij k_j exp(G_i - G_j)
           + exp(G_C - G_i) (n dS'ᵀ)_i + Σ_{j ≥ i} R_ji q_j exp(G_j - G_i) + Σ_{j > i} M_ji k_j exp(G_j - G_i)
    dv = beta dx,   dbeta = Σ dx (v - read S) - Σ (dx nᵀ) N

The gradient of a sum of log-decays G_i is what a decay up to i gets less what one from i on gets, of each channel; a log-decay
has the sum of those from its token to the end of the chunk, and what the decay of the whole chunk gets. The three lines of
dq and dk are made one after the other, each with a loop of its own over V: with the accumulators of all, registers would not
do. Transposes of products are products of their own: Triton before 3.7.1 gets a transposed accumulator wrong on Hopper.

Bytes for a token and value head, K = V = 128, C = 64, bfloat16: sweep reads seen, read, left, dO, T, P and writes dx, dS (2050);
gradient reads q, k, v, dO, dx, n, g, S, dS and writes dq, dk, dv, dg (4350).
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels._gla_fwd import REACH, decay_to_middle, most_left, power_from, power_until
from heddle.kernels._kda_fwd import LENGTHS, sum_up
from heddle.kernels.common.jit import find_sequence


@triton.jit(do_not_specialize=LENGTHS)
def _kda_backward_kernel(
    seen_ptr, read_ptr, left_ptr, do_ptr, beta_ptr, pairs_ptr, ends_ptr, d_final_ptr, dx_ptr, d_initial_ptr, d_states_ptr,
    summary_ptr, starts_ptr, table_ptr, offsets_ptr, cu_seqlens_ptr,
    stride_dn, stride_dt, stride_dh,
    T, HV, per_sequence, segments_per_sequence, segment_size, has_d_final,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    VARLEN: tl.constexpr, SEGMENTED: tl.constexpr, SUMMARY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx of one segment, the gradient of the state after each chunk, and that of the initial state where a sequence begins.

    With SUMMARY only the gradient of the state before the segment, of its own outputs.

    Shapes:  dx: [B, T, HV, V];  d_states: [chunks, HV, V, K];  starts, summary: [segments, HV, V, K]
             d_final, d_initial: [N, HV, K, V]
    """
    TILES: tl.constexpr = (V + COLUMNS - 1) // COLUMNS
    NARROW: tl.constexpr = seen_ptr.dtype.element_ty == tl.float16
    ENDS: tl.constexpr = 2 * K if NARROW else K
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
    own = head.to(tl.int64)

    i = tl.arange(0, C)
    rows = tl.arange(0, ROWS)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    tokens = (row * T + last) * HV + own
    seen_ptr += tokens * K
    read_ptr += tokens * K
    left_ptr += tokens * K
    dx_ptr += tokens * V
    beta_ptr += tokens
    do_ptr += row * stride_dn + last * stride_dt + own * stride_dh
    key_offsets = (i * (HV * K))[:, None] + rows[None, :]
    do_offsets = columns[:, None] + (i * stride_dt)[None, :]
    dx_offsets = columns[:, None] + (i * (HV * V))[None, :]
    square = i[:, None] * C + i[None, :]
    in_k = (rows < K)[None, :]
    in_v = (columns < V)[:, None]

    state_mask = in_v & in_k
    own_state = (n.to(tl.int64) * HV + own) * (K * V) + columns[:, None] + (rows * V)[None, :]
    state_offsets = columns[:, None] * K + rows[None, :]
    own_segment = (segment.to(tl.int64) * HV + own) * (K * V) + state_offsets
    if SUMMARY:
        d_state = tl.zeros([COLUMNS, ROWS], tl.float32)
    elif SEGMENTED:
        d_state = tl.load(starts_ptr + own_segment, mask=state_mask, other=0.0)
    else:
        d_state = tl.load(d_final_ptr + own_state, mask=state_mask & (has_d_final != 0), other=0.0)
    for index in range(0, chunks):
        present = i < length - (chunks - 1 - index) * C
        narrow = present[:, None] if K == ROWS else present[:, None] & in_k
        kept = in_v & present[None, :]
        seen = tl.load(seen_ptr + key_offsets, mask=narrow, other=0.0)  # [C, ROWS]
        read = tl.load(read_ptr + key_offsets, mask=narrow, other=0.0)  # [C, ROWS]
        left = tl.load(left_ptr + key_offsets, mask=narrow, other=0.0)  # [C, ROWS]
        do = tl.load(do_ptr + do_offsets, mask=kept, other=0.0)  # [COLUMNS, C]
        beta = tl.load(beta_ptr + i * HV, mask=present, other=0.0)
        end = tl.load(ends_ptr + place * ENDS + rows, mask=rows < K, other=0.0)
        if NARROW:
            opening = tl.load(ends_ptr + place * ENDS + K + rows, mask=rows < K, other=0.0)
            end -= opening
        pairs_at = pairs_ptr + place * (2 * C * C) + square
        solved = tl.load(pairs_at)  # [C, C]
        attention = tl.load(pairs_at + C * C)  # [C, C]
        half = d_state.to(left.dtype)
        if not SUMMARY:
            tl.store(d_states_ptr + place * (K * V) + state_offsets, half, mask=state_mask)
        d_new = tl.dot(half, tl.trans(left), input_precision=PRECISION)  # [COLUMNS, C]
        d_new = tl.dot(do, attention, d_new, input_precision=PRECISION)
        dx = tl.dot(d_new.to(left.dtype), solved, d_new, input_precision=PRECISION)  # [COLUMNS, C]
        if not SUMMARY:
            tl.store(dx_ptr + dx_offsets, dx.to(left.dtype), mask=kept)
        d_state = tl.dot(do, seen, d_state * tl.exp2(end)[None, :], input_precision=PRECISION)
        d_state = tl.dot((dx * -beta[None, :]).to(left.dtype), read, d_state, input_precision=PRECISION)
        if NARROW:
            # Loaded again: registers are short.
            opening = tl.load(ends_ptr + place * ENDS + K + rows, mask=rows < K, other=0.0)
            d_state *= tl.exp2(opening)[None, :]
        seen_ptr -= C * HV * K
        read_ptr -= C * HV * K
        left_ptr -= C * HV * K
        do_ptr -= C * stride_dt
        dx_ptr -= C * HV * V
        beta_ptr -= C * HV
        place -= HV
    if SUMMARY:
        tl.store(summary_ptr + own_segment, d_state, mask=state_mask)
    elif j == 0:
        tl.store(d_initial_ptr + own_state, d_state, mask=state_mask)


@triton.jit
def _passed_on(
    states_ptr, d_states_ptr, initial_ptr, d_final_ptr, opens, closes, rows,
    K: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of each channel, the product of the state before a chunk with the gradient of that after it, in full where known."""
    passed = tl.zeros([ROWS], tl.float32)
    for tile in range(0, V, COLUMNS):
        columns = tile + tl.arange(0, COLUMNS)
        offsets = columns[:, None] * K + rows[None, :]
        mask = (columns < V)[:, None] & (rows < K)[None, :]
        if opens:
            state = tl.load(initial_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        else:
            state = tl.load(states_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if closes:
            d_state = tl.load(d_final_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        else:
            d_state = tl.load(d_states_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        passed += tl.sum(state * d_state, axis=0)
    return passed


@triton.jit
def _rows_against_state(
    rows_at, other_at, states_ptr, rows, stride, other_stride, i, present,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The products of tokens with a state and with other tokens, summed over V.

    Shapes:  rows, other: [C, V];  state: [V, K];  out: [C, ROWS], [C, C]
    """
    of_state = tl.zeros([C, ROWS], tl.float32)
    of_other = tl.zeros([C, C], tl.float32)
    for tile in range(0, V, COLUMNS):
        columns = tile + tl.arange(0, COLUMNS)
        in_v = columns < V
        kept = present[:, None] & in_v[None, :]
        state_mask = in_v[:, None] & (rows < K)[None, :]
        x = tl.load(rows_at + (i * stride)[:, None] + columns[None, :], mask=kept, other=0.0)  # [C, COLUMNS]
        y = tl.load(other_at + (i * other_stride)[:, None] + columns[None, :], mask=kept, other=0.0)
        state = tl.load(states_ptr + columns[:, None] * K + rows[None, :], mask=state_mask, other=0.0)
        of_state = tl.dot(x, state, of_state, input_precision=PRECISION)
        of_other = tl.dot(x, tl.trans(y), of_other, input_precision=PRECISION)
    return of_state, of_other


@triton.jit
def _tokens_against_tokens(
    x_ptr,
    y_ptr,
    stride,
    i,
    present,
    V: tl.constexpr,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The products of tokens with others, summed over V.  Shapes:  x, y: [C, V];  out: [C, C]"""
    found = tl.zeros([C, C], tl.float32)
    for tile in range(0, V, COLUMNS):
        columns = tile + tl.arange(0, COLUMNS)
        kept = present[:, None] & (columns < V)[None, :]
        offsets = (i * stride)[:, None] + columns[None, :]
        x = tl.load(x_ptr + offsets, mask=kept, other=0.0)  # [C, COLUMNS]
        y = tl.load(y_ptr + offsets, mask=kept, other=0.0)  # [C, COLUMNS]
        found = tl.dot(x, tl.trans(y), found, input_precision=PRECISION)
    return found


@triton.jit
def _from_earlier(
    x, k, weights, fade, total, middle, totals_ptr, i, count, stride, rows, in_k,
    LEVELS: tl.constexpr, PRECISE: tl.constexpr, HALVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_{j < i} weights_ij k_j exp(G_i - G_j), added to `fade`, and x times it, added to x times `fade`.

    Products are of operands as they were rounded, so that what both tokens of a pair pass on cancels after them.

    Shapes:  x, k, fade: [C, ROWS];  weights: [C, C], 0 but below the diagonal
    """
    SUM: tl.constexpr = tl.float64 if PRECISE else tl.float32
    passed = x.to(SUM) * fade
    if not HALVED:
        since = power_from(middle, total)
        earlier = (k * power_until(middle, total)).to(k.dtype)
        gathered = tl.dot(weights.to(k.dtype), earlier, input_precision=PRECISION)
        passed += (x * since).to(x.dtype).to(SUM) * gathered
        fade += gathered * since
    else:
        NARROW: tl.constexpr = x.dtype == tl.float16
        most = most_left(totals_ptr, total, i, count, stride, rows, in_k, NARROW)
        over = 1.0 / most
        for level in range(LEVELS):
            fading = decay_to_middle(totals_ptr, total, i, count, stride, rows, in_k, level)
            second = ((i >> level) & 1)[:, None] != 0
            pair = (i >> (level + 1))[:, None] == (i >> (level + 1))[None, :]
            earlier = tl.where(second, 0.0, k * fading).to(k.dtype)
            corner = tl.where(pair & second, weights, 0.0).to(k.dtype)
            gathered = tl.dot(corner, earlier, input_precision=PRECISION)
            later = (x * (tl.where(second, fading * over, 0.0) if NARROW else fading)).to(x.dtype)
            passed += later.to(SUM) * (gathered * most)
            fade += gathered * fading
    return fade, passed


@triton.jit
def _from_later(
    q, k, weights, solves, fade, total, middle, totals_ptr, i, count, stride, rows, in_k,
    LEVELS: tl.constexpr, PRECISE: tl.constexpr, HALVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_{i > j} (weights_ji q_i + solves_ji k_i) exp(G_i - G_j), added to `fade`, and k times it.

    Shapes:  q, k, fade: [C, ROWS];  weights, solves: [C, C], 0 but above the diagonal
    """
    SUM: tl.constexpr = tl.float64 if PRECISE else tl.float32
    if not HALVED:
        since = power_from(middle, total)
        until = power_until(middle, total)
        gathered = tl.dot(weights.to(q.dtype), (q * since).to(q.dtype), input_precision=PRECISION)
        gathered = tl.dot(solves.to(k.dtype), (k * since).to(k.dtype), gathered, input_precision=PRECISION)
        passed = (k * until).to(k.dtype).to(SUM) * gathered
        fade += gathered * until
    else:
        passed = k.to(SUM) * 0.0
        most = most_left(totals_ptr, total, i, count, stride, rows, in_k, q.dtype == tl.float16)
        over = 1.0 / most
        for level in range(LEVELS):
            fading = decay_to_middle(totals_ptr, total, i, count, stride, rows, in_k, level)
            second = ((i >> level) & 1)[:, None] != 0
            pair = (i >> (level + 1))[:, None] == (i >> (level + 1))[None, :]
            first = pair & (second == 0)
            later = tl.where(second, q * (fading * over), 0.0).to(q.dtype)
            gathered = tl.dot(tl.where(first, weights, 0.0).to(q.dtype), later, input_precision=PRECISION)
            later = tl.where(second, k * (fading * over), 0.0).to(k.dtype)
            corner = tl.where(first, solves, 0.0).to(k.dtype)
            gathered = tl.dot(corner, later, gathered, input_precision=PRECISION) * most
            passed += (k * fading).to(k.dtype).to(SUM) * gathered
            fade += gathered * fading
    return fade, passed


@triton.jit
def _values_gradient(
    v_ptr, dx_ptr, new_ptr, keys_ptr, dv_ptr, beta, stride_vt, HV, i, present,
    V: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores dv of a chunk; of dbeta, what does not come through the state.  Shapes:  [C]"""
    d_beta = tl.zeros([C], tl.float32)
    solves = tl.zeros([C, C], tl.float32)
    for tile in range(0, V, COLUMNS):
        columns = tile + tl.arange(0, COLUMNS)
        kept = present[:, None] & (columns < V)[None, :]
        dense = (i * (HV * V))[:, None] + columns[None, :]
        dx = tl.load(dx_ptr + dense, mask=kept, other=0.0)  # [C, COLUMNS]
        new = tl.load(new_ptr + dense, mask=kept, other=0.0)  # [C, COLUMNS]
        v = tl.load(v_ptr + (i * stride_vt)[:, None] + columns[None, :], mask=kept, other=0.0)
        solves = tl.dot(dx, tl.trans(new), solves, input_precision=PRECISION)
        d_beta += tl.sum(dx.to(tl.float32) * v, axis=1)
        tl.store(dv_ptr + dense, (beta[:, None] * dx).to(dx.dtype), mask=kept)
    keys = tl.load(keys_ptr + i[:, None] * C + i[None, :]).to(tl.float32)  # [C, C], 0 but below the diagonal
    return d_beta - tl.sum(solves * keys, axis=1)


@triton.jit(do_not_specialize=LENGTHS)
def _kda_gradient_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, log_decay_ptr, beta_ptr, totals_ptr, dx_ptr, new_ptr, keys_ptr, states_ptr, d_states_ptr,
    initial_ptr, d_final_ptr, dq_ptr, dk_ptr, dv_ptr, d_log_decay_ptr, d_beta_ptr, reach_ptr, table_ptr, cu_seqlens_ptr,
    stride_qn, stride_qt, stride_qh,
    stride_kn, stride_kt, stride_kh,
    stride_vn, stride_vt, stride_vh,
    stride_dn, stride_dt, stride_dh,
    stride_gn, stride_gt, stride_gh,
    stride_beta, T, HV, per_sequence, has_initial, has_d_final, scale,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, VARLEN: tl.constexpr, PRECISE: tl.constexpr, HALVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS channels of one chunk of one value head; HALVED: where one product does not do for all pairs.

    Shapes:  totals, dq, dk, d_log_decay: [B, T, HV, K];  dx, new, dv: [B, T, HV, V];  states, d_states: [chunks, HV, V, K]
             keys: [chunks, HV, C, C];  d_beta: [TILES, B, T, HV];  reach: [chunks, HV];  initial, d_final: [N, HV, V, K]
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
    far = tl.load(reach_ptr + place) > REACH
    if far != HALVED:
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
    q_ptr += row * stride_qn + first * stride_qt + shared * stride_qh
    k_ptr += row * stride_kn + first * stride_kt + shared * stride_kh
    v_ptr += row * stride_vn + first * stride_vt + own * stride_vh
    do_ptr += row * stride_dn + first * stride_dt + own * stride_dh
    log_decay_ptr += row * stride_gn + first * stride_gt + own * stride_gh
    totals_ptr += tokens * K
    dx_ptr += tokens * V
    new_ptr += tokens * V
    states_ptr += place * (K * V)
    d_states_ptr += place * (K * V)
    given = (n.to(tl.int64) * HV + own) * (K * V)
    beta = tl.load(beta_ptr + tokens + i * HV, mask=present, other=0.0)
    total, middle, end, _reach = sum_up(
        log_decay_ptr + (i * stride_gt)[:, None] + rows[None, :], mask, i, C, PRECISE
    )
    if HALVED:
        tl.store(totals_ptr + offsets, total, mask=mask)
        # What threads stored, others load.
        tl.debug_barrier()
    since = tl.exp2(total.to(tl.float32))
    lower = i[:, None] > i[None, :]
    upper = i[:, None] < i[None, :]
    q_at = q_ptr + (i * stride_qt)[:, None] + rows[None, :]
    k_at = k_ptr + (i * stride_kt)[:, None] + rows[None, :]

    # What queries read.
    seen, weights = _rows_against_state(
        do_ptr, new_ptr, states_ptr, rows, stride_dt, HV * V, i, present, K, V, C, ROWS, COLUMNS, PRECISION
    )
    q = tl.load(q_at, mask=mask, other=0.0)  # [C, ROWS]
    k = tl.load(k_at, mask=mask, other=0.0)  # [C, ROWS]
    weights *= scale
    # No decay lies between a token and itself.
    same = tl.sum(tl.where(i[:, None] == i[None, :], weights, 0.0), axis=1)
    dq, d_total = _from_earlier(
        q, k, tl.where(lower, weights, 0.0), seen * (since * scale), total, middle, totals_ptr, i, count, HV * K, rows, in_k,
        LEVELS, PRECISE, HALVED, PRECISION,
    )  # fmt: skip
    tl.store(dq_ptr + tokens * K + offsets, (dq + same[:, None] * k).to(dq_ptr.dtype.element_ty), mask=mask)
    # Not to be merged: what the next part loads again would otherwise stay in registers.
    tl.debug_barrier()

    # What keys read, to be overwritten.
    erased, solves = _rows_against_state(
        dx_ptr, new_ptr, states_ptr, rows, HV * V, HV * V, i, present, K, V, C, ROWS, COLUMNS, PRECISION
    )
    k = tl.load(k_at, mask=mask, other=0.0)  # [C, ROWS]
    erased *= since
    d_beta = -tl.sum(erased * k, axis=1)
    if tile == 0:
        d_beta += _values_gradient(
            v_ptr, dx_ptr, new_ptr, keys_ptr + place * (C * C), dv_ptr + tokens * V, beta, stride_vt, HV, i, present,
            V, C, COLUMNS, PRECISION,
        )  # fmt: skip
    tl.store(d_beta_ptr + tile.to(tl.int64) * stride_beta + tokens + i * HV, d_beta, mask=present)
    solves = tl.where(lower, solves * -beta[:, None], 0.0)
    dk, passed = _from_earlier(
        k, k, solves, erased * -beta[:, None], total, middle, totals_ptr, i, count, HV * K, rows, in_k,
        LEVELS, PRECISE, HALVED, PRECISION,
    )  # fmt: skip
    d_total += passed
    tl.debug_barrier()

    # What keys leave for later tokens and for the state.
    left, weights = _rows_against_state(
        new_ptr, do_ptr, d_states_ptr, rows, HV * V, stride_dt, i, present, K, V, C, ROWS, COLUMNS, PRECISION
    )
    solves = _tokens_against_tokens(new_ptr, dx_ptr, HV * V, i, present, V, C, COLUMNS, PRECISION)
    q = tl.load(q_at, mask=mask, other=0.0)  # [C, ROWS]
    k = tl.load(k_at, mask=mask, other=0.0)  # [C, ROWS]
    left *= tl.exp2((end[None, :] - total).to(tl.float32))
    passed = k.to(total.dtype) * left
    if HALVED:
        # No decay lies between the last token and the end.
        passed = tl.where((i < count - 1)[:, None], passed, 0.0)
    at_end = tl.sum(passed, axis=0)
    d_total -= passed
    weights = tl.where(upper, weights * scale, 0.0)
    solves = tl.where(upper, solves * -beta[None, :], 0.0)
    dk, passed = _from_later(
        q, k, weights, solves, dk + left, total, middle, totals_ptr, i, count, HV * K, rows, in_k,
        LEVELS, PRECISE, HALVED, PRECISION,
    )  # fmt: skip
    d_total -= passed
    tl.store(dk_ptr + tokens * K + offsets, (dk + same[:, None] * q).to(dk_ptr.dtype.element_ty), mask=mask)
    opens = (j == 0) & (has_initial != 0)
    closes = ((j + 1) * C >= length) & (has_d_final != 0)
    passed = _passed_on(
        states_ptr, d_states_ptr, initial_ptr + given, d_final_ptr + given, opens, closes, rows, K, V, COLUMNS, ROWS
    )  # fmt: skip
    at_end += tl.exp2(end.to(tl.float32)) * passed
    d_rate = tl.cumsum(d_total, axis=0, reverse=True) + at_end[None, :]
    tl.store(d_log_decay_ptr + tokens * K + offsets, d_rate.to(tl.float32), mask=mask)
