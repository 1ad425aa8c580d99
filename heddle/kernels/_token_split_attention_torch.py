"""token_split_attention in plain torch: a chunk of queries after the other, over its keys and over the state so far.

All of it is float32 (float64 for float64); gradients are autograd's, for which a few chunks' weights stand in memory at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from heddle.kernels.op import wide_dtype

# Chunks of queries whose weights training keeps at once; of more each group's are worked out again.
CHUNKS = 16


@dataclass(frozen=True, slots=True)
class Form:
    """Tokens of a chunk, how many of them stay keys at most, the place of the first key, and the factor of the logits."""

    chunk: int
    keep: int
    begin: int
    scale: float


@dataclass(frozen=True, slots=True)
class Given:
    """The tensors of a call, as `token_split_attention` has them; `padding`, `written` and what is far may be None."""

    q: Tensor
    k: Tensor
    v: Tensor
    kept: Tensor
    gate: Tensor
    phi_q: Tensor
    phi_k: Tensor
    padding: Tensor | None
    written: Tensor | None
    far_k: Tensor | None
    far_v: Tensor | None
    far_written: Tensor | None


@dataclass(frozen=True, slots=True)
class Grid:
    """Where tokens stand in whole chunks: queries in C of them from `base` on, keys in C + 1 from the one before that on.

    One query stands in a chunk of one slot. `first` and `base`, the first query's place and chunk, and what follows from them are
    integers where all rows have the same, and [B] else.
    """

    length: int
    queries: int
    keys: int
    chunks: int
    first: Tensor | int
    base: Tensor | int
    begin: Tensor | int

    @classmethod
    def of(cls, given: Given, form: Form) -> Grid:
        T, S, size = given.q.shape[2], given.k.shape[2], form.chunk
        if given.padding is None:
            first = form.begin + S - T
            chunks = 1 if T == 1 else -(-(first % size + T) // size)
            return cls(size, T, S, chunks, first, first // size, form.begin)
        firsts = form.begin + S - T - given.padding
        chunks = 1 if T == 1 else -(-(size - 1 + T) // size)
        base = firsts.clamp(min=0) // size
        return cls(size, T, S, chunks, firsts, base, form.begin - given.padding)

    def of_queries(self, x: Tensor) -> tuple[Tensor, ...]:
        """Shapes:  x: [B, H, T, d];  out: C times [B, H, L, d], 0 in slots without a query"""
        return self.slots(x).unbind(2)

    def slots(self, x: Tensor) -> Tensor:
        """Shapes:  x: [B, H, T, d];  out: [B, H, C, L, d], 0 in slots without a query"""
        if self.queries == 1:
            return x[:, :, None]
        spread = _spread(x, self.base * self.length - self.first, self.chunks * self.length)
        return spread.unflatten(2, (self.chunks, self.length))  # type: ignore[no-any-return, no-untyped-call]

    def of_keys(self, x: Tensor) -> Tensor:
        """Shapes:  x: [B, N, S, d];  out: [B, N, C + 1, l, d], 0 in slots without a key"""
        at = (self.base - 1) * self.length - self.begin
        spread = _spread(x, at, (self.chunks + 1) * self.length)
        return spread.unflatten(2, (self.chunks + 1, self.length))  # type: ignore[no-any-return, no-untyped-call]

    def marks(self, like: Tensor, written: Tensor | None) -> Tensor:
        """Which keys are there and written.  Shapes:  written: [B, S];  out: [B, C + 1, l] of 0 and 1"""
        marks = like.new_ones(len(like), self.keys) if written is None else written.to(like.dtype)
        found = self.of_keys(marks[:, None, :, None])[:, 0, ..., 0]
        if isinstance(self.base, int):
            return found
        # Padding has places too.
        number = self.base[:, None] - 1 + torch.arange(self.chunks + 1, device=like.device)
        return found * (number >= 0)[..., None].to(like.dtype)

    def leaving(self, device: torch.device) -> Tensor:
        """The chunks of keys that no later query sees whole.  Shapes:  out: [1 or B, C + 1] bool"""
        number = torch.arange(-1, self.chunks, device=device)[None]
        left = (self.first + self.queries) // self.length - 2 - self.base
        return number <= (left if isinstance(left, int) else left[:, None])

    def own(self, device: torch.device) -> Tensor:
        """The slot of each query's own key among those of the chunk before its own and its own.  Shapes:  out: [1 or B, L, 1]"""
        if self.queries > 1:
            return torch.arange(self.length, 2 * self.length, device=device)[None, :, None]
        if isinstance(self.first, int):
            return torch.full((1, 1, 1), self.length + self.first % self.length, device=device)
        return (self.length + self.first % self.length)[:, None, None]

    def gather(self, x: Tensor) -> Tensor:
        """Back to the order of the tokens, 0 at negative places.  Shapes:  x: [B, H, C L, d];  out: [B, H, T, d]"""
        if isinstance(self.first, int) or isinstance(self.base, int):
            at = 0 if self.queries == 1 else self.first - self.base * self.length
            return x[:, :, at : at + self.queries]
        token = torch.arange(self.queries, device=x.device)
        if self.queries > 1:
            x = _spread(x, self.first - self.base * self.length, self.queries)
        return x * (self.first[:, None] + token >= 0)[:, None, :, None].to(x.dtype)


