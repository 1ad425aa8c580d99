# mypy: ignore-errors
"""The forward kernel of rat_scan: chunks side by side, the tokens of a chunk one after the other, states in registers.

A program has some chunks of one head and walks over their places. For each token it reads x, k and the gate once, in float32

    g = σ(gate + bias),   x~ = g x~ + (1 - g) x,   k~ = g k~ + (1 - g) k

and writes x~ and k~ as they stand, k~ turned by the number of its chunk. A channel turns together with a partner, R / 2 channels
away; its recurrence is computed beside the channel's own, from lines that are in the cache already, so that nothing moves between
threads. Where a chunk ends, both are written to the summaries as well. Programs behind the last head turn q.

Bytes: 3 elements of a channel and token in, 2 out, and what the G heads of q and k have. FLOP: some 20 a channel and token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels.common.jit import find_sequence

# A new length must not mean a new compilation.
LENGTHS = ("T", "S", "tiles", "chunk", "off", "from_place", "to_place")


@triton.jit
def tokens_of(tile, chunk, off, CHUNKS: tl.constexpr):
    """The chunks of a tile, and the token at their first place: negative before the call, or behind the sequence."""
    slot = tile * CHUNKS + tl.arange(0, CHUNKS)
    return slot, slot * chunk - off


@triton.jit
def rotation_of(cos_ptr, sin_ptr, slot, there, columns, TURNED: tl.constexpr):
    """Partner of each channel, and what turns: x_j cos_j + s_j x_partner sin_j with the sign s in `sin` already."""
    half: tl.constexpr = TURNED // 2
    inside = there[:, None] & (columns < TURNED)[None, :]
    partner = tl.where(columns < half, columns + half, tl.where(columns < TURNED, columns - half, columns))
    at = (slot * TURNED)[:, None] + columns[None, :]
    cos = tl.load(cos_ptr + at, mask=inside, other=1.0)
    sin = tl.load(sin_ptr + at, mask=inside, other=0.0)
    return partner, cos, tl.where((columns < half)[None, :], -sin, sin)


@triton.jit
def load_wide(x_ptr, token, stride, columns, mask):
    """Tokens of one head in float32, zeros where there is none.  Shapes:  token: [CHUNKS];  columns: [ROWS]"""
    at = x_ptr + (token * stride)[:, None] + columns[None, :]
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def gate_of(gate_ptr, token, stride, columns, bias, there, mask):
    """g = σ(gate + bias) and 1 - g, which a difference would round off near 0; 1 and 0 where there is no token."""
    raw = load_wide(gate_ptr, token, stride, columns, mask) + bias[None, :]
    small = tl.exp(-tl.abs(raw))
    larger = 1.0 / (1.0 + small)
    smaller = small * larger
    g = tl.where(raw >= 0.0, larger, smaller)
    rest = tl.where(raw >= 0.0, smaller, larger)
    return tl.where(there[:, None], g, 1.0), tl.where(there[:, None], rest, 0.0)


@triton.jit(do_not_specialize=LENGTHS)
def _rat_scan_fwd_kernel(
    q_ptr, k_ptr, x_ptr, gate_ptr, bias_ptr, cos_ptr, sin_ptr, past_ptr,
    turned_ptr, key_ptr, value_ptr, keys_ptr, values_ptr, running_ptr, inner_ptr, table_ptr, cu_seqlens_ptr,
    stride_qb, stride_qt, stride_qh,
    stride_kb, stride_kt, stride_kh,
    stride_xb, stride_xt, stride_xh,
    stride_gb, stride_gt, stride_gh,
    T, S, tiles, chunk, off, from_place, to_place,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, TURNED: tl.constexpr,
    CHUNKS: tl.constexpr, INNER: tl.constexpr, KEEP: tl.constexpr, HAS_PAST: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Some chunks of one head, or of one group of q.

    Shapes:  past, running: [N, 2, H, D], x~ first;  inner: [B, T / INNER, 2, H, D], states before every INNERth place of a chunk
             turned: [B, T, G, D];  key, value: [B, T, H, D];  keys, values: [B, H, S, D];  cos, sin: [chunks, TURNED]
    """
    h = tl.program_id(1).to(tl.int64)
    n, tile, begin, length = find_sequence(tl.program_id(0), table_ptr, cu_seqlens_ptr, T, tiles, VARLEN)
    b = n.to(tl.int64)
    if VARLEN:
        # Of room that no sequence needs there is nothing to do.
        length = tl.where(n < 0, 0, length)
        b = tl.zeros((), tl.int64)
    slot, first = tokens_of(tile, chunk, off, CHUNKS)
    columns = tl.arange(0, ROWS)
    in_d = (columns < D)[None, :]
    partner, cos, sin = rotation_of(cos_ptr, sin_ptr, slot, first < length, columns, TURNED)
    if h >= H:
        group = h - H
        q_ptr += b * stride_qb + begin * stride_qt + group * stride_qh
        for place in range(from_place, to_place):
            t = first + place
            mask = ((t >= 0) & (t < length))[:, None] & in_d
            token = t.to(tl.int64)
            turned = load_wide(q_ptr, token, stride_qt, columns, mask) * cos
            turned += load_wide(q_ptr, token, stride_qt, partner, mask) * sin
            at = (((b * T + begin + token) * G + group) * D)[:, None] + columns[None, :]
            tl.store(turned_ptr + at, turned.to(turned_ptr.dtype.element_ty), mask=mask)
    else:
        k_ptr += b * stride_kb + begin * stride_kt + h % G * stride_kh
        x_ptr += b * stride_xb + begin * stride_xt + h * stride_xh
        gate_ptr += b * stride_gb + begin * stride_gt + h * stride_gh
        bias = tl.load(bias_ptr + h * D + columns, mask=columns < D, other=0.0)
        value = tl.zeros([CHUNKS, ROWS], tl.float32)
        key = tl.zeros([CHUNKS, ROWS], tl.float32)
        other = tl.zeros([CHUNKS, ROWS], tl.float32)
        if TURNED > 0:
            partner_bias = tl.load(bias_ptr + h * D + partner, mask=columns < D, other=0.0)
        if HAS_PAST:
            goes_on = (slot == 0)[:, None] & in_d
            past_at = past_ptr + (b * 2 * H + h) * D
            value += tl.load(past_at + columns[None, :], mask=goes_on, other=0.0)
            key += tl.load(past_at + H * D + columns[None, :], mask=goes_on, other=0.0)
            other += tl.load(past_at + H * D + partner[None, :], mask=goes_on, other=0.0)
        for place in range(from_place, to_place):
            t = first + place
            there = (t >= 0) & (t < length)
            mask = there[:, None] & in_d
            token = t.to(tl.int64)
            if KEEP:
                kept = mask & ((place > 0) & (place % INNER == 0) & (t > 0))[:, None]
                rows = tl.cdiv(T, INNER).to(tl.int64)
                at = ((b * rows + (begin + token) // INNER) * 2 * H + h) * D
                tl.store(inner_ptr + at[:, None] + columns[None, :], value, mask=kept)
                tl.store(inner_ptr + (at + H * D)[:, None] + columns[None, :], key, mask=kept)
            g, rest = gate_of(gate_ptr, token, stride_gt, columns, bias, there, mask)
            value = g * value + rest * load_wide(x_ptr, token, stride_xt, columns, mask)
            key = g * key + rest * load_wide(k_ptr, token, stride_kt, columns, mask)
            turned = key
            if TURNED > 0:
                g, rest = gate_of(gate_ptr, token, stride_gt, partner, partner_bias, there, mask)
                other = g * other + rest * load_wide(k_ptr, token, stride_kt, partner, mask)
                turned = key * cos + other * sin
            at = (((b * T + begin + token) * H + h) * D)[:, None] + columns[None, :]
            tl.store(value_ptr + at, value.to(value_ptr.dtype.element_ty), mask=mask)
            tl.store(key_ptr + at, turned.to(key_ptr.dtype.element_ty), mask=mask)
            ends = mask & (place == chunk - 1)
            at = (((b * H + h) * S + (begin + token) // chunk) * D)[:, None] + columns[None, :]
            tl.store(values_ptr + at, value.to(value_ptr.dtype.element_ty), mask=ends)
            tl.store(keys_ptr + at, turned.to(key_ptr.dtype.element_ty), mask=ends)
            last = mask & (t == length - 1)[:, None]
            running_at = running_ptr + (n.to(tl.int64) * 2 * H + h) * D + tl.zeros([CHUNKS, ROWS], tl.int64)
            tl.store(running_at + columns[None, :], value, mask=last)
            tl.store(running_at + H * D + columns[None, :], key, mask=last)
