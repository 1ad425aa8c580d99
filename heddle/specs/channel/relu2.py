"""The squared-ReLU channel block."""

from __future__ import annotations

from typing import ClassVar, Literal

from heddle.specs.feed_forward import FeedForward
from heddle.specs.width import Ratio


class ReLU2(FeedForward):
    """Two matrices with a squared ReLU between them: down(relu(up x)²) (arXiv 2109.08668)."""

    matrices: ClassVar[int] = 2
    kind: Literal["relu2"] = "relu2"
    ratio: Ratio = 4.0