def _spread(x: Tensor, at: Tensor | int, count: int) -> Tensor:
    """`count` tokens from number `at` on, 0 where there is none.  Shapes:  x: [B, H, n, d];  at: [B];  out: [B, H, count, d]"""
    if isinstance(at, int):
        return F.pad(x, (0, 0, -at, at + count - x.shape[2]))
    token = torch.arange(count, device=x.device) + at[:, None]
    inside = (token >= 0) & (token < x.shape[2])
    token = token.clamp(min=0, max=x.shape[2] - 1)
    found = x.gather(2, token[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
    return found * inside[:, None, :, None].to(x.dtype)


@dataclass(frozen=True, slots=True)
class Sides:
    """All that the queries of a call look at, chunk by chunk. What is far comes before what is kept; keys and values are wide.

    `folded` says how much of a key the state takes. Marks are 1 for keys to be seen and have the gradient of a bias.

    Shapes:  q, gate, phi_q: C times [B, H, L, *];  k, v, phi_k: C + 1 times [B, N, l, *];  seen: [B, C + 1, l];
             folded: [B, N, C + 1, l];  kept_k, kept_v: [B, N, M + (C - 1) keep, *];  kept_seen: likewise;  far: M
    """

    q: tuple[Tensor, ...]
    gate: tuple[Tensor, ...]
    phi_q: tuple[Tensor, ...]
    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    phi_k: tuple[Tensor, ...]
    seen: Tensor
    folded: Tensor
    kept_k: Tensor
    kept_v: Tensor
    kept_seen: Tensor
    far: int
    own: Tensor

    @classmethod
    def of(cls, given: Given, form: Form, grid: Grid) -> Sides:
        wide = wide_dtype(given.k.dtype)
        # Many chunks read a key: in float32 what they pass back is summed, and rounded once.
        k, v, phi_k = (grid.of_keys(x) for x in (given.k.to(wide), given.v.to(wide), given.phi_k))
        seen = grid.marks(k.new_empty(len(k), 0), given.written)
        stays = grid.of_keys(given.kept.to(torch.float32)[..., None])[..., 0] > 0.5
        # Of more than `keep` the first stay, so that every token counts once.
        stays = stays & (stays.cumsum(-1) <= form.keep)
        marks = seen[:, None].expand(k.shape[:-1])
        parts: list[tuple[Tensor, ...]] = []
        if given.far_k is not None and given.far_v is not None:
            far_seen = (
                marks.new_ones(given.far_k.shape[:3]) if given.far_written is None else given.far_written
            )
            parts.append((given.far_k.to(wide), given.far_v.to(wide), far_seen.to(wide)))
        count = parts[0][0].shape[2] if parts else 0
        if grid.chunks > 1 or not parts:
            parts.append(_kept((k, v, marks), stays, form.keep))
        kept = [one[0] if len(parts) == 1 else torch.cat(one, dim=2) for one in zip(*parts, strict=True)]
        leaving = grid.leaving(k.device)[:, None, :, None].to(marks.dtype)
        q, gate, phi_q = (grid.of_queries(x) for x in (given.q, given.gate, given.phi_q))
        folded = (marks * leaving).masked_fill(stays, 0.0)
        keys = (k.unbind(2), v.unbind(2), phi_k.unbind(2))
        return cls(
            q, gate, phi_q, *keys, seen, folded, kept[0], kept[1], kept[2], count, grid.own(given.k.device)
        )


def _kept(sides: tuple[Tensor, ...], stays: Tensor, keep: int) -> tuple[Tensor, ...]:
    """Keys, values and marks of the tokens that stay of all chunks but the last two, which are seen whole.

    Shapes:  sides: [B, N, C + 1, l, *] twice, [B, N, C + 1, l];  stays: as the last;  out: [B, N, (C - 1) keep, ...]
    """
    k, v, marks = (x[:, :, :-2] for x in sides)
    stays = stays[:, :, :-2]
    slots = stays.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    index = slots[..., None]
    found = [x.gather(3, index.expand(*slots.shape, x.shape[-1])) for x in (k, v)]
    return tuple(x.flatten(2, 3) for x in (*found, marks.masked_fill(~stays, 0.0).gather(3, slots)))


def forward(given: Given, form: Form, state: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes:  state: [B, N, f, V + 1], wide;  out: [B, H, T, V] of the type of v, and as state"""
    grid = Grid.of(given, form)
    sides, found = Sides.of(given, form, grid), []
    is_kept_whole = not torch.is_grad_enabled() or grid.chunks <= CHUNKS
    for first in range(0, grid.chunks, grid.chunks if is_kept_whole else CHUNKS):
        if is_kept_whole:
            o, state = _chunks(sides, form, range(grid.chunks), given.v.dtype)(state)
        else:
            part = _chunks(sides, form, range(first, min(first + CHUNKS, grid.chunks)), given.v.dtype)
            o, state = checkpoint(part, state, use_reentrant=False, preserve_rng_state=False)
        found.append(o)
    return grid.gather(torch.cat(found, dim=2)), state


def _chunks(
    sides: Sides, form: Form, some: range, dtype: torch.dtype
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """What takes the state before some chunks and gives their outputs and the state behind them."""

    def run(state: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for i in some:
            o, state = _chunk(i, sides, form, state)
            found.append(o.to(dtype))
        return torch.cat(found, dim=2), state

    return run


def _chunk(i: int, sides: Sides, form: Form, state: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes:  state: [B, N, f, V + 1];  out: [B, H, L, V], and as state"""
    stores, wide = sides.k[i].shape[1], state.dtype
    q, phi_q = (x[i].to(wide).unflatten(1, (stores, -1)) for x in (sides.q, sides.phi_q))  # type: ignore[no-untyped-call]
    logits, values = _exact(i, q, sides, form)
    # The largest logit has a gradient: the state's part is not divided by its exponential.
    weights = torch.exp(logits - logits.amax(dim=-1, keepdim=True))
    told, recalled = weights.flatten(2, 3) @ values, phi_q.flatten(2, 3) @ state
    told, recalled = (x.unflatten(2, q.shape[2:4]).flatten(1, 2) for x in (told, recalled))
    total = told[..., -1:] + recalled[..., -1:]
    o = (told[..., :-1] + sides.gate[i].to(wide) * recalled[..., :-1]) / total
    keys = sides.phi_k[i].to(wide) * sides.folded[:, :, i, :, None]
    return o, state + keys.mT @ _counted(sides.v[i])


def _exact(i: int, q: Tensor, sides: Sides, form: Form) -> tuple[Tensor, Tensor]:
    """Logits of the tokens that are keys, -inf for those that are not seen, and their values with a 1 at the end.

    Shapes:  q: [B, N, G, L, d];  out: [B, N, G, L, keys], [B, N, keys, V + 1]
    """
    count = sides.far + i * form.keep
    keys = torch.cat((sides.kept_k[:, :, :count], *sides.k[i : i + 2]), dim=2)
    values = torch.cat((sides.kept_v[:, :, :count], *sides.v[i : i + 2]), dim=2)
    slot = torch.arange(2 * form.chunk, device=q.device)
    seen, is_own = sides.seen[:, i : i + 2].flatten(1)[:, None], slot == sides.own
    is_seen = (((slot < sides.own) & (seen > 0.5)) | is_own)[:, None]
    bias = (seen - seen.detach()).masked_fill(is_own, 0.0)[:, None]
    if count > 0:
        far = sides.kept_seen[:, :, None, :count]
        shape = (*far.shape[:2], q.shape[3], -1)
        is_seen, bias = (
            torch.cat((one.expand(shape), other.expand(shape)), dim=-1)
            for one, other in ((far > 0.5, is_seen), (far - far.detach(), bias))
        )
    logits = (q @ keys[:, :, None].mT) * form.scale + bias[:, :, None]
    return logits.masked_fill(~is_seen[:, :, None], -torch.inf), _counted(values)


def _counted(values: Tensor) -> Tensor:
    """Values with a 1 at the end, so that weights are summed beside them.  Shapes:  [..., V] to [..., V + 1]"""
    return F.pad(values, (0, 1), value=1.0)
