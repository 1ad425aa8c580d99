"""NAtS-L: each chunk of tokens is remembered by softmax attention or by Gated DeltaNet, head by head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.cache import Call, PreallocatedRecurrentLayer, StateLayer
from heddle.compose.mixers.gated_deltanet import GatedDeltaNetModule
from heddle.compose.modules.first_steps import asked, first_steps, routed
from heddle.compose.modules.norm import RMSNorm, l2_norm
from heddle.compose.modules.open_chunk import Layout
from heddle.compose.modules.precision import wide, wide_dtype
from heddle.compose.modules.selection import Places
from heddle.compose.modules.site import Site
from heddle.compose.modules.stretches import ends_chunks, in_stretches, is_long
from heddle.compose.modules.waiting import can_wait
from heddle.kernels.block_attention import block_attention
from heddle.kernels.gated_delta_rule import gated_delta_rule
from heddle.kernels.routed_delta_rule import routed_delta_rule, routed_path


@dataclass(slots=True)
class Running:
    """What stands where a piece of a chunk has ended, all of it wide.

    Shapes:  memory: [B, H, K, V];  start: the memory at the beginning of the open chunk;  faded: [B, H, 1], its log-decay since;
             opened: [B, 1, D + 2], the sum of the open chunk's inputs, how many of them are written, and how many there are
    """

    memory: Tensor
    start: Tensor
    faded: Tensor
    opened: Tensor


# The state of the convolution, where the memory stands, and the routes of stretches.
Past = tuple[Any, ...]


class NatsLModule(GatedDeltaNetModule):
    """Chunks of tokens kept by softmax attention or folded into a Gated DeltaNet.        (arXiv 2602.03681)

        p_c = softmax(W mean_{t in c} x_t);   m_c = onehot(argmax p_c), its gradient that of p_c where it is 1
              (in the first steps of a training, if so many are asked for, m_c = (1, 0) with that gradient)
        a_t = softmax attention over the own chunk and earlier chunks c with m_c,0 = 1
        S   = after each chunk, e^G S_start + m_c,1 (S_end - e^G S_start),   G the sum of the chunk's log-decays
        y   = W_o ((w_0 rms(S q) + w_1 rms(a)) * silu(W_z x)),   w = softmax(W_m q), for each head of attention

    q, k, v of both are those of the convolution: of length 1 for S, normed head by head for a, whose heads are `split` parts of
    each head of S and have no positions. The names of weights are those of `GatedDeltaNetModule`. `routes_out` sees m of the
    chunks that a call completes. The cache drops the keys of chunks that no head of any row keeps, unless there is padding.

    Shapes:  x, y: [B, T, D];  states: keys: [B, H split, S, K / split];  values likewise;  written: [B, 1, S, 1] bool;
             types: [B, H, complete chunks kept, 1], m_c,0;  memory, start, faded, open as in `Running`;
             `heads_out` sees [B, T, H split, V / split];  `routes_out` sees [B, chunks, H, 2]
    """

    def __init__(
        self,
        site: Site,
        *,
        heads: int,
        head_dim: int,
        value_dim: int,
        split: int,
        chunk: int,
        short_conv: int,
        negative_eigenvalues: bool,
        budget: float | None,
        budget_factor: float,
        dense_first: float | None = None,
    ) -> None:
        super().__init__(
            site,
            heads=heads,
            value_heads=heads,
            head_dim=head_dim,
            value_dim=value_dim,
            short_conv=short_conv,
            negative_eigenvalues=negative_eigenvalues,
        )
        self.parts, self.chunk, self.budget, self.budget_factor = heads * split, chunk, budget, budget_factor
        self.router = nn.Linear(site.hidden_size, 2 * heads, bias=False)
        self.share_proj = nn.Linear(heads * head_dim, 2 * self.parts, bias=False)
        self.q_norm, self.k_norm = (RMSNorm(head_dim // split, site.norm_eps) for _ in range(2))
        self.norm = RMSNorm(value_dim // split, site.norm_eps)
        self.routes_out, self.first = nn.Identity(), first_steps(dense_first)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        x = call.hide_padding(x)
        types, places = self._held(x, call)
        layout = self._layout(x, call, places)
        work = self._apart if self._is_apart(x, layout, call) else self._at_once
        (recalled, *sides, shares), made = work(x, layout, call)
        if self.training:
            self._account(made, call)
        made = self.routes_out(made[..., :2])
        types = self._typed(types, made, layout, places)
        attended = self._attend(sides, types, places, call)
        shares = torch.softmax(_split(wide(shares), self.parts), dim=-1).to(x.dtype)
        recalled, z = (_split(one, self.parts) for one in (recalled, self.z_proj(x)))
        o = shares[..., :1] * self.norm(recalled, z) + shares[..., 1:] * self.norm(attended, z)
        y: Tensor = self.o_proj(self.heads_out(call.gated(o)).flatten(2))
        return y

    def _held(self, x: Tensor, call: Call) -> tuple[Tensor, Places]:
        """The types of chunks that are held, and the places of the keys that are held and of this call's.

        Shapes:  types: [B, H, chunks, 1]
        """
        types, start = call.state("types"), 0 if call.cache is None else call.cache.get_seq_length()
        if types is None:
            types = wide(x).new_zeros(len(x), self.heads, 0, 1)
        held = types.shape[2] * self.chunk + start % self.chunk
        real = _padding(call)
        keys = held + x.shape[1]
        return types, Places(self.chunk, keys, None if real is None else real[:, -keys:] > 0, x.device)

    def _layout(self, x: Tensor, call: Call, places: Places) -> Layout:
        first = places.first(*x.shape[:2])
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if places.real is None:
            return Layout.regular(self.chunk, first, real, (places.keys - x.shape[1]) % self.chunk)
        return Layout.of(self.chunk, first, real if call.padding is None else call.padding > 0, None)

    def _at_once(self, x: Tensor, layout: Layout, call: Call) -> tuple[tuple[Tensor, ...], Tensor]:
        """All of a call but its attention: what the memory tells, what attention reads, and the routes.

        Shapes:  out: [B, T, H V];  queries, keys and values of attention: [B, T, H K], twice, and [B, T, H V]
                 logits of shares: [B, T, 2 H split];  routes: [B, chunks, H, 3]
        """
        sides, running = self._parted(self.conv(self.qkv_proj(x), call)), self._running(x, call)
        recalled, routes = self._recurrence(x, sides, running, layout, call)
        names = ("memory", "start", "faded")
        call.keep(**{name: getattr(running, name) for name in names}, open=running.opened)
        return (recalled, *self._for_attention(sides)), routes

    def _is_apart(self, x: Tensor, layout: Layout, call: Call) -> bool:
        """Whether training works a long sequence out again, a stretch after the other: one that begins here, of whole rows."""
        is_plain = call.cache is None and call.written is None and call.cu_seqlens is None
        return is_plain and layout.offset == 0 and ends_chunks(self.chunk) and is_long(x.shape[1])

    def _apart(self, x: Tensor, layout: Layout, call: Call) -> tuple[tuple[Tensor, ...], Tensor]:
        """`_at_once` in stretches: what attention reads and what the memory tells is kept, the rest is worked out again."""

        def stretch(past: Past, x: Tensor) -> tuple[Tensor, Past]:
            conv, running, *routes = past
            y, conv = self.conv.after(self.qkv_proj(x), conv)
            here = Layout.regular(self.chunk, layout.first, layout.real[:, : x.shape[1]], 0)
            # What is worked out again begins where this began.
            sides, running = self._parted(y), replace(running)
            recalled, m = self._recurrence(x, sides, running, here, call)
            return torch.cat((recalled, *self._for_attention(sides)), dim=-1), (conv, running, *routes, m)

        held, (_, _, *routes) = in_stretches(stretch, (None, self._running(x, call)), (x,))
        width = [self.heads * self.value_dim, *self.sizes, 2 * self.parts]
        return torch.split(held, width, dim=-1), torch.cat(routes, dim=1)

    def _parted(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of what comes out of the convolution."""
        return torch.split(qkv, list(self.sizes), dim=-1)

    def _for_attention(self, sides: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys and values, the first two normed by parts of heads, and the logits of what each part takes of both.

        Shapes:  sides, out: [B, T, H K], twice, and [B, T, H V];  logits: [B, T, 2 H split]
        """
        q, k, v = sides
        normed = (norm(_split(side, self.parts)) for norm, side in ((self.q_norm, q), (self.k_norm, k)))
        q_part, k_part = (side.to(v.dtype).flatten(2) for side in normed)
        return q_part, k_part, v, self.share_proj(q)

    def _recurrence(
        self, x: Tensor, sides: Sequence[Tensor], running: Running, layout: Layout, call: Call
    ) -> tuple[Tensor, Tensor]:
        """What the memory tells each token, and the routes of the chunks, 0 where one is not complete; `running` goes on.

        Shapes:  sides: [B, T, H K], twice, and [B, T, H V];  out: [B, T, H V], [B, chunks, H, 3]
        """
        q, k, v = (_split(side, self.heads) for side in sides)
        log_decay, beta = self._gates(x, call)
        one = torch.ones_like(x[..., :1])
        summed = (call.hide_unwritten(x), call.hide_unwritten(one), one)
        # In one pass: no inputs of all tokens stand in the wide dtype.
        exact = wide_dtype(x.dtype)
        inputs = torch.cat([layout.spread(of).sum(2, keepdim=True, dtype=exact) for of in summed], dim=-1)
        given = [layout.spread(one) for one in (l2_norm(q), l2_norm(k), v, log_decay, beta)]
        go_on = self._ragged if layout.offset is None or layout.chunks == 1 else self._even
        told, routes = go_on(running, (*given, inputs), layout)
        return layout.gather(told).flatten(2), routes

    def _even(self, running: Running, given: tuple[Tensor, ...], layout: Layout) -> tuple[Tensor, Tensor]:
        """Goes on through chunks whose places are those of all rows: all at once but one that is open before or after the call.

        Shapes:  given: [B, chunks, slots, H, *], and at last inputs, [B, chunks, 1, D + 2]
                 out: [B, chunks, slots, H, V], [B, chunks, H, 3]
        """
        is_begun, is_left = layout.offset != 0, layout.end != 0
        sizes = (int(is_begun), layout.chunks - is_begun - is_left, int(is_left))
        told, routes = [], []
        # Parted once: the gradient of a slice is a tensor of all chunks.
        parts = zip(*(one.split_with_sizes(sizes, dim=1) for one in given), strict=True)
        for size, is_whole, part in zip(sizes, (False, True, False), parts, strict=True):
            if size and is_whole:
                m = self._routes(part[-1][:, :, 0])
                q, k, v, log_decay, beta = (one.flatten(1, 2) for one in part[:-1])
                o, memory = routed_delta_rule(
                    q, k, v, log_decay, beta, m[..., 1], chunk=self.chunk, initial_state=running.memory
                )
                running.memory = running.start = memory
                told.append(o.unflatten(1, (size, self.chunk)))  # type: ignore[no-untyped-call]
                routes.append(m)
            elif size:
                o, m = self._piece(running, [one[:, 0] for one in part[:-1]], part[-1][:, 0])
                told.append(o[:, None])
                routes.append(m[:, None])
        return torch.cat(told, dim=1) if len(told) > 1 else told[0], torch.cat(routes, dim=1)

    def _ragged(self, running: Running, given: tuple[Tensor, ...], layout: Layout) -> tuple[Tensor, Tensor]:
        """As `_even`, of rows whose chunks begin at places of their own, or of one chunk."""
        told, routes = self._piece(running, [one[:, 0] for one in given[:-1]], given[-1][:, 0])
        told, routes = told[:, None], routes[:, None]
        if layout.chunks > 1:
            more = self._whole_chunks(running, [one[:, 1:] for one in given[:-1]], given[-1][:, 1:, 0])
            told, routes = (torch.cat(both, dim=1) for both in zip((told, routes), more, strict=True))
        return told, routes

    def _whole_chunks(self, running: Running, given: list[Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Goes on through chunks that begin at their first slot, all at once but each row's last one, which may stay open.

        Shapes:  given: [B, chunks, slots, H, *];  inputs: [B, chunks, D + 2];  out: [B, chunks, slots, H, V], [B, chunks, H, 3]
        """
        m = self._routes(inputs)
        # Of a row whose tokens were all in the piece before, none is.
        tokens = inputs[..., -1] > 0.0
        is_last = tokens & (torch.arange(1, m.shape[1] + 1, device=m.device) == tokens.sum(1, keepdim=True))
        q, k, v, log_decay, beta = given
        log_decay, beta = (one.masked_fill(is_last[..., None, None], 0.0) for one in (log_decay, beta))
        q, k, v, log_decay, beta = (one.flatten(1, 2) for one in (q, k, v, log_decay, beta))
        o, memory = routed_delta_rule(
            q, k, v, log_decay, beta, m[..., 1], chunk=self.chunk, initial_state=running.memory
        )
        went_on = tokens[:, 0, None, None, None]
        running.start = torch.where(went_on, memory, running.start)
        running.memory = memory
        last, piece = tokens.sum(1).clamp(min=1) - 1, []
        for one in (*given, inputs[:, :, None]):
            index = last.view(-1, *[1] * (one.dim() - 1)).expand(-1, 1, *one.shape[2:])
            found = one.gather(1, index)[:, 0]
            piece.append(found * tokens[:, 0].view(-1, *[1] * (found.dim() - 1)).to(found.dtype))
        told, _ = self._piece(running, piece[:-1], piece[-1])
        o = o.view(len(o), -1, self.chunk, *o.shape[2:])
        return torch.where(is_last[..., None, None, None], told[:, None], o), m

    def _piece(self, running: Running, given: list[Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Goes on through a piece of one chunk, and past the chunk's end where it is complete: what is told, and the routes.

        Shapes:  given: [B, slots, H, *];  inputs: [B, 1, D + 2];  out: [B, slots, H, V], [B, H, 3]
        """
        q, k, v, log_decay, beta = given
        o, end = gated_delta_rule(q, k, v, log_decay, beta, initial_state=running.memory)
        opened, gone = running.opened + inputs, running.faded + log_decay.sum(1)[..., None]
        m = self._routes(opened)[:, 0]
        kept = gone.exp()[..., None] * running.start
        closed = kept + m[..., 1, None, None].to(kept.dtype) * (end - kept)
        is_over = self._is_complete(opened)[:, :, None]
        running.memory = torch.where(is_over[..., None], closed, end)
        running.start = torch.where(is_over[..., None], closed, running.start)
        running.faded = gone.masked_fill(is_over, 0.0)
        running.opened = opened.masked_fill(is_over, 0.0)
        return o, m

    def _is_complete(self, opened: Tensor) -> Tensor:
        """Shapes:  opened: [B, chunks, D + 2];  out: [B, chunks]"""
        return opened[..., -1] >= self.chunk

    def _routes(self, opened: Tensor) -> Tensor:
        """m of chunks whose inputs have come to `opened`, and what a budget asks for; 0 of one that is not complete.

        Shapes:  opened: [B, chunks, D + 2];  out: [B, chunks, H, 3]
        """
        mean = opened[..., :-2] / opened[..., -2:-1].clamp(min=1.0)
        p = torch.softmax(_split(wide(self.router(mean.to(self.router.weight.dtype))), self.heads), dim=-1)
        chosen = routed(p, self.first if self.training else None)
        # The bracket is 0. A type that was not chosen hears nothing.
        routes = torch.cat((chosen * (1.0 + (p - p.detach())), asked(p)[..., None]), dim=-1)
        return routes * self._is_complete(opened)[..., None, None]

    def _running(self, x: Tensor, call: Call) -> Running:
        """Where earlier calls ended."""
        memory, start, faded, opened = (call.state(name) for name in ("memory", "start", "faded", "open"))
        if memory is None or start is None or faded is None or opened is None:
            nothing = wide(x).new_zeros(len(x), self.heads, self.head_dim, self.value_dim)
            opened = nothing.new_zeros(len(x), 1, x.shape[-1] + 2)
            return Running(nothing, nothing, nothing[..., :1, 0], opened)
        return Running(memory, start, faded, opened)

    def _typed(self, types: Tensor, m: Tensor, layout: Layout, places: Places) -> Tensor:
        """The types that are held and those that this call makes; 0 for a chunk that is not complete.

        Shapes:  types: [B, H, kept chunks, 1];  m: [B, chunks, H, 2];  out: [B, H, all chunks]
        """
        held = F.pad(types[..., 0], (0, places.blocks + 1 - types.shape[2]))
        index = layout.base[:, None] + torch.arange(m.shape[1], device=m.device)
        index = index.clamp(max=places.blocks)[:, None].expand(-1, self.heads, -1)
        return held.scatter_add(2, index, m[..., 0].transpose(1, 2).to(held.dtype))[..., :-1]

    def _attend(self, sides: Sequence[Tensor], types: Tensor, places: Places, call: Call) -> Tensor:
        """Shapes:  sides: [B, T, H K], twice, and [B, T, H V];  types: [B, H, all chunks];  out: [B, T, H split, V / split]"""
        q, k, v = (_split(side, self.parts).transpose(1, 2) for side in sides)
        held, tokens = places.keys - q.shape[2], q.shape[2]
        written = v.new_ones(len(v), tokens) if call.written is None else call.written
        past = [call.state(name) for name in ("keys", "values", "written")]
        marks = (written > 0.5)[:, None, :, None]
        if past[0] is not None and past[1] is not None and past[2] is not None:
            k, v, marks = (
                torch.cat((one[:, :, :held], new), dim=2)
                for one, new in zip(past, (k, v, marks), strict=True)
                if one is not None
            )
            written = torch.cat((marks[:, 0, :held, 0].to(written.dtype), written), dim=1)
        # Where all keys are those of this call and written, there is nothing to ask of them.
        is_told = call.written is not None or k.shape[2] > tokens
        self._keep({"keys": k, "values": v, "written": marks, "types": types}, places, call)
        return block_attention(
            q,
            places.aligned(k),
            places.aligned(v),
            block=self.chunk,
            start=places.first(len(q), tokens),
            gates=types.repeat_interleave(self.parts // self.heads, dim=1),
            real=None if places.real is None else places.aligned_marks(places.real),
            written=places.aligned_marks(written) if is_told else None,
        ).transpose(1, 2)

    def _keep(self, held: dict[str, Tensor], places: Places, call: Call) -> None:
        """Remembers keys, values and types, but not those of chunks that no head of any row will look at again."""
        complete = places.keys // self.chunk
        held["types"] = held["types"][:, :, :complete, None]
        # Rows with padding have their chunks at other places.
        if call.cache is not None and places.real is None and can_wait(held["keys"]):
            is_kept = (held["types"] > 0.5).any(dim=3).any(dim=1).any(dim=0)
            if not bool(is_kept.all()):
                tail = is_kept.new_ones(places.keys - complete * self.chunk)
                rows = torch.cat((is_kept.repeat_interleave(self.chunk), tail))
                held = {name: one[:, :, is_kept if name == "types" else rows] for name, one in held.items()}
        call.keep(**held)

    def _account(self, routes: Tensor, call: Call) -> None:
        """Tells the share of complete chunks that the router would have softmax, and asks for the share that is wanted.

        Shapes:  routes: [B, chunks, H, 3]
        """
        # Of a complete chunk one of m is 1.
        share = routes[..., 2].sum() / routes[..., :2].detach().sum().clamp(min=1.0)
        call.add_loss("nats_l_share", share.detach(), 0.0)
        if self.budget is not None:
            call.add_loss("nats_l_budget", (share - self.budget).square(), self.budget_factor)

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:
        """The name of the code that does the mixing: of a part of a chunk, and of whole chunks."""
        sizes = {"K": self.head_dim, "V": self.value_dim}
        names = (super().kernel_path(device, dtype), routed_path(device, dtype, **sizes, chunk=self.chunk))
        return " and ".join(dict.fromkeys(names))

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random states after `context` tokens, all of type softmax, whose step repeats."""
        made = super().filled_cache(batch, context, like)
        states, rows = dict(made.tensors()), (batch, self.parts, context + 1)
        states["keys"] = like.new_empty(*rows, self.q_norm.weight.shape[0]).normal_()
        states["values"] = like.new_empty(*rows, self.norm.weight.shape[0]).normal_()
        states["written"] = torch.ones(batch, 1, context + 1, 1, dtype=torch.bool, device=like.device)
        exact, memory = wide_dtype(like.dtype), states["memory"]
        states["types"] = memory.new_ones(batch, self.heads, context // self.chunk, 1)
        states["start"], states["faded"] = memory.clone(), memory.new_zeros(batch, self.heads, 1)
        states["open"] = torch.zeros(batch, 1, self.qkv_proj.in_features + 2, dtype=exact, device=like.device)
        states["open"][..., -2:] = context % self.chunk
        return PreallocatedRecurrentLayer(states, context=context)


def _split(x: Tensor, heads: int) -> Tensor:
    """Shapes:  x: [..., heads d];  out: [..., heads, d]"""
    return x.reshape(*x.shape[:-1], heads, -1)


def _padding(call: Call) -> Tensor | None:
    """`key_padding`, or None where there is none."""
    if call.key_padding is None or not can_wait(call.key_padding):
        return call.key_padding
    return None if bool((call.key_padding > 0).all()) else call.key_padding
