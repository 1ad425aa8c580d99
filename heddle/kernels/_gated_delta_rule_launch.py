"""Launches the forward and backward kernels of gated_delta_rule and delta_rule (`log_decay` None)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from heddle.kernels._gated_delta_rule_bwd import (
    _gated_delta_rule_bwd_gradient_kernel,
    _gated_delta_rule_bwd_state_kernel,
)
from heddle.kernels._gated_delta_rule_fwd import (
    _gated_delta_rule_fwd_solve_kernel,
    _gated_delta_rule_fwd_state_kernel,
)
from heddle.kernels.common.layout import ALIGNMENT, aligned, block, dense_state, padded
from heddle.kernels.common.segments import Segments, count_segments, lay_out
from heddle.kernels.common.tuning import tuned
from heddle.kernels.configs.gated_delta_rule import INTERPRETER, Family, Plan, family
from heddle.kernels.configs.launch import Launch


@functools.cache
def _family(device: torch.device) -> Family:
    if device.type != "cuda":
        return INTERPRETER
    seen = torch.cuda.get_device_properties(device)
    return family((seen.major, seen.minor))


def plan(device: torch.device, element: int, rows: int) -> Plan:
    """The launches for tensors on `device` with elements of so many bytes and K = `rows`; overrides come first."""
    table = _family(device).plan(element, block(rows))
    names = ("solve", "forward", "backward", "gradient")
    return replace(table, **{name: tuned(name, getattr(table, name)) for name in names})


@dataclass(frozen=True, slots=True)
class Kept:
    """What the forward pass leaves for the backward pass, with K and V padded.

    Shapes:  pairs: [chunks, HV, 2, C, C];  gates: [chunks, HV, 3, C];  states: [chunks, HV, V, K];  new: [B, T, HV, V]
    """

    pairs: Tensor
    gates: Tensor
    states: Tensor
    new: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.pairs, self.gates, self.states, self.new


def kept_like(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, *, keep: bool) -> Kept:
    """Memory for what is kept; without `keep` none for `states` and `new`."""
    (B, T, _, K), (HV, V) = q.shape, v.shape[2:]
    K, V = K + -K % ALIGNMENT, V + -V % ALIGNMENT
    chunk = plan(q.device, q.element_size(), K).chunk
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    count = count_segments(T, sequences, chunk, packed=cu_seqlens is not None)
    pairs = q.new_empty(count, HV, 2, chunk, chunk)
    gates = q.new_empty(count, HV, 3, chunk, dtype=torch.float32)
    if not keep:
        return Kept(pairs, gates, q.new_empty(0), q.new_empty(0))
    return Kept(pairs, gates, q.new_empty(count, HV, V, K), v.new_empty(B, T, HV, V))


class _Layout:
    """What all launches over the same inputs are told.  K and V are multiples of ALIGNMENT."""

    def __init__(self, q: Tensor, v: Tensor, cu_seqlens: Tensor | None, *, gated: bool) -> None:
        self.B, self.T, self.H, self.K = q.shape
        self.HV, self.V = v.shape[2:]
        self.plan = plan(q.device, q.element_size(), self.K)
        self.chunk = self.plan.chunk
        self.sequences = self.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int32)
        self.chunks: Segments = lay_out(self.T, self.sequences, self.chunk, self.cu_seqlens)
        self.constants = {
            "K": self.K, "C": self.chunk, "ROWS": block(self.K), "GROUP": self.HV // self.H,
            "GATED": gated, "VARLEN": cu_seqlens is not None,
            "PRECISION": "tf32x3" if q.device.type == "cuda" else "ieee",
        }  # fmt: skip
        self.numbers = (self.T, self.H, self.chunks.per_sequence)

    def packed(self, otherwise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Table and offsets of the chunks, and `cu_seqlens`; anything where nothing is packed."""
        found = (self.chunks.table, self.chunks.offsets, self.cu_seqlens)
        first, second, third = (otherwise if x is None else x for x in found)
        return first, second, third

    def tiles(self, launch: Launch) -> dict[str, Any]:
        return {"V": self.V, "COLUMNS": min(launch.columns, block(self.V)), **launch.options()}


