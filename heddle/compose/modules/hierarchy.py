"""Softmax attention whose weights are tied between the blocks of a tree over the tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.compose.modules.precision import wide


@dataclass(frozen=True, slots=True)
class Level:
    """One level of nodes in families of b siblings.

    Shapes:  off: [B, H, F, b, b], weights that children give to siblings;  down: [B, H, F, b], mass that a child hands to what
             it is made of;  v: [B, H, F, b, V], mean values
    """

    off: Tensor
    down: Tensor
    v: Tensor


def hierarchical_attention(
    q: Tensor, k: Tensor, v: Tensor, *, branching: int, own: bool, real: Tensor | None
) -> Tensor:
    """Of all weights that are one for all pairs of two siblings' tokens, those nearest to softmax.        (arXiv 2509.15448)

        D_B = e^-phi(B) + sum over siblings C of |C| e^s_BC,   s_BC = mean q of B · mean k of C / sqrt(d)
        -phi(A) = sum over children B of |B|/|A| log D_B;   of a token e^-phi = e^s_ii, or 0 without `own`
        down the tree, from mass 1 at its root: |C| e^s_BC / D_B of a parent's mass goes from B to C's mean value, e^-phi(B) / D_B
        on to what B is made of

    Nearest by the sum of KL(weights_i | softmax_i). The tree has `branching` children a node over the real tokens in their order;
    the last nodes of a level may have fewer. With as many children as tokens it is softmax attention. A token alone that may not
    see itself gets 0. Work and memory grow with T times `branching`. Both sides are seen.

    Shapes:  q, k: [B, H, T, d];  v, out: [B, H, T, V];  real: [B, T] bool, or None for all true
    """
    length, dtype, scale = q.shape[2], v.dtype, q.shape[-1] ** -0.5
    size = torch.ones(1, 1, length, device=q.device, dtype=wide(q).dtype)
    sums = [wide(x) for x in (q, k, v)]
    if real is not None:
        # Real tokens first, in their order.
        order = (~real).long().sort(dim=-1, stable=True).indices[:, None, :, None]
        sums = [x.gather(2, order.expand_as(x)) for x in sums]
        size = (torch.arange(length, device=q.device) < real.sum(-1, keepdim=True))[:, None].to(size.dtype)
        sums = [x * size[..., None] for x in sums]
    inner = (sums[0] * sums[1]).sum(-1) * scale if own else torch.full_like(sums[0][..., 0], -torch.inf)
    levels: list[Level] = []
    while not levels or sums[0].shape[2] > 1:
        level, inner = _level(sums, size, inner, branching, scale)
        levels.append(level)
        sums, size = [_families(x, branching).sum(3) for x in sums], _families(size, branching).sum(-1)
    out = _spread(levels)[:, :, :length]
    if real is not None:
        place = (real.long().cumsum(-1) - 1).clamp_min(0)[:, None, :, None]
        out = out.gather(2, place.expand_as(out))
    return out.to(dtype)


def _families(x: Tensor, branching: int) -> Tensor:
    """Siblings together, with nothing where a node has fewer children.  Shapes:  x: [B, H, n, *];  out: [B, H, F, b, *]"""
    missing = -x.shape[2] % branching
    padded = F.pad(x, (*([0, 0] * (x.dim() - 3)), 0, missing))
    return padded.view(*x.shape[:2], -1, branching, *x.shape[3:])


def _level(
    sums: list[Tensor], size: Tensor, inner: Tensor, branching: int, scale: float
) -> tuple[Level, Tensor]:
    """The weights among siblings, and -phi of their parents.  Shapes:  sums: [B, H, n, *];  size: [B, 1, n];  inner: [B, H, n]"""
    size, inner = _families(size, branching), _families(inner, branching)
    q, k, v = (_families(x, branching) / size.clamp_min(1)[..., None] for x in sums)
    is_there = size > 0
    # What is not there has a row all the same, of nothing but itself; so has one that may not see itself and has no sibling.
    is_alone = (inner == -torch.inf) & (is_there.sum(-1, keepdim=True) == 1)
    kept = inner.masked_fill(is_alone | ~is_there, 0.0)
    diagonal = torch.eye(branching, device=q.device, dtype=torch.bool)
    logits = (q @ k.mT) * scale + size.clamp_min(1).log()[..., None, :]
    logits = logits.masked_fill(~is_there[..., None, :], -torch.inf)
    logits = torch.where(diagonal, kept[..., None], logits)
    total = logits.logsumexp(-1)
    p = torch.exp(logits - total[..., None])
    down = p.diagonal(dim1=-2, dim2=-1).masked_fill(is_alone | ~is_there, 0.0)
    share = size / size.sum(-1, keepdim=True).clamp_min(1)
    parent = (share * total).sum(-1).masked_fill((is_alone & is_there).any(-1), -torch.inf)
    return Level(p.masked_fill(diagonal, 0.0), down, v), parent


def _spread(levels: list[Level]) -> Tensor:
    """From the root to the tokens.  Shapes:  out: [B, H, T or more, V]"""
    top = levels[-1]
    gathered = top.v.new_zeros(*top.off.shape[:2], 1, top.v.shape[-1])
    mass = top.v.new_ones(*top.off.shape[:2], 1)
    for level in reversed(levels):
        # The nodes above may have stood beside places that hold none.
        count = level.off.shape[2]
        gathered, mass = gathered[:, :, :count, None], mass[:, :, :count, None]
        gathered = (gathered + mass[..., None] * (level.off @ level.v)).flatten(2, 3)
        mass = (mass * level.down).flatten(2, 3)
    leaf: Tensor = gathered + mass[..., None] * levels[0].v.flatten(2, 3)
    return leaf
