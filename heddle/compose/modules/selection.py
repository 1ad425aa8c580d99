"""Blocks of keys that are worth reading, and what they let through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from heddle.compose.modules.in_view import MOST
from heddle.compose.modules.masks import View, key_mask
from heddle.compose.modules.precision import wide, wide_dtype
from heddle.kernels.block_attention import block_attention
from heddle.kernels.block_choice import block_choice, mark_blocks

# Scores that stand in memory at once, and queries they are of at least: on a GPU each part of them waits for the host.
SCORES, QUERIES = 1 << 24, 256


@dataclass(frozen=True, slots=True)
class Places:
    """Where blocks of `block` keys lie in each row: they are counted from its first real token.

    Shapes:  real, first: [B, S] bool, [B] int64 (padding on the left of each row), or None if all are real
             start: what `first` gives of a call's queries, [B] integers, or None if it is not known yet
    """

    block: int
    keys: int
    real: Tensor | None
    device: torch.device
    start: Tensor | None = None

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
        """The place of the first of the last `queries` keys, counted from the row's first real one.

        Shapes:  out: [B] integers
        """
        if self.start is not None:
            return self.start
        place = torch.full((batch,), self.keys - queries, device=self.device)
        shift = self.shift()
        return place if shift is None else place - shift[:, 0]

    def keys_of(self, chosen: Tensor) -> Tensor:
        """The keys of chosen blocks.

        Shapes:  chosen: [B, KV heads, T, blocks] bool, or lists [B, KV heads, T, L] of blocks;  out: [B, KV heads, T, keys] bool
        """
        if chosen.dtype != torch.bool:
            # What is none goes behind the last block.
            index = torch.where(chosen < 0, self.blocks, chosen).to(torch.int64)
            table = chosen.new_zeros(*chosen.shape[:3], self.blocks + 1, dtype=torch.bool)
            chosen = table.scatter(-1, index, True)[..., :-1]
        if self.real is None:
            return chosen.repeat_interleave(self.block, dim=-1)[..., : self.keys]
        place = self.of_keys().clamp(min=0)[:, None, None].expand(*chosen.shape[:3], -1)
        return chosen.gather(-1, place)


@dataclass(frozen=True, slots=True)
class Parts:
    """Keys that have one mean: part i is the `width` strides of `stride` keys from the i-th on, counted as blocks are."""

    stride: int
    width: int

    def complete(self, keys: int) -> int:
        """How many of them so many keys complete."""
        return max(0, keys // self.stride - self.width + 1)


@dataclass(frozen=True, slots=True)
class Means:
    """The means of parts, and which of them have a key that counts; None for all.

    Shapes:  keys: [B, KV heads, n, d];  held: [1 or B, n] bool
    """

    keys: Tensor
    held: Tensor | None = None


def means_of(
    k: Tensor, places: Places, parts: Parts, *, weights: Tensor | None, new: int
) -> tuple[Means, int | Tensor]:
    """The means of the parts that the last `new` of the keys have completed, and which part is the first.

    A mean is of the keys that are real and of weight 1, summed in at least float32 and rounded once to the type of the keys. With
    padding rows complete parts at different tokens: as many are made for each row, among them some that are complete already
    or not yet; of one that is not yet nothing can be told.

    Shapes:  k: [B, KV heads, S, d];  weights: [B, S] of 0 and 1, or None;  first: a number, or [B] int64 of a padded batch
    """
    shift, most = places.shift(), parts.complete(places.keys)
    first: int | Tensor
    if shift is None:
        first = parts.complete(places.keys - new)
        count = most - first
        span = slice(first * parts.stride, (first + count + parts.width - 1) * parts.stride)
        k, marks = k[:, :, span], None if weights is None else weights[:, span]
    else:
        count = min(-(-new // parts.stride), most)
        past = (places.keys - new - shift[:, 0]) // parts.stride - parts.width + 1
        first = past.clamp(min=0, max=most - count)
        length = (count + parts.width - 1) * parts.stride
        index = shift + first[:, None] * parts.stride + torch.arange(length, device=k.device)
        inside, index = index < places.keys, index.clamp(max=places.keys - 1)
        assert places.real is not None
        marks = (places.real.gather(1, index) & inside).to(k.dtype)
        index = index.expand(k.shape[0], -1)
        marks = marks if weights is None else marks * weights.gather(1, index).to(k.dtype)
        k = k.gather(2, index[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3]))
    if count == 0:
        return Means(k[:, :, :0], None if marks is None else marks[:, :0] > 0.5), first
    total, kept = (_windows(one, parts.width) for one in _sums(k, marks, parts.stride))
    means = (total / kept.clamp(min=1)).to(k.dtype)
    return Means(means, None if marks is None else kept[:, 0, :, 0] > 0), first


def _sums(k: Tensor, marks: Tensor | None, stride: int) -> tuple[Tensor, Tensor]:
    """The sums of strides of keys, at least float32, those of mark 0 left out, and how many they are.

    Shapes:  k: [B, KV heads, n stride, d];  marks: [B, n stride];  out: [B, KV heads, n, d], [1 or B, 1, n, 1]
    """
    count = k.shape[2] // stride
    strides = k.unflatten(2, (count, stride))  # type: ignore[no-untyped-call]
    if marks is None:
        # Read once as they are.
        total = strides.sum(dim=3, dtype=wide_dtype(k.dtype))
        return total, total.new_full((1, 1, count, 1), stride)
    kept = wide(marks).view(-1, 1, count, stride, 1)
    return (wide(strides) * kept).sum(dim=3), kept.sum(dim=3)


def _windows(one: Tensor, width: int) -> Tensor:
    """The sums of `width` neighbours along axis 2."""
    count = one.shape[2] - width + 1
    return one if width == 1 else sum((one[:, :, i : i + count] for i in range(1, width)), one[:, :, :count])


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

    def parts(self, block: int) -> Parts:
        """What its means are means of."""
        return Parts(block, 1) if self.scores == "mean" else Parts(block // 4, 2)


@torch.no_grad()
def choose_blocks(
    q: Tensor,
    k: Tensor,
    places: Places,
    rule: Rule,
    *,
    weights: Tensor | None = None,
    means: Means | None = None,
) -> Tensor:
    """The blocks that each query reads, one set for the query heads of a KV head. No gradient comes back from the choice.

    Of the complete blocks between the first and the last the best fill up to `count`; of equal ones the earlier is taken. The
    queries belong to the last T of the S keys, and are worked on in blocks. `means`: those of `rule.parts`, if they are there.

    Shapes:  q: [B, H, T, d];  k: [B, KV heads, S, d];  weights: as in `means_of`;
             out: [B, KV heads, T, blocks] bool
    """
    means = _all_means(k, places, rule, weights) if means is None else means
    first, found = places.first(q.shape[0], q.shape[2]), []
    kernels = rule.scores == "kernels"
    # Four kernels to a block.
    width = k.shape[1] * places.blocks * (4 if kernels else 1)
    count = max(QUERIES, SCORES // (q.shape[0] * width))
    for start in range(0, q.shape[2], count):
        marks = mark_blocks(
            q[:, :, start : start + count],
            means.keys,
            start=first + start,
            block=places.block,
            blocks=places.blocks,
            count=rule.count,
            sink=rule.sink,
            recent=rule.recent,
            dense_length=rule.dense_length,
            held=means.held,
            kernels=kernels,
            scale=rule.scale,
        )
        found.append(marks)
    return found[0] if len(found) == 1 else torch.cat(found, dim=2)


def _all_means(k: Tensor, places: Places, rule: Rule, weights: Tensor | None) -> Means:
    return means_of(k, places, rule.parts(places.block), weights=weights, new=places.keys)[0]


@torch.no_grad()
def choose_for_step(
    q: Tensor,
    k: Tensor,
    places: Places,
    rule: Rule,
    *,
    weights: Tensor | None = None,
    means: Means | None = None,
) -> Tensor:
    """As `choose_blocks` for a few queries, as lists of blocks, -1 for none.

    Shapes:  out: [B, KV heads, T, L] int32
    """
    means = _all_means(k, places, rule, weights) if means is None else means
    # Without padding all queries are this far at least.
    is_dense = places.real is not None or places.keys - q.shape[2] < rule.dense_length
    return block_choice(
        q,
        means.keys,
        start=places.first(q.shape[0], q.shape[2]),
        block=places.block,
        blocks=places.blocks,
        count=rule.count,
        sink=rule.sink,
        recent=rule.recent,
        dense_length=rule.dense_length if is_dense else 0,
        held=means.held,
        kernels=rule.scores == "kernels",
        scale=rule.scale,
    )


def attend_blocks(
    q: Tensor,
    keys: tuple[Tensor, Tensor, Tensor | None],
    places: Places,
    chosen: Tensor,
    scale: float | None,
) -> Tensor:
    """Softmax attention over the own key and the chosen blocks, the keys as `keys_so_far` gives them.

    Shapes:  q, out: [B, H, T, d];  chosen: [B, KV heads, T, blocks] bool, or lists [B, KV heads, T, L] of blocks
    """
    (k, v, written), real, is_marks = keys, places.real, chosen.dtype == torch.bool
    return block_attention(
        q,
        places.aligned(k),
        places.aligned(v),
        block=places.block,
        start=places.first(q.shape[0], q.shape[2]),
        chosen=chosen if is_marks else None,
        listed=None if is_marks else chosen,
        real=None if real is None else places.aligned_marks(real),
        written=None if written is None else places.aligned_marks(written),
        scale=scale,
    )


def attend_masked(
    q: Tensor,
    keys: tuple[Tensor, Tensor, Tensor | None],
    places: Places,
    chosen: Tensor,
    *,
    real: Tensor | None,
    view: View,
    attend: Callable[..., Tensor],
) -> Tensor:
    """What `attend` gives for masks of the own key and of the chosen blocks, the keys as `keys_so_far` gives them.

    Where one mask would be large it is made of some queries after the others, and in training a second time.

    Shapes:  as of `attend_blocks`;  real: [B, 1, 1, S] bool
    """
    k, v, written = keys
    marks, held = None if written is None else written[:, None, None], k.shape[2]

    def part(first: int, q: Tensor, chosen: Tensor) -> Tensor:
        place = torch.arange(first, first + q.shape[2], device=q.device)
        distance = place[:, None] - torch.arange(held, device=q.device)
        return attend(q, k, v, key_mask(distance, view, real, places.keys_of(chosen), written=marks))

    first, queries = held - q.shape[2], q.shape[2]
    if queries * held <= MOST:
        return part(first, q, chosen)
    told = []
    for some, own in zip(*(torch.split(side, QUERIES, dim=2) for side in (q, chosen)), strict=True):
        told.append(
            checkpoint(part, first, some, own, use_reentrant=False, preserve_rng_state=False)
            if torch.is_grad_enabled()
            else part(first, some, own)
        )
        first += some.shape[2]
    return torch.cat(told, dim=2)
