"""Tokens in clusters: centroids that follow their members, and where the latest members before each token stand."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.compose.init import Initialised, fill
from heddle.compose.modules.precision import Float32Kept
from heddle.compose.modules.stretches import STRETCH


class Centroids(Float32Kept, Initialised):
    """Centroids on the unit sphere, moved by online k-means without a gradient.        (arXiv 2003.05997)

        z = argmax_c x · m_c,   m_c <- decay · m_c + (1 - decay) · normalise(sum of x with z = c)        after each training step

    Whoever trains the model calls `after_step`, as `heddle.compose.train.fit` does; else m stays as it is. A cluster without a
    member keeps its centroid. Sums are an output of the layer, added by the model: a layer that the backward pass runs again is
    counted once. Each process of several has its own.

    Shapes:  centroids: [H, C, d];  sums: [H, C, d], since the last step; both float32
    """

    KEPT: ClassVar[tuple[str, ...]] = ("centroids", "sums")

    centroids: Tensor
    sums: Tensor

    def __init__(self, heads: int, clusters: int, head_dim: int, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("centroids", torch.empty(heads, clusters, head_dim))
        self.register_buffer("sums", torch.empty(heads, clusters, head_dim), persistent=False)

    def initialise(self, std: float) -> None:  # noqa: ARG002 - directions have no scale
        fill(self.centroids, F.normalize(torch.empty_like(self.centroids).normal_(), dim=-1))
        fill(self.sums, torch.zeros_like(self.sums))

    def nearest(self, x: Tensor) -> Tensor:
        """The cluster of each token, of equally near ones the first.  Shapes:  x: [B, H, T, d], wide;  out: [B, H, T] int64"""
        directions = self.centroids.to(x.dtype).mT
        if x.shape[2] <= STRETCH:
            return (x.detach() @ directions).argmax(dim=-1)
        # A number of each token and cluster is more than a layer's whole input.
        parts = torch.split(x.detach(), STRETCH, dim=2)
        return torch.cat([(part @ directions).argmax(dim=-1) for part in parts], dim=-1)

    def of(self, z: Tensor) -> Tensor:
        """The centroid of each token.  Shapes:  z: [B, H, T];  out: [B, H, T, d]"""
        heads = torch.arange(len(self.centroids), device=z.device)[:, None]
        return self.centroids[heads, z]

    def summed(self, x: Tensor, z: Tensor, real: Tensor) -> Tensor:
        """The sums over members.  Shapes:  x: [B, H, T, d];  z: [B, H, T];  real: [B, T];  out: [H, C, d]"""
        rows = (x.detach() * real[:, None, :, None].to(x.dtype)).transpose(0, 1).flatten(1, 2)
        index = z.transpose(0, 1).flatten(1)[..., None].expand_as(rows)
        return torch.zeros_like(self.centroids, dtype=x.dtype).scatter_add(1, index, rows)

    def count(self, sums: Tensor) -> None:
        self.sums += sums.to(self.sums.dtype)

    @torch.no_grad()
    def after_step(self) -> None:
        """Moves the centroids by the sums since the last time."""
        length = self.sums.norm(dim=-1, keepdim=True)
        moved = torch.lerp(self.sums / length.clamp_min(1e-30), self.centroids, self.decay)
        self.centroids.copy_(torch.where(length > 0, moved, self.centroids))
        self.sums.zero_()


class Members:
    """The members of clusters in the order of time: those that were kept first, then those of this call.

    Each cluster begins at a multiple of `tile` in `order`, with places that are none (-1) before it, so that how a kernel cuts up
    a cluster does not depend on others.

    Shapes:  z, is_member: [B, H, N] int64 and bool, N = kept + T;  order: [B, H, N + C (tile - 1)]
    """

    def __init__(self, z: Tensor, is_member: Tensor, clusters: int, tile: int = 1) -> None:
        self.by_cluster = z.argsort(dim=-1, stable=True)
        flags = is_member.gather(-1, self.by_cluster).long()
        rank = flags.cumsum(-1) - flags
        counts = z.new_zeros(*z.shape[:-1], clusters).scatter_add(-1, z, is_member.long())
        room = (counts + tile - 1) // tile * tile
        self.begins = room.cumsum(-1) - room
        self.ends = self.begins + counts
        self.counts = counts
        spare = self.begins - (counts.cumsum(-1) - counts)
        slot = rank + spare.gather(-1, z.gather(-1, self.by_cluster))
        total = z.shape[-1] + clusters * (tile - 1)
        # One place more for all that are no members.
        places = F.pad(torch.full_like(slot[..., :1], -1).expand(*z.shape[:-1], total), (0, 1))
        self.order = places.scatter(-1, torch.where(flags > 0, slot, total), self.by_cluster)[..., :total]
        self.before = torch.zeros_like(slot).scatter(-1, self.by_cluster, slot)

    def spans(self, z: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where in `order` the last `count` members before each of the last T tokens begin and end; the tokens by cluster.

        Shapes:  z: [B, H, T];  out: three times [B, H, T]
        """
        end = self.before[..., -z.shape[-1] :]
        is_all = z.shape[-1] == self.before.shape[-1]
        by_cluster = self.by_cluster if is_all else z.argsort(dim=-1, stable=True)
        return torch.maximum(self.begins.gather(-1, z), end - count), end, by_cluster

    def latest(self, count: int) -> Tensor:
        """The last `count` members of each cluster, -1 for none.  Shapes:  out: [B, H, C, count]"""
        place = self.ends[..., None] - count + torch.arange(count, device=self.ends.device)
        found = self.order.gather(-1, place.clamp(min=0, max=self.order.shape[-1] - 1).flatten(2))
        return found.view(place.shape).masked_fill(place < self.begins[..., None], -1)
