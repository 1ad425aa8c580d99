# mypy: ignore-errors
"""The backward kernel of causal_conv1d: nothing is kept for it but the inputs.

With g_t, the gradient of the sum before the activation, for which the sum is computed again:

    dw_i = Σ_t g_t x_(t-W+1+i),   dx_t = Σ_j w_(W-1-j) g_(t+j)

A program walks token by token over `steps` times ROWS tokens of its channels, and a thread keeps its channels of the last W - 1
rows of x and of g in registers: each g is computed once, but for those of the W - 1 tokens before its first one. A g completes
the dx of W - 1 tokens before, so the last walk goes on for as many. ROWS rows are loaded before the first of them is used.

Bytes: two elements in and one out of a channel and token. FLOP: 6 W of the sums, some 8 of the activation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels._causal_conv1d_fwd import (
    LENGTHS,
    load_early_row,
    load_row,
    load_weights,
    sigmoid,
    weighted_sum,
)
from heddle.kernels.common.jit import find_sequence


@triton.jit
def gradient_of_sum(d, window, weights, W: tl.constexpr, SILU: tl.constexpr):
    """g of a token from the gradient of its output; `window` are the W tokens that it sees, oldest first."""
    if SILU:
        y = weighted_sum(window, weights, W)
        open_ = sigmoid(y)
        d *= open_ * (1.0 + y * (1.0 - open_))
    return d


@triton.jit
def store_state_gradient(
    d_ptr, x_ptr, state_ptr, d_state_ptr, weights, first, stride, columns, in_columns, length, C,
    W: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """The dx of the W - 1 tokens before `first`, the first of a sequence.  Shapes:  d_state: [C, W-1]"""
    window, gs = (), ()
    for i in tl.static_range(W - 1):
        at = first + i - (W - 1)
        window += (load_early_row(x_ptr, state_ptr, at, stride, columns, in_columns, length, W),)
    for i in tl.static_range(W - 1):
        window += (load_row(x_ptr + i * stride, first + i, columns, in_columns, length),)
        d = load_row(d_ptr + i * C, first + i, columns, in_columns, length)
        gs += (gradient_of_sum(d, window, weights, W, SILU),)
        window = window[1:]
        total = gs[i] * weights[0]
        for j in tl.static_range(i):
            total += gs[j] * weights[i - j]
        at = d_state_ptr + columns.to(tl.int64) * (W - 1) + i
        tl.store(at, total.to(d_state_ptr.dtype.element_ty), mask=in_columns)


@triton.jit(do_not_specialize=LENGTHS)
def _causal_conv1d_bwd_kernel(
    d_ptr, x_ptr, weight_ptr, state_ptr, dx_ptr, d_weight_ptr, d_state_ptr, table_ptr, cu_seqlens_ptr,
    stride_b, stride_t, C, T, tiles, steps,
    W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SILU: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Some tokens of one sequence.

    Shapes:  d, x, dx: [B, T, C];  weight: [C, W];  state, d_state: [N, C, W-1];  d_weight: [parts, W, C], float32
    """
    blocks = tl.cdiv(C, COLUMNS)
    part = tl.program_id(0) // blocks
    n, tile, begin, length = find_sequence(part, table_ptr, cu_seqlens_ptr, T, tiles, VARLEN)
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < C
    # A place that no sequence has leaves zeros.
    length = tl.where(n < 0, -W, length)
    n = tl.maximum(n, 0).to(tl.int64)
    row = begin if VARLEN else n * T
    x_ptr += begin * stride_t if VARLEN else n * stride_b
    d_ptr += row * C
    dx_ptr += row * C
    state_ptr += n * C * (W - 1)
    weights = load_weights(weight_ptr, columns, in_columns, W)
    sums = ()
    for _ in tl.static_range(W):
        sums += (tl.zeros((COLUMNS,), dtype=tl.float32),)

    # The W - 1 tokens before the first one, whose sums are others': what they saw, and their g.
    first = tile * steps * ROWS
    window, gs = (), ()
    for i in tl.static_range(W - 1):
        token = first - 2 * (W - 1) + i
        window += (load_early_row(x_ptr, state_ptr, token, stride_t, columns, in_columns, length, W),)
    for i in tl.static_range(W - 1):
        token = first - (W - 1) + i
        window += (load_early_row(x_ptr, state_ptr, token, stride_t, columns, in_columns, length, W),)
        d = load_row(d_ptr + token.to(tl.int64) * C, token, columns, in_columns, length)
        gs += (gradient_of_sum(d, window, weights, W, SILU),)
        window = window[1:]

    for step in range(tl.minimum(tl.cdiv(length + W - 1 - first, ROWS), steps)):
        now = first + step * ROWS
        x_now, d_now = x_ptr + now.to(tl.int64) * stride_t, d_ptr + now.to(tl.int64) * C
        dx_now = dx_ptr + (now - (W - 1)).to(tl.int64) * C
        rows, upstream = (), ()
        for i in tl.static_range(ROWS):
            rows += (load_row(x_now + i * stride_t, now + i, columns, in_columns, length),)
            upstream += (load_row(d_now + i * C, now + i, columns, in_columns, length),)
        for i in tl.static_range(ROWS):
            window += (rows[i],)
            gs += (gradient_of_sum(upstream[i], window, weights, W, SILU),)
            dx = gs[0] * weights[W - 1]
            added = (sums[0] + gs[W - 1] * window[0],)
            for tap in tl.static_range(1, W):
                dx += gs[tap] * weights[W - 1 - tap]
                added += (sums[tap] + gs[W - 1] * window[tap],)
            sums = added
            done = now + i - (W - 1)
            there = in_columns & (done >= 0) & (done < length)
            tl.store(dx_now + i * C + columns, dx.to(dx_ptr.dtype.element_ty), mask=there)
            window, gs = window[1:], gs[1:]
    for tap in tl.static_range(W):
        place = (part.to(tl.int64) * W + tap) * C
        tl.store(d_weight_ptr + place + columns, sums[tap], mask=in_columns)

    if W > 1 and (tile == 0) & (length >= 0):
        state_at = n * C * (W - 1)
        store_state_gradient(
            d_ptr, x_ptr, state_ptr, d_state_ptr + state_at, weights, first, stride_t, columns, in_columns, length, C, W, SILU
        )  # fmt: skip
