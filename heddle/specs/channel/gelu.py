"""The GELU channel block."""

from __future__ import annotations

from typing import ClassVar, Literal

from heddle.specs.feed_forward import FeedForward
from heddle.specs.width import Ratio


class GELU(FeedForward):
    """Two matrices with a GELU between them: down(gelu(up x)) (arXiv 1606.08415)."""

    matrices: ClassVar[int] = 2
    kind: Literal["gelu"] = "gelu"
    ratio: Ratio = 4.0
