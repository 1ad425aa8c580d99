"""Which blocks of keys a tile of queries reads, as lists that kernels walk over, and the other way round.

A tile is a few neighbouring queries of one key head. It reads the blocks that any of them reads; a mark tells which, one bit for
each query. Neighbours mostly choose the same blocks, and then a block is loaded once for all of them. An entry of a list is
the block (or the tile) and its mark in one number, so what a list holds does not depend on which thread came first: lists are the
same to the bit every time, nothing is added by atomics, and the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Of a tile: a mark is one byte.
MOST_QUERIES = 8
MARK_BITS = 8


@dataclass(frozen=True, slots=True)
class Choice:
    """What queries read: `listed` blocks, those `chosen`, or those whose gate is 1 and the own one; two of them are None.

    Shapes:  listed: [B, N, T, L] integers, negative for none;  chosen: [B, N, T, C] bool;  gates: [B, N, C]
    """

    listed: Tensor | None
    chosen: Tensor | None
    gates: Tensor | None

    def longest(self, queries: int) -> int | None:
        """How many blocks a tile reads at most, where the shapes tell."""
        return None if self.listed is None else queries * self.listed.shape[-1]


@dataclass(frozen=True, slots=True)
class Lists:
    """Entries of all lists one behind the other; list i holds those from `offsets[i]` to `offsets[i + 1]`.

    Shapes:  entries: [*] int32, 256 times the block (or tile) plus the mark;  offsets: [lists + 1] int32
    """

    entries: Tensor
    offsets: Tensor


@dataclass(frozen=True, slots=True)
class Tiling:
    """`length` queries in tiles of `queries`; key places in `count` blocks of `block`; query t of a row is at start + t.

    Shapes:  start: [B] int64
    """

    start: Tensor
    heads: int
    length: int
    queries: int
    block: int
    count: int

    @property
    def tiles(self) -> int:
        return -(-self.length // self.queries)

    def own_blocks(self) -> Iterator[Tensor]:
        """The own block of the first query of each tile, of the second, …; some of the last tile may be none.

        Shapes:  each: [B, tiles]
        """
        first = self.start[:, None] + torch.arange(self.tiles, device=self.start.device) * self.queries
        for query in range(self.queries):
            yield (first + query) // self.block


def marks(choice: Choice, tiling: Tiling) -> Tensor:
    """Which queries of a tile read a block, bit i for its i-th one. Blocks behind all of them are left out.

    Shapes:  out: [B, N, tiles, C] uint8
    """
    block = torch.arange(tiling.count, device=tiling.start.device)
    shape = (len(tiling.start), tiling.heads, tiling.tiles, tiling.count)
    found = torch.zeros(shape, dtype=torch.uint8, device=block.device)
    last = torch.zeros(shape[0], tiling.tiles, dtype=torch.int64, device=block.device)
    for query, own in enumerate(tiling.own_blocks()):
        read = _read(choice, tiling, query, own)
        found[:, :, : read.shape[2]] |= read.to(torch.uint8) << query
        last = own
    return found.masked_fill_(block > last[:, None, :, None], 0)


def gate_marks(gates: Tensor, tiling: Tiling) -> Tensor:
    """Which blocks the queries of a tile read, however many they are: 1 for one with a gate, 2 for one that is some query's own.

    Shapes:  gates: [B, N, C];  out: [B, N, tiles, C] uint8
    """
    block = torch.arange(tiling.count, device=gates.device)
    tile = torch.arange(tiling.tiles, device=gates.device) * tiling.queries
    first = (tiling.start[:, None] + tile)[:, None, :, None]
    last = (first + tiling.queries - 1) // tiling.block
    own = (block >= first // tiling.block) & (block <= last)
    found = (gates[:, :, None] > 0.5).to(torch.uint8) | own.to(torch.uint8) << 1
    return found.masked_fill_(block > last, 0)


def _read(choice: Choice, tiling: Tiling, query: int, own: Tensor) -> Tensor:
    """What the queries at one place of their tiles read.  Shapes:  own: [B, tiles];  out: [B, N, at most tiles, C] of 0 and 1"""
    every = slice(query, None, tiling.queries)
    if choice.chosen is not None:
        return choice.chosen[:, :, every]
    if choice.listed is not None:
        part = choice.listed[:, :, every].to(torch.int64)
        # What is none goes behind the last block.
        part = torch.where(part < 0, tiling.count, part)
        table = part.new_zeros(*part.shape[:3], tiling.count + 1, dtype=torch.uint8)
        return table.scatter_(-1, part, 1)[..., : tiling.count]
    assert choice.gates is not None
    block = torch.arange(tiling.count, device=own.device)
    return (choice.gates[:, :, None] > 0.5) | (block == own[:, None, :, None])
