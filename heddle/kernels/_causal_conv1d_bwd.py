# mypy: ignore-errors
"""The backward kernels of causal_conv1d: nothing is kept for them but the inputs.

With g_t, the gradient of the sum before the activation, for which the sum is computed again:

    dw_i = Σ_t g_t x_(t-W+1+i),   dx_t = Σ_j w_(W-1-j) g_(t+j)

The first kernel writes g in float32 and sums over its tokens for dw; a program walks over STEPS tiles, so that few partial sums
are left. The second is a convolution the other way. Its tokens begin W - 1 before the first one: what reaches those is the
gradient of the state.

Bytes of a channel and token: two elements in and four bytes out, then four bytes in and an element out. One kernel for both
computed g for each of the W tokens that see x_t and took three times as long.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels._causal_conv1d_fwd import NUMBERS, load_rows, load_tap
from heddle.kernels.common.jit import find_sequence


@triton.jit(do_not_specialize=NUMBERS)
def _causal_conv1d_sum_kernel(
    d_ptr, x_ptr, weight_ptr, state_ptr, g_ptr, d_weight_ptr, table_ptr, cu_seqlens_ptr,
    stride_b, stride_t, C, T, tiles, has_state,
    W: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, COLUMNS: tl.constexpr,
    SILU: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Some tiles of one sequence.

    Shapes:  d, x: [B, T, C];  g: the same in float32;  weight: [C, W];  state: [N, C, W-1];  d_weight: [programs, W, C], float32
    """
    n, part, begin, length = find_sequence(tl.program_id(0), table_ptr, cu_seqlens_ptr, T, tiles, VARLEN)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < C
    # A place that no sequence has leaves zeros.
    length = tl.where(n < 0, 0, length)
    n = tl.maximum(n, 0).to(tl.int64)
    row = begin if VARLEN else n * T
    x_ptr += begin * stride_t if VARLEN else n * stride_b
    state_ptr += n * C * (W - 1)
    # By the age of what is multiplied; there are no lists of tensors.
    sum_0 = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    sum_1 = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    sum_2 = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    sum_3 = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for step in range(STEPS):
        tile = part * STEPS + step
        is_early = (has_state != 0) & (tile == 0)
        token = tile * ROWS + tl.arange(0, ROWS)
        there = (token < length)[:, None] & in_columns[None, :]
        at = (row + token)[:, None] * C + columns[None, :]
        g = tl.load(d_ptr + at, mask=there, other=0.0).to(tl.float32)
        x_0 = load_rows(x_ptr, state_ptr, token, stride_t, columns, in_columns, length, is_early, W)
        y = x_0 * load_tap(weight_ptr, columns, in_columns, W - 1, W)
        if W > 1:
            x_1 = load_rows(x_ptr, state_ptr, token - 1, stride_t, columns, in_columns, length, is_early, W)
            y += x_1 * load_tap(weight_ptr, columns, in_columns, W - 2, W)
        if W > 2:
            x_2 = load_rows(x_ptr, state_ptr, token - 2, stride_t, columns, in_columns, length, is_early, W)
            y += x_2 * load_tap(weight_ptr, columns, in_columns, W - 3, W)
        if W > 3:
            x_3 = load_rows(x_ptr, state_ptr, token - 3, stride_t, columns, in_columns, length, is_early, W)
            y += x_3 * load_tap(weight_ptr, columns, in_columns, W - 4, W)
        if SILU:
            sigmoid = 1.0 / (1.0 + tl.exp(-y))
            g *= sigmoid * (1.0 + y * (1.0 - sigmoid))
        tl.store(g_ptr + at, g, mask=there)
        sum_0 += g * x_0
        if W > 1:
            sum_1 += g * x_1
        if W > 2:
            sum_2 += g * x_2
        if W > 3:
            sum_3 += g * x_3
    d_weight_ptr += (tl.program_id(0).to(tl.int64) * W + W - 1) * C + columns
    tl.store(d_weight_ptr, tl.sum(sum_0, axis=0), mask=in_columns)
    if W > 1:
        tl.store(d_weight_ptr - C, tl.sum(sum_1, axis=0), mask=in_columns)
    if W > 2:
        tl.store(d_weight_ptr - 2 * C, tl.sum(sum_2, axis=0), mask=in_columns)
    if W > 3:
        tl.store(d_weight_ptr - 3 * C, tl.sum(sum_3, axis=0), mask=in_columns)


@triton.jit(do_not_specialize=NUMBERS)
def _causal_conv1d_turned_kernel(
    g_ptr, weight_ptr, dx_ptr, d_state_ptr, table_ptr, cu_seqlens_ptr, C, T, tiles, has_state,
    W: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Some tokens of one sequence.  Shapes:  g, dx: [B, T, C];  weight: [C, W];  d_state: [N, C, W-1]"""
    n, tile, begin, length = find_sequence(tl.program_id(0), table_ptr, cu_seqlens_ptr, T, tiles, VARLEN)
    if n < 0:
        return
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_columns = columns < C
    token = tile * ROWS + tl.arange(0, ROWS) - (W - 1)
    row = begin if VARLEN else n.to(tl.int64) * T
    dx = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for j in tl.static_range(W):
        there = (token + j >= 0) & (token + j < length)
        at = (row + token + j)[:, None] * C + columns[None, :]
        g = tl.load(g_ptr + at, mask=there[:, None] & in_columns[None, :], other=0.0)
        dx += g * load_tap(weight_ptr, columns, in_columns, W - 1 - j, W)
    inside = (token >= 0) & (token < length)
    at = (row + token)[:, None] * C + columns[None, :]
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside[:, None] & in_columns[None, :])
    if (has_state != 0) & (tile == 0):
        at = (n.to(tl.int64) * C + columns)[None, :] * (W - 1) + (token + W - 1)[:, None]
        before = (token < 0)[:, None] & in_columns[None, :]
        tl.store(d_state_ptr + at, dx.to(d_state_ptr.dtype.element_ty), mask=before)
