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


class LinearAttentionModule(nn.Module):
    """Linear attention whose weights sum to one.        (arXiv 2006.16236; `taylor2`: 2402.18668, 2510.11602)

        S_t = S_{t-1} + φ(k_t) [v_t; 1]ᵀ,   [n; z] = S_tᵀ φ(q_t),   y = W_o (n / z)

    q and k are normed by `qk_norm` and turned by `rope` before φ. Rows of `qkv_proj` and channels of the convolution stand in
    the order q, k, v. Features, sums and state are float32. Padding and what is not written weighs nothing.

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
        q, k, v = (wide(side.unflatten(-1, (self.heads, -1))) for side in qkv.split(self.sizes, dim=-1))
        q, k = self._features(self.q_norm(q), call), self._features(self.k_norm(k), call)
        weight = call.hide_unwritten(call.hide_padding(v.new_ones(*x.shape[:2], 1)))[..., None]
        v = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1) * weight
        sums = remember(
            simple_gla, simple_gla_step, q, k, v, torch.zeros_like(v[..., 0]), call=call, scale=1.0
        )
        # Where nothing is written yet both sums are 0, and so is their ratio.
        o = sums[..., :-1] / sums[..., -1:].clamp(min=torch.finfo(sums.dtype).tiny)
        y: Tensor = self.o_proj(self.heads_out(call.gated(o.to(x.dtype))).flatten(2))
        return y

    def _features(self, x: Tensor, call: Call) -> Tensor:
        """Shapes:  x: [B, T, H, K], wide;  out: [B, T, H, F]"""
        x = x if self.rotary is None else rotate(x, call.rotary_tables(*self.rotary))
        return FEATURES[self.feature](x)

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
        F = feature_count(self.feature, self.head_dim)
        return simple_gla.path(device, wide_dtype(dtype), K=F, V=self.value_dim + 1)
