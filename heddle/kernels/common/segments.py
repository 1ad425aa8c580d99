"""Sequences cut into segments, for kernels that treat segments side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """Sequences cut into pieces of `size` tokens, `count` in all; `table` and `offsets` say which for packed ones.

    Shapes:  table: [count, 2] int32, sequence (-1: none) and index in it;  offsets: [N + 1] int32
    """

    size: int
    count: int
    per_sequence: int
    table: Tensor | None = None
    offsets: Tensor | None = None

    @property
    def several(self) -> bool:
        return self.per_sequence > 1


def cut(length: int, sequences: int, programs: int, places: int, least: int) -> int:
    """Tokens in a segment: all of them if a launch of `programs` a sequence fills half of `places`, else fewer."""
    wanted = places // max(1, sequences * programs)
    pieces = min(wanted, length // least) if wanted >= 2 else 1
    return max(1, -(-length // max(1, pieces)))


def count_segments(length: int, sequences: int, size: int, *, packed: bool) -> int:
    """How many segments `lay_out` makes room for."""
    # Any split of `length` tokens into sequences has at most this many segments, so the host need not know it.
    return length // size + sequences if packed else sequences * -(-length // size)


def lay_out(length: int, sequences: int, size: int, cu_seqlens: Tensor | None) -> Segments:
    """The segments of sequences of `length` tokens, or of those packed into as many."""
    pieces = -(-length // size)
    bound = count_segments(length, sequences, size, packed=cu_seqlens is not None)
    if cu_seqlens is None:
        return Segments(size, bound, pieces)
    lengths = cu_seqlens.diff()
    counts = ((lengths + size - 1) // size).clamp_min(1)
    ends = counts.cumsum(0)
    segment = torch.arange(bound, device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, segment, right=True)
    known = sequence < sequences
    index = segment - (ends - counts)[sequence.clamp_max(sequences - 1)]
    table = torch.stack((torch.where(known, sequence, -1), index), dim=1).to(torch.int32)
    offsets = torch.cat((ends.new_zeros(1), ends)).to(torch.int32)
    return Segments(size, bound, pieces, table, offsets)
