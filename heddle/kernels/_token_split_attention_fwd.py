# mypy: ignore-errors
"""The forward kernel of token_split_attention: the softmax over keys, merged with what the state has told.

A program holds a tile of queries of one head that stand side by side from a multiple of its size on, and walks over the tiles of
keys from the chunk before that of its first query up to its last query, and then over those that stay of earlier chunks,
which stand side by side in a list of their own.

    m' = max(m, c max_j s_j),   l' = 2^(m - m') l + Σ_j 2^(c s_j - m'),   a' = 2^(m - m') a + Σ_j 2^(c s_j - m') v_j

with s_j = q · k_j and c = scale log2(e); then out = (a + gate * φ(q) S) / (l + φ(q) z), where φ(q) S and φ(q) z come as they are:
the state is divided by no 2^m. Gradients want m, the denominator, and the first key whose logit is m.

FLOP: 2 (K + V) for a query and a key of the tiles that are read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels.common.jit import LOG2_E

# A new length must not mean a new compilation.
LENGTHS = ("T", "S", "E", "far", "slots", "chunks", "chunk", "keep", "tiles", "N", "group")
# A place behind every token, and a number behind every key.
FAR = tl.constexpr(1 << 30)


@triton.jit
def rows_of_tile(start, tile, T, S, ROWS: tl.constexpr):
    """The queries of a tile, their places, negative for none, which are there, and the first and the last place of them."""
    first = start + S - T
    # A remainder has the sign of the dividend.
    shift = ((first % ROWS) + ROWS) % ROWS
    t = tile * ROWS - shift + tl.arange(0, ROWS)
    present = (t >= 0) & (t < T)
    place = tl.where(present, first + t, -1)
    low = tl.maximum(first + tl.maximum(tile * ROWS - shift, 0), 0)
    high = first + tl.minimum(tile * ROWS - shift + ROWS, T) - 1
    return t, place, present, low, high


@triton.jit
def load_rows(x_ptr, row, stride, there, columns, in_columns):
    """Rows of one head.  Shapes:  row, there: [R];  out: [R, C]"""
    at = x_ptr + (row.to(tl.int64) * stride)[:, None] + columns[None, :]
    return tl.load(at, mask=there[:, None] & in_columns, other=0.0)


@triton.jit
def near_keys(seen_ptr, place, start, S, SEEN: tl.constexpr):
    """The keys at some places, which of them are there, and which may be seen by others."""
    key = place - start
    inside = (key >= 0) & (key < S) & (place >= 0)
    if SEEN:
        return key, inside, inside & (tl.load(seen_ptr + key, mask=inside, other=0) != 0)
    return key, inside, inside


@triton.jit
def is_near(place, key_place, inside, seen, chunk):
    """Which keys stand in a query's own chunk up to it or in the one before, all as columns or as rows."""
    since = (place // chunk - 1) * chunk
    is_own = key_place == place
    return (place >= 0) & (key_place >= since) & (key_place <= place) & (seen | (is_own & inside))


@triton.jit
def told_at(unit, b, n, place, base, chunks, slots, chunk, group):
    """The rows of what the state has told some queries of one head."""
    h = unit % group
    slot = tl.minimum(place % chunk, slots - 1)
    return (((b + n) * chunks + place // chunk - base) * group + h) * slots + slot


@triton.jit
def add_keys(
    q, k, v, seen, index, most, total, sums, peak, factor, PEAK: tl.constexpr, PRECISION: tl.constexpr
):
    """One more tile of keys in the running softmax.  Shapes:  seen: [ROWS, KEYS];  index: [KEYS], the keys' numbers"""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
    s = tl.where(seen, s, float("-inf"))
    top = tl.max(s, axis=1)
    higher = tl.maximum(most, top)
    if PEAK:
        at = tl.min(tl.where(s == top[:, None], index[None, :], FAR), axis=1)
        peak = tl.where(top > most, at, peak)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(s - base[:, None])
    faded = tl.exp2(most - base)
    total = total * faded + tl.sum(p, axis=1)
    sums = tl.dot(p.to(v.dtype), v, sums * faded[:, None], input_precision=PRECISION)
    return higher, total, sums, peak


@triton.jit(do_not_specialize=LENGTHS)
def _token_split_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, kept_k_ptr, kept_v_ptr, since_ptr, seen_ptr, start_ptr, told_ptr, gate_ptr,
    out_ptr, lost_ptr, most_ptr, total_ptr, peak_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_eb, stride_eh, stride_et,
    stride_wb, stride_wh, stride_wt,
    stride_gb, stride_gh, stride_gt,
    stride_ob, stride_oh, stride_ot,
    stride_lb, stride_lh, stride_lt,
    T, S, E, far, slots, chunks, chunk, keep, tiles, N, group, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SEEN: tl.constexpr, KEPT: tl.constexpr, TRAINS: tl.constexpr, LOST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head.

    Shapes:  kept_k, kept_v (strides e, w): [B, N, E, *], `far` and then `keep` of each chunk;  since: [B, N, E], the place
             from which on a key is seen;  seen: [B, S] bytes, with SEEN;  start: [B], the place of key 0
             told: [B, N, chunks, group, slots, V + 1] float32;  gate, out: [B, H, T, V];  lost: what rounding took from out,
             with LOST;  most, total, peak: [B, H, T], with TRAINS: the largest logit to base 2 (inf where there is no query),
             the denominator, and the number of that logit's key, S and more for those that stay
    """
    tile = tiles - 1 - tl.program_id(1)
    unit = tl.program_id(0).to(tl.int64)
    h, b = unit % (N * group), unit // (N * group)
    n = h // group
    start = tl.load(start_ptr + b)
    t, place, present, low, high = rows_of_tile(start, tile, T, S, ROWS)
    valid = place >= 0
    base = tl.maximum(start + S - T, 0) // chunk
    columns_k, columns_v, i = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V), tl.arange(0, KEYS)
    in_k, in_v = (columns_k < K)[None, :], (columns_v < V)[None, :]
    q = load_rows(q_ptr + b * stride_qb + h * stride_qh, t, stride_qt, valid, columns_k, in_k)
    k_ptr += b * stride_kb + n * stride_kh
    v_ptr += b * stride_vb + n * stride_vh
    seen_ptr += b * S

    factor = scale * LOG2_E
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, ROWS_V], tl.float32)
    peak = tl.full([ROWS], -1, tl.int32)
    since = tl.maximum(low // chunk - 1, 0) * chunk
    for index in range(since // KEYS, tl.cdiv(high + 1, KEYS)):
        key_place = index * KEYS + i
        key, inside, may = near_keys(seen_ptr, key_place, start, S, SEEN)
        k = load_rows(k_ptr, key, stride_kt, inside, columns_k, in_k)
        v = load_rows(v_ptr, key, stride_vt, inside, columns_v, in_v)
        seen = is_near(place[:, None], key_place[None, :], inside[None, :], may[None, :], chunk)
        most, total, sums, peak = add_keys(
            q, k, v, seen, key, most, total, sums, peak, factor, TRAINS, PRECISION
        )
    if KEPT:
        kept_k_ptr += b * stride_eb + n * stride_eh
        kept_v_ptr += b * stride_wb + n * stride_wh
        since_ptr += (b * N + n) * E
        count = tl.where(high < 0, 0, tl.minimum(far + (high // chunk - base) * keep, E))
        for index in range(0, tl.cdiv(count, KEYS)):
            entry = index * KEYS + i
            there = entry < count
            k = load_rows(kept_k_ptr, entry, stride_et, there, columns_k, in_k)
            v = load_rows(kept_v_ptr, entry, stride_wt, there, columns_v, in_v)
            from_place = tl.load(since_ptr + entry, mask=there, other=FAR)
            seen = valid[:, None] & (place[:, None] >= from_place[None, :])
            most, total, sums, peak = add_keys(
                q, k, v, seen, S + entry, most, total, sums, peak, factor, TRAINS, PRECISION
            )

    at_told = told_at(unit, b * N, n, place, base, chunks, slots, chunk, group) * (V + 1)
    told = tl.load(told_ptr + at_told[:, None] + columns_v[None, :], mask=valid[:, None] & in_v, other=0.0)
    total = tl.where(valid, total + tl.load(told_ptr + at_told + V, mask=valid, other=0.0), 1.0)
    gate = load_rows(gate_ptr + b * stride_gb + h * stride_gh, t, stride_gt, valid, columns_v, in_v)
    out = (sums + gate * told) / total[:, None]
    rounded = out.to(out_ptr.dtype.element_ty)
    out_ptr += b * stride_ob + h * stride_oh
    at = (t.to(tl.int64) * stride_ot)[:, None] + columns_v[None, :]
    tl.store(out_ptr + at, rounded, mask=present[:, None] & in_v)
    if TRAINS:
        row = unit * T + t
        tl.store(most_ptr + row, tl.where(valid, most, float("inf")), mask=present)
        tl.store(total_ptr + row, total, mask=present)
        tl.store(peak_ptr + row, peak, mask=present)
    if LOST:
        lost_ptr += b * stride_lb + h * stride_lh
        at = (t.to(tl.int64) * stride_lt)[:, None] + columns_v[None, :]
        lost = out - rounded.to(tl.float32)
        tl.store(lost_ptr + at, lost.to(lost_ptr.dtype.element_ty), mask=present[:, None] & in_v)
