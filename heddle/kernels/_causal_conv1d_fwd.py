# mypy: ignore-errors
"""The forward kernel of causal_conv1d: some tokens of some channels a program, the window read from lines that are in the cache.

Bytes: an element in and one out of a channel and token. FLOP: two a tap, and some four of silu.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels.common.jit import find_sequence

# A new length must not mean a new compilation.
LENGTHS = ("T", "tiles")


@triton.jit
def load_rows(
    x_ptr, state_ptr, token, stride, columns, in_columns, length,
    W: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """Tokens of a sequence in float32: those before its first one from the state, zeros where there is none.

    Shapes:  token: [ROWS];  columns: [COLUMNS];  state: [C, W-1]
    """
    there = (token >= 0) & (token < length)
    at = x_ptr + token.to(tl.int64)[:, None] * stride + columns[None, :]
    rows = tl.load(at, mask=there[:, None] & in_columns[None, :], other=0.0).to(tl.float32)
    if HAS_STATE:
        early = (token < 0) & (token > -W)
        at = state_ptr + columns.to(tl.int64)[None, :] * (W - 1) + (token + W - 1)[:, None]
        rows += tl.load(at, mask=early[:, None] & in_columns[None, :], other=0.0).to(tl.float32)
    return rows


@triton.jit
def convolve(
    x_ptr, state_ptr, weight_ptr, token, stride, columns, in_columns, length,
    W: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """The sum over the window that ends with each token, in float32.  Shapes:  out: [ROWS, COLUMNS]"""
    rows = load_rows(x_ptr, state_ptr, token - (W - 1), stride, columns, in_columns, length, W, HAS_STATE)
    y = rows * tl.load(weight_ptr + columns * W, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(1, W):
        at = token + tap - (W - 1)
        rows = load_rows(x_ptr, state_ptr, at, stride, columns, in_columns, length, W, HAS_STATE)
        y += (
            rows * tl.load(weight_ptr + columns * W + tap, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        )
    return y


@triton.jit(do_not_specialize=LENGTHS)
def _causal_conv1d_fwd_kernel(
    x_ptr, weight_ptr, state_ptr, y_ptr, table_ptr, cu_seqlens_ptr,
    stride_b, stride_t, C, T, tiles,
    W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SILU: tl.constexpr, HAS_STATE: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Some tokens of one sequence.  Shapes:  x, y: [B, T, C];  weight: [C, W];  state: [N, C, W-1]"""
    n, tile, begin, length = find_sequence(tl.program_id(0), table_ptr, cu_seqlens_ptr, T, tiles, VARLEN)
    if n < 0:
        return
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < C
    token = tile * ROWS + tl.arange(0, ROWS)
    row = begin if VARLEN else n.to(tl.int64) * T
    x_ptr += begin * stride_t if VARLEN else n.to(tl.int64) * stride_b
    state_ptr += n.to(tl.int64) * C * (W - 1)
    y = convolve(x_ptr, state_ptr, weight_ptr, token, stride_t, columns, in_columns, length, W, HAS_STATE)
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    at = y_ptr + (row + token)[:, None] * C + columns[None, :]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=(token < length)[:, None] & in_columns[None, :])
