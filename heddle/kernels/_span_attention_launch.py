"""Launches the kernels of span_attention."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from heddle.kernels._span_attention_bwd import (
    _span_attention_bwd_key_kernel,
    _span_attention_bwd_query_kernel,
)
from heddle.kernels._span_attention_fwd import _span_attention_fwd_kernel
from heddle.kernels.common.layout import aligned, block, narrower, room, strides, wider
from heddle.kernels.common.tables import table_on
from heddle.kernels.common.tuning import tuned
from heddle.kernels.configs.launch import Launch
from heddle.kernels.configs.span_attention import INTERPRETER, Family, Plan, family

# Tiles of keys are no larger, and divide it.
TILE = 64
# Of a call that is a step, at most.
FEW = 16


@functools.cache
def _table(device: torch.device) -> Family:
    return table_on(device, "span_attention", INTERPRETER, family)[0]


def plan(device: torch.device, element: int, size: int) -> Plan:
    """The launches for tensors on `device`, elements of so many bytes and the larger head size; overrides come first."""
    table = _table(device).plan(element, block(size))
    names = ("forward", "step", "queries", "keys")
    return replace(table, **{name: tuned(name, getattr(table, name)) for name in names})


def _whole(x: Tensor) -> Tensor:
    """Places as the kernels read them."""
    return x.to(torch.int32).contiguous()


class Call:
    """What all launches over the same inputs are told.

    Shapes:  q: [B, H, T, K];  k: [B, H, S, K];  v: [B, H, S, V];  order: [B, H, N];  first, last, queries: [B, H, T]
    """

    def __init__(
        self,
        sides: tuple[Tensor, Tensor, Tensor],
        spans: tuple[Tensor, ...],
        queries: Tensor | None,
        scale: float,
    ) -> None:
        self.q, self.k, self.v = (aligned(side) for side in sides)
        (self.B, self.H, self.T, self.K), self.S, self.V = self.q.shape, self.k.shape[2], self.v.shape[3]
        order, first, last = spans
        if queries is None:
            queries = torch.arange(self.T, device=first.device).expand_as(first)
        self.order, self.first, self.last, self.queries = map(_whole, (order, first, last, queries))
        self.N, self.scale = self.order.shape[2], scale
        self.plan = plan(self.q.device, self.q.element_size(), max(self.K, self.V))

    def constants(self, launch: Launch) -> dict[str, Any]:
        """What all kernels are compiled for."""
        return {
            "K": self.K, "V": self.V, "ROWS_K": block(self.K), "ROWS_V": block(self.V),
            "ROWS": min(launch.chunk, block(self.T)), "KEYS": min(launch.columns, TILE),
            "PRECISION": "tf32x3" if self.q.device.type == "cuda" else "ieee",
        }  # fmt: skip

    def empty(self, like: Tensor, size: int) -> Tensor:
        """Room for a tensor of heads, in memory with time before heads, as projections want them."""
        shape = (like.shape[0], like.shape[2], like.shape[1], size)
        return torch.empty(shape, dtype=like.dtype, device=like.device).transpose(1, 2)

    def forward(self, own: Tensor, trains: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Output, what rounding took from it if gradients will want it, and the log-sum-exp of its logits to base 2."""
        launch = self.plan.step if self.T <= FEW else self.plan.forward
        own, out, constants = aligned(own), self.empty(self.q, self.V), self.constants(launch)
        lse = torch.empty(self.q.shape[:3], dtype=torch.float32, device=self.q.device)
        is_kept = trains and out.element_size() < 4
        lost = self.empty(self.q, self.V) if is_kept else own.new_empty(0)
        place = lost if is_kept else out
        tiles = triton.cdiv(self.T, constants["ROWS"])
        _span_attention_fwd_kernel[(self.B * self.H * tiles,)](
            self.q, self.k, self.v, own, self.order, self.queries, self.first, self.last, out, place, lse,
            *strides(self.q, self.k, self.v, own, out, place),
            self.T, self.N, tiles, self.H, self.scale,
            LOST=is_kept, **constants, **launch.options(),
        )  # fmt: skip
        return out, lost, lse

    def backward(
        self, d_out: Tensor, out: Tensor, lost: Tensor | None, lse: Tensor, has_bias: bool
    ) -> tuple[Tensor, ...]:
        """Gradients of q, k, v and own, and of a bias of each head's keys."""
        launch, d_out, out = self.plan.queries, aligned(d_out), aligned(out)
        place = out if lost is None else aligned(lost)
        dq, d_own, constants = self.empty(self.q, self.K), self.empty(self.q, self.V), self.constants(launch)
        delta, tiles = torch.empty_like(lse), triton.cdiv(self.T, constants["ROWS"])
        _span_attention_bwd_query_kernel[(self.B * self.H * tiles,)](
            self.q, self.k, self.v, self.order, self.queries, self.first, self.last, out, place, d_out, lse,
            dq, d_own, delta,
            *strides(self.q, self.k, self.v, out, place, d_out, dq, d_own),
            self.T, self.N, tiles, self.H, self.scale,
            LOST=lost is not None, **constants, **launch.options(),
        )  # fmt: skip
        return dq, *self._of_keys(d_out, lse, delta, has_bias), d_own

    def _of_keys(
        self, d_out: Tensor, lse: Tensor, delta: Tensor, has_bias: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of k, v and the bias: 0 for keys that the order leaves out."""
        launch = self.plan.keys
        constants = self.constants(launch)
        dk, dv = self.empty(self.k, self.K).zero_(), self.empty(self.v, self.V).zero_()
        d_bias = lse.new_zeros(self.k.shape[:3] if has_bias else (0,))
        tiles, (begin, end) = triton.cdiv(self.N, constants["KEYS"]), self.seen_by(constants["KEYS"])
        _span_attention_bwd_key_kernel[(self.B * self.H * tiles,)](
            self.q, self.k, self.v, self.order, self.queries, self.first, self.last, d_out, lse, delta,
            begin, end, dk, dv, d_bias,
            *strides(self.q, self.k, self.v, d_out, dk, dv),
            self.T, self.N, self.S, tiles, self.H, self.scale,
            BIAS=has_bias, **constants, **launch.options(),
        )  # fmt: skip
        return dk, dv, d_bias

    def seen_by(self, keys: int) -> tuple[Tensor, Tensor]:
        """The queries, by their places in `queries`, that may see a key of each tile: from the one on, up to the other.

        Shapes:  out: twice [B, H, tiles] int32
        """
        places = self.queries.long()
        first, last = self.first.gather(2, places), self.last.gather(2, places)
        edge = torch.arange(0, self.N, keys, dtype=torch.int32, device=first.device)
        edges = edge.expand(self.B, self.H, -1).contiguous()
        begin = torch.searchsorted(last, edges, right=True, out_int32=True)
        return begin, torch.searchsorted(first, edges + keys, out_int32=True)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    first: Tensor,
    last: Tensor,
    queries: Tensor | None,
    own: Tensor,
    weight: Tensor | None,  # noqa: ARG001
    scale: float,
    trains: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and what the backward pass wants; arguments as those of the registered op."""
    call = Call(_with_room(q, k, v), (order, first, last), queries, scale)
    out, lost, lse = call.forward(wider(own, call.V), trains)
    return narrower(out, v.shape[3]), narrower(lost, v.shape[3]) if lost.numel() else lost, lse


def launch_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    first: Tensor,
    last: Tensor,
    queries: Tensor | None,
    weight: Tensor | None,
    scale: float,
    out: Tensor,
    lost: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, own and the weight; arguments as those of the registered op."""
    call = Call(_with_room(q, k, v), (order, first, last), queries, scale)
    d_out, out = (wider(x, call.V) for x in (d_out.to(v.dtype), out))
    taken = wider(lost, call.V) if lost.numel() else None
    dq, dk, dv, d_bias, d_own = call.backward(d_out, out, taken, lse, weight is not None)
    d_weight = q.new_empty(0) if weight is None else d_bias.sum(1).to(weight.dtype)
    sizes = (q.shape[3], k.shape[3], v.shape[3], v.shape[3])
    dq, dk, dv, d_own = (narrower(x, size) for x, size in zip((dq, dk, dv, d_own), sizes, strict=True))
    return dq, dk, dv, d_own, d_weight


def _with_room(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Head sizes as the kernels take them, by zeros, which change nothing."""
    q, k, v = (wider(x, room(x.shape[3], x.device)) for x in (q, k, v))
    return q, k, v
