# mypy: ignore-errors
"""The kernels of decay_attention: one sweep over time, forward in one role, backward in three.

    out_t = scale Σ_{s ≤ t} λ^(t-s) (a_t · b_s) c_s,   state = Σ_s λ^(T-1-s) b_s c_sᵀ

    role      a   b   c   out   time
    forward   q   k   v   o     as it runs
    0         dO  v   k   dq    as it runs
    1         v   dO  q   dk    mirrored
    2         k   q   dO  dv    mirrored

A program holds the state (all rows, COLUMNS columns, float32) in registers and walks over its segment of a sequence in
chunks. If there are programs enough, a segment is a whole sequence: one launch, each input read once. Otherwise a first
kernel sums up each segment on its own, a second carries these states from segment to segment, and each segment of the
third starts from there. The decay is fixed, so the first kernel skips what is forgotten by the end of its segment.

Bytes for a token and head, K = V = 128, bfloat16: forward 1024 (q, k, v, o), and 512 for k and v again if segmented;
backward 2560, since roles 1 and 2 run side by side and share q and dO through L2. Products for a token and head:
2 (C (K + V) + 2 K V) = 98 kFLOP a role at C = 64, and 32 kFLOP for the first kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels.common.jit import LOG2_E, by_role, find_sequence

# What has halved this many times counts as nothing: it is far below the precision of float32 sums.
HALVINGS = tl.constexpr(29.0)
# Segments whose states are carried in one product.
CARRIED = tl.constexpr(16)
# A new length must not mean a new compilation.
LENGTHS = ("T", "segments", "per_sequence", "segment_size", "first_role")


@triton.jit(do_not_specialize=LENGTHS)
def _decay_attention_sweep_state_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, log_decay_ptr, states_ptr, table_ptr, cu_seqlens_ptr,
    stride_qn, stride_qt, stride_qh,
    stride_kn, stride_kt, stride_kh,
    stride_vn, stride_vt, stride_vh,
    stride_dn, stride_dt, stride_dh,
    T, H, segments, per_sequence, segment_size, first_role, scale,
    K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROLES: tl.constexpr,
    BACKWARD: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state that each segment alone would leave: states[role, segment, head]. K and V are those of b and c."""
    TILES: tl.constexpr = (V + COLUMNS - 1) // COLUMNS
    pid = tl.program_id(0)
    tile = pid % TILES
    role = first_role + (pid // TILES) % ROLES
    head = (pid // (TILES * ROLES)) % H
    segment = pid // (TILES * ROLES * H)
    n, j, begin, length = find_sequence(segment, table_ptr, cu_seqlens_ptr, T, per_sequence, VARLEN)
    # Nothing follows the last segment of a sequence.
    if (n < 0) | ((j + 1) * segment_size >= length):
        return

    mirrored = BACKWARD & (role != 0)
    lag = tl.where(mirrored, 0, 1)
    gain = tl.where(mirrored, scale, 1.0)
    first_row = tl.where(mirrored, length - 1 - j * segment_size, j * segment_size)
    sign = tl.where(mirrored, -1, 1)
    stride_bn = by_role(role, stride_kn, stride_vn, stride_dn, stride_qn, BACKWARD)
    stride_bt = by_role(role, stride_kt, stride_vt, stride_dt, stride_qt, BACKWARD)
    stride_bh = by_role(role, stride_kh, stride_vh, stride_dh, stride_qh, BACKWARD)
    stride_cn = by_role(role, stride_vn, stride_kn, stride_qn, stride_dn, BACKWARD)
    stride_ct = by_role(role, stride_vt, stride_kt, stride_qt, stride_dt, BACKWARD)
    stride_ch = by_role(role, stride_vh, stride_kh, stride_qh, stride_dh, BACKWARD)
    row = n.to(tl.int64) if not VARLEN else tl.zeros((), tl.int64)
    b_ptr = by_role(role, k_ptr, v_ptr, do_ptr, q_ptr, BACKWARD)
    c_ptr = by_role(role, v_ptr, k_ptr, q_ptr, do_ptr, BACKWARD)
    b_ptr += row * stride_bn + (begin + first_row) * stride_bt + head.to(tl.int64) * stride_bh
    c_ptr += row * stride_cn + (begin + first_row) * stride_ct + head.to(tl.int64) * stride_ch

    i = tl.arange(0, C)
    rows = tl.arange(0, ROWS)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    rate = tl.load(log_decay_ptr + head).to(tl.float32) * LOG2_E
    # As in the kernel of outputs.
    NARROW: tl.constexpr = BACKWARD and c_ptr.dtype.element_ty == tl.float16
    left = tl.exp2(rate * (C - i - (1 if NARROW else lag))) * gain  # [C]
    over = tl.exp2(rate * C)
    b_offsets = (i * (sign * stride_bt))[:, None] + rows[None, :]
    c_offsets = (i * (sign * stride_ct))[:, None] + columns[None, :]
    b_mask = (rows < K)[None, :]
    c_mask = (columns < V)[None, :]

    half_life = 1.0 / tl.maximum(-rate, 1e-9)
    remembered = tl.minimum(half_life * HALVINGS, segment_size * 1.0).to(tl.int32)
    start = (segment_size - remembered) // C * C
    state = tl.zeros([ROWS, COLUMNS], tl.float32)
    for t in range(start, segment_size, C):
        b_at = b_ptr + (sign * t).to(tl.int64) * stride_bt
        c_at = c_ptr + (sign * t).to(tl.int64) * stride_ct
        b = tl.load(b_at + b_offsets, mask=b_mask, other=0.0)  # [C, ROWS]
        c = tl.load(c_at + c_offsets, mask=c_mask, other=0.0)  # [C, COLUMNS]
        weighted = (c * left[:, None]).to(c.dtype)
        state = tl.dot(tl.trans(b), weighted, state * over, input_precision=PRECISION)
    if NARROW:
        state *= tl.exp2(rate * (1 - lag))
    place = ((role - first_role) * segments + segment).to(tl.int64) * H + head
    offsets = rows[:, None] * V + columns[None, :]
    mask = (rows < K)[:, None] & (columns < V)[None, :]
    tl.store(states_ptr + place * (K * V) + offsets, state, mask=mask)


@triton.jit(do_not_specialize=LENGTHS)
def _decay_attention_sweep_carry_kernel(
    states_ptr, initial_ptr, d_final_ptr, d_final_t_ptr, log_decay_ptr, offsets_ptr,
    H, segments, per_sequence, segment_size, first_role,
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

    rate = tl.load(log_decay_ptr + head).to(tl.float32) * LOG2_E * segment_size
    i = tl.arange(0, CARRIED)
    steps = i[:, None] - 1 - i[None, :]
    weights = tl.where(steps >= 0, tl.exp2(rate * tl.where(steps >= 0, steps, 0)), 0.0)  # [CARRIED, CARRIED]
    aged = tl.exp2(rate * i)
    to_end = tl.exp2(rate * (CARRIED - 1 - i))
    over = tl.exp2(rate * CARRIED)
    place = (tl.program_id(2) * segments + first).to(tl.int64)
    for j in range(0, count, CARRIED):
        index = j + i
        pointers = states_ptr + (((place + index) * H + head) * SIZE)[:, None] + at[None, :]
        # The last segment of a sequence was not summed up.
        added = tl.load(pointers, mask=(index < count - 1)[:, None] & inside[None, :], other=0.0)
        before = tl.dot(weights, added, input_precision="ieee") + aged[:, None] * carried[None, :]
        tl.store(pointers, before, mask=(index < count)[:, None] & inside[None, :])
        carried = over * carried + tl.sum(to_end[:, None] * added, axis=0)


@triton.jit(do_not_specialize=LENGTHS)
def _decay_attention_sweep_output_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, log_decay_ptr,
    first_out_ptr, second_out_ptr, third_out_ptr, final_ptr,
    states_ptr, initial_ptr, d_final_ptr, d_final_t_ptr, table_ptr, cu_seqlens_ptr,
    stride_qn, stride_qt, stride_qh,
    stride_kn, stride_kt, stride_kh,
    stride_vn, stride_vt, stride_vh,
    stride_dn, stride_dt, stride_dh,
    T, H, segments, per_sequence, segment_size, first_role, scale,
    K: tl.constexpr, V: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROLES: tl.constexpr,
    BACKWARD: tl.constexpr, VARLEN: tl.constexpr, SEGMENTED: tl.constexpr,
    HAS_INITIAL: tl.constexpr, HAS_D_FINAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs of one segment, and the final state where a sequence ends. K and V are those of a, b and of c."""
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
    lag = tl.where(mirrored, 0, 1)
    own_length = tl.minimum(segment_size, length - j * segment_size)
    first_row = tl.where(mirrored, length - 1 - j * segment_size, j * segment_size)
    sign = tl.where(mirrored, -1, 1)
    stride_an = by_role(role, stride_qn, stride_dn, stride_vn, stride_kn, BACKWARD)
    stride_at = by_role(role, stride_qt, stride_dt, stride_vt, stride_kt, BACKWARD)
    stride_ah = by_role(role, stride_qh, stride_dh, stride_vh, stride_kh, BACKWARD)
    stride_bn = by_role(role, stride_kn, stride_vn, stride_dn, stride_qn, BACKWARD)
    stride_bt = by_role(role, stride_kt, stride_vt, stride_dt, stride_qt, BACKWARD)
    stride_bh = by_role(role, stride_kh, stride_vh, stride_dh, stride_qh, BACKWARD)
    stride_cn = by_role(role, stride_vn, stride_kn, stride_qn, stride_dn, BACKWARD)
    stride_ct = by_role(role, stride_vt, stride_kt, stride_qt, stride_dt, BACKWARD)
    stride_ch = by_role(role, stride_vh, stride_kh, stride_qh, stride_dh, BACKWARD)
    row = n.to(tl.int64) if not VARLEN else tl.zeros((), tl.int64)
    token = begin + first_row
    a_ptr = by_role(role, q_ptr, do_ptr, v_ptr, k_ptr, BACKWARD)
    b_ptr = by_role(role, k_ptr, v_ptr, do_ptr, q_ptr, BACKWARD)
    c_ptr = by_role(role, v_ptr, k_ptr, q_ptr, do_ptr, BACKWARD)
    out_ptr = by_role(role, first_out_ptr, first_out_ptr, second_out_ptr, third_out_ptr, BACKWARD)
    a_ptr += row * stride_an + token * stride_at + head.to(tl.int64) * stride_ah
    b_ptr += row * stride_bn + token * stride_bt + head.to(tl.int64) * stride_bh
    c_ptr += row * stride_cn + token * stride_ct + head.to(tl.int64) * stride_ch
    out_ptr += (row * T + token) * (H * V) + head.to(tl.int64) * V

    i = tl.arange(0, C)
    rows = tl.arange(0, ROWS)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    rate = tl.load(log_decay_ptr + head).to(tl.float32) * LOG2_E
    age = i[:, None] - i[None, :]
    # Masked before exp2: above the diagonal the power could overflow.
    within = tl.where(age >= 0, tl.exp2(rate * tl.where(age >= 0, age, 0)) * scale, 0.0)  # [C, C]
    seen = tl.exp2(rate * (i + lag)) * tl.where(mirrored, 1.0, scale)  # [C]
    gain = tl.where(mirrored, scale, 1.0)
    # Float16 ends at 6e-8, above what a strong decay leaves: the decay of the token that a mirrored sweep reads last in a chunk,
    # which all others have passed as well, is left to the sum, and owed to it until the next chunk.
    NARROW: tl.constexpr = BACKWARD and c_ptr.dtype.element_ty == tl.float16
    opening = rate * (1 - lag) if NARROW else 0.0

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

    a_offsets = (i * (sign * stride_at))[:, None] + rows[None, :]
    b_offsets = (i * (sign * stride_bt))[:, None] + rows[None, :]
    c_offsets = (i * (sign * stride_ct))[:, None] + columns[None, :]
    out_offsets = (i * (sign * H * V))[:, None] + columns[None, :]
    owed = 0.0
    for t in range(0, own_length, C):
        moved = (sign * t).to(tl.int64)
        present = (i < own_length - t)[:, None]
        narrow = present & (rows < K)[None, :]
        a = tl.load(a_ptr + moved * stride_at + a_offsets, mask=narrow, other=0.0)  # [C, ROWS]
        b = tl.load(b_ptr + moved * stride_bt + b_offsets, mask=narrow, other=0.0)  # [C, ROWS]
        kept = present & (columns < V)[None, :]
        c = tl.load(c_ptr + moved * stride_ct + c_offsets, mask=kept, other=0.0)  # [C, COLUMNS]
        scores = tl.dot(a, tl.trans(b), input_precision=PRECISION) * within  # [C, C]
        out = tl.dot(a, state.to(a.dtype), input_precision=PRECISION) * seen[:, None]  # [C, COLUMNS]
        if NARROW:
            out *= tl.exp2(owed)
        out = tl.dot(scores.to(c.dtype), c, out, input_precision=PRECISION)
        tl.store(out_ptr + moved * (H * V) + out_offsets, out.to(c.dtype), mask=kept)
        size = tl.minimum(own_length - t, C)
        left = tl.exp2(rate * tl.maximum(size - i - (1 if NARROW else lag), 0)) * gain  # [C]
        weighted = (c * left[:, None]).to(c.dtype)
        over = rate * size
        if NARROW:
            over += owed - opening
            owed = opening
        state = tl.dot(tl.trans(b), weighted, state * tl.exp2(over), input_precision=PRECISION)
    if NARROW:
        state *= tl.exp2(owed)

    if (j + 1) * segment_size >= length:
        if BACKWARD:
            tl.store(final_ptr + own_state, state, mask=state_mask & (role == 2))
        else:
            tl.store(final_ptr + own_state, state, mask=state_mask)
