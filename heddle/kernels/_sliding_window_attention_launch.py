"""Launches the kernels of sliding_window_attention."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from heddle.kernels._sliding_window_attention_bwd import (
    _sliding_window_attention_bwd_key_kernel,
    _sliding_window_attention_bwd_query_kernel,
)
from heddle.kernels._sliding_window_attention_fwd import (
    _sliding_window_attention_fwd_kernel,
    _sliding_window_attention_fwd_merge_kernel,
)
from heddle.kernels.common.layout import aligned, block, narrower, room, strides, wider
from heddle.kernels.common.segments import Segments, lay_out
from heddle.kernels.common.tables import table_on
from heddle.kernels.common.tuning import tuned
from heddle.kernels.configs.launch import Launch
from heddle.kernels.configs.sliding_window_attention import INTERPRETER, Family, Plan, family

# Into how many parts the keys of a tile are split at most.
MOST_SPLITS = 32


@functools.cache
def _device(device: torch.device) -> tuple[Family, int]:
    """Configurations and multiprocessors."""
    return table_on(device, "sliding_window_attention", INTERPRETER, family)


def plan(device: torch.device, element: int, size: int, window: int) -> Plan:
    """The launches for tensors on `device`, elements of so many bytes, the larger head size and a window; overrides first."""
    table = _device(device)[0].within(window, element, block(size))
    names = ("forward", "step", "queries", "keys")
    return replace(table, **{name: tuned(name, getattr(table, name)) for name in names})


@dataclass(frozen=True, slots=True)
class Packs:
    """How the queries of a tile are laid out in its rows: so many of `packed` neighbouring heads, in `heads` places."""

    launch: Launch
    queries: int
    heads: int
    packed: int

    @property
    def rows(self) -> int:
        return block(self.queries * self.heads)


def packs(table: Plan, length: int, group: int) -> Packs:
    """Few queries of all heads of a group together, so that their keys are read once; else many of one head."""
    heads = triton.next_power_of_2(group)
    few = triton.next_power_of_2(length)
    if few * heads <= max(table.step.chunk, heads):
        return Packs(table.step, few, heads, group)
    return Packs(table.forward, min(table.forward.chunk, block(length)), 1, 1)


class Call:
    """What all launches over the same inputs are told.

    Shapes:  q: [B, H, T, d];  k: [B, N, S, d];  v: [B, N, S, V];  real: [1 or B, S] bool;  cu_seqlens: [sequences + 1]
    """

    def __init__(
        self,
        sides: tuple[Tensor, Tensor, Tensor],
        limits: tuple[Tensor | None, Tensor | None],
        numbers: tuple[float, int, int],
    ) -> None:
        self.q, self.k, self.v = (aligned(side) for side in sides)
        self.scale, self.window, self.sinks = numbers
        (self.B, self.H, self.T, self.K), (self.N, self.S) = self.q.shape, self.k.shape[1:3]
        self.V, self.group = self.v.shape[3], self.H // self.N
        # More than there is would run over in the kernels.
        self.window, self.sinks = min(self.window, self.S), min(self.sinks, self.S)
        real, self.cu_seqlens = limits
        self.in_tiles = bool(tuned("descriptors", _device(self.q.device)[0].descriptors))
        self.seen = None if real is None else real.contiguous().view(torch.uint8)
        self.plan = plan(self.q.device, self.q.element_size(), max(self.K, self.V), self.window)

    def tiles(self, length: int, size: int) -> Segments:
        """The time axis in tiles of which none holds two sequences."""
        sequences = self.B if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        return lay_out(length, sequences, size, self.cu_seqlens)

    def table(self, tiles: Segments) -> tuple[Tensor, Tensor]:
        """Which sequence a tile belongs to, and where sequences begin; anything where none are packed."""
        if tiles.table is None or self.cu_seqlens is None:
            return self.q, self.q
        return tiles.table, self.cu_seqlens.to(torch.int32)

    def seen_by_all(self) -> tuple[Tensor, int]:
        """Which keys may be seen, a byte each, and the stride of its rows; anything where all are."""
        if self.seen is None:
            return self.q, 0
        return self.seen, self.S if self.seen.shape[0] > 1 else 0

    def constants(self, launch: Launch, rows: int) -> dict[str, Any]:
        """What all kernels but the merging one are compiled for."""
        return {
            "K": self.K, "V": self.V, "ROWS_K": block(self.K), "ROWS_V": block(self.V), "ROWS": rows,
            "GROUP": self.group, "KEYS": min(launch.columns, block(self.S)), "SINKS": self.sinks > 0,
            "SEEN": self.seen is not None, "VARLEN": self.cu_seqlens is not None, "TILES": self.in_tiles,
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
        tiles = self.tiles(self.T, packed.queries)
        out = self.empty(self.q, self.V)
        lse = torch.empty(self.q.shape[:3], dtype=torch.float32, device=self.q.device)
        units, launch = self.H // packed.packed, packed.launch
        constants = self.constants(launch, packed.rows)
        splits = self._splits(tiles.count * units, constants["KEYS"])
        parts = (splits, tiles.count * units, packed.rows)
        shapes = ((*parts, self.V), (2, *parts)) if splits > 1 else ((0,), (0,))
        sums, most = (torch.empty(shape, dtype=torch.float32, device=lse.device) for shape in shapes)
        (table, cu_seqlens), (seen, stride) = self.table(tiles), self.seen_by_all()
        form = {"QUERIES": packed.queries, "HEADS": packed.heads, "PACKED": packed.packed}
        _sliding_window_attention_fwd_kernel[(tiles.count, units, splits)](
            self.q, self.k, self.v, *self.walked(constants["KEYS"], self.k, self.v), out, lse, sums, most,
            table, cu_seqlens, seen,
            *strides(self.q, self.k, self.v, out),
            self.T, self.S, tiles.per_sequence, splits, self.window, self.sinks, stride, self.scale,
            **form, SPLIT=splits > 1, **constants, **launch.options(),
        )  # fmt: skip
        if splits > 1:
            shared = ("V", "ROWS_V", "ROWS", "VARLEN")
            _sliding_window_attention_fwd_merge_kernel[(tiles.count, units)](
                sums, most, out, lse, table, cu_seqlens, *strides(out), self.T, tiles.per_sequence, splits,
                **form, **{name: constants[name] for name in shared}, num_warps=4,
            )  # fmt: skip
        return out, lse

    def backward(self, d_out: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        d_out = aligned(d_out)
        # A row of a descriptor begins at 16 bytes.
        room = -(-self.T // 4) * 4
        sums = torch.empty(self.B * self.H, 2, room, dtype=torch.float32, device=lse.device)
        # So does what it loads: at a place that is a multiple of 4.
        is_even = self.cu_seqlens is None and (self.S - self.T) % 4 == 0
        by_tiles = is_even and bool(tuned("sums", _device(self.q.device)[0].sums))
        dq, dk, dv = self.empty(self.q, self.K), self.empty(self.k, self.K), self.empty(self.v, self.V)
        seen, stride = self.seen_by_all()
        numbers = (self.window, self.sinks, stride, self.scale)
        launch = self.plan.queries
        rows = min(launch.chunk, block(self.T))
        tiles = self.tiles(self.T, rows)
        constants = self.constants(launch, rows)
        _sliding_window_attention_bwd_query_kernel[(tiles.count, self.H)](
            self.q, self.k, self.v, *self.walked(constants["KEYS"], self.k, self.v), out, d_out, lse, sums, dq,
            *self.table(tiles), seen,
            *strides(self.q, self.k, self.v, out, d_out, dq),
            self.T, self.S, tiles.per_sequence, room, *numbers,
            **constants, **launch.options(),
        )  # fmt: skip
        launch = self.plan.keys
        constants = self.constants(launch, min(launch.chunk, block(self.T)))
        tiles = self.tiles(self.S, constants["KEYS"])
        _sliding_window_attention_bwd_key_kernel[(tiles.count, self.N)](
            self.q, self.k, self.v, *self.walked(constants["ROWS"], self.q, d_out),
            TensorDescriptor.from_tensor(sums[..., : self.T], [1, 1, constants["ROWS"]]) if by_tiles else sums,
            d_out, sums, dk, dv,
            *self.table(tiles), seen,
            *strides(self.q, self.k, self.v, d_out, dk, dv),
            self.T, self.S, tiles.per_sequence, room, *numbers,
            SUMS=by_tiles, **constants, **launch.options(),
        )  # fmt: skip
        return dq, dk, dv

    def _splits(self, programs: int, keys: int) -> int:
        """Into how many parts keys are split: into one where tiles alone fill the device."""
        table, processors = _device(self.q.device)
        most = -(-(self.window + self.sinks) // keys)
        wanted = table.places * processors // programs
        return tuned("splits", max(1, min(wanted, most, MOST_SPLITS)))


def _with_room(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Head sizes as the kernels take them, by zeros, which change nothing."""
    q, k, v = (wider(x, room(x.shape[3], x.device)) for x in (q, k, v))
    return q, k, v


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    window: int,
    sinks: int,
) -> tuple[Tensor, Tensor]:
    """Output, and what the backward pass wants; arguments as those of the registered op."""
    out, lse = Call(_with_room(q, k, v), (real, cu_seqlens), (scale, window, sinks)).forward()
    return narrower(out, v.shape[3]), lse


def launch_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    window: int,
    sinks: int,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; arguments as those of the registered op."""
    call = Call(_with_room(q, k, v), (real, cu_seqlens), (scale, window, sinks))
    d_out, out = (wider(x, call.V) for x in (d_out.to(v.dtype), out))
    dq, dk, dv = call.backward(d_out, out, lse)
    return narrower(dq, q.shape[3]), narrower(dk, k.shape[3]), narrower(dv, v.shape[3])
