# mypy: ignore-errors
"""The forward kernel of grid_window_attention, and how all its kernels find their way over the grid.

A program holds a box of queries: some rows times some columns of one frame. Their windows together are a box of keys in each
frame of a run of frames, and the program walks over that in smaller boxes. For each of them, over the keys j that a row sees,

    m' = max(m, c max_j s_j),   l' = 2^(m - m') l + Σ_j 2^(c s_j - m'),   a' = 2^(m - m') a + Σ_j 2^(c s_j - m') v_j

with s_j = q · k_j and c = scale log2(e) > 0; then o = a / l, and m + log2(l) is kept for the gradients. Addresses are computed,
so nothing is listed; columns are neighbours in memory. All queries of a box are of one frame, so that frames need no mask. Rows
and columns are compared each as a distance without a sign: one comparison for both ends of a window.

FLOP: 2 (K + V) for a query and a key of the boxes that are read: of a box of r rows whose windows have W, r - 1 + W rows, rounded
up to whole boxes of keys, and so for columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels.common.jit import LOG2_E

# A new length must not mean a new compilation.
LENGTHS = ("T", "rows", "columns", "tiles", "down", "across", "reach_f", "reach_r", "reach_c")
# A place that no window reaches.
FAR = tl.constexpr(1 << 30)


@triton.jit
def window_of(place, reach, size, INWARD: tl.constexpr):
    """The first key of the window at a place of an axis, and the place behind the last one."""
    if INWARD:
        listed = tl.minimum(2 * reach + 1, size)
        first = tl.minimum(tl.maximum(place - reach, 0), size - listed)
        return first, first + listed
    return tl.maximum(place - reach, 0), tl.minimum(place + reach + 1, size)


@triton.jit
def seers_of(place, reach, size, INWARD: tl.constexpr):
    """The first query of an axis whose window holds a key, and the place behind the last one: what `window_of` turned is."""
    first, end = tl.maximum(place - reach, 0), tl.minimum(place + reach + 1, size)
    if INWARD:
        listed = tl.minimum(2 * reach + 1, size)
        # Near an end windows stand still.
        first = tl.where(place < listed, 0, first)
        end = tl.where(place >= size - listed, size, end)
    return first, end


@triton.jit
def real_tokens(first_ptr, count_ptr, b, T, PADDED: tl.constexpr):
    """The first token of a row of the batch that is no padding, and how many there are."""
    first, count = 0, T
    if PADDED:
        first, count = tl.load(first_ptr + b), tl.load(count_ptr + b)
    return first, count


@triton.jit
def extent(count, rows, columns, FRAMES: tl.constexpr):
    """Frames and rows of the grid that so many tokens make."""
    if FRAMES:
        return tl.cdiv(count, rows * columns), rows
    return 1, tl.cdiv(count, columns)


@triton.jit
def corner(tile, down, across, BOX_R: tl.constexpr, BOX_C: tl.constexpr):
    """Frame, first row and first column of the box that a program holds."""
    return tile // (down * across), tile // across % down * BOX_R, tile % across * BOX_C


@triton.jit
def places_in_box(
    f, r0, c0, rows, columns, T, TOKENS: tl.constexpr, BOX_C: tl.constexpr, FRAMES: tl.constexpr
):
    """Row, column and place of each token of a box, and whether the grid has it, padding at its end included."""
    i = tl.arange(0, TOKENS)
    r, c = r0 + i // BOX_C, c0 + i % BOX_C
    place = (f * rows + r) * columns + c
    on_grid = (c < columns) & (place < T)
    if FRAMES:
        on_grid = on_grid & (r < rows)
    return r, c, place, on_grid


@triton.jit
def token_of(place, first, T):
    """Where places stand in memory: those behind the real tokens go on with what is before these."""
    token = place + first
    return tl.where(token >= T, token - T, token).to(tl.int64)


@triton.jit
def boxes_of(first, end, size: tl.constexpr):
    """How many boxes so many rows or columns take."""
    return tl.cdiv(tl.maximum(end - first, 0), size)


@triton.jit
def walked_box(
    index, from_f, from_r, end_r, from_c, end_c, rows, columns, count, by_c, in_frame, all_r, all_end_r, all_c, all_end_c,
    TOKENS: tl.constexpr, BOX_C: tl.constexpr, FRAMES: tl.constexpr,
):  # fmt: skip
    """Row and column of each token of the box at hand, the place of its first one, which of them are there, and whether all are
    seen by all: rows and columns of these lie from `all_*` on, up to `all_end_*`."""
    f = from_f
    if FRAMES:
        f = from_f + index // in_frame
        index = index % in_frame
    r0, c0 = from_r + index // by_c * (TOKENS // BOX_C), from_c + index % by_c * BOX_C
    i = tl.arange(0, TOKENS)
    r, c = r0 + i // BOX_C, c0 + i % BOX_C
    place = (f * rows + r0) * columns + c0
    inside = (r < end_r) & (c < end_c) & (place + i // BOX_C * columns + i % BOX_C < count)
    last_r, last_c = TOKENS // BOX_C - 1, BOX_C - 1
    is_whole = (r0 >= all_r) & (r0 + last_r < all_end_r) & (c0 >= all_c) & (c0 + last_c < all_end_c)
    return r, c, place, inside, is_whole & (place + last_r * columns + last_c < count)


@triton.jit
def hide(
    s,
    r,
    c,
    inside,
    first_r,
    length_r,
    first_c,
    length_c,
    ROW_WINDOW: tl.constexpr,
    COLUMN_WINDOW: tl.constexpr,
):
    """Logits, -inf where what is walked over is out of the window of what is held, or not there.

    Shapes:  r, c, inside: of what is walked over;  first_*, length_*: of what is held;  all broadcast with s
    """
    if ROW_WINDOW:
        seen = (tl.where(inside, r, FAR) - first_r).to(tl.uint32) < length_r.to(tl.uint32)
        if COLUMN_WINDOW:
            seen = seen & ((c - first_c).to(tl.uint32) < length_c.to(tl.uint32))
    elif COLUMN_WINDOW:
        seen = (tl.where(inside, c, FAR) - first_c).to(tl.uint32) < length_c.to(tl.uint32)
    else:
        seen = inside
    return tl.where(seen, s, float("-inf"))


@triton.jit(do_not_specialize=LENGTHS)
def _grid_window_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lost_ptr, lse_ptr, begin_ptr, count_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot,
    stride_lb, stride_lh, stride_lt,
    T, rows, columns, tiles, down, across, reach_f, reach_r, reach_c, H, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, BOX_C: tl.constexpr, WALKED_C: tl.constexpr, GROUP: tl.constexpr, FRAMES: tl.constexpr,
    ROW_WINDOW: tl.constexpr, COLUMN_WINDOW: tl.constexpr, INWARD: tl.constexpr, PADDED: tl.constexpr,
    LOST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One box of ROWS queries of one head, BOX_C columns wide; WALKED_C columns has a box of KEYS keys.

    Shapes:  out: [B, H, T, V];  lse: [B, H, T] float32, base 2, inf of padding;  begin, count: [B] int32, with PADDED
             lost (strides l): what rounding took from out, with LOST
    """
    unit, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    b, h = unit // H, unit % H
    begin, count = real_tokens(begin_ptr, count_ptr, b, T, PADDED)
    frames, height = extent(count, rows, columns, FRAMES)
    f, r0, c0 = corner(tile, down, across, ROWS // BOX_C, BOX_C)
    r, c, place, on_grid = places_in_box(f, r0, c0, rows, columns, T, ROWS, BOX_C, FRAMES)
    present, token = on_grid & (place < count), token_of(place, begin, T)
    columns_k, columns_v, i = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V), tl.arange(0, KEYS)
    in_k, in_v = (columns_k < K)[None, :], (columns_v < V)[None, :]
    q_at = q_ptr + b * stride_qb + h * stride_qh + (token * stride_qt)[:, None] + columns_k[None, :]
    q = tl.load(q_at, mask=present[:, None] & in_k, other=0.0)  # [ROWS, ROWS_K]
    k_ptr += b * stride_kb + h // GROUP * stride_kh
    v_ptr += b * stride_vb + h // GROUP * stride_vh

    first_r, end_r = window_of(r, reach_r, height, INWARD)
    first_c, end_c = window_of(c, reach_c, columns, INWARD)
    from_f, to_f = window_of(f, reach_f, frames, INWARD)
    from_r, all_end_r = window_of(r0, reach_r, height, INWARD)
    all_r, to_r = window_of(tl.minimum(r0 + ROWS // BOX_C, height) - 1, reach_r, height, INWARD)
    from_c, all_end_c = window_of(c0, reach_c, columns, INWARD)
    all_c, to_c = window_of(tl.minimum(c0 + BOX_C, columns) - 1, reach_c, columns, INWARD)
    by_c = boxes_of(from_c, to_c, WALKED_C)
    in_frame = by_c * boxes_of(from_r, to_r, KEYS // WALKED_C)
    walked = tl.where((f < frames) & (r0 < height), (to_f - from_f) * in_frame, 0)
    ahead = (i // WALKED_C * columns + i % WALKED_C).to(tl.int64)
    k_ahead, v_ahead = (ahead * stride_kt)[:, None], (ahead * stride_vt)[:, None]

    factor = scale * LOG2_E
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, ROWS_V], tl.float32)
    for index in range(0, walked):
        key_r, key_c, key, inside, is_whole = walked_box(
            index, from_f, from_r, to_r, from_c, to_c, rows, columns, count, by_c, in_frame,
            all_r, all_end_r, all_c, all_end_c, KEYS, WALKED_C, FRAMES,
        )  # fmt: skip
        at = (begin + key).to(tl.int64)
        k_at = k_ptr + at * stride_kt + k_ahead + columns_k[None, :]
        v_at = v_ptr + at * stride_vt + v_ahead + columns_v[None, :]
        k = tl.load(k_at, mask=inside[:, None] & in_k, other=0.0)
        v = tl.load(v_at, mask=inside[:, None] & in_v, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [ROWS, KEYS]
        if not is_whole:
            s = hide(
                s, key_r[None, :], key_c[None, :], inside[None, :], first_r[:, None], (end_r - first_r)[:, None],
                first_c[:, None], (end_c - first_c)[:, None], ROW_WINDOW, COLUMN_WINDOW,
            )  # fmt: skip
        # Of logits times the factor: a fused product less itself rounded is not 0, and each box would fade the sums.
        higher = tl.maximum(most, tl.max(s, axis=1) * factor)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s * factor - base[:, None])
        faded = tl.exp2(most - base)
        total = total * faded + tl.sum(p, axis=1)
        sums = tl.dot(p.to(v.dtype), v, sums * faded[:, None], input_precision=PRECISION)
        most = higher

    # NaN as well, which is handed on.
    some = present & (total != 0.0)
    out = tl.where(some[:, None], sums / tl.where(some, total, 1.0)[:, None], 0.0)
    lse = tl.where(some, most + tl.log2(tl.where(some, total, 1.0)), float("inf"))
    tl.store(lse_ptr + unit * T + token, lse, mask=on_grid)
    out_at = out_ptr + b * stride_ob + h * stride_oh + (token * stride_ot)[:, None] + columns_v[None, :]
    rounded = out.to(out_ptr.dtype.element_ty)
    tl.store(out_at, rounded, mask=on_grid[:, None] & in_v)
    if LOST:
        at = lost_ptr + b * stride_lb + h * stride_lh + (token * stride_lt)[:, None] + columns_v[None, :]
        lost = (out - rounded.to(tl.float32)).to(lost_ptr.dtype.element_ty)
        tl.store(at, lost, mask=on_grid[:, None] & in_v)
