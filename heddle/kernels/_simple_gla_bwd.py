"""Launches the three backward roles of simple_gla's sweep, and what makes the gradient of the log-decays of them."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
from torch import Tensor

from heddle.kernels._simple_gla_bwd_role import _simple_gla_bwd_role_kernel
from heddle.kernels._simple_gla_fwd import Given, Roles, Sweep, Written, family_of
from heddle.kernels.common.layout import ALIGNMENT, block, dense_state, padded, turned_state
from heddle.kernels.common.replay import empty, replayed, start_kernel
from heddle.kernels.common.segments import Segments
from heddle.kernels.common.tuning import tuned

# Of the 23 bits of a float32 after the point, those that a number of half precision has not.
DROPPED = {torch.bfloat16: 16, torch.float16: 13}


class ApartSweep(Sweep):
    """A backward sweep whose roles are launched one after the other, each compiled on its own."""

    def room(self, roles: list[Roles]) -> tuple[int, int]:
        return self.tiles(roles) * self.H, self.processors * self.table.apart_places

    def start_output(
        self, roles: Roles, segments: Segments, scratch: Tensor, written: Written, given: Given
    ) -> None:
        """Starts the kernel of each role, from the states that the segments start from."""
        for role in range(roles.first, roles.first + roles.count):
            states = scratch[role - roles.first] if segments.several else scratch
            self._start_role(replace(roles, first=role, count=1), segments, states, written, given)
        # With both loops in it each role would spill.
        self.start_all(roles, segments, scratch, written, given, only_strong=True)

    def _start_role(
        self, roles: Roles, segments: Segments, states: Tensor, written: Written, given: Given
    ) -> None:
        role, launch, columns = roles.first, self._launch(self.output), self.columns(roles)
        q, k, v, d_out = self.inputs
        # a, b, c as in the table of `_simple_gla_sweep`, and what the output is multiplied with; role 2 has no use for that.
        operands = ((d_out, v, k, q), (v, d_out, q, k), (k, q, d_out, d_out))[role]
        outside = (given.initial, given.d_final_t, given.d_final)[role]
        end = self.gates if given.d_final_t is None else given.d_final_t
        strides = [stride for x in operands for stride in x.stride()[:3]]
        start_kernel(
            _simple_gla_bwd_role_kernel, (segments.count * self.H * triton.cdiv(roles.V, columns),),
            *operands, self.gates, written.outputs[role], written.final, *written.rows,
            states, self.gates if outside is None else outside, end, *self._packed(segments), *strides,
            self.T, self.H, self.group, self.gates.shape[2],
            segments.count, segments.per_sequence, segments.size, self.scale, self.sequences,
            K=roles.K, V=roles.V, C=self.chunk, ROWS=block(roles.K), COLUMNS=columns, ROLE=role,
            DROPPED=DROPPED.get(q.dtype, 0), AHEAD=self.ahead,
            PRECISE=self.precise, PRECISION=self.precision, VARLEN=self.cu_seqlens is not None, SEGMENTED=segments.several,
            HAS_OUTSIDE=outside is not None, HAS_D_FINAL=given.d_final is not None, **launch.options(),
        )  # fmt: skip


def launch_backward(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay and of the initial state; arguments as those of the registered op."""
    K, V = q.shape[3], v.shape[3]
    if K % ALIGNMENT or V % ALIGNMENT:
        d_out, q, k, v = (padded(x, -1) for x in (d_out, q, k, v))
        after, before = (None if x is None else padded(x, -1, -2) for x in (d_final, initial_state))
        found = launch_backward(d_out, after, q, k, v, log_decay, scale, before, cu_seqlens)
        dq, dk, dv, d_gate, d_initial = found
        cropped = (dq[..., :K], dk[..., :K], dv[..., :V], d_gate, d_initial[..., :K, :V])
        first, second, third, fourth, fifth = (x.contiguous() for x in cropped)
        return first, second, third, fourth, fifth
    B, T, H, _ = q.shape
    heads = v.shape[2]
    given = (d_out, d_final, q, k, v, log_decay, scale, initial_state, cu_seqlens)
    dq, dk, dv, d_gate, d_initial = _sweep_back(*given)
    if heads > H:
        dq, dk = (x.view(B, T, H, heads // H, K).sum(3) for x in (dq, dk))
    return dq, dk, dv, d_gate.to(log_decay.dtype), d_initial


@replayed
def _sweep_back(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `launch_backward`, with gradients of q and k for each value head, and that of log_decay in float32."""
    (B, T, heads, V), K = v.shape, q.shape[3]
    table, _ = family_of(q.device)
    is_apart = table.is_apart(q.element_size(), K, V)
    kind = ApartSweep if tuned("apart", int(is_apart)) else Sweep
    sweep = kind(q, k, v, d_out.to(q.dtype), log_decay=log_decay, scale=scale, cu_seqlens=cu_seqlens)
    dq, dk = (empty((B, T, heads, K), q.dtype, q.device) for _ in range(2))
    dv = empty(v.shape, v.dtype, v.device)
    d_gate = empty((B, T, heads), torch.float32, q.device)
    d_initial = empty((sweep.sequences, heads, K, V), torch.float32, v.device)
    given = Given(turned_state(initial_state), dense_state(d_final), turned_state(d_final))
    sweep.run((dq, dk, dv), d_initial, given, d_gate)
    return dq, dk, dv, d_gate, d_initial
