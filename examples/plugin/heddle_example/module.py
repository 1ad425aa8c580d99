"""The module of the token shift. An exported model carries this file, so it imports what heddle exports, and torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from heddle.compose.cache import Call, PreallocatedRecurrentLayer, RecurrentLayer, StateLayer
from heddle.compose.init import Initialised, uniform
from heddle.compose.modules.site import Site


class TokenShiftModule(Initialised):
    """o_t = v_t + mu (v_(t-1) - v_t)        (arXiv 2305.13048)

    Shapes:  x, y: [B, T, D];  state `before`: [B, H, K];  `heads_out` sees [B, T, H, K]
    """

    def __init__(self, site: Site, *, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.v_proj = nn.Linear(site.hidden_size, heads * head_dim, bias=False)
        self.mu = nn.Parameter(torch.empty(heads, head_dim))
        self.heads_out = nn.Identity()
        self.o_proj = nn.Linear(heads * head_dim, site.hidden_size, bias=False)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        v = self.v_proj(call.hide_padding(x)).unflatten(-1, (self.heads, self.head_dim))
        before = call.state("before")
        before = torch.zeros_like(v[:, 0]) if before is None else before
        # What a router sends elsewhere is answered here, and not remembered.
        kept = call.hide_unwritten(v)
        shifted = torch.cat((before[:, None], kept[:, :-1]), dim=1)
        call.keep(before=kept[:, -1])
        o = v + self.mu.to(v.dtype) * (shifted - v)
        y: Tensor = self.o_proj(self.heads_out(call.gated(o)).flatten(2))
        return y

    def initialise(self, std: float) -> None:  # noqa: ARG002 - a share, not a scale
        uniform(self.mu, 0.0, 1.0)

    def new_cache(self) -> StateLayer:
        return RecurrentLayer()

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random states after `context` tokens, whose step repeats."""
        before = like.new_empty(batch, self.heads, self.head_dim).normal_()
        return PreallocatedRecurrentLayer({"before": before}, context=context)

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:  # noqa: ARG002
        """The name of the code that does the mixing."""
        return "torch"
