# mypy: ignore-errors
"""The forward kernels of head_sparse_attention: one attends for a tile of queries, one merges what was split.

A program holds a tile of one head's list (see `_head_sparse_attention_lists`): the queries that chose the head, gathered, or in
a decode step the queries of all heads that share a key head. It walks over tiles of keys from the first one that a query sees
to the own key of the last one,

    m' = max(m, c max_j s_j),   l' = 2^(m - m') l + Σ_j 2^(c s_j - m'),   a' = 2^(m - m') a + Σ_j 2^(c s_j - m') v_j

with s_j = q · k_j and c = scale log2(e) > 0; then out = w a / l with the weight w of the head, and m + log2(l) is kept for the
gradients. Places in a list rise, so tiles of keys up to the first query's place need no mask: with half of the queries of a head
in its list, a tile of M rows compares about 2 M keys. Rows of queries that did not choose the head are 0, which costs their
stores alone; a tile with none but those reads no keys.

FLOP: 2 (K + V) for a key and a query that chose the head. Bytes of a tile of M rows: M (K + V) elements, and (K + V) for each
key, mostly from the L2 cache, since programs that follow each other share a head.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels.common.jit import LOG2_E, load_tile

# A new length must not mean a new compilation.
LENGTHS = ("T", "S", "tiles", "splits", "stride_sb")
# A place behind every query.
FAR = tl.constexpr(1 << 30)


@triton.jit
def rows_of_tile(
    weights_ptr, entries_ptr, b, first_head, tile, T, H,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, HEADS: tl.constexpr, PACKED: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """For each row of a tile: its token, its head after the first one, whether there is one, whether it is chosen, its weight."""
    row = tl.arange(0, ROWS)
    if LISTED:
        present = tile * ROWS + row < T
        entry = tl.load(entries_ptr + (b * H + first_head) * T + tile * ROWS + row, mask=present, other=-1)
        token = tl.where(entry < 0, -1 - entry, entry)
        head = tl.zeros([ROWS], tl.int32)
    else:
        token = tile * QUERIES + row // HEADS
        head = row % HEADS
        present = (row // HEADS < QUERIES) & (head < PACKED) & (token < T)
    weight = tl.load(weights_ptr + (b * T + token) * H + first_head + head, mask=present, other=0.0)
    # Rows of a list are asked for before their weights are there.
    chosen = (entry >= 0) if LISTED else (weight != 0.0)
    return token, head, present, chosen, weight


@triton.jit
def keys_of_tile(
    begins_ptr, token, chosen, shift, KEYS: tl.constexpr, SEEN: tl.constexpr, VARLEN: tl.constexpr
):
    """Of each row its place (-1 if not chosen) and the first key it may see; of the tile the first key, how many tiles of
    keys there are in all, and how many of them all rows see whole."""
    place = tl.where(chosen, shift + token, -1)
    last_place = tl.max(place, axis=0)
    whole_end = tl.min(tl.where(chosen, place, FAR), axis=0) + 1
    begin = tl.zeros_like(token)
    low = tl.zeros((), tl.int32)
    if VARLEN:
        begin = tl.load(begins_ptr + token, mask=chosen, other=0)
        low = tl.min(tl.where(chosen, begin, FAR), axis=0)
        # Of several sequences, no key is seen by all.
        whole_end = tl.where(tl.max(begin, axis=0) == low, whole_end, low)
    count = tl.cdiv(tl.maximum(last_place + 1 - low, 0), KEYS)
    whole = tl.minimum(tl.maximum(whole_end - low, 0) // KEYS, count)
    if SEEN:
        whole = 0
    return place, begin, low, count, whole


@triton.jit
def hide(s, place, begin, key, seen, SEEN: tl.constexpr, VARLEN: tl.constexpr):
    """Logits, -inf for keys behind the query, of an earlier sequence, or not seen by others; all of the shape of s, or spread."""
    visible = key <= place
    if VARLEN:
        visible = visible & (key >= begin)
    if SEEN:
        visible = visible & (seen | (key == place))
    return tl.where(visible, s, float("-inf"))


@triton.jit
def hide_keys(s, seen_ptr, place, begin, key, S, SEEN: tl.constexpr, VARLEN: tl.constexpr):
    """Logits of a tile [rows, keys] as `hide` gives them."""
    seen = key < S
    if SEEN:
        seen = tl.load(seen_ptr + key, mask=seen, other=0) != 0
    return hide(s, place[:, None], begin[:, None], key[None, :], seen[None, :], SEEN, VARLEN)


@triton.jit
def fold(s, v, most, total, sums, factor, PRECISION: tl.constexpr):
    """(m, l, a) with one more tile of keys."""
    # Of logits times the factor: a product less itself rounded, in one instruction, is not 0, and each tile would fade the sums.
    higher = tl.maximum(most, tl.max(s, axis=1) * factor)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(s * factor - base[:, None])
    faded = tl.exp2(most - base)
    total = total * faded + tl.sum(p, axis=1)
    sums = tl.dot(p.to(v.dtype), v, sums * faded[:, None], input_precision=PRECISION)
    return higher, total, sums


@triton.jit(do_not_specialize=LENGTHS)
def _head_sparse_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, k_tiles, v_tiles, weights_ptr, entries_ptr, out_ptr, lse_ptr, sums_ptr, most_ptr,
    begins_ptr, seen_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_ob, stride_oh, stride_ot,
    T, S, tiles, splits, stride_sb, H, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr,
    QUERIES: tl.constexpr, HEADS: tl.constexpr, PACKED: tl.constexpr, GROUP: tl.constexpr, KEYS: tl.constexpr,
    LISTED: tl.constexpr, SEEN: tl.constexpr, VARLEN: tl.constexpr, SPLIT: tl.constexpr, APART: tl.constexpr,
    TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of PACKED neighbouring heads, and with SPLIT one part of its keys; last tiles first.

    With APART the tiles of keys that need a mask have a loop of their own, in which nothing is loaded ahead.

    Shapes:  weights: [B, T, H] float32;  entries: [B, H, T];  begins: [T], of each token's sequence;  seen: [1 or B, S]
             lse: [B, H, T], base 2, inf where the head is not chosen
             sums: [splits, programs, ROWS, V], most: [2, splits, programs, ROWS]: what is merged
    """
    program, split = tl.program_id(0), tl.program_id(1)
    unit = (program // tiles).to(tl.int64)
    tile = tiles - 1 - program % tiles
    b, first_head = unit // (H // PACKED), unit % (H // PACKED) * PACKED
    n = first_head // GROUP
    token, head, present, chosen, weight = rows_of_tile(
        weights_ptr, entries_ptr, b, first_head, tile, T, H, ROWS, QUERIES, HEADS, PACKED, LISTED
    )
    columns_k, columns_v = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V)
    in_k, in_v = (columns_k < K)[None, :], (columns_v < V)[None, :]
    k_ptr += b * stride_kb + n * stride_kh
    v_ptr += b * stride_vb + n * stride_vh
    seen_ptr += b * stride_sb
    q_ptr += b * stride_qb + first_head * stride_qh
    q_at = (
        q_ptr + (token.to(tl.int64) * stride_qt + head.to(tl.int64) * stride_qh)[:, None] + columns_k[None, :]
    )
    q = tl.load(q_at, mask=chosen[:, None] & in_k, other=0.0)  # [ROWS, ROWS_K]

    factor = scale * LOG2_E
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, ROWS_V], tl.float32)
    place, begin, low, count, whole = keys_of_tile(begins_ptr, token, chosen, S - T, KEYS, SEEN, VARLEN)
    from_tile, to_tile = 0, count
    if SPLIT:
        share = tl.cdiv(count, splits)
        from_tile = split * share
        to_tile = tl.minimum(from_tile + share, count)
    i = tl.arange(0, KEYS)
    end = to_tile
    if APART:
        end = tl.minimum(to_tile, whole)
    for index in range(from_tile, end):
        first = low + index * KEYS
        inside = first + i < S
        k = load_tile(k_ptr, k_tiles, b, n, first, 0, stride_kt, inside, columns_k, in_k, KEYS, ROWS_K, TILES)
        v = load_tile(v_ptr, v_tiles, b, n, first, 0, stride_vt, inside, columns_v, in_v, KEYS, ROWS_V, TILES)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [ROWS, KEYS]
        is_whole = index < whole
        if APART:
            is_whole = True
        if not is_whole:
            s = hide_keys(s, seen_ptr, place, begin, first + i, S, SEEN, VARLEN)
        most, total, sums = fold(s, v, most, total, sums, factor, PRECISION)
    if APART:
        for index in tl.range(tl.maximum(from_tile, whole), to_tile, num_stages=1):
            first = low + index * KEYS
            inside = first + i < S
            k = load_tile(
                k_ptr, k_tiles, b, n, first, 0, stride_kt, inside, columns_k, in_k, KEYS, ROWS_K, TILES
            )  # fmt: skip
            v = load_tile(
                v_ptr, v_tiles, b, n, first, 0, stride_vt, inside, columns_v, in_v, KEYS, ROWS_V, TILES
            )  # fmt: skip
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            s = hide_keys(s, seen_ptr, place, begin, first + i, S, SEEN, VARLEN)
            most, total, sums = fold(s, v, most, total, sums, factor, PRECISION)

    if SPLIT:
        programs = tl.num_programs(0).to(tl.int64)
        room = (split * programs + program) * ROWS + tl.arange(0, ROWS)
        tl.store(most_ptr + room, most)
        tl.store(most_ptr + splits * programs * ROWS + room, total)
        # Of heads that are not chosen nothing is merged; of NaN all.
        tl.store(
            sums_ptr + (room * V)[:, None] + columns_v[None, :], sums, mask=(total != 0.0)[:, None] & in_v
        )
    else:
        at_lse = (b * H + first_head + head) * T + token
        out_at = out_ptr + b * stride_ob + (first_head + head) * stride_oh + token.to(tl.int64) * stride_ot
        store_tile(out_at, lse_ptr + at_lse, sums, most, total, weight, present, columns_v, in_v)


