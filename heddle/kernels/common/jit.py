# mypy: ignore-errors
"""What kernels of more than one op call."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Numbers of two bytes in a line of the cache.
LINE = tl.constexpr(64)


@triton.jit
def by_role(role, forward, first, second, third, BACKWARD: tl.constexpr):
    """What the role at hand uses."""
    if BACKWARD:
        return tl.where(role == 0, first, tl.where(role == 1, second, third))
    return forward


@triton.jit
def find_sequence(segment, table_ptr, cu_seqlens_ptr, T, per_sequence, VARLEN: tl.constexpr):
    """Sequence, index of the segment in it, first token of the sequence, its length."""
    if VARLEN:
        n = tl.load(table_ptr + 2 * segment)
        j = tl.load(table_ptr + 2 * segment + 1)
        begin = tl.load(cu_seqlens_ptr + tl.maximum(n, 0)).to(tl.int64)
        end = tl.load(cu_seqlens_ptr + tl.maximum(n, 0) + 1).to(tl.int64)
        return n, j, begin, (end - begin).to(tl.int32)
    return segment // per_sequence, segment % per_sequence, tl.zeros((), tl.int64), T


@triton.jit
def load_tile(
    x_ptr, x_tiles, b, head, token, begin, stride, inside, columns, in_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one head from the one at `begin` + `token` on; with TILES by a descriptor, which costs threads nothing.

    A descriptor does not look at `inside`: rows that are not there are zeros, or tokens that nobody here sees.
    """
    if TILES:
        place = (begin + token).to(tl.int32)
        return x_tiles.load([b.to(tl.int32), head.to(tl.int32), place, 0]).reshape([ROWS, COLUMNS])
    rows = tl.arange(0, ROWS) * stride
    at = x_ptr + token.to(tl.int64) * stride + rows[:, None] + columns[None, :]
    return tl.load(at, mask=inside[:, None] & in_columns, other=0.0)


@triton.jit
def ask_for(pointers):
    """Has the lines of memory at these addresses brought to the L2 cache; waits for nothing. Unknown to the interpreter."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def ask_for_rows(x_ptr, stride, there, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Asks for ROWS rows of COLUMNS numbers of two bytes, of which so many are `there`."""
    LINES: tl.constexpr = (COLUMNS + LINE - 1) // LINE
    line = tl.arange(0, ROWS * LINES)
    ask_for(x_ptr + (tl.minimum(line // LINES, there - 1) * stride + line % LINES * LINE))


@triton.jit
def best_of(logits, top, NEAR: tl.constexpr = False):
    """Which are the `top` largest, the earlier ones of equals, but never -inf; and how many of them there are up to each.

    The least of them is found from its highest bit down, by counting how many are as large. With NEAR it is looked for first
    within two powers of two of the largest, where it mostly is: seven counts fewer.
    """
    raw = tl.where(logits == 0.0, 0.0, logits).to(tl.int32, bitcast=True)
    # Whole numbers in the order of the logits.
    order = tl.where(raw < 0, raw ^ 0x7FFFFFFF, raw)
    held = tl.sum((order >= 0).to(tl.int32), axis=0)
    least = tl.where(held >= top, 0, -2147483648)
    held = tl.where(held >= top, held, 2147483647)
    step = held * 0 + 1073741824
    if NEAR:
        near = tl.maximum(tl.max(order, axis=0), 16777216 - 2147483647) - 16777215
        count = tl.sum((order >= near).to(tl.int32), axis=0)
        held = tl.where(count >= top, count, held)
        least = tl.where(count >= top, near, least)
        step = tl.where(count >= top, 8388608, step)
    while (step > 0) & (held != top):
        count = tl.sum((order >= least + step).to(tl.int32), axis=0)
        held = tl.where(count >= top, count, held)
        least = tl.where(count >= top, least + step, least)
        step = step // 2
    real = logits > float("-inf")
    above, equal = real & (order > least), real & (order == least)
    # Both are counted at once: there are fewer than 2^15 of either.
    counts = tl.cumsum(above.to(tl.int32) * 65536 + equal.to(tl.int32), axis=0)
    spare = top - tl.sum(above.to(tl.int32), axis=0)
    equals = counts & 65535
    return above | (equal & (equals <= spare)), (counts >> 16) + tl.minimum(equals, spare)
