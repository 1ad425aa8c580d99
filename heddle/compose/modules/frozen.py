"""Projections that are drawn once and never trained."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.compose.init import Initialised, fill
from heddle.compose.modules.site import Site


class FrozenProjection(Initialised):
    """y = A x,   A = sqrt(1 - ξ²) Z + ξ Z',   Z and Z' from N(0, 1 / D), drawn by seed, layer and head.

    Two of one seed and layer have the same Z and Z'. A is a buffer, so that no optimizer and no weight decay meets it, and is
    saved, because generators differ between devices and versions.

    Shapes:  x: [B, T, D];  A: [H d, D];  y: [B, T, H, d]
    """

    def __init__(self, site: Site, *, heads: int, head_dim: int, seed: int, noise: float) -> None:
        super().__init__()
        self.heads, self.seed, self.noise, self.layer = heads, seed, noise, site.layer_index
        self.register_buffer("weight", torch.empty(heads * head_dim, site.hidden_size))
        self.weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight).view(*x.shape[:2], self.heads, -1)

    def initialise(self, std: float) -> None:  # noqa: ARG002 - it keeps the scale of what it projects
        fill(self.weight, torch.cat([self._of_head(head) for head in range(self.heads)]))

    def _of_head(self, head: int) -> Tensor:
        """Shapes:  out: [d, D]"""
        digest = hashlib.sha256(f"{self.seed}/{self.layer}/{head}".encode()).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))
        shape = (2, self.weight.shape[0] // self.heads, self.weight.shape[1])
        shared, own = torch.randn(shape, generator=generator, device="cpu") / math.sqrt(shape[-1])
        return torch.as_tensor(math.sqrt(1.0 - self.noise**2) * shared + self.noise * own)
