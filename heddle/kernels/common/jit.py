# mypy: ignore-errors
"""What kernels of more than one op call."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


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
