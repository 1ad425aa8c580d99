# mypy: ignore-errors
"""The kernels that turn weights of heads into lists of the queries that chose a head.

The list of a head has a place for each of T queries: those with a weight from the first place on, in their order, t as t; the
others from the last place on, t as -1 - t. So a tile of neighbouring places has queries whose keys end close together, a tile
behind them tells which outputs are 0, and nobody has to know how many there are. One kernel counts in pieces of the time
axis, the other adds up the pieces before its own: nothing waits for the host, and a list is the same to the bit every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A new length must not mean a new compilation.
LENGTHS = ("T", "pieces")


@triton.jit
def _load_piece(weights_ptr, b, piece, T, H, TOKENS: tl.constexpr, HEADS: tl.constexpr):
    """Tokens, heads, which of them are there, and 1 for a head that a token chose."""
    t = piece * TOKENS + tl.arange(0, TOKENS)
    h = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = (t < T)[:, None] & (h < H)[None, :]
    weight = tl.load(weights_ptr + ((b * T + t) * H)[:, None] + h[None, :], mask=inside, other=0.0)
    return t, h, inside, (weight != 0.0).to(tl.int32)


@triton.jit(do_not_specialize=LENGTHS)
def _head_sparse_attention_count_kernel(
    weights_ptr, counts_ptr, T, pieces, H, TOKENS: tl.constexpr, HEADS: tl.constexpr
):
    """How many of a piece's tokens chose each head.

    Shapes:  weights: [B, T, H] float32;  counts: [B, pieces, H] int32
    """
    b, piece = (tl.program_id(0) // pieces).to(tl.int64), tl.program_id(0) % pieces
    _, h, _, chosen = _load_piece(weights_ptr, b, piece, T, H, TOKENS, HEADS)
    tl.store(counts_ptr + (b * pieces + piece) * H + h, tl.sum(chosen, axis=0), mask=h < H)


@triton.jit(do_not_specialize=LENGTHS)
def _head_sparse_attention_fill_kernel(
    weights_ptr, counts_ptr, entries_ptr, before_ptr, T, pieces, H,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """The places of a piece's tokens in the lists; PIECES counts are read at a time.

    Shapes:  entries: [B, H, T] int32;  before: [B, H, T + 1] int32, how many tokens before one chose the head
    """
    b, piece = (tl.program_id(0) // pieces).to(tl.int64), tl.program_id(0) % pieces
    t, h, inside, chosen = _load_piece(weights_ptr, b, piece, T, H, TOKENS, HEADS)
    earlier = tl.zeros([HEADS], tl.int32)
    for first in range(0, piece, PIECES):
        one = first + tl.arange(0, PIECES)
        at = counts_ptr + ((b * pieces + one) * H)[:, None] + h[None, :]
        earlier += tl.sum(tl.load(at, mask=(one < piece)[:, None] & (h < H)[None, :], other=0), axis=0)
    before = earlier[None, :] + tl.cumsum(chosen, axis=0) - chosen
    is_chosen = chosen > 0
    place = tl.where(is_chosen, before, T - 1 - t[:, None] + before)
    row = b * H + h
    tl.store(
        entries_ptr + (row * T)[None, :] + place,
        tl.where(is_chosen, t[:, None], -1 - t[:, None]),
        mask=inside,
    )
    before_at = before_ptr + (row * (T + 1))[None, :]
    tl.store(before_at + t[:, None], before, mask=inside)
    if piece == pieces - 1:
        tl.store(before_ptr + row * (T + 1) + T, earlier + tl.sum(chosen, axis=0), mask=h < H)
