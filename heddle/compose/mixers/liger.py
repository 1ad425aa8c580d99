"""Liger: the weights of softmax attention as a gated linear recurrence, beside a short window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.cache import (
    Call,
    CompositeLayer,
    PreallocatedKVLayer,
    RecurrentLayer,
    StateLayer,
)
from heddle.compose.modules.in_view import attend_in_view, keys_so_far
from heddle.compose.modules.masks import View
from heddle.compose.modules.memory import filled_memory, remember
from heddle.compose.modules.norm import RMSNorm
from heddle.compose.modules.precision import wide
from heddle.compose.modules.rope import rotary_key, rotate
from heddle.compose.modules.site import Site
from heddle.compose.modules.sliding import attend_sliding, has_kernels, slides
from heddle.compose.modules.softmax import softmax_attention
from heddle.compose.modules.stretches import in_stretches
from heddle.compose.sink_cache import kept_tokens, new_layer
from heddle.kernels.gla import gla, gla_step

# The gate is the sixteenth root of a sigmoid (arXiv 2503.01496, as arXiv 2312.06635 has it).
ROOT = 16.0
WINDOW = "window"


class LigerModule(nn.Module):
    """Gated linear attention and windowed softmax attention by one set of projections.        (arXiv 2503.01496)

        S = diag(a) S + softmax(k) vᵀ,   r = Sᵀ softmax(q),   log a = log sigmoid(k) / 16
        y = W_o (share · r + (1 - share) · softmax attention of the turned q over the last `window` turned k and v)

    In view are the last `window` tokens and the first `sink_tokens`. The softmaxes of the recurrence are over a head's
    dimensions. Its keys, gates and values are repeated for the query heads of a group. Projections and norms bear the names of
    `AttentionModule`. Gates and state are float32. Training works the recurrence of long sequences out again,
    not that of packed documents.

    Shapes:  x, y: [B, T, D];  state: [B, H, d, d], and the window's keys and values;  `heads_out` sees [B, T, H, d]
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
        bias: str,
        window: int | None,
        share: float,
        sink_tokens: int = 0,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.share = heads, kv_heads, head_dim, share
        self.view, self.rotary = View(window, sinks=sink_tokens), rotary_key(rope, head_dim)
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(site.hidden_size, count * head_dim, bias=bias != "none")
            for count in (heads, kv_heads, kv_heads)
        )
        self.q_norm, self.k_norm = (
            RMSNorm(head_dim, site.norm_eps) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.heads_out = nn.Identity()
        self.o_proj = nn.Linear(heads * head_dim, site.hidden_size, bias=bias == "all")

    def forward(self, x: Tensor, call: Call) -> Tensor:
        sides = ((self.q_proj, self.heads), (self.k_proj, self.kv_heads), (self.v_proj, self.kv_heads))
        q, k, v = (proj(x).unflatten(-1, (count, -1)) for proj, count in sides)
        q, k = self.q_norm(wide(q)), self.k_norm(wide(k))
        o = self._recurrence(q, k, v, call)
        if self.share < 1.0:
            o = self.share * o + (1.0 - self.share) * self._window(q, k, v, call)
        y: Tensor = self.o_proj(self.heads_out(call.gated(o)).flatten(2))
        return y

    def _recurrence(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Shapes:  q, out: [B, T, H, d];  k, v: [B, T, KV heads, d];  q and k wide, out as v"""
        # What is padding or not written adds nothing; the memory decays all the same.
        v = call.hide_padding(call.hide_unwritten(v).flatten(2)).view_as(v)
        return remember(self._recalled, self._recalled_step, q, k, v, call=call)

    def _recalled(
        self, q: Tensor, k: Tensor, v: Tensor, *, initial_state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        def part(state: Tensor | None, *sides: Tensor) -> tuple[Tensor, Tensor]:
            return gla(*self._sides(*sides), scale=1.0, initial_state=state, cu_seqlens=cu_seqlens)

        # Stretches would cut documents in two.
        if cu_seqlens is not None:
            return part(None, q, k, v)
        return in_stretches(part, initial_state, (q, k, v))

    def _recalled_step(self, q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return gla_step(*self._sides(q, k, v), state, scale=1.0)

    def _sides(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values and log-decays of all query heads."""
        sides = (torch.softmax(k, dim=-1).to(v.dtype), v, F.logsigmoid(k) / ROOT)
        group = self.heads // self.kv_heads
        key, value, log_decay = (side.repeat_interleave(group, dim=2) for side in sides)
        return torch.softmax(q, dim=-1).to(v.dtype), key, value, log_decay

    def _window(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Shapes:  as those of `_recurrence`"""
        if self.rotary is not None:
            tables = call.rotary_tables(*self.rotary)
            q, k = rotate(q, tables), rotate(k, tables)
        q, k, v = (side.to(v.dtype).transpose(1, 2) for side in (q, k, v))
        held = keys_so_far(k, v, call.part(WINDOW))
        if slides(q, held, self.view, call):
            return attend_sliding(q, held, call, self.view).transpose(1, 2)
        return attend_in_view(q, held, call, self.view, softmax_attention).transpose(1, 2)

    def new_cache(self) -> StateLayer:
        if self.share == 1.0:
            return RecurrentLayer()
        made = CompositeLayer({WINDOW: new_layer(self.view)})
        # The memory cannot be taken back.
        made.is_croppable = False
        return made

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random contents after `context` tokens, whose step repeats."""
        own = filled_memory((batch, self.heads, self.head_dim, self.head_dim), context, like)
        if self.share == 1.0:
            return own
        shape = (batch, self.kv_heads, kept_tokens(self.view, context) + 1, self.head_dim)
        keys, values = like.new_empty(shape).normal_(), like.new_empty(shape).normal_()
        part = PreallocatedKVLayer(keys, values, context=context, window=self.view.window)
        made = CompositeLayer({WINDOW: part}, own)
        made.tokens, made.is_initialized = context, True
        return made

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:
        """The names of the code that does the mixing, each once."""
        path = gla.path(device, dtype, K=self.head_dim, V=self.head_dim)
        if self.share == 1.0:
            return path
        has_own = self.view.window is not None and has_kernels(
            device, dtype, self.head_dim, self.heads // self.kv_heads
        )
        return " and ".join(dict.fromkeys((path, "triton" if has_own else "sdpa")))
