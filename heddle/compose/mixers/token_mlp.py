"""A feed-forward network in the place of a mixer: no token hears of another."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.cache import Call, PreallocatedRecurrentLayer, StateLayer, TokenCount
from heddle.compose.modules.site import Site


class TokenMlpModule(nn.Module):
    """y = W_down (silu(W_gate x) * W_up x)        (arXiv 2510.11602, the form that mixes nothing)

    Its inner features are handed out as one head.

    Shapes:  x, y: [B, T, D];  W_gate, W_up: [width, D];  `heads_out` sees [B, T, 1, width]
    """

    takes_packed = True

    def __init__(self, site: Site, *, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(site.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(site.hidden_size, width, bias=False)
        self.heads_out = nn.Identity()
        self.down_proj = nn.Linear(width, site.hidden_size, bias=False)

    def forward(self, x: Tensor, call: Call) -> Tensor:  # noqa: ARG002 - a token needs no others
        o = F.silu(self.gate_proj(x)) * self.up_proj(x)
        y: Tensor = self.down_proj(self.heads_out(o[:, :, None])[:, :, 0])
        return y

    def new_cache(self) -> StateLayer:
        return TokenCount()

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:  # noqa: ARG002
        """A cache of nothing after `context` tokens, whose step repeats."""
        return PreallocatedRecurrentLayer({}, context=context)

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:  # noqa: ARG002
        """The name of the code that does the mixing."""
        return "torch"
