"""What queries and keys are made of where that is not the layer's input."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from heddle.compose.cache import Call
from heddle.compose.constant_stream import CONSTANT, constant_rows

# The embedded tokens, as the model hands them on.
EMBEDDED = ("stream", -1)
_BITS = 0xFFFFFFFF


def qk_input(source: str, x: Tensor, call: Call) -> Tensor:
    """The input of the projections of q and k.        (arXiv 2510.11602)

    "hidden" is `x`, "embedding" the embedded tokens, "position" a fixed random row for each position, "constant" what the
    constant stream is there.

    Shapes:  x, out: [B, T, D]
    """
    if source == "hidden":
        return x
    if source == "embedding":
        embedded: Tensor = call.handed[EMBEDDED]
        return embedded
    if source == CONSTANT:
        return constant_rows(call, x.shape[-1])
    rows = call.once(("position rows", x.shape[-1]), lambda: position_rows(call.positions, x.shape[-1]))
    return rows.to(x.dtype)


def position_rows(positions: Tensor, size: int) -> Tensor:
    """Rows from N(0, 1) that depend on the position alone: the same in every layer, process and version.

    Made by hashing positions and features to 32 bits each, and Box and Muller's transform of two such numbers.

    Shapes:  positions: [B, T] int64;  out: [B, T, size], float32
    """
    # Without padding all sequences have the same positions, and these are one row in memory.
    given = positions[:1] if positions.stride(0) == 0 else positions
    feature = torch.arange(2 * size, device=given.device)
    bits = _hashed((_hashed(given & _BITS)[..., None] + 0x9E3779B1 * feature) & _BITS)
    # 23 bits, so that float32 holds every number, and none is 0.
    first, second = (((bits >> 9).to(torch.float32) + 0.5) * 2.0**-23).chunk(2, dim=-1)
    rows = torch.sqrt(-2.0 * torch.log(first)) * torch.cos(2.0 * math.pi * second)
    return rows.expand(positions.shape[0], -1, -1)


def _hashed(bits: Tensor) -> Tensor:
    """A permutation of the numbers of 32 bits. Products stay below 2^63."""
    for _ in range(2):
        bits = ((bits ^ (bits >> 16)) * 0x45D9F3B) & _BITS
    return bits ^ (bits >> 16)
