"""Which numbers stay wide: statistics, gates, rotations and decays are computed in at least float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or as it is when it is float64."""
    return x.to(wide_dtype(x.dtype))


class Float32Kept(nn.Module):
    """A module whose tensors named in `KEPT` stay float32 when the model is cast to a narrower type.

    `model.to(torch.bfloat16)` would otherwise round a decay of 0.9999 to 1. float64 is let through. One may be None.
    """

    KEPT: ClassVar[tuple[str, ...]] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        there = ((name, getattr(self, name)) for name in self.KEPT)
        before = {name: tensor.detach() for name, tensor in there if tensor is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype in (torch.bfloat16, torch.float16):
                # A tensor on the meta device has no values to keep; whoever materialises it fills it in.
                new.data = (
                    torch.empty_like(new, dtype=torch.float32)
                    if old.is_meta
                    else old.to(new.device, torch.float32)
                )
        return self
