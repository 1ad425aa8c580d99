# mypy: ignore-errors
"""The forward kernels of local_linear_attention: means of keys, the solve by conjugate gradients, and the output.

A program has a tile of queries of one head, walks over the tiles of keys that any of them sees, and never holds a d x d matrix:

    means    m = max_j q · k_j,   n = log2 Σ_j 2^(f (q · k_j - m)),   kb = Σ_j p_j k_j         p_j = 2^(f (q · k_j - m) - n)
    solve    (Cov_p(k) + ridge I) x = q - kb, where Cov_p(k) u = Σ_j p_j (k_j · u - kb · u) k_j takes one walk over the keys
    output   o = Σ_j p_j (1 + k_j · x - kb · x) v_j

The largest product is kept apart from n, unscaled: a sum of both would be rounded where logits are hundreds, and a product that
is fused with a difference would not be the one that the largest was chosen from.

Each row goes its own way in a solve and stops when its residual is `tolerance` of what it was; a tile goes on until all have
stopped, at most `most` times. Where few keys are in view x is nearly right / ridge, along which no key differs from another. All
that shows in the output is the rest, so the residual must be small beside Cov_p(k) right / ridge too. Steps depend on
(λ + ridge) / ridge, λ the largest eigenvalue of the covariance.

What is summed or solved is float32. In half precision what cancels is two numbers, the second what rounding the first has left
over: weights in means, both operands of a step that are no inputs, and x. Once a residual is `LATE` times what is asked for, one
is enough in a step.

In float32 products are not split for tensor cores, keys are less the first of their head wherever they are not in a logit, and
kb · x is summed again from the products that it is taken from: x may be large where all weight is on a few keys.

Products for a query and key: 3 d, 5 d or 3 d a step, 3 d + V in half precision; bytes: what flash attention has, once a walk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels.common.jit import LOG2_E

# A new length must not mean a new compilation.
LENGTHS = ("H", "T", "S", "window", "stride_sb", "most")
# Squared: below so many times the residual that is asked for, a step's operands are rounded once.
LATE = tl.constexpr(32.0 * 32.0)
# Squared: no residual need be a smaller part of what it was.
LEAST = tl.constexpr(1e-16)


@triton.jit
def dot_wide(x, y, total, SPLIT: tl.constexpr):
    """total + x y, for x in float32 and y in the dtype of the inputs; with SPLIT x in two parts of that dtype."""
    high = x.to(y.dtype)
    total = tl.dot(high, y, total, input_precision="ieee")
    if SPLIT:
        total = tl.dot((x - high.to(tl.float32)).to(y.dtype), y, total, input_precision="ieee")
    return total


@triton.jit
def in_view(place, key, window, S, seen_ptr, SEEN: tl.constexpr):
    """Which keys a query sees.  Shapes:  place: [ROWS];  key: [KEYS];  out: [ROWS, KEYS]"""
    distance = place[:, None] - key[None, :]
    visible = (distance >= 0) & (distance < window)
    if SEEN:
        seen = tl.load(seen_ptr + key, mask=key < S, other=0) != 0
        visible = visible & (seen[None, :] | (distance == 0))
    return visible


@triton.jit
def weights(q, k, largest, norm, place, key, window, S, seen_ptr, factor, SEEN: tl.constexpr):
    """p of each query and key.  Shapes:  q: [ROWS, K];  k: [KEYS, K];  largest, norm, place: [ROWS];  key: [KEYS]"""
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    s = (s - largest[:, None]) * factor - norm[:, None]
    return tl.exp2(tl.where(in_view(place, key, window, S, seen_ptr, SEEN), s, float("-inf")))


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


@triton.jit
def load_norm(norm_ptr, unit, t, T):
    """The largest product of each query, and the logarithm of its sum.  Shapes:  norm: [2, B, H, T]"""
    at = norm_ptr + unit * T + t
    second = tl.num_programs(1).to(tl.int64) * T
    return tl.load(at, mask=t < T, other=0.0), tl.load(at + second, mask=t < T, other=0.0)


@triton.jit
def less_common(k, common_ptr, unit, columns, K: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr):
    """Keys less what is common to their head, in full precision alone.  Shapes:  k: [KEYS, ROWS_K];  common: [B, N, K]"""
    if not SPLIT:
        common = tl.load(common_ptr + unit // GROUP * K + columns, mask=columns < K, other=0.0)
        k = k - common[None, :]
    return k


@triton.jit
def along_keys(high, low, k, PARTS: tl.constexpr):
    """What x says of each key, for x in so many parts.  Shapes:  high, low: [ROWS, K];  k: [KEYS, K];  out: [ROWS, KEYS]"""
    a = tl.dot(high, tl.trans(k), input_precision="ieee")
    if PARTS > 1:
        a = tl.dot(low, tl.trans(k), a, input_precision="ieee")
    return a


@triton.jit(do_not_specialize=LENGTHS)
def _local_linear_fwd_mean_kernel(
    q_ptr, k_ptr, norm_ptr, mean_ptr, slope_ptr, middle_ptr, common_ptr, seen_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    H, T, S, window, stride_sb, scale,
    K: tl.constexpr, ROWS_K: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    SEEN: tl.constexpr, SPLIT: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """Shapes:  norm: [2, B, H, T];  mean: [B, H, T, K], float32;  slope: [B, H, T, K], if GIVEN;  middle: [B, H, T], kb · it"""
    b, h, t, place, low, high = tile_of_rows(H, T, S, window, ROWS)
    columns = tl.arange(0, ROWS_K)
    unit = tl.program_id(1).to(tl.int64)
    k_ptr += b.to(tl.int64) * stride_kb + (h // GROUP).to(tl.int64) * stride_kh
    q = load_rows(
        q_ptr + b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh, t, stride_qt, T, columns, K
    )
    seen_ptr += b.to(tl.int64) * stride_sb
    sign = tl.where(scale < 0.0, -1.0, 1.0)
    factor = scale * sign * LOG2_E
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, ROWS_K], tl.float32)
    for start in range(low, high, KEYS):
        key = start + tl.arange(0, KEYS)
        k = load_rows(k_ptr, key, stride_kt, S, columns, K)  # [KEYS, ROWS_K]
        visible = in_view(place, key, window, S, seen_ptr, SEEN)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * sign
        higher = tl.maximum(most, tl.max(tl.where(visible, s, float("-inf")), axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(tl.where(visible, (s - base[:, None]) * factor, float("-inf")))
        faded = tl.where(most == float("-inf"), 0.0, tl.exp2((most - base) * factor))
        total = total * faded + tl.sum(p, axis=1)
        k = less_common(k, common_ptr, unit, columns, K, GROUP, SPLIT)
        sums = dot_wide(p, k, sums * faded[:, None], SPLIT)
        most = higher
    # Rows that are not there have seen nothing.
    total = tl.where(place >= 0, total, 1.0)
    at = norm_ptr + unit * T + t
    tl.store(at, tl.where(place >= 0, most * sign, 0.0), mask=t < T)
    tl.store(at + tl.num_programs(1).to(tl.int64) * T, tl.log2(total), mask=t < T)
    mean = sums / total[:, None]
    at = mean_ptr + (unit * T + t)[:, None] * K + columns[None, :]
    tl.store(at, mean, mask=(t < T)[:, None] & (columns < K)[None, :])
    if GIVEN:
        slope = load_rows(slope_ptr + unit * T * K, t, K, T, columns, K)
        tl.store(middle_ptr + unit * T + t, tl.sum(slope.to(tl.float32) * mean, axis=1), mask=t < T)


@triton.jit
def covariance_along(
    u, middle, q, largest, norm, place, low, high, k_ptr, common_ptr, seen_ptr, unit, stride_kt, S, window, factor,
    K: tl.constexpr, ROWS_K: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    SEEN: tl.constexpr, HALF: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Cov_p(k) u of each row; `middle` is kb · u. HALF: of inputs in half precision.

    Shapes:  u, out: [ROWS, ROWS_K];  middle: [ROWS]
    """
    columns = tl.arange(0, ROWS_K)
    spread = tl.zeros([ROWS, ROWS_K], tl.float32)
    for start in range(low, high, KEYS):
        key = start + tl.arange(0, KEYS)
        k = load_rows(k_ptr, key, stride_kt, S, columns, K)  # [KEYS, ROWS_K]
        p = weights(q, k, largest, norm, place, key, window, S, seen_ptr, factor, SEEN)
        k = less_common(k, common_ptr, unit, columns, K, GROUP, HALF)
        a = dot_wide(u, tl.trans(k), tl.zeros([ROWS, KEYS], tl.float32) - middle[:, None], SPLIT)
        spread = dot_wide(p * a, k, spread, SPLIT)
    return spread


