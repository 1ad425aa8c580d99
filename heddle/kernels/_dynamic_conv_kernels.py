# mypy: ignore-errors
"""The kernels of dynamic_conv: some tokens of one head a program, tap after tap; neighbours come from the cache.

With n(t, j) the token that t reads by tap j, w its own taps, u those of all tokens, and d the gradient of y:

    y_t = Σ_j (w_tj + u_j) x_n(t,j),   dx_s = Σ_j (w_tj + u_j) d_t for the t with n(t, j) = s,   dw_tj = d_t · x_n(t,j)

and du_j = Σ_t d_t x_n(t,j). So outputs and the gradient of x are one kernel, which looks the other way for the latter.
n(t, j) is t - j; over images it lies in a square around t, row by row: `down` rows below and `right` of it.

Bytes: each number read once and written once, but for neighbours of a program's tokens. FLOP: three a channel and tap, back six.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A new length must not mean a new compilation.
LENGTHS = ("T", "S", "shift", "width", "tiles", "stride_wb")


@triton.jit
def place_in(tap, side: tl.constexpr, SIDE: tl.constexpr, GRID: tl.constexpr):
    """The number of a tap among those of a kernel of this side, the own token's the first or the middle one; -1 for none.

    Over images taps are counted in squares of SIDE, the largest one.
    """
    if GRID:
        down, right = tap // SIDE - (SIDE - side) // 2, tap % SIDE - (SIDE - side) // 2
        inside = (down >= 0) & (down < side) & (right >= 0) & (right < side)
        return tl.where(inside, down * side + right, -1)
    return tl.where(tap < side, tap, -1)


@triton.jit
def neighbours(here, tap, shift, width, S, SIDE: tl.constexpr, GRID: tl.constexpr, BACKWARD: tl.constexpr):
    """What tokens read by a tap, or, BACKWARD, who reads them; and whether there is such a one among S.

    Shapes:  here, out: [ROWS];  shift: from places of `here` to those of what is read
    """
    if GRID:
        down, right = tap // SIDE - SIDE // 2, tap % SIDE - SIDE // 2
        if BACKWARD:
            down, right = -down, -right
        there = here + down * width + right
        column = here % width + right
        return there, (column >= 0) & (column < width) & (there >= 0) & (there < S)
    there = here + shift + (tap if BACKWARD else -tap)
    return there, (there >= 0) & (there < S)


@triton.jit(do_not_specialize=LENGTHS)
def _dynamic_conv_fwd_kernel(
    x_ptr, weight_ptr, static_ptr, y_ptr,
    stride_xb, stride_xt, stride_xh, stride_wb, stride_wt, stride_wh, H, T, S, shift, width, tiles,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SIDE: tl.constexpr, TAPS: tl.constexpr,
    STATIC: tl.constexpr, GRID: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Some tokens of one head. BACKWARD, x is the gradient of y and y that of x.

    Shapes:  x: [B, S, H, K];  y: [B, T, H, K];  weight: [B, outputs, H, taps];  static: [taps, H, K];  TAPS, STATIC: their sides
    """
    head = tl.program_id(0) % H
    tile = tl.program_id(0) // H % tiles
    b = (tl.program_id(0) // H // tiles).to(tl.int64)
    here, columns = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    in_columns = columns < K
    x_ptr += b * stride_xb + head.to(tl.int64) * stride_xh
    weight_ptr += b * stride_wb + head.to(tl.int64) * stride_wh
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for tap in range(SIDE * SIDE if GRID else SIDE):
        there, seen = neighbours(here, tap, shift, width, S, SIDE, GRID, BACKWARD)
        seen &= here < T
        own = place_in(tap, TAPS, SIDE, GRID)
        row = (there if BACKWARD else here).to(tl.int64)
        taps = tl.load(weight_ptr + row * stride_wt + own, mask=seen & (own >= 0), other=0.0).to(tl.float32)
        taps = taps[:, None]
        if STATIC > 0:
            fixed = place_in(tap, STATIC, SIDE, GRID)
            at = static_ptr + (fixed * H + head) * K + columns
            taps += tl.load(at, mask=in_columns & (fixed >= 0), other=0.0).to(tl.float32)[None, :]
        at = x_ptr + there.to(tl.int64)[:, None] * stride_xt + columns[None, :]
        total += taps * tl.load(at, mask=seen[:, None] & in_columns[None, :], other=0.0).to(tl.float32)
    at = y_ptr + ((b * T + here)[:, None] * H + head) * K + columns[None, :]
    tl.store(at, total.to(y_ptr.dtype.element_ty), mask=(here < T)[:, None] & in_columns[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def _dynamic_conv_bwd_kernel(
    d_ptr, x_ptr, d_weight_ptr, sums_ptr,
    stride_xb, stride_xt, stride_xh, H, T, S, shift, width, tiles,
    K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, SIDE: tl.constexpr,
    TAPS: tl.constexpr, STATIC: tl.constexpr, GRID: tl.constexpr,
):  # fmt: skip
    """The gradients of taps from STEPS tiles of tokens of one head, of taps that all tokens share a part of the sum.

    Shapes:  d: [B, T, H, K];  x: [B, S, H, K];  d_weight: [B, T, H, taps];  sums: [B tiles, taps, H, K], float32
    """
    head = tl.program_id(0) % H
    part = tl.program_id(0) // H
    b = (part // tiles).to(tl.int64)
    first, columns = part % tiles * STEPS * ROWS, tl.arange(0, COLUMNS)
    in_columns = columns < K
    x_ptr += b * stride_xb + head.to(tl.int64) * stride_xh
    owns: tl.constexpr = TAPS * TAPS if GRID else TAPS
    shared: tl.constexpr = STATIC * STATIC if GRID else STATIC
    for tap in range(SIDE * SIDE if GRID else SIDE):
        own = place_in(tap, TAPS, SIDE, GRID)
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for step in range(STEPS):
            here = first + step * ROWS + tl.arange(0, ROWS)
            there, seen = neighbours(here, tap, shift, width, S, SIDE, GRID, False)
            inside = (seen & (here < T))[:, None] & in_columns[None, :]
            row = (b * T + here) * H + head
            d = tl.load(d_ptr + row[:, None] * K + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            at = x_ptr + there.to(tl.int64)[:, None] * stride_xt + columns[None, :]
            met = d * tl.load(at, mask=inside, other=0.0).to(tl.float32)
            d_taps = tl.sum(met, axis=1).to(d_weight_ptr.dtype.element_ty)
            tl.store(d_weight_ptr + row * owns + own, d_taps, mask=(here < T) & (own >= 0))
            if STATIC > 0:
                total += met
        if STATIC > 0:
            fixed = place_in(tap, STATIC, SIDE, GRID)
            at = sums_ptr + ((part.to(tl.int64) * shared + fixed) * H + head) * K + columns
            tl.store(at, tl.sum(total, axis=0), mask=in_columns & (fixed >= 0))
