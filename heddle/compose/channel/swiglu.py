"""Gated feed-forward with SiLU."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from heddle.compose.modules.feed_forward import FeedForward


class SwiGLUModule(FeedForward):
    """y = W_down (silu(W_gate x) * W_up x)        (arXiv 2002.05202)"""

    def activation(self, x: Tensor) -> Tensor:
        return F.silu(x)
