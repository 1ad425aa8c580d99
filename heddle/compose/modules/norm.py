"""Norms over the last dimension."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.modules.precision import wide
from heddle.kernels.rms_norm import gated, rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm, statistics in float32.

        y = w * x / sqrt(mean(x²) + eps) [* activation(gate)]        (arXiv 1910.07467)

    With `groups` the mean is that of each of so many equal parts (arXiv 2405.21060).

    Shapes:  x, gate, y: [..., size]
    """

    def __init__(self, size: int, eps: float, *, groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.groups = eps, groups

    def forward(self, x: Tensor, gate: Tensor | None = None, activation: str = "silu") -> Tensor:
        if self.groups == 1:
            return rms_norm(x, self.weight, gate=gate, activation=activation, eps=self.eps)
        y = rms_norm(wide(x).reshape(*x.shape[:-1], self.groups, -1), eps=self.eps).flatten(-2)
        return gated((y * self.weight).to(x.dtype), gate, activation)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LayerNorm(nn.LayerNorm):
    """Layer norm with gain and bias; output in the type of the input, also under autocast.

    Shapes:  x, y: [..., size]
    """

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(wide(x), self.normalized_shape, wide(self.weight), wide(self.bias), self.eps)
        return y.to(x.dtype)


NORMS: dict[str, type[RMSNorm | LayerNorm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


def norm_module(kind: str, size: int, eps: float) -> nn.Module:
    """The norm named `kind` in a block's `norm` field."""
    return NORMS[kind](size, eps=eps)


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x²) + eps) over the last dimension, computed in float32."""
    return rms_norm(x, eps=eps, mean=False)
