"""Plain feed-forward with GELU."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.cache import Call
from heddle.compose.modules.site import Site


class GELUModule(nn.Module):
    """y = W_down gelu(W_up x)        (arXiv 1606.08415)

    Shapes:  x, y: [B, T, D]
    """

    def __init__(self, site: Site, *, width: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(site.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, site.hidden_size, bias=False)

    def forward(self, x: Tensor, call: Call) -> Tensor:  # noqa: ARG002 - a token needs no others
        y: Tensor = self.down_proj(F.gelu(self.up_proj(x)))
        return y
