"""Tensors that do not lie in memory one number beside the other, with the numbers of others between them."""

from __future__ import annotations

import torch
from torch import Tensor


def with_gaps(x: Tensor) -> Tensor:
    """Rows of wider ones, as those of a projection."""
    return torch.cat((x, _nothing(x)), dim=-1)[..., : x.shape[-1]]


def spread(x: Tensor) -> Tensor:
    """Every second number."""
    return torch.stack((x, _nothing(x)), dim=-1)[..., 0]


def turned(x: Tensor) -> Tensor:
    """Two axes exchanged in memory: the last two but one of a row, or the only two."""
    axes = (1, 2) if x.dim() > 2 else (0, -1)
    return x.transpose(*axes).clone(memory_format=torch.contiguous_format).transpose(*axes)


def _nothing(x: Tensor) -> Tensor:
    return torch.full_like(x, torch.nan if x.is_floating_point() else -1)


VIEWS = (with_gaps, spread, turned)
