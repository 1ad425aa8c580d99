# mypy: ignore-errors
"""The kernels of block_choice: what blocks are worth to a query, and the list of the best.

By means of blocks, one launch: a program multiplies the mean of a group's queries with COLUMNS means. By kernels, two: the
first leaves the logits s of all heads of a group with the maximum m and the sum l of each tile of them, all to base 2; the second
merges these to a log-sum-exp for each head, and takes

    worth_c = max_{4c - 1 <= i <= 4c + 3} sum_h 2^(s_hi - lse_h)

Then one program for each query and key head finds the best and writes them in order. Blocks that are always read are worth inf,
and those behind the own one -inf.

For many queries, by kernels, a tile of them goes over the means twice, for the log-sum-exp and for the sum of the heads of a
group, so that logits of single heads are never in memory; one program for each query and key head pools and marks.

Bytes of a step for a row and key head: the means, n K elements, once; by kernels 8 n bytes a head more for logits, mostly in the
L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels.common.jit import LOG2_E, best_of

# A new length must not mean a new compilation.
LENGTHS = (
    "T", "N", "parts", "blocks", "tiles", "sink", "recent", "count", "dense_length", "length", "stride_held",
)  # fmt: skip


@triton.jit
def place_of(start_ptr, row, T, N, BLOCK: tl.constexpr):
    """Row of the batch, key head and query of a row of worths, its place and its own block, -1 for one at a negative place."""
    t = (row % T).to(tl.int32)
    n = row // T % N
    b = row // T // N
    place = tl.load(start_ptr + b).to(tl.int32) + t
    return b, n, t, place, tl.where(place < 0, -1, place // BLOCK)


@triton.jit
def as_read(worth, c, own, sink, recent):
    """Worths with those of blocks that are always read, and of those that never are."""
    always = (c < sink) | (c > own - recent)
    worth = tl.where(always, float("inf"), worth)
    return tl.where(c <= own, worth, float("-inf"))


@triton.jit(do_not_specialize=LENGTHS)
def _block_choice_mean_kernel(
    q_ptr, parts_ptr, worth_ptr, start_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_mb, stride_mh, stride_mt,
    T, N, parts, blocks, sink, recent,
    K: tl.constexpr, ROWS_K: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What COLUMNS blocks are worth to one query by their means.  Shapes:  worth: [B, N, T, blocks] float32"""
    row = tl.program_id(0).to(tl.int64)
    b, n, t, _, own = place_of(start_ptr, row, T, N, BLOCK)
    head, columns = tl.arange(0, HEADS), tl.arange(0, ROWS_K)
    in_k = (columns < K)[None, :]
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    parts_ptr += b * stride_mb + n * stride_mh
    at = parts_ptr + (c.to(tl.int64) * stride_mt)[:, None] + columns[None, :]
    # On its way while the mean of the queries is made.
    means = tl.load(at, mask=(c < parts)[:, None] & in_k, other=0.0)  # [COLUMNS, ROWS_K]
    q_ptr += b * stride_qb + n * GROUP * stride_qh + t.to(tl.int64) * stride_qt
    q_at = q_ptr + (head.to(tl.int64) * stride_qh)[:, None] + columns[None, :]
    q = tl.load(q_at, mask=(head < GROUP)[:, None] & in_k, other=0.0)  # [HEADS, ROWS_K]
    mean = tl.sum(q.to(tl.float32), axis=0) / GROUP
    worth = tl.sum(mean[None, :] * means.to(tl.float32), axis=1)
    tl.store(worth_ptr + row * blocks + c, as_read(worth, c, own, sink, recent), mask=c < blocks)


