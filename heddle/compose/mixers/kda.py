"""Kimi Delta Attention: a matrix memory that corrects itself as it writes, each key channel fading by a gate of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.cache import Call, RecurrentLayer, StateLayer
from heddle.compose.init import Initialised, fill
from heddle.compose.modules.memory import filled_memory, remember
from heddle.compose.modules.norm import RMSNorm, l2_norm
from heddle.compose.modules.precision import Float32Kept, wide
from heddle.compose.modules.short_conv import ShortConv
from heddle.compose.modules.site import Site
from heddle.kernels.kda import kda, kda_step

# Decay rates and step sizes begin in these ranges; with a bounded gate the rates begin at 1.
DECAY_RATES = (1.0, 16.0)
STEP_SIZES = (1e-3, 1e-1)


class KdaModule(Initialised, Float32Kept):
    """The delta rule with a decay gate for each key channel, a short convolution and a gated norm.        (arXiv 2510.26692)

        q, k, v = silu(conv(W x)),  q and k of length 1;   beta = sigmoid(b)
        g = -exp(A_log) softplus(f + dt_bias),  or  lower_bound sigmoid(exp(A_log) (f + dt_bias));   f = W_2 W_1 x
        S' = diag(exp(g)) S,  S = S' + beta k (v - S'ᵀ k)ᵀ,  o = Sᵀ q / sqrt(K);   y = W_o (rms(o) * sigmoid(W_4 W_3 x))

    Rows of `qkv_proj` and channels of the convolution stand in the order q, k, v. Gates and state are float32.

    Shapes:  x, y: [B, T, D];  state: [B, H, K, V];  `heads_out` sees [B, T, H, V]
    """

    takes_packed = True
    KEPT: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias")
    # Another formula of it is set where an export is compared with a class that has that one.
    softplus: Callable[[Tensor], Tensor] = staticmethod(F.softplus)

    def __init__(
        self,
        site: Site,
        *,
        heads: int,
        head_dim: int,
        value_dim: int,
        gate_rank: int,
        short_conv: int,
        lower_bound: float | None,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.value_dim, self.lower_bound = heads, head_dim, value_dim, lower_bound
        self.sizes = (heads * head_dim, heads * head_dim, heads * value_dim)
        self.qkv_proj = nn.Linear(site.hidden_size, sum(self.sizes), bias=False)
        self.decay_down = nn.Linear(site.hidden_size, gate_rank, bias=False)
        self.decay_up = nn.Linear(gate_rank, heads * head_dim, bias=False)
        self.b_proj = nn.Linear(site.hidden_size, heads, bias=False)
        self.z_down = nn.Linear(site.hidden_size, gate_rank, bias=False)
        self.z_up = nn.Linear(gate_rank, heads * value_dim, bias=False)
        self.conv = ShortConv(sum(self.sizes), short_conv)
        self.A_log = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(heads * head_dim, dtype=torch.float32))
        self.norm = RMSNorm(value_dim, site.norm_eps)
        self.heads_out = nn.Identity()
        self.o_proj = nn.Linear(heads * value_dim, site.hidden_size, bias=False)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        x = call.hide_padding(x)
        qkv = self.conv(self.qkv_proj(x), call).split(self.sizes, dim=-1)
        q, k, v = (side.unflatten(-1, (self.heads, -1)) for side in qkv)
        # A token that is not written neither erases nor writes; the memory decays all the same.
        beta = call.hide_unwritten(torch.sigmoid(wide(self.b_proj(x))))
        sides = (l2_norm(q), l2_norm(k), v, self._log_decay(x), beta)
        o = remember(kda, kda_step, *sides, call=call)
        o = self.norm(o, self.z_up(self.z_down(x)).view_as(o), "sigmoid")
        y: Tensor = self.o_proj(self.heads_out(call.gated(o)).flatten(2))
        return y

    def _log_decay(self, x: Tensor) -> Tensor:
        """Shapes:  out: [B, T, H, K], float32"""
        step = (wide(self.decay_up(self.decay_down(x))) + self.dt_bias).view(*x.shape[:2], self.heads, -1)
        rate = torch.exp(wide(self.A_log))[:, None]
        if self.lower_bound is None:
            return -rate * self.softplus(step)
        return self.lower_bound * torch.sigmoid(rate * step)

    def initialise(self, std: float) -> None:  # noqa: ARG002 - rates have ranges of their own
        rates = torch.empty_like(self.A_log).uniform_(*DECAY_RATES).log()
        fill(self.A_log, rates if self.lower_bound is None else torch.zeros_like(rates))
        steps = torch.empty_like(self.dt_bias).uniform_(*(math.log(size) for size in STEP_SIZES)).exp()
        # The inverse of softplus.
        fill(self.dt_bias, steps + torch.log(-torch.expm1(-steps)))

    def new_cache(self) -> StateLayer:
        return RecurrentLayer()

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random states after `context` tokens, whose step repeats."""
        memory = (batch, self.heads, self.head_dim, self.value_dim)
        return filled_memory(memory, context, like, conv=self.conv)

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:
        """The name of the code that does the mixing."""
        return kda.path(device, dtype, K=self.head_dim, V=self.value_dim)
