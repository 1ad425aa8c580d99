"""Blocks of keys that are worth reading, and what they let through."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.compose.modules.precision import wide, wide_dtype
from heddle.kernels.block_attention import block_attention

# Scores that stand in memory at once, and queries they are of at least: on a GPU each part of them waits for the host.
SCORES, QUERIES = 1 << 24, 256


@dataclass(frozen=True, slots=True)
class Places:
    """Where blocks of `block` keys lie in each row: they are counted from its first real token.

    Shapes:  real, first: [B, S] bool, [B] int64 (padding on the left of each row), or None if all are real
    """

    block: int
    keys: int
    real: Tensor | None
    device: torch.device

    @property
    def blocks(self) -> int:
        return -(-self.keys // self.block)

    def shift(self) -> Tensor | None:
        """Tokens before the first real one.  Shapes:  out: [B, 1]"""
        return None if self.real is None else self.real.to(torch.int64).argmax(dim=-1, keepdim=True)

    def of_keys(self) -> Tensor:
        """The block of each key, negative in the padding.  Shapes:  out: [1 or B, keys]"""
        index, shift = torch.arange(self.keys, device=self.device)[None], self.shift()
        return (index if shift is None else index - shift) // self.block

    def means(self, k: Tensor, weights: Tensor | None) -> Tensor:
        """The mean of each block's keys, those of weight 0 left out.

        Shapes:  k: [B, KV heads, S, d];  weights: [B, S] of 0 and 1, or None;  out: [B, KV heads, blocks, d]
        """
        total, kept = self.sums(k, weights)
        return total / kept.clamp(min=1)

    def sums(self, k: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sum of each block's keys, at least float32, those of weight 0 left out, and how many they are.

        Shapes:  as `means`, and the second [1 or B, 1, blocks, 1]
        """
        if weights is None and self.real is None:
            return self._plain_sums(k)
        k = wide(k)
        kept = k.new_ones(1, self.keys) if weights is None else weights.to(k.dtype)
        if self.real is not None:
            kept = (kept * self.real).expand(k.shape[0], -1)
        tail = self.blocks * self.block - self.keys
        k, kept = F.pad(self.aligned(k), (0, 0, 0, tail)), F.pad(self.aligned_marks(kept), (0, tail))
        kept = kept.view(-1, 1, self.blocks, self.block, 1)
        return (k.view(*k.shape[:2], self.blocks, self.block, -1) * kept).sum(dim=3), kept.sum(dim=3)

    def _plain_sums(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """As `sums` where every key counts: read once as they are."""
        complete = self.keys // self.block
        whole, tail = k[:, :, : complete * self.block], k[:, :, complete * self.block :]
        total = whole.unflatten(2, (complete, self.block)).sum(dim=3, dtype=wide_dtype(k.dtype))  # type: ignore[no-untyped-call]
        kept = total.new_full((complete,), self.block)
        if tail.shape[2] > 0:
            total = torch.cat((total, tail.sum(dim=2, keepdim=True, dtype=total.dtype)), dim=2)
            kept = torch.cat((kept, kept.new_full((1,), tail.shape[2])))
        return total, kept.view(1, 1, -1, 1)

    def aligned(self, k: Tensor) -> Tensor:
        """Each row from its first real key on, and then its first keys again, hidden by whoever looks at `aligned_marks`.

        Shapes:  k, out: [B, KV heads, S, d]
        """
        shift = self.shift()
        if shift is None:
            return k
        place = (torch.arange(self.keys, device=self.device) + shift) % self.keys
        return k.gather(2, place[:, None, :, None].expand(k.shape[0], k.shape[1], -1, k.shape[3]))

    def aligned_marks(self, marks: Tensor) -> Tensor:
        """Marks of keys from each row's first real one on; of what lies behind the last they are 0.

        Shapes:  marks, out: [1 or B, S]
        """
        shift = self.shift()
        if shift is None:
            return marks
        place = torch.arange(self.keys, device=self.device) + shift
        inside = place < self.keys
        return marks.expand(len(place), -1).gather(1, place % self.keys) * inside.to(marks.dtype)

    def first(self, batch: int, queries: int) -> Tensor:
        """The place of the first of the last `queries` keys, counted from the row's first real one.  Shapes:  out: [B] int64"""
        place = torch.full((batch,), self.keys - queries, device=self.device)
        shift = self.shift()
        return place if shift is None else place - shift[:, 0]

    def keys_of(self, chosen: Tensor) -> Tensor:
        """The keys of chosen blocks.  Shapes:  chosen: [B, KV heads, T, blocks] bool;  out: [B, KV heads, T, keys] bool"""
        if self.real is None:
            return chosen.repeat_interleave(self.block, dim=-1)[..., : self.keys]
        place = self.of_keys().clamp(min=0)[:, None, None].expand(*chosen.shape[:3], -1)
        return chosen.gather(-1, place)


@dataclass(frozen=True, slots=True)
class Rule:
    """How blocks are chosen: `count` of them, the first `sink` and the last `recent` always, the others by their scores.

        mean     score_b = mean_{h in group} q_h · mean_{j in b} k_j
        kernels  score_b = max_{i overlaps b} sum_{h in group} softmax_i(scale · q_h · mean_{j in i} k_j)    (arXiv 2509.24663)

    Kernels are half a block long and a quarter apart; those that end at the query's place or before count. A query at a place
    below `dense_length` reads all blocks.
    """

    count: int
    sink: int
    recent: int
    scores: str = "mean"
    dense_length: int = 0
    scale: float | None = None


@torch.no_grad()
def choose_blocks(
    q: Tensor, k: Tensor, places: Places, rule: Rule, *, weights: Tensor | None = None
) -> Tensor:
    """The blocks that each query reads, one set for the query heads of a KV head. No gradient comes back from the choice.

    Of the complete blocks between the first and the last the best fill up to `count`; of equal ones the earlier is taken. The
    queries belong to the last T of the S keys, and are worked on in blocks.

    Shapes:  q: [B, H, T, d];  k: [B, KV heads, S, d];  weights: as in `Places.means`;
             out: [B, KV heads, T, blocks] bool
    """
    is_mean = rule.scores == "mean"
    rows = (places.means(k, weights), None) if is_mean else _kernels(k, places, weights)
    first, found = places.first(q.shape[0], q.shape[2]), []
    # Kernels are scored head by head, and four to a block.
    width = k.shape[1] * places.blocks if is_mean else q.shape[1] * 4 * places.blocks
    count = max(QUERIES, SCORES // (q.shape[0] * width))
    for start in range(0, q.shape[2], count):
        part = q[:, :, start : start + count]
        place = first[:, None] + torch.arange(start, start + part.shape[2], device=q.device)
        heads = wide(part).unflatten(1, (k.shape[1], -1))  # type: ignore[no-untyped-call]
        if rows[1] is None:
            score = heads.mean(dim=2) @ rows[0].mT
        else:
            score = _kernel_scores(heads, (rows[0], rows[1]), place, places.block, rule.scale)
        found.append(_best(score, place, places.block, rule))
    return found[0] if len(found) == 1 else torch.cat(found, dim=2)


def _best(score: Tensor, place: Tensor, size: int, rule: Rule) -> Tensor:
    """Shapes:  score: [B, KV heads, T, blocks];  place: [B, T];  out: as score, bool"""
    own = (place // size)[:, None, :, None]
    block = torch.arange(score.shape[-1], device=score.device)
    always = (block <= own) & ((block < rule.sink) | (block > own - rule.recent))
    score = score.masked_fill(always, torch.inf).masked_fill(block > own, -torch.inf)
    best = score.sort(dim=-1, descending=True, stable=True).indices[..., : rule.count]
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter(
        -1, best, torch.ones_like(best, dtype=torch.bool)
    )
    return (chosen | (place < rule.dense_length)[:, None, :, None]) & (block <= own)


def _kernels(k: Tensor, places: Places, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mean of the keys of each kernel, and whether it has any; kernel i holds the quarters i and i + 1 of blocks.

    Shapes:  out: [B, KV heads, 4 blocks - 1, d], [1 or B, 4 blocks - 1] bool
    """
    quarters = Places(places.block // 4, places.keys, places.real, places.device)
    total, kept = quarters.sums(k, weights)
    missing = 4 * places.blocks - total.shape[2]
    total, kept = F.pad(total, (0, 0, 0, missing)), F.pad(kept, (0, 0, 0, missing))
    total, kept = (one[:, :, :-1] + one[:, :, 1:] for one in (total, kept))
    return total / kept.clamp(min=1), kept[:, 0, :, 0] > 0


def _kernel_scores(
    q: Tensor, kernels: tuple[Tensor, Tensor], place: Tensor, block: int, scale: float | None
) -> Tensor:
    """Shapes:  q: [B, KV heads, G, T, d];  kernels: as `_kernels`;  place: [B, T];  out: [B, KV heads, T, blocks]"""
    (means, held), quarter = kernels, block // 4
    ends = torch.arange(held.shape[-1], device=q.device) * quarter + 2 * quarter
    seen = ((ends <= place[..., None] + 1) & held[:, None])[:, None, None]
    logits = (q @ means[:, :, None].mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
    share = torch.softmax(logits, dim=-1).masked_fill(~seen, 0.0).sum(dim=2)
    # Five kernels overlap a block: one begins before it, one ends behind it.
    return F.pad(share, (1, 1)).unfold(-1, 5, 4).amax(dim=-1)


def attend_blocks(
    q: Tensor,
    keys: tuple[Tensor, Tensor, Tensor | None],
    places: Places,
    chosen: Tensor,
    scale: float | None,
) -> Tensor:
    """Softmax attention over the own key and the chosen blocks, the keys as `keys_so_far` gives them.

    Shapes:  q, out: [B, H, T, d];  chosen: [B, KV heads, T, blocks] bool
    """
    (k, v, written), real = keys, places.real
    return block_attention(
        q,
        places.aligned(k),
        places.aligned(v),
        block=places.block,
        start=places.first(q.shape[0], q.shape[2]),
        chosen=chosen,
        real=None if real is None else places.aligned_marks(real),
        written=None if written is None else places.aligned_marks(written),
        scale=scale,
    )
