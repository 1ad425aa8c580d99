"""Launches the kernels of head_sparse_attention."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from heddle.kernels._head_sparse_attention_bwd import (
    _head_sparse_attention_bwd_key_kernel,
    _head_sparse_attention_bwd_query_kernel,
)
from heddle.kernels._head_sparse_attention_fwd import (
    _head_sparse_attention_fwd_kernel,
    _head_sparse_attention_fwd_merge_kernel,
)
from heddle.kernels._head_sparse_attention_lists import (
    _head_sparse_attention_count_kernel,
    _head_sparse_attention_fill_kernel,
)
from heddle.kernels.common.layout import aligned, block, narrower, room, strides, wider
from heddle.kernels.common.tables import table_on
from heddle.kernels.common.tuning import tuned
from heddle.kernels.configs.head_sparse_attention import INTERPRETER, Family, Plan, family
from heddle.kernels.configs.launch import Launch

# Into how many parts the keys of a tile are split at most.
MOST_SPLITS = 32
# Tokens and heads that a program of the lists reads, and pieces whose counts it reads at a time.
PIECE, LIST_HEADS, PIECES = 128, 16, 128


@functools.cache
def _device(device: torch.device) -> tuple[Family, int]:
    """Configurations and multiprocessors."""
    return table_on(device, "head_sparse_attention", INTERPRETER, family)


def plan(device: torch.device, element: int, size: int) -> Plan:
    """The launches for tensors on `device`, elements of so many bytes and the larger head size; overrides come first."""
    table = _device(device)[0].plan(element, block(size))
    names = ("forward", "step", "queries", "keys")
    return replace(table, **{name: tuned(name, getattr(table, name)) for name in names})


def make_lists(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The queries that chose each head, and how many there are before each token; see `_head_sparse_attention_lists`.

    Shapes:  weights: [B, T, H] float32, dense;  out: [B, H, T] and [B, H, T + 1] int32
    """
    B, T, H = weights.shape
    pieces, heads = -(-T // PIECE), min(LIST_HEADS, triton.next_power_of_2(H))
    counts, entries, before = (
        torch.empty(shape, dtype=torch.int32, device=weights.device)
        for shape in ((B, pieces, H), (B, H, T), (B, H, T + 1))
    )
    grid, sizes = (B * pieces, triton.cdiv(H, heads)), {"TOKENS": PIECE, "HEADS": heads}
    _head_sparse_attention_count_kernel[grid](weights, counts, T, pieces, H, **sizes, num_warps=4)
    _head_sparse_attention_fill_kernel[grid](
        weights, counts, entries, before, T, pieces, H, **sizes, PIECES=PIECES, num_warps=4
    )
    return entries, before


@dataclass(frozen=True, slots=True)
class Packs:
    """How a tile is laid out: queries of a list, or so many of `packed` neighbouring heads, in `heads` places."""

    launch: Launch
    queries: int
    heads: int
    packed: int
    listed: bool

    @property
    def rows(self) -> int:
        return block(self.queries * self.heads)


def packs(table: Plan, length: int, group: int) -> Packs:
    """Few queries of all heads of a group together, so that their keys are read once; else those that chose one head."""
    heads = triton.next_power_of_2(group)
    few = triton.next_power_of_2(length)
    if few * heads <= max(table.step.chunk, heads):
        return Packs(table.step, few, heads, group, listed=False)
    return Packs(table.forward, min(table.forward.chunk, block(length)), 1, 1, listed=True)


class Call:
    """What all launches over the same inputs are told.

    Shapes:  q: [B, H, T, d];  k: [B, N, S, d];  v: [B, N, S, V];  weights: [B, T, H];  real: [1 or B, S] bool;
             cu_seqlens: [sequences + 1]
    """

    def __init__(
        self,
        sides: tuple[Tensor, Tensor, Tensor],
        weights: Tensor,
        limits: tuple[Tensor | None, Tensor | None],
        scale: float,
    ) -> None:
        self.q, self.k, self.v = (aligned(side) for side in sides)
        self.weights, self.scale = weights.to(torch.float32).contiguous(), scale
        (self.B, self.H, self.T, self.K), (self.N, self.S) = self.q.shape, self.k.shape[1:3]
        self.V, self.group = self.v.shape[3], self.H // self.N
        real, self.cu_seqlens = limits
        table = _device(self.q.device)[0]
        self.in_tiles = bool(tuned("descriptors", table.descriptors))
        self.apart = bool(tuned("apart", table.apart))
        self.seen = None if real is None else real.contiguous().view(torch.uint8)
        self.plan = plan(self.q.device, self.q.element_size(), max(self.K, self.V))

    def sequences(self) -> tuple[Tensor, Tensor]:
        """Where the sequence of each token begins and ends; anything where none are packed."""
        if self.cu_seqlens is None:
            return self.q, self.q
        bounds = self.cu_seqlens.to(torch.int32)
        token = torch.arange(self.T, dtype=torch.int32, device=bounds.device)
        own = torch.searchsorted(bounds[1:], token, right=True)
        return bounds[own], bounds[own + 1]

    def seen_by_all(self) -> tuple[Tensor, int]:
        """Which keys may be seen, a byte each, and the stride of its rows; anything where all are."""
        if self.seen is None:
            return self.q, 0
        return self.seen, self.S if self.seen.shape[0] > 1 else 0

    def constants(self, launch: Launch, rows: int) -> dict[str, Any]:
        """What all kernels of attention but the merging one are compiled for."""
        return {
            "K": self.K, "V": self.V, "ROWS_K": block(self.K), "ROWS_V": block(self.V), "ROWS": rows,
            "GROUP": self.group, "KEYS": min(launch.columns, block(self.S)), "SEEN": self.seen is not None,
            "VARLEN": self.cu_seqlens is not None, "TILES": self.in_tiles,
            "PRECISION": "tf32x3" if self.q.device.type == "cuda" else "ieee",
        }  # fmt: skip

    def walked(self, rows: int, *sides: Tensor) -> list[Any]:
        """What is walked over in tiles of so many rows, as descriptors, or as anything where pointers do."""
        if not self.in_tiles:
            return list(sides)
        return [TensorDescriptor.from_tensor(x, [1, 1, rows, block(x.shape[3])]) for x in sides]

    def empty(self, like: Tensor, size: int) -> Tensor:
        """Room for a tensor of heads, in memory with time before heads, as projections want them."""
        shape = (like.shape[0], like.shape[2], like.shape[1], size)
        return torch.empty(shape, dtype=like.dtype, device=like.device).transpose(1, 2)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Output, and the log-sum-exp of its logits to base 2."""
        packed = packs(self.plan, self.T, self.group)
        out = self.empty(self.q, self.V)
        lse = torch.empty(self.q.shape[:3], dtype=torch.float32, device=self.q.device)
        entries = make_lists(self.weights)[0] if packed.listed else self.q
        tiles, launch = triton.cdiv(self.T, packed.queries), packed.launch
        programs = self.B * self.H // packed.packed * tiles
        constants = self.constants(launch, packed.rows)
        splits = self._splits(programs, constants["KEYS"])
        parts = (splits, programs, packed.rows)
        shapes = ((*parts, self.V), (2, *parts)) if splits > 1 else ((0,), (0,))
        sums, most = (torch.empty(shape, dtype=torch.float32, device=lse.device) for shape in shapes)
        begins, (seen, stride) = self.sequences()[0], self.seen_by_all()
        form = {
            "QUERIES": packed.queries, "HEADS": packed.heads, "PACKED": packed.packed, "LISTED": packed.listed
        }  # fmt: skip
        _head_sparse_attention_fwd_kernel[(programs, splits)](
            self.q, self.k, self.v, *self.walked(constants["KEYS"], self.k, self.v), self.weights, entries, out, lse,
            sums, most, begins, seen,
            *strides(self.q, self.k, self.v, out),
            self.T, self.S, tiles, splits, stride, self.H, self.scale,
            **form, SPLIT=splits > 1, APART=self.apart, **constants, **launch.options(),
        )  # fmt: skip
        if splits > 1:
            shared = {name: constants[name] for name in ("V", "ROWS_V", "ROWS")}
            _head_sparse_attention_fwd_merge_kernel[(programs,)](
                sums, most, self.weights, entries, out, lse, *strides(out), self.T, tiles, splits, self.H,
                **form, **shared, num_warps=4,
            )  # fmt: skip
        return out, lse

    def backward(self, d_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        """Gradients of q, k, v and the weights."""
        rows = min(self.plan.keys.chunk, block(self.T))
        sizes = ((self.K,), (self.V,), (), ())
        like = (self.q, self.v, lse, lse)
        kept = [
            torch.empty((*self.q.shape[:3], *size), dtype=x.dtype, device=x.device)
            for size, x in zip(sizes, like, strict=True)
        ]
        entries, before = make_lists(self.weights)
        dq, d_weights = self._of_queries(aligned(d_out), out, lse, (entries, before, rows), kept)
        dk, dv = self._of_keys((entries, before, rows), kept)
        return dq, dk, dv, d_weights

    def _of_queries(
        self, d_out: Tensor, out: Tensor, lse: Tensor, lists: tuple[Tensor, Tensor, int], kept: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Gradients of q and the weights; fills what is kept for those of keys."""
        launch, (entries, before, walked) = self.plan.queries, lists
        rows = min(launch.chunk, block(self.T))
        tiles, constants = triton.cdiv(self.T, rows), self.constants(launch, rows)
        dq, d_weights = self.empty(self.q, self.K), torch.empty_like(self.weights)
        seen, stride = self.seen_by_all()
        _head_sparse_attention_bwd_query_kernel[(self.B * self.H * tiles,)](
            self.q, self.k, self.v, *self.walked(constants["KEYS"], self.k, self.v), self.weights, entries, before,
            out, d_out, lse, dq, d_weights, *kept, self.sequences()[0], seen,
            *strides(self.q, self.k, self.v, out, d_out, dq),
            self.T, self.S, tiles, stride, self.H, self.scale,
            WALKED=walked, **constants, **launch.options(),
        )  # fmt: skip
        return dq, d_weights

    def _of_keys(self, lists: tuple[Tensor, Tensor, int], kept: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Gradients of k and v, from what the gradients of queries left."""
        launch, (entries, before, rows), (q_rows, g_rows, lse, delta) = self.plan.keys, lists, kept
        constants = self.constants(launch, rows)
        dk, dv = self.empty(self.k, self.K), self.empty(self.v, self.V)
        # A row of a descriptor begins at 16 bytes.
        by_tiles = self.T % 4 == 0 and bool(tuned("sums", _device(self.q.device)[0].sums))
        tiles, (seen, stride) = triton.cdiv(self.S, constants["KEYS"]), self.seen_by_all()
        _head_sparse_attention_bwd_key_kernel[(self.B * self.N * tiles,)](
            q_rows, g_rows, self.k, self.v, *self.walked(rows, q_rows, g_rows),
            *(TensorDescriptor.from_tensor(x, [1, 1, rows]) if by_tiles else x for x in (lse, delta)),
            entries, before, lse, delta, dk, dv, *self.sequences(), seen,
            *strides(self.k, self.v, dk, dv),
            self.T, self.S, tiles, stride, self.H, self.scale,
            SUMS=by_tiles, **constants, **launch.options(),
        )  # fmt: skip
        return dk, dv

    def _splits(self, programs: int, keys: int) -> int:
        """Into how many parts keys are split: into one where tiles alone fill the device."""
        table, processors = _device(self.q.device)
        wanted, most = table.places * processors // programs, -(-self.S // keys)
        return tuned("splits", max(1, min(wanted, most, MOST_SPLITS)))


def _with_room(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Head sizes as the kernels take them, by zeros, which change nothing."""
    q, k, v = (wider(x, room(x.shape[3], x.device)) for x in (q, k, v))
    return q, k, v


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    real: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output, and what the backward pass wants; arguments as those of the registered op."""
    out, lse = Call(_with_room(q, k, v), weights, (real, cu_seqlens), scale).forward()
    return narrower(out, v.shape[3]), lse


def launch_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    real: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the weights; arguments as those of the registered op."""
    call = Call(_with_room(q, k, v), weights, (real, cu_seqlens), scale)
    d_out, out = (wider(x, call.V) for x in (d_out.to(v.dtype), out))
    dq, dk, dv, d_weights = call.backward(d_out, out, lse)
    dq, dk, dv = narrower(dq, q.shape[3]), narrower(dk, k.shape[3]), narrower(dv, v.shape[3])
    return dq, dk, dv, d_weights.to(weights.dtype)
