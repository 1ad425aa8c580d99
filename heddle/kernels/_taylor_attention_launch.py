"""Launches the kernels of taylor_attention."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from heddle.kernels._taylor_attention_bwd import (
    _taylor_attention_bwd_key_kernel,
    _taylor_attention_bwd_query_kernel,
)
from heddle.kernels._taylor_attention_fwd import (
    _taylor_attention_carry_kernel,
    _taylor_attention_fwd_kernel,
    _taylor_attention_state_kernel,
)
from heddle.kernels.common.layout import aligned, block, room, strides, wider
from heddle.kernels.common.segments import lay_out
from heddle.kernels.common.tables import table_on
from heddle.kernels.common.tuning import tuned
from heddle.kernels.configs.launch import Launch
from heddle.kernels.configs.taylor_attention import INTERPRETER, Family, Plan, family

# As in the kernels, which are compiled for them: dimensions of a query, rows of a state, numbers behind them.
SIZE, FEATURES, OWN = 16, 273, 288
CARRY_BLOCK = 1024


@functools.cache
def _table(device: torch.device) -> Family:
    return table_on(device, "taylor_attention", INTERPRETER, family)[0]


def plan(device: torch.device, element: int, size: int) -> Plan:
    """The launches for tensors on `device`, elements of so many bytes and this size of values; overrides come first."""
    table = _table(device).plan(element, block(size))
    names = ("state", "forward", "queries", "keys")
    launches = {name: tuned(name, getattr(table, name)) for name in names}
    return replace(table, segment=tuned("segment", table.segment), **launches)


@dataclass(frozen=True, slots=True)
class States:
    """What is known of other segments at each segment, and of all in the end; in bfloat16 what rounding took is kept too.

    Shapes:  rows: [1 or 2, segments, H, FEATURES V];  own: [segments, H, OWN];  last: [N, H, FEATURES V + OWN]
    """

    rows: Tensor
    own: Tensor
    last: Tensor


class Call:
    """What all launches over the same inputs are told.

    Shapes:  q, k: [B, T, H, SIZE];  v: [B, T, H, V];  weight: [B, T];  cu_seqlens: [N + 1]
    """

    def __init__(
        self,
        sides: tuple[Tensor, Tensor, Tensor],
        weight: Tensor | None,
        scale: float,
        cu_seqlens: Tensor | None,
    ) -> None:
        self.q, self.k = (aligned(side) for side in sides[:2])
        self.v = self._roomy(sides[2])
        self.B, self.T, self.H, self.V = self.v.shape
        self.weight, self.scale = weight, scale
        self.of_heads = self.q[..., 0] if weight is None else weight[:, :, None].expand(-1, -1, self.H)
        # Float16 is float32 in the kernels.
        element = 2 if self.q.dtype == torch.bfloat16 else 4
        self.plan = plan(self.q.device, element, self.V)
        self.sequences = self.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.packed = None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous()
        # A multiple of all tiles.
        size = triton.cdiv(self.plan.segment, 64) * 64
        self.segments = lay_out(self.T, self.sequences, size, self.packed)
        self.is_split = self.q.dtype == torch.bfloat16
        # Where the second part of states is.
        self.rest = self.segments.count * self.H * FEATURES * self.V

    def states(
        self, x: Tensor, y: Tensor, factors: tuple[Tensor, Tensor] | None, given: Tensor | None
    ) -> States:
        """The sums over x and y; of what comes later where there are `factors` of queries.

        Shapes:  x: [B, T, H, SIZE];  y: [B, T, H, V];  factors: two of [B, T, H];  given: [N, H, FEATURES V + OWN]
        """
        launch, backward = self.plan.state, factors is not None
        r, g = (self.of_heads, self.of_heads) if factors is None else factors
        columns = min(launch.columns, block(self.V))
        shape = (self.segments.count, self.H)
        added = x.new_empty(*shape, FEATURES * self.V + OWN, dtype=torch.float32)
        tiles = (SIZE // 4) * triton.cdiv(self.V, columns)
        _taylor_attention_state_kernel[(self.segments.count * self.H, tiles)](
            x, y, r, g, added, *self._places(x), *strides(x, y, r), *self._numbers(),
            V=self.V, COLUMNS=columns, C=launch.chunk, **self._constants(backward or self.weight is not None),
            **launch.options(),
        )  # fmt: skip
        wide = torch.bfloat16 if self.is_split else torch.float32
        rows = x.new_empty(1 + self.is_split, *shape, FEATURES * self.V, dtype=wide)
        own = x.new_empty(*shape, OWN, dtype=torch.float32)
        last = x.new_empty(self.sequences, self.H, added.shape[2], dtype=torch.float32)
        offsets = added if self.segments.offsets is None else self.segments.offsets
        _taylor_attention_carry_kernel[(self.sequences * self.H, triton.cdiv(added.shape[2], CARRY_BLOCK))](
            added, rows, own, added if given is None else given, last, offsets, self.H, self.segments.per_sequence,
            self.rest, V=self.V, BLOCK=CARRY_BLOCK, SPLIT=self.is_split, BACKWARD=backward, VARLEN=self.packed is not None,
            HAS_GIVEN=given is not None, num_warps=4,
        )  # fmt: skip
        return States(rows, own, last)

    def forward(self, initial: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Output, the state in the end, and what outputs were divided by."""
        before, launch = self.states(self.k, self.v, None, initial), self.plan.forward
        out = self.v.new_empty(self.v.shape)
        total = out.new_empty(out.shape[:3], dtype=torch.float32)
        _taylor_attention_fwd_kernel[self._grid(launch.chunk)](
            self.q, self.k, self.v, self.of_heads, before.rows, before.own, out, total, *self._places(out),
            *strides(self.q, self.k, self.v, self.of_heads), *self._numbers(), self.rest, self.scale,
            BEFORE=self._meets(initial), **self._tiles(launch), **launch.options(),
        )  # fmt: skip
        return out, before.last, total

    def backward(
        self, d_out: Tensor, d_final: Tensor | None, initial: Tensor | None, total: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of q, k, v and of sums that were there before."""
        d_out = self._roomy(d_out)
        dq, r, g = self._of_queries(d_out, initial, total)
        after, launch = self.states(self.q, d_out, (r, g), d_final), self.plan.keys
        dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (self.k, self.v))
        _taylor_attention_bwd_key_kernel[self._grid(launch.columns)](
            self.q, self.k, self.v, self.of_heads, d_out, r, g, after.rows, after.own, dk, dv, *self._places(dk),
            *strides(self.q, self.k, self.v, self.of_heads, d_out), *self._numbers(), self.rest, self.scale,
            AFTER=self._meets(d_final), **self._tiles(launch), **launch.options(),
        )  # fmt: skip
        return dq, dk, dv, after.last

    def _of_queries(
        self, d_out: Tensor, initial: Tensor | None, total: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of q, and what gradients of the numerator and of the denominator are made of."""
        before, launch = self.states(self.k, self.v, None, initial), self.plan.queries
        dq = torch.empty(self.q.shape, dtype=self.q.dtype, device=self.q.device)
        r, g = torch.empty_like(total), torch.empty_like(total)
        _taylor_attention_bwd_query_kernel[self._grid(launch.chunk)](
            self.q, self.k, self.v, self.of_heads, d_out, total, before.rows, before.own, dq, r, g, *self._places(dq),
            *strides(self.q, self.k, self.v, self.of_heads, d_out), *self._numbers(), self.rest, self.scale,
            BEFORE=self._meets(initial), **self._tiles(launch), **launch.options(),
        )  # fmt: skip
        return dq, r, g

    def _roomy(self, v: Tensor) -> Tensor:
        """Values as kernels take them, with zeros behind: narrow tiles beside wide ones are what ptxas 12.8 gets wrong."""
        return aligned(wider(v, room(v.shape[3], v.device)))

    def _meets(self, given: Tensor | None) -> bool:
        """Whether anything but its own segment counts."""
        return given is not None or self.segments.several

    def _grid(self, rows: int) -> tuple[int, int]:
        return self.segments.count * self.H, triton.cdiv(min(self.segments.size, self.T), rows)

    def _places(self, instead: Tensor) -> tuple[Tensor, Tensor]:
        """Which segment is where, `instead` where nothing is packed."""
        table = self.segments.table
        return (instead, instead) if table is None or self.packed is None else (table, self.packed)

    def _numbers(self) -> tuple[int, ...]:
        return self.T, self.H, self.segments.per_sequence, self.segments.size

    def _constants(self, weighted: bool) -> dict[str, Any]:
        wide = self.q.dtype == torch.float16
        # What float16 gives is divided by the number of tokens, which needs exponents that it has not.
        precision = "tf32x3" if self.q.device.type == "cuda" else "ieee"
        return {"WEIGHTED": weighted, "VARLEN": self.packed is not None, "WIDE": wide, "PRECISION": precision}

    def _tiles(self, launch: Launch) -> dict[str, Any]:
        return {
            "V": self.V, "ROWS_V": block(self.V), "ROWS": launch.chunk, "KEYS": launch.columns, "SPLIT": self.is_split,
            **self._constants(self.weight is not None),
        }  # fmt: skip


def _flat(state: Tensor | None, V: int) -> Tensor | None:
    """A state as kernels read it.  Shapes:  state: [N, H, FEATURES, V + 1];  out: [N, H, FEATURES V + OWN], V more aligned"""
    if state is None:
        return None
    rows, own = state[..., :-1].float(), state[..., -1].float()
    rows = F.pad(rows, (0, V - rows.shape[-1])).flatten(2)
    return torch.cat((rows, F.pad(own, (0, OWN - FEATURES))), dim=-1)


def _square(flat: Tensor, V: int) -> Tensor:
    """The reverse of `_flat`, for values of V numbers."""
    rows = flat[..., :-OWN].view(*flat.shape[:2], FEATURES, (flat.shape[2] - OWN) // FEATURES)
    own = flat[..., -OWN : FEATURES - OWN]
    return torch.cat((rows[..., :V], own[..., None]), dim=-1)


def _in_weights(scale: float, like: Tensor) -> Tensor:
    """What a row of a state is multiplied with in a weight.  Shapes:  out: [FEATURES, 1]"""
    parts = ((SIZE * SIZE, 0.5 * scale * scale), (SIZE, scale), (1, 1.0))
    return torch.cat([like.new_full((count, 1), factor) for count, factor in parts])


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    scale: float,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, the state in the end, what outputs were divided by; arguments as those of the registered op."""
    call = Call((q, k, v), weight, scale, cu_seqlens)
    out, last, total = call.forward(_flat(initial, call.V))
    V = v.shape[3]
    return out if call.V == V else out[..., :V].contiguous(), _square(last, V), total


def launch_backward(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    scale: float,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    total: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the initial state."""
    call, V = Call((q, k, v), weight, scale, cu_seqlens), v.shape[3]
    factors = _in_weights(scale, total)
    after = None
    if d_final is not None:
        # A pair of dimensions stands twice in a state, and both are one number.
        pairs = d_final[:, :, : SIZE * SIZE].reshape(*d_final.shape[:2], SIZE, SIZE, -1)
        even = (0.5 * (pairs + pairs.transpose(2, 3))).flatten(2, 3)
        after = _flat(torch.cat((even, d_final[:, :, SIZE * SIZE :]), dim=2) / factors, call.V)
    dq, dk, dv, first = call.backward(d_out, after, _flat(initial, call.V), total)
    dv = dv if call.V == V else dv[..., :V].contiguous()
    return dq, dk, dv, _square(first, V) * factors
