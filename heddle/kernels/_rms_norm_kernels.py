# mypy: ignore-errors
"""The kernels of rms_norm: some rows a program, each of them whole. The backward pass works the root out again.

With r = 1 / sqrt(Σ x² / n + eps), u = r x, s(z) = silu(z) or sigmoid(z) and the gradient d of y = w u s(z):

    g = d w s(z),   dx = r (g - u Σ g u / n),   dw = Σ d s(z) u,   dz = d w u s'(z)

Bytes: each number read once and written once. FLOP: some 6 a number, 15 back.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rows(x_ptr, row, columns, mask, H, stride_o, stride_h):
    """Rows in float32; row r is head r mod H of token r / H.  Shapes:  row: [ROWS];  columns: [COLUMNS]"""
    at = (row // H).to(tl.int64) * stride_o + (row % H).to(tl.int64) * stride_h
    return tl.load(x_ptr + at[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def opened_by(z, SILU: tl.constexpr):
    """silu(z), or sigmoid(z), and its slope."""
    sigmoid = 1.0 / (1.0 + tl.exp(-z))
    if SILU:
        return z * sigmoid, sigmoid * (1.0 + z * (1.0 - sigmoid))
    return sigmoid, sigmoid * (1.0 - sigmoid)


@triton.jit(do_not_specialize=("N",))
def _rms_norm_fwd_kernel(
    x_ptr, weight_ptr, gate_ptr, y_ptr,
    stride_xo, stride_xh, stride_zo, stride_zh, N, eps, share,
    H: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_GATE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Shapes:  x, gate: N rows of D, H to a token;  weight: [D];  y: [N, D];  share: 1 / n"""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    mask = (row < N)[:, None] & (columns < D)[None, :]
    x = load_rows(x_ptr, row, columns, mask, H, stride_xo, stride_xh)
    y = x * tl.rsqrt(tl.sum(x * x, axis=1) * share + eps)[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    if HAS_GATE:
        opened, _ = opened_by(load_rows(gate_ptr, row, columns, mask, H, stride_zo, stride_zh), SILU)
        y *= opened
    tl.store(y_ptr + row[:, None] * D + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("N",))
def _rms_norm_bwd_kernel(
    d_ptr, x_ptr, weight_ptr, gate_ptr, dx_ptr, d_weight_ptr, d_gate_ptr,
    stride_xo, stride_xh, stride_zo, stride_zh, N, eps, share,
    H: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_GATE: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Shapes:  as forward;  d, dx, d_gate: [N, D];  d_weight: [programs, D], float32"""
    columns = tl.arange(0, COLUMNS)
    weight = tl.full((COLUMNS,), 1.0, dtype=tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)
    d_weight = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for step in range(STEPS):
        row = (tl.program_id(0).to(tl.int64) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        mask = (row < N)[:, None] & (columns < D)[None, :]
        at = row[:, None] * D + columns[None, :]
        x = load_rows(x_ptr, row, columns, mask, H, stride_xo, stride_xh)
        d = tl.load(d_ptr + at, mask=mask, other=0.0).to(tl.float32)
        r = tl.where(row < N, tl.rsqrt(tl.sum(x * x, axis=1) * share + eps), 0.0)[:, None]
        u = x * r
        if HAS_GATE:
            opened, slope = opened_by(load_rows(gate_ptr, row, columns, mask, H, stride_zo, stride_zh), SILU)
            d_gate = d * weight[None, :] * u * slope
            tl.store(d_gate_ptr + at, d_gate.to(d_gate_ptr.dtype.element_ty), mask=mask)
            d *= opened
        if HAS_WEIGHT:
            d_weight += d * u
        g = d * weight[None, :]
        dx = r * (g - u * (tl.sum(g * u, axis=1) * share)[:, None])
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if HAS_WEIGHT:
        at = d_weight_ptr + tl.program_id(0).to(tl.int64) * D + columns
        tl.store(at, tl.sum(d_weight, axis=0), mask=columns < D)
