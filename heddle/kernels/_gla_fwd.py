# mypy: ignore-errors
"""The kernels of gla but that of its gradients: one prepares chunks, one sweeps over them in either direction.

Within a chunk of C tokens, with G the log-decays summed from its beginning, of each key channel, and S the state before it:

    prepare   seen = scale q exp(G),   left = k exp(G_C - G),   P_ij = scale Σ_c q_ic k_jc exp(G_ic - G_jc) for j ≤ i
    sweep     out = a S + P c,   S' = exp(G_C) S + bᵀ c         forward, a, b, c: seen, left, v
              out = a S + Pᵀ c,  S' = exp(G_C) S + bᵀ c         from the last chunk on, a, b, c: left, seen, dO

The second direction gives dv, with S the gradient of the state. In float16 `seen` is without the decay of the first token, which
S gets in its place, forward before the product and backward after it (`opening_of`).

The decay between two tokens is that up to a token between them times that from there on. Where a chunk fades by less than
2^-80 one token in its middle does for all pairs: one power is above 1 then, but far from the ends of bfloat16 and float32.
Elsewhere, and in float16, which has no such ends, blocks are halved until one token is left, with the last token of the
first half between (`decay_to_middle`), and no power is above 1. That costs log2(C) products of which only a corner counts,
and registers, so a second launch does it, of programs that end at once where the first was enough.

If sequences are too few to fill the device they are cut into segments: a first sweep sums up each on its own, `carry` takes
the states from segment to segment, and a second sweep starts from there.

Bytes for a token and key head, K = V = 128, C = 64, bfloat16: prepare reads q, k, g and writes seen, left, P (1664), the
sweep reads seen, left, v, P and writes out (1152).
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels.common.jit import LOG2_E, find_sequence

# log2 of what may be left of a token in the middle of a chunk, or of the middle at its end, for one product to do.
REACH = tl.constexpr(40.0)
# log2 of what float16 need not hold.
LEAST = tl.constexpr(-60.0)
# A new length must not mean a new compilation, nor must a given state.
LENGTHS = (
    "T", "H", "per_sequence", "segments_per_sequence", "segment_size", "has_initial", "has_given", "has_d_final",
)  # fmt: skip


@triton.jit
def sum_up(log_decay_at, mask, i, C: tl.constexpr, PRECISE: tl.constexpr):
    """Log-decays of a chunk as powers of two: summed up to each token, up to the middle, and up to the end; how far apart.

    Shapes:  total: [C, ROWS];  middle, end: [ROWS];  reach: a number
    """
    log = tl.load(log_decay_at, mask=mask, other=0.0)
    # A sum of strong decays would swallow a weak one, and differences of sums are what counts: in float32 that is far
    # below what half precision rounds.
    log = log.to(tl.float64 if PRECISE else tl.float32) * LOG2_E
    total = tl.cumsum(log, axis=0)
    middle = tl.sum(tl.where((i < C // 2)[:, None], log, 0.0), axis=0)
    end = tl.sum(log, axis=0)
    reach = tl.max(tl.maximum(-middle, middle - end), axis=0)
    return total, middle, end, reach


@triton.jit
def power_from(middle, total):
    """The decay from the middle of a chunk to each token, above 1 before it.  Shapes:  [ROWS], [C, ROWS] -> [C, ROWS]"""
    # The bound keeps what the second launch is to overwrite from overflowing.
    return tl.exp2(tl.minimum(total - middle[None, :], REACH).to(tl.float32))


@triton.jit
def power_until(middle, total):
    """The decay from each token to the middle of a chunk, above 1 after it.  Shapes:  [ROWS], [C, ROWS] -> [C, ROWS]"""
    return tl.exp2(tl.minimum(middle[None, :] - total, REACH).to(tl.float32))


@triton.jit
def decay_to_middle(totals_at, total, i, count, stride, rows, in_k, level):
    """What is left, on the way between each token and the last of the first half of its block of 2^(level + 1) tokens."""
    middle = ((i >> (level + 1)) << (level + 1)) + ((1 << level) - 1)
    # Where the block has no second half nothing asks for it.
    known = (middle < count)[:, None] & in_k
    between = tl.load(totals_at + (middle * stride)[:, None] + rows[None, :], mask=known, other=0.0)
    return tl.exp2((-tl.abs(total - between)).to(tl.float32))


@triton.jit
def most_left(totals_at, total, i, count, stride, rows, in_k, NARROW: tl.constexpr):
    """The most that is left, in each channel, of a token at the next, and so at any later one: float16 ends at 6e-8, above what
    a strong decay leaves, so what is left is divided by it. 1 but for NARROW.  Shapes:  out: [1, ROWS]
    """
    if NARROW:
        inner = (i > 0) & (i < count)
        before = tl.load(
            totals_at + ((i - 1) * stride)[:, None] + rows[None, :], mask=inner[:, None] & in_k, other=0.0
        )
        own = tl.maximum(tl.where(inner[:, None], total - before, LEAST), LEAST)
        most = tl.exp2(tl.max(own, axis=0).to(tl.float32))[None, :]
    else:
        most = 1.0
    return most


@triton.jit
def opening_of(total, i):
    """The log-decay of the first token of a chunk, which all that read the state before it have passed: float16 ends at 6e-8,
    above what a strong decay leaves, so there it is left to the sums.  Shapes:  total: [C, ROWS];  out: [ROWS]
    """
    return tl.sum(tl.where((i == 0)[:, None], total, 0.0), axis=0)


@triton.jit(do_not_specialize=LENGTHS)
def _gla_prepare_kernel(
    q_ptr, k_ptr, log_decay_ptr, seen_ptr, left_ptr, totals_ptr, scores_ptr, ends_ptr, reach_ptr, table_ptr, cu_seqlens_ptr,
    stride_qn, stride_qt, stride_qh,
    stride_kn, stride_kt, stride_kh,
    stride_gn, stride_gt, stride_gh,
    T, H, per_sequence, scale,
    K: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr,
    VARLEN: tl.constexpr, PRECISE: tl.constexpr, HALVED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one key head, ROWS channels at a time; HALVED: where one product does not do for all pairs.

    Shapes:  seen, left: [B, T, H, K];  totals: the same, room for what threads tell each other;  scores: [chunks, H, C, C]
             ends: [chunks, H, K], log2 of what is left, in float16 [chunks, H, 2, K], the second as `opening_of`
             reach: [chunks, H], where HALVED is to look
    """
    NARROW: tl.constexpr = seen_ptr.dtype.element_ty == tl.float16
    head = tl.program_id(0) % H
    chunk = tl.program_id(0) // H
    n, j, begin, length = find_sequence(chunk, table_ptr, cu_seqlens_ptr, T, per_sequence, VARLEN)
    place = chunk.to(tl.int64) * H + head
    # An empty sequence has a chunk as well, without a token.
    if (n < 0) | (j * C >= length):
        return
    if (tl.load(reach_ptr + place) <= REACH) & HALVED:
        return

    row = n.to(tl.int64) if not VARLEN else tl.zeros((), tl.int64)
    first = begin + j * C
    own = head.to(tl.int64)
    count = tl.minimum(length - j * C, C)
    i = tl.arange(0, C)
    present = (i < count)[:, None]
    q_ptr += row * stride_qn + first * stride_qt + own * stride_qh
    k_ptr += row * stride_kn + first * stride_kt + own * stride_kh
    log_decay_ptr += row * stride_gn + first * stride_gt + own * stride_gh
    dense = (row * T + first) * (H * K) + own * K
    seen_ptr += dense
    left_ptr += dense
    totals_ptr += dense
    scores = tl.zeros([C, C], tl.float32)
    same = tl.zeros([C], tl.float32)
    farthest = 0.0
    for tile in range(0, K, ROWS):
        rows = tile + tl.arange(0, ROWS)
        in_k = (rows < K)[None, :]
        mask = present & in_k
        offsets = (i * (H * K))[:, None] + rows[None, :]
        log_decay_at = log_decay_ptr + (i * stride_gt)[:, None] + rows[None, :]
        total, middle, end, reach = sum_up(log_decay_at, mask, i, C, PRECISE)
        ends_at = ends_ptr + place * (2 * K if NARROW else K) + rows
        tl.store(ends_at, end.to(tl.float32), mask=rows < K)
        q = tl.load(q_ptr + (i * stride_qt)[:, None] + rows[None, :], mask=mask, other=0.0)  # [C, ROWS]
        k = tl.load(k_ptr + (i * stride_kt)[:, None] + rows[None, :], mask=mask, other=0.0)  # [C, ROWS]
        same += tl.sum(q.to(tl.float32) * k, axis=1)
        if HALVED:
            since = total
            if NARROW:
                opening = opening_of(total, i)
                tl.store(ends_at + K, opening.to(tl.float32), mask=rows < K)
                since -= opening[None, :]
            seen = q * (tl.exp2(since.to(tl.float32)) * scale)
            left = k * tl.exp2((end[None, :] - total).to(tl.float32))
            tl.store(totals_ptr + offsets, total, mask=mask)
            # What threads stored, others load.
            tl.debug_barrier()
            for level in range(LEVELS):
                fading = decay_to_middle(totals_ptr, total, i, count, H * K, rows, in_k, level)
                second = ((i >> level) & 1)[:, None] != 0
                later = tl.where(second, q * fading, 0.0).to(q.dtype)
                earlier = tl.where(second, 0.0, k * fading).to(k.dtype)
                corner = tl.dot(later, tl.trans(earlier), input_precision=PRECISION)
                scores += tl.where((i >> (level + 1))[:, None] == (i >> (level + 1))[None, :], corner, 0.0)
        else:
            farthest = tl.maximum(farthest, reach.to(tl.float32))
            later = q * power_from(middle, total)
            earlier = k * power_until(middle, total)
            seen = later * (tl.exp2(middle.to(tl.float32)) * scale)[None, :]
            left = earlier * tl.exp2((end - middle).to(tl.float32))[None, :]
            scores = tl.dot(
                later.to(q.dtype), tl.trans(earlier.to(k.dtype)), scores, input_precision=PRECISION
            )
        tl.store(seen_ptr + offsets, seen.to(q.dtype), mask=mask)
        tl.store(left_ptr + offsets, left.to(k.dtype), mask=mask)
    if not HALVED:
        tl.store(reach_ptr + place, farthest)
    # Masked where a power may have been too large as well.
    scores = tl.where(i[:, None] > i[None, :], scores, 0.0)
    scores = (scores + tl.where(i[:, None] == i[None, :], same[:, None], 0.0)) * scale
    square = i[:, None] * C + i[None, :]
    tl.store(scores_ptr + place * (C * C) + square, scores.to(q_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=LENGTHS)
def _gla_sweep_kernel(
    a_ptr, b_ptr, c_ptr, scores_ptr, ends_ptr, initial_ptr, out_ptr, final_ptr, states_ptr, starts_ptr, logs_ptr,
    table_ptr, offsets_ptr, cu_seqlens_ptr,
    stride_cn, stride_ct, stride_ch,
    T, H, per_sequence, segments_per_sequence, segment_size, has_initial,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    BACKWARD: tl.constexpr, VARLEN: tl.constexpr, SEGMENTED: tl.constexpr, OUT: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of one segment (OUT), the state that each of its chunks starts from (KEEP), and that at the end of a sequence.

    With neither, only the state that the segment alone would leave, and what it leaves of one before it: starts, logs.

    Shapes:  a, b: [B, T, H, K];  out: [B, T, HV, V];  states: [chunks, HV, K, V];  starts: [segments, HV, K, V]
             logs: [segments, HV, K];  initial, final: [N, HV, K, V]
    """
    TILES: tl.constexpr = (V + COLUMNS - 1) // COLUMNS
    SUMMARY: tl.constexpr = not OUT and not KEEP
    NARROW: tl.constexpr = a_ptr.dtype.element_ty == tl.float16
    ENDS: tl.constexpr = 2 * K if NARROW else K
    HV = H * GROUP
    tile = tl.program_id(0) % TILES
    head = (tl.program_id(0) // TILES) % HV
    segment = tl.program_id(0) // (TILES * HV)
    n, j, begin, whole = find_sequence(segment, table_ptr, cu_seqlens_ptr, T, segments_per_sequence, VARLEN)
    opens = j == 0
    closes = (j + 1) * segment_size >= whole
    # Nothing follows the last segment of a sequence, backward the first.
    if (n < 0) | (SUMMARY & (opens if BACKWARD else closes)):
        return

    row = n.to(tl.int64) if not VARLEN else tl.zeros((), tl.int64)
    chunk = tl.load(offsets_ptr + n).to(tl.int64) if VARLEN else row * per_sequence
    chunk += j * (segment_size // C)
    begin += j * segment_size
    length = tl.minimum(whole - j * segment_size, segment_size)
    chunks = (length + C - 1) // C
    if BACKWARD:
        chunk += tl.maximum(chunks - 1, 0)
        begin += tl.maximum(chunks - 1, 0) * C
    STEP: tl.constexpr = -1 if BACKWARD else 1
    key_head = (head // GROUP).to(tl.int64)
    own = head.to(tl.int64)
    i = tl.arange(0, C)
    rows = tl.arange(0, ROWS)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    in_k = rows < K
    in_v = columns < V
    keys_at = (row * T + begin) * (H * K) + key_head * K
    a_ptr += keys_at
    b_ptr += keys_at
    c_ptr += row * stride_cn + begin * stride_ct + own * stride_ch
    out_ptr += (row * T + begin) * (HV * V) + own * V
    scores_ptr += (chunk * H + key_head) * (C * C)
    ends_ptr += (chunk * H + key_head) * ENDS
    states_ptr += (chunk * HV + own) * (K * V)
    key_offsets = (i * (H * K))[:, None] + rows[None, :]
    c_offsets = (i * stride_ct)[:, None] + columns[None, :]
    out_offsets = (i * (HV * V))[:, None] + columns[None, :]
    square = i[:, None] * C + i[None, :]

    state_mask = in_k[:, None] & in_v[None, :]
    state_offsets = rows[:, None] * V + columns[None, :]
    own_state = (n.to(tl.int64) * HV + own) * (K * V) + state_offsets
    own_segment = segment.to(tl.int64) * HV + own
    log = tl.zeros([ROWS], tl.float32)
    if SUMMARY:
        state = tl.zeros([ROWS, COLUMNS], tl.float32)
    elif SEGMENTED:
        state = tl.load(starts_ptr + own_segment * (K * V) + state_offsets, mask=state_mask, other=0.0)
    else:
        state = tl.load(initial_ptr + own_state, mask=state_mask & (has_initial != 0), other=0.0)
    for index in range(0, chunks):
        at = (chunks - 1 - index if BACKWARD else index) * C
        present = i < length - at
        narrow = present[:, None] if K == ROWS else present[:, None] & in_k[None, :]
        kept = present[:, None] & in_v[None, :]
        b = tl.load(b_ptr + key_offsets, mask=narrow, other=0.0)  # [C, ROWS]
        c = tl.load(c_ptr + c_offsets, mask=kept, other=0.0)  # [C, COLUMNS]
        end = tl.load(ends_ptr + rows, mask=in_k, other=0.0)  # [ROWS]
        since = end
        half = state.to(b.dtype)
        if KEEP:
            tl.store(states_ptr + state_offsets, half, mask=state_mask)
        if NARROW:
            opening = tl.load(ends_ptr + K + rows, mask=in_k, other=0.0)  # [ROWS]
            if BACKWARD:
                since -= opening
            else:
                half = (state * tl.exp2(opening)[:, None]).to(b.dtype)
        if OUT:
            a = tl.load(a_ptr + key_offsets, mask=narrow, other=0.0)  # [C, ROWS]
            # Backward transposed.
            scores = tl.load(scores_ptr + (i[:, None] + i[None, :] * C if BACKWARD else square))  # [C, C]
            out = tl.dot(a, half, input_precision=PRECISION)  # [C, COLUMNS]
            out = tl.dot(scores, c, out, input_precision=PRECISION)
            tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=kept)
        state = tl.dot(tl.trans(b), c, state * tl.exp2(since)[:, None], input_precision=PRECISION)
        if NARROW and BACKWARD:
            state *= tl.exp2(opening)[:, None]
        if SUMMARY:
            log += end
        a_ptr += STEP * C * H * K
        b_ptr += STEP * C * H * K
        c_ptr += STEP * C * stride_ct
        out_ptr += STEP * C * HV * V
        scores_ptr += STEP * H * C * C
        ends_ptr += STEP * H * ENDS
        states_ptr += STEP * HV * K * V
    if SUMMARY:
        tl.store(starts_ptr + own_segment * (K * V) + state_offsets, state, mask=state_mask)
        tl.store(logs_ptr + own_segment * K + rows, log, mask=in_k & (tile == 0))
    elif opens if BACKWARD else closes:
        tl.store(final_ptr + own_state, state, mask=state_mask)


@triton.jit(do_not_specialize=LENGTHS)
def _gla_carry_kernel(
    starts_ptr, logs_ptr, given_ptr, offsets_ptr, H, per_sequence, has_given,
    K: tl.constexpr, V: tl.constexpr, BLOCK: tl.constexpr, BACKWARD: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Turns the state that each segment alone would leave into the state it starts from, in place. H: value heads."""
    sequence = tl.program_id(0) // H
    head = tl.program_id(0) % H
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < K * V
    if VARLEN:
        first = tl.load(offsets_ptr + sequence).to(tl.int32)
        count = tl.load(offsets_ptr + sequence + 1).to(tl.int32) - first
    else:
        first = sequence * per_sequence
        count = per_sequence
    given = (sequence.to(tl.int64) * H + head) * (K * V) + at
    carried = tl.load(given_ptr + given, mask=inside & (has_given != 0), other=0.0)
    for index in range(0, count):
        place = (first + (count - 1 - index if BACKWARD else index)).to(tl.int64) * H + head
        # The last one was not summed up.
        known = inside & (index < count - 1)
        added = tl.load(starts_ptr + place * (K * V) + at, mask=known, other=0.0)
        log = tl.load(logs_ptr + place * K + at // V, mask=known, other=0.0)
        tl.store(starts_ptr + place * (K * V) + at, carried, mask=inside)
        carried = tl.exp2(log) * carried + added
