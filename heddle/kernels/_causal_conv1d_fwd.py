# mypy: ignore-errors
"""The forward kernel of causal_conv1d.

A program walks token by token over `steps` times ROWS tokens of its channels, and a thread keeps its channels of the last W - 1
tokens in registers: each element is loaded once, but for the W - 1 tokens before the first one. ROWS rows are loaded before the
first of them is used.

Bytes: an element in and one out of a channel and token. FLOP: two a tap, and some four of silu.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels.common.jit import LOG2_E, find_sequence

# A new length must not mean a new compilation.
LENGTHS = ("T", "tiles", "steps")


@triton.jit
def load_row(row_ptr, token, columns, in_columns, length):
    """A token's row in float32, zeros where the sequence has no such token.  Shapes:  row: [C];  out: [COLUMNS]"""
    there = (token >= 0) & (token < length)
    return tl.load(row_ptr + columns, mask=in_columns & there, other=0.0).to(tl.float32)


@triton.jit
def load_early_row(x_ptr, state_ptr, token, stride, columns, in_columns, length, W: tl.constexpr):
    """The same of x, or of the state before the first token.  Shapes:  x: [T, C];  state: [C, W-1]"""
    row = load_row(x_ptr + token.to(tl.int64) * stride, token, columns, in_columns, length)
    before = (token < 0) & (token > -W)
    at = state_ptr + columns.to(tl.int64) * (W - 1) + (token + W - 1)
    return row + tl.load(at, mask=in_columns & before, other=0.0).to(tl.float32)


@triton.jit
def load_weights(weight_ptr, columns, in_columns, W: tl.constexpr):
    """The taps of each channel in float32, that of the oldest token first."""
    weights = ()
    for tap in tl.static_range(W):
        weights += (tl.load(weight_ptr + columns * W + tap, mask=in_columns, other=0.0).to(tl.float32),)
    return weights


@triton.jit
def weighted_sum(window, weights, W: tl.constexpr):
    """Of the W tokens of a window, oldest first."""
    y = window[0] * weights[0]
    for tap in tl.static_range(1, W):
        y += window[tap] * weights[tap]
    return y


@triton.jit
def sigmoid(y):
    # A quotient takes six instructions of each element, this two.
    root = tl.rsqrt(1.0 + tl.exp2(y * -LOG2_E))
    return root * root


@triton.jit(do_not_specialize=LENGTHS)
def _causal_conv1d_fwd_kernel(
    x_ptr, weight_ptr, state_ptr, y_ptr, table_ptr, cu_seqlens_ptr,
    stride_b, stride_t, C, T, tiles, steps,
    W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SILU: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Some tokens of one sequence.  Shapes:  x, y: [B, T, C];  weight: [C, W];  state: [N, C, W-1]"""
    blocks = tl.cdiv(C, COLUMNS)
    n, tile, begin, length = find_sequence(
        tl.program_id(0) // blocks, table_ptr, cu_seqlens_ptr, T, tiles, VARLEN
    )
    if n < 0:
        return
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < C
    n = n.to(tl.int64)
    x_ptr += begin * stride_t if VARLEN else n * stride_b
    y_ptr += (begin if VARLEN else n * T) * C
    state_ptr += n * C * (W - 1)
    weights = load_weights(weight_ptr, columns, in_columns, W)
    first = tile * steps * ROWS
    window = ()
    for i in tl.static_range(W - 1):
        token = first - (W - 1) + i
        window += (load_early_row(x_ptr, state_ptr, token, stride_t, columns, in_columns, length, W),)
    for step in range(tl.minimum(tl.cdiv(length - first, ROWS), steps)):
        now = first + step * ROWS
        x_now, y_now = x_ptr + now.to(tl.int64) * stride_t, y_ptr + now.to(tl.int64) * C
        rows = ()
        for i in tl.static_range(ROWS):
            rows += (load_row(x_now + i * stride_t, now + i, columns, in_columns, length),)
        for i in tl.static_range(ROWS):
            window += (rows[i],)
            y = weighted_sum(window, weights, W)
            if SILU:
                y *= sigmoid(y)
            there = in_columns & (now + i < length)
            tl.store(y_now + i * C + columns, y.to(y_ptr.dtype.element_ty), mask=there)
            window = window[1:]
