"""Launches the kernels of grid_window_attention."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from heddle.kernels._grid_window_attention_bwd import (
    _grid_window_attention_bwd_key_kernel,
    _grid_window_attention_bwd_query_kernel,
)
from heddle.kernels._grid_window_attention_fwd import _grid_window_attention_fwd_kernel
from heddle.kernels.common.layout import aligned, block, narrower, room, strides, wider
from heddle.kernels.common.tables import table_on
from heddle.kernels.common.tuning import tuned
from heddle.kernels.configs.grid_window_attention import INTERPRETER, Family, Plan, family
from heddle.kernels.configs.launch import Launch

# Rows that the tokens make are not counted further where boxes are chosen: each choice is a compilation.
MOST_ROWS = 64
# Nor are places of other axes: more make no other choice.
MOST_PLACES = 512


@functools.cache
def _table(device: torch.device) -> Family:
    return table_on(device, "grid_window_attention", INTERPRETER, family)[0]


def plan(device: torch.device, element: int, size: int) -> Plan:
    """The launches for tensors on `device`, elements of so many bytes and the larger head size; overrides come first."""
    table = _table(device).plan(element, block(size))
    names = ("forward", "queries", "keys")
    return replace(table, **{name: tuned(name, getattr(table, name)) for name in names})


@dataclass(frozen=True, slots=True)
class Axis:
    """Places of an axis, and how far a window reaches to either side; `slides`: it stays as long at the ends."""

    size: int
    reach: int
    slides: bool

    @property
    def seen(self) -> int:
        """How many places a window has at most."""
        return min(2 * self.reach + 1, self.size)

    @property
    def is_cut(self) -> bool:
        """Whether a window leaves anything out."""
        return self.seen < self.size if self.slides else self.reach < self.size - 1

    def within(self, most: int) -> Axis:
        """No longer than this."""
        size = min(self.size, most)
        return replace(self, size=size, reach=min(self.reach, size - 1))

    def window(self, place: int) -> tuple[int, int]:
        """Its first place, and the one behind its last."""
        first, end = max(place - self.reach, 0), min(place + self.reach + 1, self.size)
        if self.slides:
            first = min(first, self.size - self.seen)
            end = first + self.seen
        return first, end


@functools.cache
def walks(axis: Axis, held: int, walked: int) -> int:
    """How many boxes of `walked` places the windows of each `held` neighbours fill, over the whole axis."""
    found = 0
    for begin in range(0, axis.size, held):
        first, end = axis.window(begin)[0], axis.window(min(begin + held, axis.size) - 1)[1]
        found += -(-(end - first) // walked)
    return found


@functools.cache
def box_columns(held: int, walked: int, down: Axis, across: Axis) -> tuple[int, int]:
    """How many columns boxes of so many tokens have, those that programs hold and those that they walk over.

    Of all powers of two those that need the fewest boxes, of equal ones the widest: columns are neighbours in memory. Keys that
    are held are taken to be seen by as many as a query sees.
    """
    down, across = (axis.within(MOST_PLACES) for axis in (down, across))

    def cost(columns: tuple[int, int]) -> tuple[int, ...]:
        wide, other = columns
        boxes = walks(down, held // wide, walked // other) * walks(across, wide, other)
        return boxes, -wide, -other

    both = ((1 << i, 1 << j) for i in range(held.bit_length()) for j in range(walked.bit_length()))
    return min(both, key=cost)


class Call:
    """What all launches over the same inputs are told.

    Shapes:  q: [B, H, T, K];  k: [B, N, T, K];  v: [B, N, T, V];  begin, count: [B] int32, or None
    """

    def __init__(
        self, sides: tuple[Tensor, Tensor, Tensor], real: tuple[Tensor | None, Tensor | None], *numbers: Any
    ) -> None:
        self.q, self.k, self.v = (aligned(side) for side in sides)
        (self.B, self.H, self.T, self.K), self.N, self.V = self.q.shape, self.k.shape[1], self.v.shape[3]
        height, self.columns, *windows, self.slides, self.scale = numbers
        self.has_frames = height > 0
        self.rows = height or -(-self.T // self.columns)
        self.frames = -(-self.T // (self.rows * self.columns)) if self.has_frames else 1
        # A window of 0 is the whole axis.
        sizes = (self.frames, self.rows, self.columns)
        self.axes = [
            Axis(size, min(window or size, size) - 1, self.slides)
            for size, window in zip(sizes, windows, strict=True)
        ]
        # Any tensor does where there is no padding.
        self.begin, self.count = (self.q if x is None else x for x in real)
        self.is_padded = real[0] is not None
        self.plan = plan(self.q.device, self.q.element_size(), max(self.K, self.V))

    def boxes(self, held: int, walked: int) -> tuple[dict[str, int], tuple[int, ...]]:
        """The columns of boxes of so many tokens, as kernels are compiled for; boxes in all, in a column and in a row of them."""
        _, down, across = self.axes
        if not self.has_frames:
            down = replace(down, size=triton.next_power_of_2(down.size)).within(MOST_ROWS)
        wide, other = box_columns(held, walked, down, across)
        high, broad = triton.cdiv(self.rows, held // wide), triton.cdiv(self.columns, wide)
        return {"BOX_C": wide, "WALKED_C": other}, (self.frames * high * broad, high, broad)

    def constants(self, launch: Launch) -> dict[str, Any]:
        """What all kernels are compiled for."""
        _, down, across = self.axes
        tokens = block(self.T)
        return {
            "K": self.K, "V": self.V, "ROWS_K": block(self.K), "ROWS_V": block(self.V),
            "ROWS": min(launch.chunk, tokens), "KEYS": min(launch.columns, tokens), "GROUP": self.H // self.N,
            "FRAMES": self.has_frames, "ROW_WINDOW": down.is_cut, "COLUMN_WINDOW": across.is_cut,
            "INWARD": self.slides, "PADDED": self.is_padded,
            "PRECISION": "tf32x3" if self.q.device.type == "cuda" else "ieee",
        }  # fmt: skip

    def numbers(self, boxes: tuple[int, ...]) -> tuple[int, ...]:
        """The sizes that all kernels are told, but for their heads."""
        return self.T, self.rows, self.columns, *boxes, *(axis.reach for axis in self.axes)

    def empty(self, like: Tensor, size: int) -> Tensor:
        """Room for a tensor of heads, in memory with time before heads, as projections want them."""
        shape = (like.shape[0], like.shape[2], like.shape[1], size)
        return torch.empty(shape, dtype=like.dtype, device=like.device).transpose(1, 2)

    def forward(self, trains: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Output, what rounding took from it if gradients will want it, and the log-sum-exp of its logits to base 2."""
        launch, out = self.plan.forward, self.empty(self.q, self.V)
        lse = torch.empty(self.q.shape[:3], dtype=torch.float32, device=self.q.device)
        constants, is_kept = self.constants(launch), trains and out.element_size() < 4
        lost = self.empty(self.q, self.V) if is_kept else out.new_empty(0)
        place = lost if is_kept else out
        columns, boxes = self.boxes(constants["ROWS"], constants["KEYS"])
        _grid_window_attention_fwd_kernel[(self.B * self.H * boxes[0],)](
            self.q, self.k, self.v, out, place, lse, self.begin, self.count,
            *strides(self.q, self.k, self.v, out, place), *self.numbers(boxes), self.H, self.scale,
            LOST=is_kept, **columns, **constants, **launch.options(),
        )  # fmt: skip
        return out, lost, lse

    def backward(
        self, d_out: Tensor, out: Tensor, lost: Tensor | None, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v."""
        d_out, out, delta = aligned(d_out), aligned(out), torch.empty_like(lse)
        place = out if lost is None else aligned(lost)
        dq, dk, dv = self.empty(self.q, self.K), self.empty(self.k, self.K), self.empty(self.v, self.V)
        launch = self.plan.queries
        constants = self.constants(launch)
        columns, boxes = self.boxes(constants["ROWS"], constants["KEYS"])
        _grid_window_attention_bwd_query_kernel[(self.B * self.H * boxes[0],)](
            self.q, self.k, self.v, out, place, d_out, lse, delta, dq, self.begin, self.count,
            *strides(self.q, self.k, self.v, out, place, d_out, dq), *self.numbers(boxes), self.H, self.scale,
            LOST=lost is not None, **columns, **constants, **launch.options(),
        )  # fmt: skip
        launch = self.plan.keys
        constants = self.constants(launch)
        columns, boxes = self.boxes(constants["KEYS"], constants["ROWS"])
        _grid_window_attention_bwd_key_kernel[(self.B * self.N * boxes[0],)](
            self.q, self.k, self.v, d_out, lse, delta, dk, dv, self.begin, self.count,
            *strides(self.q, self.k, self.v, d_out, dk, dv), *self.numbers(boxes), self.N, self.scale,
            **columns, **constants, **launch.options(),
        )  # fmt: skip
        return dq, dk, dv


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, begin: Tensor | None, count: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and what the backward pass wants; arguments as those of the registered op."""
    *numbers, trains = rest
    out, lost, lse = Call(_with_room(q, k, v), (begin, count), *numbers).forward(trains)
    return narrower(out, v.shape[3]), narrower(lost, v.shape[3]) if lost.numel() else lost, lse


def launch_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, begin: Tensor | None, count: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; arguments as those of the registered op."""
    *numbers, out, lost, lse = rest
    call = Call(_with_room(q, k, v), (begin, count), *numbers)
    d_out, out = (wider(x, call.V) for x in (d_out.to(v.dtype), out))
    taken = wider(lost, call.V) if lost.numel() else None
    dq, dk, dv = call.backward(d_out, out, taken, lse)
    return narrower(dq, q.shape[3]), narrower(dk, k.shape[3]), narrower(dv, v.shape[3])


def _with_room(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Head sizes as the kernels take them, by zeros, which change nothing."""
    q, k, v = (wider(x, room(x.shape[3], x.device)) for x in (q, k, v))
    return q, k, v
