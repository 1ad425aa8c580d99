"""The GeGLU channel block."""

from __future__ import annotations

from typing import ClassVar, Literal

from heddle.specs.feed_forward import FeedForward
from heddle.specs.width import Ratio


class GeGLU(FeedForward):
    """Gated GELU: down(gelu(gate x) · up x), with GELU in its tanh form (arXiv 2002.05202)."""

    matrices: ClassVar[int] = 3
    kind: Literal["geglu"] = "geglu"
    ratio: Ratio = 2.67
