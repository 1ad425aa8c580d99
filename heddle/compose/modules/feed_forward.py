"""Channel blocks of matrices with an activation between them: what the kinds have in common."""

from __future__ import annotations

from torch import Tensor, nn

from heddle.compose.cache import Call
from heddle.compose.modules.site import Site


class FeedForward(nn.Module):
    """y = W_down h, with h = `activation`(W_up x), or of a gated kind `activation`(W_gate x) * W_up x.

    Shapes:  x, y: [B, T, D];  W_up, W_gate: [width, D]
    """

    IS_GATED = True

    def __init__(self, site: Site, *, width: int) -> None:
        super().__init__()
        if self.IS_GATED:
            self.gate_proj = nn.Linear(site.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(site.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, site.hidden_size, bias=False)

    def activation(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, call: Call) -> Tensor:  # noqa: ARG002 - a token needs no others
        up = self.up_proj(x)
        y: Tensor = self.down_proj(
            self.activation(self.gate_proj(x)) * up if self.IS_GATED else self.activation(up)
        )
        return y
