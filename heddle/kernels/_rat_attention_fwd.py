# mypy: ignore-errors
"""The forward kernels of rat_attention: one walks over the summaries before a tile of queries, one merges what was split.

A program holds a tile of neighbouring queries of one head. The key that a query has for itself comes first, so that there is a
weight from the beginning: m = c s, l = 1, a = x~. Then it walks over the tiles of summaries that its last query sees; for each,

    m' = max(m, c max_j s_j),   l' = 2^(m - m') l + Σ_j 2^(c s_j - m'),   a' = 2^(m - m') a + Σ_j 2^(c s_j - m') v_j

with s_j = q · k_j and c = scale log2(e) > 0; then o = a / l, and m + log2(l) is kept for the gradients. Query t sees as many
summaries as there are whole chunks before it, so only the last tiles are compared. The longest rows are begun first.

Where tiles are too few to fill the device, as in a decode step, summaries are split between programs; each leaves (m, l, a), and
the merge is exact up to rounding.

FLOP: 4 D for a query and summary, so 2 H D T² / chunk in all. Bytes: 4 D elements a token and head, and the summaries from the
L2 cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels.common.jit import LOG2_E, find_sequence

# A new length must not mean a new compilation.
LENGTHS = ("T", "S", "tiles", "splits", "chunk", "start")


@triton.jit
def load_rows(
    x_ptr, x_tiles, b, head, row, stride, inside, columns, in_d,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """ROWS rows of one head from one on; with TILES by a descriptor, which does not look at `inside`, and gives zeros behind
    the last row of all."""
    if TILES:
        return x_tiles.load([b.to(tl.int32), head.to(tl.int32), row.to(tl.int32), 0]).reshape([ROWS, COLUMNS])
    at = x_ptr + row.to(tl.int64) * stride + (tl.arange(0, ROWS) * stride)[:, None] + columns[None, :]
    return tl.load(at, mask=inside[:, None] & in_d, other=0.0)


@triton.jit
def place_of(pid, table_ptr, cu_seqlens_ptr, T, tiles, chunk, VARLEN: tl.constexpr):
    """Row of the batch, tile, first token of the sequence, its length, and the row of its first summary."""
    b, tile, begin, length = find_sequence(pid, table_ptr, cu_seqlens_ptr, T, tiles, VARLEN)
    if VARLEN:
        # Of room that no sequence needs there is nothing to do.
        length = tl.where(b < 0, 0, length)
        b = tl.zeros((), tl.int32)
    return b.to(tl.int64), tile, begin, length, (begin + chunk - 1) // chunk


@triton.jit(do_not_specialize=LENGTHS)
def _rat_attention_fwd_kernel(
    q_ptr, key_ptr, value_ptr, keys_ptr, values_ptr, keys_tiles, values_tiles, out_ptr, lse_ptr, sums_ptr, most_ptr,
    table_ptr, cu_seqlens_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_sb, stride_sh, stride_sc,
    stride_wb, stride_wh, stride_wc,
    stride_ob, stride_oh, stride_ot,
    T, tiles, splits, chunk, start, scale,
    G: tl.constexpr, D: tl.constexpr, ROWS_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    VARLEN: tl.constexpr, SPLIT: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head, and with SPLIT one part of its summaries.

    Shapes:  keys, values (strides s, w): [B, H, S, D];  lse: [B, H, T], base 2
             sums: [splits, programs, ROWS, D], most: [2, splits, programs, ROWS]: what is merged
    """
    h = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    b, tile, begin, length, base = place_of(pid, table_ptr, cu_seqlens_ptr, T, tiles, chunk, VARLEN)
    t = tile * ROWS + tl.arange(0, ROWS)
    columns, present = tl.arange(0, ROWS_D), t < length
    in_d = (columns < D)[None, :]
    here, token = present[:, None] & in_d, (begin + t).to(tl.int64)
    q_at = q_ptr + b * stride_qb + h % G * stride_qh + (token * stride_qt)[:, None] + columns[None, :]
    key_at = key_ptr + b * stride_kb + h * stride_kh + (token * stride_kt)[:, None] + columns[None, :]
    value_at = value_ptr + b * stride_vb + h * stride_vh + (token * stride_vt)[:, None] + columns[None, :]
    keys_ptr += b * stride_sb + h * stride_sh
    values_ptr += b * stride_wb + h * stride_wh
    q = tl.load(q_at, mask=here, other=0.0)  # [ROWS, ROWS_D]

    factor = scale * LOG2_E
    limit = (start + t) // chunk
    first_limit = (start + tile * ROWS) // chunk
    last_limit = (start + tl.minimum(tile * ROWS + ROWS, length) - 1) // chunk
    from_tile, to_tile = 0, tl.cdiv(last_limit, KEYS)
    if SPLIT:
        share = tl.cdiv(to_tile, splits)
        from_tile = split * share
        to_tile = tl.minimum(from_tile + share, to_tile)
    key = tl.load(key_at, mask=here, other=0.0)
    most = tl.sum(q.to(tl.float32) * key.to(tl.float32), axis=1) * factor
    total = tl.full([ROWS], 1.0, tl.float32)
    sums = tl.load(value_at, mask=here, other=0.0).to(tl.float32)  # [ROWS, ROWS_D]
    if SPLIT:
        # The first part has the own keys.
        most = tl.where(split == 0, most, float("-inf"))
        total = tl.where(split == 0, total, 0.0)
        sums = tl.where(split == 0, sums, 0.0)
    i = tl.arange(0, KEYS)
    for index in range(from_tile, to_tile):
        first = index * KEYS
        inside = first + i < last_limit
        k = load_rows(
            keys_ptr, keys_tiles, b, h, base + first, stride_sc, inside, columns, in_d, KEYS, ROWS_D, TILES
        )
        v = load_rows(
            values_ptr,
            values_tiles,
            b,
            h,
            base + first,
            stride_wc,
            inside,
            columns,
            in_d,
            KEYS,
            ROWS_D,
            TILES,
        )
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [ROWS, KEYS]
        if first + KEYS > first_limit:
            s = tl.where((first + i)[None, :] < limit[:, None], s, float("-inf"))
        # Of logits times the factor: a fused product less itself rounded is not 0, and each tile would fade the sums.
        higher = tl.maximum(most, tl.max(s, axis=1) * factor)
        shift = higher
        if SPLIT:
            shift = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s * factor - shift[:, None])
        faded = tl.exp2(most - shift)
        total = total * faded + tl.sum(p, axis=1)
        sums = tl.dot(p.to(v.dtype), v, sums * faded[:, None], input_precision=PRECISION)
        most = higher

    if SPLIT:
        programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
        room = (split * programs + h * tl.num_programs(0) + pid) * ROWS + tl.arange(0, ROWS)
        tl.store(most_ptr + room, most)
        tl.store(most_ptr + splits * programs * ROWS + room, total)
        tl.store(sums_ptr + (room * D)[:, None] + columns[None, :], sums, mask=in_d)
    else:
        lse_at = lse_ptr + (b * tl.num_programs(1) + h) * T + token
        out_at = out_ptr + b * stride_ob + h * stride_oh + (token * stride_ot)[:, None] + columns[None, :]
        tl.store(lse_at, most + tl.log2(total), mask=present)
        tl.store(out_at, (sums / total[:, None]).to(out_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=LENGTHS)
def _rat_attention_fwd_merge_kernel(
    sums_ptr, most_ptr, out_ptr, lse_ptr, table_ptr, cu_seqlens_ptr,
    stride_ob, stride_oh, stride_ot,
    T, tiles, splits, chunk,
    D: tl.constexpr, ROWS_D: tl.constexpr, ROWS: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """What the parts of one tile's summaries come to together; shapes as those of the kernel that made them."""
    h, pid = tl.program_id(1).to(tl.int64), tl.program_id(0)
    b, tile, begin, length, _ = place_of(pid, table_ptr, cu_seqlens_ptr, T, tiles, chunk, VARLEN)
    t = tile * ROWS + tl.arange(0, ROWS)
    columns, present = tl.arange(0, ROWS_D), t < length
    in_d, token = (columns < D)[None, :], (begin + t).to(tl.int64)
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, ROWS_D], tl.float32)
    programs = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    # The first part has seen the own key, so there is a weight from the beginning.
    for split in range(0, splits):
        room = (split * programs + h * tl.num_programs(0) + pid) * ROWS + tl.arange(0, ROWS)
        its_most = tl.load(most_ptr + room)
        its_total = tl.load(most_ptr + splits * programs * ROWS + room)
        its_sums = tl.load(sums_ptr + (room * D)[:, None] + columns[None, :], mask=in_d, other=0.0)
        higher = tl.maximum(most, its_most)
        faded, its_faded = tl.exp2(most - higher), tl.exp2(its_most - higher)
        total = total * faded + its_total * its_faded
        sums = sums * faded[:, None] + its_sums * its_faded[:, None]
        most = higher
    lse_at = lse_ptr + (b * tl.num_programs(1) + h) * T + token
    out_at = out_ptr + b * stride_ob + h * stride_oh + (token * stride_ot)[:, None] + columns[None, :]
    tl.store(lse_at, most + tl.log2(total), mask=present)
    tl.store(out_at, (sums / total[:, None]).to(out_ptr.dtype.element_ty), mask=present[:, None] & in_d)
