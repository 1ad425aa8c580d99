# mypy: ignore-errors
"""The forward kernels of gated_delta_rule and delta_rule.

Within a chunk of C tokens, with S the state before it and D_ij = exp(log-decays after j up to i):

    solve   T = (I + A)^-1,  A_ij = beta_i (k_i · k_j) D_ij below the diagonal;   P_ij = scale (q_i · k_j) D_ij up to it
    state   x = beta (v - seen K S),   n = T x,   o = scale seen (Q S) + P n,   S' = over S + (left K)ᵀ n

`seen`, `left` and `over` are the decays from the beginning of the chunk to a token, from a token to the end, and of the
whole chunk. The first kernel treats all chunks at once, the second walks over a sequence: its chain of dependent products
is K S, T x, Kᵀ n. It holds the state transposed, [V, K], so that each product of the chain takes the one before as its
left operand, which stays in registers; only inputs pass through shared memory.

Bytes for a token and head, K = V = 128, C = 64, bfloat16: solve reads q, k and writes T, P (784); state reads q, k, v, T, P
and writes o (1296), and for a backward pass S and n (768). Products: 2 C (2 K + C) + the inverse, and 2 (3 K V + 2 C V).
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels.common.jit import LOG2_E, ask_for_rows, find_sequence

# A new length must not mean a new compilation, nor must a given state.
LENGTHS = (
    "T", "H", "HV", "per_sequence", "segments_per_sequence", "segment_size", "has_initial", "has_d_final", "has_given",
)  # fmt: skip


@triton.jit
def _inverse_product(x, y, PRECISION: tl.constexpr):
    half: tl.constexpr = PRECISION == "fp16"
    return tl.dot(x.to(tl.float16), y.to(tl.float16)) if half else tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def unit_lower_inverse(strict, C: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + strict)^-1 of a strictly lower triangular [C, C], C = 2^LEVELS.

    Doubles the blocks on the diagonal that are inverted already. Powers of `strict`, as in a Neumann series, would
    grow to millions where keys repeat; here all entries stay within 2 for keys of length 1 and beta up to 2, so that
    float16 is more exact than bfloat16 or tf32.
    """
    row = tl.arange(0, C)[:, None]
    column = tl.arange(0, C)[None, :]
    pair = (row // 2 == column // 2) & (row != column)
    inverse = tl.where(row == column, 1.0, 0.0) - tl.where(pair, strict, 0.0)
    for level in tl.static_range(1, LEVELS):
        product = _inverse_product(inverse, strict, PRECISION)
        product = _inverse_product(product, inverse, PRECISION)
        # Of one pair of blocks of 2^level rows, but not of one block.
        below = (row >> (level + 1) == column >> (level + 1)) & (row >> level > column >> level)
        inverse -= tl.where(below, product, 0.0)
    return inverse


@triton.jit
def decays(log_decay_ptr, at, present):
    """Of one chunk: the sums of log-decays up to each token (and what their rounding leaves out), and what is left of the
    beginning at each token, of each token at the end, and of the beginning at the end.

    Sums are float64: differences of them count, and a strong decay would swallow a weak one in float32.
    """
    rate = tl.load(log_decay_ptr + at, mask=present, other=0.0).to(tl.float64)
    exact = tl.cumsum(rate, axis=0) * LOG2_E
    whole = tl.sum(rate, axis=0) * LOG2_E
    total = exact.to(tl.float32)
    rest = (exact - total).to(tl.float32)
    left = tl.exp2((whole - exact).to(tl.float32))
    return total, rest, tl.exp2(total), left, tl.exp2(whole.to(tl.float32))


@triton.jit
def decay_from_column(total, rest, causal):
    """The decay from the token of a column to that of a row, where `causal`; 0 elsewhere."""
    power = (total[:, None] - total[None, :]) + (rest[:, None] - rest[None, :])
    # Masked before exp2: elsewhere the power could overflow.
    return tl.where(causal, tl.exp2(tl.where(causal, power, 0.0)), 0.0)


@triton.jit
def decay_from_row(total, rest, causal):
    """The decay from the token of a row to that of a column, where `causal`; 0 elsewhere."""
    power = (total[None, :] - total[:, None]) + (rest[None, :] - rest[:, None])
    return tl.where(causal, tl.exp2(tl.where(causal, power, 0.0)), 0.0)


@triton.jit(do_not_specialize=LENGTHS)
def _gated_delta_rule_fwd_solve_kernel(
    q_ptr, k_ptr, log_decay_ptr, beta_ptr, pairs_ptr, gates_ptr, table_ptr, cu_seqlens_ptr,
    stride_qn, stride_qt, stride_qh,
    stride_kn, stride_kt, stride_kh,
    T, H, per_sequence, scale,
    K: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
    GATED: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr, SOLVE: tl.constexpr,
):  # fmt: skip
    """T - I and P of one chunk and value head; and its gates as the other kernels want them.

    P is gone before the inverse begins, so that four programs share a multiprocessor.

    Shapes:  pairs: [chunks, HV, 2, C, C];  gates: [chunks, HV, 3, C] (beta, seen, left), float32
    """
    own = tl.program_id(0) % (H * GROUP)
    head = own // GROUP
    chunk = tl.program_id(0) // (H * GROUP)
    n, j, begin, length = find_sequence(chunk, table_ptr, cu_seqlens_ptr, T, per_sequence, VARLEN)
    # An empty sequence has a chunk as well, without a token.
    if (n < 0) | (j * C >= length):
        return

    row = n.to(tl.int64) if not VARLEN else tl.zeros((), tl.int64)
    first = begin + j * C
    i = tl.arange(0, C)
    rows = tl.arange(0, ROWS)
    present = i < length - j * C
    mask = present[:, None] & (rows < K)[None, :]
    q_ptr += row * stride_qn + first * stride_qt + head.to(tl.int64) * stride_qh
    k_ptr += row * stride_kn + first * stride_kt + head.to(tl.int64) * stride_kh
    q = tl.load(q_ptr + (i * stride_qt)[:, None] + rows[None, :], mask=mask, other=0.0)  # [C, ROWS]
    k = tl.load(k_ptr + (i * stride_kt)[:, None] + rows[None, :], mask=mask, other=0.0)  # [C, ROWS]
    keys = tl.dot(k, tl.trans(k), input_precision=PRECISION)  # [C, C]
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [C, C]

    at = (row * T + first + i) * (H * GROUP) + own
    place = chunk.to(tl.int64) * (H * GROUP) + own
    beta = tl.load(beta_ptr + at, mask=present, other=0.0)
    gates_at = gates_ptr + place * (3 * C) + i
    if GATED:
        total, rest, seen, left, _ = decays(log_decay_ptr, at, present)
        # By one mask: a power of -inf is 0.
        power = (total[:, None] - total[None, :]) + (rest[:, None] - rest[None, :])
        within = tl.exp2(tl.where(i[:, None] >= i[None, :], power, float("-inf")))
        tl.store(gates_at + C, seen)
        tl.store(gates_at + 2 * C, left)
    else:
        within = tl.where(i[:, None] >= i[None, :], 1.0, 0.0)
    tl.store(gates_at, beta)
    pairs_at = pairs_ptr + place * (2 * C * C) + i[:, None] * C + i[None, :]
    tl.store(pairs_at + C * C, (scores * within).to(k.dtype))
    strict = tl.where(i[:, None] > i[None, :], beta[:, None] * keys * within, 0.0)
    solved = unit_lower_inverse(strict, C, LEVELS, SOLVE)
    # Without the diagonal: what goes through it need not be rounded.
    solved = tl.where(i[:, None] == i[None, :], 0.0, solved)
    tl.store(pairs_at, solved.to(k.dtype))


@triton.jit
def _ask_for_chunk(
    q_ptr, k_ptr, v_ptr, pairs_ptr, stride_qt, stride_kt, stride_vt, t, length, place, tile, HV,
    C: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, SUMMARY: tl.constexpr,
):  # fmt: skip
    """Asks for the chunk after the one at these pointers (pairs: at `place`); the last one for itself.

    The pipeline asks for a chunk when the one before is done; from the L2 cache it comes sooner.
    """
    step = tl.where(t + C < length, 1, 0)
    there = length - t - step * C
    SQUARES: tl.constexpr = C if SUMMARY else 2 * C
    ask_for_rows(k_ptr + step * (C * stride_kt), stride_kt, there, C, K)
    ask_for_rows(pairs_ptr + (place + step * HV) * (2 * C * C), C, SQUARES, SQUARES, C)
    if not SUMMARY:
        ask_for_rows(q_ptr + step * (C * stride_qt), stride_qt, there, C, K)
        ask_for_rows(v_ptr + (step * (C * stride_vt) + tile * COLUMNS), stride_vt, there, C, COLUMNS)


@triton.jit(do_not_specialize=LENGTHS)
def _gated_delta_rule_fwd_state_kernel(
    q_ptr, k_ptr, v_ptr, pairs_ptr, gates_ptr, initial_ptr, out_ptr, final_ptr, states_ptr, new_ptr, last_ptr,
    rest_ptr, summary_ptr, starts_ptr, table_ptr, offsets_ptr, cu_seqlens_ptr,
    stride_qn, stride_qt, stride_qh,
    stride_kn, stride_kt, stride_kh,
    stride_vn, stride_vt, stride_vh,
    T, H, per_sequence, segments_per_sequence, segment_size, has_initial, scale,
    K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    GATED: tl.constexpr, VARLEN: tl.constexpr, KEEP: tl.constexpr, PARTS: tl.constexpr,
    SEGMENTED: tl.constexpr, SUMMARY: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of one segment, and the final state where a sequence ends; with KEEP also what the backward pass wants.

    With PARTS a state gets what is written in two parts, of which the second holds what rounding takes from the first: the
    gradient of a log-decay is a product of states, and this rounding weighed most in it. What it takes from n of the last chunk
    is kept too, in `rest`: nothing fades there before the gradient of the final state.

    With SUMMARY only what the segment does to a state: the state it leaves when begun with zeros, and, without values, what
    it makes of each unit vector.

    Shapes:  states: [chunks, HV, V, K], the state before each chunk;  last: [N, HV, V, K], before the last, float32
             new: [B, T, HV, V];  rest: [N, C, HV, V];  starts: [segments, HV, V, K];  summary: [segments, HV, V + K, K]
    """
    VALUES: tl.constexpr = (V + COLUMNS - 1) // COLUMNS
    TILES: tl.constexpr = VALUES + ((K + COLUMNS - 1) // COLUMNS if SUMMARY else 0)
    HV = H * GROUP
    tile = tl.program_id(0) % TILES
    head = (tl.program_id(0) // TILES) % HV
    segment = tl.program_id(0) // (TILES * HV)
    n, j, begin, whole = find_sequence(segment, table_ptr, cu_seqlens_ptr, T, segments_per_sequence, VARLEN)
    ends = (j + 1) * segment_size >= whole
    # Nothing follows the last segment of a sequence; backward it is the first.
    if (n < 0) | (SUMMARY & ends & ((tile < VALUES) | (j == 0))):
        return

    row = n.to(tl.int64) if not VARLEN else tl.zeros((), tl.int64)
    place = tl.load(offsets_ptr + n).to(tl.int64) if VARLEN else row * per_sequence
    place = (place + j * (segment_size // C)) * HV + head
    begin += j * segment_size
    length = tl.minimum(whole - j * segment_size, segment_size)

    i = tl.arange(0, C)
    rows = tl.arange(0, ROWS)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    q_ptr += row * stride_qn + begin * stride_qt + (head // GROUP).to(tl.int64) * stride_qh
    k_ptr += row * stride_kn + begin * stride_kt + (head // GROUP).to(tl.int64) * stride_kh
    v_ptr += row * stride_vn + begin * stride_vt + head.to(tl.int64) * stride_vh
    moved = (row * T + begin) * (HV * V) + head.to(tl.int64) * V
    out_ptr += moved
    new_ptr += moved
    q_offsets = (i * stride_qt)[:, None] + rows[None, :]
    k_offsets = (i * stride_kt)[:, None] + rows[None, :]
    v_offsets = columns[:, None] + (i * stride_vt)[None, :]
    out_offsets = columns[:, None] + (i * (HV * V))[None, :]
    square = i[:, None] * C + i[None, :]
    in_k = (rows < K)[None, :]
    in_v = (columns < V)[:, None]

    state_mask = in_v & in_k
    own_state = (n.to(tl.int64) * HV + head) * (K * V) + columns[:, None] + (rows * V)[None, :]
    state_offsets = columns[:, None] * K + rows[None, :]
    own_segment = segment.to(tl.int64) * HV + head
    if SUMMARY:
        unit = columns - VALUES * COLUMNS
        state = tl.where(unit[:, None] == rows[None, :], 1.0, 0.0)
    elif SEGMENTED:
        state = tl.load(starts_ptr + own_segment * (K * V) + state_offsets, mask=state_mask, other=0.0)
    else:
        state = tl.load(initial_ptr + own_state, mask=state_mask & (has_initial != 0), other=0.0)
    over = 1.0
    if GATED:
        # One chunk ahead: nothing hides the latency of a scalar.
        over = tl.load(gates_ptr + place * (3 * C) + 2 * C - 1, mask=length > 0, other=1.0)
    for t in range(0, length, C):
        if AHEAD:
            _ask_for_chunk(
                q_ptr, k_ptr, v_ptr, pairs_ptr, stride_qt, stride_kt, stride_vt, t, length, place, tile, HV,
                C, K, COLUMNS, SUMMARY,
            )  # fmt: skip
        present = i < length - t
        narrow = present[:, None] if K == ROWS else present[:, None] & in_k
        kept = in_v & present[None, :]
        k = tl.load(k_ptr + k_offsets, mask=narrow, other=0.0)  # [C, ROWS]
        v = tl.load(v_ptr + v_offsets, mask=kept, other=0.0)  # [COLUMNS, C]
        pairs_at = pairs_ptr + place * (2 * C * C) + square
        solved = tl.load(pairs_at)  # [C, C]
        gates_at = gates_ptr + place * (3 * C) + i
        half = state.to(k.dtype)
        if KEEP:
            tl.store(states_ptr + place * (K * V) + state_offsets, half, mask=state_mask)
            if GATED & ends & (t + C >= length):
                own_last = (n.to(tl.int64) * HV + head) * (K * V)
                tl.store(last_ptr + own_last + state_offsets, state, mask=state_mask)
        wrong = tl.dot(half, tl.trans(k), input_precision=PRECISION)  # [COLUMNS, C]
        if not SUMMARY:
            q = tl.load(q_ptr + q_offsets, mask=narrow, other=0.0)  # [C, ROWS]
            out = tl.dot(half, tl.trans(q), input_precision=PRECISION)  # [COLUMNS, C]
        if GATED:
            seen = tl.load(gates_at + C)
            wrong *= seen[None, :]
            if not SUMMARY:
                out *= (seen * scale)[None, :]
        elif not SUMMARY:
            out *= scale
        wrong = (v - wrong) * tl.load(gates_at)[None, :]
        new = tl.dot(wrong.to(k.dtype), tl.trans(solved), wrong, input_precision=PRECISION)  # [COLUMNS, C]
        if KEEP & GATED:
            rest_at = rest_ptr + n.to(tl.int64) * (C * HV * V) + head * V + out_offsets
            # By a mask: a branch here spills registers.
            tl.store(rest_at, (new - new.to(k.dtype)).to(k.dtype), mask=in_v & ends & (t + C >= length))
        if GATED:
            written = new * tl.load(gates_at + 2 * C)[None, :]
            rounded = written.to(k.dtype)
            state = tl.dot(rounded, k, state * over, input_precision=PRECISION)
            if PARTS:
                state = tl.dot((written - rounded).to(k.dtype), k, state, input_precision=PRECISION)
            ahead = gates_ptr + (place + HV) * (3 * C) + 2 * C - 1
            over = tl.load(ahead, mask=t + C < length, other=1.0)
            new = new.to(k.dtype)
        else:
            new = new.to(k.dtype)
            state = tl.dot(new, k, state, input_precision=PRECISION)
        if not SUMMARY:
            attention = tl.load(pairs_at + C * C)  # [C, C]
            out = tl.dot(new, tl.trans(attention), out, input_precision=PRECISION)
            tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=kept)
        if KEEP:
            tl.store(new_ptr + out_offsets, new, mask=kept)
        q_ptr += C * stride_qt
        k_ptr += C * stride_kt
        v_ptr += C * stride_vt
        out_ptr += C * HV * V
        new_ptr += C * HV * V
        place += HV
    if SUMMARY:
        line = tl.where(unit < 0, columns, V + unit)
        known = tl.where(unit < 0, columns < V, unit < K)
        summary_ptr += own_segment * ((V + K) * K)
        tl.store(summary_ptr + line[:, None] * K + rows[None, :], state, mask=known[:, None] & in_k)
    elif ends:
        tl.store(final_ptr + own_state, state, mask=state_mask)


@triton.jit(do_not_specialize=LENGTHS)
def _gated_delta_rule_carry_kernel(
    summary_ptr, added_ptr, starts_ptr, given_ptr, offsets_ptr, HV, per_sequence, has_given,
    K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    BACKWARD: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From what segments do to a state, the state each starts from; backward, the gradient of the state each ends with.

        start_(p+1) = added_p + start_p R_p,   end_(p-1) = added_p + end_p R_pᵀ

    Shapes:  R: summary[..., V:, :];  added: summary forward, [segments, HV, V, K] backward;  starts: [segments, HV, V, K]
    """
    sequence = tl.program_id(0) // HV
    head = tl.program_id(0) % HV
    if VARLEN:
        first = tl.load(offsets_ptr + sequence).to(tl.int32)
        count = tl.load(offsets_ptr + sequence + 1).to(tl.int32) - first
    else:
        first = sequence * per_sequence
        count = per_sequence
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_v = (columns < V)[:, None]
    mask = in_v & (rows < K)[None, :]
    offsets = columns[:, None] * K + rows[None, :]
    block = tl.arange(0, BLOCK)

    given_ptr += (sequence.to(tl.int64) * HV + head) * (K * V) + columns[:, None] + (rows * V)[None, :]
    state = tl.load(given_ptr, mask=mask & (has_given != 0), other=0.0)  # [COLUMNS, ROWS]
    for p in range(0, count):
        index = (first + (count - 1 - p if BACKWARD else p)).to(tl.int64) * HV + head
        starts_at = starts_ptr + index * (K * V)
        tl.store(starts_at + offsets, state, mask=mask)
        if p + 1 < count:
            added_at = added_ptr + index * (K * V if BACKWARD else (V + K) * K)
            passes_at = summary_ptr + index * ((V + K) * K) + V * K
            state = tl.load(added_at + offsets, mask=mask, other=0.0)
            # Parts of what was just stored are operands now; other threads stored them.
            tl.debug_barrier()
            for at in range(0, K, BLOCK):
                part = tl.load(starts_at + columns[:, None] * K + (at + block)[None, :], mask=in_v, other=0.0)
                if BACKWARD:
                    passes = tl.load(
                        passes_at + rows[None, :] * K + (at + block)[:, None],
                        mask=(rows < K)[None, :],
                        other=0.0,
                    )
                else:
                    passes = tl.load(
                        passes_at + (at + block)[:, None] * K + rows[None, :],
                        mask=(rows < K)[None, :],
                        other=0.0,
                    )
                state = tl.dot(part, passes, state, input_precision=PRECISION)
