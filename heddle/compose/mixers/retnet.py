"""RetNet: retention, linear attention with rotary positions and a decay fixed for each head or gated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.cache import Call, RecurrentLayer, StateLayer
from heddle.compose.init import Initialised, fill
from heddle.compose.modules.memory import filled_memory, remember
from heddle.compose.modules.norm import RMSNorm
from heddle.compose.modules.precision import Float32Kept, wide
from heddle.compose.modules.rope import rotary_key, rotate
from heddle.compose.modules.short_conv import ShortConv
from heddle.compose.modules.site import Site
from heddle.kernels.decay_attention import decay_attention, decay_attention_step
from heddle.kernels.simple_gla import simple_gla, simple_gla_step

# A gate is the sixteenth root of a sigmoid, so that it begins near 1 (arXiv 2405.05254).
ROOT = 16.0


class RetNetModule(Initialised, Float32Kept):
    """Multi-scale retention, or with `decay` "gate" gated retention.        (arXiv 2307.08621, 2405.05254)

        q, k turned by RoPE;   S_t = exp(log_decay) S_{t-1} + k_t v_tᵀ,   o_t = S_tᵀ q_t / sqrt(K)
        y = W_o (rms of each head(o) * silu(W_g x));   log_decay is fixed, or log sigmoid(W x_t) / 16

    Rows of `qkv_proj` and channels of the convolution, which comes before the rotation, stand in the order q, k, v. `rope` is
    `{"theta", "fraction"}` and perhaps "scaling", or None.

    Shapes:  x, y: [B, T, D];  state: [B, H, K, V], float32;  `heads_out` sees [B, T, H, V]
    """

    takes_packed = True
    KEPT: ClassVar[tuple[str, ...]] = ("log_decay",)

    def __init__(
        self,
        site: Site,
        *,
        heads: int,
        head_dim: int,
        value_dim: int,
        rope: Mapping[str, Any] | None,
        short_conv: int | None,
        decay: str = "fixed",
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.value_dim = heads, head_dim, value_dim
        self.sizes = (heads * head_dim, heads * head_dim, heads * value_dim)
        self.rotary = rotary_key(rope, head_dim)
        self.qkv_proj = nn.Linear(site.hidden_size, sum(self.sizes), bias=False)
        self.gate_proj = nn.Linear(site.hidden_size, heads * value_dim, bias=False)
        self.conv = None if short_conv is None else ShortConv(sum(self.sizes), short_conv)
        self.norm = RMSNorm(value_dim, site.norm_eps)
        self.heads_out = nn.Identity()
        self.o_proj = nn.Linear(heads * value_dim, site.hidden_size, bias=False)
        if decay == "gate":
            self.decay_proj = nn.Linear(site.hidden_size, heads, bias=False)
        # Not persistent: it follows from the config, and `initialise` fills it again after loading. None where there are gates.
        fixed = None if decay == "gate" else torch.empty(heads, dtype=torch.float32)
        self.register_buffer("log_decay", fixed, persistent=False)
        self.log_decay: Tensor | None

    def forward(self, x: Tensor, call: Call) -> Tensor:
        x = call.hide_padding(x)
        qkv = self.qkv_proj(x)
        qkv = qkv if self.conv is None else self.conv(qkv, call)
        q, k, v = (side.unflatten(-1, (self.heads, -1)) for side in qkv.split(self.sizes, dim=-1))
        # A token that is not written adds nothing; the memory decays all the same.
        sides = (self._turned(q, call), self._turned(k, call), call.hide_unwritten(v))
        if self.log_decay is None:
            gates = F.logsigmoid(wide(self.decay_proj(x))) / ROOT
            o = remember(simple_gla, simple_gla_step, *sides, gates, call=call)
        else:
            o = remember(decay_attention, decay_attention_step, *sides, self.log_decay, call=call)
        o = self.norm(o, self.gate_proj(x).view_as(o))
        y: Tensor = self.o_proj(self.heads_out(call.gated(o)).flatten(2))
        return y

    def _turned(self, x: Tensor, call: Call) -> Tensor:
        return x if self.rotary is None else rotate(wide(x), call.rotary_tables(*self.rotary)).to(x.dtype)

    def initialise(self, std: float) -> None:  # noqa: ARG002 - the decays are fixed
        if self.log_decay is not None:
            fill(self.log_decay, log_decays(self.heads))

    def new_cache(self) -> StateLayer:
        return RecurrentLayer()

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random states after `context` tokens, whose step repeats."""
        memory = (batch, self.heads, self.head_dim, self.value_dim)
        return filled_memory(memory, context, like, conv=self.conv)

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:
        """The name of the code that does the mixing."""
        op = simple_gla if self.log_decay is None else decay_attention
        return op.path(device, dtype, K=self.head_dim, V=self.value_dim)


def log_decays(heads: int) -> Tensor:
    """log(1 - 2^(-5-h)) of each head h from 0, always computed on the CPU.

    Shapes:  out: [H], float64
    """
    return torch.log1p(-torch.exp2(-5.0 - torch.arange(heads, dtype=torch.float64, device="cpu")))
