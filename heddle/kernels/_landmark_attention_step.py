# mypy: ignore-errors
"""The kernels of landmark_attention that choose blocks by their landmarks, and those of a decode step.

A step is three launches. The first leaves the logits of all landmarks, a key head's query heads together. In the second each
program finds the `top` best of one query by itself, among as many numbers as there are blocks, and reads its part of them and of
the own block, with weights and merges as in `_landmark_attention_fwd.py`; choosing again costs less than one more launch. The
third merges the parts:  o = Σ_p 2^(m_p - m) a_p / Σ_p 2^(m_p - m) L_p.

Fused, a step is two launches: the last of a query's programs to end merges what the others left. Keys and values of later blocks
are on their way into shared memory while one is worked on, and the products are the tensor cores', with the query as one of
ROWS rows; registers alone let a program have a few rows of a block on their way at a time. With a list, a launch between the two
chooses once for each query.

Bytes of a step for a row and head: (top + 1) `block` keys, (K + V) elements each, and for a row and key head C landmarks of K.
FLOP: 2 (K + V) for a key that is read.

Where there are many queries, the choice is left as bits, for the kernels that hold tiles of queries.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels._landmark_attention_fwd import LENGTHS, gate_of, keys_of_block, softmax_of_block
from heddle.kernels.common.jit import LOG2_E, best_of


@triton.jit(do_not_specialize=LENGTHS)
def _landmark_attention_score_kernel(
    q_ptr, marks_ptr, logits_ptr, start_ptr, held_ptr, arrived_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_mb, stride_mh, stride_mt,
    T, C, N, tiles, stride_sb, scale,
    K: tl.constexpr, ROWS_K: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, SEEN: tl.constexpr, PRECISION: tl.constexpr,
    FUSED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Logits to base 2 of COLUMNS landmarks, for a tile of queries of all heads that share a key head.

    Shapes:  logits: [B, H, T, C] float32, -inf but for earlier blocks;  held: [1 or B, C] uint8, which blocks have a key to see
             arrived: [B, H, T] int32, with FUSED set to 0
    """
    if AHEAD:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    tile = (row % tiles).to(tl.int32)
    n = row // tiles % N
    b = row // tiles // N
    start = tl.load(start_ptr + b).to(tl.int32)
    r = tl.arange(0, ROWS)
    t, head = tile * QUERIES + r // HEADS, r % HEADS
    present = (r // HEADS < QUERIES) & (head < GROUP) & (t < T)
    own = tl.where(start + t < 0, 0, (start + t) // BLOCK)
    columns = tl.arange(0, ROWS_K)
    in_k = (columns < K)[None, :]
    q_ptr += b * stride_qb + n * GROUP * stride_qh
    q_at = q_ptr + (t.to(tl.int64) * stride_qt + head.to(tl.int64) * stride_qh)[:, None] + columns[None, :]
    q = tl.load(q_at, mask=present[:, None] & in_k, other=0.0)  # [ROWS, ROWS_K]
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < C
    marks_ptr += b * stride_mb + n * stride_mh
    marks_at = marks_ptr + (c.to(tl.int64) * stride_mt)[:, None] + columns[None, :]
    marks = tl.load(marks_at, mask=inside[:, None] & in_k, other=0.0)  # [COLUMNS, ROWS_K]
    s = tl.dot(q, tl.trans(marks), input_precision=PRECISION) * (scale * LOG2_E)
    held = inside
    if SEEN:
        held = tl.load(held_ptr + b * stride_sb + c, mask=inside, other=0) != 0
    s = tl.where(held[None, :] & (c[None, :] < own[:, None]), s, float("-inf"))
    at = ((b * N + n) * GROUP + head) * T + t
    if FUSED:
        tl.store(arrived_ptr + at, t * 0, mask=present & (tl.program_id(1) == 0))
    logits_at = logits_ptr + (at * C)[:, None] + c[None, :]
    tl.store(logits_at, s, mask=present[:, None] & inside[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def _landmark_attention_select_kernel(logits_ptr, bits_ptr, C, words, top, WIDTH: tl.constexpr):
    """The best landmarks of one query, a bit each.  Shapes:  logits: [rows, C];  bits: [rows, words] int32"""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, WIDTH)
    logits = tl.load(logits_ptr + row * C + c, mask=c < C, other=float("-inf"))
    chosen, _ = best_of(logits, top)
    bits = tl.reshape(chosen.to(tl.int32) << (c % 32), [WIDTH // 32, 32])
    word = tl.arange(0, WIDTH // 32)
    tl.store(bits_ptr + row * words + word, tl.sum(bits, axis=1), mask=word < words)


@triton.jit(do_not_specialize=LENGTHS)
def _landmark_attention_list_kernel(logits_ptr, listed_ptr, C, top, WIDTH: tl.constexpr, AHEAD: tl.constexpr):
    """The best landmarks of one query in order, -1 behind them.  Shapes:  logits: [rows, C];  listed: [rows, top] int32"""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, WIDTH)
    if AHEAD:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    logits = tl.load(logits_ptr + row * C + c, mask=c < C, other=float("-inf"))
    chosen, rank = best_of(logits, top, NEAR=True)
    listed_ptr += row * top
    tl.store(listed_ptr + rank - 1, c, mask=chosen)
    tl.store(listed_ptr + c, c * 0 - 1, mask=(c >= tl.sum(chosen.to(tl.int32), axis=0)) & (c < top))


@triton.jit(do_not_specialize=LENGTHS)
def _landmark_attention_step_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sums_ptr, most_ptr, logits_ptr, start_ptr, seen_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    T, S, C, N, splits, top, stride_sb, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
    SELECT: tl.constexpr, SEEN: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One query of one head and one part of the blocks that it reads; the own block is the last of them.

    Shapes:  logits: [B, H, T, C];  out: [B, H, T, V];  lse: [B, H, T], base 2, inf where nothing is seen
             sums: [splits, B H T, V], most: [2, splits, B H T]: what is merged
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    t, h, b = row % T, row // T % (N * GROUP), row // T // (N * GROUP)
    n = h // GROUP
    place = tl.load(start_ptr + b) + t.to(tl.int32)
    own = tl.where(place < 0, 0, place // BLOCK)
    columns_k, columns_v = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V)
    in_k, in_v = columns_k < K, columns_v < V
    q_at = q_ptr + b * stride_qb + h * stride_qh + t * stride_qt + columns_k
    q = tl.load(q_at, mask=in_k, other=0.0).to(tl.float32)  # [ROWS_K]
    k_ptr += b * stride_kb + n * stride_kh
    v_ptr += b * stride_vb + n * stride_vh
    seen_ptr += b * stride_sb
    logits_ptr += row * C

    index = tl.arange(0, WIDTH)
    rank = index
    count = own
    held = own
    if SELECT:
        logits = tl.load(logits_ptr + index, mask=index < C, other=float("-inf"))
        chosen, rank = best_of(logits, top)
        rank = tl.where(chosen, rank - 1, -1)
        held = tl.sum(chosen.to(tl.int32), axis=0)
        # As a bound of the loop a sum would leave loads in it without vectors.
        count = tl.minimum(own, top)
    share = tl.cdiv(count + 1, splits)
    first = split * share
    last = tl.minimum(first + share, count + 1)
    factor = scale * LOG2_E
    most = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    sums = tl.zeros([ROWS_V], tl.float32)
    for r in range(first, last):
        is_own = r == count
        c = r
        if SELECT:
            c = tl.sum(tl.where(rank == r, index, 0), axis=0)
        c = tl.where(is_own, own, c)
        inside, key, seen = keys_of_block(seen_ptr, c, S, BLOCK, KEYS, SEEN)
        token = (c * BLOCK + tl.arange(0, KEYS)).to(tl.int64)[:, None]
        k = tl.load(
            k_ptr + token * stride_kt + columns_k[None, :], mask=inside[:, None] & in_k[None, :], other=0.0
        )
        v = tl.load(
            v_ptr + token * stride_vt + columns_v[None, :], mask=inside[:, None] & in_v[None, :], other=0.0
        )
        mark = tl.load(logits_ptr + c)
        s = tl.sum(q[None, :] * k.to(tl.float32), axis=1) * factor  # [KEYS]
        distance = place - key
        s = tl.where((distance >= 0) & (seen | (distance == 0)), s, float("-inf"))
        weight, inverse, lse = softmax_of_block(s[:, None], 0)
        gate = gate_of(mark, lse, is_own, r < held)
        higher = tl.maximum(most, gate)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        faded, part = tl.exp2(most - base), tl.exp2(gate - base)
        total = total * faded + part
        sums = sums * faded + tl.sum(weight * (part * inverse)[None, :] * v.to(tl.float32), axis=0)
        most = higher

    if SPLIT:
        rows = tl.num_programs(0).to(tl.int64)
        room = split * rows + row + tl.zeros([1], tl.int64)
        tl.store(most_ptr + room, most)
        tl.store(most_ptr + splits * rows + room, total)
        tl.store(sums_ptr + (split * rows + row) * V + columns_v, sums, mask=in_v)
    else:
        store_row(out_ptr, lse_ptr, row, sums, most, total, V, columns_v)


@triton.jit(do_not_specialize=LENGTHS)
def _landmark_attention_read_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sums_ptr, most_ptr, arrived_ptr, logits_ptr, listed_ptr, start_ptr, seen_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    T, S, C, N, splits, top, stride_sb, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
    SELECT: tl.constexpr, LISTED: tl.constexpr, SEEN: tl.constexpr, SPLITS: tl.constexpr, AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What `_landmark_attention_step_kernel` and the merge do, with the query as the first of ROWS rows.

    Shapes:  those of that kernel;  arrived: [B H T], how many parts of a query are there;  listed: [B H T, top], with LISTED
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    t, h, b = row % T, row // T % (N * GROUP), row // T // (N * GROUP)
    n = h // GROUP
    place = tl.load(start_ptr + b).to(tl.int32) + t.to(tl.int32)
    own = tl.where(place < 0, 0, place // BLOCK)
    i = tl.arange(0, ROWS)
    columns_k, columns_v = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V)
    in_k, in_v = (columns_k < K)[None, :], (columns_v < V)[None, :]
    q_at = q_ptr + b * stride_qb + h * stride_qh + t * stride_qt + (i * 0)[:, None] + columns_k[None, :]
    q = tl.load(q_at, mask=(i == 0)[:, None] & in_k, other=0.0)  # [ROWS, ROWS_K]
    k_ptr += b * stride_kb + n * stride_kh
    v_ptr += b * stride_vb + n * stride_vh
    seen_ptr += b * stride_sb
    logits_ptr += row * C

    if AHEAD:
        tl.extra.cuda.gdc_wait()
    index = tl.arange(0, WIDTH)
    rank = index
    count = own
    held = own
    if SELECT:
        count = tl.minimum(own, top)
    if SELECT and not LISTED:
        logits = tl.load(logits_ptr + index, mask=index < C, other=float("-inf"))
        chosen, rank = best_of(logits, top, NEAR=True)
        rank = tl.where(chosen, rank - 1, -1)
        held = tl.sum(chosen.to(tl.int32), axis=0)
    share = tl.cdiv(count + 1, splits)
    first = split * share
    last = tl.minimum(first + share, count + 1)
    factor = scale * LOG2_E
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, ROWS_V], tl.float32)
    for r in range(first, last):
        is_own = r == count
        c = r
        kept = r < held
        if LISTED:
            c = tl.load(listed_ptr + row * top + r, mask=r < count, other=0)
            kept = c >= 0
            c = tl.maximum(c, 0)
        elif SELECT:
            c = tl.sum(tl.where(rank == r, index, 0), axis=0)
        c = tl.where(is_own, own, c)
        inside, key, seen = keys_of_block(seen_ptr, c, S, BLOCK, KEYS, SEEN)
        token = (c * BLOCK + tl.arange(0, KEYS)).to(tl.int64)[:, None]
        k = tl.load(k_ptr + token * stride_kt + columns_k[None, :], mask=inside[:, None] & in_k, other=0.0)
        v = tl.load(v_ptr + token * stride_vt + columns_v[None, :], mask=inside[:, None] & in_v, other=0.0)
        mark = tl.load(logits_ptr + c)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor  # [ROWS, KEYS]
        distance = place - key
        s = tl.where(((distance >= 0) & (seen | (distance == 0)))[None, :], s, float("-inf"))
        weight, inverse, lse = softmax_of_block(s, 1)
        gate = gate_of(mark, lse, is_own, kept)
        higher = tl.maximum(most, gate)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        faded, part = tl.exp2(most - base), tl.exp2(gate - base)
        total = total * faded + part
        p = weight * (part * inverse)[:, None]
        sums = tl.dot(p.to(v.dtype), v, sums * faded[:, None], input_precision=PRECISION)
        most = higher

    most = tl.max(tl.where(i == 0, most, float("-inf")), axis=0)
    total = tl.sum(tl.where(i == 0, total, 0.0), axis=0)
    sums = tl.sum(tl.where((i == 0)[:, None], sums, 0.0), axis=0)  # [ROWS_V]
    if SPLITS == 1:
        none = tl.zeros([1], tl.float32)
        store_row(out_ptr, lse_ptr, row, sums, most + none, total + none, V, columns_v)
    else:
        rows = tl.num_programs(0).to(tl.int64)
        tl.store(most_ptr + split * rows + row, most)
        tl.store(most_ptr + (splits + split) * rows + row, total)
        tl.store(sums_ptr + (split * rows + row) * V + columns_v, sums, mask=columns_v < V)
        # One thread tells what all of them have written.
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + row, 1, sem="acq_rel") == splits - 1:
            merge_row(sums_ptr, most_ptr, out_ptr, lse_ptr, row, rows, splits, columns_v, V, SPLITS)


@triton.jit
def store_row(out_ptr, lse_ptr, row, sums, most, total, V: tl.constexpr, columns):
    """Output and log-sum-exp of a query."""
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    lse = tl.where(some, most + tl.log2(total), float("inf"))
    tl.store(lse_ptr + row + tl.zeros([1], tl.int64), lse)
    out = (sums / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * V + columns, out, mask=columns < V)


@triton.jit
def merge_row(
    sums_ptr, most_ptr, out_ptr, lse_ptr, row, rows, splits, columns, V: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """Output and log-sum-exp of a query of which `splits` parts are there; others may have written them in this launch."""
    split = tl.arange(0, SPLITS)
    inside = split < splits
    room = split * rows + row
    most = tl.load(most_ptr + room, mask=inside, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(most_ptr + splits * rows + room, mask=inside, other=0.0, cache_modifier=".cg")
    mask = inside[:, None] & (columns < V)[None, :]
    sums = tl.load(
        sums_ptr + (room * V)[:, None] + columns[None, :], mask=mask, other=0.0, cache_modifier=".cg"
    )  # [SPLITS, ROWS_V]
    highest = tl.max(most, axis=0)
    weight = tl.exp2(most - tl.where(highest == float("-inf"), 0.0, highest))
    sums = tl.sum(sums * weight[:, None], axis=0)
    total = tl.sum(total * weight, axis=0) + tl.zeros([1], tl.float32)
    store_row(out_ptr, lse_ptr, row, sums, highest, total, V, columns)


@triton.jit(do_not_specialize=LENGTHS)
def _landmark_attention_merge_kernel(
    sums_ptr, most_ptr, out_ptr, lse_ptr, splits, V: tl.constexpr, ROWS_V: tl.constexpr, SPLITS: tl.constexpr
):
    """What the parts of one query come to together; shapes as those of `_landmark_attention_step_kernel`."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0).to(tl.int64)
    merge_row(sums_ptr, most_ptr, out_ptr, lse_ptr, row, rows, splits, tl.arange(0, ROWS_V), V, SPLITS)
