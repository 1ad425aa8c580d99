# mypy: ignore-errors
"""The forward kernel of ttt with a linear memory: one sweep over the tokens of a sequence.

Every column of the weights is on its own, in reads, gradients and norms alike. So a program has some columns of one head's
memory, and keeps them, their momentum and the open chunk's gradient in registers from the first token to the last:

    out = q + q W,   e = -v, or k + k W - v,   G += kᵀ (rate e);   at a chunk's end   M = G + theta M,   W = W - M

A block of tokens never reaches over the end of a chunk, so one loop goes over all blocks, whatever a chunk's length is.

Bytes for a token and head of D = 128 in bfloat16: q, k, v, rate, gate and the output (1032); the other programs of a head find q
and k in the L2 cache. Products: 4 D², with the loss "l2" 6 D².
"""

from __future__ import annotations

import triton
import triton.language as tl

# Of a norm by which a column of weights is divided; as in `_ttt_torch`.
EPS = tl.constexpr(1e-5)
# Ways to normalise, as the kernels are told them.
AFTER, BEFORE = tl.constexpr(1), tl.constexpr(2)
# Numbers that a chunk's line in the table of chunks has.
LINE = tl.constexpr(3)

# A new length must not mean a new compilation, nor must a given state.
LENGTHS = (
    "T", "H", "chunk", "slots", "blocks", "sequences", "has_initial", "has_d_final", "stride_d_rates",
)  # fmt: skip


@triton.jit
def find_tokens(n, cu_seqlens_ptr, T, VARLEN: tl.constexpr):
    """Row of a sequence, its first token in that row, its length, and how many tokens stand before it in all."""
    if VARLEN:
        begin = tl.load(cu_seqlens_ptr + n).to(tl.int64)
        end = tl.load(cu_seqlens_ptr + n + 1).to(tl.int64)
        return tl.zeros((), tl.int64), begin, (end - begin).to(tl.int32), begin
    return n.to(tl.int64), tl.zeros((), tl.int64), T, n.to(tl.int64) * T


@triton.jit
def first_slot(n, behind, chunk):
    """The place of a sequence's first chunk among all: a sequence of L tokens has at most L // chunk + 2 of them."""
    return behind // chunk + 2 * n


@triton.jit
def tokens_read(initial_ptr, n, H, has_initial, chunk, F: tl.constexpr):
    """Tokens of the open chunk that were read in earlier calls; the first head tells for all."""
    share = tl.load(initial_ptr + n.to(tl.int64) * H * F + F - 1, mask=has_initial != 0, other=0.0)
    return tl.floor(share * chunk + 0.5).to(tl.int32)


@triton.jit
def count_blocks(before, length, chunk, C: tl.constexpr):
    """Blocks of at most C tokens of which none reaches over the end of a chunk."""
    open_tokens = tl.minimum(chunk - before, length)
    rest = length - open_tokens
    return (open_tokens + C - 1) // C + rest // chunk * ((chunk + C - 1) // C) + (rest % chunk + C - 1) // C


@triton.jit
def column_norms(x):
    return tl.sqrt(tl.sum(x * x, axis=0))


