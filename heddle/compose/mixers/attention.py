"""Softmax attention with grouped heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.cache import Call, KVLayer, PreallocatedKVLayer, StateLayer
from heddle.compose.modules.band import banded_attention, block_length
from heddle.compose.modules.norm import RMSNorm
from heddle.compose.modules.precision import wide
from heddle.compose.modules.rope import rotate
from heddle.compose.modules.site import Site


class AttentionModule(nn.Module):
    """Causal softmax attention.        (GQA: arXiv 2305.13245; RoPE: 2104.09864; output gate: 2505.06708)

        o_i = sum_j softmax_j(q_i · k_j / sqrt(d)) v_j,  j <= i,  i - j < window
        y   = W_o (o * sigmoid(gate))

    `qk_norm` norms each head of q and k before the rotation. `rope` is `{"theta", "fraction"}`, or None for
    no positions. With `gate`, each head of `q_proj` holds d query rows, then d gate rows. A window counts the
    current token.

    Shapes:  x, y: [B, T, D];  `heads_out` sees [B, T, H, d]
    """

    def __init__(
        self,
        site: Site,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rope: dict[str, float] | None,
        qk_norm: bool,
        gate: bool,
        window: int | None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.window, self.gate = (
            heads,
            kv_heads,
            head_dim,
            window,
            gate,
        )
        # Features turn in pairs.
        turned = 0 if rope is None else int(rope["fraction"] * head_dim) // 2 * 2
        self.rotary = None if rope is None or turned == 0 else (turned, float(rope["theta"]))
        self.q_proj = nn.Linear(site.hidden_size, heads * head_dim * (2 if gate else 1), bias=False)
        self.k_proj = nn.Linear(site.hidden_size, kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(site.hidden_size, kv_heads * head_dim, bias=False)
        self.q_norm = RMSNorm(head_dim, site.norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, site.norm_eps) if qk_norm else None
        self.heads_out = nn.Identity()
        self.o_proj = nn.Linear(heads * head_dim, site.hidden_size, bias=False)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (self.heads, -1))
        k = self.k_proj(x).unflatten(-1, (self.kv_heads, -1))
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, -1))
        q, *gate = q.chunk(2, dim=-1) if self.gate else (q,)
        q, k = self._place(q, self.q_norm, call), self._place(k, self.k_norm, call)
        o = self._attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), call).transpose(1, 2)
        if gate:
            o = o * torch.sigmoid(gate[0])
        y: Tensor = self.o_proj(self.heads_out(call.gated(o)).flatten(2))
        return y

    def _place(self, x: Tensor, norm: nn.Module | None, call: Call) -> Tensor:
        """QK-norm and rotation, both in float32, rounded once."""
        if norm is None and self.rotary is None:
            return x
        y = wide(x)
        y = y if norm is None else norm(y)
        y = y if self.rotary is None else rotate(y, call.rotary_tables(*self.rotary))
        return y.to(x.dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Shapes:  q, out: [B, H, T, d];  k, v: [B, KV heads, T, d]"""
        if call.cache is not None:
            k, v = call.cache.update(k, v)
        if self.window is not None and q.shape[2] > 2 * block_length(self.window):
            real = None if call.key_padding is None else call.key_padding[:, -k.shape[2] :]
            return banded_attention(q, k, v, window=self.window, real=real)
        mask = attention_mask(call, q.shape[2], k.shape[2], self.window)
        grouped = self.heads != self.kv_heads
        # A branch, not an argument: under a compiler with dynamic shapes the condition is symbolic.
        if mask is None and q.shape[2] > 1:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)

    def new_cache(self) -> StateLayer:
        return KVLayer(self.window)

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random keys and values after `context` tokens, whose step repeats in place."""
        held = context if self.window is None else min(context, self.window - 1)
        shape = (batch, self.kv_heads, held + 1, self.head_dim)
        keys, values = like.new_empty(shape).normal_(), like.new_empty(shape).normal_()
        return PreallocatedKVLayer(keys, values, context=context, window=self.window)

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:  # noqa: ARG002
        """The name of the code that does the mixing."""
        return "sdpa"


def attention_mask(call: Call, queries: int, keys: int, window: int | None) -> Tensor | None:
    """Which of the last `keys` tokens each of the last `queries` may see.

    None if a plain causal mask says it all. A query always sees itself, padding or not: a row that sees
    nothing has no softmax.

    Shapes:  out: [1 or B, 1, queries, keys] bool
    """
    sees_all = queries == 1 or queries == keys
    if call.key_padding is None and sees_all and (window is None or keys <= window):
        return None
    return call.once(("mask", queries, keys, window), lambda: _mask(call, queries, keys, window))


def _mask(call: Call, queries: int, keys: int, window: int | None) -> Tensor:
    device = call.positions.device
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None]
    seen = key <= query
    if window is not None:
        seen = seen & (query - key < window)
    if call.key_padding is None:
        return seen[None, None]
    real = call.key_padding[:, -keys:]
    return ((seen & real[:, None]) | (key == query))[:, None]
