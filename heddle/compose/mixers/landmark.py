"""Landmark attention: a key for each block of tokens, which gates what is read of the block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.cache import (
    Call,
    CompositeLayer,
    KVLayer,
    PreallocatedKVLayer,
    PreallocatedRecurrentLayer,
    StateLayer,
)
from heddle.compose.host_cache import FEW, HostKVLayer
from heddle.compose.modules.host_blocks import attend_fetched
from heddle.compose.modules.in_view import keys_so_far, marks_so_far
from heddle.compose.modules.norm import RMSNorm
from heddle.compose.modules.precision import wide, wide_dtype
from heddle.compose.modules.rope import rotary_key, rotary_tables, rotate
from heddle.compose.modules.selection import Places
from heddle.compose.modules.site import Site
from heddle.compose.modules.waiting import can_wait
from heddle.kernels.landmark_attention import landmark_attention

KEPT = "tokens"


class LandmarkModule(nn.Module):
    """Grouped softmax over landmarks of earlier blocks and the keys of the own one.        (arXiv 2305.16300)

        l_b = W_l mean_{j in b} x_j;   o by `landmark_attention`;   y = W_o o

    Blocks are counted from each row's first real token. A landmark is normed as a key and turned as one at its block's end;
    what is padding or not written has no part in it. Training reads all blocks, evaluation the `top` best. Sums over an open
    block are float32. With `offload` blocks wait in host memory, and a step fetches those that it chooses.

    Shapes:  x, y: [B, T, D];  states: landmarks: [B, KV heads, complete blocks, d];  open: [B, KV heads, d + 1], the sum over
             the open block and its tokens, float32; keys, values: [B, KV heads, S, d], or as `HostKVLayer` has them;
             `heads_out` sees [B, T, H, d]
    """

    def __init__(
        self,
        site: Site,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rope: Mapping[str, Any] | None,
        qk_norm: bool,
        block: int,
        top: int | None,
        offload: bool = False,
    ) -> None:
        super().__init__()
        self.offload = offload
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.rotary, self.block, self.top = rotary_key(rope, head_dim), block, top
        self.q_proj, self.k_proj, self.v_proj, self.landmark_proj = (
            nn.Linear(site.hidden_size, count * head_dim, bias=False)
            for count in (heads, kv_heads, kv_heads, kv_heads)
        )
        self.q_norm, self.k_norm = (RMSNorm(head_dim, site.norm_eps) if qk_norm else None for _ in range(2))
        self.heads_out = nn.Identity()
        self.o_proj = nn.Linear(heads * head_dim, site.hidden_size, bias=False)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        sides = ((self.q_proj, self.heads), (self.k_proj, self.kv_heads), (self.v_proj, self.kv_heads))
        q, k, v = (proj(x).unflatten(-1, (count, -1)) for proj, count in sides)
        tables = None if self.rotary is None else call.rotary_tables(*self.rotary)
        q, k = (
            _placed(side, norm, tables).transpose(1, 2) for side, norm in ((q, self.q_norm), (k, self.k_norm))
        )
        o = self._attend(q, (k, v.transpose(1, 2)), x, call)
        y: Tensor = self.o_proj(self.heads_out(call.gated(o.transpose(1, 2))).flatten(2))
        return y

    def _attend(self, q: Tensor, new: tuple[Tensor, Tensor], x: Tensor, call: Call) -> Tensor:
        """Shapes:  q, out: [B, H, T, d];  new: [B, KV heads, T, d], twice"""
        part, top = call.part(KEPT), None if self.training else self.top
        held = part.cache if isinstance(part.cache, HostKVLayer) and self._fetches(q) else None
        if held is None:
            k, v, written = keys_so_far(*new, part)
            tokens = k.shape[2]
        else:
            held.append(*new)
            tokens = held.held
            written = marks_so_far(held, part, q, tokens - q.shape[2])
        real = None if call.key_padding is None else call.key_padding[:, -tokens:] > 0
        places = Places(self.block, tokens, real, q.device)
        landmarks = self._landmarks(x, call, places)
        if held is not None:
            return attend_fetched(q, held, landmarks, places, written=written, top=top)
        return landmark_attention(
            q,
            places.aligned(k),
            places.aligned(v),
            landmarks,
            block=self.block,
            start=places.first(x.shape[0], x.shape[1]),
            top=top,
            real=None if real is None else places.aligned_marks(real),
            written=None if written is None else places.aligned_marks(written),
        )

    def _fetches(self, q: Tensor) -> bool:
        """Whether a call fetches blocks that it chooses, and not all of them.

        Raises:
            RuntimeError: while a CUDA graph is captured, which cannot wait for a choice.
        """
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("a step that fetches blocks from host memory cannot be captured")
        return q.shape[2] <= FEW and can_wait(q)

    def _landmarks(self, x: Tensor, call: Call, places: Places) -> Tensor:
        """The landmarks of all blocks, those of earlier calls among them; of the open block what it has come to so far.

        Shapes:  x: [B, T, D];  out: [B, KV heads, blocks, d]
        """
        rows = self.landmark_proj(x).unflatten(-1, (self.kv_heads, -1))
        first, count = places.first(*x.shape[:2]), x.shape[1]
        begun = (first.clamp(min=0) // self.block)[:, None]
        # Blocks are counted from the one that was open: others do not change.
        index = (first[:, None] + torch.arange(count, device=x.device)) // self.block
        index = (index - begun).clamp(min=0)
        sums = self._sums(rows, call, index)
        opened = sums.gather(2, _spread((first + count)[:, None] // self.block - begun, sums))[:, :, 0]
        ends = call.positions.new_zeros(len(x), sums.shape[2])
        ends = ends.scatter_reduce(1, index, call.positions, reduce="amax")
        means = sums[..., :-1] / sums[..., -1:].clamp(min=1.0)
        tables = None if self.rotary is None else rotary_tables(ends, *self.rotary)
        made = _placed(means.transpose(1, 2), self.k_norm, tables).transpose(1, 2).to(rows.dtype)
        held, complete = call.state("landmarks"), places.keys // self.block
        if held is None or held.shape[2] == 0:
            made = made[:, :, : places.blocks]
            # A view would keep what is not complete, and all of a long prefill's sums.
            call.keep(landmarks=made[:, :, :complete].clone(), open=opened)
            return made
        spare = places.blocks + 2 - held.shape[2]
        new = begun + torch.arange(made.shape[2], device=x.device)
        made = F.pad(held, (0, 0, 0, spare)).scatter_(2, _spread(new, made), made)[:, :, : places.blocks]
        call.keep(landmarks=made[:, :, :complete], open=opened)
        return made

    def _sums(self, rows: Tensor, call: Call, index: Tensor) -> Tensor:
        """The sums of this call's blocks over its tokens, on top of what the open one, the first, had come to.

        Shapes:  rows: [B, T, KV heads, d];  index: [B, T];  out: [B, KV heads, as many as T tokens may reach, d + 1]
        """
        # The number of a block's tokens is summed beside them.
        rows = F.pad(wide(rows), (0, 1), value=1.0).flatten(2)
        rows = call.hide_padding(call.hide_unwritten(rows))
        rows = rows.view(*rows.shape[:2], self.kv_heads, -1).transpose(1, 2)
        # The one of the token that follows is among them.
        sums, past = (
            rows.new_zeros(*rows.shape[:2], rows.shape[2] // self.block + 2, rows.shape[-1]),
            call.state("open"),
        )
        if past is not None:
            sums = F.pad(past.to(rows.dtype)[:, :, None], (0, 0, 0, sums.shape[2] - 1))
        return sums.scatter_add(2, _spread(index, rows), rows)

    def new_cache(self) -> StateLayer:
        made = CompositeLayer({KEPT: HostKVLayer(self.block) if self.offload else KVLayer()})
        # What a block came to cannot be taken back.
        made.is_croppable = False
        return made

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random contents after `context` tokens, whose step repeats."""
        shape = (batch, self.kv_heads, context + 1, self.head_dim)
        keys, values = (like.new_empty(shape).normal_() for _ in range(2))
        part: StateLayer = PreallocatedKVLayer(keys, values, context=context)
        if self.offload:
            part = HostKVLayer.filled(keys, values, self.block)
        marks = (batch, self.kv_heads, (context + 1) // self.block, self.head_dim)
        opened = (batch, self.kv_heads, self.head_dim + 1)
        states = {
            "landmarks": like.new_empty(marks).normal_(),
            "open": like.new_empty(opened, dtype=wide_dtype(like.dtype)).normal_(),
        }
        states["open"][..., -1] = context % self.block
        made = CompositeLayer({KEPT: part}, PreallocatedRecurrentLayer(states, context=context))
        made.tokens, made.is_initialized = context, True
        return made

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:
        """The name of the code that does the mixing."""
        return landmark_attention.path(
            device,
            dtype,
            K=self.head_dim,
            V=self.head_dim,
            G=self.heads // self.kv_heads,
            block=self.block,
            # How many landmarks there are is a matter of the context.
            choice=0,
        )


def _placed(x: Tensor, norm: nn.Module | None, tables: tuple[Tensor, Tensor] | None) -> Tensor:
    """Norm and rotation, in float32, rounded once.  Shapes:  x, out: [B, T, heads, d]"""
    y = x if norm is None else norm(wide(x))
    y = y if tables is None else rotate(wide(y), tables)
    return y.to(x.dtype)


def _spread(index: Tensor, like: Tensor) -> Tensor:
    """An index of rows for each head and feature.  Shapes:  index: [B, N];  like: [B, H, *, d];  out: [B, H, N, d]"""
    return index[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[-1])
