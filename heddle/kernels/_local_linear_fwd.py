# mypy: ignore-errors
"""The forward kernels of local_linear_attention: means of keys, the solve by conjugate gradients, and the output.

A program has a tile of queries of one head, walks over the tiles of keys that any of them sees, and never holds a d x d matrix:

    means    lse = log2 Σ_j 2^s_j,   kb = Σ_j p_j k_j                                 s_j = c q · k_j,  p_j = 2^(s_j - lse)
    solve    (Cov_p(k) + ridge I) x = q - kb, where Cov_p(k) u = Σ_j p_j (k_j · u - kb · u) k_j takes one walk over the keys
    output   o = Σ_j p_j (1 + k_j · x - kb · x) v_j

Each row goes its own way in a solve and stops when its residual is `tolerance` of what it was; a tile goes on until all have
stopped, at most `most` times. Steps depend on (λ + ridge) / ridge, λ the largest eigenvalue of the covariance: for keys of
normally distributed numbers and a tolerance of 1e-6 some 8 at a ridge of 10, 18 at 1, 47 at 0.1.

What is summed or solved is float32. In half precision operands of products that are no inputs are two numbers, the second what
rounding the first has left over: with one alone the output erred by more than twice what is allowed at a ridge of 1.

Products for a query and key: 3 d, 5 d a step, 3 d + 2 V in half precision; bytes: what flash attention has, once a walk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels.common.jit import LOG2_E

# A new length must not mean a new compilation.
LENGTHS = ("H", "T", "S", "window", "stride_sb", "most")


@triton.jit
def dot_wide(x, y, total, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """total + x y, for x in float32 and y in the dtype of the inputs; with SPLIT x in two parts of that dtype."""
    high = x.to(y.dtype)
    total = tl.dot(high, y, total, input_precision=PRECISION)
    if SPLIT:
        total = tl.dot((x - high.to(tl.float32)).to(y.dtype), y, total, input_precision=PRECISION)
    return total


@triton.jit
def logits(q, k, place, key, window, S, seen_ptr, factor, SEEN: tl.constexpr, PRECISION: tl.constexpr):
    """Logits to base 2, -inf where a key is not seen.  Shapes:  q: [ROWS, K];  k: [KEYS, K];  place: [ROWS];  key: [KEYS]"""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
    distance = place[:, None] - key[None, :]
    visible = (distance >= 0) & (distance < window)
    if SEEN:
        seen = tl.load(seen_ptr + key, mask=key < S, other=0) != 0
        visible = visible & (seen[None, :] | (distance == 0))
    return tl.where(visible, s, float("-inf"))


@triton.jit
def tile_of_rows(H, T, S, window, ROWS: tl.constexpr):
    """Batch, head, rows of a tile of queries, the places of those that are there (-1 else), first and last key in view."""
    unit = tl.program_id(1)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.where(t < T, S - T + t, -1)
    first = S - T + tl.program_id(0) * ROWS
    return unit // H, unit % H, t, place, tl.maximum(first - window + 1, 0), tl.minimum(first + ROWS, S)


@triton.jit
def load_rows(x_ptr, t, stride, count, columns, SIZE: tl.constexpr):
    """Rows t of a matrix, zeros where there is none.  Shapes:  out: [rows, columns]"""
    at = x_ptr + (t.to(tl.int64) * stride)[:, None] + columns[None, :]
    return tl.load(at, mask=(t < count)[:, None] & (columns < SIZE)[None, :], other=0.0)


@triton.jit(do_not_specialize=LENGTHS)
def _local_linear_fwd_mean_kernel(
    q_ptr, k_ptr, lse_ptr, mean_ptr, seen_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    H, T, S, window, stride_sb, scale,
    K: tl.constexpr, ROWS_K: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    SEEN: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Shapes:  lse: [B, H, T], base 2;  mean: [B, H, T, K], float32"""
    b, h, t, place, low, high = tile_of_rows(H, T, S, window, ROWS)
    columns = tl.arange(0, ROWS_K)
    unit = tl.program_id(1).to(tl.int64)
    k_ptr += b.to(tl.int64) * stride_kb + (h // GROUP).to(tl.int64) * stride_kh
    q = load_rows(
        q_ptr + b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh, t, stride_qt, T, columns, K
    )
    seen_ptr += b.to(tl.int64) * stride_sb
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, ROWS_K], tl.float32)
    for start in range(low, high, KEYS):
        key = start + tl.arange(0, KEYS)
        k = load_rows(k_ptr, key, stride_kt, S, columns, K)  # [KEYS, ROWS_K]
        s = logits(q, k, place, key, window, S, seen_ptr, scale * LOG2_E, SEEN, PRECISION)
        higher = tl.maximum(most, tl.max(s, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - base[:, None])
        faded = tl.exp2(most - base)
        total = total * faded + tl.sum(p, axis=1)
        sums = dot_wide(p, k, sums * faded[:, None], SPLIT, PRECISION)
        most = higher
    # Rows that are not there have seen nothing.
    total = tl.where(place >= 0, total, 1.0)
    tl.store(lse_ptr + unit * T + t, tl.where(place >= 0, most, 0.0) + tl.log2(total), mask=t < T)
    at = mean_ptr + (unit * T + t)[:, None] * K + columns[None, :]
    tl.store(at, sums / total[:, None], mask=(t < T)[:, None] & (columns < K)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def _local_linear_solve_kernel(
    q_ptr, k_ptr, lse_ptr, mean_ptr, right_ptr, x_ptr, seen_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    H, T, S, window, stride_sb, most, scale, ridge, tolerance,
    K: tl.constexpr, ROWS_K: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    SEEN: tl.constexpr, SPLIT: tl.constexpr, GIVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x with (Cov_p(k) + ridge I) x = right, or with q - kb unless GIVEN.  Shapes:  mean, right, x: [B, H, T, K], float32"""
    b, h, t, place, low, high = tile_of_rows(H, T, S, window, ROWS)
    columns = tl.arange(0, ROWS_K)
    unit = tl.program_id(1).to(tl.int64)
    k_ptr += b.to(tl.int64) * stride_kb + (h // GROUP).to(tl.int64) * stride_kh
    q = load_rows(
        q_ptr + b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh, t, stride_qt, T, columns, K
    )
    seen_ptr += b.to(tl.int64) * stride_sb
    lse = tl.load(lse_ptr + unit * T + t, mask=t < T, other=0.0)
    mean_ptr += unit * T * K
    if GIVEN:
        rest = load_rows(right_ptr + unit * T * K, t, K, T, columns, K)
    else:
        rest = q.to(tl.float32) - load_rows(mean_ptr, t, K, T, columns, K)
    x = tl.zeros([ROWS, ROWS_K], tl.float32)
    along = rest
    size = tl.sum(rest * rest, axis=1)
    enough = size * (tolerance * tolerance)
    step = 0
    while (step < most) & (tl.max(tl.where(size > enough, 1, 0), axis=0) > 0):
        # Of length 1, so that nothing is too small for half precision.
        length = tl.sqrt(tl.sum(along * along, axis=1))
        unit_along = along / tl.where(length > 0.0, length, 1.0)[:, None]
        middle = tl.sum(unit_along * load_rows(mean_ptr, t, K, T, columns, K), axis=1)
        spread = tl.zeros([ROWS, ROWS_K], tl.float32)
        for start in range(low, high, KEYS):
            key = start + tl.arange(0, KEYS)
            k = load_rows(k_ptr, key, stride_kt, S, columns, K)  # [KEYS, ROWS_K]
            s = logits(q, k, place, key, window, S, seen_ptr, scale * LOG2_E, SEEN, PRECISION)
            p = tl.exp2(s - lse[:, None])
            a = dot_wide(
                unit_along,
                tl.trans(k),
                tl.zeros([ROWS, KEYS], tl.float32) - middle[:, None],
                SPLIT,
                PRECISION,
            )
            spread = dot_wide(p * a, k, spread, SPLIT, PRECISION)
        spread = spread * length[:, None] + ridge * along
        bent = tl.sum(along * spread, axis=1)
        is_open = (size > enough) & (bent > 0.0)
        far = tl.where(is_open, size / tl.where(is_open, bent, 1.0), 0.0)
        x += far[:, None] * along
        rest -= far[:, None] * spread
        left = tl.where(is_open, tl.sum(rest * rest, axis=1), 0.0)
        along = tl.where(is_open[:, None], rest + (left / tl.where(is_open, size, 1.0))[:, None] * along, 0.0)
        size = left
        step += 1
    at = x_ptr + (unit * T + t)[:, None] * K + columns[None, :]
    tl.store(at, x, mask=(t < T)[:, None] & (columns < K)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def _local_linear_fwd_output_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, mean_ptr, x_ptr, out_ptr, seen_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    H, T, S, window, stride_sb, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    GROUP: tl.constexpr, SEEN: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Shapes:  x: [B, H, T, K], float32;  out: [B, H, T, V]"""
    b, h, t, place, low, high = tile_of_rows(H, T, S, window, ROWS)
    columns, columns_v = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V)
    unit = tl.program_id(1).to(tl.int64)
    k_ptr += b.to(tl.int64) * stride_kb + (h // GROUP).to(tl.int64) * stride_kh
    v_ptr += b.to(tl.int64) * stride_vb + (h // GROUP).to(tl.int64) * stride_vh
    q = load_rows(
        q_ptr + b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh, t, stride_qt, T, columns, K
    )
    seen_ptr += b.to(tl.int64) * stride_sb
    lse = tl.load(lse_ptr + unit * T + t, mask=t < T, other=0.0)
    x = load_rows(x_ptr + unit * T * K, t, K, T, columns, K)
    middle = tl.sum(x * load_rows(mean_ptr + unit * T * K, t, K, T, columns, K), axis=1)
    out = tl.zeros([ROWS, ROWS_V], tl.float32)
    for start in range(low, high, KEYS):
        key = start + tl.arange(0, KEYS)
        k = load_rows(k_ptr, key, stride_kt, S, columns, K)  # [KEYS, ROWS_K]
        v = load_rows(v_ptr, key, stride_vt, S, columns_v, V)  # [KEYS, ROWS_V]
        s = logits(q, k, place, key, window, S, seen_ptr, scale * LOG2_E, SEEN, PRECISION)
        p = tl.exp2(s - lse[:, None])
        a = dot_wide(x, tl.trans(k), tl.zeros([ROWS, KEYS], tl.float32) - middle[:, None], SPLIT, PRECISION)
        out = dot_wide(p * (1.0 + a), v, out, SPLIT, PRECISION)
    at = out_ptr + (unit * T + t)[:, None] * V + columns_v[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=(t < T)[:, None] & (columns_v < V)[None, :])
