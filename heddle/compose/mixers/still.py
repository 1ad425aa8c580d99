"""STILL: a few salient tokens of each chunk stay keys of softmax attention, a linear state takes the others."""

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
from heddle.compose.modules.in_view import keys_so_far
from heddle.compose.modules.norm import RMSNorm
from heddle.compose.modules.np_map import NormPreservedMaps
from heddle.compose.modules.open_chunk import Layout
from heddle.compose.modules.precision import wide, wide_dtype
from heddle.compose.modules.rope import rotary_key, rotate
from heddle.compose.modules.salient import Form, Near, Sides, attend_salient, self_weights
from heddle.compose.modules.site import Site
from heddle.compose.modules.stretches import is_long
from heddle.kernels.token_split_attention import token_split_attention

RECENT = "recent"


class StillModule(nn.Module):
    """Softmax over near and over salient tokens, a linear state of the others.        (arXiv 2602.02180)

        y = W_o o,   o by `attend_salient`, its gate sigmoid(W_g x), φ by `NormPreservedMaps` of the turned q and k

    p, the weight of a token on itself among the last `chunk` tokens, is kept when the token comes; the `keep` largest of a chunk
    (of equal ones the later) stay keys when the chunk leaves the two in sight. The choice has no gradient. With
    `chosen_by` "head" keys and values are repeated for the query heads first, so N below is H. Chunks are counted from each row's
    first real token. States are float32. Training works out the weights of all but a few chunks again.

    Shapes:  x, y: [B, T, D];  states: keys, values: [B, N, 2 chunk - 1 at most, d];  scores: [B, N, as many, 1];
             salient_keys, salient_values: [B, N, keep · chunks, d];  salient_written: [B, N, keep · chunks, 1] bool;
             memory: [B, N, 2 f, d + 1];  `heads_out` sees [B, T, H, d]
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
        chunk: int,
        keep: int,
        features: int,
        chosen_by: str,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.features = heads, kv_heads, head_dim, features
        self.stores = heads if chosen_by == "head" else kv_heads
        self.rotary, self.form = rotary_key(rope, head_dim), Form(chunk, keep, head_dim**-0.5)
        self.q_proj, self.k_proj, self.v_proj, self.g_proj = (
            nn.Linear(site.hidden_size, count * head_dim, bias=False)
            for count in (heads, kv_heads, kv_heads, heads)
        )
        self.q_norm, self.k_norm = (
            RMSNorm(head_dim, site.norm_eps) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.maps = NormPreservedMaps((heads, self.stores), head_dim, features)
        self.heads_out = nn.Identity()
        self.o_proj = nn.Linear(heads * head_dim, site.hidden_size, bias=False)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        # Nothing here holds the sides, which long rows copy piece by piece.
        o, memory = attend_salient(self._sides(x, call), call.state("memory"), self.form)
        call.keep(memory=memory)
        y: Tensor = self.o_proj(self.heads_out(call.gated(o.transpose(1, 2))).flatten(2))
        return y

    def _sides(self, x: Tensor, call: Call) -> Sides:
        q, k, v = self._projected(x, call)
        k, v, written = keys_so_far(k, v, call.part(RECENT))
        real = _real(call, k.shape[2])
        seen = wide(x).new_ones(len(x), k.shape[2]) if written is None else written.to(wide_dtype(x.dtype))
        seen = seen if real is None else seen * real
        near = Near.of(self._layout(x, call), k.shape[2])
        scores = self._scores(self_weights(q, k, seen, near, self.form), seen, call)
        chosen = near.chosen(scores, self.form.keep)
        far = self._far((k, v, seen), chosen, near, call)
        gate = self.g_proj(x).view(*x.shape[:2], self.heads, -1)
        padding = None if call.key_padding is None else _padding(call.key_padding)
        return Sides(
            q.transpose(1, 2),
            gate.transpose(1, 2),
            k,
            v,
            seen,
            _marked(chosen, k.shape[2]),
            *far,
            earlier=_earlier(call),
            padding=padding,
            maps=(self.maps.of_queries, self.maps.of_keys),
        )

    def _projected(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """Shapes:  out: [B, T, H, d], and twice [B, N, T, d]"""
        sides = ((self.q_proj, self.heads), (self.k_proj, self.kv_heads), (self.v_proj, self.kv_heads))
        q, k, v = (proj(x).unflatten(-1, (count, -1)) for proj, count in sides)
        q, k = self.q_norm(wide(q)), self.k_norm(wide(k))
        if self.rotary is not None:
            tables = call.rotary_tables(*self.rotary)
            q, k = rotate(q, tables), rotate(k, tables)
        k, v = (side.to(v.dtype).repeat_interleave(self.stores // self.kv_heads, dim=2) for side in (k, v))
        return q.to(v.dtype), k.transpose(1, 2), v.transpose(1, 2)

    def _layout(self, x: Tensor, call: Call) -> Layout:
        earlier, size = _earlier(call), self.form.chunk
        first = torch.full((len(x),), earlier, device=x.device)
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if call.key_padding is None:
            return Layout.regular(size, first, real, earlier % size)
        first = first - _padding(call.key_padding)
        return Layout.of(size, first, real if call.padding is None else call.padding > 0, None)

    def _scores(self, new: Tensor, seen: Tensor, call: Call) -> Tensor:
        """The scores of all recent tokens, -1 for one that is never to be seen.  Shapes:  new: [B, N, T];  out: [B, N, S]"""
        held, past = seen.shape[1] - new.shape[2], call.state("scores")
        new = new.masked_fill(seen[:, None, held:] <= 0.5, -1.0)
        scores = new if past is None else torch.cat((past[:, :, :held, 0], new), dim=2)
        first = max(0, seen.shape[1] - 2 * self.form.chunk + 1)
        call.keep(scores=scores[:, :, first:, None].clone())
        return scores

    def _far(
        self, sides: tuple[Tensor, Tensor, Tensor], chosen: tuple[Tensor, Tensor], near: Near, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and marks of the salient tokens of the chunks that have left, by the number of the chunk.

        Shapes:  sides: as `Sides` has k, v and seen;  chosen: as `Near` has them;  out: as `Sides` has them
        """
        (k, v, seen), (size, keep), earlier = sides, (self.form.chunk, self.form.keep), _earlier(call)
        held, tokens = max(0, earlier // size - 1), near.layout.real.shape[1]
        chunks = torch.arange(max(0, (earlier + tokens) // size - 1), device=k.device)
        slot = chunks + 1 - near.layout.base[:, None]
        is_new = (slot >= 0)[:, None, :, None, None]
        slot = slot.clamp(min=0, max=near.layout.chunks)[:, None, :, None].expand(-1, k.shape[1], -1, keep)
        index, inside = (one.gather(2, slot).flatten(2) for one in chosen)
        marks = seen[:, None, :, None].expand(*k.shape[:3], 1)
        new = [_taken(one, index) for one in (k, v, marks)]
        new[2] = new[2] * inside[..., None].to(marks.dtype)
        found, names = [], ("salient_keys", "salient_values", "salient_written")
        for name, rows in zip(names, new, strict=True):
            rows, past = rows.unflatten(2, (len(chunks), keep)), call.state(name)  # type: ignore[no-untyped-call]
            if past is not None:
                # Chunks that earlier calls have sorted out.
                past = past[:, :, : held * keep].to(rows.dtype).unflatten(2, (held, keep))  # type: ignore[no-untyped-call]
                rows = torch.where(is_new, rows, _padded(past, rows.shape[2]))
            found.append(rows.flatten(2, 3))
        call.keep(**dict(zip(names, (found[0], found[1], found[2] > 0.5), strict=True)))
        return found[0], found[1], found[2][..., 0]

    def new_cache(self) -> StateLayer:
        made = CompositeLayer({RECENT: KVLayer(2 * self.form.chunk)})
        # The state cannot be taken back.
        made.is_croppable = False
        return made

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random contents after `context` tokens, whose step repeats."""
        size, rows = self.form.chunk, (batch, self.stores)
        held = min(context, 2 * size - 1) + 1
        keys, values = (like.new_empty(*rows, held, self.head_dim).normal_() for _ in range(2))
        part = PreallocatedKVLayer(keys, values, context=context, window=2 * size)
        far = (*rows, max(0, (context + 1) // size - 1) * self.form.keep)
        exact = like.new_empty(0, dtype=wide_dtype(like.dtype))
        states = {
            "scores": exact.new_empty(*rows, held, 1).uniform_(),
            "salient_keys": like.new_empty(*far, self.head_dim).normal_(),
            "salient_values": like.new_empty(*far, self.head_dim).normal_(),
            "salient_written": torch.ones(*far, 1, dtype=torch.bool, device=like.device),
            "memory": exact.new_empty(*rows, 2 * self.features, self.head_dim + 1).uniform_(),
        }
        made = CompositeLayer({RECENT: part}, PreallocatedRecurrentLayer(states, context=context))
        made.tokens, made.is_initialized = context, True
        return made

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:
        """The name of the code that does the mixing."""
        return token_split_attention.path(device, dtype, K=self.head_dim, V=self.head_dim)


def _earlier(call: Call) -> int:
    """Tokens before this call, padding included."""
    return 0 if call.cache is None else call.cache.get_seq_length()


def _real(call: Call, keys: int) -> Tensor | None:
    """Shapes:  out: [B, S], 0 at padding"""
    return None if call.key_padding is None else (call.key_padding[:, -keys:] > 0).to(torch.float32)


def _padding(key_padding: Tensor) -> Tensor:
    """Tokens before each row's first real one.  Shapes:  out: [B]"""
    return (key_padding > 0).to(torch.int64).argmax(dim=-1)


def _marked(chosen: tuple[Tensor, Tensor], keys: int) -> Tensor:
    """Shapes:  chosen: as `Near` has them;  out: [B, N, S] bool"""
    index, inside = (one.flatten(2) for one in chosen)
    # The last is for those that are not there.
    marks = torch.zeros(*index.shape[:2], keys + 1, dtype=torch.bool, device=index.device)
    return marks.scatter(2, index.masked_fill(~inside, keys), True)[:, :, :keys]


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """Shapes:  x: [B, N, S, d];  index: [B, N, M];  out: [B, N, M, d]"""
    if not is_long(x.shape[2]):
        return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3]))
    # The gradient of a gather would keep all keys or values.
    row, head = (torch.arange(size, device=x.device) for size in x.shape[:2])
    return x[row[:, None, None], head[:, None], index]


def _padded(x: Tensor, chunks: int) -> Tensor:
    """Shapes:  x: [B, N, held, keep, d];  out: [B, N, chunks, keep, d]"""
    return F.pad(x, (0, 0, 0, 0, 0, chunks - x.shape[2]))