def _strides(*tensors: Tensor) -> Sequence[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _padded(tensors: Sequence[Tensor], states: Sequence[Tensor | None]) -> list[Any]:
    """Inputs with zeros after K and V up to a multiple of ALIGNMENT, which change nothing."""
    return [padded(x, -1) for x in tensors] + [None if x is None else padded(x, -1, -2) for x in states]


def _gates(log_decay: Tensor | None, beta: Tensor) -> tuple[Tensor, Tensor]:
    beta = beta.to(torch.float32).contiguous()
    return (beta if log_decay is None else log_decay.to(torch.float32).contiguous()), beta


def _solve(
    q: Tensor, k: Tensor, log_decay: Tensor | None, beta: Tensor, scale: float, kept: Kept, layout: _Layout
) -> None:
    """T, P and the gates of every chunk."""
    gate, beta = _gates(log_decay, beta)
    table, _, packed = layout.packed(beta)
    exact = q.device.type == "cuda"
    _gated_delta_rule_fwd_solve_kernel[(layout.chunks.count * layout.H,)](
        q, k, gate, beta, kept.pairs, kept.gates, table, packed, *_strides(q, k), *layout.numbers, scale,
        LEVELS=layout.chunk.bit_length() - 1, SOLVE=layout.plan.inverse if exact else "ieee",
        **layout.constants, **layout.plan.solve.options(),
    )  # fmt: skip


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor, Kept]:
    """Output, final state, and with `keep` what `launch_backward` wants; arguments as those of the registered op."""
    K, V = q.shape[3], v.shape[3]
    if K % ALIGNMENT or V % ALIGNMENT:
        q, k, v, before = _padded((q, k, v), (initial_state,))
        out, final, kept = launch_forward(q, k, v, log_decay, beta, scale, before, cu_seqlens, keep=keep)
        return out[..., :V].contiguous(), final[..., :K, :V].contiguous(), kept
    q, k, v = (aligned(x) for x in (q, k, v))
    layout = _Layout(q, v, cu_seqlens, gated=log_decay is not None)
    kept = kept_like(q, v, cu_seqlens, keep=keep)
    _solve(q, k, log_decay, beta, scale, kept, layout)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final = torch.empty(layout.sequences, layout.HV, K, V, dtype=torch.float32, device=v.device)
    before = dense_state(initial_state)
    _, offsets, packed = layout.packed(final)
    launch = layout.plan.forward
    programs = layout.sequences * layout.HV * triton.cdiv(V, min(launch.columns, block(V)))
    _gated_delta_rule_fwd_state_kernel[(programs,)](
        q, k, v, kept.pairs, kept.gates, final if before is None else before, out, final,
        kept.states if keep else out, kept.new if keep else out, offsets, packed,
        *_strides(q, k, v), *layout.numbers, int(before is not None), scale,
        KEEP=keep, **layout.constants, **layout.tiles(launch),
    )  # fmt: skip
    return out, final, kept


def launch_backward(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    kept: Kept,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay (of nothing if there is none), beta and the initial state."""
    K, V = q.shape[3], v.shape[3]
    if K % ALIGNMENT or V % ALIGNMENT:
        d_out, q, k, v, after, before = _padded((d_out, q, k, v), (d_final, initial_state))
        found = launch_backward(d_out, after, q, k, v, log_decay, beta, scale, before, cu_seqlens, kept)
        dq, dk, dv = (x[..., :size].contiguous() for x, size in zip(found[:3], (K, K, V), strict=True))
        return dq, dk, dv, found[3], found[4], found[5][..., :K, :V].contiguous()
    d_out, q, k, v = (aligned(x) for x in (d_out.to(v.dtype), q, k, v))
    layout = _Layout(q, v, cu_seqlens, gated=log_decay is not None)
    before, after = dense_state(initial_state), dense_state(d_final)
    dv, d_initial, d_states = _run_backward_state(d_out, after, q, k, scale, kept, layout)
    gate, beta = _gates(log_decay, beta)
    d_beta = torch.empty_like(beta)
    d_gate = d_beta if log_decay is None else torch.empty_like(gate)
    dq, dk = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    table, _, packed = layout.packed(beta)
    _gated_delta_rule_bwd_gradient_kernel[(layout.chunks.count * layout.H,)](
        q, k, v, d_out, gate, beta, kept.new, kept.states, d_states,
        d_initial if before is None else before, d_initial if after is None else after,
        dq, dk, dv, d_gate, d_beta, table, packed,
        *_strides(q, k, v, d_out), *layout.numbers, int(before is not None), int(after is not None), scale,
        **layout.constants, **layout.tiles(layout.plan.gradient),
    )  # fmt: skip
    return dq, dk, dv, (d_beta.new_empty(0) if log_decay is None else d_gate), d_beta, d_initial


def _run_backward_state(
    d_out: Tensor, after: Tensor | None, q: Tensor, k: Tensor, scale: float, kept: Kept, layout: _Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, the gradient of the initial state, and those of the states after each chunk."""
    dx = torch.empty(d_out.shape, dtype=d_out.dtype, device=d_out.device)
    shape = (layout.sequences, layout.HV, layout.K, layout.V)
    d_initial = torch.empty(shape, dtype=torch.float32, device=q.device)
    d_states = torch.empty_like(kept.states)
    _, offsets, packed = layout.packed(dx)
    launch = layout.plan.backward
    programs = layout.sequences * layout.HV * triton.cdiv(layout.V, min(launch.columns, block(layout.V)))
    _gated_delta_rule_bwd_state_kernel[(programs,)](
        q, k, d_out, kept.pairs, kept.gates, d_initial if after is None else after, dx, d_initial, d_states,
        offsets, packed, *_strides(q, k, d_out), *layout.numbers, int(after is not None), scale,
        **layout.constants, **layout.tiles(launch),
    )  # fmt: skip
    return dx, d_initial, d_states
