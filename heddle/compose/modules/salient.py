"""Attention to the own and the last chunk, to salient tokens of earlier ones, and to a linear state of all others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from heddle.compose.modules.experts import without_autocast
from heddle.compose.modules.open_chunk import Layout
from heddle.compose.modules.precision import wide

# Chunks of queries whose weights training keeps at once; those of the others are worked out again.
CHUNKS = 8


@dataclass(frozen=True, slots=True)
class Form:
    """Tokens of a chunk, how many of them stay keys, and the factor of the logits."""

    chunk: int
    keep: int
    scale: float


@dataclass(frozen=True, slots=True)
class Near:
    """The chunks that queries see whole: number i is the one before the layout's chunk i, the last one its last.

    Shapes:  index: [B, (C + 1) l] int64, which of the S keys stands in a slot;  inside: likewise bool
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
        return cls(layout, index.clamp(min=0, max=keys - 1), inside)

    def rows(self, x: Tensor) -> Tensor:
        """Shapes:  x: [B, N, S, d];  out: [B, N, C + 1, l, d], 0 in slots without a key"""
        tokens, offset = self.layout.real.shape[1], self.layout.offset
        if offset is not None and tokens > 1:
            # The first new token stands behind as many slots in all rows; of a gather gradients would keep all keys again.
            ahead = self.layout.length + offset - (x.shape[2] - tokens)
            found = F.pad(x, (0, 0, ahead, self.index.shape[1] - ahead - x.shape[2]))
            return found.unflatten(2, (-1, self.layout.length))  # type: ignore[no-any-return, no-untyped-call]
        found = x.gather(2, self.index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
        found = found * self.inside[:, None, :, None].to(x.dtype)
        return found.unflatten(2, (-1, self.layout.length))  # type: ignore[no-any-return, no-untyped-call]

    def marks(self, x: Tensor) -> Tensor:
        """Shapes:  x: [B, S];  out: [B, C + 1, l], 0 in slots without a key"""
        found = x.gather(1, self.index) * self.inside.to(x.dtype)
        return found.unflatten(1, (-1, self.layout.length))  # type: ignore[no-any-return, no-untyped-call]

    def own(self) -> Tensor:
        """The slot of each query's own key among those of the chunk before its own and its own.  Shapes:  out: [B, L, 1]"""
        size, tokens = self.layout.length, self.layout.real.shape[1]
        if tokens == 1:
            return (size + self.layout.first % size)[:, None, None]
        slots = torch.arange(size, 2 * size, device=self.index.device)
        return slots[None, :, None].expand(len(self.index), -1, -1)


@dataclass(frozen=True, slots=True)
class Sides:
    """All that a call's queries look at.

    `chosen` are the slots of near keys that stay keys, `leaves` the chunks that have left the two in sight when the call ends.
    `most` bounds the number of the first chunk in every row. Marks are 1 for keys to be seen, and have the gradient of a bias.
    `maps` are φ of queries and of keys. The gate comes before its sigmoid.

    Shapes:  q, gate: [B, C, L, H, d];  k, v: [B, N, C + 1, l, d];  seen: [B, C + 1, l];  chosen: [B, N, C + 1, l] bool;
             leaves: [B, C + 1] bool;  far_k, far_v: [B, N, M, d];  far_seen: [B, N, M]
    """

    q: Tensor
    gate: Tensor
    k: Tensor
    v: Tensor
    seen: Tensor
    chosen: Tensor
    leaves: Tensor
    far_k: Tensor
    far_v: Tensor
    far_seen: Tensor
    most: int
    maps: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
    # The chunk with which q, gate, k and v begin.
    begin: int = 0


@torch.no_grad()
def self_weights(q: Tensor, k: Tensor, seen: Tensor, near: Near, form: Form) -> Tensor:
    """The weight of each token on itself, by softmax over the last `chunk` tokens; the mean over a KV head's query heads.

    Shapes:  as in `Sides`;  out: [B, C, L, N], wide
    """
    found, own, size = [], near.own(), form.chunk
    slot = torch.arange(2 * size, device=q.device)
    for i in range(q.shape[1]):
        keys, marks = wide(k[:, :, i : i + 2].flatten(2, 3)), seen[:, i : i + 2].flatten(1)
        is_seen = ((slot > own - size) & (slot < own) & (marks > 0.5)[:, None]) | (slot == own)
        logits = torch.einsum("blngd,bnsd->bnlgs", _grouped(q[:, i], k.shape[1]), keys) * form.scale
        p = torch.softmax(logits.masked_fill(~is_seen[:, None, :, None], -torch.inf), dim=-1)
        index = own[:, None, :, None].expand(*p.shape[:-1], 1)
        found.append(p.gather(-1, index)[..., 0].mean(dim=-1).mT)
    return torch.stack(found, dim=1)


def choose(scores: Tensor, keep: int) -> Tensor:
    """The slots of each chunk with the largest scores, of equal ones the later.  Shapes:  scores: [..., l];  out: [..., keep]"""
    best = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    return scores.shape[-1] - 1 - best


def attend_salient(
    sides: Sides, memory: Tensor, near: Near, form: Form, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What each query reads, and the state of the tokens that are no keys any more.        (arXiv 2602.02180)

        o = (sum_E e^(s_j - m) v_j + gate * φ(q) S) / (sum_E e^(s_j - m) + φ(q) z),   [S, z] = sum_F φ(k_j)ᵀ [v_j, 1]

    E holds the query's own key, so its sum is at least 1. A chunk after the other, all wide, the outputs given in `dtype`; in
    training the weights of a few chunks stand in memory at once.

    Shapes:  memory: [B, N, 2 f, d + 1], wide;  out: [B, C, L, H, d], and as memory
    """
    chunks = sides.q.shape[1]
    if not torch.is_grad_enabled() or chunks <= CHUNKS:
        return _chunks(sides, memory, near, form, dtype)

    def part(begin: int, memory: Tensor, q: Tensor, gate: Tensor, *keys: Tensor) -> tuple[Tensor, Tensor]:
        k, v = torch.cat(keys[:2], dim=2), torch.cat(keys[2:], dim=2)
        return _chunks(replace(sides, q=q, gate=gate, k=k, v=v, begin=begin), memory, near, form, dtype)

    # Of slices each gradient would be as long as the whole.
    parts = [torch.split(side, CHUNKS, dim=1) for side in (sides.q, sides.gate)]
    parts += [torch.split(side[:, :, 1:], CHUNKS, dim=2) for side in (sides.k, sides.v)]
    last_k, last_v, told = sides.k[:, :, :1], sides.v[:, :, :1], []
    for begin, q, gate, k, v in zip(range(0, chunks, CHUNKS), *parts, strict=True):
        where = (begin, memory, q, gate, last_k, k, last_v, v)
        o, memory = checkpoint(part, *where, use_reentrant=False, preserve_rng_state=False)
        last_k, last_v = k[:, :, -1:], v[:, :, -1:]
        told.append(o)
    return torch.cat(told, dim=1), memory


def _chunks(
    sides: Sides, memory: Tensor, near: Near, form: Form, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`attend_salient` for the chunks of `sides`."""
    told = []
    for i in range(sides.begin, sides.begin + sides.q.shape[1]):
        o, memory = _chunk(i, sides, memory, near, form)
        told.append(o.to(dtype))
    return torch.stack(told, dim=1), memory


def _chunk(
    i: int,
    sides: Sides,
    memory: Tensor,
    near: Near,
    form: Form,
) -> tuple[Tensor, Tensor]:
    """Shapes:  out: [B, L, H, d], and as memory"""
    with without_autocast(sides.q):
        heads, stores, at = sides.q.shape[3], sides.k.shape[1], i - sides.begin
        q = wide(sides.q[:, at]).transpose(1, 2)
        logits, values = _exact(i, q, sides, near, form)
        # The largest logit has a gradient: the state's part is not divided by its exponential.
        weights = torch.exp(logits - logits.amax(dim=-1, keepdim=True))
        told = weights.flatten(2, 3) @ values
        phi = sides.maps[0](q).unflatten(1, (stores, -1))  # type: ignore[no-untyped-call]
        recalled = phi.flatten(2, 3) @ memory
        told, recalled = (
            one.unflatten(2, (heads // stores, -1)).flatten(1, 2).transpose(1, 2) for one in (told, recalled)
        )
        total = told[..., -1:] + recalled[..., -1:]
        o = (told[..., :-1] + torch.sigmoid(wide(sides.gate[:, at])) * recalled[..., :-1]) / total
        weight = (sides.seen[:, i] * sides.leaves[:, i, None].to(sides.seen.dtype))[:, None]
        weight = weight.masked_fill(sides.chosen[:, :, i], 0.0)
        keys = sides.maps[1](sides.k[:, :, at]) * weight[..., None]
        return o, memory + keys.mT @ _counted(sides.v[:, :, at])


def _exact(i: int, q: Tensor, sides: Sides, near: Near, form: Form) -> tuple[Tensor, Tensor]:
    """Logits of the tokens that are keys, -inf for those that are not seen, and their values with a 1 at the end.

    Shapes:  q: [B, H, L, d];  out: [B, N, G, L, keys], [B, N, keys, d + 1]
    """
    q, own, chunk = q.unflatten(1, (sides.k.shape[1], -1)), near.own(), near.layout.base + i  # type: ignore[no-untyped-call]
    at = i - sides.begin
    keys, values = (wide(side[:, :, at : at + 2].flatten(2, 3)) for side in (sides.k, sides.v))
    slot = torch.arange(2 * form.chunk, device=q.device)
    seen, is_own = sides.seen[:, i : i + 2].flatten(1)[:, None], slot == own
    is_seen = (((slot < own) & (seen > 0.5)) | is_own)[:, None]
    bias = (seen - seen.detach()).masked_fill(is_own, 0.0)[:, None]
    count = min(sides.far_k.shape[2], max(0, sides.most + i - 1) * form.keep)
    if count > 0:
        keys, values = (
            torch.cat((wide(far[:, :, :count]), side), dim=2)
            for far, side in ((sides.far_k, keys), (sides.far_v, values))
        )
        far = sides.far_seen[:, :, None, :count]
        past = torch.arange(count, device=q.device) // form.keep < (chunk - 1)[:, None, None, None]
        shape = (-1, far.shape[1], is_seen.shape[2], -1)
        is_seen = torch.cat(((past & (far > 0.5)).expand(shape), is_seen.expand(shape)), dim=-1)
        bias = torch.cat(((far - far.detach()).expand(shape), bias.expand(shape)), dim=-1)
    logits = (q @ keys[:, :, None].mT) * form.scale + bias[:, :, None]
    return logits.masked_fill(~is_seen[:, :, None], -torch.inf), _counted(values)


def _counted(values: Tensor) -> Tensor:
    """Values with a 1 at the end, so that weights are summed beside them.  Shapes:  [..., d] to [..., d + 1], wide"""
    return F.pad(wide(values), (0, 1), value=1.0)


def _grouped(q: Tensor, stores: int) -> Tensor:
    """Shapes:  q: [B, L, H, d];  out: [B, L, N, G, d], wide"""
    return wide(q).unflatten(2, (stores, -1))  # type: ignore[no-any-return, no-untyped-call]
