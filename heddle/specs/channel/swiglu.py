"""The SwiGLU channel block."""

from __future__ import annotations

from typing import ClassVar, Literal

from heddle.specs.feed_forward import FeedForward
from heddle.specs.width import Ratio


class SwiGLU(FeedForward):
    """Gated SiLU: down(silu(gate x) · up x) (arXiv 2002.05202)."""

    matrices: ClassVar[int] = 3
    kind: Literal["swiglu"] = "swiglu"
    ratio: Ratio = 2.67
