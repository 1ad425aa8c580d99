"""Launches the sweep of decay_attention, and its forward role.

`Sweep` lays out one launch: how sequences are cut into segments, and what every kernel is told.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from heddle.kernels._decay_attention_sweep import (
    _decay_attention_sweep_carry_kernel,
    _decay_attention_sweep_output_kernel,
    _decay_attention_sweep_state_kernel,
)
from heddle.kernels.common.layout import ALIGNMENT, aligned, block, dense, dense_state, padded, turned_state
from heddle.kernels.common.replay import empty, replayed, start_kernel
from heddle.kernels.common.segments import cut, lay_out
from heddle.kernels.common.tables import table_on
from heddle.kernels.common.tuning import tuned
from heddle.kernels.configs.decay_attention import INTERPRETER, Family, family
from heddle.kernels.configs.launch import Launch

CARRY_BLOCK = 256


@functools.cache
def _device(device: torch.device) -> tuple[Family, int]:
    """Configurations and multiprocessors."""
    return table_on(device, "decay_attention", INTERPRETER, family)


@dataclass(frozen=True, slots=True)
class Roles:
    """The roles of one launch: which, and the sizes of their a and b (K) and of their c (V)."""

    first: int
    count: int
    K: int
    V: int


class Sweep:
    """One forward (`d_out` None) or backward sweep over given tensors; K and V are multiples of ALIGNMENT.

    Shapes:  q, k: [B, T, H, K];  v, d_out: [B, T, H, V], the last axis dense;  states: [N, H, K, V], float32, dense
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor | None, log_decay: Tensor, scale: float
    ) -> None:
        self.inputs = [aligned(x) for x in (q, k, v, q if d_out is None else d_out)]
        self.backward = d_out is not None
        self.log_decay, self.scale = dense(log_decay.to(torch.float32)), scale
        self.B, self.T, self.H, self.K = q.shape
        self.V = v.shape[3]
        self.table, self.processors = _device(q.device)

    def roles(self) -> list[Roles]:
        """What can run in one launch does: all roles if their sizes agree."""
        K, V = self.K, self.V
        if not self.backward:
            return [Roles(0, 1, K, V)]
        if K == V:
            return [Roles(0, 3, K, V)]
        return [Roles(0, 1, V, K), Roles(1, 1, V, K), Roles(2, 1, K, V)]

    def run(
        self,
        outputs: tuple[Tensor, Tensor, Tensor],
        final: Tensor,
        initial: Tensor | None,
        d_final: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> None:
        """Fills the outputs (of the three roles backward, thrice the same forward) and the final state."""
        before = turned_state(initial) if self.backward else dense_state(initial)
        given = {"initial": before, "d_final": dense_state(d_final), "d_final_t": turned_state(d_final)}
        cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int32)
        for roles in self.roles():
            self._run_roles(roles, outputs, final, given, cu_seqlens)

    def _run_roles(
        self,
        roles: Roles,
        outputs: tuple[Tensor, Tensor, Tensor],
        final: Tensor,
        given: dict[str, Tensor | None],
        cu_seqlens: Tensor | None,
    ) -> None:
        output, state = self._launch("output", roles), self._launch("state", roles)
        sequences = final.shape[0]
        tiles = triton.cdiv(roles.V, output.columns)
        size = cut(self.T, sequences, tiles * self.H * roles.count, self._places(), self.table.segment)
        size = tuned("segment", size)
        # The first kernel knows no partial chunks.
        size = triton.cdiv(size, state.chunk) * state.chunk
        segments = lay_out(self.T, sequences, size, cu_seqlens)
        log_decay, scratch = self.log_decay, self.log_decay
        table = segments.table if segments.table is not None else log_decay
        packed = cu_seqlens if cu_seqlens is not None else log_decay
        strides = [stride for x in self.inputs for stride in x.stride()[:3]]
        common = {"BACKWARD": self.backward, "VARLEN": cu_seqlens is not None}
        shapes = {"K": roles.K, "V": roles.V, "ROWS": block(roles.K), "ROLES": roles.count}
        shapes["PRECISION"] = "tf32x3" if log_decay.device.type == "cuda" else "ieee"
        has = {"HAS_INITIAL": given["initial"] is not None, "HAS_D_FINAL": given["d_final"] is not None}
        states = [
            given[name] if given[name] is not None else log_decay
            for name in ("initial", "d_final", "d_final_t")
        ]
        numbers = (self.H, segments.count, segments.per_sequence, size, roles.first)
        if segments.several:
            shape = (roles.count, segments.count, self.H, roles.K, roles.V)
            scratch = empty(shape, torch.float32, log_decay.device)
            grid = (segments.count * self.H * roles.count * triton.cdiv(roles.V, state.columns),)
            start_kernel(
                _decay_attention_sweep_state_kernel, grid,
                *self.inputs, log_decay, scratch, table, packed, *strides, self.T, *numbers, self.scale,
                C=state.chunk, COLUMNS=state.columns, **shapes, **common,
                **state.options(),
            )  # fmt: skip
            blocks = triton.cdiv(roles.K * roles.V, CARRY_BLOCK)
            offsets = segments.offsets if segments.offsets is not None else log_decay
            start_kernel(
                _decay_attention_sweep_carry_kernel, (sequences * self.H, blocks, roles.count),
                scratch, *states, log_decay, offsets, *numbers,
                SIZE=roles.K * roles.V, BLOCK=CARRY_BLOCK, **common, **has, num_warps=4,
            )  # fmt: skip
        grid = (segments.count * self.H * roles.count * tiles,)
        start_kernel(
            _decay_attention_sweep_output_kernel, grid,
            *self.inputs, log_decay, *outputs, final, scratch, *states, table, packed, *strides,
            self.T, *numbers, self.scale,
            C=output.chunk, COLUMNS=output.columns, SEGMENTED=segments.several, **shapes, **common, **has,
            **output.options(),
        )  # fmt: skip

    def _places(self) -> int:
        return self.processors * self.table.resident

    def _launch(self, kernel: str, roles: Roles) -> Launch:
        launch = self.table.launch(kernel, self.inputs[0].element_size(), block(roles.K))
        launch = tuned(kernel, launch)
        return replace(launch, columns=min(launch.columns, block(roles.V)))


@replayed
def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and final state; arguments as those of the registered op."""
    K, V = q.shape[3], v.shape[3]
    if K % ALIGNMENT or V % ALIGNMENT:
        q, k, v = (padded(x, -1) for x in (q, k, v))
        before = None if initial_state is None else padded(initial_state, -1, -2)
        out, final = launch_forward(q, k, v, log_decay, scale, before, cu_seqlens)
        return out[..., :V].contiguous(), final[..., :K, :V].contiguous()
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    out = empty(v.shape, v.dtype, v.device)
    final = empty((sequences, q.shape[2], K, V), torch.float32, v.device)
    Sweep(q, k, v, None, log_decay, scale).run((out, out, out), final, initial_state, None, cu_seqlens)
    return out, final
