"""Lightning attention: linear attention with a fixed decay for each head and layer, as MiniMax-01 has it."""

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


class LightningModule(Initialised, Float32Kept):
    """Linear attention whose memory fades at a rate fixed for each head and layer.        (arXiv 2401.04658, 2501.08313)

        S_t = exp(log_decay) S_{t-1} + k_t v_tᵀ,   o_t = S_tᵀ q_t,   q, k, v = silu(W x)
        y = W_o (rms over all heads(o) * sigmoid(W_g x))

    Without an `activation` there is no silu; `qk_norm` norms each head of q and k, which then turn by `rope`, `{"theta",
    "fraction"}` and perhaps "scaling", or None (HypeNet, arXiv 2601.22156).

    Rows of `qkv_proj`, and channels of the convolution if there is one (it comes before the SiLU), stand head by head, in each
    in the order q, k, v: the layout of MiniMax.

    Shapes:  x, y: [B, T, D];  state: [B, H, K, K], float32;  `heads_out` sees [B, T, H, K]
    """

    takes_packed = True
    KEPT: ClassVar[tuple[str, ...]] = ("log_decay",)

    def __init__(
        self,
        site: Site,
        *,
        heads: int,
        head_dim: int,
        slopes: str,
        short_conv: int | None,
        norm_eps: float,
        activation: str = "silu",
        qk_norm: bool = False,
        rope: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.site, self.heads, self.head_dim, self.slopes = site, heads, head_dim, slopes
        width = heads * head_dim
        self.qkv_proj = nn.Linear(site.hidden_size, 3 * width, bias=False)
        self.gate_proj = nn.Linear(site.hidden_size, width, bias=False)
        self.conv = None if short_conv is None else ShortConv(3 * width, short_conv)
        self.activation, self.rotary = activation, rotary_key(rope, head_dim)
        self.q_norm, self.k_norm = (RMSNorm(head_dim, site.norm_eps) if qk_norm else None for _ in range(2))
        self.norm = RMSNorm(width, norm_eps)
        self.heads_out = nn.Identity()
        self.o_proj = nn.Linear(width, site.hidden_size, bias=False)
        # Not persistent: it follows from the config, and `initialise` fills it again after loading.
        self.register_buffer("log_decay", torch.empty(heads, dtype=torch.float32), persistent=False)
        self.log_decay: Tensor

    def forward(self, x: Tensor, call: Call) -> Tensor:
        x = call.hide_padding(x)
        qkv = self.qkv_proj(x)
        if self.activation == "silu":
            qkv = F.silu(qkv) if self.conv is None else self.conv(qkv, call)
        q, k, v = qkv.unflatten(-1, (self.heads, 3, self.head_dim)).unbind(3)
        q, k = self._placed(q, self.q_norm, call), self._placed(k, self.k_norm, call)
        # A token that is not written adds nothing; the memory decays all the same.
        sides = (q, k, call.hide_unwritten(v), self.log_decay)
        o = remember(decay_attention, decay_attention_step, *sides, call=call, scale=1.0)
        o = self.norm(o.flatten(2), self.gate_proj(x), "sigmoid").view_as(o)
        y: Tensor = self.o_proj(self.heads_out(call.gated(o)).flatten(2))
        return y

    def _placed(self, x: Tensor, norm: nn.Module | None, call: Call) -> Tensor:
        """Norm and rotation, in float32, rounded once.  Shapes:  x, out: [B, T, H, K]"""
        y = x if norm is None else norm(wide(x))
        if self.rotary is not None:
            y = rotate(wide(y), call.rotary_tables(*self.rotary))
        return y.to(x.dtype)

    def initialise(self, std: float) -> None:  # noqa: ARG002 - the decays are fixed
        fill(self.log_decay, log_decays(self.slopes, self.heads, self.site))

    def new_cache(self) -> StateLayer:
        return RecurrentLayer()

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random states after `context` tokens, whose step repeats."""
        memory = (batch, self.heads, self.head_dim, self.head_dim)
        return filled_memory(memory, context, like, conv=self.conv)

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:
        """The name of the code that does the mixing."""
        return decay_attention.path(device, dtype, K=self.head_dim, V=self.head_dim)


def log_decays(slopes: str, heads: int, site: Site) -> Tensor:
    """The log of the decay of each head in one of the published tables, always computed on the CPU.

        geometric   -2^(-8 (h+1) / H) (1 - l / (L - 1 + 1e-5) + 1e-5)        (MiniMax-Text-01, arXiv 2501.08313)
        linear      -(8 h / H) (1 - l / L)                                   (TransNormerLLM, arXiv 2307.14995)
        alibi       -2^(-8 (h+1) / H)                                        (HypeNet, arXiv 2601.22156)

    Shapes:  out: [H], float64
    """
    head = torch.arange(heads, dtype=torch.float64, device="cpu")
    if slopes == "linear":
        return -8.0 * head / heads * (1.0 - site.layer_index / site.layer_count)
    depth = 1.0 if slopes == "alibi" else 1.0 - site.layer_index / (site.layer_count - 1 + 1e-5) + 1e-5
    return -torch.exp2(-8.0 * (head + 1.0) / heads) * depth
