# mypy: ignore-errors
"""The forward kernel of landmark_attention, for many queries.

A program holds a tile of neighbouring queries of one head and walks over the blocks up to their places. With
s_j = scale log2(e) q · k_j over the keys of block b that a row sees,

    m_b = max_j s_j,   Z_b = Σ_j 2^(s_j - m_b),   g_b = scale log2(e) q · l_b, or in the own block m_b + log2(Z_b)
    m' = max(m, g_b),   L' = 2^(m - m') L + 2^(g_b - m'),   a' = 2^(m - m') a + Σ_j 2^(g_b - m') 2^(s_j - m_b) / Z_b v_j

so that the own block is one more block, whose landmark is what its keys come to together. Then o = a / L, and m + log2(L) is kept
for the gradients. A block that no landmark was chosen for has g_b = -inf.

A landmark is a tile of 16 rows of which 15 are zeros: its logits are a product of matrices like those of the keys.

Bytes of a tile of M queries: M (K + V) elements, and (2 K + V) for a key, mostly from the L2 cache. FLOP: 2 (K + V) for a
query and key, and 32 K for a query and block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels.common.jit import LOG2_E

# A new length must not mean a new compilation.
LENGTHS = ("T", "S", "C", "N", "tiles", "words", "splits", "top", "stride_sb")
# A key that no place reaches.
NOWHERE = tl.constexpr(1 << 30)
# Rows of a landmark's tile, the least that a product takes.
MARK = tl.constexpr(16)


@triton.jit
def load_landmark(marks_ptr, c, stride, columns, in_columns):
    """Landmark c, and rows of zeros below it.  Shapes:  out: [MARK, ROWS_K]"""
    row = tl.arange(0, MARK)[:, None]
    at = marks_ptr + (c + row * 0).to(tl.int64) * stride + columns[None, :]
    return tl.load(at, mask=(row == 0) & in_columns, other=0.0)


@triton.jit
def keys_of_block(seen_ptr, c, S, BLOCK: tl.constexpr, KEYS: tl.constexpr, SEEN: tl.constexpr):
    """Whether KEYS rows are keys of block c, their places (NOWHERE if not), and whether others than themselves see them."""
    i = tl.arange(0, KEYS)
    place = c * BLOCK + i
    inside = (i < BLOCK) & (place < S)
    seen = inside
    if SEEN:
        seen = tl.load(seen_ptr + place, mask=inside, other=0) != 0
    return inside, tl.where(inside, place, NOWHERE), seen


@triton.jit
def softmax_of_block(s, AXIS: tl.constexpr):
    """The weights of a block's keys yet to be divided, one over their sum, and the log-sum-exp of the logits, all to base 2.

    Where nothing is seen these are 0, 0 and -inf.
    """
    most = tl.max(s, axis=AXIS)
    base = tl.where(most == float("-inf"), 0.0, most)
    weight = tl.exp2(s - tl.expand_dims(base, AXIS))
    total = tl.sum(weight, axis=AXIS)
    some = total > 0.0
    total = tl.where(some, total, 1.0)
    return weight, tl.where(some, 1.0 / total, 0.0), tl.where(some, base + tl.log2(total), float("-inf"))


@triton.jit
def is_chosen(bits_ptr, row, c, words, mask):
    """Whether the landmark of block c was chosen by each row."""
    word = tl.load(bits_ptr + row * words + c // 32, mask=mask, other=0)
    return ((word >> (c % 32)) & 1) != 0


@triton.jit
def gate_of(mark, lse, is_own, kept):
    """The logit of a block: of its landmark, or of all its keys in the own block; -inf where nothing is seen or read."""
    return tl.where(is_own, lse, tl.where((lse == float("-inf")) | (kept == 0), float("-inf"), mark))


@triton.jit(do_not_specialize=LENGTHS)
def _landmark_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, marks_ptr, out_ptr, lse_ptr, start_ptr, bits_ptr, seen_ptr,
    stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    stride_mb, stride_mh, stride_mt,
    T, S, C, N, tiles, words, stride_sb, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, ROWS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    SELECT: tl.constexpr, SEEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head; the last tiles, which have most to do, begin first.

    Shapes:  out: [B, H, T, V];  lse: [B, H, T], base 2, inf where nothing is seen
             bits: [B, H, T, words] int32, a bit for each landmark that counts, with SELECT
    """
    tile = tiles - 1 - tl.program_id(1)
    unit = tl.program_id(0).to(tl.int64)
    h, b = unit % (N * GROUP), unit // (N * GROUP)
    n = h // GROUP
    start = tl.load(start_ptr + b)
    t = tile * ROWS + tl.arange(0, ROWS)
    present = t < T
    place = tl.where(present, start + t, -1)
    own = place // BLOCK
    at = unit * T + t
    columns_k, columns_v = tl.arange(0, ROWS_K), tl.arange(0, ROWS_V)
    in_k, in_v = (columns_k < K)[None, :], (columns_v < V)[None, :]
    q_ptr += b * stride_qb + h * stride_qh
    k_ptr += b * stride_kb + n * stride_kh
    v_ptr += b * stride_vb + n * stride_vh
    marks_ptr += b * stride_mb + n * stride_mh
    seen_ptr += b * stride_sb
    q_at = q_ptr + (t.to(tl.int64) * stride_qt)[:, None] + columns_k[None, :]
    q = tl.load(q_at, mask=present[:, None] & in_k, other=0.0)  # [ROWS, ROWS_K]

    factor = scale * LOG2_E
    most = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, ROWS_V], tl.float32)
    first_own = tl.maximum(start + tile * ROWS, 0) // BLOCK
    last_place = start + tl.minimum(tile * ROWS + ROWS, T) - 1
    count = tl.minimum(tl.where(last_place < 0, 0, last_place // BLOCK + 1), C)
    for c in range(0, count):
        kept = present
        is_needed = True
        if SELECT:
            kept = is_chosen(bits_ptr, at, c, words, present)
            is_needed = (tl.max(kept.to(tl.int32), axis=0) != 0) | (c >= first_own)
        if is_needed:
            inside, key, seen = keys_of_block(seen_ptr, c, S, BLOCK, KEYS, SEEN)
            token = (c * BLOCK + tl.arange(0, KEYS)).to(tl.int64)[:, None]
            k = tl.load(
                k_ptr + token * stride_kt + columns_k[None, :], mask=inside[:, None] & in_k, other=0.0
            )
            v = tl.load(
                v_ptr + token * stride_vt + columns_v[None, :], mask=inside[:, None] & in_v, other=0.0
            )
            mark = load_landmark(marks_ptr, c, stride_mt, columns_k, in_k)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor  # [ROWS, KEYS]
            mark = tl.sum(tl.dot(q, tl.trans(mark), input_precision=PRECISION), axis=1) * factor
            is_whole = c < first_own
            if SEEN or KEYS > BLOCK:
                is_whole = False
            if not is_whole:
                distance = place[:, None] - key[None, :]
                s = tl.where((distance >= 0) & (seen[None, :] | (distance == 0)), s, float("-inf"))
            weight, inverse, lse = softmax_of_block(s, 1)
            gate = gate_of(mark, lse, own == c, kept)
            higher = tl.maximum(most, gate)
            base = tl.where(higher == float("-inf"), 0.0, higher)
            faded, share = tl.exp2(most - base), tl.exp2(gate - base)
            total = total * faded + share
            p = weight * (share * inverse)[:, None]
            sums = tl.dot(p.to(v.dtype), v, sums * faded[:, None], input_precision=PRECISION)
            most = higher

    some = total > 0.0
    total = tl.where(some, total, 1.0)
    tl.store(lse_ptr + at, tl.where(some, most + tl.log2(total), float("inf")), mask=present)
    out_at = out_ptr + (at * V)[:, None] + columns_v[None, :]
    out = (sums / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_at, out, mask=present[:, None] & in_v)
