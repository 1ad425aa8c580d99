"""Rotary position embedding, half-split, on all or the first part of a head."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Tables = tuple[Tensor, Tensor]


def rotary_tables(positions: Tensor, size: int, theta: float) -> Tables:
    """Cosines and sines of the angles pos * theta^(-2j/size), j < size/2        (arXiv 2104.09864).

    Shapes:  positions: [B, T];  out: two of [B, T, 1, size], float32.
    """
    steps = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32)
    frequencies = torch.exp(steps * (-math.log(theta) / size))
    angles = positions[..., None].to(torch.float32) * frequencies
    angles = torch.cat((angles, angles), dim=-1)[:, :, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: Tables) -> Tensor:
    """Turns the first `size` features of each head; the rest passes. `x` is float32 or float64.

    Shapes:  x: [B, T, H, d], d >= size
    """
    cos, sin = tables
    size = cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-high, low), dim=-1) * sin
    return turned if rest.shape[-1] == 0 else torch.cat((turned, rest), dim=-1)