@triton.jit
def store_tile(out_at, lse_at, sums, most, total, weight, present, columns, in_v):
    """Output and log-sum-exp of a tile."""
    some = total > 0.0
    out = sums * (weight / tl.where(some, total, 1.0))[:, None]
    lse = tl.where(some, most + tl.log2(tl.where(some, total, 1.0)), float("inf"))
    tl.store(lse_at, lse, mask=present)
    at = out_at[:, None] + columns[None, :]
    tl.store(at, out.to(out_at.dtype.element_ty), mask=present[:, None] & in_v)


@triton.jit(do_not_specialize=LENGTHS)
def _head_sparse_attention_fwd_merge_kernel(
    sums_ptr, most_ptr, weights_ptr, entries_ptr, out_ptr, lse_ptr,
    stride_ob, stride_oh, stride_ot,
    T, tiles, splits, H,
    V: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr,
    QUERIES: tl.constexpr, HEADS: tl.constexpr, PACKED: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """What the parts of one tile's keys come to together; shapes as those of the kernel that made them."""
    program = tl.program_id(0)
    unit = (program // tiles).to(tl.int64)
    tile = tiles - 1 - program % tiles
    b, first_head = unit // (H // PACKED), unit % (H // PACKED) * PACKED
    token, head, present, _, weight = rows_of_tile(
        weights_ptr, entries_ptr, b, first_head, tile, T, H, ROWS, QUERIES, HEADS, PACKED, LISTED
    )
    columns = tl.arange(0, ROWS_V)
    in_v = (columns < V)[None, :]
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, ROWS_V], tl.float32)
    programs = tl.num_programs(0).to(tl.int64)
    for split in range(0, splits):
        room = (split * programs + program) * ROWS + tl.arange(0, ROWS)
        its_most = tl.load(most_ptr + room)
        its_total = tl.load(most_ptr + splits * programs * ROWS + room)
        here = (its_total != 0.0)[:, None] & in_v
        its_sums = tl.load(sums_ptr + (room * V)[:, None] + columns[None, :], mask=here, other=0.0)
        higher = tl.maximum(most, its_most)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        faded, its_faded = tl.exp2(most - base), tl.exp2(its_most - base)
        total = total * faded + its_total * its_faded
        sums = sums * faded[:, None] + its_sums * its_faded[:, None]
        most = higher
    at_lse = (b * H + first_head + head) * T + token
    out_at = out_ptr + b * stride_ob + (first_head + head) * stride_oh + token.to(tl.int64) * stride_ot
    store_tile(out_at, lse_ptr + at_lse, sums, most, total, weight, present, columns, in_v)
