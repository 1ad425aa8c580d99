"""The tokens of each row as an image, and what lies in its regions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.compose.cache import Call


@dataclass(frozen=True, slots=True)
class Canvas:
    """Images of `width` tokens a row, as many rows as the longest row of tokens fills; the first real token is its corner.

    Shapes:  shift, count: [B, 1] int64, tokens before the first real one and real ones; None where all of `tokens` are real
    """

    width: int
    tokens: int
    shift: Tensor | None
    count: Tensor | None

    @classmethod
    def of(cls, call: Call, tokens: int, width: int) -> Canvas:
        """That of a call whose padding is on either side of each row."""
        if call.padding is None:
            return cls(width, tokens, None, None)
        real = call.padding.to(torch.int64)
        return cls(width, tokens, real.argmax(dim=-1, keepdim=True), real.sum(dim=-1, keepdim=True))

    @property
    def rows(self) -> int:
        return -(-self.tokens // self.width)

    def begun(self, x: Tensor) -> Tensor:
        """Tokens from the first real one on, zeros behind the last.  Shapes:  x, out: [B, T, ...]"""
        if self.shift is None or self.count is None:
            return x
        index = torch.arange(self.tokens, device=x.device)
        real = (index < self.count).view(*x.shape[:2], *[1] * (x.dim() - 2))
        return _moved(x, (index + self.shift) % self.tokens) * real.to(x.dtype)

    def laid(self, x: Tensor) -> Tensor:
        """Tokens as images, zeros where there is none.  Shapes:  x: [B, T, C];  out: [B, rows, width, C]"""
        x = F.pad(self.begun(x), (0, 0, 0, self.rows * self.width - self.tokens))
        return x.unflatten(1, (self.rows, self.width))  # type: ignore[no-any-return, no-untyped-call]

    def placed(self, x: Tensor) -> Tensor:
        """What `begun` moved, where it was; anything for a token that is not real.  Shapes:  x, out: [B, T, ...]"""
        if self.shift is None:
            return x
        return _moved(x, (torch.arange(self.tokens, device=x.device) - self.shift).clamp(min=0))

    def region_means(self, image: Tensor, weight: Tensor, regions: int) -> Tensor:
        """Means over regions x regions parts of each image, as adaptive average pooling cuts it; 0 where nothing counts.

        Shapes:  image: [B, rows, width, C];  weight: [B, rows, width, 1] of 0 and 1;  out: [B, regions ^ 2, C]
        """
        column = torch.arange(self.width, device=image.device)
        across = _inside(column, column.new_full((1, 1), self.width), regions).to(image.dtype)[0]
        row = torch.arange(self.rows, device=image.device)
        high = column.new_full((1, 1), self.rows) if self.count is None else -(-self.count // self.width)
        down = _inside(row, high, regions).to(image.dtype).expand(len(image), -1, -1)
        counted = torch.cat((image * weight, weight), dim=-1)
        summed = torch.einsum("brh,bhwc->brwc", down, counted)
        summed = torch.einsum("sw,brwc->brsc", across, summed).flatten(1, 2)
        return summed[..., :-1] / summed[..., -1:].clamp(min=1.0)


def _moved(x: Tensor, place: Tensor) -> Tensor:
    """Each row's tokens of these places.  Shapes:  x, out: [B, T, ...];  place: [B, T]"""
    return x.gather(1, place.view(*place.shape, *[1] * (x.dim() - 2)).expand_as(x))


def _inside(place: Tensor, size: Tensor, regions: int) -> Tensor:
    """Whether places of an axis of `size` are in each region.  Shapes:  place: [n];  size: [B, 1];  out: [B, regions, n] bool"""
    index = torch.arange(regions, device=place.device)
    first, last = index * size // regions, ((index + 1) * size + regions - 1) // regions
    return (place >= first[..., None]) & (place < last[..., None])
