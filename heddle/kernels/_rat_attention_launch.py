"""Launches the kernels of rat_attention."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from triton.tools.tensor_descriptor import TensorDescriptor

from heddle.kernels._rat_attention_bwd import (
    _rat_attention_bwd_key_kernel,
    _rat_attention_bwd_query_kernel,
)
from heddle.kernels._rat_attention_fwd import _rat_attention_fwd_kernel, _rat_attention_fwd_merge_kernel
from heddle.kernels.common.layout import aligned, block, room, strides
from heddle.kernels.common.segments import Segments, lay_out
from heddle.kernels.common.tables import table_on
from heddle.kernels.common.tuning import tuned
from heddle.kernels.configs.launch import Launch
from heddle.kernels.configs.rat_attention import INTERPRETER, Family, Plan, family

# Into how many parts the summaries of a tile are split at most.
MOST_SPLITS = 32
Sides = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@functools.cache
def _device(device: torch.device) -> tuple[Family, int]:
    """Configurations and multiprocessors."""
    return table_on(device, "rat_attention", INTERPRETER, family)


def plan(device: torch.device, element: int, size: int) -> Plan:
    """The launches for tensors on `device`, elements of so many bytes and this head size; overrides come first."""
    table = _device(device)[0].plan(element, block(size))
    names = ("forward", "step", "queries", "keys")
    return replace(table, **{name: tuned(f"rat_{name}", getattr(table, name)) for name in names})


@dataclass(frozen=True, slots=True)
class Numbers:
    """What a call is told beside its tensors."""

    scale: float
    chunk: int
    start: int


class Call:
    """What all launches over the same inputs are told; heads are put before time, as views.

    Shapes:  q: [B, T, G, d];  key, value: [B, T, H, d];  keys, values: [B, H, S, d];  cu_seqlens: [sequences + 1]
    """

    def __init__(self, sides: Sides, cu_seqlens: Tensor | None, numbers: Numbers) -> None:
        q, key, value, keys, values = sides
        self.q, self.key, self.value = (aligned(side).transpose(1, 2) for side in (q, key, value))
        self.keys, self.values = aligned(keys), aligned(values)
        (self.B, self.H, self.T, self.D), self.S = self.key.shape, keys.shape[2]
        self.cu_seqlens, self.numbers = cu_seqlens, numbers
        # No place is beyond this, and products with it stay in 32 bits.
        self.chunk = min(numbers.chunk, numbers.start + self.T + 1)
        self.in_tiles = bool(tuned("descriptors", _device(q.device)[0].descriptors))
        self.plan = plan(q.device, q.element_size(), self.D)

    def tiles(self, length: int, size: int) -> Segments:
        """A time axis in tiles of which none holds two sequences."""
        sequences = self.B if self.cu_seqlens is None else len(self.cu_seqlens) - 1
        return lay_out(length, sequences, size, self.cu_seqlens)

    def table(self, tiles: Segments) -> tuple[Tensor, Tensor]:
        """Which sequence a tile belongs to, and where sequences begin; anything where none are packed."""
        if tiles.table is None or self.cu_seqlens is None:
            return self.q, self.q
        return tiles.table, self.cu_seqlens.to(torch.int32)

    def constants(self, launch: Launch) -> dict[str, Any]:
        """What all kernels but the merging one are compiled for."""
        return {
            "G": self.q.shape[1], "D": self.D, "ROWS_D": block(self.D), "ROWS": min(launch.chunk, block(self.T)),
            "KEYS": min(launch.columns, block(self.S)), "VARLEN": self.cu_seqlens is not None, "TILES": self.in_tiles,
            "PRECISION": "tf32x3" if self.q.device.type == "cuda" else "ieee",
        }  # fmt: skip

    def walked(self, rows: int, *sides: Tensor) -> list[Any]:
        """What is walked over in tiles of so many rows, as descriptors, or as anything where pointers do."""
        if not self.in_tiles:
            return list(sides)
        # Of no rows there is no descriptor, and nobody reads by it.
        some = [x if x.shape[2] else self.key for x in sides]
        return [TensorDescriptor.from_tensor(x, [1, 1, rows, block(self.D)]) for x in some]

    def empty(self) -> Tensor:
        """Room for a tensor of all heads, in memory with time before heads."""
        shape = (self.B, self.T, self.H, self.D)
        return torch.empty(shape, dtype=self.q.dtype, device=self.q.device).transpose(1, 2)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Output [B, T, H, d], and the log-sum-exp of its logits to base 2."""
        launch = self.plan.step if self.T == 1 else self.plan.forward
        constants = self.constants(launch)
        tiles, rows = self.tiles(self.T, constants["ROWS"]), constants["ROWS"]
        out, programs = self.empty(), tiles.count * self.H
        lse = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
        splits = self._splits(programs, constants["KEYS"])
        parts = (splits, programs, rows)
        shapes = ((*parts, self.D), (2, *parts)) if splits > 1 else ((0,), (0,))
        sums, most = (torch.empty(shape, dtype=torch.float32, device=out.device) for shape in shapes)
        sides, table = (self.keys, self.values), self.table(tiles)
        _rat_attention_fwd_kernel[(tiles.count, self.H, splits)](
            self.q, self.key, self.value, *sides, *self.walked(constants["KEYS"], *sides), out, lse, sums, most, *table,
            *strides(self.q, self.key, self.value, *sides, out),
            self.T, tiles.per_sequence, splits, self.chunk, self.numbers.start, self.numbers.scale,
            SPLIT=splits > 1, **constants, **launch.options(),
        )  # fmt: skip
        if splits > 1:
            shared = {name: constants[name] for name in ("D", "ROWS_D", "ROWS", "VARLEN")}
            _rat_attention_fwd_merge_kernel[(tiles.count, self.H)](
                sums, most, out, lse, *table, *strides(out),
                self.T, tiles.per_sequence, splits, self.chunk, **shared, num_warps=4,
            )  # fmt: skip
        return out.transpose(1, 2), lse

    def backward(self, d_out: Tensor, out: Tensor, lse: Tensor) -> Sides:
        """Gradients of q, key, value, keys and values."""
        d_out, out = aligned(d_out).transpose(1, 2), out.transpose(1, 2)
        delta = torch.empty_like(lse)
        dq, d_key, d_value = self.empty(), self.empty(), self.empty()
        launch = self.plan.queries
        constants = self.constants(launch)
        tiles, sides = self.tiles(self.T, constants["ROWS"]), (self.keys, self.values)
        _rat_attention_bwd_query_kernel[(tiles.count, self.H)](
            self.q, self.key, self.value, *sides, *self.walked(constants["KEYS"], *sides), out, d_out, lse, delta,
            dq, d_key, d_value, *self.table(tiles),
            *strides(self.q, self.key, self.value, *sides, out, d_out, dq),
            self.T, tiles.per_sequence, self.chunk, self.numbers.start, self.numbers.scale,
            **constants, **launch.options(),
        )  # fmt: skip
        d_keys, d_values = self._of_summaries(d_out, lse, delta)
        # Head h reads group h mod G.
        dq = dq.transpose(1, 2).view(self.B, self.T, -1, self.q.shape[1], self.D).sum(2)
        return dq, d_key.transpose(1, 2), d_value.transpose(1, 2), d_keys, d_values

    def _of_summaries(self, d_out: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        # Between sequences there are rows that no program has.
        make = torch.empty if self.cu_seqlens is None else torch.zeros
        d_keys, d_values = (make(x.shape, dtype=x.dtype, device=x.device) for x in (self.keys, self.values))
        if self.S == 0:
            return d_keys, d_values
        launch = self.plan.keys
        constants = self.constants(launch)
        keys = constants["KEYS"]
        tiles = self.tiles(self.S, keys) if self.cu_seqlens is None else self.tiles(self.T, keys * self.chunk)
        _rat_attention_bwd_key_kernel[(tiles.count, self.H)](
            self.q, d_out, self.keys, self.values, *self.walked(constants["ROWS"], self.q, d_out), lse, delta,
            d_keys, d_values, *self.table(tiles), *strides(self.q, d_out, self.keys, self.values),
            self.T, self.S, tiles.per_sequence, self.chunk, self.numbers.start, self.numbers.scale,
            **constants, **launch.options(),
        )  # fmt: skip
        return d_keys, d_values

    def _splits(self, programs: int, keys: int) -> int:
        """Into how many parts summaries are split: into one where tiles alone fill the device."""
        table, processors = _device(self.q.device)
        most = -(-((self.numbers.start + self.T - 1) // self.chunk) // keys)
        wanted = table.places * processors // programs
        return tuned("splits", max(1, min(wanted, most, MOST_SPLITS)))


def _wider(x: Tensor, size: int) -> Tensor:
    """The same with a last axis of `size`, zeros behind what is there."""
    return pad(x, (0, size - x.shape[-1])) if size > x.shape[-1] else x


def _narrower(x: Tensor, size: int) -> Tensor:
    """The first `size` of the last axis."""
    return x if size == x.shape[-1] else x[..., :size].contiguous()


def _call(sides: Sides, cu_seqlens: Tensor | None, numbers: Numbers) -> Call:
    """Head sizes as the kernels take them, by zeros, which change nothing."""
    size = room(sides[0].shape[3], sides[0].device)
    q, key, value, keys, values = (_wider(x, size) for x in sides)
    return Call((q, key, value, keys, values), cu_seqlens, numbers)


def launch_forward(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
    start: int,
) -> tuple[Tensor, Tensor]:
    """Output, and what the backward pass wants; arguments as those of the registered op."""
    out, lse = _call((q, key, value, keys, values), cu_seqlens, Numbers(scale, chunk, start)).forward()
    return _narrower(out, q.shape[3]), lse


def launch_backward(
    d_out: Tensor,
    q: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
    start: int,
    out: Tensor,
    lse: Tensor,
) -> Sides:
    """Gradients of q, key, value, keys and values; arguments as those of the registered op."""
    call = _call((q, key, value, keys, values), cu_seqlens, Numbers(scale, chunk, start))
    d_out, out = (_wider(x, call.D) for x in (d_out.to(q.dtype), out))
    dq, d_key, d_value, d_keys, d_values = (_narrower(x, q.shape[3]) for x in call.backward(d_out, out, lse))
    return dq, d_key, d_value, d_keys, d_values
