# mypy: ignore-errors
"""The backward kernel of causal_conv1d: nothing is kept for it but the inputs.

With g_t, the gradient of the sum before the activation, which is computed again for each of the W tokens that saw x_t:

    dx_t = Σ_j w_(W-1-j) g_(t+j),   dw_i = Σ_t g_t x_(t-W+1+i)

A program walks over STEPS tiles of tokens, so that few partial sums of dw are left. Tokens begin W - 1 before the first one: what
reaches those is the gradient of the state.

Bytes: two elements in and one out of a channel and token. FLOP: some 2 W² of the sums, 8 W of the activation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels._causal_conv1d_fwd import LENGTHS, convolve, load_rows
from heddle.kernels.common.jit import find_sequence


@triton.jit
def gradient_of_sum(
    x_ptr, state_ptr, weight_ptr, d_ptr, token, stride, columns, in_columns, length, C,
    W: tl.constexpr, SILU: tl.constexpr, HAS_STATE: tl.constexpr,
):  # fmt: skip
    """g of each token, zero where there is none.  Shapes:  d: [T, C];  out: [ROWS, COLUMNS]"""
    there = (token >= 0) & (token < length)
    at = d_ptr + token.to(tl.int64)[:, None] * C + columns[None, :]
    g = tl.load(at, mask=there[:, None] & in_columns[None, :], other=0.0).to(tl.float32)
    if SILU:
        y = convolve(x_ptr, state_ptr, weight_ptr, token, stride, columns, in_columns, length, W, HAS_STATE)
        open_ = 1.0 / (1.0 + tl.exp(-y))
        g *= open_ * (1.0 + y * (1.0 - open_))
    return g


@triton.jit(do_not_specialize=LENGTHS)
def _causal_conv1d_bwd_kernel(
    d_ptr, x_ptr, weight_ptr, state_ptr, dx_ptr, d_weight_ptr, d_state_ptr, table_ptr, cu_seqlens_ptr,
    stride_b, stride_t, C, T, tiles,
    W: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, COLUMNS: tl.constexpr,
    SILU: tl.constexpr, HAS_STATE: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Some tokens of one sequence.

    Shapes:  d, x, dx: [B, T, C];  weight: [C, W];  state, d_state: [N, C, W-1];  d_weight: [programs, W, C], float32
    """
    n, tile, begin, length = find_sequence(tl.program_id(0), table_ptr, cu_seqlens_ptr, T, tiles, VARLEN)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < C
    # A place that no sequence has leaves zeros.
    length = tl.where(n < 0, -W, length)
    n = tl.maximum(n, 0).to(tl.int64)
    row = begin if VARLEN else n * T
    x_ptr += begin * stride_t if VARLEN else n * stride_b
    d_ptr += row * C
    dx_ptr += row * C
    state_ptr += n * C * (W - 1)
    taps = tl.arange(0, TAPS)
    d_weight = tl.zeros((TAPS, COLUMNS), dtype=tl.float32)
    for step in range(STEPS):
        token = (tile * STEPS + step) * ROWS + tl.arange(0, ROWS) - (W - 1)
        dx = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for j in tl.static_range(W):
            g = gradient_of_sum(
                x_ptr, state_ptr, weight_ptr, d_ptr, token + j, stride_t, columns, in_columns, length, C, W, SILU, HAS_STATE
            )  # fmt: skip
            at = weight_ptr + columns * W + (W - 1 - j)
            dx += g * tl.load(at, mask=in_columns, other=0.0).to(tl.float32)[None, :]
            if j == 0:
                for tap in tl.static_range(W):
                    at = token + tap - (W - 1)
                    rows = load_rows(
                        x_ptr, state_ptr, at, stride_t, columns, in_columns, length, W, HAS_STATE
                    )
                    d_weight += tl.where(taps[:, None] == tap, tl.sum(g * rows, axis=0)[None, :], 0.0)
        there = (token >= 0) & (token < length)
        at = dx_ptr + token.to(tl.int64)[:, None] * C + columns[None, :]
        tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=there[:, None] & in_columns[None, :])
        if HAS_STATE:
            before = (token < 0) & (length >= 0)
            at = d_state_ptr + (n * C + columns)[None, :] * (W - 1) + (token + W - 1)[:, None]
            tl.store(at, dx.to(d_state_ptr.dtype.element_ty), mask=before[:, None] & in_columns[None, :])
    at = d_weight_ptr + (tl.program_id(0).to(tl.int64) * W + taps)[:, None] * C + columns[None, :]
    tl.store(at, d_weight, mask=(taps < W)[:, None] & in_columns[None, :])
