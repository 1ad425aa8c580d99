# mypy: ignore-errors
"""The backward roles of simple_gla, each compiled on its own: what `_simple_gla_sweep` does in one launch.

A role that knows which it is looks nothing up, and the one of v leaves out what only the gradient of the log-decays needs. Where
the others split numbers into two of half precision, they cut bits off: numbers that are rounded and go on in float32 would be
converted one by one, where others are two at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels._simple_gla_sweep import _first_slot, is_strong
from heddle.kernels.common.jit import ask_for_rows, find_sequence

# A new length must not mean a new compilation; the number of heads may, as in the sweep.
LENGTHS = ("T", "slots", "segments", "sequences", "per_sequence", "segment_size")


@triton.jit
def _shortened(x, DROPPED: tl.constexpr, NEAREST: tl.constexpr):
    """Numbers without their last bits, so that they are exact in half precision: the nearest ones, or those towards zero."""
    raw = x.to(tl.int32, bitcast=True)
    if NEAREST:
        raw += 1 << (DROPPED - 1)
    return (raw & -(1 << DROPPED)).to(tl.float32, bitcast=True)


@triton.jit
def _walk(
    state, a_ptr, b_ptr, c_ptr, e_ptr, out_ptr, gates_ptr, rows_ptr, columns,
    first, chunks, length, plane, scale, stride_at, stride_bt, stride_ct, stride_et,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr,
    ROLE: tl.constexpr, DROPPED: tl.constexpr, AHEAD: tl.constexpr,
    PRECISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`_walk` of `_simple_gla_sweep.py` for one role: outputs and rows of the chunks of a segment, and the state behind them."""
    MIRRORED: tl.constexpr = ROLE != 0
    GATED: tl.constexpr = ROLE < 2
    i = tl.arange(0, C)
    rows = tl.arange(0, ROWS)
    causal = i[:, None] <= i[None, :] if MIRRORED else i[:, None] >= i[None, :]
    a_offsets = (i * stride_at)[:, None] + rows[None, :]
    b_offsets = (i * stride_bt)[:, None] + rows[None, :]
    c_offsets = (i * stride_ct)[:, None] + columns[None, :]
    e_offsets = (i * stride_et)[:, None] + columns[None, :]
    out_offsets = (i * (H * V))[:, None] + columns[None, :]
    if AHEAD:
        COLUMNS: tl.constexpr = columns.shape[0]
        own_columns = tl.min(columns, axis=0)
    for index in range(0, chunks):
        t = first + (chunks - 1 - index if MIRRORED else index) * C
        moved = t.to(tl.int64)
        if AHEAD:
            # As in the kernel of outputs.
            step = tl.where(index + 1 < chunks, C, 0)
            ahead = t - step if MIRRORED else t + step
            there = length - ahead
            ahead = ahead.to(tl.int64)
            ask_for_rows(a_ptr + ahead * stride_at, stride_at, there, C, K)
            ask_for_rows(b_ptr + ahead * stride_bt, stride_bt, there, C, K)
            ask_for_rows(c_ptr + (ahead * stride_ct + own_columns), stride_ct, there, C, COLUMNS)
            if GATED:
                ask_for_rows(e_ptr + (ahead * stride_et + own_columns), stride_et, there, C, COLUMNS)
        present = (i < length - t)[:, None]
        kept = present & (columns < V)[None, :]
        a = tl.load(a_ptr + moved * stride_at + a_offsets, mask=present & (rows < K)[None, :], other=0.0)
        b = tl.load(b_ptr + moved * stride_bt + b_offsets, mask=present & (rows < K)[None, :], other=0.0)
        c = tl.load(c_ptr + moved * stride_ct + c_offsets, mask=kept, other=0.0)  # [C, COLUMNS]
        if GATED:
            # Asked for long before it is used: the compiler loads ahead only what is multiplied.
            e = tl.load(e_ptr + moved * stride_et + e_offsets, mask=kept, other=0.0)  # [C, COLUMNS]
        since = tl.load(gates_ptr + t + i)  # [C]
        end = tl.load(gates_ptr + t + (C - 1))
        age = since[None, :] - since[:, None] if MIRRORED else since[:, None] - since[None, :]
        rest = end - since
        if PRECISE:
            # What float32 loses of a sum is as large as a weak decay beside strong ones.
            low = tl.load(gates_ptr + plane + t + i)
            age += low[None, :] - low[:, None] if MIRRORED else low[:, None] - low[None, :]
            rest += tl.load(gates_ptr + plane + t + (C - 1)) - low
        seen = tl.exp2(rest) if MIRRORED else tl.exp2(since) * scale  # [C]
        left = tl.exp2(since) * scale if MIRRORED else tl.exp2(rest)  # [C]
        if GATED and not PRECISE:
            near = _shortened(state, DROPPED, False)
            read = tl.dot(a, near.to(a.dtype))  # [C, COLUMNS]
            read = tl.dot(a, (state - near).to(a.dtype), read)
        else:
            read = tl.dot(a, state.to(a.dtype), input_precision=PRECISION)
        if GATED:
            sums = tl.zeros([C], tl.float32)
            if not PRECISE:
                aged = e * seen[:, None]
                # The other role has rounded this product on its way into the state.
                sums += tl.sum((_shortened(aged, DROPPED, True) - aged) * read, axis=1)
        # Only now: registers are short. What a mask leaves out is 0 by its power.
        scores = tl.dot(a, tl.trans(b), input_precision=PRECISION)
        scores *= tl.exp2(tl.where(causal, age, float("-inf"))) * scale
        out = tl.dot(scores.to(c.dtype), c, read * seen[:, None], input_precision=PRECISION)
        if GATED:
            sums += tl.sum(e * out, axis=1)
            tl.store(rows_ptr + t + i, sums)
        tl.store(out_ptr + moved * (H * V) + out_offsets, out.to(c.dtype), mask=kept)
        weighted = (c * left[:, None]).to(c.dtype)
        state = tl.dot(tl.trans(b), weighted, state * tl.exp2(end), input_precision=PRECISION)
    return state


