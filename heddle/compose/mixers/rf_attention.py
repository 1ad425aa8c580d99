"""Attention whose queries and keys come from frozen random projections."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.cache import Call, KVLayer, PreallocatedKVLayer, StateLayer
from heddle.compose.init import Initialised, fill
from heddle.compose.modules.frozen import FrozenProjection
from heddle.compose.modules.in_view import attend_in_view, keys_so_far
from heddle.compose.modules.masks import View, distances, key_mask, real_keys
from heddle.compose.modules.precision import wide
from heddle.compose.modules.rope import rotary_key, rotate
from heddle.compose.modules.site import Site
from heddle.compose.modules.softmax import softmax_attention

# Below every sum of weights that is not 0 for want of a positive logit.
LEAST = 1e-6


class RfAttentionModule(Initialised):
    """Attention by random features: only values and output are trained.        (arXiv 2307.11353, 2506.01115)

        q = A_q x,  k = A_k x, both frozen;   l_ij = τ_h · scale · q_i · k_j,  j <= i;   y = W_o Σ_j p_ij v_j
        softmax: p = softmax_j(l)    relu: p = relu(l) / tokens so far    relu_norm: p = relu(l) / (ε + Σ_j relu(l))

    q and k turn by RoPE if `rope` says so. `detached` cuts the gradient that would reach x through them. The forms with a relu
    hold their weights [B, H, T, S] in memory, in float32. Padding and what is not written has no weight, and is not counted.

    Shapes:  x, y: [B, T, D];  `heads_out` sees [B, T, H, d]
    """

    def __init__(
        self,
        site: Site,
        *,
        heads: int,
        head_dim: int,
        score: str,
        key_noise: float,
        scale: float,
        learned_scale: bool,
        rope: Mapping[str, Any] | None,
        detached: bool,
        seed: int,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.score, self.scale = heads, head_dim, score, scale
        self.rotary, self.detached = rotary_key(rope, head_dim), detached
        frozen = partial(FrozenProjection, site, heads=heads, head_dim=head_dim, seed=seed)
        self.q_proj, self.k_proj = frozen(noise=0.0), frozen(noise=key_noise)
        self.v_proj = nn.Linear(site.hidden_size, heads * head_dim, bias=False)
        self.temperature = nn.Parameter(torch.empty(heads)) if learned_scale else None
        self.heads_out = nn.Identity()
        self.o_proj = nn.Linear(heads * head_dim, site.hidden_size, bias=False)

    def initialise(self, std: float) -> None:  # noqa: ARG002 - a factor that changes nothing
        if self.temperature is not None:
            fill(self.temperature, torch.ones(self.heads))

    @property
    def takes_packed(self) -> bool:
        return self.score == "softmax"

    def forward(self, x: Tensor, call: Call) -> Tensor:
        source = x.detach() if self.detached else x
        q, k = (self._turned(proj(source), call) for proj in (self.q_proj, self.k_proj))
        if self.temperature is not None:
            q = q * wide(self.temperature)[:, None]
        v = self.v_proj(x).view(*x.shape[:2], self.heads, -1)
        q, k, v = (side.to(v.dtype).transpose(1, 2) for side in (q, k, v))
        held = keys_so_far(k, v, call)
        if self.score == "softmax":
            o = attend_in_view(q, held, call, View(), partial(softmax_attention, scale=self.scale))
        else:
            o = self._by_relu(q, held, call)
        y: Tensor = self.o_proj(self.heads_out(call.gated(o.transpose(1, 2))).flatten(2))
        return y

    def _turned(self, x: Tensor, call: Call) -> Tensor:
        """Shapes:  x, out: [B, T, H, d], out wide"""
        x = wide(x)
        return x if self.rotary is None else rotate(x, call.rotary_tables(*self.rotary))

    def _by_relu(self, q: Tensor, held: tuple[Tensor, Tensor, Tensor | None], call: Call) -> Tensor:
        """Shapes:  q, out: [B, H, T, d];  held: as `keys_so_far` gives it"""
        k, v, written = held
        distance = distances(q.shape[2], k.shape[2], q.device)
        seen = wide(key_mask(distance, View(), real_keys(call, k.shape[2])).to(v.dtype))
        if written is not None:
            # The own key is seen whether it is written or not.
            seen = seen * torch.where(distance == 0, 1.0, written[:, None, None].to(seen.dtype))
        weight = F.relu(wide(q @ k.mT) * self.scale) * seen
        whole = seen if self.score == "relu" else weight
        total = whole.sum(dim=-1, keepdim=True) + (0.0 if self.score == "relu" else LEAST)
        return (weight / total).to(v.dtype) @ v

    def new_cache(self) -> StateLayer:
        return KVLayer()

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random keys and values after `context` tokens, whose step repeats in place."""
        shape = (batch, self.heads, context + 1, self.head_dim)
        keys, values = like.new_empty(shape).normal_(), like.new_empty(shape).normal_()
        return PreallocatedKVLayer(keys, values, context=context)

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:  # noqa: ARG002
        """The name of the code that does the mixing."""
        return "sdpa" if self.score == "softmax" else "torch"
