"""Blocks of keys that are worth reading, and what they let through."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.compose.modules.precision import wide


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
        kept = k.new_ones(1, self.keys) if weights is None else weights.to(k.dtype)
        shift, end = self.shift(), self.blocks * self.block
        if self.real is not None:
            kept = kept * self.real
        if shift is None:
            k, kept = F.pad(k, (0, 0, 0, end - self.keys)), F.pad(kept, (0, end - self.keys))
        else:
            place = torch.arange(end, device=self.device) + shift
            inside, place = place < self.keys, place.clamp(max=self.keys - 1)
            k = k.gather(2, place[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3]))
            kept = kept.expand(k.shape[0], -1).gather(1, place) * inside
        kept = kept.view(-1, 1, self.blocks, self.block, 1)
        total = (k.view(*k.shape[:2], self.blocks, self.block, -1) * kept).sum(dim=3)
        return total / kept.sum(dim=3).clamp(min=1)

    def keys_of(self, chosen: Tensor) -> Tensor:
        """The keys of chosen blocks.  Shapes:  chosen: [B, KV heads, T, blocks] bool;  out: [B, KV heads, T, keys] bool"""
        if self.real is None:
            return chosen.repeat_interleave(self.block, dim=-1)[..., : self.keys]
        place = self.of_keys().clamp(min=0)[:, None, None].expand(*chosen.shape[:3], -1)
        return chosen.gather(-1, place)


@torch.no_grad()
def choose_blocks(
    q: Tensor, k: Tensor, places: Places, *, count: int, sink: int, recent: int, weights: Tensor | None = None
) -> Tensor:
    """The blocks that each query reads, one set for the query heads of a KV head. No gradient comes back from the choice.

        score_b = mean_{h in group} q_h · mean_{j in b} k_j

    The first `sink` blocks and the last `recent` ones up to the query's own are always read. The best of the complete blocks
    between fill up to `count`; of equal ones the earlier is taken. The queries belong to the last T of the S keys.

    Shapes:  q: [B, H, T, d];  k: [B, KV heads, S, d];  weights: as in `Places.means`;
             out: [B, KV heads, T, blocks] bool
    """
    means = places.means(wide(k), weights)
    score = wide(q).view(q.shape[0], k.shape[1], -1, *q.shape[2:]).mean(dim=2) @ means.mT
    own = places.of_keys()[:, None, -q.shape[2] :, None]
    block = torch.arange(places.blocks, device=q.device)
    always = (block <= own) & ((block < sink) | (block > own - recent))
    score = score.masked_fill(always, torch.inf).masked_fill(block > own, -torch.inf)
    best = score.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter(
        -1, best, torch.ones_like(best, dtype=torch.bool)
    )
    return chosen & (block <= own)
