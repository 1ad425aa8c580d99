"""Mamba-2: a state space model with one decay for each token and head."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.cache import Call, RecurrentLayer, StateLayer
from heddle.compose.init import Initialised, fill
from heddle.compose.modules.memory import filled_memory, remember
from heddle.compose.modules.norm import RMSNorm
from heddle.compose.modules.precision import Float32Kept, wide, wide_dtype
from heddle.compose.modules.short_conv import ShortConv
from heddle.compose.modules.site import Site
from heddle.kernels.simple_gla import simple_gla, simple_gla_step

# Decay rates and step sizes begin in these ranges (arXiv 2405.21060).
DECAY_RATES = (1.0, 16.0)
STEP_SIZES = (1e-3, 1e-1)


class Mamba2Module(Initialised, Float32Kept):
    """State space duality with a short convolution and a gated norm.        (arXiv 2405.21060)

        z, xBC, dt = W_in u;   x, B, C = silu(conv(xBC));   dt = softplus(dt + dt_bias)
        S = exp(-exp(A_log) dt) S + B (dt x)ᵀ,   o = Sᵀ C + D x
        y = W_o rms(o * silu(z)), or rms(o) * silu(z) in the place of the norm with `norm` "before_gate", or no norm at all

    The norm takes the heads of a group together. Rows of `in_proj` stand in the order z, x, B, C, dt, channels of the convolution
    in the order x, B, C. Gates and state are float32.

    Shapes:  u, y: [B, T, D];  x, o: [B, T, HV, V];  B, C: [B, T, H, K], H groups;  state: [B, HV, K, V];
             `heads_out` sees [B, T, HV, V]
    """

    takes_packed = True
    KEPT: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias")

    def __init__(
        self,
        site: Site,
        *,
        heads: int,
        head_dim: int,
        state_dim: int,
        groups: int,
        short_conv: int,
        conv_bias: bool,
        bias: bool,
        norm: str,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.state_dim, self.groups = heads, head_dim, state_dim, groups
        width, shared = heads * head_dim, groups * state_dim
        self.sizes = (width, shared, shared)
        self.in_proj = nn.Linear(site.hidden_size, width + sum(self.sizes) + heads, bias=bias)
        self.conv = ShortConv(sum(self.sizes), short_conv, bias=conv_bias)
        self.A_log = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(heads))
        self.norms_first = norm == "before_gate"
        self.norm = None if norm == "none" else RMSNorm(width, site.norm_eps, groups=groups)
        self.heads_out = nn.Identity()
        self.o_proj = nn.Linear(width, site.hidden_size, bias=bias)

    def forward(self, u: Tensor, call: Call) -> Tensor:
        z, mixed, dt = self.in_proj(u).split((self.sizes[0], sum(self.sizes), self.heads), dim=-1)
        # Projection and convolution may have a bias, so padding is hidden after the one, and of the other's steps none is taken.
        x, b, c = self.conv(call.hide_padding(mixed), call).split(self.sizes, dim=-1)
        x = x.unflatten(-1, (self.heads, self.head_dim))
        o = self._remember(x, b, c, call.hide_padding(F.softplus(wide(dt) + self.dt_bias)), call)
        o = wide(o) + self.D.to(wide_dtype(o.dtype))[:, None] * wide(x)
        o = self._gated(o.flatten(2), wide(z)).to(x.dtype).view_as(x)
        y: Tensor = self.o_proj(self.heads_out(call.gated(o)).flatten(2))
        return y

    def _remember(self, x: Tensor, b: Tensor, c: Tensor, dt: Tensor, call: Call) -> Tensor:
        """What the state answers. A token that is not written adds nothing; the memory decays all the same.

        Shapes:  x, out: [B, T, HV, V];  b, c: [B, T, H K];  dt: [B, T, HV], float32
        """
        v = call.hide_unwritten((wide(x) * dt[..., None]).to(x.dtype))
        c, b = (side.reshape(*side.shape[:2], self.groups, self.state_dim) for side in (c, b))
        log_decay = -torch.exp(wide(self.A_log)) * dt
        return remember(simple_gla, simple_gla_step, c, b, v, log_decay, call=call, scale=1.0)

    def _gated(self, o: Tensor, z: Tensor) -> Tensor:
        """Norm and gate.  Shapes:  o, z, out: [B, T, HV V], float32"""
        if self.norm is None:
            return o * F.silu(z)
        y: Tensor = self.norm(o, z) if self.norms_first else self.norm(o * F.silu(z))
        return y

    def initialise(self, std: float) -> None:  # noqa: ARG002 - rates have ranges of their own
        rates = torch.empty_like(self.A_log).uniform_(*DECAY_RATES)
        fill(self.A_log, rates.log())
        steps = torch.empty_like(self.dt_bias).uniform_(*(math.log(size) for size in STEP_SIZES)).exp()
        # The inverse of softplus.
        fill(self.dt_bias, steps + torch.log(-torch.expm1(-steps)))
        fill(self.D, torch.ones_like(self.D))

    def new_cache(self) -> StateLayer:
        return RecurrentLayer()

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random states after `context` tokens, whose step repeats."""
        memory = (batch, self.heads, self.state_dim, self.head_dim)
        return filled_memory(memory, context, like, conv=self.conv)

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:
        """The name of the code that does the mixing."""
        return simple_gla.path(device, dtype, K=self.state_dim, V=self.head_dim)