@triton.jit(do_not_specialize=LENGTHS)
def _block_choice_logit_kernel(
    q_ptr, parts_ptr, logits_ptr, most_ptr, total_ptr, start_ptr, held_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_mb, stride_mh, stride_mt,
    T, N, parts, tiles, stride_held, scale,
    K: tl.constexpr, ROWS_K: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, HELD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of COLUMNS kernels for the heads of a group, -inf for those that do not count, with their maximum and sum.

    Shapes:  logits: [B, N, T, GROUP, parts];  most, total: [B, N, T, ROWS, tiles];  all float32;  held: [1 or B, parts] uint8
    """
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    b, n, t, place, _ = place_of(start_ptr, row, T, N, BLOCK)
    head, columns = tl.arange(0, ROWS), tl.arange(0, ROWS_K)
    in_k, in_group = (columns < K)[None, :], (head < GROUP)[:, None]
    q_ptr += b * stride_qb + n * GROUP * stride_qh + t.to(tl.int64) * stride_qt
    q_at = q_ptr + (head.to(tl.int64) * stride_qh)[:, None] + columns[None, :]
    q = tl.load(q_at, mask=in_group & in_k, other=0.0)  # [ROWS, ROWS_K]
    i = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = i < parts
    parts_ptr += b * stride_mb + n * stride_mh
    at = parts_ptr + (i.to(tl.int64) * stride_mt)[:, None] + columns[None, :]
    means = tl.load(at, mask=inside[:, None] & in_k, other=0.0)  # [COLUMNS, ROWS_K]
    s = tl.dot(q, tl.trans(means), input_precision=PRECISION) * (scale * LOG2_E)  # [ROWS, COLUMNS]
    seen = inside & ((i + 2) * (BLOCK // 4) <= place + 1)
    if HELD:
        seen = seen & (tl.load(held_ptr + b * stride_held + i, mask=inside, other=0) != 0)
    s = tl.where(seen[None, :], s, float("-inf"))
    most = tl.max(s, axis=1)
    base = tl.where(most == float("-inf"), 0.0, most)
    room = (row * ROWS + head) * tiles + tile
    tl.store(most_ptr + room, most)
    tl.store(total_ptr + room, tl.sum(tl.exp2(s - base[:, None]), axis=1))
    logits_at = logits_ptr + ((row * GROUP + head) * parts)[:, None] + i[None, :]
    tl.store(logits_at, s, mask=in_group & inside[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def _block_choice_pool_kernel(
    logits_ptr, most_ptr, total_ptr, worth_ptr, start_ptr,
    T, N, parts, blocks, tiles, sink, recent,
    ROWS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """What COLUMNS blocks are worth to one query by the kernels that overlap them; shapes as those of the others."""
    row = tl.program_id(0).to(tl.int64)
    _, _, _, _, own = place_of(start_ptr, row, T, N, BLOCK)
    head, tile = tl.arange(0, ROWS), tl.arange(0, TILES)
    room, there = ((row * ROWS + head) * tiles)[:, None] + tile[None, :], (tile < tiles)[None, :]
    most = tl.load(most_ptr + room, mask=there, other=float("-inf"))  # [ROWS, TILES]
    total = tl.load(total_ptr + room, mask=there, other=0.0)
    highest = tl.max(most, axis=1)
    base = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(total * tl.exp2(most - base[:, None]), axis=1)
    # Where nothing is seen all logits are -inf.
    lse = base + tl.log2(tl.where(total > 0.0, total, 1.0))
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    logits_at = logits_ptr + ((row * GROUP + head) * parts)[:, None]
    worth = tl.zeros([COLUMNS], tl.float32)
    for step in tl.static_range(0, 5):
        i = 4 * c + (step - 1)
        inside = (head < GROUP)[:, None] & ((i >= 0) & (i < parts))[None, :]
        s = tl.load(logits_at + i[None, :], mask=inside, other=float("-inf"))  # [ROWS, COLUMNS]
        worth = tl.maximum(worth, tl.sum(tl.exp2(s - lse[:, None]), axis=0))
    tl.store(worth_ptr + row * blocks + c, as_read(worth, c, own, sink, recent), mask=c < blocks)


@triton.jit(do_not_specialize=LENGTHS)
def _block_choice_list_kernel(
    worth_ptr, listed_ptr, start_ptr, T, N, blocks, count, dense_length, length,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The best blocks of one query in order, -1 behind them.  Shapes:  listed: [B, N, T, length] int32"""
    row = tl.program_id(0).to(tl.int64)
    _, _, _, place, _ = place_of(start_ptr, row, T, N, BLOCK)
    c = tl.arange(0, WIDTH)
    worth = tl.load(worth_ptr + row * blocks + c, mask=c < blocks, other=float("-inf"))
    chosen, rank = best_of(worth, tl.where(place < dense_length, length, count))
    listed_ptr += row * length
    tl.store(listed_ptr + rank - 1, c, mask=chosen)
    behind = c >= tl.sum(chosen.to(tl.int32), axis=0)
    tl.store(listed_ptr + c, c * 0 - 1, mask=behind & (c < length))


@triton.jit
def kernels_before(place, parts, BLOCK: tl.constexpr):
    """How many kernels end at a place or before."""
    return tl.minimum(tl.maximum((place + 1) // (BLOCK // 4) - 1, 0), parts)


@triton.jit
def rows_of(tile, start, T, ROWS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr):
    """For each row of a tile: its query, its head in the group, whether there is one, and its place (else -1)."""
    row = tl.arange(0, ROWS)
    t, head = tile * (ROWS // HEADS) + row // HEADS, row % HEADS
    present = (head < GROUP) & (t < T)
    return t, head, present, tl.where(present, start + t, -1)


@triton.jit
def logits_of(
    q, parts_ptr, held_ptr, first, seen, parts, stride_mt, factor, columns, in_k,
    COLUMNS: tl.constexpr, HELD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits to base 2 of COLUMNS kernels from `first` on, -inf for those that do not count.  Shapes:  out: [ROWS, COLUMNS]"""
    i = first + tl.arange(0, COLUMNS)
    at = parts_ptr + (i.to(tl.int64) * stride_mt)[:, None] + columns[None, :]
    means = tl.load(at, mask=(i < parts)[:, None] & in_k, other=0.0)  # [COLUMNS, ROWS_K]
    s = tl.dot(q, tl.trans(means), input_precision=PRECISION) * factor
    counts = i[None, :] < seen[:, None]
    if HELD:
        counts = counts & (tl.load(held_ptr + i, mask=i < parts, other=0) != 0)[None, :]
    return tl.where(counts, s, float("-inf"))


@triton.jit(do_not_specialize=LENGTHS)
def _block_choice_sum_kernel(
    q_ptr, parts_ptr, lse_ptr, start_ptr, held_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_mb, stride_mh, stride_mt,
    T, N, parts, tiles, stride_held, scale,
    K: tl.constexpr, ROWS_K: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, HELD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp of the logits of each head of a tile of queries, to base 2.  Shapes:  lse: [B, N, T, HEADS] float32"""
    n, b = tl.program_id(0) % N, (tl.program_id(0) // N).to(tl.int64)
    # The tiles that see most begin.
    tile = tiles - 1 - tl.program_id(1)
    t, head, present, place = rows_of(tile, tl.load(start_ptr + b).to(tl.int32), T, ROWS, HEADS, GROUP)
    columns = tl.arange(0, ROWS_K)
    in_k = (columns < K)[None, :]
    q_ptr += b * stride_qb + n.to(tl.int64) * GROUP * stride_qh
    q_at = q_ptr + (t.to(tl.int64) * stride_qt + head.to(tl.int64) * stride_qh)[:, None] + columns[None, :]
    q = tl.load(q_at, mask=present[:, None] & in_k, other=0.0)  # [ROWS, ROWS_K]
    parts_ptr += b * stride_mb + n.to(tl.int64) * stride_mh
    held_ptr += b * stride_held
    seen = kernels_before(place, parts, BLOCK)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, tl.max(seen, axis=0), COLUMNS):
        s = logits_of(
            q, parts_ptr, held_ptr, first, seen, parts, stride_mt, scale * LOG2_E, columns, in_k,
            COLUMNS, HELD, PRECISION,
        )  # fmt: skip
        higher = tl.maximum(most, tl.max(s, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(most - base) + tl.sum(tl.exp2(s - base[:, None]), axis=1)
        most = higher
    some = total > 0.0
    lse = tl.where(some, most + tl.log2(tl.where(some, total, 1.0)), 0.0)
    at = ((b * N + n) * T + t) * HEADS + head
    tl.store(lse_ptr + at, lse, mask=present)


@triton.jit(do_not_specialize=LENGTHS)
def _block_choice_share_kernel(
    q_ptr, parts_ptr, lse_ptr, share_ptr, start_ptr, held_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_mb, stride_mh, stride_mt,
    T, N, parts, stride_held, scale,
    K: tl.constexpr, ROWS_K: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, HELD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What COLUMNS kernels are worth to a tile of queries, the heads of a group together.

    Shapes:  share: [B, N, T, parts] float32; of kernels that end behind the tile nothing is written
    """
    n, b = tl.program_id(0) % N, (tl.program_id(0) // N).to(tl.int64)
    tile = tl.program_id(1)
    t, head, present, place = rows_of(tile, tl.load(start_ptr + b).to(tl.int32), T, ROWS, HEADS, GROUP)
    seen, first = kernels_before(place, parts, BLOCK), tl.program_id(2) * COLUMNS
    if first >= tl.max(seen, axis=0):
        return
    columns = tl.arange(0, ROWS_K)
    in_k = (columns < K)[None, :]
    q_ptr += b * stride_qb + n.to(tl.int64) * GROUP * stride_qh
    q_at = q_ptr + (t.to(tl.int64) * stride_qt + head.to(tl.int64) * stride_qh)[:, None] + columns[None, :]
    q = tl.load(q_at, mask=present[:, None] & in_k, other=0.0)  # [ROWS, ROWS_K]
    lse = tl.load(lse_ptr + ((b * N + n) * T + t) * HEADS + head, mask=present, other=0.0)
    s = logits_of(
        q, parts_ptr + b * stride_mb + n.to(tl.int64) * stride_mh, held_ptr + b * stride_held, first, seen, parts,
        stride_mt, scale * LOG2_E, columns, in_k, COLUMNS, HELD, PRECISION,
    )  # fmt: skip
    p = tl.reshape(tl.exp2(s - lse[:, None]), [ROWS // HEADS, HEADS, COLUMNS])
    query, i = tile * (ROWS // HEADS) + tl.arange(0, ROWS // HEADS), first + tl.arange(0, COLUMNS)
    at = (((b * N + n) * T + query) * parts)[:, None] + i[None, :]
    tl.store(share_ptr + at, tl.sum(p, axis=1), mask=(query < T)[:, None] & (i < parts)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def _block_choice_mark_kernel(
    worth_ptr, marks_ptr, start_ptr, T, N, parts, blocks, sink, recent, count, dense_length,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """The best blocks of one query, a byte each, of worths as they are, or with POOL of those of kernels.

    Shapes:  worth: [B, N, T, parts] float32;  marks: [B, N, T, blocks] uint8
    """
    row = tl.program_id(0).to(tl.int64)
    _, _, _, place, own = place_of(start_ptr, row, T, N, BLOCK)
    c = tl.arange(0, WIDTH)
    worth_ptr += row * parts
    if POOL:
        seen = kernels_before(place, parts, BLOCK)
        worth = tl.zeros([WIDTH], tl.float32)
        for step in tl.static_range(0, 5):
            i = 4 * c + (step - 1)
            worth = tl.maximum(worth, tl.load(worth_ptr + i, mask=(i >= 0) & (i < seen), other=0.0))
    else:
        worth = tl.load(worth_ptr + c, mask=c < parts, other=0.0)
    worth = tl.where(c < blocks, as_read(worth, c, own, sink, recent), float("-inf"))
    chosen, _ = best_of(worth, tl.where(place < dense_length, blocks, count))
    tl.store(marks_ptr + row * blocks + c, chosen.to(tl.uint8), mask=c < blocks)