@triton.jit(do_not_specialize=LENGTHS)
def _simple_gla_bwd_role_kernel(
    a_ptr, b_ptr, c_ptr, e_ptr, gates_ptr, out_ptr, final_ptr, rows_ptr, ends_ptr,
    states_ptr, outside_ptr, d_final_t_ptr, table_ptr, cu_seqlens_ptr,
    stride_an, stride_at: tl.constexpr, stride_ah,
    stride_bn, stride_bt: tl.constexpr, stride_bh,
    stride_cn, stride_ct: tl.constexpr, stride_ch,
    stride_en, stride_et: tl.constexpr, stride_eh,
    T, H: tl.constexpr, group, slots, segments, per_sequence, segment_size, scale, sequences,
    K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROLE: tl.constexpr, DROPPED: tl.constexpr,
    VARLEN: tl.constexpr, SEGMENTED: tl.constexpr, HAS_OUTSIDE: tl.constexpr, HAS_D_FINAL: tl.constexpr,
    AHEAD: tl.constexpr, PRECISE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs of one segment, and role 2's final state where a sequence begins. K and V are those of a, b and of c.

    Segments with strong decays are left to the kernel of the sweep.

    e is what the output is multiplied with for rows[role, tile, head, slot, C] of roles 0 and 1; outside is a state that comes
    from there; role 0 writes ends[tile, sequence, head]: the final state times its gradient.
    """
    TILES: tl.constexpr = (V + COLUMNS - 1) // COLUMNS
    GATED: tl.constexpr = ROLE < 2
    pid = tl.program_id(0)
    tile = pid % TILES
    head = (pid // TILES) % H
    # Backwards: what the first kernel read last may still be in L2.
    segment = segments - 1 - pid // (TILES * H)
    n, j, begin, length = find_sequence(segment, table_ptr, cu_seqlens_ptr, T, per_sequence, VARLEN)
    if n < 0:
        return

    row = n.to(tl.int64) if not VARLEN else tl.zeros((), tl.int64)
    own = head.to(tl.int64)
    shared = (head // group).to(tl.int64)
    first_head, second_head = (own, shared) if GATED else (shared, own)
    a_ptr += row * stride_an + begin * stride_at + first_head * stride_ah
    b_ptr += row * stride_bn + begin * stride_bt + first_head * stride_bh
    c_ptr += row * stride_cn + begin * stride_ct + second_head * stride_ch
    e_ptr += row * stride_en + begin * stride_et + second_head * stride_eh
    out_ptr += (row * T + begin) * (H * V) + own * V
    plane = slots.to(tl.int64) * H * C
    slot = _first_slot(n, begin, T, C, VARLEN)
    gates_at = (own * slots + slot) * C
    rows_at = ((ROLE * TILES + tile).to(tl.int64) * H + head) * slots * C + slot * C

    rows = tl.arange(0, ROWS)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    state_offsets = rows[:, None] * V + columns[None, :]
    state_mask = (rows < K)[:, None] & (columns < V)[None, :]
    own_state = (n.to(tl.int64) * H + head) * (K * V) + state_offsets
    state = tl.zeros([ROWS, COLUMNS], tl.float32)
    if SEGMENTED:
        place = segment.to(tl.int64) * H + head
        state += tl.load(states_ptr + place * (K * V) + state_offsets, mask=state_mask, other=0.0)
    elif HAS_OUTSIDE:
        state += tl.load(outside_ptr + own_state, mask=state_mask, other=0.0)

    first = j * segment_size
    chunks = (tl.minimum(segment_size, length - first) + C - 1) // C
    if is_strong(gates_ptr, gates_at + first, chunks, length - first, C):
        return
    state = _walk(
        state, a_ptr, b_ptr, c_ptr, e_ptr, out_ptr, gates_ptr + gates_at, rows_ptr + rows_at, columns,
        first, chunks, length, plane, scale, stride_at, stride_bt, stride_ct, stride_et,
        H, K, V, C, ROWS, ROLE, DROPPED, AHEAD, PRECISE, PRECISION,
    )  # fmt: skip

    if ROLE == 2:
        tl.store(final_ptr + own_state, state, mask=state_mask & (j == 0))
    if HAS_D_FINAL and ROLE == 0:
        ending = first + segment_size >= length
        given = tl.load(d_final_t_ptr + own_state, mask=state_mask & ending, other=0.0)
        passed = tl.sum(tl.sum(state * given, axis=1), axis=0)
        tl.store(ends_ptr + (tile * sequences + n).to(tl.int64) * H + head, passed, mask=ending)
