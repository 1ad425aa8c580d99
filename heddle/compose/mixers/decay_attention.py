"""Linear attention with a fixed decay per head, in the Lightning and the RetNet form."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.cache import Call, RecurrentLayer, StateLayer
from heddle.compose.init import Initialised, fill
from heddle.compose.modules.memory import filled_memory, remember
from heddle.compose.modules.norm import RMSNorm
from heddle.compose.modules.precision import Float32Kept, wide
from heddle.compose.modules.rope import rotate
from heddle.compose.modules.short_conv import ShortConv
from heddle.compose.modules.site import Site
from heddle.kernels.decay_attention import decay_attention, decay_attention_step

ROPE_THETA = 1e4


class DecayAttentionModule(Initialised, Float32Kept):
    """Linear attention whose memory fades at a rate fixed per head (and, for Lightning, per layer).

        S_t = exp(log_decay) S_{t-1} + k_t v_tᵀ,   o_t = scale * S_tᵀ q_t

        lightning:  silu on q, k, v; scale 1;       y = W_o (rms over all heads(o) * sigmoid(W_g x))
        retnet:     RoPE on q, k;    scale K^-0.5;  y = W_o (rms per head(o) * silu(W_g x))

    (arXiv 2401.04658, 2307.08621.) Rows of `qkv_proj` and of the convolution stand in the order q, k, v. With
    `short_conv` a causal convolution comes before the recurrence (and before the activation).

    Shapes:  x, y: [B, T, D];  state: [B, H, K, K], float32;  `heads_out` sees [B, T, H, K]
    """

    takes_packed = True
    KEPT: ClassVar[tuple[str, ...]] = ("log_decay",)

    def __init__(self, site: Site, *, heads: int, head_dim: int, form: str, short_conv: int | None) -> None:
        super().__init__()
        self.site, self.heads, self.head_dim, self.form = site, heads, head_dim, form
        width = heads * head_dim
        self.scale = 1.0 if form == "lightning" else head_dim**-0.5
        self.qkv_proj = nn.Linear(site.hidden_size, 3 * width, bias=False)
        self.gate_proj = nn.Linear(site.hidden_size, width, bias=False)
        activation = "silu" if form == "lightning" else None
        self.conv = None if short_conv is None else ShortConv(3 * width, short_conv, activation=activation)
        self.norm = RMSNorm(width if form == "lightning" else head_dim, site.norm_eps)
        self.heads_out = nn.Identity()
        self.o_proj = nn.Linear(width, site.hidden_size, bias=False)
        # Not persistent: it follows from the config, and `initialise` fills it again after loading.
        self.register_buffer("log_decay", torch.empty(heads, dtype=torch.float32), persistent=False)
        self.log_decay: Tensor

    def forward(self, x: Tensor, call: Call) -> Tensor:
        x = call.hide_padding(x)
        qkv = self.qkv_proj(x)
        if self.conv is not None:
            qkv = self.conv(qkv, call)
        elif self.form == "lightning":
            qkv = F.silu(qkv)
        q, k, v = qkv.unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        if self.form == "retnet":
            tables = call.rotary_tables(self.head_dim // 2 * 2, ROPE_THETA)
            q, k = rotate(wide(q), tables).to(v.dtype), rotate(wide(k), tables).to(v.dtype)
        # A token that is not written adds nothing; the memory decays all the same.
        sides = (q, k, call.hide_unwritten(v), self.log_decay)
        o = remember(decay_attention, decay_attention_step, *sides, call=call, scale=self.scale)
        o = self._gated(o, self.gate_proj(x))
        y: Tensor = self.o_proj(self.heads_out(call.gated(o)).flatten(2))
        return y

    def _gated(self, o: Tensor, gate: Tensor) -> Tensor:
        """Norm, then gate.  Shapes:  o, out: [B, T, H, K];  gate: [B, T, H K]"""
        if self.form == "lightning":
            joint: Tensor = self.norm(o.flatten(2), gate, "sigmoid")
            return joint.view_as(o)
        per_head: Tensor = self.norm(o, gate.view_as(o))
        return per_head

    def initialise(self, std: float) -> None:  # noqa: ARG002 - the decays are fixed
        fill(self.log_decay, log_decays(self.form, self.heads, self.site))

    def new_cache(self) -> StateLayer:
        return RecurrentLayer()

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random states after `context` tokens, whose step repeats."""
        memory = (batch, self.heads, self.head_dim, self.head_dim)
        return filled_memory(memory, context, like, conv=self.conv)

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:
        """The name of the code that does the mixing."""
        return decay_attention.path(device, dtype, K=self.head_dim, V=self.head_dim)


def log_decays(form: str, heads: int, site: Site) -> Tensor:
    """The log of the decay of each head, always computed on the CPU.

        lightning:  -2^(-8 (h+1) / H) * (1 - l / (L - 1 + 1e-5) + 1e-5)        (MiniMax-01, arXiv 2501.08313)
        retnet:     log(1 - 2^(-5-h))

    Shapes:  out: [H], float64
    """
    head = torch.arange(heads, dtype=torch.float64, device="cpu")
    if form == "retnet":
        return torch.log1p(-torch.exp2(-5.0 - head))
    depth = 1.0 - site.layer_index / (site.layer_count - 1 + 1e-5) + 1e-5
    return -torch.exp2(-8.0 * (head + 1.0) / heads) * depth