@triton.jit(do_not_specialize=LENGTHS)
def _local_linear_solve_kernel(
    q_ptr, k_ptr, norm_ptr, mean_ptr, right_ptr, x_ptr, middle_ptr, common_ptr, seen_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    H, T, S, window, stride_sb, most, scale, ridge, tolerance,
    K: tl.constexpr, ROWS_K: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    SEEN: tl.constexpr, SPLIT: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """x with (Cov_p(k) + ridge I) x = right, or with q - kb unless GIVEN, and kb · x.

    Shapes:  mean, right: [B, H, T, K], float32;  x: [2 if SPLIT else 1, B, H, T, K], parts;  middle: [B, H, T], float32
    """
    b, h, t, place, low, high = tile_of_rows(H, T, S, window, ROWS)
    columns = tl.arange(0, ROWS_K)
    unit = tl.program_id(1).to(tl.int64)
    k_ptr += b.to(tl.int64) * stride_kb + (h // GROUP).to(tl.int64) * stride_kh
    q = load_rows(
        q_ptr + b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh, t, stride_qt, T, columns, K
    )
    seen_ptr += b.to(tl.int64) * stride_sb
    largest, norm = load_norm(norm_ptr, unit, t, T)
    mean_ptr += unit * T * K
    if GIVEN:
        rest = load_rows(right_ptr + unit * T * K, t, K, T, columns, K)
    else:
        rest = less_common(q.to(tl.float32), common_ptr, unit, columns, K, GROUP, SPLIT)
        rest = tl.where((t < T)[:, None], rest - load_rows(mean_ptr, t, K, T, columns, K), 0.0)
    x = tl.zeros([ROWS, ROWS_K], tl.float32)
    along = rest
    size = tl.sum(rest * rest, axis=1)
    enough = size * (tolerance * tolerance)
    factor = scale * LOG2_E
    step = 0
    while (step < most) & (tl.max(tl.where(size > enough, 1, 0), axis=0) > 0):
        # Of length 1, so that nothing is too small for half precision.
        length = tl.sqrt(tl.sum(along * along, axis=1))
        u = along / tl.where(length > 0.0, length, 1.0)[:, None]
        middle = tl.sum(u * load_rows(mean_ptr, t, K, T, columns, K), axis=1)
        is_late = (step > 0) & (tl.max(tl.where(size > enough * LATE, 1, 0), axis=0) == 0)
        spread = along
        if SPLIT:
            if is_late:
                spread = covariance_along(
                    u, middle, q, largest, norm, place, low, high, k_ptr, common_ptr, seen_ptr, unit, stride_kt,
                    S, window, factor, K, ROWS_K, ROWS, KEYS, GROUP, SEEN, True, False,
                )  # fmt: skip
            else:
                spread = covariance_along(
                    u, middle, q, largest, norm, place, low, high, k_ptr, common_ptr, seen_ptr, unit, stride_kt,
                    S, window, factor, K, ROWS_K, ROWS, KEYS, GROUP, SEEN, True, True,
                )  # fmt: skip
        else:
            spread = covariance_along(
                u, middle, q, largest, norm, place, low, high, k_ptr, common_ptr, seen_ptr, unit, stride_kt,
                S, window, factor, K, ROWS_K, ROWS, KEYS, GROUP, SEEN, False, False,
            )  # fmt: skip
        spread = spread * length[:, None]
        shown = tl.sum(spread * spread, axis=1) * (tolerance * tolerance) / (ridge * ridge)
        least = tl.minimum(enough, tl.maximum(shown, size * LEAST))
        enough = tl.where(step == 0, least, enough)
        spread += ridge * along
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
    inside = (t < T)[:, None] & (columns < K)[None, :]
    first = x.to(x_ptr.dtype.element_ty)
    tl.store(at, first, mask=inside)
    if SPLIT:
        second = (x - first.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(at + tl.num_programs(1).to(tl.int64) * T * K, second, mask=inside)
        x = first.to(tl.float32) + second.to(tl.float32)
    middle = tl.sum(x * load_rows(mean_ptr, t, K, T, columns, K), axis=1)
    tl.store(middle_ptr + unit * T + t, middle, mask=t < T)


@triton.jit(do_not_specialize=LENGTHS)
def _local_linear_middle_kernel(
    q_ptr, k_ptr, norm_ptr, x_ptr, middle_ptr, common_ptr, seen_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    H, T, S, window, stride_sb, scale,
    K: tl.constexpr, ROWS_K: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, GROUP: tl.constexpr,
    SEEN: tl.constexpr,
):  # fmt: skip
    """Σ_j p_j (k_j · x) in float32, from the products that it is taken from.  Shapes:  x: [B, H, T, K];  middle: [B, H, T]"""
    b, h, t, place, low, high = tile_of_rows(H, T, S, window, ROWS)
    columns = tl.arange(0, ROWS_K)
    unit = tl.program_id(1).to(tl.int64)
    k_ptr += b.to(tl.int64) * stride_kb + (h // GROUP).to(tl.int64) * stride_kh
    q = load_rows(
        q_ptr + b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh, t, stride_qt, T, columns, K
    )
    seen_ptr += b.to(tl.int64) * stride_sb
    largest, norm = load_norm(norm_ptr, unit, t, T)
    x = load_rows(x_ptr + unit * T * K, t, K, T, columns, K)
    middle = tl.zeros([ROWS], tl.float32)
    for start in range(low, high, KEYS):
        key = start + tl.arange(0, KEYS)
        k = load_rows(k_ptr, key, stride_kt, S, columns, K)  # [KEYS, ROWS_K]
        p = weights(q, k, largest, norm, place, key, window, S, seen_ptr, scale * LOG2_E, SEEN)
        k = less_common(k, common_ptr, unit, columns, K, GROUP, False)
        middle += tl.sum(p * along_keys(x, x, k, 1), axis=1)
    tl.store(middle_ptr + unit * T + t, middle, mask=t < T)


@triton.jit(do_not_specialize=LENGTHS)
def _local_linear_fwd_output_kernel(
    q_ptr, k_ptr, v_ptr, norm_ptr, x_ptr, middle_ptr, out_ptr, common_ptr, seen_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    H, T, S, window, stride_sb, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    GROUP: tl.constexpr, SEEN: tl.constexpr, SPLIT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Shapes:  x: [PARTS, B, H, T, K];  middle: [B, H, T], kb · x, float32;  out: [B, H, T, V]"""
    b, h, t, place, low, high = tile_of_rows(H, T, S, window, ROWS)
    columns, columns_v = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V)
    unit = tl.program_id(1).to(tl.int64)
    k_ptr += b.to(tl.int64) * stride_kb + (h // GROUP).to(tl.int64) * stride_kh
    v_ptr += b.to(tl.int64) * stride_vb + (h // GROUP).to(tl.int64) * stride_vh
    q = load_rows(
        q_ptr + b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh, t, stride_qt, T, columns, K
    )
    seen_ptr += b.to(tl.int64) * stride_sb
    largest, norm = load_norm(norm_ptr, unit, t, T)
    x_ptr += unit * T * K
    x = load_rows(x_ptr, t, K, T, columns, K)
    x_low = x
    if PARTS > 1:
        x_low = load_rows(x_ptr + tl.num_programs(1).to(tl.int64) * T * K, t, K, T, columns, K)
    middle = tl.load(middle_ptr + unit * T + t, mask=t < T, other=0.0)
    out = tl.zeros([ROWS, ROWS_V], tl.float32)
    for start in range(low, high, KEYS):
        key = start + tl.arange(0, KEYS)
        k = load_rows(k_ptr, key, stride_kt, S, columns, K)  # [KEYS, ROWS_K]
        v = load_rows(v_ptr, key, stride_vt, S, columns_v, V)  # [KEYS, ROWS_V]
        p = weights(q, k, largest, norm, place, key, window, S, seen_ptr, scale * LOG2_E, SEEN)
        k = less_common(k, common_ptr, unit, columns, K, GROUP, SPLIT)
        a = along_keys(x, x_low, k, PARTS) - middle[:, None]
        out = dot_wide(p * (1.0 + a), v, out, False)
    at = out_ptr + (unit * T + t)[:, None] * V + columns_v[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=(t < T)[:, None] & (columns_v < V)[None, :])
