"""Linear attention: weights that are products of features, added up into a memory that never fades."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from heddle.compose.cache import Call, RecurrentLayer, StateLayer
from heddle.compose.modules.features import FEATURES, feature_count
from heddle.compose.modules.memory import MEMORY, filled_memory, remember
from heddle.compose.modules.norm import RMSNorm
from heddle.compose.modules.precision import wide, wide_dtype
from heddle.compose.modules.rope import rotary_key, rotate
from heddle.compose.modules.short_conv import ShortConv
from heddle.compose.modules.site import Site
from heddle.kernels.simple_gla import simple_gla, simple_gla_step
from heddle.kernels.taylor_attention import normed, taylor_attention, taylor_attention_step


class LinearAttentionModule(nn.Module):
    """Linear attention whose weights sum to one.        (arXiv 2006.16236; `taylor2`: 2402.18668, 2510.11602)

        S_t = S_{t-1} + φ(k_t) [v_t; 1]ᵀ,   [n; z] = S_tᵀ φ(q_t),   y = W_o (n / z)

    q and k are normed by `qk_norm` and turned by `rope` before φ. Rows of `qkv_proj` and channels of the convolution stand in
    the order q, k, v. Features, sums and state are float32; `taylor2` takes q and k in the dtype of the model. Padding and what
    is not written weighs nothing.

    Shapes:  x, y: [B, T, D];  state: [B, H, F, V + 1] of F features;  `heads_out` sees [B, T, H, V]
    """

    takes_packed = True

    def __init__(
        self,
        site: Site,
        *,
        heads: int,
        head_dim: int,
        value_dim: int,
        feature: str,
        rope: Mapping[str, Any] | None,
        qk_norm: bool,
        short_conv: int | None,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.value_dim, self.feature = heads, head_dim, value_dim, feature
        self.sizes = (heads * head_dim, heads * head_dim, heads * value_dim)
        self.rotary = rotary_key(rope, head_dim)
        self.qkv_proj = nn.Linear(site.hidden_size, sum(self.sizes), bias=False)
        self.conv = None if short_conv is None else ShortConv(sum(self.sizes), short_conv)
        self.q_norm, self.k_norm = (
            RMSNorm(head_dim, site.norm_eps) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.heads_out = nn.Identity()
        self.o_proj = nn.Linear(heads * value_dim, site.hidden_size, bias=False)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        x = call.hide_padding(x)
        qkv = self.qkv_proj(x)
        qkv = qkv if self.conv is None else self.conv(qkv, call)
        q, k, v = (side.unflatten(-1, (self.heads, -1)) for side in qkv.split(self.sizes, dim=-1))
        q, k = (self._placed(norm(wide(side)), call) for side, norm in ((q, self.q_norm), (k, self.k_norm)))
        weight = call.hide_unwritten(call.hide_padding(q.new_ones(*x.shape[:2], 1)))
        mix = self._by_products if self.feature == "taylor2" else self._by_features
        y: Tensor = self.o_proj(self.heads_out(call.gated(mix(q, k, v, weight, call))).flatten(2))
        return y

    def _placed(self, x: Tensor, call: Call) -> Tensor:
        return x if self.rotary is None else rotate(x, call.rotary_tables(*self.rotary))

    def _by_products(self, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, call: Call) -> Tensor:
        """Shapes:  q, k: [B, T, H, K], wide;  v, out: [B, T, H, V];  weight: [B, T, 1]"""
        sides = (q.to(v.dtype), k.to(v.dtype), v)
        return remember(taylor_attention, taylor_attention_step, *sides, call=call, weight=weight[..., 0])

    def _by_features(self, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, call: Call) -> Tensor:
        """Shapes as `_by_products`."""
        q, k = (FEATURES[self.feature](x) for x in (q, k))
        values = wide(v)
        values = torch.cat((values, torch.ones_like(values[..., :1])), dim=-1) * weight[..., None]
        still = torch.zeros_like(values[..., 0])
        sums = remember(simple_gla, simple_gla_step, q, k, values, still, call=call, scale=1.0)
        return normed(sums).to(v.dtype)

    def new_cache(self) -> StateLayer:
        return RecurrentLayer()

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random states after `context` tokens, whose step repeats."""
        F, V = feature_count(self.feature, self.head_dim), self.value_dim
        cache = filled_memory((batch, self.heads, F, V + 1), context, like, conv=self.conv)
        # Sums of weights are above 0 for every query if they are those of a key.
        key = like.new_empty(batch, self.heads, self.head_dim, dtype=wide_dtype(like.dtype)).normal_()
        cache.states[MEMORY][..., -1] = FEATURES[self.feature](key)
        return cache

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:
        """The name of the code that does the mixing."""
        if self.feature == "taylor2":
            path = taylor_attention.path(device, dtype, K=self.head_dim, V=self.value_dim)
            if path == "triton":
                return path
        F = feature_count(self.feature, self.head_dim)
        return simple_gla.path(device, wide_dtype(dtype), K=F, V=self.value_dim + 1)
