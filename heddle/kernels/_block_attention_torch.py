"""block_attention in plain torch: blocks of queries over all keys up to the last of them, gradients worked out again.

All of it is float32 (float64 for float64): nothing is rounded but inputs and output. The kernels, whose baseline it is, round
weights as well before they multiply values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.kernels.op import wide_dtype

# Queries that are worked on together.
QUERIES = 64


@dataclass(frozen=True, slots=True)
class Form:
    """What is fixed: factor of the logits, keys of a block, and how many blocks landmarks let a query read (None: all)."""

    scale: float
    block: int
    top: int | None


@dataclass(frozen=True, slots=True)
class Given:
    """The inputs in the wide dtype, keys up to whole blocks, query heads beside the key head that they share.

    Shapes:  q: [B, N, G, T, d];  k: [B, N, C block, d];  v: [B, N, C block, V];  landmarks: [B, N, C, d] or None;
             chosen: [B, N, T, C] bool or None;  gates: [B, N, C] or None;  start: [B] int64;  seen: [1 or B, C block] bool;
             length: S
    """

    q: Tensor
    k: Tensor
    v: Tensor
    landmarks: Tensor | None
    chosen: Tensor | None
    gates: Tensor | None
    start: Tensor
    seen: Tensor
    length: int

    @classmethod
    def of(
        cls,
        sides: tuple[Tensor, Tensor, Tensor],
        choice: tuple[Tensor | None, Tensor | None, Tensor | None],
        start: Tensor,
        limits: tuple[Tensor | None, Tensor | None],
        block: int,
    ) -> Given:
        (q, k, v), (landmarks, chosen, gates), wide = sides, choice, wide_dtype(sides[0].dtype)
        length, tail = k.shape[2], -k.shape[2] % block
        seen = torch.ones(1, length, dtype=torch.bool, device=q.device)
        for limit in limits:
            seen = seen if limit is None else seen & (limit > 0.5)
        k, v = (F.pad(side.to(wide), (0, 0, 0, tail)) for side in (k, v))
        queries = q.to(wide).unflatten(1, (k.shape[1], -1))  # type: ignore[no-untyped-call]
        marks = None if landmarks is None else landmarks.to(wide)
        return cls(queries, k, v, marks, chosen, gates, start, F.pad(seen, (0, tail)), length)


@dataclass(frozen=True, slots=True)
class Part:
    """One block of queries and the first `keys` keys, C blocks of them; R = G times its queries.

    `own` is the query's own key, `own_block` its block. `p` are the weights of the keys, `inner` those inside each earlier block
    that a landmark stands for, `kept` the landmarks that count; both None without landmarks.

    Shapes:  q: [B, N, R, d];  own: [B, 1, R, keys] bool;  own_block: [B, 1, R, C] bool;  p, inner: [B, N, R, keys];
             kept: [B, N, R, C] bool
    """

    rows: slice
    keys: int
    q: Tensor
    own: Tensor
    own_block: Tensor
    p: Tensor
    inner: Tensor | None
    kept: Tensor | None


def forward(given: Given, form: Form) -> Tensor:
    """Shapes:  out: [B, N, G, T, V]"""
    groups = given.q.shape[2]
    found = [
        (one.p @ given.v[:, :, : one.keys]).unflatten(2, (groups, -1))  # type: ignore[no-untyped-call]
        for one in _parts(given, form)
    ]
    return torch.cat(found, dim=3)


def backward(d_out: Tensor, given: Given, form: Form) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, landmarks and gates (empty without them) and of a bias of the logits of each key but a query's own.

    With e_j = p_j (v_j · g - p · v g) and E_b its sum over block b: ds_j = e_j, and of blocks behind landmarks
    ds_j = e_j - inner_j E_b, dl_b = E_b.
    """
    dq, dk, dv = (torch.zeros_like(x) for x in (given.q, given.k, given.v))
    d_marks = given.q.new_zeros(0) if given.landmarks is None else torch.zeros_like(given.landmarks)
    d_gates = dk.new_zeros(0 if given.gates is None else given.gates.shape)
    d_bias = dk.new_zeros(dk.shape[0], given.k.shape[2])
    for one in _parts(given, form):
        keys, shape = slice(0, one.keys), given.q[:, :, :, one.rows].shape
        k, g = given.k[:, :, keys], d_out[:, :, :, one.rows].flatten(2, 3)
        ds = g @ given.v[:, :, keys].mT
        ds = one.p * (ds - (one.p * ds).sum(-1, keepdim=True))
        dq_part = None
        if one.inner is not None and one.kept is not None and given.landmarks is not None:
            d_block = _blocks(ds, form.block).sum(-1) * one.kept
            ds = ds - (_blocks(one.inner, form.block) * d_block[..., None]).flatten(-2)
            count = one.kept.shape[-1]
            dq_part = d_block @ given.landmarks[:, :, :count]
            d_marks[:, :, :count] += form.scale * d_block.mT @ one.q
        dq_part = ds @ k if dq_part is None else ds @ k + dq_part
        dq[:, :, :, one.rows] = (form.scale * dq_part).view(shape)
        dk[:, :, keys] += form.scale * ds.mT @ one.q
        dv[:, :, keys] += one.p.mT @ g
        d_bias[:, keys] += ds.masked_fill(one.own, 0.0).sum((1, 2))
        if given.gates is not None:
            earlier = _blocks(ds, form.block).sum(-1).masked_fill(one.own_block, 0.0)
            d_gates[:, :, : earlier.shape[-1]] += earlier.sum(2)
    held = slice(0, given.length)
    return dq, dk[:, :, held], dv[:, :, held], d_marks, d_gates, d_bias[:, held]


