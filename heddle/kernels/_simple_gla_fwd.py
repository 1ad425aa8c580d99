"""Launches the sweep of simple_gla, and its forward role.

`Sweep` lays out one call: how sequences are cut into segments, and what every kernel is told.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from heddle.kernels._simple_gla_sweep import (
    _simple_gla_carry_kernel,
    _simple_gla_gate_gradient_kernel,
    _simple_gla_gates_kernel,
    _simple_gla_output_kernel,
    _simple_gla_state_kernel,
)
from heddle.kernels.common.layout import ALIGNMENT, aligned, block, dense_state, padded
from heddle.kernels.common.replay import empty, replayed, start_kernel
from heddle.kernels.common.segments import Segments, cut, lay_out
from heddle.kernels.common.tables import table_on
from heddle.kernels.common.tuning import tuned
from heddle.kernels.configs.launch import Launch
from heddle.kernels.configs.simple_gla import INTERPRETER, TALL, Family, family

CARRY_BLOCK = 1024
# Heads whose log-decays a program sums up side by side.
GATE_HEADS = 16
# Tokens over which the rounding of products of float32 may add up in the gradient of a log-decay.
PRECISE_SEGMENT = 64


@functools.cache
def family_of(device: torch.device) -> tuple[Family, int]:
    """Configurations and multiprocessors."""
    return table_on(device, "simple_gla", INTERPRETER, family)


@dataclass(frozen=True, slots=True)
class Roles:
    """The roles of one launch: which, and the sizes of their a and b (K) and of their c (V)."""

    first: int
    count: int
    K: int
    V: int


@dataclass(frozen=True, slots=True)
class Given:
    """The states that come from outside, as kernels read them: float32, dense; their values stand for absent ones too.

    Backward the initial state is transposed, as role 0 wants it, and the gradient of the final one comes both ways.
    """

    initial: Tensor | None
    d_final: Tensor | None
    d_final_t: Tensor | None

    def tensors(self, instead: Tensor) -> list[Tensor]:
        """All three, `instead` where there is none."""
        return [instead if x is None else x for x in (self.initial, self.d_final, self.d_final_t)]

    def flags(self) -> dict[str, bool]:
        """What kernels are told of them."""
        return {"HAS_INITIAL": self.initial is not None, "HAS_D_FINAL": self.d_final is not None}


@dataclass(frozen=True, slots=True)
class Written:
    """What is filled: the outputs of the roles, the final state, and rows and ends, of which the gradient of gates is made."""

    outputs: tuple[Tensor, Tensor, Tensor]
    final: Tensor
    rows: tuple[Tensor, Tensor]


class Sweep:
    """One forward (`d_out` None) or backward sweep over given tensors; K and V are multiples of ALIGNMENT.

    Shapes:  q, k: [B, T, H, K];  v, d_out: [B, T, HV, V], the last axis dense;  log_decay: [B, T, HV]
             cu_seqlens: [N + 1]
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        d_out: Tensor | None,
        *,
        log_decay: Tensor,
        scale: float,
        cu_seqlens: Tensor | None,
    ) -> None:
        self.inputs = [aligned(x) for x in (q, k, v, q if d_out is None else d_out)]
        self.backward, self.scale = d_out is not None, scale
        self.B, self.T, self.K = q.shape[0], q.shape[1], q.shape[3]
        self.H, self.V = v.shape[2:]
        self.group = self.H // q.shape[2]
        self.table, self.processors = family_of(q.device)
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int32)
        self.sequences = self.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        # The launch of what fills the outputs.
        self.output = "backward" if self.backward else "output"
        self.chunk = self._launch(self.output).chunk
        self.precise = self.inputs[0].element_size() > 2
        self.precision = "tf32x3" if q.device.type == "cuda" else "ieee"
        small = not self.precise and max(self.K, self.V) <= TALL
        self.ahead = bool(tuned("ahead", int(self.table.ahead))) and small
        self.gates = self._sum_up(log_decay)

    def _sum_up(self, log_decay: Tensor) -> Tensor:
        """The log-decays summed within chunks.  Shapes:  [parts, HV, slots, C]"""
        cu_seqlens, sequences = self.cu_seqlens, log_decay
        if cu_seqlens is None:
            slots = self.B * triton.cdiv(self.T, self.chunk)
        else:
            slots = self.T // self.chunk + self.sequences
            # Where the chunks of each sequence begin among all: none is in two of them.
            starts = cu_seqlens // self.chunk + torch.arange(self.sequences + 1, device=cu_seqlens.device)
            slot = torch.arange(slots, device=cu_seqlens.device)
            found = torch.searchsorted(starts, slot, right=True) - 1
            sequences = found.clamp_max(self.sequences - 1).to(torch.int32)
        parts = 2 if self.precise else 1
        gates = empty((parts, self.H, slots, self.chunk), torch.float32, log_decay.device)
        start_kernel(
            _simple_gla_gates_kernel, (slots, triton.cdiv(self.H, GATE_HEADS)),
            log_decay, gates, sequences, log_decay if cu_seqlens is None else cu_seqlens,
            *log_decay.stride(), self.T, self.H, slots,
            C=self.chunk, HEADS=GATE_HEADS, VARLEN=cu_seqlens is not None, PRECISE=self.precise, num_warps=4,
        )  # fmt: skip
        return gates

    def roles(self) -> list[Roles]:
        """What can run in one launch does: all roles if their sizes agree."""
        K, V = self.K, self.V
        if not self.backward:
            return [Roles(0, 1, K, V)]
        if K == V:
            return [Roles(0, 3, K, V)]
        return [Roles(0, 1, V, K), Roles(1, 1, V, K), Roles(2, 1, K, V)]

    def room(self, roles: list[Roles]) -> tuple[int, int]:
        """Programs that run side by side for one segment, and how many are enough for the device."""
        places = self.table.backward_places if self.backward else self.table.forward_places
        return self.tiles(roles) * self.H * sum(each.count for each in roles), self.processors * places

    def tiles(self, roles: list[Roles]) -> int:
        """Programs of one role for one segment and head."""
        return max(-(-each.V // self.columns(each)) for each in roles)

    def run(
        self,
        outputs: tuple[Tensor, Tensor, Tensor],
        final: Tensor,
        given: Given,
        d_gate: Tensor | None = None,
    ) -> None:
        """Fills the outputs (of the three roles backward, thrice the same forward), the final state and d_gate."""
        roles = self.roles()
        # What one role leaves another needs: all launches share their segments.
        size = cut(self.T, self.sequences, *self.room(roles), self.table.segment)
        if self.backward and self.precise:
            size = min(size, PRECISE_SEGMENT)
        size = triton.cdiv(tuned("segment", size), self.chunk) * self.chunk
        segments = lay_out(self.T, self.sequences, size, self.cu_seqlens)
        tiles = triton.cdiv(roles[0].V, self.columns(roles[0]))
        rows, ends = self._rows(tiles)
        written = Written(outputs, final, (rows, ends))
        scratch = []
        for each in roles:
            scratch.append(self._start_states(each, segments, given) if segments.several else self.gates)
            self.start_output(each, segments, scratch[-1], written, given)
        if d_gate is None:
            return
        # The states before each segment that roles 0 and 1 started from.
        states, d_states, _ = (x for each in scratch for x in each) if segments.several else [self.gates] * 3
        table, packed = self._packed(segments)
        start_kernel(
            _simple_gla_gate_gradient_kernel, (segments.count * self.H,),
            rows, ends, states, d_states, d_gate, table, packed,
            self.T, self.H, self.gates.shape[2], self.sequences, segments.per_sequence, size,
            C=self.chunk, TILES=tiles, SIZE=self.K * self.V, SEGMENTED=segments.several,
            VARLEN=self.cu_seqlens is not None, HAS_D_FINAL=given.d_final is not None, num_warps=8,
        )  # fmt: skip

    def _rows(self, tiles: int) -> tuple[Tensor, Tensor]:
        """Room for what the gradient of the log-decays is made of; forward there is none."""
        if not self.backward:
            return self.gates, self.gates
        shapes = ((2, tiles, *self.gates.shape[1:]), (tiles, self.sequences, self.H))
        rows, ends = (empty(shape, torch.float32, self.gates.device) for shape in shapes)
        return rows, ends

    def _packed(self, segments: Segments) -> tuple[Tensor, Tensor]:
        table = self.gates if segments.table is None else segments.table
        return table, self.gates if self.cu_seqlens is None else self.cu_seqlens

    def _start_states(self, roles: Roles, segments: Segments, given: Given) -> Tensor:
        """The states that the segments start from: states[role, segment, head]."""
        state, (table, packed) = self._launch("state"), self._packed(segments)
        columns = min(state.columns, block(roles.V))
        outer = (roles.count, segments.count, self.H)
        scratch = empty((*outer, roles.K, roles.V), torch.float32, self.gates.device)
        logs = empty(outer, torch.float32, self.gates.device)
        start_kernel(
            _simple_gla_state_kernel, (segments.count * self.H * roles.count * triton.cdiv(roles.V, columns),),
            *self.inputs, self.gates, scratch, logs, table, packed, *self._numbers(roles, segments),
            COLUMNS=columns, **self._constants(roles), **state.options(),
        )  # fmt: skip
        offsets = self.gates if segments.offsets is None else segments.offsets
        blocks = triton.cdiv(roles.K * roles.V, CARRY_BLOCK)
        start_kernel(
            _simple_gla_carry_kernel, (self.sequences * self.H, blocks, roles.count),
            scratch, logs, *given.tensors(self.gates), offsets,
            self.H, segments.count, segments.per_sequence, roles.first,
            SIZE=roles.K * roles.V, BLOCK=CARRY_BLOCK,
            BACKWARD=self.backward, VARLEN=self.cu_seqlens is not None, **given.flags(), num_warps=4,
        )  # fmt: skip
        return scratch

    def start_output(
        self, roles: Roles, segments: Segments, scratch: Tensor, written: Written, given: Given
    ) -> None:
        """Starts what fills the outputs, from the states that the segments start from."""
        self.start_all(roles, segments, scratch, written, given)

    def start_all(
        self,
        roles: Roles,
        segments: Segments,
        scratch: Tensor,
        written: Written,
        given: Given,
        *,
        only_strong: bool = False,
    ) -> None:
        """One launch for all roles; with `only_strong` of segments with strong decays alone."""
        output, columns = self._launch(self.output), self.columns(roles)
        tiles = triton.cdiv(roles.V, columns)
        start_kernel(
            _simple_gla_output_kernel, (segments.count * self.H * roles.count * tiles,),
            *self.inputs, self.gates, *written.outputs, written.final, *written.rows, scratch,
            *given.tensors(self.gates), *self._packed(segments), *self._numbers(roles, segments), self.sequences,
            COLUMNS=columns, SEGMENTED=segments.several, ONLY_STRONG=only_strong, AHEAD=self.ahead and not self.backward,
            **self._constants(roles), **given.flags(), **output.options(),
        )  # fmt: skip

    def _numbers(self, roles: Roles, segments: Segments) -> list[Any]:
        """Strides, sizes and the scale, as both kernels that read the inputs take them."""
        strides = [stride for x in self.inputs for stride in x.stride()[:3]]
        sizes = (segments.count, segments.per_sequence, segments.size, roles.first)
        return [*strides, self.T, self.H, self.group, self.gates.shape[2], *sizes, self.scale]

    def _constants(self, roles: Roles) -> dict[str, Any]:
        return {
            "K": roles.K, "V": roles.V, "ROWS": block(roles.K), "ROLES": roles.count, "C": self.chunk,
            "BACKWARD": self.backward, "VARLEN": self.cu_seqlens is not None, "PRECISE": self.precise,
            "PRECISION": self.precision,
        }  # fmt: skip

    def columns(self, roles: Roles) -> int:
        """Columns of the state that a program holds."""
        return min(self._launch(self.output).columns, block(roles.V))

    def _launch(self, kernel: str) -> Launch:
        size = max(block(self.K), block(self.V))
        launch = tuned(kernel, self.table.launch(kernel, self.inputs[0].element_size(), size))
        # The first kernel walks in the chunks of the others.
        return launch if kernel != "state" else replace(launch, chunk=self.chunk)


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
    sweep = Sweep(q, k, v, None, log_decay=log_decay, scale=scale, cu_seqlens=cu_seqlens)
    out = empty(v.shape, v.dtype, v.device)
    final = empty((sweep.sequences, v.shape[2], K, V), torch.float32, v.device)
    sweep.run((out, out, out), final, Given(dense_state(initial_state), None, None))
    return out, final
