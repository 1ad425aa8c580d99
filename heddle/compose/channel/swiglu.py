"""Gated feed-forward with SiLU."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.cache import Call
from heddle.compose.modules.site import Site


class SwiGLUModule(nn.Module):
    """y = W_down (silu(W_gate x) * W_up x)        (arXiv 2002.05202)

    Shapes:  x, y: [B, T, D]
    """

    def __init__(self, site: Site, *, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(site.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(site.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, site.hidden_size, bias=False)

    def forward(self, x: Tensor, call: Call) -> Tensor:  # noqa: ARG002 - a token needs no others
        y: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return y
