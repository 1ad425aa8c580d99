"""Multi-head latent attention: softmax attention whose keys and values are made from a short vector, which alone is cached."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from heddle.compose.cache import Call, KVLayer, PreallocatedKVLayer, StateLayer
from heddle.compose.modules.head_mix import HeadMix
from heddle.compose.modules.in_view import attend_in_view, keys_so_far
from heddle.compose.modules.masks import View, distances, key_mask, real_keys
from heddle.compose.modules.norm import RMSNorm
from heddle.compose.modules.precision import wide
from heddle.compose.modules.rope import rotary_key, rotate
from heddle.compose.modules.rows import RowsOut
from heddle.compose.modules.site import Site
from heddle.compose.modules.softmax import softmax_attention, softmax_weights
from heddle.compose.modules.stretches import is_long

# Keys and values, or latents and what turns, and which keys are written: as `keys_so_far` has them; with queries before them.
Keys = tuple[Tensor, Tensor, Tensor | None]
Sides = tuple[Tensor, Tensor, Tensor, Tensor | None]


class MlaModule(nn.Module):
    """Softmax attention over latents.        (DeepSeek-V2, arXiv 2405.04434; without positions Kimi Linear, 2510.26692)

        c = rms(W_c x),  r = rope(W_r x);   k_h = (K_h c, r),  v_h = V_h c;   q_h = (W_qh x, rope(W_sh x))
        o_ih = sum_j softmax_j(scale · q_ih · k_jh) v_jh,  j <= i,  i - j < window;   y = W_o o

    Computed in one of two ways, which are equal. Expanded, as written. Absorbed, where keys are many more than queries:

        q_ih · k_jh = (K_hᵀ W_qh x_i) · c_j + rope(W_sh x_i) · r_j,   o_ih = V_h (sum_j p_ijh c_j)

    so that decoding reads the latents, and never makes a key or a value of an earlier token. Rows of `kv_up` stand head by
    head, in each first those of the key, then those of the value; rows of a query the part that turns last.

    Shapes:  x, y: [B, T, D];  cache: c [B, 1, S, kv_lora_rank] as keys, r [B, 1, S, qk_rope_head_dim] as values;
             `heads_out` sees [B, T, H, v_head_dim], `rows_out` [B, H, queries, S]
    """

    def __init__(
        self,
        site: Site,
        *,
        heads: int,
        q_lora_rank: int | None,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        rope: Mapping[str, Any] | None,
        window: int | None,
        scale: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.heads, self.scale, self.view = heads, scale, View(window)
        self.rank, self.plain, self.shared, self.value = (
            kv_lora_rank,
            qk_nope_head_dim,
            qk_rope_head_dim,
            v_head_dim,
        )
        self.rotary = rotary_key(rope, qk_rope_head_dim)
        queries = heads * (qk_nope_head_dim + qk_rope_head_dim)
        made_of = site.hidden_size if q_lora_rank is None else q_lora_rank
        self.q_down = None if q_lora_rank is None else nn.Linear(site.hidden_size, q_lora_rank, bias=False)
        self.q_norm = None if q_lora_rank is None else RMSNorm(q_lora_rank, norm_eps)
        self.q_proj = nn.Linear(made_of, queries, bias=False)
        self.kv_down = nn.Linear(site.hidden_size, kv_lora_rank + qk_rope_head_dim, bias=False)
        self.kv_norm = RMSNorm(kv_lora_rank, norm_eps)
        self.kv_up = nn.Linear(kv_lora_rank, heads * (qk_nope_head_dim + v_head_dim), bias=False)
        self.heads_out, self.rows_out, self.head_mix = nn.Identity(), RowsOut(), HeadMix()
        self.o_proj = nn.Linear(heads * v_head_dim, site.hidden_size, bias=False)

    @property
    def takes_packed(self) -> bool:
        return self.rows_out.queries is None

    def forward(self, x: Tensor, call: Call) -> Tensor:
        q = x if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x))
        q, turning = self.q_proj(q).unflatten(-1, (self.heads, -1)).split((self.plain, self.shared), dim=-1)
        turning = self._turned(turning, call)
        if self._makes_again(x.shape[1], call):
            made = checkpoint(self._made, x, call, use_reentrant=False, preserve_rng_state=False)
            o = self._attend((torch.cat((q, turning), -1).transpose(1, 2), *made), call)
            o = self.head_mix(o, made[1])
        else:
            o = self._read(q, turning, self._held(x, call), call)
        y: Tensor = self.o_proj(self.heads_out(call.gated(o.transpose(1, 2))).flatten(2))
        return y

    def _read(self, q: Tensor, turning: Tensor, held: Keys, call: Call) -> Tensor:
        """What queries read of latents, in the cheaper way.  Shapes:  q, turning: [B, T, H, *];  out: [B, H, T, v_head_dim]"""
        q, turning, tokens = q.transpose(1, 2), turning.transpose(1, 2), q.shape[1]
        if self._absorbs(tokens, held[0].shape[2]):
            weight = self.kv_up.weight.view(self.heads, -1, self.rank)
            keys, values = torch.split(weight, [self.plain, self.value], dim=1)
            c, r, written = held
            o = self._attend((torch.cat((q @ keys, turning), -1), torch.cat((c, r), -1), c, written), call)
            o = o @ values.mT
        else:
            o = self._attend((torch.cat((q, turning), -1), *self._expanded(*held)), call)
        if self.head_mix.share is not None:
            own = self.kv_up(held[0][:, 0, -tokens:]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            o = self.head_mix(o, own[..., self.plain :])
        return o

    def _held(self, x: Tensor, call: Call) -> Keys:
        """The latents of all tokens so far, and what of their keys turns, as the cache has them."""
        c, r = self.kv_down(x).split((self.rank, self.shared), dim=-1)
        r = self._turned(r[:, :, None], call).transpose(1, 2)
        return keys_so_far(self.kv_norm(c)[:, None], r, call)

    def _made(self, x: Tensor, call: Call) -> Keys:
        """Keys and values of each head, of the call's tokens."""
        return self._expanded(*self._held(x, call))

    def _makes_again(self, tokens: int, call: Call) -> bool:
        """Whether the gradient finds no latents: their product, norm and turn are worked out again."""
        return call.cache is None and is_long(tokens) and not self._absorbs(tokens, tokens)

    def _absorbs(self, queries: int, keys: int) -> bool:
        """Whether it is fewer FLOPs to bring the queries to the latents than the latents to the queries."""
        both = self.plain + self.value
        return queries * keys * (2 * self.rank - both) < (keys - queries) * self.rank * both

    def _turned(self, x: Tensor, call: Call) -> Tensor:
        """Shapes:  x, out: [B, T, H or 1, qk_rope_head_dim]"""
        return x if self.rotary is None else rotate(wide(x), call.rotary_tables(*self.rotary)).to(x.dtype)

    def _expanded(self, c: Tensor, r: Tensor, written: Tensor | None) -> Keys:
        """The keys and values of each head.  Shapes:  c: [B, 1, S, kv_lora_rank];  r: [B, 1, S, qk_rope_head_dim]"""
        both = self.kv_up(c[:, 0]).unflatten(-1, (self.heads, -1))
        keys, values = both.split((self.plain, self.value), dim=-1)
        keys = torch.cat((keys, r.transpose(1, 2).expand(-1, -1, self.heads, -1)), dim=-1)
        # A view would keep the keys a second time.
        return keys.transpose(1, 2), values.contiguous().transpose(1, 2), written

    def _attend(self, sides: Sides, call: Call) -> Tensor:
        """Shapes:  q: [B, H, T, d];  k: [B, H or 1, S, d];  v: [B, H or 1, S, V];  out: [B, H, T, V]"""
        q, k, v, written = sides
        if self.rows_out.queries is not None:
            self.rows_out(self._rows(sides, call))
        attend = partial(softmax_attention, scale=self.scale)
        return attend_in_view(q, (k, v, written), call, self.view, attend)

    def _rows(self, sides: Sides, call: Call) -> Tensor:
        """The weights of the queries that `rows_out` asks for, over all keys.  Shapes:  out: [B, H, queries, S]"""
        q, k, _, written = sides
        rows = self.rows_out.places(q.shape[2])
        distance = distances(q.shape[2], k.shape[2], q.device)[rows]
        marks = None if written is None else written[:, None, None]
        mask = key_mask(distance, self.view, real_keys(call, k.shape[2]), written=marks)
        mask = mask if mask.dim() == 4 else mask[None, None]
        return softmax_weights(q[:, :, rows], k, mask, scale=self.scale).flatten(1, 2)

    def new_cache(self) -> StateLayer:
        return KVLayer(self.view.window)

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random latents after `context` tokens, whose step repeats in place."""
        window = self.view.window
        slots = 1 + (context if window is None else min(context, window - 1))
        c, r = (like.new_empty(batch, 1, slots, size).normal_() for size in (self.rank, self.shared))
        return PreallocatedKVLayer(c, r, context=context, window=window)

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:  # noqa: ARG002
        """The name of the code that does the mixing."""
        return "sdpa"
