"""Gated DeltaNet: a matrix memory that forgets by a gate and corrects itself as it writes."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.cache import Call, RecurrentLayer, StateLayer
from heddle.compose.init import Initialised, fill
from heddle.compose.modules.memory import MEMORY, filled_memory, remember
from heddle.compose.modules.norm import RMSNorm, l2_norm
from heddle.compose.modules.precision import Float32Kept, wide
from heddle.compose.modules.short_conv import ShortConv
from heddle.compose.modules.site import Site
from heddle.compose.modules.stretches import in_stretches, is_long
from heddle.kernels.gated_delta_layer import gated_delta_layer_step
from heddle.kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_step

# Decay rates and step sizes begin in these ranges (arXiv 2412.06464, after Mamba-2).
DECAY_RATES = (1e-4, 16.0)
STEP_SIZES = (1e-3, 1e-1)


class GatedDeltaNetModule(Initialised, Float32Kept):
    """Gated delta rule with a short convolution and a gated norm.        (arXiv 2412.06464)

        q, k, v = silu(conv(W x)),  q and k of length 1
        log_decay = -exp(A_log) softplus(a + dt_bias),  beta = sigmoid(b), doubled with `negative_eigenvalues`
        S' = exp(log_decay) S,  S = S' + beta k (v - S'ᵀ k)ᵀ,  o = Sᵀ q / sqrt(K)
        y = W_o (rms(o) * silu(z))

    Rows of `qkv_proj` and of the convolution stand in the order q, k, v. Gates and state are float32.

    Shapes:  x, y: [B, T, D];  state: [B, HV, K, V];  `heads_out` sees [B, T, HV, V]
    """

    takes_packed = True
    KEPT: ClassVar[tuple[str, ...]] = ("A_log", "dt_bias")

    def __init__(
        self,
        site: Site,
        *,
        heads: int,
        value_heads: int,
        head_dim: int,
        value_dim: int,
        short_conv: int,
        negative_eigenvalues: bool,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.value_heads, self.head_dim, self.value_dim = heads, value_heads, head_dim, value_dim
        self.beta_max = 2.0 if negative_eigenvalues else 1.0
        self.sizes = (heads * head_dim, heads * head_dim, value_heads * value_dim)
        self.qkv_proj = nn.Linear(site.hidden_size, sum(self.sizes), bias=False)
        self.z_proj = nn.Linear(site.hidden_size, value_heads * value_dim, bias=False)
        self.a_proj = nn.Linear(site.hidden_size, value_heads, bias=False)
        self.b_proj = nn.Linear(site.hidden_size, value_heads, bias=False)
        self.conv = ShortConv(sum(self.sizes), short_conv)
        self.A_log = nn.Parameter(torch.empty(value_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(value_heads, dtype=torch.float32))
        self.norm = RMSNorm(value_dim, norm_eps or site.norm_eps)
        self.heads_out = nn.Identity()
        self.o_proj = nn.Linear(value_heads * value_dim, site.hidden_size, bias=False)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        x = call.hide_padding(x)
        past = call.state(MEMORY)
        if past is not None and x.shape[1] == 1 and call.written is None:
            heads = self._token(x, call, past)
        else:
            heads = self.norm(self._memory(x, call), self._gate(x))
        y: Tensor = self.o_proj(self.heads_out(call.gated(heads)).flatten(2))
        return y

    def _memory(self, x: Tensor, call: Call) -> Tensor:
        """What the memory answers.  Shapes:  out: [B, T, HV, V]"""
        qkv, gates = self.qkv_proj(x), self._gates(x, call)
        if call.written is not None and call.cu_seqlens is None and is_long(x.shape[1]):
            # A router has another mixer beside this one, and both would hold all they work with.
            past = call.state("conv"), call.state(MEMORY)
            o, (conv, memory) = in_stretches(self._stretch, past, (qkv, *gates))
            call.keep(conv=conv, memory=memory)
            return o
        sides = self._sides(self.conv(qkv, call))
        return remember(gated_delta_rule, gated_delta_rule_step, *sides, *gates, call=call)

    def _sides(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of heads behind the convolution, the first two of length 1."""
        q, k, v = torch.split(qkv, list(self.sizes), dim=-1)
        q, k = (l2_norm(side.view(*side.shape[:2], self.heads, -1)) for side in (q, k))
        return q, k, v.view(*v.shape[:2], self.value_heads, -1)

    def _stretch(
        self, past: tuple[Tensor | None, Tensor | None], qkv: Tensor, log_decay: Tensor, beta: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What the memory answers to some tokens, and the states of convolution and memory after them."""
        y, conv = self.conv.after(qkv, past[0])
        o, memory = gated_delta_rule(*self._sides(y), log_decay, beta, initial_state=past[1])
        return o, (conv, memory)

    def _token(self, x: Tensor, call: Call, past: Tensor) -> Tensor:
        """The gated heads of one token after others: all between the projections in one op.  Shapes:  out: [B, 1, HV, V]"""
        qkv, z = self.qkv_proj(x), self._gate(x)
        heads, memory, conv = gated_delta_layer_step(
            qkv,
            z,
            self.a_proj(x),
            self.b_proj(x),
            self.A_log,
            self.dt_bias,
            self.norm.weight,
            past,
            eps=self.norm.eps,
            conv_state=call.state("conv"),
            conv_weight=self.conv.weight.to(qkv.dtype),
            beta_max=self.beta_max,
        )
        assert conv is not None
        call.keep(memory=memory, conv=conv)
        return heads

    def _gate(self, x: Tensor) -> Tensor:
        z: Tensor = self.z_proj(x).unflatten(-1, (self.value_heads, -1))
        return z

    def _gates(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """A token that is not written neither erases nor writes; the memory decays all the same.

        Shapes:  log_decay, beta: [B, T, HV], float32
        """
        log_decay = -torch.exp(wide(self.A_log)) * F.softplus(wide(self.a_proj(x)) + self.dt_bias)
        return log_decay, call.hide_unwritten(torch.sigmoid(wide(self.b_proj(x))) * self.beta_max)

    def initialise(self, std: float) -> None:  # noqa: ARG002 - rates have ranges of their own
        rates = torch.empty_like(self.A_log).uniform_(*DECAY_RATES)
        fill(self.A_log, rates.log())
        steps = torch.empty_like(self.dt_bias).uniform_(*(math.log(size) for size in STEP_SIZES)).exp()
        # The inverse of softplus.
        fill(self.dt_bias, steps + torch.log(-torch.expm1(-steps)))

    def new_cache(self) -> StateLayer:
        return RecurrentLayer()

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random states after `context` tokens, whose step repeats."""
        memory = (batch, self.value_heads, self.head_dim, self.value_dim)
        return filled_memory(memory, context, like, conv=self.conv)

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:
        """The name of the code that does the mixing."""
        return gated_delta_rule.path(device, dtype, K=self.head_dim, V=self.value_dim)
