"""Plain feed-forward with GELU."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from heddle.compose.modules.feed_forward import FeedForward


class GELUModule(FeedForward):
    """y = W_down gelu(W_up x)        (arXiv 1606.08415)"""

    IS_GATED = False

    def activation(self, x: Tensor) -> Tensor:
        return F.gelu(x)
