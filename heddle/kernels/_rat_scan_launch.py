"""Launches the kernels of rat_scan."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from heddle.kernels._rat_scan_bwd import _rat_scan_bwd_kernel
from heddle.kernels._rat_scan_fwd import _rat_scan_fwd_kernel
from heddle.kernels.common.layout import strides
from heddle.kernels.common.segments import lay_out
from heddle.kernels.common.tables import table_on
from heddle.kernels.common.tuning import tuned
from heddle.kernels.configs.launch import Launch
from heddle.kernels.configs.rat_scan import INTERPRETER, PART, Family, family

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@functools.cache
def _family(device: torch.device) -> Family:
    return table_on(device, "rat_scan", INTERPRETER, family)[0]


def plan(device: torch.device) -> Family:
    """The launches on `device`; overrides come first."""
    table = _family(device)
    return Family(tuned("scan_forward", table.forward), tuned("scan_backward", table.backward))


def _loaded(x: Tensor) -> Tensor:
    """As the kernels read it: channels side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def parts(chunk: int, length: int) -> int:
    """Places for the states before the parts of chunks, one for PART tokens."""
    return -(-length // PART) if chunk > PART else 0


class Call:
    """What both launches over the same inputs are told.

    Shapes:  k: [B, T, G, d];  x, gate: [B, T, H, d];  gate_bias: [H, d];  cos, sin: [chunks, R];  past: [B, 2, H, d]
    """

    def __init__(
        self,
        sides: tuple[Tensor, Tensor, Tensor],
        gate_bias: Tensor,
        rotation: tuple[Tensor | None, Tensor | None],
        past: Tensor | None,
        *,
        cu_seqlens: Tensor | None,
        chunk: int,
        start: int,
    ) -> None:
        self.k, self.x, self.gate = (_loaded(side) for side in sides)
        (self.B, self.T, self.H, self.D), self.G = self.x.shape, self.k.shape[2]
        self.bias, self.cu_seqlens = gate_bias.float().contiguous(), cu_seqlens
        cos, sin = rotation
        self.turned = 0 if cos is None else cos.shape[1]
        self.rotation = [self.bias if side is None else side.float().contiguous() for side in (cos, sin)]
        # No place is beyond this, and products with it stay in 32 bits.
        self.chunk = min(chunk, start + self.T + 1)
        self.off, self.parts = start % self.chunk, parts(chunk, self.T)
        self.past = None if past is None or self.off == 0 else past.float().contiguous()
        self.plan = plan(self.x.device)
        packed = cu_seqlens is not None
        self.sums = -(-self.T // self.chunk) if packed else (self.off + self.T) // self.chunk
        self.count = self.B if cu_seqlens is None else len(cu_seqlens) - 1

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.x.dtype, device=self.x.device)

    def tiles(self, launch: Launch) -> tuple[int, list[Tensor], list[int], dict[str, Any]]:
        """Programs along time, tables of packed sequences, numbers of the call, and what kernels are compiled for."""
        slots, rows = -(-(self.off + self.T) // self.chunk), triton.next_power_of_2(self.D)
        chunks = min(max(1, launch.columns // rows), triton.next_power_of_2(slots))
        inner = min(PART, triton.next_power_of_2(self.chunk))
        within = self.off + self.T <= self.chunk
        places = (self.off, self.off + self.T) if within else (0, self.chunk)
        if self.cu_seqlens is None:
            tables, each = [self.bias, self.bias], -(-slots // chunks)
            count = self.B * each
        else:
            laid = lay_out(self.T, self.count, chunks * self.chunk, self.cu_seqlens)
            assert laid.table is not None
            tables, each, count = [laid.table, self.cu_seqlens.to(torch.int32)], laid.per_sequence, laid.count
        numbers = [self.T, self.sums, each, self.chunk, self.off, *places]
        constants = {
            "H": self.H, "G": self.G, "D": self.D, "ROWS": rows, "TURNED": self.turned, "CHUNKS": chunks, "INNER": inner,
            "KEEP": self.parts > 0, "HAS_PAST": self.past is not None, "VARLEN": self.cu_seqlens is not None,
        }  # fmt: skip
        return count, tables, numbers, constants

    def forward(self, q: Tensor) -> tuple[Tensor, ...]:
        """Turned q, keys and values, summaries of both, last states, and what the backward pass wants."""
        q, launch = _loaded(q), self.plan.forward
        count, tables, numbers, constants = self.tiles(launch)
        B, T, H, D = self.x.shape
        turned, key, value = self.empty(B, T, self.G, D), self.empty(B, T, H, D), self.empty(B, T, H, D)
        keys, values = (self.empty(B, H, self.sums, D) for _ in range(2))
        running = self.empty(self.count, 2, H, D, dtype=torch.float32)
        if self.cu_seqlens is not None:
            # Rows between sequences, and the states of empty ones, are written by nobody.
            for room in (keys, values, running):
                room.zero_()
        inner = self.empty(B, self.parts, 2, H, D, dtype=torch.float32)
        past = self.bias if self.past is None else self.past
        _rat_scan_fwd_kernel[(count, H + self.G)](
            q, self.k, self.x, self.gate, self.bias, *self.rotation, past,
            turned, key, value, keys, values, running, inner, *tables,
            *strides(q, self.k, self.x, self.gate), *numbers, **constants, **launch.options(),
        )  # fmt: skip
        return turned, key, value, keys, values, running, inner

    def backward(self, gradients: tuple[Tensor, ...], inner: Tensor) -> Gradients:
        """Gradients of q, k, x, gate, gate_bias and past."""
        launch = self.plan.backward
        count, tables, numbers, constants = self.tiles(launch)
        B, T, H, D = self.x.shape
        d_turned, d_key, d_value, d_keys, d_values = (x.to(self.x.dtype).contiguous() for x in gradients[:5])
        dq, dk = self.empty(B, T, self.G, D), self.empty(B, T, H, D)
        dx, d_gate = self.empty(B, T, H, D), self.empty(B, T, H, D)
        d_bias = self.empty(count, H, D, dtype=torch.float32)
        past = self.bias if self.past is None else self.past
        d_past = torch.zeros_like(past)
        _rat_scan_bwd_kernel[(count, H + self.G)](
            self.k, self.x, self.gate, self.bias, *self.rotation, past, inner,
            d_turned, d_key, d_value, d_keys, d_values, gradients[5].float().contiguous(),
            dq, dk, dx, d_gate, d_bias, d_past, *tables,
            *strides(self.k, self.x, self.gate), *numbers, **constants, **launch.options(),
        )  # fmt: skip
        # Head h reads group h mod G.
        dk = dk.view(B, T, H // self.G, self.G, D).sum(2)
        return dq, dk, dx, d_gate, d_bias.sum(0), d_past


def launch_forward(
    q: Tensor,
    k: Tensor,
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk: int,
    start: int,
) -> tuple[Tensor, ...]:
    """Results of the op, and what its backward pass wants; arguments as those of the registered op."""
    call = Call((k, x, gate), gate_bias, (cos, sin), past, cu_seqlens=cu_seqlens, chunk=chunk, start=start)
    return call.forward(q)


def launch_backward(
    d_turned: Tensor,
    d_key: Tensor,
    d_value: Tensor,
    d_keys: Tensor,
    d_values: Tensor,
    d_running: Tensor,
    k: Tensor,
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    past: Tensor | None,
    cu_seqlens: Tensor | None,
    inner: Tensor,
    chunk: int,
    start: int,
) -> Gradients:
    """Gradients of q, k, x, gate, gate_bias and past; arguments as those of the registered op."""
    call = Call((k, x, gate), gate_bias, (cos, sin), past, cu_seqlens=cu_seqlens, chunk=chunk, start=start)
    found = call.backward((d_turned, d_key, d_value, d_keys, d_values, d_running), inner)
    # A state that nothing went on from has no gradient.
    return found if call.past is not None or past is None else (*found[:5], torch.zeros_like(past))
