"""Plain feed-forward with a squared ReLU."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from heddle.compose.modules.feed_forward import FeedForward


class ReLU2Module(FeedForward):
    """y = W_down relu(W_up x)²        (arXiv 2109.08668)"""

    IS_GATED = False

    def activation(self, x: Tensor) -> Tensor:
        return F.relu(x).square()
