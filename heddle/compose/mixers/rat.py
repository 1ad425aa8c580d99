"""RAT: a gated recurrence inside chunks, softmax attention over what the chunks came to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from heddle.compose.cache import Call, PreallocatedRecurrentLayer, RecurrentLayer, StateLayer
from heddle.compose.init import Initialised, fill
from heddle.compose.modules.chunks import Chunks
from heddle.compose.modules.precision import Float32Kept, wide, wide_dtype
from heddle.compose.modules.rope import Tables, rotary_tables, rotate, scaling_key
from heddle.compose.modules.site import Site
from heddle.kernels.rat_attention import rat_attention
from heddle.kernels.rat_scan import rat_scan

# Where gates begin in chunks of one token, which have nothing to carry: sigmoid(-6) is 0.0025.
CLOSED = -6.0


class RatModule(Initialised, Float32Kept):
    """Recurrence inside chunks of L tokens, attention over chunks.        (arXiv 2507.04416)

        z, x, g, q, k = W_in u;   g = sigmoid(g + gate_bias)
        k~_t = g_t * k~_{t-1} + (1 - g_t) * k_t,   x~ likewise of x,   both from 0 where a chunk begins
        o_t = softmax attention of q_t over k~, x~ at the last tokens of earlier chunks and at t itself
        y = W_o (sigmoid(z) * o)

    Rows of `in_proj` stand in the order z, x, g, q, k; head h reads group h mod `groups` of q and k. q and k~ turn by the number
    of their chunk; `rope` is `{"theta", "fraction"}` and perhaps "scaling", or None. Gates and running states are float32. A
    token that is not written adds nothing to k~ and x~; they fade all the same, and its chunk is seen.

    Shapes:  u, y: [B, T, D];  states: keys, values: [B, H, complete chunks, d];  running: [B, 2, H d], x~ and k~ at the last
             token, float32;  `heads_out` sees [B, T, H, d]
    """

    takes_packed = True
    KEPT: ClassVar[tuple[str, ...]] = ("gate_bias",)

    def __init__(
        self,
        site: Site,
        *,
        heads: int,
        head_dim: int,
        groups: int,
        chunk: int,
        rope: Mapping[str, Any] | None,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.chunk = heads, head_dim, chunk
        width, shared = heads * head_dim, groups * head_dim
        self.sizes = (width, width, width, shared, shared)
        self.rope = None if rope is None else dict(rope)
        self.in_proj = nn.Linear(site.hidden_size, sum(self.sizes), bias=False)
        self.gate_bias = nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.heads_out = nn.Identity()
        self.o_proj = nn.Linear(width, site.hidden_size, bias=False)

    def forward(self, u: Tensor, call: Call) -> Tensor:
        z, x, g, q, k = self.in_proj(u).split(self.sizes, dim=-1)
        x, g, q, k = (side.unflatten(-1, (-1, self.head_dim)) for side in (x, g, q, k))
        x, k = (call.hide_unwritten(side) for side in (x, k))
        mix = self._by_ops if call.key_padding is None else self._by_chunks
        o = mix(x, g, q, k, call=call)
        o = (torch.sigmoid(wide(z)).view_as(o) * o).to(z.dtype)
        y: Tensor = self.o_proj(self.heads_out(call.gated(o)).flatten(2))
        return y

    def _by_ops(self, x: Tensor, g: Tensor, q: Tensor, k: Tensor, *, call: Call) -> Tensor:
        """Rows whose chunks lie alike.  Shapes:  x, g, out: [B, T, H, d];  q, k: [B, T, groups, d]"""
        start, running = 0 if call.cache is None else call.cache.get_seq_length(), call.state("running")
        earlier, numbers = start // self.chunk, -(-(start % self.chunk + x.shape[1]) // self.chunk)
        tables = self._tables(
            call,
            lambda: torch.arange(earlier, earlier + numbers, device=x.device)[None],
            ("numbers", earlier, numbers),
        )
        q, key, value, keys, values, running = rat_scan(
            q, k, x, g, gate_bias=self.gate_bias.view(self.heads, -1), chunk=self.chunk, start=start,
            rotation=None if tables is None else (tables[0][0, :, 0], tables[1][0, :, 0]),
            past=None if running is None else running.view(*running.shape[:-1], self.heads, -1),
            cu_seqlens=call.cu_seqlens,
        )  # fmt: skip
        keys, values = (
            _after(call.state(name), earlier, new) for name, new in (("keys", keys), ("values", values))
        )
        call.keep(keys=keys, values=values, running=running.flatten(2))
        return rat_attention(
            q, key, value, keys=keys, values=values, chunk=self.chunk, start=start, cu_seqlens=call.cu_seqlens
        )

    def _by_chunks(self, x: Tensor, g: Tensor, q: Tensor, k: Tensor, *, call: Call) -> Tensor:
        """The same with padding, by which chunks lie elsewhere in each row: in plain torch.  Shapes:  as there"""
        chunks = Chunks.of(call, self.chunk)
        tables = self._tables(call, lambda: chunks.index, ("chunks", chunks.start))
        # Each channel fades by its own gate, so the heads of a group have keys of their own.
        q, k = (side.repeat(1, 1, self.heads // side.shape[2], 1) for side in (q, k))
        carried = torch.stack((wide(x), wide(k)), dim=2).flatten(3)
        raw = (wide(g).flatten(2) + self.gate_bias)[:, :, None]
        running = chunks.scan(carried, raw, call.state("running"))
        own_value, own_key = running.view(*running.shape[:-1], self.heads, -1).unbind(2)
        query, own_key = (_turned(side, tables, q.dtype) for side in (q, own_key))
        own_value = own_value.to(x.dtype).transpose(1, 2)
        keys = chunks.summaries(own_key, call.state("keys"))
        values = chunks.summaries(own_value, call.state("values"))
        # A view would keep all of a long prefill in memory.
        call.keep(keys=keys, values=values, running=running[:, -1].clone())
        return chunks.attend(query, keys, values, (own_key, own_value)).transpose(1, 2)

    def _tables(self, call: Call, index: Callable[[], Tensor], what: tuple[Any, ...]) -> Tables | None:
        """Cosines and sines at the numbers of chunks, `what` they are among others.  Shapes:  index(): [1 or B, *]"""
        if self.rope is None:
            return None
        turned, theta = int(self.rope["fraction"] * self.head_dim), float(self.rope["theta"])
        scaling = scaling_key(self.rope.get("scaling"))
        key = ("rotary of chunks", self.chunk, *what, turned, theta, scaling)
        return call.once(key, lambda: rotary_tables(index(), turned, theta, scaling))

    def initialise(self, std: float) -> None:  # noqa: ARG002 - gates begin with horizons of up to a chunk
        if self.chunk == 1:
            fill(self.gate_bias, torch.full_like(self.gate_bias, CLOSED))
        else:
            # g = h / (1 + h) forgets over about h + 1 tokens.
            fill(self.gate_bias, torch.empty_like(self.gate_bias).uniform_(1.0, self.chunk - 1.0).log())

    def new_cache(self) -> StateLayer:
        return RecurrentLayer()

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random states after `context` tokens, whose step repeats; with a place for the chunk that it may end."""
        summaries = (batch, self.heads, (context + 1) // self.chunk, self.head_dim)
        running = (batch, 2, self.sizes[0])
        states = {name: like.new_empty(summaries).normal_() for name in ("keys", "values")}
        states["running"] = like.new_empty(running, dtype=wide_dtype(like.dtype)).normal_()
        return PreallocatedRecurrentLayer(states, context=context)

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:
        """The name of the code that does the mixing."""
        path = rat_attention.path(device, dtype, K=self.head_dim)
        return "sdpa" if path == "torch" else path


def _after(earlier: Tensor | None, count: int, new: Tensor) -> Tensor:
    """The first `count` summaries of earlier calls, and new ones.  Shapes:  [B, H, chunks, d]"""
    if earlier is None or count == 0:
        return new
    earlier = earlier[:, :, :count]
    return earlier if new.shape[2] == 0 else torch.cat((earlier, new), dim=2)


def _turned(x: Tensor, tables: Tables | None, dtype: torch.dtype) -> Tensor:
    """Shapes:  x: [B, T, H, d];  out: [B, H, T, d] of `dtype`, turned in at least float32"""
    x = x if tables is None else rotate(wide(x), tables)
    return x.to(dtype).transpose(1, 2)
