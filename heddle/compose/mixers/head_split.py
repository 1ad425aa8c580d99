"""Two mixers in one layer that share out its heads."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from heddle.compose.cache import Call
from heddle.compose.modules.composite import CompositeMixer
from heddle.compose.modules.documents import mixed
from heddle.compose.modules.site import Site


class HeadSplitModule(CompositeMixer):
    """Two mixers, each with its share of the heads. Their sum is one output projection of the heads of both.

        y = sum over heads h of o_h W_h

    Shapes:  x, y: [B, T, D]
    """

    takes_packed = True

    def __init__(self, site: Site, *, mixers: Sequence[nn.Module]) -> None:  # noqa: ARG002 - as every mixer
        super().__init__()
        self.mixers = nn.ModuleList(mixers)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        first, second = (mixed(mixer, x, call.part(path)) for path, mixer in self.parts().items())
        y: Tensor = first + second
        return y
