"""No channel block."""

from __future__ import annotations

from torch import Tensor, nn

from heddle.compose.cache import Call
from heddle.compose.modules.site import Site


class NoChannelModule(nn.Module):
    """Adds nothing to the residual stream. A layer that meets it skips the norm and the addition as well."""

    def __init__(self, site: Site) -> None:  # noqa: ARG002 - every channel block is built the same way
        super().__init__()

    def forward(self, x: Tensor, call: Call) -> Tensor:  # noqa: ARG002 - a token needs no others
        return x.new_zeros(()).expand_as(x)
