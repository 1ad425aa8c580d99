"""Local linear attention: softmax attention that fits a line where softmax takes a mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.cache import Call, KVLayer, PreallocatedKVLayer, StateLayer
from heddle.compose.init import Initialised, fill
from heddle.compose.modules.in_view import keys_so_far
from heddle.compose.modules.norm import RMSNorm
from heddle.compose.modules.precision import wide
from heddle.compose.modules.rope import rotary_key, rotate
from heddle.compose.modules.site import Site
from heddle.kernels.local_linear_attention import local_linear_attention


class LocalLinearAttentionModule(Initialised):
    """Local linear attention, and with a learned slope its relative without a solve.        (arXiv 2510.01450, 2605.29157)

        p_j = softmax_j(q_i · k_j / sqrt(d)),   x_i = (Cov_p(k) + ridge I)⁻¹ (q_i - E_p[k]), or -W_r u_i turned as q_i
        o_i = sum_j p_j (1 + (k_j - E_p[k]) · x_i) v_j;   y = W_o o

    `qk_norm` norms each head of q and k before the rotation, in float32, rounded once; a learned slope has no norm, and begins
    as 0, which is softmax attention. `rope` is `{"theta", "fraction"}` and perhaps "scaling", or None. A window counts the
    current token.

    Shapes:  u, y: [B, T, D];  `slope_weight`: [H d, D];  cached keys, values: [B, KV heads, S, d];  `heads_out` sees [B, T, H, d]
    """

    takes_packed = True

    def __init__(
        self,
        site: Site,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rope: Mapping[str, Any] | None,
        qk_norm: bool,
        slope: str,
        ridge: float,
        window: int | None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.rotary, self.ridge, self.window = rotary_key(rope, head_dim), ridge, window
        self.q_proj = nn.Linear(site.hidden_size, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(site.hidden_size, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(site.hidden_size, kv_heads * head_dim, bias=False)
        made = torch.empty(heads * head_dim, site.hidden_size) if slope == "learned" else None
        self.slope_weight = None if made is None else nn.Parameter(made)
        self.q_norm = RMSNorm(head_dim, site.norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, site.norm_eps) if qk_norm else None
        self.heads_out = nn.Identity()
        self.o_proj = nn.Linear(heads * head_dim, site.hidden_size, bias=False)

    def forward(self, u: Tensor, call: Call) -> Tensor:
        q = self._placed(self.q_proj(u), self.heads, self.q_norm, call)
        k = self._placed(self.k_proj(u), self.kv_heads, self.k_norm, call)
        v = self.v_proj(u).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        slope = None
        if self.slope_weight is not None:
            slope = self._placed(F.linear(u, self.slope_weight), self.heads, None, call)
        k, v, written = keys_so_far(k, v, call)
        real = None if call.key_padding is None else call.key_padding[:, -k.shape[2] :] > 0
        o = local_linear_attention(
            q,
            k,
            v,
            slope=slope,
            ridge=self.ridge,
            window=self.window,
            real=real,
            written=written,
            cu_seqlens=call.cu_seqlens,
        )
        y: Tensor = self.o_proj(self.heads_out(call.gated(o.transpose(1, 2))).flatten(2))
        return y

    def _placed(self, x: Tensor, heads: int, norm: nn.Module | None, call: Call) -> Tensor:
        """Shapes:  x: [B, T, heads d];  out: [B, heads, T, d]"""
        x = x.view(*x.shape[:2], heads, self.head_dim)
        y = x if norm is None else norm(wide(x))
        if self.rotary is not None:
            y = rotate(wide(y), call.rotary_tables(*self.rotary))
        return y.to(x.dtype).transpose(1, 2)

    def initialise(self, std: float) -> None:  # noqa: ARG002 - a slope begins as that of softmax attention
        if self.slope_weight is not None:
            fill(self.slope_weight, torch.zeros_like(self.slope_weight))

    def new_cache(self) -> StateLayer:
        return KVLayer(self.window)

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random keys and values after `context` tokens, whose step repeats in place."""
        held = context if self.window is None else min(context, self.window - 1)
        shape = (batch, self.kv_heads, held + 1, self.head_dim)
        keys, values = like.new_empty(shape).normal_(), like.new_empty(shape).normal_()
        return PreallocatedKVLayer(keys, values, context=context, window=self.window)

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:
        """The name of the code that does the mixing."""
        return local_linear_attention.path(device, dtype, K=self.head_dim, V=self.head_dim)
