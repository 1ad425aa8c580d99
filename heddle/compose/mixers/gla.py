"""Gated linear attention: a matrix memory of which each key channel, or the whole of each head, fades by a gate of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.cache import Call, RecurrentLayer, StateLayer
from heddle.compose.modules.memory import filled_memory, remember
from heddle.compose.modules.norm import RMSNorm
from heddle.compose.modules.precision import wide
from heddle.compose.modules.short_conv import ShortConv
from heddle.compose.modules.site import Site
from heddle.kernels.gla import gla, gla_step
from heddle.kernels.simple_gla import simple_gla, simple_gla_step

# The gate is the sixteenth root of a sigmoid, so that it begins near 1 (arXiv 2312.06635).
ROOT = 16.0


class GlaModule(nn.Module):
    """Linear attention with a decay gate for each key channel, of low rank, or for each head, and a gated norm.

        q, k, v = W x, or silu(conv(W x));   log_decay = log sigmoid(W_2 W_1 x + b) / 16,  of heads log sigmoid(W x + b) / 16
        S = diag(exp(log_decay)) S + k vᵀ,   o = Sᵀ q / sqrt(K);   y = W_o (rms(o) * silu(z))        (arXiv 2312.06635)

    Rows of `qkv_proj` and channels of the convolution stand in the order q, k, v. log_decay and state are float32.

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
        gate: str = "channel",
        gate_rank: int = 16,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.value_dim = heads, head_dim, value_dim
        self.sizes = (heads * head_dim, heads * head_dim, heads * value_dim)
        self.qkv_proj = nn.Linear(site.hidden_size, sum(self.sizes), bias=False)
        self.z_proj = nn.Linear(site.hidden_size, heads * value_dim, bias=False)
        self.of_heads = gate == "head"
        if self.of_heads:
            self.decay_proj = nn.Linear(site.hidden_size, heads)
        else:
            self.decay_down = nn.Linear(site.hidden_size, gate_rank, bias=False)
            self.decay_up = nn.Linear(gate_rank, heads * head_dim)
        self.conv = None if short_conv is None else ShortConv(sum(self.sizes), short_conv)
        self.norm = RMSNorm(value_dim, site.norm_eps)
        self.heads_out = nn.Identity()
        self.o_proj = nn.Linear(heads * value_dim, site.hidden_size, bias=False)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        x = call.hide_padding(x)
        qkv = self.qkv_proj(x)
        qkv = qkv if self.conv is None else self.conv(qkv, call)
        q, k, v = (side.unflatten(-1, (self.heads, -1)) for side in qkv.split(self.sizes, dim=-1))
        op, step = (simple_gla, simple_gla_step) if self.of_heads else (gla, gla_step)
        # A token that is not written adds nothing; the memory decays all the same.
        o = remember(op, step, q, k, call.hide_unwritten(v), self._log_decay(x), call=call)
        o = self.norm(o, self.z_proj(x).view_as(o))
        y: Tensor = self.o_proj(self.heads_out(call.gated(o)).flatten(2))
        return y

    def _log_decay(self, x: Tensor) -> Tensor:
        """Shapes:  x: [B, T, D];  out: [B, T, H, K], or [B, T, H] of heads"""
        if self.of_heads:
            return F.logsigmoid(wide(self.decay_proj(x))) / ROOT
        gates = wide(self.decay_up(self.decay_down(x)))
        return F.logsigmoid(gates).view(*x.shape[:2], self.heads, self.head_dim) / ROOT

    def new_cache(self) -> StateLayer:
        return RecurrentLayer()

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random states after `context` tokens, whose step repeats."""
        memory = (batch, self.heads, self.head_dim, self.value_dim)
        return filled_memory(memory, context, like, conv=self.conv)

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:
        """The name of the code that does the mixing."""
        op = simple_gla if self.of_heads else gla
        return op.path(device, dtype, K=self.head_dim, V=self.value_dim)
