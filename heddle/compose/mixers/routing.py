"""Routing attention: a token attends to the latest tokens of its own cluster."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.cache import Call, PreallocatedRecurrentLayer, RecurrentLayer, StateLayer
from heddle.compose.modules.clusters import Centroids, Members
from heddle.compose.modules.precision import wide
from heddle.compose.modules.site import Site
from heddle.compose.modules.stretches import in_stretches, is_long
from heddle.kernels.span_attention import TILE, span_attention


class RoutingModule(nn.Module):
    """Softmax attention inside clusters of online k-means, without a view of later tokens.        (after arXiv 2003.05997)

        r = layernorm(W_qk x), without weights;   z_t = argmax_c r_t · m_c
        o_t = softmax_j(scale r_t · r_j) v_j over the latest `members` - 1 tokens j < t with z_j = z_t;  v_t if there is none
        y = W_o o

    Training adds `commitment` times the mean of (r / sqrt(d) - m_z)², and tells `largest_cluster`, the share of the tokens that
    fall on the largest cluster of a head: 1 when all are in one. Padding and what is not written is no member.

    Shapes:  x, y: [B, T, D];  states: keys, values: [B, H, C (members - 1), d], the latest of each cluster, the last at its end;
             held: [B, H, C] int32, how many of them there are;  `heads_out` sees [B, T, H, d]
    """

    def __init__(
        self,
        site: Site,
        *,
        heads: int,
        head_dim: int,
        clusters: int,
        members: int,
        decay: float,
        commitment: float,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.clusters = heads, head_dim, clusters
        self.kept, self.commitment, self.scale = members - 1, commitment, scale
        width = heads * head_dim
        self.qk_proj = nn.Linear(site.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(site.hidden_size, width, bias=False)
        self.centroids = Centroids(heads, clusters, head_dim, decay)
        self.heads_out = nn.Identity()
        self.o_proj = nn.Linear(width, site.hidden_size, bias=False)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        r, v = (
            proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.qk_proj, self.v_proj)
        )
        real = _real(x, call)
        r, z = self._clustered(r, real, call)
        o = self._attend(r, v, z, real, call)
        y: Tensor = self.o_proj(self.heads_out(call.gated(o.transpose(1, 2))).flatten(2))
        return y

    def _clustered(self, r: Tensor, real: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Normed queries and the cluster of each token. Training hears how far they are apart; of long rows it works that, and
        the norm, out again.

        Shapes:  r, out: [B, H, T, d];  z: [B, H, T];  real: [B, T] bool
        """
        placed, unit = self._normed(r)
        z = self.centroids.nearest(unit)
        if not self.training:
            return placed.to(r.dtype), z
        call.members.append(self.centroids.summed(unit, z, real))
        if is_long(r.shape[2]):
            sides = (r.transpose(1, 2), z.transpose(1, 2), real)
            rounded, distance = in_stretches(self._stretch, unit.new_zeros(()), sides)
            rounded = rounded.transpose(1, 2)
        else:
            rounded, distance = placed.to(r.dtype), self._distance(unit, z, real)
        self._account(distance, z, real, call)
        return rounded, z

    def _normed(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """Both wide, the second of length 1."""
        placed = F.layer_norm(wide(r), (self.head_dim,))
        return placed, placed * self.head_dim**-0.5

    def _stretch(self, before: Tensor, r: Tensor, z: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Normed queries, and `before` with their distance added.  Shapes:  r, out: [B, T, H, d];  z: [B, T, H];  real: [B, T]"""
        placed, unit = self._normed(r)
        distance = self._distance(unit.transpose(1, 2), z.transpose(1, 2), real)
        return placed.to(r.dtype), before + distance

    def _distance(self, unit: Tensor, z: Tensor, real: Tensor) -> Tensor:
        """The sum of squares between tokens and their centroids.  Shapes:  unit: [B, H, T, d];  z: [B, H, T];  out: []"""
        squares = (unit - self.centroids.of(z).to(unit.dtype)).square() * real[:, None, :, None]
        return squares.sum()

    def _attend(self, r: Tensor, v: Tensor, z: Tensor, real: Tensor, call: Call) -> Tensor:
        """Shapes:  r, v, out: [B, H, T, d];  z: [B, H, T];  real: [B, T] bool"""
        is_member = real if call.written is None else real & (call.written > 0.5)
        is_member = is_member[:, None].expand_as(z)
        keys, values, clusters, weight = r, v, z, call.written
        held, past_keys, past_values = (call.state(name) for name in ("held", "keys", "values"))
        if held is not None and past_keys is not None and past_values is not None:
            if z.shape[-1] == 1:
                return self._step((r, v, z, is_member), (held, past_keys, past_values), call)
            keys, values = torch.cat((past_keys, r), dim=2), torch.cat((past_values, v), dim=2)
            slot = torch.arange(self.kept, device=z.device)
            is_held = (slot >= self.kept - held[..., None]).flatten(2)
            ids = torch.arange(self.clusters, device=z.device).repeat_interleave(self.kept)
            clusters = torch.cat((ids.expand(*z.shape[:2], -1), z), dim=-1)
            is_member = torch.cat((is_held, is_member), dim=-1)
            weight = None if weight is None else F.pad(weight, (is_held.shape[-1], 0), value=1.0)
        members = Members(clusters, is_member, self.clusters, tile=TILE)
        self._keep(keys, values, members, call)
        first, last, by_cluster = members.spans(z, self.kept)
        return span_attention(
            r,
            keys,
            values,
            members.order,
            first=first,
            last=last,
            own=v,
            width=self.kept,
            queries=by_cluster,
            weight=weight,
            scale=self.scale,
        )

    def _step(
        self, token: tuple[Tensor, Tensor, Tensor, Tensor], past: tuple[Tensor, Tensor, Tensor], call: Call
    ) -> Tensor:
        """One token more: it reads the members of its cluster where they are kept, and the oldest one leaves.

        Shapes:  r, v, out: [B, H, 1, d];  z, is_member: [B, H, 1]
        """
        (r, v, z, is_member), (held, keys, values) = token, past
        count, last = held.gather(-1, z), (z + 1) * self.kept
        order = torch.arange(keys.shape[2], device=z.device).expand(*z.shape[:2], -1)
        o = span_attention(
            r, keys, values, order, first=last - count, last=last, own=v, width=self.kept, scale=self.scale
        )
        place = z * self.kept + torch.arange(self.kept, device=z.device)
        index = place[..., None].expand(-1, -1, -1, r.shape[-1])
        kept = {}
        for name, side, new in (("keys", keys, r), ("values", values, v)):
            its = side.gather(2, index)
            moved = torch.cat((its[:, :, 1:], new), dim=2)
            kept[name] = side.scatter(2, index, torch.where(is_member[..., None], moved, its))
        more = (count + is_member).clamp(max=self.kept).to(torch.int32)
        call.keep(**kept, held=held.scatter(-1, z, more))
        return o

    def _keep(self, keys: Tensor, values: Tensor, members: Members, call: Call) -> None:
        """Remembers the latest members of each cluster."""
        latest = members.latest(self.kept).flatten(2)
        index = latest.clamp(min=0)[..., None].expand(-1, -1, -1, keys.shape[-1])
        is_there = (latest >= 0)[..., None]
        held = members.counts.clamp(max=self.kept).to(torch.int32)
        kept = {name: side.gather(2, index) * is_there for name, side in (("keys", keys), ("values", values))}
        call.keep(**kept, held=held)

    def _account(self, distance: Tensor, z: Tensor, real: Tensor, call: Call) -> None:
        """Tells how far tokens are from their centroids, and how many fall on the largest cluster."""
        counts = torch.zeros(self.heads, self.clusters, dtype=distance.dtype, device=z.device)
        marks = real[:, None].expand_as(z).to(distance.dtype).transpose(0, 1).flatten(1)
        counts = counts.scatter_add(1, z.transpose(0, 1).flatten(1), marks)
        total = real.sum().clamp(min=1)
        mean = distance / (total * self.heads * self.head_dim)
        call.add_loss("commitment", mean if self.commitment else mean.detach(), self.commitment)
        if self.clusters > 1:
            call.add_loss("largest_cluster", counts.amax(dim=1).mean() / total, 0.0)

    def count_members(self, sums: Tensor) -> None:
        """Takes the sums over members that a forward in training gave."""
        self.centroids.count(sums)

    def new_cache(self) -> StateLayer:
        return RecurrentLayer()

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random members after `context` tokens, whose step repeats."""
        shape = (batch, self.heads, self.clusters * self.kept, self.head_dim)
        states = {name: like.new_empty(shape).normal_() for name in ("keys", "values")}
        each = min(context // self.clusters, self.kept)
        states["held"] = torch.full(
            (batch, self.heads, self.clusters), each, dtype=torch.int32, device=like.device
        )
        return PreallocatedRecurrentLayer(states, context=context)

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:
        """The name of the code that does the mixing."""
        return span_attention.path(device, dtype, K=self.head_dim, V=self.head_dim)


def _real(x: Tensor, call: Call) -> Tensor:
    """Which tokens are no padding.  Shapes:  x: [B, T, D];  out: [B, T] bool"""
    if call.padding is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    return call.padding > 0
