# mypy: ignore-errors
"""The kernel of the gradients of rat_scan.

With d_t the gradient of y_t, that of a summary or of the last state added, and y_{t-1} = 0 where a chunk begins,

    r_t = d_t + g_{t+1} r_{t+1},   da_t = (1 - g_t) r_t,   dg_t = r_t (y_{t-1} - a_t)

for (y, a) = (x~, x) and (k~, k), the two dg added. A program has some chunks of one head. It goes through them in parts of INNER
places, the last part first: forward again for what y_{t-1} - a_t was, which stays in registers, then back. The states before a
part were kept by the forward pass; a chunk of INNER tokens needs none. The key's gradient is turned back as it is read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from heddle.kernels._rat_scan_fwd import LENGTHS, gate_of, load_wide, rotation_of, tokens_of
from heddle.kernels.common.jit import find_sequence


@triton.jit(do_not_specialize=LENGTHS)
def _rat_scan_bwd_kernel(
    k_ptr, x_ptr, gate_ptr, bias_ptr, cos_ptr, sin_ptr, past_ptr, inner_ptr,
    d_turned_ptr, d_key_ptr, d_value_ptr, d_keys_ptr, d_values_ptr, d_running_ptr,
    dq_ptr, dk_ptr, dx_ptr, d_gate_ptr, d_bias_ptr, d_past_ptr, table_ptr, cu_seqlens_ptr,
    stride_kb, stride_kt, stride_kh,
    stride_xb, stride_xt, stride_xh,
    stride_gb, stride_gt, stride_gh,
    T, S, tiles, chunk, off, from_place, to_place,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, TURNED: tl.constexpr,
    CHUNKS: tl.constexpr, INNER: tl.constexpr, KEEP: tl.constexpr, HAS_PAST: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Some chunks of one head, or of one group of q; shapes as those of the forward kernel, gradients as what they are of.

    Shapes:  dk: [B, T, H, D], of each head for itself;  d_bias: [programs, H, D], what is to be added up
    """
    h = tl.program_id(1).to(tl.int64)
    n, tile, begin, length = find_sequence(tl.program_id(0), table_ptr, cu_seqlens_ptr, T, tiles, VARLEN)
    b = n.to(tl.int64)
    if VARLEN:
        length = tl.where(n < 0, 0, length)
        b = tl.zeros((), tl.int64)
    slot, first = tokens_of(tile, chunk, off, CHUNKS)
    columns = tl.arange(0, ROWS)
    in_d = (columns < D)[None, :]
    partner, cos, sin = rotation_of(cos_ptr, sin_ptr, slot, first < length, columns, TURNED)
    if h >= H:
        group = h - H
        of_group = (b * T + begin) * G * D + group * D
        for place in range(from_place, to_place):
            t = first + place
            mask = ((t >= 0) & (t < length))[:, None] & in_d
            token = t.to(tl.int64)
            back = load_wide(d_turned_ptr + of_group, token, G * D, columns, mask) * cos
            back -= load_wide(d_turned_ptr + of_group, token, G * D, partner, mask) * sin
            at = of_group + (token * G * D)[:, None] + columns[None, :]
            tl.store(dq_ptr + at, back.to(dq_ptr.dtype.element_ty), mask=mask)
    else:
        k_ptr += b * stride_kb + begin * stride_kt + h % G * stride_kh
        x_ptr += b * stride_xb + begin * stride_xt + h * stride_xh
        gate_ptr += b * stride_gb + begin * stride_gt + h * stride_gh
        bias = tl.load(bias_ptr + h * D + columns, mask=columns < D, other=0.0)
        of_head = (b * T + begin) * H * D + h * D
        of_sums = (b * H + h) * S * D
        running_at = d_running_ptr + (n.to(tl.int64) * 2 * H + h) * D + tl.zeros([CHUNKS, ROWS], tl.int64)
        past_at = past_ptr + (b * 2 * H + h) * D
        rows = tl.cdiv(T, INNER).to(tl.int64)
        d_bias = tl.zeros([CHUNKS, ROWS], tl.float32)
        r_value = tl.zeros([CHUNKS, ROWS], tl.float32)
        r_key = tl.zeros([CHUNKS, ROWS], tl.float32)
        from_part = from_place // INNER
        parts = tl.cdiv(to_place, INNER) - from_part
        for count in range(0, parts):
            begins = (from_part + parts - 1 - count) * INNER
            value = tl.zeros([CHUNKS, ROWS], tl.float32)
            key = tl.zeros([CHUNKS, ROWS], tl.float32)
            t = first + begins
            if KEEP:
                kept = ((begins > 0) & (t > 0) & (t < length))[:, None] & in_d
                at = ((b * rows + (begin + t.to(tl.int64)) // INNER) * 2 * H + h) * D
                value += tl.load(inner_ptr + at[:, None] + columns[None, :], mask=kept, other=0.0)
                key += tl.load(inner_ptr + (at + H * D)[:, None] + columns[None, :], mask=kept, other=0.0)
            if HAS_PAST:
                goes_on = ((slot == 0) & (t <= 0))[:, None] & in_d
                value += tl.load(past_at + columns[None, :], mask=goes_on, other=0.0)
                key += tl.load(past_at + H * D + columns[None, :], mask=goes_on, other=0.0)
            gates = ()
            rests = ()
            of_values = ()
            of_keys = ()
            for i in tl.static_range(INNER):
                t = first + begins + i
                there = (t >= 0) & (t < length) & (begins + i < chunk)
                mask = there[:, None] & in_d
                token = t.to(tl.int64)
                g, rest = gate_of(gate_ptr, token, stride_gt, columns, bias, there, mask)
                x_less = value - load_wide(x_ptr, token, stride_xt, columns, mask)
                k_less = key - load_wide(k_ptr, token, stride_kt, columns, mask)
                value -= rest * x_less
                key -= rest * k_less
                # The compiler knows no other way to lengthen a tuple.
                gates = gates + (g,)  # noqa: RUF005
                rests = rests + (rest,)  # noqa: RUF005
                of_values = of_values + (x_less,)  # noqa: RUF005
                of_keys = of_keys + (k_less,)  # noqa: RUF005
            for i in tl.static_range(INNER - 1, -1, -1):
                t = first + begins + i
                there = (t >= 0) & (t < length) & (begins + i < chunk)
                mask = there[:, None] & in_d
                token = t.to(tl.int64)
                d_key = load_wide(d_key_ptr + of_head, token, H * D, columns, mask)
                ends = mask & (begins + i == chunk - 1)
                at = (begin + token) // chunk
                d_key += load_wide(d_keys_ptr + of_sums, at, D, columns, ends)
                r_value += load_wide(d_values_ptr + of_sums, at, D, columns, ends)
                r_value += load_wide(d_value_ptr + of_head, token, H * D, columns, mask)
                if TURNED > 0:
                    of_partner = load_wide(d_key_ptr + of_head, token, H * D, partner, mask)
                    of_partner += load_wide(d_keys_ptr + of_sums, at, D, partner, ends)
                    d_key = d_key * cos - of_partner * sin
                r_key += d_key
                last = mask & (t == length - 1)[:, None]
                r_value += tl.load(running_at + columns[None, :], mask=last, other=0.0)
                r_key += tl.load(running_at + H * D + columns[None, :], mask=last, other=0.0)
                g = gates[i]
                at = of_head + (token * H * D)[:, None] + columns[None, :]
                dx = rests[i] * r_value
                dk = rests[i] * r_key
                d_gate = g * (dx * of_values[i] + dk * of_keys[i])
                tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
                tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=mask)
                tl.store(d_gate_ptr + at, d_gate.to(d_gate_ptr.dtype.element_ty), mask=mask)
                d_bias += d_gate
                r_value *= g
                r_key *= g
        at = (tl.program_id(0).to(tl.int64) * H + h) * D + columns
        tl.store(d_bias_ptr + at, tl.sum(d_bias, axis=0), mask=columns < D)
        if HAS_PAST:
            goes_on = (slot == 0)[:, None] & in_d
            d_past_at = d_past_ptr + (b * 2 * H + h) * D + tl.zeros([CHUNKS, ROWS], tl.int64)
            tl.store(d_past_at + columns[None, :], r_value, mask=goes_on)
            tl.store(d_past_at + H * D + columns[None, :], r_key, mask=goes_on)