def _parts(given: Given, form: Form) -> Iterator[Part]:
    length = given.q.shape[3]
    for first in range(0, length, QUERIES):
        last = min(first + QUERIES, length)
        # The last query's place in a row without padding, where it is furthest.
        count = (given.length - length + last - 1) // form.block + 1
        keys = count * form.block
        q = given.q[:, :, :, first:last].flatten(2, 3)
        place = given.start[:, None] + torch.arange(first, last, device=q.device)
        place = place.repeat(1, given.q.shape[2])[:, None, :, None]
        key = torch.arange(keys, device=q.device)
        own = key == place
        seen = ((key < place) & given.seen[:, None, None, :keys]) | own
        is_own = torch.arange(count, device=q.device) == place // form.block
        logits = ((q @ given.k[:, :, :keys].mT) * form.scale).masked_fill(~seen, -torch.inf)
        if given.landmarks is None:
            kept, inner = None, None
            if given.chosen is not None:
                read = given.chosen[:, :, first:last, :count].repeat(1, 1, given.q.shape[2], 1)
                read = read.repeat_interleave(form.block, dim=-1) | own
                logits = logits.masked_fill(~read, -torch.inf)
            if given.gates is not None:
                read = (given.gates[:, :, None, :count] > 0.5) | is_own
                logits = logits.masked_fill(~read.repeat_interleave(form.block, dim=-1), -torch.inf)
        else:
            marks = (q @ given.landmarks[:, :, :count].mT) * form.scale
            logits, inner, kept = _gated(logits, marks, is_own, form)
        yield Part(slice(first, last), keys, q, own, is_own, _softmax(logits), inner, kept)


def _gated(logits: Tensor, marks: Tensor, is_own: Tensor, form: Form) -> tuple[Tensor, Tensor, Tensor]:
    """Logits whose plain softmax has each block's weight from its landmark, the own block's keys apart.

        s'_j = s_j + l_b - logsumexp_{i in b} s_i        so that  sum_{j in b} e^s'_j = e^l_b

    Shapes:  logits: [B, N, R, C block], -inf where nothing is seen;  marks: [B, N, R, C];  is_own: [B, 1, R, C] bool;
             out: as logits, twice, and as marks, bool
    """
    split = _blocks(logits, form.block)
    total = torch.logsumexp(split, dim=-1)
    marks = marks.masked_fill(is_own | (total == -torch.inf), -torch.inf)
    if form.top is not None and form.top < marks.shape[-1]:
        # Of equal landmarks the earlier one is read.
        best = marks.sort(dim=-1, descending=True, stable=True).indices[..., : form.top]
        chosen = torch.zeros_like(marks, dtype=torch.bool).scatter(-1, best, True)
        marks = marks.masked_fill(~chosen, -torch.inf)
    kept = marks > -torch.inf
    inner = torch.where(kept[..., None], split - total[..., None], -torch.inf)
    moved = torch.where(is_own[..., None], split, inner + marks[..., None])
    return moved.flatten(-2), inner.exp().flatten(-2), kept


def _softmax(logits: Tensor) -> Tensor:
    """The softmax of each row; 0 where a row sees nothing."""
    most = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    weight = torch.exp(logits - most)
    return weight / weight.sum(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).tiny)


def _blocks(x: Tensor, block: int) -> Tensor:
    """Shapes:  x: [..., C block];  out: [..., C, block]"""
    return x.unflatten(-1, (-1, block))  # type: ignore[no-any-return, no-untyped-call]
