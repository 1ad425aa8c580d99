# mypy: ignore-errors
"""The forward kernels of taylor_attention, and the states that segments start from in both directions.

With y = scale q · k and f = 1 + y + y² / 2, sequences are cut into segments. Inside of one, weights are made tile by tile as in
softmax attention. What was before is known by the sums over all earlier keys

    S2_ij = Σ k_i k_j x,   S1_i = Σ k_i x,   S0 = Σ x,      x = r v and x = g, a column of its own,

so that Σ f x = S0 + scale Σ_i q_i S1_i + scale² / 2 Σ_ij q_i q_j S2_ij. Forward r and g are the weight of a token; backward the
same kernel sums over queries, with r = 1 / d and g = -(do · n) / d², d and n being denominator and numerator. A state is
FEATURES rows of V numbers, S2 before S1 before S0, and OWN numbers behind them, of
the column of its own and of none.

FLOP for a token and head: 2 (K + V) L / 2 inside of a segment of L tokens, 4 K² V to read a state and to write it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels.common.jit import find_sequence

# Of queries and keys, zeros behind those that there are: what a state holds is K² + K + 1 rows.
K = tl.constexpr(16)
FEATURES = tl.constexpr(273)
OWN = tl.constexpr(288)
# Rows of S2 that are read or written at a time: four dimensions with each of the sixteen.
GROUP = tl.constexpr(4)
PAIRS = tl.constexpr(64)
LENGTHS = ("T", "per_sequence", "size", "rest")


@triton.jit
def load_heads(x_ptr, rows, stride, present, columns, in_columns, WIDE: tl.constexpr):
    """Rows of one head; in float32 with WIDE.  Shapes:  rows, present: [R];  out: [R, C]"""
    x = tl.load(
        x_ptr + (rows * stride)[:, None] + columns[None, :], mask=present[:, None] & in_columns, other=0.0
    )
    return x.to(tl.float32) if WIDE else x


@triton.jit
def load_numbers(x_ptr, rows, stride, present, instead):
    """A number of each row.  Shapes:  out: [R] float32"""
    return tl.load(x_ptr + rows * stride, mask=present, other=instead).to(tl.float32)


@triton.jit
def pairs_of(x_ptr, x, rows, stride, present, group, WIDE: tl.constexpr):
    """Products of four dimensions with all, in float32.  Shapes:  x: [R, K];  out: [R, PAIRS], and the four: [R, GROUP]"""
    dims = group * GROUP + tl.arange(0, GROUP)
    four = load_heads(x_ptr, rows, stride, present, dims, (dims < K)[None, :], WIDE).to(tl.float32)
    products = four[:, :, None] * x.to(tl.float32)[:, None, :]
    return tl.reshape(products, [x.shape[0], PAIRS]), four


@triton.jit
def load_turned(x_ptr, rows, stride, present, dims, WIDE: tl.constexpr):
    """Dimensions `dims` of rows of one head.  Shapes:  out: [dims, R]"""
    mask = (dims < K)[:, None] & present[None, :]
    x = tl.load(x_ptr + dims[:, None] + (rows * stride)[None, :], mask=mask, other=0.0)
    return x.to(tl.float32) if WIDE else x


@triton.jit
def add_product(x, y, sums, PRECISION: tl.constexpr):
    """sums + x y; an x of float32 beside a y of two bytes in two parts, since a state keeps more digits than they have.

    Shapes:  x: [M, C];  y: [C, N];  sums: [M, N] float32
    """
    first = x.to(y.dtype)
    sums = tl.dot(first, y, sums, input_precision=PRECISION)
    if y.dtype != tl.float32:
        sums = tl.dot((x - first.to(tl.float32)).to(y.dtype), y, sums)
    return sums


@triton.jit
def load_state(state_ptr, rows, columns, in_v, V: tl.constexpr):
    """Rows of a state.  Shapes:  out: [R, C]"""
    return tl.load(state_ptr + rows[:, None] * V + columns[None, :], mask=in_v, other=0.0)


@triton.jit
def add_state(
    x,
    state_ptr,
    rest,
    rows,
    columns,
    in_v,
    sums,
    V: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums + x S for rows of a state; with SPLIT both in two parts, of S the second `rest` numbers behind the first.

    Weights are sums of what may cancel, of pairs of dimensions: rounded to eight bits they could end below 0.

    Shapes:  x: [R, rows], float32;  sums: [R, C]
    """
    state = load_state(state_ptr, rows, columns, in_v, V)
    first = x.to(state.dtype)
    sums = tl.dot(first, state, sums, input_precision=PRECISION)
    if SPLIT:
        sums = tl.dot(first, load_state(state_ptr + rest, rows, columns, in_v, V), sums)
        sums = tl.dot((x - first.to(tl.float32)).to(state.dtype), state, sums)
    return sums


