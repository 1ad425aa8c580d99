# mypy: ignore-errors
"""The kernels of simple_gla: one sweep over time, forward in one role, backward in three.

    out_t = scale Σ_{s ≤ t} exp(G_t - G_s) (a_t · b_s) c_s,   state = Σ_s exp(G_T - G_s) b_s c_sᵀ,   G: summed log-decays

    role      a   b   c   out   rows      time
    forward   q   k   v   o               as it runs
    0         dO  v   k   dq    q · dq    as it runs
    1         v   dO  q   dk    k · dk    from the last chunk to the first
    2         k   q   dO  dv              from the last chunk to the first

A program holds the state (all rows, COLUMNS columns, float32) in registers and walks over its segment of a sequence in
chunks. If there are programs enough, a segment is a whole sequence. Otherwise a first kernel sums up each segment on its
own, a second carries these states from segment to segment, and each segment of the third starts from there. The first
reads only what is not forgotten by the end of its segment.

The log-decays are summed within chunks by a kernel of their own: 4 bytes for a token and head, beside 1024 (forward,
K = V = 128, bfloat16: q, k, v, o) and 3072 backward. What the roles add to those, rows and all, is about 20 bytes.

The gradient of a log-decay is what passes it: Σ over readers u ≥ t and writers s < t = Σ_{u ≥ t} (q_u · dq_u - k_u · dk_u).
Pairs with both in [t, T) cancel, but only if both roles round them alike; a rest of one rounding for each token would
grow with the root of the length. So the roles share their chunks, round the same products to the same values, and read
the state in two parts, of which the second holds what rounding takes from the first; and the sum begins anew with each
segment. What a token reads of itself, and of a final state's gradient the last token, passes no decay: where all decays are
strong it is so large beside the rest that the rest is lost in the sum. A segment with such a chunk takes a loop of its own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels.common.jit import LOG2_E, ask_for_rows, by_role, find_sequence

# What has halved this many times counts as nothing: it is far below the precision of float32 sums.
HALVINGS = tl.constexpr(29.0)
# Decays that halve more often a token are strong: see `is_strong`.
STRONG_HALVINGS = tl.constexpr(2.0)
# So often may be halved and doubled what is not to vanish: twice as often a float32 cannot.
FARTHEST = tl.constexpr(60.0)
# Chunks looked at side by side for what is forgotten.
WINDOW = tl.constexpr(64)
# Tokens whose gradient of the log-decay is summed at a time.
SUMMED = tl.constexpr(1024)
# A new length must not mean a new compilation. A new number of heads may, and what lies between two tokens with it: to know
# them saves a quarter of the registers, which are short.
LENGTHS = ("T", "slots", "segments", "sequences", "per_sequence", "segment_size", "first_role")


@triton.jit
def _operands(role, q, k, v, d, BACKWARD: tl.constexpr):
    """a, b and c of a role: pointers or strides."""
    if BACKWARD:
        a = tl.where(role == 0, d, tl.where(role == 1, v, k))
        b = tl.where(role == 0, v, tl.where(role == 1, d, q))
        c = tl.where(role == 0, k, tl.where(role == 1, q, d))
        return a, b, c
    return q, k, v


@triton.jit
def _first_slot(n, begin, T, C: tl.constexpr, VARLEN: tl.constexpr):
    """The first chunk of a sequence among those of all: none is in two sequences."""
    if VARLEN:
        return begin // C + n
    return n.to(tl.int64) * ((T + C - 1) // C)


@triton.jit
def _weights(gates_ptr, at, plane, C: tl.constexpr, PRECISE: tl.constexpr):
    """exp2 of these: what is left at row i of column j, of the state at each row, of each row after the chunk."""
    i = tl.arange(0, C)
    high = tl.load(gates_ptr + at + i)
    end = tl.load(gates_ptr + at + (C - 1))
    age = high[:, None] - high[None, :]
    rest = end - high
    if PRECISE:
        # What float32 loses of a sum is as large as a weak decay beside strong ones.
        low = tl.load(gates_ptr + plane + at + i)
        low_end = tl.load(gates_ptr + plane + at + (C - 1))
        age += low[:, None] - low[None, :]
        rest += low_end - low
    return age, high, rest, end


@triton.jit
def _remembered(gates_ptr, at, chunks, mirrored, C: tl.constexpr):
    """The log-decay of a segment, and how many of the chunks that come last are not forgotten by its end."""
    i = tl.arange(0, WINDOW)
    log = 0.0
    count = 0
    for block in range(0, chunks, WINDOW):
        # From the end on.
        inside = block + i < chunks
        chunk = tl.where(mirrored, block + i, chunks - 1 - block - i)
        ends = tl.load(gates_ptr + at + chunk * C + (C - 1), mask=inside, other=0.0)
        since = log + tl.cumsum(ends, axis=0) - ends
        count += tl.sum((inside & (since > -HALVINGS)).to(tl.int32), axis=0)
        log += tl.sum(ends, axis=0)
    return log, count


@triton.jit
def is_strong(gates_ptr, at, chunks, length, C: tl.constexpr):
    """Whether in any chunk of a segment a token leaves less than a quarter of the one before it, on average.

    There, what has passed no decay is so large beside what has that nothing of the latter may be left in a sum of both.
    """
    i = tl.arange(0, WINDOW)
    found = 0
    for block in range(0, chunks, WINDOW):
        chunk = block + i
        inside = chunk < chunks
        ends = tl.load(gates_ptr + at + chunk * C + (C - 1), mask=inside, other=0.0)
        fading = ends < tl.minimum(length - chunk * C, C) * -STRONG_HALVINGS
        found += tl.sum((inside & fading).to(tl.int32), axis=0)
    return found > 0


@triton.jit
def strong_decays(gates_at, since, remaining, C: tl.constexpr):
    """Of a chunk, as log2: the decay of its first token, that of the last of a sequence or 0, the weakest between two tokens."""
    i = tl.arange(0, C)
    own = since - tl.load(gates_at + i - 1, mask=i > 0, other=0.0)
    opening = tl.load(gates_at)
    closing = tl.maximum(tl.sum(tl.where(i == remaining - 1, own, 0.0), axis=0), -FARTHEST)
    nearest = tl.max(tl.where((i > 0) & (i < remaining), tl.maximum(own, -FARTHEST), -FARTHEST), axis=0)
    return opening, closing, nearest


@triton.jit
def undone(state, gates_ptr, at, following, length):
    """A gradient of a state before the decay of the token that follows, and this decay, as log2: in float16 it may be nothing."""
    owed = tl.load(gates_ptr + at + following, mask=following < length, other=0.0)
    owed = tl.maximum(owed, -FARTHEST)
    return state * tl.exp2(-owed), owed


@triton.jit
def _scores(a, b, age, causal, direction, scale, PRECISION: tl.constexpr):
    """What each row takes of each column.  Shapes:  a, b: [C, ROWS];  age, causal, out: [C, C]"""
    # Masked before exp2: on the other side of the diagonal the power could overflow.
    within = tl.where(causal, tl.exp2(tl.where(causal, direction * age, 0.0)) * scale, 0.0)
    return tl.dot(a, tl.trans(b), input_precision=PRECISION) * within


@triton.jit(do_not_specialize=("T", "slots"))
def _simple_gla_gates_kernel(
    log_decay_ptr, gates_ptr, sequences_ptr, cu_seqlens_ptr,
    stride_gn, stride_gt, stride_gh, T, H, slots,
    C: tl.constexpr, HEADS: tl.constexpr, VARLEN: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Log-decays summed from the beginning of each chunk on, as powers of two: gates[part, head, slot, C].

    The sums are float64, written as one or two parts of float32. After the last token of a sequence they stay.
    """
    slot = tl.program_id(0)
    if VARLEN:
        n = tl.load(sequences_ptr + slot)
        begin = tl.load(cu_seqlens_ptr + n).to(tl.int64)
        length = tl.load(cu_seqlens_ptr + n + 1).to(tl.int64) - begin
        first = (slot - _first_slot(n, begin, T, C, VARLEN)) * C
        row = 0
    else:
        chunks = (T + C - 1) // C
        row = (slot // chunks).to(tl.int64)
        begin = tl.zeros((), tl.int64)
        length = T
        first = (slot % chunks).to(tl.int64) * C
    if first >= length:
        return
    i = tl.arange(0, C)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    own = log_decay_ptr + row * stride_gn + (begin + first) * stride_gt
    mask = (i < length - first)[:, None] & (heads < H)[None, :]
    log = tl.load(own + (i * stride_gt)[:, None] + (heads * stride_gh)[None, :], mask=mask, other=0.0)
    summed = tl.cumsum(log.to(tl.float64), axis=0) * LOG2_E
    high = summed.to(tl.float32)
    at = (heads.to(tl.int64) * slots + slot)[None, :] * C + i[:, None]
    tl.store(gates_ptr + at, high, mask=(heads < H)[None, :])
    if PRECISE:
        plane = slots.to(tl.int64) * H * C
        tl.store(
            gates_ptr + plane + at, (summed - high.to(tl.float64)).to(tl.float32), mask=(heads < H)[None, :]
        )


@triton.jit(do_not_specialize=LENGTHS)
def _simple_gla_state_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, gates_ptr, states_ptr, logs_ptr, table_ptr, cu_seqlens_ptr,
    stride_qn, stride_qt: tl.constexpr, stride_qh,
    stride_kn, stride_kt: tl.constexpr, stride_kh,
    stride_vn, stride_vt: tl.constexpr, stride_vh,
    stride_dn, stride_dt: tl.constexpr, stride_dh,
    T, H: tl.constexpr, group, slots, segments, per_sequence, segment_size, first_role, scale,
    K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROLES: tl.constexpr,
    BACKWARD: tl.constexpr, VARLEN: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state that each segment alone would leave, states[role, segment, head], and its log-decay. K and V as of b, c."""
    TILES: tl.constexpr = (V + COLUMNS - 1) // COLUMNS
    pid = tl.program_id(0)
    tile = pid % TILES
    role = first_role + (pid // TILES) % ROLES
    head = (pid // (TILES * ROLES)) % H
    segment = pid // (TILES * ROLES * H)
    n, j, begin, length = find_sequence(segment, table_ptr, cu_seqlens_ptr, T, per_sequence, VARLEN)
    mirrored = BACKWARD & (role != 0)
    first = j * segment_size
    # Nothing follows the last segment of a sequence, or the first on the way back.
    if (n < 0) | tl.where(mirrored, j == 0, first + segment_size >= length):
        return

    row = n.to(tl.int64) if not VARLEN else tl.zeros((), tl.int64)
    shared = (head // group).to(tl.int64)
    own = head.to(tl.int64)
    q_ptr += row * stride_qn + begin * stride_qt + shared * stride_qh
    k_ptr += row * stride_kn + begin * stride_kt + shared * stride_kh
    v_ptr += row * stride_vn + begin * stride_vt + own * stride_vh
    do_ptr += row * stride_dn + begin * stride_dt + own * stride_dh
    _a_ptr, b_ptr, c_ptr = _operands(role, q_ptr, k_ptr, v_ptr, do_ptr, BACKWARD)
    _stride_at, stride_bt, stride_ct = _operands(role, stride_qt, stride_kt, stride_vt, stride_dt, BACKWARD)
    plane = slots.to(tl.int64) * H * C
    gates_at = (own * slots + _first_slot(n, begin, T, C, VARLEN)) * C

    i = tl.arange(0, C)
    rows = tl.arange(0, ROWS)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    b_offsets = (i * stride_bt)[:, None] + rows[None, :]
    c_offsets = (i * stride_ct)[:, None] + columns[None, :]
    state = tl.zeros([ROWS, COLUMNS], tl.float32)
    chunks = (tl.minimum(segment_size, length - first) + C - 1) // C
    log, remembered = _remembered(gates_ptr, gates_at + first, chunks, mirrored, C)
    owed = 0.0
    for index in range(chunks - remembered, chunks):
        t = first + tl.where(mirrored, chunks - 1 - index, index) * C
        moved = t.to(tl.int64)
        present = (i < length - t)[:, None]
        b = tl.load(b_ptr + moved * stride_bt + b_offsets, mask=present & (rows < K)[None, :], other=0.0)
        c = tl.load(c_ptr + moved * stride_ct + c_offsets, mask=present & (columns < V)[None, :], other=0.0)
        _age, since, rest, end = _weights(gates_ptr, gates_at + t, plane, C, PRECISE)
        # The decay of the first token of a chunk, which all have passed, is no part of what is rounded.
        opening = tl.where(mirrored, tl.load(gates_ptr + gates_at + t), 0.0)
        left = tl.where(mirrored, tl.exp2(since - opening) * scale, tl.exp2(rest))  # [C]
        weighted = (c * left[:, None]).to(c.dtype)
        state = tl.dot(
            tl.trans(b), weighted, state * tl.exp2(end + owed - opening), input_precision=PRECISION
        )
        owed = opening
    state *= tl.exp2(owed)
    place = ((role - first_role) * segments + segment).to(tl.int64) * H + head
    offsets = rows[:, None] * V + columns[None, :]
    mask = (rows < K)[:, None] & (columns < V)[None, :]
    tl.store(states_ptr + place * (K * V) + offsets, state, mask=mask)
    tl.store(logs_ptr + place, log, mask=tile == 0)


@triton.jit(do_not_specialize=LENGTHS)
def _simple_gla_carry_kernel(
    states_ptr, logs_ptr, initial_ptr, d_final_ptr, d_final_t_ptr, offsets_ptr,
    H, segments, per_sequence, first_role,
    SIZE: tl.constexpr, BLOCK: tl.constexpr,
    BACKWARD: tl.constexpr, VARLEN: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_D_FINAL: tl.constexpr,
):  # fmt: skip
    """Turns the state that each segment alone would leave into the state before it, in place."""
    sequence = tl.program_id(0) // H
    head = tl.program_id(0) % H
    role = first_role + tl.program_id(2)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    if VARLEN:
        first = tl.load(offsets_ptr + sequence).to(tl.int32)
        count = tl.load(offsets_ptr + sequence + 1).to(tl.int32) - first
    else:
        first = sequence * per_sequence
        count = per_sequence
    mirrored = BACKWARD & (role != 0)
    carried = tl.zeros([BLOCK], tl.float32)
    own = (sequence.to(tl.int64) * H + head) * SIZE
    if HAS_INITIAL:
        carried += tl.load(initial_ptr + own + at, mask=inside & (not mirrored), other=0.0)
    if HAS_D_FINAL:
        given = tl.where(role == 1, d_final_t_ptr, d_final_ptr)
        carried += tl.load(given + own + at, mask=inside & mirrored, other=0.0)
    for index in range(0, count):
        segment = first + tl.where(mirrored, count - 1 - index, index)
        place = (tl.program_id(2) * segments + segment).to(tl.int64) * H + head
        # The last one was not summed up.
        known = index < count - 1
        added = tl.load(states_ptr + place * SIZE + at, mask=inside & known, other=0.0)
        log = tl.load(logs_ptr + place, mask=known, other=0.0)
        tl.store(states_ptr + place * SIZE + at, carried, mask=inside)
        carried = tl.exp2(log) * carried + added


@triton.jit
def _walk(
    state, owed, role, a_ptr, b_ptr, c_ptr, e_ptr, out_ptr, gates_ptr, rows_ptr, columns,
    first, chunks, length, plane, scale, stride_at, stride_bt, stride_ct, stride_et,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
    BACKWARD: tl.constexpr, STRONG: tl.constexpr, AHEAD: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs and rows of the chunks of a segment, and the state behind them; STRONG as in `is_strong`.

    There, what a token reads of itself joins its output after its row, and the state that the last token of a sequence leaves
    is without it; and no decay that a whole product has passed is part of what is rounded. So a mirrored state is yet to pass
    that of the token that it was read by last: `owed`, as log2.
    """
    mirrored = BACKWARD & (role != 0)
    i = tl.arange(0, C)
    rows = tl.arange(0, ROWS)
    causal = tl.where(mirrored, i[:, None] <= i[None, :], i[:, None] >= i[None, :])
    direction = tl.where(mirrored, -1.0, 1.0)
    a_offsets = (i * stride_at)[:, None] + rows[None, :]
    b_offsets = (i * stride_bt)[:, None] + rows[None, :]
    c_offsets = (i * stride_ct)[:, None] + columns[None, :]
    e_offsets = (i * stride_et)[:, None] + columns[None, :]
    out_offsets = (i * (H * V))[:, None] + columns[None, :]
    closing = 0.0
    if AHEAD:
        COLUMNS: tl.constexpr = columns.shape[0]
        own_columns = tl.min(columns, axis=0)
    for index in range(0, chunks):
        t = first + tl.where(mirrored, chunks - 1 - index, index) * C
        moved = t.to(tl.int64)
        if AHEAD:
            # The pipeline asks for a chunk when the one before is done; from the L2 cache it comes sooner. The last one asks for
            # itself.
            ahead = t + tl.where(index + 1 < chunks, C, 0)
            there = length - ahead
            ahead = ahead.to(tl.int64)
            ask_for_rows(a_ptr + ahead * stride_at, stride_at, there, C, K)
            ask_for_rows(b_ptr + ahead * stride_bt, stride_bt, there, C, K)
            ask_for_rows(c_ptr + (ahead * stride_ct + own_columns), stride_ct, there, C, COLUMNS)
        present = (i < length - t)[:, None]
        kept = present & (columns < V)[None, :]
        a = tl.load(a_ptr + moved * stride_at + a_offsets, mask=present & (rows < K)[None, :], other=0.0)
        b = tl.load(b_ptr + moved * stride_bt + b_offsets, mask=present & (rows < K)[None, :], other=0.0)
        c = tl.load(c_ptr + moved * stride_ct + c_offsets, mask=kept, other=0.0)  # [C, COLUMNS]
        if BACKWARD:
            # Asked for long before it is used: the compiler loads ahead only what is multiplied.
            e = tl.load(e_ptr + moved * stride_et + e_offsets, mask=kept, other=0.0)  # [C, COLUMNS]
        age, since, rest, end = _weights(gates_ptr, t, plane, C, PRECISE)
        over = end
        if STRONG:
            opening, closing, nearest = strong_decays(gates_ptr + t, since, length - t, C)
            since -= opening
            rest -= closing
            over = tl.where(mirrored, end + owed - opening, end - closing)
            # No decay lies between it and the final state.
            last = t + i == length - 1
        seen = tl.where(mirrored, tl.exp2(rest), tl.exp2(since) * scale)  # [C]
        left = tl.where(mirrored, tl.exp2(since) * scale, tl.exp2(rest))  # [C]
        if not BACKWARD:
            scores = _scores(a, b, age, causal, direction, scale, PRECISION)
        near = state.to(a.dtype)
        read = tl.dot(a, near, input_precision=PRECISION)  # [C, COLUMNS]
        if BACKWARD and not PRECISE:
            read = tl.dot(a, (state - near.to(tl.float32)).to(a.dtype), read, input_precision=PRECISION)
        if STRONG:
            read *= tl.exp2(tl.where(mirrored, owed + closing, opening))
        if BACKWARD:
            aged = e * (tl.where(last & mirrored, 0.0, seen) if STRONG else seen)[:, None]
            # The other role has rounded this product on its way into the state.
            sums = tl.sum((aged.to(c.dtype).to(tl.float32) - aged) * read, axis=1)  # [C]
        if STRONG:
            same = i[:, None] == i[None, :]
            scores = tl.dot(a, tl.trans(b), input_precision=PRECISION)
            of_itself = tl.sum(tl.where(same, scores, 0.0), axis=1) * scale
            fading = tl.where(causal, direction * age - nearest, float("-inf"))
            scores *= tl.where(same, 0.0, tl.exp2(fading) * scale)
            seen *= tl.exp2(-nearest)
        elif BACKWARD:
            # Only now: registers are short.
            scores = _scores(a, b, age, causal, direction, scale, PRECISION)
        out = tl.dot(scores.to(c.dtype), c, read * seen[:, None], input_precision=PRECISION)
        if STRONG:
            out *= tl.exp2(nearest)
        if BACKWARD:
            sums += tl.sum(e * out, axis=1)
            if STRONG:
                sums = tl.where(last & mirrored, 0.0, sums)
                left = tl.where(last & (role == 0), 0.0, left)
                out += of_itself[:, None] * c
            tl.store(rows_ptr + t + i, sums, mask=role < 2)
        tl.store(out_ptr + moved * (H * V) + out_offsets, out.to(c.dtype), mask=kept)
        weighted = (c * left[:, None]).to(c.dtype)
        state = tl.dot(tl.trans(b), weighted, state * tl.exp2(over), input_precision=PRECISION)
        if STRONG:
            owed = tl.where(mirrored, opening, closing)
    return state * tl.exp2(owed) if STRONG else state


@triton.jit(do_not_specialize=LENGTHS)
def _simple_gla_output_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, gates_ptr,
    first_out_ptr, second_out_ptr, third_out_ptr, final_ptr, rows_ptr, ends_ptr,
    states_ptr, initial_ptr, d_final_ptr, d_final_t_ptr, table_ptr, cu_seqlens_ptr,
    stride_qn, stride_qt: tl.constexpr, stride_qh,
    stride_kn, stride_kt: tl.constexpr, stride_kh,
    stride_vn, stride_vt: tl.constexpr, stride_vh,
    stride_dn, stride_dt: tl.constexpr, stride_dh,
    T, H: tl.constexpr, group, slots, segments, per_sequence, segment_size, first_role, scale, sequences,
    K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROLES: tl.constexpr,
    BACKWARD: tl.constexpr, VARLEN: tl.constexpr, SEGMENTED: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_D_FINAL: tl.constexpr, ONLY_STRONG: tl.constexpr, AHEAD: tl.constexpr,
    PRECISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs of one segment, and the final state where a sequence ends. K and V are those of a, b and of c.

    ONLY_STRONG: of segments with strong decays alone.

    Backward also rows[role, tile, head, slot, C], and ends[tile, sequence, head]: the final state times its gradient.
    """
    TILES: tl.constexpr = (V + COLUMNS - 1) // COLUMNS
    pid = tl.program_id(0)
    tile = pid % TILES
    role = first_role + (pid // TILES) % ROLES
    head = (pid // (TILES * ROLES)) % H
    # Backwards: what the first kernel read last may still be in L2.
    segment = segments - 1 - pid // (TILES * ROLES * H)
    n, j, begin, length = find_sequence(segment, table_ptr, cu_seqlens_ptr, T, per_sequence, VARLEN)
    if n < 0:
        return

    mirrored = BACKWARD & (role != 0)
    row = n.to(tl.int64) if not VARLEN else tl.zeros((), tl.int64)
    shared = (head // group).to(tl.int64)
    own = head.to(tl.int64)
    q_ptr += row * stride_qn + begin * stride_qt + shared * stride_qh
    k_ptr += row * stride_kn + begin * stride_kt + shared * stride_kh
    v_ptr += row * stride_vn + begin * stride_vt + own * stride_vh
    do_ptr += row * stride_dn + begin * stride_dt + own * stride_dh
    a_ptr, b_ptr, c_ptr = _operands(role, q_ptr, k_ptr, v_ptr, do_ptr, BACKWARD)
    stride_at, stride_bt, stride_ct = _operands(role, stride_qt, stride_kt, stride_vt, stride_dt, BACKWARD)
    out_ptr = by_role(role, first_out_ptr, first_out_ptr, second_out_ptr, third_out_ptr, BACKWARD)
    out_ptr += (row * T + begin) * (H * V) + own * V
    # What the output is multiplied with for the gradient of the log-decays; role 2 has no use for it, but not to load
    # would cost it registers.
    e_ptr = by_role(role, v_ptr, q_ptr, k_ptr, do_ptr, BACKWARD)
    stride_et = by_role(role, stride_vt, stride_qt, stride_kt, stride_dt, BACKWARD)
    plane = slots.to(tl.int64) * H * C
    slot = _first_slot(n, begin, T, C, VARLEN)
    gates_at = (own * slots + slot) * C
    rows_at = ((role * TILES + tile).to(tl.int64) * H + head) * slots * C + slot * C

    rows = tl.arange(0, ROWS)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    state_offsets = rows[:, None] * V + columns[None, :]
    state_mask = (rows < K)[:, None] & (columns < V)[None, :]
    own_state = (n.to(tl.int64) * H + head) * (K * V) + state_offsets
    state = tl.zeros([ROWS, COLUMNS], tl.float32)
    if SEGMENTED:
        place = ((role - first_role) * segments + segment).to(tl.int64) * H + head
        state += tl.load(states_ptr + place * (K * V) + state_offsets, mask=state_mask, other=0.0)
    else:
        if HAS_INITIAL:
            state += tl.load(initial_ptr + own_state, mask=state_mask & (not mirrored), other=0.0)
        if HAS_D_FINAL:
            given = tl.where(role == 1, d_final_t_ptr, d_final_ptr)
            state += tl.load(given + own_state, mask=state_mask & mirrored, other=0.0)

    first = j * segment_size
    chunks = (tl.minimum(segment_size, length - first) + C - 1) // C
    strong = False
    if BACKWARD:
        strong = is_strong(gates_ptr, gates_at + first, chunks, length - first, C)
    if ONLY_STRONG and not strong:
        return
    if ONLY_STRONG or strong:
        owed = 0.0
        if SEGMENTED:
            following = tl.where(mirrored, first + segment_size, length)
            state, owed = undone(state, gates_ptr, gates_at, following, length)
        state = _walk(
            state, owed, role, a_ptr, b_ptr, c_ptr, e_ptr, out_ptr, gates_ptr + gates_at, rows_ptr + rows_at, columns,
            first, chunks, length, plane, scale, stride_at, stride_bt, stride_ct, stride_et,
            H, K, V, C, ROWS, BACKWARD, True, False, PRECISE, PRECISION,
        )  # fmt: skip
    else:
        state = _walk(
            state, 0.0, role, a_ptr, b_ptr, c_ptr, e_ptr, out_ptr, gates_ptr + gates_at, rows_ptr + rows_at, columns,
            first, chunks, length, plane, scale, stride_at, stride_bt, stride_ct, stride_et,
            H, K, V, C, ROWS, BACKWARD, False, AHEAD, PRECISE, PRECISION,
        )  # fmt: skip

    if BACKWARD:
        tl.store(final_ptr + own_state, state, mask=state_mask & (role == 2) & (j == 0))
        if HAS_D_FINAL:
            ending = (role == 0) & (first + segment_size >= length)
            given = tl.load(d_final_t_ptr + own_state, mask=state_mask & ending, other=0.0)
            passed = tl.sum(tl.sum(state * given, axis=1), axis=0)
            tl.store(ends_ptr + (tile * sequences + n).to(tl.int64) * H + head, passed, mask=ending)
    else:
        tl.store(final_ptr + own_state, state, mask=state_mask & (first + segment_size >= length))


@triton.jit(do_not_specialize=("T", "slots", "sequences", "per_sequence", "segment_size"))
def _simple_gla_gate_gradient_kernel(
    rows_ptr, ends_ptr, states_ptr, d_states_ptr, d_gate_ptr, table_ptr, cu_seqlens_ptr,
    T, H, slots, sequences, per_sequence, segment_size,
    C: tl.constexpr, TILES: tl.constexpr, SIZE: tl.constexpr,
    VARLEN: tl.constexpr, SEGMENTED: tl.constexpr, HAS_D_FINAL: tl.constexpr,
):  # fmt: skip
    """Of each token of a segment: its rows and those of later ones, of role 0 less those of role 1, and what passes the end.

    That is the state there times its gradient, which both kernels before have left: rounding adds up in no more than a segment.
    """
    head = tl.program_id(0) % H
    segment = tl.program_id(0) // H
    n, j, begin, length = find_sequence(segment, table_ptr, cu_seqlens_ptr, T, per_sequence, VARLEN)
    if n < 0:
        return
    first = j * segment_size
    own_length = tl.minimum(segment_size, length - first)
    last = first + segment_size >= length
    i = tl.arange(0, SUMMED)
    carried = tl.zeros((), tl.float64)
    if HAS_D_FINAL:
        for tile in tl.static_range(TILES):
            end = (tile * sequences + n).to(tl.int64) * H + head
            carried += tl.load(ends_ptr + end, mask=last, other=0.0)
    if SEGMENTED:
        place = (segment.to(tl.int64) * H + head) * SIZE
        for block in range(0, SIZE, SUMMED):
            inside = (block + i < SIZE) & (not last)
            state = tl.load(states_ptr + place + H * SIZE + block + i, mask=inside, other=0.0)
            d_state = tl.load(d_states_ptr + place + block + i, mask=inside, other=0.0)
            carried += tl.sum(state.to(tl.float64) * d_state, axis=0)

    row = n.to(tl.int64) if not VARLEN else tl.zeros((), tl.int64)
    d_gate_ptr += (row * T + begin) * H + head
    slot = _first_slot(n, begin, T, C, VARLEN)
    blocks = (own_length + SUMMED - 1) // SUMMED
    for index in range(0, blocks):
        t = first + (blocks - 1 - index) * SUMMED
        inside = i < first + own_length - t
        rows = tl.zeros([SUMMED], tl.float64)
        for tile in tl.static_range(TILES):
            at = ((tile * H + head) * slots.to(tl.int64) + slot) * C + t + i
            rows += tl.load(rows_ptr + at, mask=inside, other=0.0)
            at += TILES * H * slots.to(tl.int64) * C
            rows -= tl.load(rows_ptr + at, mask=inside, other=0.0)
        summed = tl.cumsum(rows, axis=0, reverse=True) + carried
        tl.store(d_gate_ptr + (t + i).to(tl.int64) * H, summed.to(tl.float32), mask=inside)
        carried += tl.sum(rows, axis=0)
