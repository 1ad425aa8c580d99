"""HGRN-2: a matrix memory that takes in what its forget gate lets go."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.cache import Call, RecurrentLayer, StateLayer
from heddle.compose.modules.lower_bounds import bounded_log_forget
from heddle.compose.modules.memory import filled_memory, remember
from heddle.compose.modules.norm import RMSNorm
from heddle.compose.modules.short_conv import ShortConv
from heddle.compose.modules.site import Site
from heddle.kernels.gla import gla, gla_step


class Hgrn2Module(nn.Module):
    """Linear attention whose keys are the complements of its decays, from a lower bound on.        (arXiv 2404.07904)

        q = silu(W_q x),   i = W_i x,   f = b + (1 - b) sigmoid(W_f x),   k = 1 - f
        S = diag(f) S + k iᵀ,   o = Sᵀ q / sqrt(K);   y = W_o rms over all heads(o)

    The bound b of its layer comes with the call; a call without one, as that of a model's first layer, has 0. A convolution is
    over the projections, in the order q, f, i, before all else. log f and state are float32.

    Shapes:  x, y: [B, T, D];  state: [B, H, K, V];  `heads_out` sees [B, T, H, V]
    """

    takes_packed = True

    def __init__(
        self, site: Site, *, heads: int, head_dim: int, value_dim: int, short_conv: int | None
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.value_dim = heads, head_dim, value_dim
        self.sizes = (heads * head_dim, heads * head_dim, heads * value_dim)
        self.q_proj, self.f_proj, self.i_proj = (
            nn.Linear(site.hidden_size, size, bias=False) for size in self.sizes
        )
        self.conv = None if short_conv is None else ShortConv(sum(self.sizes), short_conv, activation=None)
        self.g_norm = RMSNorm(heads * value_dim, site.norm_eps)
        self.heads_out = nn.Identity()
        self.o_proj = nn.Linear(heads * value_dim, site.hidden_size, bias=False)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        x = call.hide_padding(x)
        q, f, i = self.q_proj(x), self.f_proj(x), self.i_proj(x)
        if self.conv is not None:
            q, f, i = self.conv(torch.cat((q, f, i), dim=-1), call).split(self.sizes, dim=-1)
        log_forget = bounded_log_forget(f, call)
        # Not 1 - exp: gates near 1 would leave little but rounding.
        k = -torch.expm1(log_forget).to(q.dtype)
        q, k, i, log_forget = (side.unflatten(-1, (self.heads, -1)) for side in (F.silu(q), k, i, log_forget))
        # A token that is not written adds nothing; the memory decays all the same.
        o = remember(gla, gla_step, q, k, call.hide_unwritten(i), log_forget, call=call)
        o = self.g_norm(o.flatten(2)).view_as(o)
        y: Tensor = self.o_proj(self.heads_out(call.gated(o)).flatten(2))
        return y

    def new_cache(self) -> StateLayer:
        return RecurrentLayer()

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random states after `context` tokens, whose step repeats."""
        memory = (batch, self.heads, self.head_dim, self.value_dim)
        return filled_memory(memory, context, like, conv=self.conv)

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:
        """The name of the code that does the mixing."""
        return gla.path(device, dtype, K=self.head_dim, V=self.value_dim)