@triton.jit
def by_state(
    x, state_ptr, rest, rows, columns, in_v, V: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr
):
    """x Sᵀ for rows of a state, as `add_state`.  Shapes:  x: [R, C], as states are stored;  out: [R, rows] float32"""
    p = tl.dot(x, tl.trans(load_state(state_ptr, rows, columns, in_v, V)), input_precision=PRECISION)
    if SPLIT:
        p = tl.dot(x, tl.trans(load_state(state_ptr + rest, rows, columns, in_v, V)), p)
    return p


@triton.jit
def load_ones(state_ptr, rest, columns, V: tl.constexpr, SPLIT: tl.constexpr):
    """The last row of a state, S0.  Shapes:  out: [C] float32"""
    at = state_ptr + (K * K + K) * V + columns
    ones = tl.load(at, mask=columns < V, other=0.0).to(tl.float32)
    if SPLIT:
        ones += tl.load(at + rest, mask=columns < V, other=0.0).to(tl.float32)
    return ones


@triton.jit(do_not_specialize=LENGTHS)
def _taylor_attention_state_kernel(
    x_ptr, y_ptr, r_ptr, g_ptr, out_ptr, table_ptr, cu_seqlens_ptr,
    stride_xb, stride_xt, stride_xh, stride_yb, stride_yt, stride_yh, stride_rb, stride_rt, stride_rh,
    T, H, per_sequence, size,
    V: tl.constexpr, COLUMNS: tl.constexpr, C: tl.constexpr,
    WEIGHTED: tl.constexpr, VARLEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one segment adds to the state, for one group of rows of S2 and a tile of columns.

    Shapes:  x: [B, T, H, K];  y: [B, T, H, V];  r, g: [B, T, H] of the strides of r, 1 each unless WEIGHTED
             out: [segments, H, FEATURES V + OWN]
    """
    group, tile = tl.program_id(1) % (K // GROUP), tl.program_id(1) // (K // GROUP)
    segment, h = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    n, j, begin, length = find_sequence(segment, table_ptr, cu_seqlens_ptr, T, per_sequence, VARLEN)
    segment = segment.to(tl.int64)
    b = tl.zeros((), tl.int64) if VARLEN else n.to(tl.int64)
    if n < 0:
        length = 0
    x_ptr += b * stride_xb + begin * stride_xt + h * stride_xh
    y_ptr += b * stride_yb + begin * stride_yt + h * stride_yh
    r_ptr += b * stride_rb + begin * stride_rt + h * stride_rh
    g_ptr += b * stride_rb + begin * stride_rt + h * stride_rh
    dims, columns = tl.arange(0, K), tile * COLUMNS + tl.arange(0, COLUMNS)
    pairs = tl.zeros([PAIRS, COLUMNS], tl.float32)
    singles = tl.zeros([K, COLUMNS], tl.float32)
    ones = tl.zeros([COLUMNS], tl.float32)
    own_pairs, own_singles = tl.zeros([PAIRS], tl.float32), tl.zeros([K], tl.float32)
    own_ones = tl.zeros([C], tl.float32)
    for first in range(j * size, tl.minimum(length, (j + 1) * size), C):
        row = first + tl.arange(0, C)
        present, at = row < tl.minimum(length, (j + 1) * size), row.to(tl.int64)
        # Turned as it is loaded: what is made in registers and then turned is no operand to trust on Hopper.
        x = load_turned(x_ptr, at, stride_xt, present, dims, WIDE)
        four = load_turned(x_ptr, at, stride_xt, present, group * GROUP + tl.arange(0, GROUP), WIDE)
        products = four.to(tl.float32)[:, None, :] * x.to(tl.float32)[None, :, :]
        two, one = tl.reshape(products, [PAIRS, C]), x.to(tl.float32)
        y = load_heads(y_ptr, at, stride_yt, present, columns, (columns < V)[None, :], WIDE)
        g = tl.where(present, 1.0, 0.0)
        if WEIGHTED:
            g = load_numbers(g_ptr, at, stride_rt, present, 0.0)
        own_pairs += tl.sum(two * g[None, :], axis=1)
        own_singles += tl.sum(one * g[None, :], axis=1)
        own_ones += g
        last = y.to(tl.float32)
        if WEIGHTED:
            r = load_numbers(r_ptr, at, stride_rt, present, 0.0)
            two, one, last = two * r[None, :], one * r[None, :], last * r[:, None]
        ones += tl.sum(last, axis=0)
        pairs = add_product(two, y, pairs, PRECISION)
        singles = add_product(one, y, singles, PRECISION)
    out_ptr += (segment * H + h) * (FEATURES * V + OWN)
    inside = (columns < V)[None, :]
    pair, single = group * PAIRS + tl.arange(0, PAIRS), dims + K * K
    tl.store(out_ptr + pair[:, None] * V + columns[None, :], pairs, mask=inside)
    tl.store(out_ptr + FEATURES * V + pair, own_pairs, mask=(pair >= 0) & (tile == 0))
    if group == 0:
        tl.store(out_ptr + single[:, None] * V + columns[None, :], singles, mask=inside)
        tl.store(out_ptr + (K * K + K) * V + columns, ones, mask=columns < V)
        tl.store(out_ptr + FEATURES * V + single, own_singles, mask=(dims >= 0) & (tile == 0))
        tl.store(out_ptr + FEATURES * V + K * K + K, tl.sum(own_ones, axis=0), mask=tile == 0)


@triton.jit(do_not_specialize=("per_sequence", "rest"))
def _taylor_attention_carry_kernel(
    added_ptr, before_ptr, own_ptr, given_ptr, last_ptr, offsets_ptr,
    H, per_sequence, rest,
    V: tl.constexpr, BLOCK: tl.constexpr, SPLIT: tl.constexpr,
    BACKWARD: tl.constexpr, VARLEN: tl.constexpr, HAS_GIVEN: tl.constexpr,
):  # fmt: skip
    """The sums before each segment (behind it with BACKWARD) and in the end, of a block of numbers of one head.

    With SPLIT what rounding takes from `before` stands `rest` numbers behind.

    Shapes:  added: [segments, H, FEATURES V + OWN];  before: [segments, H, FEATURES V];  own: [segments, H, OWN], float32
             given, last: [N, H, FEATURES V + OWN]
    """
    ROWS: tl.constexpr = FEATURES * V
    SIZE: tl.constexpr = ROWS + OWN
    n, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < SIZE
    if VARLEN:
        begin, end = tl.load(offsets_ptr + n), tl.load(offsets_ptr + n + 1)
    else:
        begin, end = (n * per_sequence).to(tl.int32), ((n + 1) * per_sequence).to(tl.int32)
    state = tl.zeros([BLOCK], tl.float32)
    if HAS_GIVEN:
        state = tl.load(given_ptr + (n * H + h) * SIZE + place, mask=inside, other=0.0)
    for step in range(end - begin):
        segment = (end - 1 - step if BACKWARD else begin + step).to(tl.int64)
        unit = segment * H + h
        first = state.to(before_ptr.dtype.element_ty)
        tl.store(before_ptr + unit * ROWS + place, first, mask=place < ROWS)
        if SPLIT:
            second = (state - first.to(tl.float32)).to(before_ptr.dtype.element_ty)
            tl.store(before_ptr + rest + unit * ROWS + place, second, mask=place < ROWS)
        tl.store(own_ptr + unit * OWN + place - ROWS, state, mask=(place >= ROWS) & inside)
        # Behind the last number there is nothing.
        state += tl.load(added_ptr + unit * SIZE + place, mask=place < ROWS + FEATURES, other=0.0)
    tl.store(last_ptr + (n * H + h) * SIZE + place, state, mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def _taylor_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, w_ptr, before_ptr, own_ptr, out_ptr, total_ptr, table_ptr, cu_seqlens_ptr,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_wb, stride_wt, stride_wh,
    T, H, per_sequence, size, rest, scale,
    V: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr,
    WEIGHTED: tl.constexpr, VARLEN: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one segment and head: n / d, and d.

    Shapes:  w: [B, T, H], if WEIGHTED;  before: [segments, H, FEATURES V];  own: [segments, H, OWN]
             out: [B, T, H, V];  total: [B, T, H]
    """
    segment, h = tl.program_id(0) // H, (tl.program_id(0) % H).to(tl.int64)
    n, j, begin, length = find_sequence(segment, table_ptr, cu_seqlens_ptr, T, per_sequence, VARLEN)
    segment = segment.to(tl.int64)
    first, end = j * size, tl.minimum(length, (j + 1) * size)
    start = first + tl.program_id(1) * ROWS
    if (n < 0) | (start >= end):
        return
    b = tl.zeros((), tl.int64) if VARLEN else n.to(tl.int64)
    q_ptr += b * stride_qb + begin * stride_qt + h * stride_qh
    k_ptr += b * stride_kb + begin * stride_kt + h * stride_kh
    v_ptr += b * stride_vb + begin * stride_vt + h * stride_vh
    w_ptr += b * stride_wb + begin * stride_wt + h * stride_wh
    dims, columns, i = tl.arange(0, K), tl.arange(0, ROWS_V), tl.arange(0, KEYS)
    in_v = (columns < V)[None, :]
    row = start + tl.arange(0, ROWS)
    present, at = row < end, row.to(tl.int64)
    q = load_heads(q_ptr, at, stride_qt, present, dims, (dims < K)[None, :], WIDE)
    sums = tl.zeros([ROWS, ROWS_V], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for key in range(first, tl.minimum(end, start + ROWS), KEYS):
        column = key + i
        there, from_ = column < end, column.to(tl.int64)
        k = load_heads(k_ptr, from_, stride_kt, there, dims, (dims < K)[None, :], WIDE)
        v = load_heads(v_ptr, from_, stride_vt, there, columns, in_v, WIDE)
        y = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        f = tl.where((column[None, :] <= row[:, None]) & there[None, :], 1.0 + y + 0.5 * y * y, 0.0)
        if WEIGHTED:
            f *= load_numbers(w_ptr, from_, stride_wt, there, 0.0)[None, :]
        total += tl.sum(f, axis=1)
        sums = tl.dot(f.to(v.dtype), v, sums, input_precision=PRECISION)
    if BEFORE:
        unit = segment * H + h
        before_ptr += unit * (FEATURES * V)
        own_ptr += unit * OWN
        half = 0.5 * scale * scale
        for group in tl.static_range(K // GROUP):
            two, _ = pairs_of(q_ptr, q, at, stride_qt, present, group, WIDE)
            pair = group * PAIRS + tl.arange(0, PAIRS)
            sums = add_state(two * half, before_ptr, rest, pair, columns, in_v, sums, V, SPLIT, PRECISION)
            total += tl.sum(two * tl.load(own_ptr + pair)[None, :], axis=1) * half
        one = q.to(tl.float32)
        sums = add_state(
            one * scale, before_ptr, rest, dims + K * K, columns, in_v, sums, V, SPLIT, PRECISION
        )
        total += tl.sum(one * tl.load(own_ptr + dims + K * K)[None, :], axis=1) * scale
        sums += load_ones(before_ptr, rest, columns, V, SPLIT)[None, :]
        total += tl.load(own_ptr + K * K + K)
    # Where nothing is written yet both sums are 0, and so is their ratio.
    out = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    rows = (b * T + begin + at) * H + h
    tl.store(
        out_ptr + rows[:, None] * V + columns[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=present[:, None] & in_v,
    )
    tl.store(total_ptr + rows, total, mask=present)
