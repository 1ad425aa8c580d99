"""Which tokens of a chunk are salient, and attention to them, to the near ones and to a linear state of all others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from heddle.compose.modules.open_chunk import Layout
from heddle.compose.modules.precision import wide
from heddle.compose.modules.stretches import is_long
from heddle.kernels.common.autocast import without_autocast
from heddle.kernels.token_split_attention import token_split_attention

# Chunks of queries whose features and weights training keeps at once; those of the others are worked out again.
CHUNKS = 8
# On CUDA, where kernels hold no weights, more of few rows are taken at once: up to so many features of queries, as if maps had as
# many as a head has dimensions; of long rows in training half as many, since the state before each chunk takes as much again.
MOST_FEATURES = 1 << 25
# Logits by which tokens are scored that stand in memory at once.
MOST_LOGITS = 1 << 24


@dataclass(frozen=True, slots=True)
class Form:
    """Tokens of a chunk, how many of them stay keys, and the factor of the logits."""

    chunk: int
    keep: int
    scale: float


@dataclass(frozen=True, slots=True)
class Near:
    """The chunks that queries see whole: number i is the one before the layout's chunk i, the last one its last.

    Shapes:  index: [B, C + 1, l] int64, which of the S keys stands in a slot;  inside: likewise bool
    """

    layout: Layout
    index: Tensor
    inside: Tensor

    @classmethod
    def of(cls, layout: Layout, keys: int) -> Near:
        """`keys` are S, the last of them that of the layout's last token."""
        count = (layout.chunks + 1) * layout.length
        slots = torch.arange(count, device=layout.first.device)
        place = slots + ((layout.base - 1) * layout.length)[:, None]
        index = place - layout.first[:, None] + keys - layout.real.shape[1]
        inside = (place >= 0) & (index >= 0) & (index < keys)
        index, inside = (x.unflatten(1, (-1, layout.length)) for x in (index, inside))  # type: ignore[no-untyped-call]
        return cls(layout, index.clamp(min=0, max=keys - 1), inside)

    def rows(self, x: Tensor) -> Tensor:
        """Shapes:  x: [B, N, S] or [B, N, S, d];  out: [B, N, C + 1, l, ...], 0 in slots without a key"""
        more = [1] * (x.dim() - 3)
        index, inside = (one.flatten(1).view(len(one), 1, -1, *more) for one in (self.index, self.inside))
        found = x.gather(2, index.expand(-1, x.shape[1], -1, *x.shape[3:])) * inside.to(x.dtype)
        return found.unflatten(2, self.index.shape[1:])  # type: ignore[no-any-return, no-untyped-call]

    def own(self) -> Tensor:
        """The slot of each query's own key among those of the chunk before its own and its own.  Shapes:  out: [B, L, 1]"""
        size, tokens = self.layout.length, self.layout.real.shape[1]
        if tokens == 1:
            return (size + self.layout.first % size)[:, None, None]
        slots = torch.arange(size, 2 * size, device=self.index.device)
        return slots[None, :, None].expand(len(self.index), -1, -1)

    def chosen(self, scores: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """The keys of each chunk with the largest scores, of equal ones the later, and which of them are there.

        Shapes:  scores: [B, N, S];  out: twice [B, N, C + 1, keep]
        """
        slots = choose(self.rows(scores), keep)
        index, inside = (
            one[:, None].expand(-1, scores.shape[1], -1, -1).gather(3, slots)
            for one in (self.index, self.inside)
        )
        return index, inside


@dataclass(frozen=True, slots=True)
class Sides:
    """All that a call's queries look at, the T of them at the last of S tokens.

    Marks are 1 for keys to be seen, and have the gradient of a bias. `far_k`, `far_v` are those that stay of each chunk from the
    sequence's first on. `earlier`: tokens before the call, padding included; `padding`: how many of a row are. The gate comes
    before its sigmoid.

    Shapes:  q, gate: [B, H, T, d];  k, v: [B, N, S, d];  seen: [B, S];  kept: [B, N, S] bool;  far_k, far_v: [B, N, M, d];
             far_seen: [B, N, M];  padding: [B] or None
    """

    q: Tensor
    gate: Tensor
    k: Tensor
    v: Tensor
    seen: Tensor
    kept: Tensor
    far_k: Tensor
    far_v: Tensor
    far_seen: Tensor
    earlier: int
    padding: Tensor | None
    maps: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]

    def far(self, place: int, form: Form) -> tuple[Tensor, Tensor, Tensor]:
        """What stays of the chunks before the one before that of a place, padding included."""
        count = max(0, place // form.chunk - 1) * form.keep
        seen = self.far_seen[:, :, :count]
        if self.padding is not None:
            chunk = (place - self.padding).clamp(min=0) // form.chunk
            number = torch.arange(count, device=seen.device) // max(1, form.keep)
            seen = seen * (number < (chunk - 1)[:, None])[:, None].to(seen.dtype)
        return self.far_k[:, :, :count], self.far_v[:, :, :count], seen

    def reach(self, place: int, form: Form) -> int:
        """Tokens before a place, padding included, that belong to its chunk or to the one before that."""
        return 2 * form.chunk - 1 if self.padding is not None else form.chunk + place % form.chunk


@torch.no_grad()
def self_weights(q: Tensor, k: Tensor, seen: Tensor, near: Near, form: Form) -> Tensor:
    """The weight of each token on itself, by softmax over the last `chunk` tokens; the mean over a KV head's query heads.

    Shapes:  q: [B, T, H, d];  k: [B, N, S, d];  seen: [B, S];  out: [B, N, T], wide
    """
    found, own, size, layout = [], near.own(), form.chunk, near.layout
    slots, rows, seen = layout.spread(q), near.rows(k), near.rows(seen[:, None])[:, 0]
    slot, own = torch.arange(2 * size, device=q.device), own[:, None]
    is_own, is_before = slot == own, (slot > own - size) & (slot < own)
    together = max(1, MOST_LOGITS // (len(q) * q.shape[2] * slots.shape[2] * 2 * size))
    for i in range(0, slots.shape[1], together):
        end = min(i + together, slots.shape[1])
        keys = wide(torch.cat((rows[:, :, i:end], rows[:, :, i + 1 : end + 1]), dim=3))
        marks = torch.cat((seen[:, i:end], seen[:, i + 1 : end + 1]), dim=2)
        is_seen = (is_before & (marks > 0.5)[:, :, None]) | is_own
        queries = wide(slots[:, i:end]).unflatten(3, (k.shape[1], -1))  # type: ignore[no-untyped-call]
        logits = torch.einsum("bclngd,bncsd->bnclgs", queries, keys) * form.scale
        p = torch.softmax(logits.masked_fill(~is_seen[:, None, :, :, None], -torch.inf), dim=-1)
        index = own[:, None, ..., None].expand(*p.shape[:-1], 1)
        found.append(p.gather(-1, index)[..., 0].mean(dim=-1).movedim(1, -1))
    return layout.gather(torch.cat(found, dim=1)).transpose(1, 2)


def choose(scores: Tensor, keep: int) -> Tensor:
    """The slots of each chunk with the largest scores, of equal ones the later.  Shapes:  scores: [..., l];  out: [..., keep]"""
    best = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    return scores.shape[-1] - 1 - best


def attend_salient(sides: Sides, memory: Tensor | None, form: Form) -> tuple[Tensor, Tensor]:
    """What each query reads, and the state of the tokens that are no keys any more, by `token_split_attention`.

    The op is called for some chunks after the other, whose features training works out again.

    Shapes:  memory: [B, N, 2 f, d + 1], wide;  out: [B, H, T, d], and as memory
    """
    tokens, held = sides.q.shape[2], sides.k.shape[2] - sides.q.shape[2]
    size = _together(sides, form) * form.chunk
    first = size - sides.earlier % form.chunk
    if tokens <= first:
        return _part(sides, form, (0, held), memory, sides.q, sides.gate, sides.k, sides.v)
    ends = [*range(first, tokens, size), tokens]
    sizes = [end - begin for begin, end in zip((0, *ends), ends, strict=False)]
    # Of slices each gradient would be as long as the whole.
    queries = [torch.split(side, sizes, dim=2) for side in (sides.q, sides.gate)]
    keys = [torch.split(side, [held + sizes[0], *sizes[1:]], dim=2) for side in (sides.k, sides.v)]
    if is_long(tokens):
        # Views would keep the whole in memory until the last of them has its gradient.
        queries, keys = ([tuple(map(torch.clone, side)) for side in both] for both in (queries, keys))
        none = sides.q.new_empty(0)
        sides = replace(sides, q=none, gate=none, k=none, v=none)
    run = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    last = tuple(side[0].detach()[:, :, :0] for side in keys)
    told = []
    for end, q, gate, k, v in zip(ends, *queries, *keys, strict=True):
        given = (sides, form, (end - q.shape[2], held), memory, q, gate, last[0], k, last[1], v)
        o, memory = run(_part, *given)
        reach = sides.reach(sides.earlier + end, form)
        last = tuple(side[:, :, -reach:] for side in (k, v))
        told.append(o)
    assert memory is not None
    return torch.cat(told, dim=2), memory


def _together(sides: Sides, form: Form) -> int:
    """Chunks of queries that the op is called for at once."""
    B, H, tokens, d = sides.q.shape
    most = MOST_FEATURES // 2 if is_long(tokens) else MOST_FEATURES
    return max(CHUNKS, most // (2 * B * H * d * form.chunk)) if sides.q.is_cuda else CHUNKS


def _part(
    sides: Sides, form: Form, at: tuple[int, int], memory: Tensor | None, *rows: Tensor
) -> tuple[Tensor, Tensor]:
    """`attend_salient` for the queries from a number on; `at` is that number, and how many keys come before all queries.

    Shapes:  rows: q and gate, each [B, H, t, d]; pieces of k, and as many of v, the last of which end where q does
    """
    (q, gate), pieces = rows[:2], (len(rows) - 2) // 2
    k, v = (x[0] if pieces == 1 else torch.cat(x, dim=2) for x in (rows[2 : 2 + pieces], rows[2 + pieces :]))
    begin, held = at
    place = sides.earlier + begin
    reach = min(k.shape[2] - q.shape[2], sides.reach(place, form)) + q.shape[2]
    k, v = k[:, :, -reach:], v[:, :, -reach:]
    end = held + begin + q.shape[2]
    far_k, far_v, far_seen = sides.far(place, form)
    with without_autocast(q):
        o, state = token_split_attention(
            q,
            k,
            v,
            sides.kept[:, :, end - reach : end],
            gate=torch.sigmoid(wide(gate)),
            phi_q=sides.maps[0](q),
            phi_k=sides.maps[1](k),
            chunk=form.chunk,
            keep=form.keep,
            begin=place + q.shape[2] - reach,
            padding=sides.padding,
            written=sides.seen[:, end - reach : end],
            far_k=far_k,
            far_v=far_v,
            far_written=far_seen,
            initial_state=memory,
            scale=form.scale,
        )
    return o, state
