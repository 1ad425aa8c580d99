"""What training adds so that blocks of keys are chosen as attention over all keys would weigh them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from heddle.compose.modules.precision import wide
from heddle.compose.modules.selection import QUERIES, Places, Rule, means_of
from heddle.kernels.block_choice import block_scores
from heddle.kernels.common.autocast import without_autocast

# Logits of queries that are worked on at once; of more, training works the scores out again.
LOGITS = 1 << 26
# Of a block that no kernel gives anything.
LEAST = 1e-9


@dataclass(frozen=True, slots=True)
class _Keys:
    """What queries are compared with, from each row's first real key on, at least float32.

    Shapes:  k: [B, KV heads, S, d];  marks: [1 or B, S] bool, which keys can be read by others, or None for all;
             means: [B, KV heads, n, d];  held: [1 or B, n] bool, or None for all
    """

    k: Tensor
    marks: Tensor | None
    means: Tensor
    held: Tensor | None
    places: Places
    rule: Rule

    @property
    def scale(self) -> float:
        return self.k.shape[-1] ** -0.5 if self.rule.scale is None else self.rule.scale


def choice_loss(q: Tensor, k: Tensor, places: Places, rule: Rule, written: Tensor | None) -> Tensor:
    """Cross-entropy of the blocks' scores and their weights in attention over all keys.        (after 2410.13276, 2512.02556)

        L = - mean_t sum_b a_tb log softmax_b(s_tb),   a_tb = sum_{j in b} softmax_{j <= t}(scale q_t · k_j),   without a gradient

    b are the blocks that a query chooses from: complete ones before the always read last ones, and behind the first ones. s is
    scale · score by means, and the logarithm of the score by kernels. a is the mean over the query heads of a KV head. The
    gradient goes to queries and keys by the scores alone.

    Shapes:  q: [B, H, T, d];  k: [B, KV heads, S, d], the last T of them those of the queries;  written: [B, S] of 0 and 1, or
             None;  out: [], at least float32
    """
    first = places.first(q.shape[0], q.shape[2])
    count = max(1, min(QUERIES, LOGITS // (q.shape[0] * q.shape[1] * places.keys)))
    with without_autocast(q):
        keys = _keys(k, places, rule, written)
        total = keys.k.new_zeros(())
        # Of slices each gradient would be as long as the whole.
        for index, part in enumerate(torch.split(q, count, dim=2)):
            place = (first + index * count)[:, None] + torch.arange(part.shape[2], device=q.device)
            total = total + checkpoint(
                _summed, part, place, keys, use_reentrant=False, preserve_rng_state=False
            )
    return total / (q.shape[0] * k.shape[1] * q.shape[2])


def _keys(k: Tensor, places: Places, rule: Rule, written: Tensor | None) -> _Keys:
    weights = None if written is None else written.detach()
    means = means_of(wide(k), places, rule.parts(places.block), weights=weights, new=places.keys)[0]
    marks = None if places.real is None else places.aligned_marks(places.real)
    if written is not None:
        own = places.aligned_marks(written) > 0.5
        marks = own if marks is None else marks & own
    return _Keys(wide(places.aligned(k)), marks, means.keys, means.held, places, rule)


def _summed(q: Tensor, place: Tensor, keys: _Keys) -> Tensor:
    """The sum over some queries.  Shapes:  q: [B, H, t, d];  place: [B, t];  out: []"""
    q, places, rule, kernels = wide(q), keys.places, keys.rule, keys.rule.scores == "kernels"
    weights, sizes = _block_weights(q, place, keys), {"block": places.block, "blocks": places.blocks}
    score = block_scores(q, keys.means, place, **sizes, held=keys.held, kernels=kernels, scale=keys.scale)
    score = score.clamp(min=LEAST).log() if kernels else score * keys.scale
    block = torch.arange(places.blocks, device=q.device)
    last = (place // places.block - rule.recent)[:, None, :, None]
    is_open = (block >= rule.sink) & (block <= last)
    if rule.dense_length:
        is_open = is_open & (place >= rule.dense_length)[:, None, :, None]
    logits = score.masked_fill(~is_open, torch.finfo(score.dtype).min)
    return -(weights * torch.log_softmax(logits, dim=-1)).masked_fill(~is_open, 0.0).sum()


@torch.no_grad()
def _block_weights(q: Tensor, place: Tensor, keys: _Keys) -> Tensor:
    """What attention over all keys gives each block, the mean over a KV head's query heads.

    Shapes:  q: [B, H, t, d];  place: [B, t];  out: [B, KV heads, t, blocks]
    """
    places = keys.places
    heads = q.unflatten(1, (keys.k.shape[1], -1))  # type: ignore[no-untyped-call]
    logits = (heads @ keys.k[:, :, None].mT) * keys.scale
    index = torch.arange(places.keys, device=q.device)
    seen = index <= place[..., None]
    if keys.marks is not None:
        seen = seen & (keys.marks[:, None] | (index == place[..., None]))
    p = torch.softmax(logits.masked_fill(~seen[:, None, None], torch.finfo(logits.dtype).min), dim=-1).mean(
        dim=2
    )
    p = F.pad(p, (0, places.blocks * places.block - places.keys))
    return p.unflatten(-1, (places.blocks, places.block)).sum(dim=-1)  # type: ignore[no-any-return, no-untyped-call]
