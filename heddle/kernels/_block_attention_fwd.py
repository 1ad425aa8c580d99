# mypy: ignore-errors
"""The kernels of block_attention but those of its gradients: one writes lists, one reads the blocks on them, one merges.

A program holds a tile of queries that are neighbours, with all query heads that share a key head: rows of one product. For each
block on the tile's list, over the keys j that a row sees,

    m' = max(m, max_j s_j),   l' = 2^(m - m') l + Σ_j 2^(s_j - m'),   a' = 2^(m - m') a + Σ_j 2^(s_j - m') v_j

with s_j = scale log2(e) q · k_j, beginning with the row's own key: m = s_own, l = 1, a = v_own. Then o = a / l, and
m + log2(l) is kept for the gradients. Nothing is made for blocks that are on no list.

Where blocks are let through by gates, all later queries read the same ones, and a tile is as tall as a product wants it: its rows
read the blocks with a gate, and each its own block.

Where tiles are too few to fill the device, as in a decode step, a list is split between programs; each leaves (m, l, a), and
the merge is exact up to rounding:  o = Σ_p 2^(m_p - m) a_p / Σ_p 2^(m_p - m) l_p. The list of one query is split evenly. What
neighbours choose differs, and the later ones must change no bit of the earlier: theirs is split by places, at blocks that
the shapes tell, and what a query does not read leaves m, l and a as they are.

Bytes of a decode step for a row and key head: L blocks of `block` keys, (K + V) elements each; of prefill the same for a tile,
mostly from the L2 cache. FLOP: 2 G (K + V) for a query and key.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels.common.jit import LOG2_E, load_tile

# A new length must not mean a new compilation.
LENGTHS = ("T", "S", "N", "tiles", "width", "count", "splits", "stride_sb")
# A key that no place reaches.
NOWHERE = tl.constexpr(1 << 30)


@triton.jit
def _block_attention_list_kernel(marks_ptr, offsets_ptr, entries_ptr, count, WIDTH: tl.constexpr):
    """The marks of one list that are not 0, in order.  Shapes:  marks: [lists, count] uint8"""
    row = tl.program_id(0).to(tl.int64)
    at = tl.load(offsets_ptr + row).to(tl.int64)
    for first in range(0, count, WIDTH):
        index = first + tl.arange(0, WIDTH)
        mark = tl.load(marks_ptr + row * count + index, mask=index < count, other=0).to(tl.int32)
        marked = (mark != 0).to(tl.int32)
        before = tl.cumsum(marked, axis=0) - marked
        tl.store(entries_ptr + at + before, index * 256 + mark, mask=mark != 0)
        at += tl.sum(marked, axis=0)


@triton.jit
def rows_of(
    tile, start, T, ROWS: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr
):
    """For each row of a tile: its query in the tile, its head in the group, whether there is one, and its place (else -1)."""
    row = tl.arange(0, ROWS)
    query = row // HEADS
    head = row % HEADS
    t = tile * QUERIES + query
    present = (query < QUERIES) & (head < GROUP) & (t < T)
    return query, head, present, tl.where(present, start + t, -1)


@triton.jit
def find_entries(
    offsets_ptr, row, width, split, splits, DIRECT: tl.constexpr, SPLIT: tl.constexpr, PLACED: tl.constexpr
):
    """Where the list of a tile begins, or the part of it that is this program's, and how many entries it has.

    PLACED: each part has an offset of its own; else parts are even.
    """
    if DIRECT:
        begin = row * width
        count = width
    else:
        at = offsets_ptr + (row * splits + split if PLACED else row)
        begin = tl.load(at).to(tl.int64)
        count = (tl.load(at + 1).to(tl.int64) - begin).to(tl.int32)
    if SPLIT and not PLACED:
        share = tl.cdiv(count, splits)
        begin += split * share
        count = tl.minimum(share, tl.maximum(count - split * share, 0))
    return begin, count


@triton.jit
def read_entry(entries_at, DIRECT: tl.constexpr):
    """Block and mark of an entry; lists that a caller gave have no marks, and negative entries for none."""
    entry = tl.load(entries_at).to(tl.int32)
    if DIRECT:
        return tl.maximum(entry, 0), tl.where(entry < 0, 0, 1)
    return entry >> 8, entry & 255


@triton.jit
def reads(mark, c, query, place, BLOCK: tl.constexpr, GATED: tl.constexpr):
    """Whether each row of a tile reads block c, of this mark."""
    if GATED:
        return ((mark & 1) != 0) | (place // BLOCK == c)
    return (mark >> query) & 1 != 0


@triton.jit
def seen_keys(seen_ptr, first, part, S, BLOCK: tl.constexpr, KEYS: tl.constexpr, SEEN: tl.constexpr):
    """Of KEYS keys of a block from `first` on: whether there are any, and their places, NOWHERE for those nobody sees."""
    i = tl.arange(0, KEYS)
    key = first + i
    inside = (part * KEYS + i < BLOCK) & (key < S)
    visible = inside
    if SEEN:
        visible = inside & (tl.load(seen_ptr + key, mask=inside, other=0) != 0)
    return inside, tl.where(visible, key, NOWHERE)


@triton.jit(do_not_specialize=LENGTHS)
def _block_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, k_tiles, v_tiles, out_ptr, lse_ptr, sums_ptr, most_ptr,
    start_ptr, offsets_ptr, entries_ptr, seen_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    T, S, N, tiles, width, splits, stride_sb, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr,
    QUERIES: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    DIRECT: tl.constexpr, GATED: tl.constexpr, SEEN: tl.constexpr, SPLIT: tl.constexpr, PLACED: tl.constexpr,
    TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one key head, and with SPLIT one part of its list.

    GATED: marks are 1 for a block with a gate and 2 for a block that is some query's own, and tiles with the longest lists begin.
    TILES: keys and values are loaded by descriptors, and logits are scaled where weights are made of them.

    Shapes:  out: [B, H, T, V];  lse: [B, H, T], base 2, inf where nothing is seen
             sums: [splits, B N tiles, ROWS, V], most: [2, splits, B N tiles, ROWS]: what is merged
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    tile = (row % tiles).to(tl.int32)
    n = row // tiles % N
    b = row // tiles // N
    if GATED:
        tile = tiles - 1 - tile
        row += tiles - 1 - 2 * (row % tiles)
    start = tl.load(start_ptr + b)
    query, head, present, place = rows_of(tile, start, T, ROWS, QUERIES, HEADS, GROUP)
    columns_k, columns_v = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V)
    in_k, in_v = (columns_k < K)[None, :], (columns_v < V)[None, :]
    first_query = tile.to(tl.int64) * QUERIES
    q_ptr += b * stride_qb + n * GROUP * stride_qh + first_query * stride_qt
    k_ptr += b * stride_kb + n * stride_kh
    v_ptr += b * stride_vb + n * stride_vh
    seen_ptr += b * stride_sb
    q_at = q_ptr + (query * stride_qt + head.to(tl.int64) * stride_qh)[:, None] + columns_k[None, :]
    q = tl.load(q_at, mask=present[:, None] & in_k, other=0.0)  # [ROWS, ROWS_K]

    factor = scale * LOG2_E
    # Of each logit at once, or of the largest and in the exponent.
    early, late = factor, 1.0
    if TILES:
        early, late = 1.0, factor
    has_own = (place >= 0) & (place < S) & (split == 0)
    own = place.to(tl.int64)[:, None]
    k_own = tl.load(k_ptr + own * stride_kt + columns_k[None, :], mask=has_own[:, None] & in_k, other=0.0)
    v_own = tl.load(v_ptr + own * stride_vt + columns_v[None, :], mask=has_own[:, None] & in_v, other=0.0)
    s_own = tl.sum(q.to(tl.float32) * k_own.to(tl.float32), axis=1) * factor
    most = tl.where(has_own, s_own, float("-inf"))
    total = tl.where(has_own, 1.0, 0.0)
    sums = v_own.to(tl.float32)  # [ROWS, ROWS_V]

    begin, count = find_entries(offsets_ptr, row, width, split, splits, DIRECT, SPLIT, PLACED)
    entries_ptr += begin
    PARTS: tl.constexpr = (BLOCK + KEYS - 1) // KEYS
    for index in range(0, count * PARTS):
        c, mark = read_entry(entries_ptr + index // PARTS, DIRECT)
        part = index % PARTS
        first = c * BLOCK + part * KEYS
        inside, key = seen_keys(seen_ptr, first, part, S, BLOCK, KEYS, SEEN)
        k = load_tile(k_ptr, k_tiles, b, n, first, 0, stride_kt, inside, columns_k, in_k, KEYS, ROWS_K, TILES)
        v = load_tile(v_ptr, v_tiles, b, n, first, 0, stride_vt, inside, columns_v, in_v, KEYS, ROWS_V, TILES)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * early  # [ROWS, KEYS]
        # Queries that do not read this block see as far as none.
        if GATED:
            is_whole = ((mark & 1) != 0) & (first + KEYS <= start + tile * QUERIES) & (KEYS == BLOCK)
            if SEEN:
                is_whole = False
            if not is_whole:
                reach = tl.where(reads(mark, c, query, place, BLOCK, GATED), place, -1)
                s = tl.where(key[None, :] < reach[:, None], s, float("-inf"))
        else:
            reach = tl.where(reads(mark, c, query, place, BLOCK, GATED), place, -1)
            s = tl.where(key[None, :] < reach[:, None], s, float("-inf"))
        higher = tl.maximum(most, tl.max(s, axis=1) * late)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s * late - base[:, None])
        faded = tl.exp2(most - base)
        total = total * faded + tl.sum(p, axis=1)
        sums = tl.dot(p.to(v.dtype), v, sums * faded[:, None], input_precision=PRECISION)
        most = higher

    if SPLIT:
        lists = tl.num_programs(0)
        room = (split * lists + row) * ROWS + tl.arange(0, ROWS)
        tl.store(most_ptr + room, most)
        tl.store(most_ptr + splits * lists * ROWS + room, total)
        tl.store(sums_ptr + (room * V)[:, None] + columns_v[None, :], sums, mask=in_v)
    else:
        store_rows(
            out_ptr, lse_ptr, sums, most, total, (b * N + n) * GROUP, first_query,
            query, head, present, T, V, columns_v,
        )  # fmt: skip


@triton.jit
def store_rows(
    out_ptr, lse_ptr, sums, most, total, first_head, first_query, query, head, present, T, V: tl.constexpr, columns
):  # fmt: skip
    """Output and log-sum-exp of a tile."""
    at = (first_head + head) * T + first_query + query
    some = total > 0.0
    out = sums / tl.where(some, total, 1.0)[:, None]
    lse = tl.where(some, most + tl.log2(tl.where(some, total, 1.0)), float("inf"))
    tl.store(lse_ptr + at, lse, mask=present)
    mask = present[:, None] & (columns < V)[None, :]
    tl.store(out_ptr + (at * V)[:, None] + columns[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=LENGTHS)
def _block_attention_merge_kernel(
    sums_ptr, most_ptr, out_ptr, lse_ptr, T, tiles, splits,
    V: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr,
    QUERIES: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """What the parts of one tile's list come to together; shapes as those of `_block_attention_fwd_kernel`."""
    row = tl.program_id(0).to(tl.int64)
    lists = tl.num_programs(0)
    tile = (row % tiles).to(tl.int32)
    query, head, present, _ = rows_of(tile, 0, T, ROWS, QUERIES, HEADS, GROUP)
    columns = tl.arange(0, ROWS_V)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, ROWS_V], tl.float32)
    for split in range(0, splits):
        room = (split * lists + row) * ROWS + tl.arange(0, ROWS)
        its_most = tl.load(most_ptr + room)
        its_total = tl.load(most_ptr + splits * lists * ROWS + room)
        its_sums = tl.load(
            sums_ptr + (room * V)[:, None] + columns[None, :], mask=(columns < V)[None, :], other=0.0
        )
        higher = tl.maximum(most, its_most)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        faded, its_faded = tl.exp2(most - base), tl.exp2(its_most - base)
        total = total * faded + its_total * its_faded
        sums = sums * faded[:, None] + its_sums * its_faded[:, None]
        most = higher
    store_rows(
        out_ptr, lse_ptr, sums, most, total, row // tiles * GROUP, tile.to(tl.int64) * QUERIES,
        query, head, present, T, V, columns,
    )  # fmt: skip
