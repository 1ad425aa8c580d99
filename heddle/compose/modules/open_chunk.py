"""The tokens of a call in whole chunks, of which the first goes on with what earlier calls left open."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a call's tokens stand in chunks of `length`: slot s of row b holds the token at place `base`_b `length` + s.

    One token alone stands in a chunk of one slot, whatever its place. `offset`, if given, is the first slot of all rows, whose
    tokens are all real.

    Shapes:  first: [B] int64, the place of the call's first token, negative in padding;  real: [B, T] bool;  chunks: their number
    """

    length: int
    first: Tensor
    real: Tensor
    chunks: int
    offset: int | None = None

    @classmethod
    def of(cls, length: int, first: Tensor, real: Tensor, offset: int | None) -> Layout:
        """`offset`: tokens in the open chunk, where all rows have as many."""
        tokens = real.shape[1]
        most = length - 1 if offset is None else offset
        return cls(length, first, real, 1 if tokens == 1 else -(-(most + tokens) // length))

    @classmethod
    def regular(cls, length: int, first: Tensor, real: Tensor, offset: int) -> Layout:
        """Of rows that are real as a whole, with as many tokens in the open chunk."""
        return replace(cls.of(length, first, real, offset), offset=offset)

    @property
    def base(self) -> Tensor:
        """The chunk of each row's first token.  Shapes:  out: [B]"""
        return self.first.clamp(min=0) // self.length

    @property
    def end(self) -> int:
        """Tokens in the chunk that all rows leave open, where they have the same `offset`."""
        return ((self.offset or 0) + self.real.shape[1]) % self.length

    def spread(self, x: Tensor) -> Tensor:
        """Shapes:  x: [B, T, ...];  out: [B, chunks, slots, ...], 0 where there is no real token"""
        if x.shape[1] == 1:
            kept = x * _like(self.real, x)
            return kept[:, None]
        if self.offset is not None:
            behind = self.chunks * self.length - self.offset - x.shape[1]
            x = F.pad(x, (*[0, 0] * (x.dim() - 2), self.offset, behind)) if self.offset or behind else x
            return x.unflatten(1, (self.chunks, self.length))  # type: ignore[no-any-return, no-untyped-call]
        slots = torch.arange(self.chunks * self.length, device=x.device)
        token = slots + (self.base * self.length - self.first)[:, None]
        inside = (token >= 0) & (token < x.shape[1])
        token = token.clamp(min=0, max=x.shape[1] - 1)
        inside = inside & self.real.gather(1, token)
        index = token.view(*token.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
        found = x.gather(1, index) * _like(inside, x)
        return found.unflatten(1, (self.chunks, self.length))  # type: ignore[no-any-return, no-untyped-call]

    def gather(self, x: Tensor) -> Tensor:
        """Back to the order of the tokens.  Shapes:  x: [B, chunks, slots, ...];  out: [B, T, ...]"""
        x, tokens = x.flatten(1, 2), self.real.shape[1]
        if tokens == 1:
            return x
        if self.offset is not None:
            return x[:, self.offset : self.offset + tokens]
        slot = torch.arange(tokens, device=x.device) + (self.first - self.base * self.length)[:, None]
        slot = slot.clamp(min=0)
        return x.gather(1, slot.view(*slot.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))


def _like(marks: Tensor, x: Tensor) -> Tensor:
    """Shapes:  marks: [B, N];  out: [B, N, 1, ...] of the type of x"""
    return marks.view(*marks.shape, *[1] * (x.dim() - 2)).to(x.dtype)
