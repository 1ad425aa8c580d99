"""Documents packed into one row: where each of them lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from heddle.errors import HeddleError


@dataclass(frozen=True, slots=True)
class Packing:
    """Documents one behind the other in the only row of a batch. Those without a token are left out.

    `bounds` are the first token of each and the first behind it; `memos` what their layers share, as that of a `Call`.

    Shapes:  cu_seqlens: [N + 1] int32, on the device of the tokens
    """

    cu_seqlens: Tensor
    bounds: tuple[tuple[int, int], ...]
    memos: tuple[dict[Any, Any], ...]

    @classmethod
    def of(cls, cu_seqlens: Tensor, rows: int, length: int, device: torch.device) -> Packing:
        """The packing that `cu_seqlens` [N + 1] says. The host reads it, so one on a GPU is waited for.

        Raises:
            HeddleError: "bad-argument" unless there is one row, and the numbers rise from 0 to its length.
        """
        if rows != 1:
            what = f"packed documents lie in one row, and there are {rows}"
            raise HeddleError("bad-argument", what, hint="input_ids [1, tokens of all documents]")
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            what = f"cu_seqlens is {tuple(cu_seqlens.shape)} of {cu_seqlens.dtype}"
            raise HeddleError("bad-argument", f"{what}, but must be [documents + 1] of int32 or int64")
        places: list[int] = cu_seqlens.tolist()
        if (
            len(places) < 2
            or places[0] != 0
            or places[-1] != length
            or any(a > b for a, b in pairwise(places))
        ):
            shown = places if len(places) <= 8 else [*places[:4], "...", *places[-3:]]
            raise HeddleError("bad-argument", f"cu_seqlens must rise from 0 to {length}, got {shown}")
        bounds = tuple((begin, end) for begin, end in pairwise(places) if begin < end)
        ends = torch.tensor([0, *(end for _, end in bounds)], dtype=torch.int32)
        return cls(ends.to(device, non_blocking=True), bounds, tuple({} for _ in bounds))

    @property
    def lengths(self) -> list[int]:
        """The tokens of each document."""
        return [end - begin for begin, end in self.bounds]

    def places(self) -> Tensor:
        """How many tokens of its own document are before each.  Shapes:  out: [1, T] int64"""
        begins = torch.tensor([begin for begin, _ in self.bounds])
        places = torch.arange(self.bounds[-1][1]) - begins.repeat_interleave(torch.tensor(self.lengths))
        return places[None].to(self.cu_seqlens.device, non_blocking=True)

    def each(self, x: Tensor, dim: int) -> Sequence[Tensor]:
        """`x`, whose axis `dim` are the tokens, of each document."""
        # Of slices each gradient would be as long as the whole.
        parts: Sequence[Tensor] = x.split_with_sizes(self.lengths, dim)
        return parts
