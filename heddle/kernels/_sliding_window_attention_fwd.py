# mypy: ignore-errors
"""The forward kernels of sliding_window_attention: one reads the keys in view of a tile, one merges what was split.

A program holds a tile of neighbouring queries of one head, or in a decode step those of all heads that share a key head. It
walks over the tiles of keys that any of them sees: those of the sinks first, then from the first key in the first query's window
on. For each of them, over the keys j that a row sees,

    m' = max(m, c max_j s_j),   l' = 2^(m - m') l + Σ_j 2^(c s_j - m'),   a' = 2^(m - m') a + Σ_j 2^(c s_j - m') v_j

with s_j = q · k_j and c = scale log2(e) > 0; then o = a / l, and m + log2(l) is kept for the gradients. A key is in view if
its distance, read as a number without a sign, is smaller than a limit: one comparison for both ends of the window. Tiles that all
rows see whole are not compared at all. Nothing is made for keys that no row sees, but in the tiles at the two ends.

Where tiles are too few to fill the device, as in a decode step, their keys are split between programs; each leaves (m, l, a), and
the merge is exact up to rounding.

Bytes of a tile of M queries: M (K + V) elements, and (window + M + sinks) (K + V), mostly from the L2 cache, since the next tile
has most of them as well. FLOP: 2 (K + V) for a query and key.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels.common.jit import LOG2_E, find_sequence, load_tile

# A new length must not mean a new compilation.
LENGTHS = ("T", "S", "tiles", "splits", "room", "window", "sinks", "stride_sb")
# A limit that no distance reaches, and a key that is behind every query.
FAR = tl.constexpr(1 << 30)


@triton.jit
def keys_in_view(first_place, last_place, window, sinks, KEYS: tl.constexpr, SINKS: tl.constexpr):
    """Tiles of sinks, the first key of the others, and how many tiles there are in all."""
    low = tl.maximum(first_place - window + 1, 0)
    sink_tiles = 0
    if SINKS:
        low = tl.maximum(low, sinks)
        sink_tiles = tl.cdiv(tl.minimum(sinks, last_place + 1), KEYS)
    return sink_tiles, low, sink_tiles + tl.cdiv(tl.maximum(last_place + 1 - low, 0), KEYS)


@triton.jit
def tile_of_keys(index, sink_tiles, low, last_place, window, sinks, KEYS: tl.constexpr, SINKS: tl.constexpr):
    """First key of the tile at hand, the place behind its last one at most, and how far its keys are seen."""
    first = low + (index - sink_tiles) * KEYS
    end = last_place + 1
    reach = window
    if SINKS:
        of_sinks = index < sink_tiles
        first = tl.where(of_sinks, index * KEYS, first)
        end = tl.where(of_sinks, tl.minimum(sinks, end), end)
        reach = tl.where(of_sinks, FAR, window)
    return first, end, reach


@triton.jit
def hide(s, distance, reach, seen, SEEN: tl.constexpr):
    """Logits, -inf where the distance of query and key is negative or not below `reach`, or the key is not seen by others."""
    visible = distance.to(tl.uint32) < reach.to(tl.uint32)
    if SEEN:
        visible = visible & (seen | (distance == 0))
    return tl.where(visible, s, float("-inf"))


@triton.jit
def rows_of_tile(
    tile, shift, length, ROWS: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, PACKED: tl.constexpr
):
    """For each row of a tile: its query and its head, whether there is one, and its place (-1 if not)."""
    row = tl.arange(0, ROWS)
    t = tile * QUERIES + row // HEADS
    head = row % HEADS
    present = (row // HEADS < QUERIES) & (head < PACKED) & (t < length)
    return t, head, present, tl.where(present, shift + t, -1)


@triton.jit(do_not_specialize=LENGTHS)
def _sliding_window_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, k_tiles, v_tiles, out_ptr, lse_ptr, sums_ptr, most_ptr, table_ptr, cu_seqlens_ptr, seen_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot,
    T, S, tiles, splits, window, sinks, stride_sb, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr,
    QUERIES: tl.constexpr, HEADS: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr,
    SINKS: tl.constexpr, SEEN: tl.constexpr, VARLEN: tl.constexpr, SPLIT: tl.constexpr, TILES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of PACKED neighbouring heads, and with SPLIT one part of its keys.

    Shapes:  lse: [B, H, T], base 2, inf where nothing is seen
             sums: [splits, programs, ROWS, V], most: [2, splits, programs, ROWS]: what is merged
    """
    unit = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    b, tile, begin, length = find_sequence(tl.program_id(0), table_ptr, cu_seqlens_ptr, T, tiles, VARLEN)
    shift = S - T
    if VARLEN:
        # Of room that no sequence needs there is nothing to do.
        length = tl.where(b < 0, 0, length)
        b = tl.zeros((), tl.int32)
        shift = 0
    b = b.to(tl.int64)
    t, head, present, place = rows_of_tile(tile, shift, length, ROWS, QUERIES, HEADS, PACKED)
    columns_k, columns_v = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V)
    in_k, in_v = (columns_k < K)[None, :], (columns_v < V)[None, :]
    n = unit // (GROUP // PACKED)
    first_head = unit * PACKED
    q_ptr += b * stride_qb + first_head * stride_qh + begin * stride_qt
    k_ptr += b * stride_kb + n * stride_kh + begin * stride_kt
    v_ptr += b * stride_vb + n * stride_vh + begin * stride_vt
    seen_ptr += b * stride_sb + begin
    q_at = q_ptr + (t.to(tl.int64) * stride_qt + head.to(tl.int64) * stride_qh)[:, None] + columns_k[None, :]
    q = tl.load(q_at, mask=present[:, None] & in_k, other=0.0)  # [ROWS, ROWS_K]

    factor = scale * LOG2_E
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, ROWS_V], tl.float32)
    first_place = shift + tile * QUERIES
    last_place = tl.minimum(first_place + QUERIES, shift + length) - 1
    sink_tiles, low, count = keys_in_view(first_place, last_place, window, sinks, KEYS, SINKS)
    from_tile, to_tile = 0, count
    if SPLIT:
        share = tl.cdiv(count, splits)
        from_tile = split * share
        to_tile = tl.minimum(from_tile + share, count)
    i = tl.arange(0, KEYS)
    for index in range(from_tile, to_tile):
        first, end, reach = tile_of_keys(index, sink_tiles, low, last_place, window, sinks, KEYS, SINKS)
        inside = first + i < end
        k = load_tile(
            k_ptr, k_tiles, b, n, first, begin, stride_kt, inside, columns_k, in_k, KEYS, ROWS_K, TILES
        )
        v = load_tile(
            v_ptr, v_tiles, b, n, first, begin, stride_vt, inside, columns_v, in_v, KEYS, ROWS_V, TILES
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [ROWS, KEYS]
        is_whole = (first + KEYS - 1 <= first_place) & (first > last_place - reach) & (first + KEYS <= end)
        if SEEN:
            is_whole = False
        if not is_whole:
            key = tl.where(inside, first + i, FAR)
            seen = inside
            if SEEN:
                seen = tl.load(seen_ptr + first + i, mask=inside, other=0) != 0
            s = hide(s, place[:, None] - key[None, :], reach, seen[None, :], SEEN)
        # Of logits times the factor: a fused product less itself rounded is not 0, and each tile would fade the sums.
        higher = tl.maximum(most, tl.max(s, axis=1) * factor)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s * factor - base[:, None])
        faded = tl.exp2(most - base)
        total = total * faded + tl.sum(p, axis=1)
        sums = tl.dot(p.to(v.dtype), v, sums * faded[:, None], input_precision=PRECISION)
        most = higher

    token = begin + t
    if SPLIT:
        programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
        room = (split * programs + unit * tl.num_programs(0) + tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
        tl.store(most_ptr + room, most)
        tl.store(most_ptr + splits * programs * ROWS + room, total)
        tl.store(sums_ptr + (room * V)[:, None] + columns_v[None, :], sums, mask=in_v)
    else:
        at_lse = (b * tl.num_programs(1) * PACKED + first_head + head) * T + token
        out_at = out_ptr + b * stride_ob + (first_head + head) * stride_oh + token.to(tl.int64) * stride_ot
        store_tile(out_at, lse_ptr + at_lse, sums, most, total, present, columns_v, in_v)


@triton.jit
def store_tile(out_at, lse_at, sums, most, total, present, columns, in_v):
    """Output and log-sum-exp of a tile."""
    some = total > 0.0
    out = sums / tl.where(some, total, 1.0)[:, None]
    lse = tl.where(some, most + tl.log2(tl.where(some, total, 1.0)), float("inf"))
    tl.store(lse_at, lse, mask=present)
    at = out_at[:, None] + columns[None, :]
    tl.store(at, out.to(out_at.dtype.element_ty), mask=present[:, None] & in_v)


@triton.jit(do_not_specialize=LENGTHS)
def _sliding_window_attention_fwd_merge_kernel(
    sums_ptr, most_ptr, out_ptr, lse_ptr, table_ptr, cu_seqlens_ptr,
    stride_ob, stride_oh, stride_ot,
    T, tiles, splits,
    V: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr,
    QUERIES: tl.constexpr, HEADS: tl.constexpr, PACKED: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """What the parts of one tile's keys come to together; shapes as those of the kernel that made them."""
    unit = tl.program_id(1).to(tl.int64)
    b, tile, begin, length = find_sequence(tl.program_id(0), table_ptr, cu_seqlens_ptr, T, tiles, VARLEN)
    if VARLEN:
        length = tl.where(b < 0, 0, length)
        b = tl.zeros((), tl.int32)
    b = b.to(tl.int64)
    t, head, present, _ = rows_of_tile(tile, 0, length, ROWS, QUERIES, HEADS, PACKED)
    columns = tl.arange(0, ROWS_V)
    in_v = (columns < V)[None, :]
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, ROWS_V], tl.float32)
    programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    for split in range(0, splits):
        room = (split * programs + unit * tl.num_programs(0) + tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
        its_most = tl.load(most_ptr + room)
        its_total = tl.load(most_ptr + splits * programs * ROWS + room)
        its_sums = tl.load(sums_ptr + (room * V)[:, None] + columns[None, :], mask=in_v, other=0.0)
        higher = tl.maximum(most, its_most)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        faded, its_faded = tl.exp2(most - base), tl.exp2(its_most - base)
        total = total * faded + its_total * its_faded
        sums = sums * faded[:, None] + its_sums * its_faded[:, None]
        most = higher
    first_head, token = unit * PACKED, begin + t
    at_lse = (b * tl.num_programs(1) * PACKED + first_head + head) * T + token
    out_at = out_ptr + b * stride_ob + (first_head + head) * stride_oh + token.to(tl.int64) * stride_ot
    store_tile(out_at, lse_ptr + at_lse, sums, most, total, present, columns, in_v)
