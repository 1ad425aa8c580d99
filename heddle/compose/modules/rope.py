"""Rotary position embedding, half-split, on all or the first part of a head."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

Tables = tuple[Tensor, Tensor]
# A scaling as plain data, in a form that can name a table: sorted pairs of field and value.
Scaling = tuple[tuple[str, Any], ...]


def scaling_key(scaling: Mapping[str, Hashable] | None) -> Scaling | None:
    """The data of a `scaling` as a key of tables."""
    return None if scaling is None else tuple(sorted(scaling.items()))


def rotary_key(rope: Mapping[str, Any] | None, head_dim: int) -> tuple[int, float, Scaling | None] | None:
    """The arguments of `Call.rotary_tables` for the data of a `rope`; None if nothing turns."""
    # Features turn in pairs.
    turned = 0 if rope is None else int(rope["fraction"] * head_dim) // 2 * 2
    if rope is None or turned == 0:
        return None
    return turned, float(rope["theta"]), scaling_key(rope.get("scaling"))


def rotary_tables(positions: Tensor, size: int, theta: float, scaling: Scaling | None = None) -> Tables:
    """Cosines and sines of the angles pos * theta^(-2j/size), j < size/2        (arXiv 2104.09864).

    With a `scaling` the frequencies are stretched as it says, and for YaRN both tables grow by its attention factor.

    Shapes:  positions: [B, T];  out: two of [B, T, 1, size], float32.
    """
    if scaling is None:
        steps = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32)
        frequencies, factor = torch.exp(steps * (-math.log(theta) / size)), 1.0
    else:
        frequencies, factor = scaled_frequencies(size, theta, dict(scaling), positions.device)
    angles = positions[..., None].to(torch.float32) * frequencies
    angles = torch.cat((angles, angles), dim=-1)[:, :, None]
    cos, sin = angles.cos(), angles.sin()
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)


def scaled_frequencies(
    size: int, theta: float, scaling: Mapping[str, Any], device: torch.device
) -> tuple[Tensor, float]:
    """Angles a token, and the factor of cosines and sines.

        linear  f / factor                                                              (arXiv 2306.15595)
        llama3  f / factor below low_frequency_factor turns in the original length, f above high_frequency_factor,
                between them a blend that is linear in the turns                        (arXiv 2407.21783)
        yarn    f below the dimension of beta_fast turns, f / factor above that of beta_slow, a linear ramp over the
                dimensions between                                                      (arXiv 2309.00071)

    Shapes:  out: [size / 2], float32, computed in float64
    """
    step = torch.arange(0, size, 2, device=device, dtype=torch.float64)
    plain = torch.exp(step * (-math.log(theta) / size))
    slow = plain / scaling["factor"]
    if scaling["kind"] == "linear":
        return slow.float(), 1.0
    if scaling["kind"] == "llama3":
        low, high = scaling["low_frequency_factor"], scaling["high_frequency_factor"]
        turns = plain * (scaling["original_length"] / (2 * math.pi))
        kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
        return torch.lerp(slow, plain, kept).float(), 1.0
    low, high = (
        size * math.log(scaling["original_length"] / (turns * 2 * math.pi)) / (2 * math.log(theta))
        for turns in (scaling["beta_fast"], scaling["beta_slow"])
    )
    low, high = max(math.floor(low), 0), min(math.ceil(high), size - 1)
    # Equal ends would divide by zero.
    ramp = (torch.arange(size // 2, device=device, dtype=torch.float64) - low) / (high - low or 1e-3)
    return torch.lerp(plain, slow, ramp.clamp(0.0, 1.0)).float(), scaling["attention_factor"]


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