@triton.jit(do_not_specialize=LENGTHS)
def _ttt_sweep_kernel(
    q_ptr, k_ptr, v_ptr, rates_ptr, gates_ptr, weight_ptr, initial_ptr, out_ptr, final_ptr, states_ptr, errors_ptr, means_ptr,
    lines_ptr, cu_seqlens_ptr,
    stride_qn, stride_qt, stride_qh,
    stride_kn, stride_kt, stride_kh,
    stride_vn, stride_vt, stride_vh,
    stride_on, stride_ot, stride_oh,
    T, H, chunk, slots, sequences, has_initial,
    D: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MOMENTUM: tl.constexpr, L2: tl.constexpr,
    NORMALISE: tl.constexpr, VARLEN: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Outputs and the final state of one sequence, some columns of a head; with KEEP what the backward pass wants.

    Shapes:  out, errors: [B, T, H, *];  initial, final: [N, H, F];  means: [slots, H], the gate of each full chunk
             states: [slots, H, 2, D, D], the weights before each chunk, and what was taken from them at its end
             lines: [slots, 3], row, first token and tokens of each chunk
    """
    SIZE: tl.constexpr = D * D
    F: tl.constexpr = (3 if MOMENTUM else 2) * SIZE + 2
    TILES: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) % TILES
    head = ((tl.program_id(0) // TILES) % H).to(tl.int64)
    n = tl.program_id(0) // (TILES * H)
    row, begin, length, behind = find_tokens(n, cu_seqlens_ptr, T, VARLEN)
    before = tokens_read(initial_ptr, n, H, has_initial, chunk, F)
    slot = first_slot(n, behind, chunk)

    i = tl.arange(0, C)
    rows = tl.arange(0, ROWS)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    in_rows, in_columns = rows < D, columns < D
    inside = in_rows[:, None] & in_columns[None, :]
    square = rows[:, None] * D + columns[None, :]
    q_ptr += row * stride_qn + begin * stride_qt + head * stride_qh
    k_ptr += row * stride_kn + begin * stride_kt + head * stride_kh
    v_ptr += row * stride_vn + begin * stride_vt + head * stride_vh
    out_ptr += row * stride_on + begin * stride_ot + head * stride_oh
    errors_ptr += row * stride_on + begin * stride_ot + head * stride_oh
    rates_ptr += behind * H + head
    gates_ptr += behind * H + head
    own = (n.to(tl.int64) * H + head) * F
    initial_ptr += own
    final_ptr += own
    given = inside & (has_initial != 0)
    first = tl.load(weight_ptr + head * SIZE + square, mask=inside, other=0.0)  # [ROWS, COLUMNS]
    had = column_norms(first)
    weights = first + tl.load(initial_ptr + square, mask=given, other=0.0)
    # Without momentum no more than a name.
    moving = tl.load(initial_ptr + SIZE + square, mask=given & MOMENTUM, other=0.0)
    gradient = tl.load(initial_ptr + (F - 2 - SIZE) + square, mask=given, other=0.0)
    mean = tl.load(initial_ptr + F - 2, mask=has_initial != 0, other=0.0)

    t = tl.zeros((), tl.int32)
    for _ in range(count_blocks(before, length, chunk, C)):
        place = (t + before) % chunk
        stop = tl.minimum(t - place + chunk, length)
        at = (slot + (t + before) // chunk) * H + head
        if KEEP & ((t == 0) | (place == 0)):
            tl.store(states_ptr + at * (2 * SIZE) + square, weights, mask=inside)
            if (tile == 0) & (head == 0):
                line = lines_ptr + (slot + (t + before) // chunk) * LINE
                tl.store(line, row.to(tl.int32))
                tl.store(line + 1, (begin + t).to(tl.int32))
                tl.store(line + 2, stop - t)
        present = t + i < stop
        wide = present[:, None] & in_rows[None, :]
        kept = present[:, None] & in_columns[None, :]
        since = t.to(tl.int64)
        k_at = k_ptr + since * stride_kt + (i * stride_kt)[:, None]
        k = tl.load(k_at + rows[None, :], mask=wide, other=0.0)  # [C, ROWS]
        v_at = v_ptr + since * stride_vt + (i * stride_vt)[:, None]
        error = -tl.load(v_at + columns[None, :], mask=kept, other=0.0).to(tl.float32)  # [C, COLUMNS]
        rate = tl.load(rates_ptr + since * H + i * H, mask=present, other=0.0)
        half = weights.to(k.dtype)
        out_offsets = since * stride_ot + (i * stride_ot)[:, None] + columns[None, :]
        if L2:
            error += tl.load(k_at + columns[None, :], mask=kept, other=0.0)
            error = tl.dot(k, half, error, input_precision=PRECISION)
            if KEEP:
                tl.store(errors_ptr + out_offsets, error.to(k.dtype), mask=kept)
        pull = (error * rate[:, None]).to(k.dtype)
        gradient = tl.dot(tl.trans(k), pull, gradient, input_precision=PRECISION)
        if not KEEP:
            q_at = q_ptr + since * stride_qt + (i * stride_qt)[:, None]
            q = tl.load(q_at + rows[None, :], mask=wide, other=0.0)  # [C, ROWS]
            out = tl.load(q_at + columns[None, :], mask=kept, other=0.0).to(tl.float32)
            out = tl.dot(q, half, out, input_precision=PRECISION)
            tl.store(out_ptr + out_offsets, out.to(out_ptr.dtype.element_ty), mask=kept)
        if MOMENTUM:
            gate = tl.load(gates_ptr + since * H + i * H, mask=present, other=0.0)
            mean += tl.sum(gate) / chunk
        t = tl.minimum(t + C, stop)
        if (t + before) % chunk == 0:
            if MOMENTUM:
                gradient += mean * moving
                moving = gradient
            if KEEP:
                tl.store(states_ptr + at * (2 * SIZE) + SIZE + square, gradient, mask=inside)
                if tile == 0:
                    tl.store(means_ptr + at, mean)
            if NORMALISE == BEFORE:
                weights *= (had / (column_norms(weights) + EPS))[None, :]
            weights -= gradient
            if NORMALISE == AFTER:
                weights *= (had / (column_norms(weights) + EPS))[None, :]
            gradient = tl.zeros_like(gradient)
            mean = 0.0

    if KEEP & (tile == 0) & (head == 0):
        # Places that no chunk has.
        used = slot + tl.where(length > 0, (before + length + chunk - 1) // chunk, 0)
        past = tl.where(n == sequences - 1, slots, first_slot(n + 1, behind + length, chunk))
        for spare in range(used.to(tl.int32), past.to(tl.int32)):
            tl.store(lines_ptr + spare * LINE + 2, 0)
    # What was not written to is given back as it came.
    learned = tl.load(initial_ptr + square, mask=given, other=0.0)
    first = tl.load(weight_ptr + head * SIZE + square, mask=inside, other=0.0)
    learned = tl.where(before + length >= chunk, weights - first, learned)
    tl.store(final_ptr + square, learned, mask=inside)
    if MOMENTUM:
        tl.store(final_ptr + SIZE + square, moving, mask=inside)
    tl.store(final_ptr + (F - 2 - SIZE) + square, gradient, mask=inside)
    if tile == 0:
        tl.store(final_ptr + F - 2, mean)
        tl.store(final_ptr + F - 1, ((before + length) % chunk).to(tl.float32) / chunk)
