"""DeltaNet: a matrix memory that corrects itself as it writes, and never fades."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.cache import Call, RecurrentLayer, StateLayer
from heddle.compose.modules.memory import filled_memory, remember
from heddle.compose.modules.norm import RMSNorm, l2_norm
from heddle.compose.modules.precision import wide
from heddle.compose.modules.short_conv import ShortConv
from heddle.compose.modules.site import Site
from heddle.kernels.delta_rule import delta_rule, delta_rule_step


class DeltaNetModule(nn.Module):
    """Delta rule with a short convolution and a norm of each head.        (arXiv 2102.11174, 2406.06484)

        q, k, v = silu(conv(W x)),  q and k of length 1;   beta = sigmoid(b), doubled with `negative_eigenvalues`
        S = S + beta k (v - Sᵀ k)ᵀ,   o = Sᵀ q / sqrt(K);   y = W_o rms(o), or W_o (rms(o) * silu(z)) with `gate`

    Rows of `qkv_proj` and channels of the convolution stand in the order q, k, v. beta and state are float32.

    Shapes:  x, y: [B, T, D];  state: [B, H, K, V];  `heads_out` sees [B, T, H, V]
    """

    takes_packed = True

    def __init__(
        self,
        site: Site,
        *,
        heads: int,
        head_dim: int,
        value_dim: int,
        short_conv: int | None,
        gate: bool,
        negative_eigenvalues: bool,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.value_dim = heads, head_dim, value_dim
        self.beta_max = 2.0 if negative_eigenvalues else 1.0
        self.sizes = (heads * head_dim, heads * head_dim, heads * value_dim)
        self.qkv_proj = nn.Linear(site.hidden_size, sum(self.sizes), bias=False)
        self.z_proj = nn.Linear(site.hidden_size, heads * value_dim, bias=False) if gate else None
        self.b_proj = nn.Linear(site.hidden_size, heads, bias=False)
        self.conv = None if short_conv is None else ShortConv(sum(self.sizes), short_conv)
        self.norm = RMSNorm(value_dim, site.norm_eps)
        self.heads_out = nn.Identity()
        self.o_proj = nn.Linear(heads * value_dim, site.hidden_size, bias=False)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        x = call.hide_padding(x)
        qkv = self.qkv_proj(x)
        qkv = F.silu(qkv) if self.conv is None else self.conv(qkv, call)
        q, k, v = (side.unflatten(-1, (self.heads, -1)) for side in qkv.split(self.sizes, dim=-1))
        # A token that is not written neither erases nor writes.
        beta = call.hide_unwritten(torch.sigmoid(wide(self.b_proj(x))) * self.beta_max)
        o = remember(delta_rule, delta_rule_step, l2_norm(q), l2_norm(k), v, beta, call=call)
        o = self.norm(o, None if self.z_proj is None else self.z_proj(x).view_as(o))
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
        return delta_rule.path(device, dtype, K=self.head_dim, V=self.value_dim)
