# mypy: ignore-errors
"""The backward kernels of ttt with a linear memory: a sweep from the end of a sequence, and all that is left, in parallel.

The forward sweep has left the weights W before each chunk, what was taken from them at its end, and the errors e. With dW,
dM and dG the gradients of weights, momentum and open gradient, a chunk gives, backwards:

    sweep    dG = dM - d(W - M),   dM = theta dG,   u = k dG,   dv = -rate u,   d_rate = u · e,   dW += qᵀ d_out + kᵀ (rate u)
    tokens   dq = d_out + d_out Wᵀ,   dk = (rate e) dGᵀ + rate u + (rate u) Wᵀ      (the last two with the loss "l2" alone)

The sweep, as the forward one, has some columns of a memory in a program, and d_rate comes in as many parts.

Bytes for a token and head of D = 128 in bfloat16: the sweep reads q, k, d_out and v or e, and writes dv (1280); tokens read
d_out, v or e, and dv, and write dq and dk (1280). Products: 4 D² and 4 D², with the loss "l2" 2 D² more in each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels._ttt_fwd import (
    AFTER,
    BEFORE,
    EPS,
    LENGTHS,
    LINE,
    column_norms,
    count_blocks,
    find_tokens,
    first_slot,
    tokens_read,
)


@triton.jit
def norm_gradient(x, had, gradient):
    """The gradients of x and of `had`, from that of x had / (|x| + EPS), column by column."""
    size = column_norms(x)
    inverse = 1.0 / (size + EPS)
    along = tl.sum(gradient * x, axis=0) * inverse
    # A column of zeros has nothing along itself.
    back = along * had * inverse / tl.where(size > 0.0, size, 1.0)
    return gradient * (had * inverse)[None, :] - x * back[None, :], along


@triton.jit(do_not_specialize=LENGTHS)
def _ttt_backward_kernel(
    q_ptr, k_ptr, v_ptr, d_out_ptr, rates_ptr, weight_ptr, initial_ptr, d_final_ptr, states_ptr, errors_ptr, means_ptr,
    dv_ptr, d_rates_ptr, d_initial_ptr, d_before_ptr, d_had_ptr, d_steps_ptr, d_means_ptr, cu_seqlens_ptr,
    stride_qn, stride_qt, stride_qh,
    stride_kn, stride_kt, stride_kh,
    stride_vn, stride_vt, stride_vh,
    stride_dn, stride_dt, stride_dh,
    stride_on, stride_ot, stride_oh,
    T, H, chunk, slots, sequences, has_initial, has_d_final, stride_d_rates,
    D: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MOMENTUM: tl.constexpr, L2: tl.constexpr,
    NORMALISE: tl.constexpr, VARLEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of values, rates and the initial state, and of what each chunk has taken; one sequence, some columns of a head.

    Shapes:  dv, errors: [B, T, H, *];  d_rates: [TILES, B, T, H];  d_initial, d_final: [N, H, F];  d_before: [TILES, N, H]
             d_had: [N, H, D], of the norms of the first weights;  d_steps: [slots, H, D, D];  d_means: [TILES, slots, H]
    """
    SIZE: tl.constexpr = D * D
    F: tl.constexpr = (3 if MOMENTUM else 2) * SIZE + 2
    TILES: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) % TILES
    head = ((tl.program_id(0) // TILES) % H).to(tl.int64)
    n = tl.program_id(0) // (TILES * H)
    row, begin, length, behind = find_tokens(n, cu_seqlens_ptr, T, VARLEN)
    before = tokens_read(initial_ptr, n, H, has_initial, chunk, F)
    slot = first_slot(n, behind, chunk)

    i = tl.arange(0, C)
    rows = tl.arange(0, ROWS)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = rows < D, columns < D
    inside = in_rows[:, None] & in_columns[None, :]
    square = rows[:, None] * D + columns[None, :]
    q_ptr += row * stride_qn + begin * stride_qt + head * stride_qh
    k_ptr += row * stride_kn + begin * stride_kt + head * stride_kh
    v_ptr += row * stride_vn + begin * stride_vt + head * stride_vh
    d_out_ptr += row * stride_dn + begin * stride_dt + head * stride_dh
    dv_ptr += row * stride_on + begin * stride_ot + head * stride_oh
    errors_ptr += row * stride_on + begin * stride_ot + head * stride_oh
    rates_ptr += behind * H + head
    d_rates_ptr += tile.to(tl.int64) * stride_d_rates + behind * H + head
    own = n.to(tl.int64) * H + head
    initial_ptr += own * F
    d_final_ptr += own * F
    d_initial_ptr += own * F
    wanted = inside & (has_d_final != 0)
    had = column_norms(tl.load(weight_ptr + head * SIZE + square, mask=inside, other=0.0))
    d_had = tl.zeros([COLUMNS], tl.float32)
    d_weights = tl.load(d_final_ptr + square, mask=wanted, other=0.0)  # [ROWS, COLUMNS]
    # Without momentum no more than a name.
    d_moving = tl.load(d_final_ptr + SIZE + square, mask=wanted & MOMENTUM, other=0.0)
    d_gradient = tl.load(d_final_ptr + (F - 2 - SIZE) + square, mask=wanted, other=0.0)
    d_mean = tl.load(d_final_ptr + F - 2, mask=(has_d_final != 0) & (tile == 0), other=0.0)

    t = length
    for _ in range(count_blocks(before, length, chunk, C)):
        index = (t - 1 + before) // chunk
        at = (slot + index) * H + head
        is_end = (t + before) % chunk == 0
        if is_end:
            old = tl.load(states_ptr + at * (2 * SIZE) + square, mask=inside, other=0.0)
            step = tl.load(states_ptr + at * (2 * SIZE) + SIZE + square, mask=inside, other=0.0)
            if NORMALISE == AFTER:
                d_weights, along = norm_gradient(old - step, had, d_weights)
                d_had += along
            d_gradient = d_moving - d_weights
            if NORMALISE == BEFORE:
                d_weights, along = norm_gradient(old, had, d_weights)
                d_had += along
            d_mean = 0.0
            if MOMENTUM:
                moved = tl.load(
                    initial_ptr + SIZE + square, mask=inside & (index == 0) & (has_initial != 0), other=0.0
                )
                moved_at = states_ptr + (at - H) * (2 * SIZE) + SIZE
                moved += tl.load(moved_at + square, mask=inside & (index > 0), other=0.0)
                d_mean = tl.sum(d_gradient * moved)
                d_moving = d_gradient * tl.load(means_ptr + at)
        half = d_gradient.to(k_ptr.dtype.element_ty)
        if is_end | (t == length):
            tl.store(d_steps_ptr + at * SIZE + square, half, mask=inside)
            tl.store(d_means_ptr + (tile.to(tl.int64) * slots * H + at), d_mean)
        start = tl.maximum(tl.maximum(index * chunk - before, 0), t - C)
        present = start + i < t
        wide = present[:, None] & in_rows[None, :]
        kept = present[:, None] & in_columns[None, :]
        since = start.to(tl.int64)
        k_offsets = since * stride_kt + (i * stride_kt)[:, None] + rows[None, :]
        k = tl.load(k_ptr + k_offsets, mask=wide, other=0.0)  # [C, ROWS]
        q_offsets = since * stride_qt + (i * stride_qt)[:, None] + rows[None, :]
        q = tl.load(q_ptr + q_offsets, mask=wide, other=0.0)  # [C, ROWS]
        d_out_offsets = since * stride_dt + (i * stride_dt)[:, None] + columns[None, :]
        d_out = tl.load(d_out_ptr + d_out_offsets, mask=kept, other=0.0)  # [C, COLUMNS]
        rate = tl.load(rates_ptr + since * H + i * H, mask=present, other=0.0)
        out_offsets = since * stride_ot + (i * stride_ot)[:, None] + columns[None, :]
        if L2:
            error = tl.load(errors_ptr + out_offsets, mask=kept, other=0.0).to(tl.float32)  # [C, COLUMNS]
        else:
            v_offsets = since * stride_vt + (i * stride_vt)[:, None] + columns[None, :]
            error = -tl.load(v_ptr + v_offsets, mask=kept, other=0.0).to(tl.float32)  # [C, COLUMNS]
        pulled = tl.dot(k, half, input_precision=PRECISION)  # [C, COLUMNS]
        tl.store(d_rates_ptr + since * H + i * H, tl.sum(pulled * error, axis=1), mask=present)
        d_error = (pulled * rate[:, None]).to(k.dtype)
        tl.store(dv_ptr + out_offsets, -d_error, mask=kept)
        d_weights = tl.dot(tl.trans(q), d_out, d_weights, input_precision=PRECISION)
        if L2:
            d_weights = tl.dot(tl.trans(k), d_error, d_weights, input_precision=PRECISION)
        t = start

    tl.store(d_initial_ptr + square, d_weights, mask=inside)
    if MOMENTUM:
        tl.store(d_initial_ptr + SIZE + square, d_moving, mask=inside)
    tl.store(d_initial_ptr + (F - 2 - SIZE) + square, d_gradient, mask=inside)
    if tile == 0:
        # Their parts are summed elsewhere.
        tl.store(d_initial_ptr + F - 2, 0.0)
        tl.store(d_initial_ptr + F - 1, 0.0)
    tl.store(d_before_ptr + (tile.to(tl.int64) * sequences * H + own), d_mean)
    tl.store(d_had_ptr + own * D + columns, d_had, mask=in_columns)


@triton.jit(do_not_specialize=LENGTHS)
def _ttt_token_kernel(
    v_ptr, d_out_ptr, rates_ptr, states_ptr, errors_ptr, dv_ptr, dq_ptr, dk_ptr, d_gates_ptr, d_steps_ptr, d_means_ptr,
    lines_ptr,
    stride_vn, stride_vt, stride_vh,
    stride_dn, stride_dt, stride_dh,
    stride_on, stride_ot, stride_oh,
    T, H, chunk, slots, blocks,
    D: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
    MOMENTUM: tl.constexpr, L2: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, keys and gates: one block of a chunk's tokens, COLUMNS channels of a head.

    Shapes:  dq, dk, dv, errors: [B, T, H, *];  d_gates: [B, T, H];  d_means: [PARTS, slots, H];  the others as in the sweep
    """
    SIZE: tl.constexpr = D * D
    TILES: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) % TILES
    head = ((tl.program_id(0) // TILES) % H).to(tl.int64)
    block = tl.program_id(0) // (TILES * H)
    slot = block // blocks
    start = block % blocks * C
    count = tl.load(lines_ptr + slot * LINE + 2)
    if start >= count:
        return
    row = tl.load(lines_ptr + slot * LINE).to(tl.int64)
    first = tl.load(lines_ptr + slot * LINE + 1).to(tl.int64) + start
    at = slot.to(tl.int64) * H + head

    i = tl.arange(0, C)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    present, in_columns = i < count - start, columns < D
    out_offsets = row * stride_on + first * stride_ot + head * stride_oh + (i * stride_ot)[:, None]
    v_offsets = row * stride_vn + first * stride_vt + head * stride_vh + (i * stride_vt)[:, None]
    d_out_offsets = row * stride_dn + first * stride_dt + head * stride_dh + (i * stride_dt)[:, None]
    flat = (row * T + first + i) * H + head
    rate = tl.load(rates_ptr + flat, mask=present, other=0.0)
    kept = present[:, None] & in_columns[None, :]
    dq = tl.load(d_out_ptr + d_out_offsets + columns[None, :], mask=kept, other=0.0).to(tl.float32)
    dk = tl.zeros([C, COLUMNS], tl.float32)
    if L2:
        dk -= tl.load(dv_ptr + out_offsets + columns[None, :], mask=kept, other=0.0)
    for tail in range(0, D, ROWS):
        rows = tail + tl.arange(0, ROWS)
        in_rows = rows < D
        wide = present[:, None] & in_rows[None, :]
        inside = in_rows[:, None] & in_columns[None, :]
        turned = columns[None, :] * D + rows[:, None]
        d_out = tl.load(d_out_ptr + d_out_offsets + rows[None, :], mask=wide, other=0.0)  # [C, ROWS]
        weights = tl.load(states_ptr + at * (2 * SIZE) + turned, mask=inside, other=0.0).to(
            d_out.dtype
        )  # [ROWS, COLUMNS]
        step = tl.load(d_steps_ptr + at * SIZE + turned, mask=inside, other=0.0)  # [ROWS, COLUMNS]
        dq = tl.dot(d_out, weights, dq, input_precision=PRECISION)
        if L2:
            error = tl.load(errors_ptr + out_offsets + rows[None, :], mask=wide, other=0.0).to(tl.float32)
            dv = tl.load(dv_ptr + out_offsets + rows[None, :], mask=wide, other=0.0)  # [C, ROWS]
            dk = tl.dot(-dv, weights, dk, input_precision=PRECISION)
        else:
            error = -tl.load(v_ptr + v_offsets + rows[None, :], mask=wide, other=0.0).to(tl.float32)
        pull = (error * rate[:, None]).to(d_out.dtype)  # [C, ROWS]
        dk = tl.dot(pull, step, dk, input_precision=PRECISION)
    tl.store(dq_ptr + out_offsets + columns[None, :], dq.to(dq_ptr.dtype.element_ty), mask=kept)
    tl.store(dk_ptr + out_offsets + columns[None, :], dk.to(dk_ptr.dtype.element_ty), mask=kept)
    if MOMENTUM & (tile == 0):
        d_mean = 0.0
        for part in range(PARTS):
            d_mean += tl.load(d_means_ptr + (part * slots).to(tl.int64) * H + at)
        tl.store(d_gates_ptr + flat, tl.zeros([C], tl.float32) + d_mean / chunk, mask=present)
