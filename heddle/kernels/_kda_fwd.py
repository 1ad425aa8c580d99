# mypy: ignore-errors
"""The forward kernels of kda: one prepares chunks, one sweeps over them.

Within a chunk of C tokens, with G the log-decays summed from its beginning, of each key channel, and S the state before it:

    prepare   seen = scale q exp(G),   read = k exp(G),   left = k exp(G_C - G)
              P_ij = scale Σ_c q_ic k_jc exp(G_ic - G_jc) for j ≤ i,   N_ij = Σ_c k_ic k_jc exp(G_ic - G_jc) for j < i
              T = (I + beta N)^-1
    sweep     x = beta (v - read S),   n = T x,   o = seen S + P n,   S' = exp(G_C) S + leftᵀ n

Decays within a chunk are those of gla, in two launches (`_gla_fwd`): about one token in the middle of the chunk where it fades
little, by halves elsewhere. The sweep is that of the delta rules (`_gated_delta_rule_fwd`): it holds the state transposed,
[V, K], and cuts sequences that are too few to fill the device into segments; their `carry` kernel takes the states from segment
to segment. A decay belongs to a value head, so all that is prepared does, even where value heads share keys. In float16 `seen`
and `read` are without the decay of the first token (`opening_of`).

Bytes for a token and value head, K = V = 128, C = 64, bfloat16: prepare reads q, k, g and writes seen, read, left, T, P (2050);
the sweep reads seen, read, left, v, T, P and writes o (1538). Products: 4 C K and the inverse, and 6 K V + 4 C V.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels._gated_delta_rule_fwd import unit_lower_inverse
from heddle.kernels._gla_fwd import REACH, decay_to_middle, opening_of, power_from, power_until
from heddle.kernels.common.jit import LOG2_E, find_sequence

# log2 of what float32 takes for nothing: a token that leaves less of a channel leaves nothing of it.
NOTHING = tl.constexpr(-150.0)

# A new length must not mean a new compilation, nor must a given state.
LENGTHS = (
    "T", "HV", "per_sequence", "segments_per_sequence", "segment_size", "stride_beta", "has_initial", "has_d_final",
    "has_given",
)  # fmt: skip


@triton.jit
def sum_up(log_decay_at, mask, i, C: tl.constexpr, PRECISE: tl.constexpr):
    """Log-decays of a chunk as powers of two: summed up to each token, up to the middle, and up to the end; how far apart.

    No token counts for more than NOTHING: differences of sums are what counts, and a strong decay would swallow a weak one.

    Shapes:  total: [C, ROWS];  middle, end: [ROWS];  reach: a number
    """
    log = tl.load(log_decay_at, mask=mask, other=0.0)
    log = tl.maximum(log.to(tl.float64 if PRECISE else tl.float32) * LOG2_E, NOTHING)
    total = tl.cumsum(log, axis=0)
    middle = tl.sum(tl.where((i < C // 2)[:, None], log, 0.0), axis=0)
    end = tl.sum(log, axis=0)
    reach = tl.max(tl.maximum(-middle, middle - end), axis=0)
    return total, middle, end, reach


@triton.jit(do_not_specialize=LENGTHS)
def _kda_prepare_kernel(
    q_ptr, k_ptr, log_decay_ptr, beta_ptr, seen_ptr, read_ptr, left_ptr, totals_ptr, pairs_ptr, keys_ptr, ends_ptr,
    reach_ptr, table_ptr, cu_seqlens_ptr,
    stride_qn, stride_qt, stride_qh,
    stride_kn, stride_kt, stride_kh,
    stride_gn, stride_gt, stride_gh,
    T, HV, per_sequence, scale,
    K: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, VARLEN: tl.constexpr,
    KEEP: tl.constexpr, SUMS: tl.constexpr, PRECISE: tl.constexpr, HALVED: tl.constexpr, PRECISION: tl.constexpr,
    SOLVE: tl.constexpr,
):  # fmt: skip
    """One chunk of one value head, ROWS channels at a time; HALVED: where one product does not do for all pairs.

    Shapes:  seen, read, left: [B, T, HV, K];  totals: the same, room for what threads tell each other, kept with SUMS
             pairs: [chunks, HV, 2, C, C], T - I and P;  keys (with KEEP): [chunks, HV, C, C], N
             ends: [chunks, HV, K], log2 of what is left, in float16 [chunks, HV, 2, K], the second as `opening_of`
             reach: [chunks, HV], where HALVED is to look
    """
    NARROW: tl.constexpr = seen_ptr.dtype.element_ty == tl.float16
    head = tl.program_id(0) % HV
    chunk = tl.program_id(0) // HV
    n, j, begin, length = find_sequence(chunk, table_ptr, cu_seqlens_ptr, T, per_sequence, VARLEN)
    place = chunk.to(tl.int64) * HV + head
    # An empty sequence has a chunk as well, without a token.
    if (n < 0) | (j * C >= length):
        return
    if (tl.load(reach_ptr + place) <= REACH) & HALVED:
        return

    row = n.to(tl.int64) if not VARLEN else tl.zeros((), tl.int64)
    first = begin + j * C
    own = head.to(tl.int64)
    shared = (head // GROUP).to(tl.int64)
    count = tl.minimum(length - j * C, C)
    i = tl.arange(0, C)
    present = (i < count)[:, None]
    q_ptr += row * stride_qn + first * stride_qt + shared * stride_qh
    k_ptr += row * stride_kn + first * stride_kt + shared * stride_kh
    log_decay_ptr += row * stride_gn + first * stride_gt + own * stride_gh
    dense = (row * T + first) * (HV * K) + own * K
    seen_ptr += dense
    read_ptr += dense
    left_ptr += dense
    totals_ptr += dense
    scores = tl.zeros([C, C], tl.float32)
    keys = tl.zeros([C, C], tl.float32)
    same = tl.zeros([C], tl.float32)
    farthest = 0.0
    for tile in range(0, K, ROWS):
        rows = tile + tl.arange(0, ROWS)
        in_k = (rows < K)[None, :]
        mask = present & in_k
        offsets = (i * (HV * K))[:, None] + rows[None, :]
        log_decay_at = log_decay_ptr + (i * stride_gt)[:, None] + rows[None, :]
        total, middle, end, reach = sum_up(log_decay_at, mask, i, C, PRECISE)
        ends_at = ends_ptr + place * (2 * K if NARROW else K) + rows
        tl.store(ends_at, end.to(tl.float32), mask=rows < K)
        q = tl.load(q_ptr + (i * stride_qt)[:, None] + rows[None, :], mask=mask, other=0.0)  # [C, ROWS]
        k = tl.load(k_ptr + (i * stride_kt)[:, None] + rows[None, :], mask=mask, other=0.0)  # [C, ROWS]
        same += tl.sum(q.to(tl.float32) * k, axis=1)
        if HALVED:
            passed = total
            if NARROW:
                opening = opening_of(total, i)
                tl.store(ends_at + K, opening.to(tl.float32), mask=rows < K)
                passed -= opening[None, :]
            since = tl.exp2(passed.to(tl.float32))
            seen = q * (since * scale)
            read = k * since
            left = k * tl.exp2((end[None, :] - total).to(tl.float32))
            tl.store(totals_ptr + offsets, total, mask=mask)
            # What threads stored, others load.
            tl.debug_barrier()
            for level in range(LEVELS):
                fading = decay_to_middle(totals_ptr, total, i, count, HV * K, rows, in_k, level)
                second = ((i >> level) & 1)[:, None] != 0
                pair = (i >> (level + 1))[:, None] == (i >> (level + 1))[None, :]
                later = tl.where(second, q * fading, 0.0).to(q.dtype)
                later_key = tl.where(second, k * fading, 0.0).to(k.dtype)
                earlier = tl.where(second, 0.0, k * fading).to(k.dtype)
                corner = tl.dot(later, tl.trans(earlier), input_precision=PRECISION)
                scores += tl.where(pair, corner, 0.0)
                corner = tl.dot(later_key, tl.trans(earlier), input_precision=PRECISION)
                keys += tl.where(pair, corner, 0.0)
        else:
            if SUMS:
                tl.store(totals_ptr + offsets, total, mask=mask)
            farthest = tl.maximum(farthest, reach.to(tl.float32))
            since = power_from(middle, total)
            later = q * since
            later_key = k * since
            earlier = k * power_until(middle, total)
            before = tl.exp2(middle.to(tl.float32))[None, :]
            seen = later * (before * scale)
            read = later_key * before
            left = earlier * tl.exp2((end - middle).to(tl.float32))[None, :]
            earlier = earlier.to(k.dtype)
            scores = tl.dot(later.to(q.dtype), tl.trans(earlier), scores, input_precision=PRECISION)
            keys = tl.dot(later_key.to(k.dtype), tl.trans(earlier), keys, input_precision=PRECISION)
        tl.store(seen_ptr + offsets, seen.to(q.dtype), mask=mask)
        tl.store(read_ptr + offsets, read.to(k.dtype), mask=mask)
        tl.store(left_ptr + offsets, left.to(k.dtype), mask=mask)
    if not HALVED:
        tl.store(reach_ptr + place, farthest)
        # What the second launch is to overwrite must not overflow.
        keys = tl.where(farthest <= REACH, keys, 0.0)
    # Masked where a power may have been too large as well.
    lower = i[:, None] > i[None, :]
    keys = tl.where(lower, keys, 0.0)
    scores = tl.where(lower, scores, 0.0)
    scores = (scores + tl.where(i[:, None] == i[None, :], same[:, None], 0.0)) * scale
    beta = tl.load(beta_ptr + (row * T + first + i) * HV + own, mask=i < count, other=0.0)
    solved = unit_lower_inverse(beta[:, None] * keys, C, LEVELS, SOLVE)
    # Without the diagonal: what goes through it need not be rounded.
    solved = tl.where(lower, solved, 0.0)
    square = i[:, None] * C + i[None, :]
    pairs_at = pairs_ptr + place * (2 * C * C) + square
    tl.store(pairs_at, solved.to(k_ptr.dtype.element_ty))
    tl.store(pairs_at + C * C, scores.to(k_ptr.dtype.element_ty))
    if KEEP:
        tl.store(keys_ptr + place * (C * C) + square, keys.to(k_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=LENGTHS)
def _kda_sweep_kernel(
    seen_ptr, read_ptr, left_ptr, v_ptr, beta_ptr, pairs_ptr, ends_ptr, initial_ptr, out_ptr, final_ptr, states_ptr, new_ptr,
    summary_ptr, starts_ptr, table_ptr, offsets_ptr, cu_seqlens_ptr,
    stride_vn, stride_vt, stride_vh,
    T, HV, per_sequence, segments_per_sequence, segment_size, has_initial,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    VARLEN: tl.constexpr, KEEP: tl.constexpr, SEGMENTED: tl.constexpr, SUMMARY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs of one segment, and the final state where a sequence ends; with KEEP what the backward pass wants, no outputs.

    With SUMMARY only what the segment does to a state: the state it leaves when begun with zeros, and, without values, what
    it makes of each unit vector.

    Shapes:  out, new: [B, T, HV, V];  states: [chunks, HV, V, K], the state before each chunk;  starts: [segments, HV, V, K]
             summary: [segments, HV, V + K, K];  initial, final: [N, HV, K, V]
    """
    VALUES: tl.constexpr = (V + COLUMNS - 1) // COLUMNS
    TILES: tl.constexpr = VALUES + ((K + COLUMNS - 1) // COLUMNS if SUMMARY else 0)
    OUT: tl.constexpr = not KEEP and not SUMMARY
    NARROW: tl.constexpr = seen_ptr.dtype.element_ty == tl.float16
    ENDS: tl.constexpr = 2 * K if NARROW else K
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
    own = head.to(tl.int64)

    i = tl.arange(0, C)
    rows = tl.arange(0, ROWS)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    tokens = (row * T + begin) * HV + own
    seen_ptr += tokens * K
    read_ptr += tokens * K
    left_ptr += tokens * K
    out_ptr += tokens * V
    new_ptr += tokens * V
    beta_ptr += tokens
    v_ptr += row * stride_vn + begin * stride_vt + own * stride_vh
    key_offsets = (i * (HV * K))[:, None] + rows[None, :]
    v_offsets = columns[:, None] + (i * stride_vt)[None, :]
    out_offsets = columns[:, None] + (i * (HV * V))[None, :]
    square = i[:, None] * C + i[None, :]
    in_k = (rows < K)[None, :]
    in_v = (columns < V)[:, None]

    state_mask = in_v & in_k
    own_state = (n.to(tl.int64) * HV + own) * (K * V) + columns[:, None] + (rows * V)[None, :]
    state_offsets = columns[:, None] * K + rows[None, :]
    own_segment = segment.to(tl.int64) * HV + own
    if SUMMARY:
        unit = columns - VALUES * COLUMNS
        state = tl.where(unit[:, None] == rows[None, :], 1.0, 0.0)
    elif SEGMENTED:
        state = tl.load(starts_ptr + own_segment * (K * V) + state_offsets, mask=state_mask, other=0.0)
    else:
        state = tl.load(initial_ptr + own_state, mask=state_mask & (has_initial != 0), other=0.0)
    for t in range(0, length, C):
        present = i < length - t
        narrow = present[:, None] if K == ROWS else present[:, None] & in_k
        kept = in_v & present[None, :]
        read = tl.load(read_ptr + key_offsets, mask=narrow, other=0.0)  # [C, ROWS]
        left = tl.load(left_ptr + key_offsets, mask=narrow, other=0.0)  # [C, ROWS]
        v = tl.load(v_ptr + v_offsets, mask=kept, other=0.0)  # [COLUMNS, C]
        beta = tl.load(beta_ptr + i * HV, mask=present, other=0.0)
        end = tl.load(ends_ptr + place * ENDS + rows, mask=rows < K, other=0.0)
        pairs_at = pairs_ptr + place * (2 * C * C) + square
        solved = tl.load(pairs_at)  # [C, C]
        half = state.to(read.dtype)
        if KEEP:
            tl.store(states_ptr + place * (K * V) + state_offsets, half, mask=state_mask)
        if NARROW:
            opening = tl.load(ends_ptr + place * ENDS + K + rows, mask=rows < K, other=0.0)
            half = (state * tl.exp2(opening)[None, :]).to(read.dtype)
        wrong = tl.dot(half, tl.trans(read), input_precision=PRECISION)  # [COLUMNS, C]
        wrong = (v - wrong) * beta[None, :]
        new = tl.dot(wrong.to(read.dtype), tl.trans(solved), wrong, input_precision=PRECISION)  # [COLUMNS, C]
        new = new.to(read.dtype)
        state = tl.dot(new, left, state * tl.exp2(end)[None, :], input_precision=PRECISION)
        if OUT:
            seen = tl.load(seen_ptr + key_offsets, mask=narrow, other=0.0)  # [C, ROWS]
            attention = tl.load(pairs_at + C * C)  # [C, C]
            out = tl.dot(half, tl.trans(seen), input_precision=PRECISION)  # [COLUMNS, C]
            out = tl.dot(new, tl.trans(attention), out, input_precision=PRECISION)
            tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=kept)
        if KEEP:
            tl.store(new_ptr + out_offsets, new, mask=kept)
        seen_ptr += C * HV * K
        read_ptr += C * HV * K
        left_ptr += C * HV * K
        v_ptr += C * stride_vt
        beta_ptr += C * HV
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
