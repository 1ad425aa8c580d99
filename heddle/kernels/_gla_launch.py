"""Launches the kernels of gla."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import triton
from torch import Tensor

from heddle.kernels._gla_bwd import _gla_gradient_kernel
from heddle.kernels._gla_fwd import _gla_carry_kernel, _gla_prepare_kernel, _gla_sweep_kernel
from heddle.kernels.common.layout import aligned, block, dense_state, infinite, room, strides, with_room
from heddle.kernels.common.replay import derived, empty, replayed, start_kernel
from heddle.kernels.common.segments import count_segments, cut, lay_out
from heddle.kernels.common.tables import table_on
from heddle.kernels.common.tuning import tuned
from heddle.kernels.configs.gla import INTERPRETER, Family, Plan, family
from heddle.kernels.configs.launch import Launch

CARRY_BLOCK = 1024
# Channels of keys treated at a time where all are independent: with more, registers would not do.
KEY_TILE = 64
# Programs that share a multiprocessor, and tokens of a segment at least.
RESIDENT, LEAST_SEGMENT = 2, 256


@functools.cache
def _device(device: torch.device) -> tuple[Family, int]:
    """Configurations and multiprocessors."""
    return table_on(device, "gla", INTERPRETER, family)


def plan(device: torch.device, element: int, size: int) -> Plan:
    """The launches for tensors on `device`, elements of so many bytes and the larger head size; overrides come first."""
    table = _device(device)[0].plan(element, block(size))
    names = ("prepare", "forward", "summary", "keep", "backward", "gradient")
    return replace(table, **{name: tuned(name, getattr(table, name)) for name in names})


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `_gla_prepare_kernel` makes of queries, keys and decays: the forward pass keeps it for the backward pass.

    Shapes:  seen, left: [B, T, H, K];  scores: [chunks, H, C, C];  ends: [chunks, H, K], in float16 [chunks, H, 2, K]
             reach: [chunks, H]
    """

    seen: Tensor
    left: Tensor
    scores: Tensor
    ends: Tensor
    reach: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.seen, self.left, self.scores, self.ends, self.reach


KEPT = len(fields(Prepared))


def prepared_like(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Memory for what is prepared, with K and V padded."""
    B, T, H, K = q.shape
    K, V = (room(size, q.device) for size in (K, v.shape[3]))
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunk = plan(q.device, q.element_size(), max(K, V)).chunk
    chunks = count_segments(T, sequences, chunk, packed=cu_seqlens is not None)
    seen, left = (empty((B, T, H, K), q.dtype, q.device) for _ in range(2))
    scores = empty((chunks, H, chunk, chunk), q.dtype, q.device)
    sums = (2, K) if q.dtype == torch.float16 else (K,)
    ends, reach = (empty(shape, torch.float32, q.device) for shape in ((chunks, H, *sums), (chunks, H)))
    return seen, left, scores, ends, reach


class _Call:
    """What all launches over the same inputs are told.  K and V have room: see `room`."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None) -> None:
        self.q, self.k, self.v, self.scale = q, k, v, scale
        self.B, self.T, self.H, self.K = q.shape
        self.HV, self.V = v.shape[2:]
        self.plan = plan(q.device, q.element_size(), max(self.K, self.V))
        self.chunk = self.plan.chunk
        self.precise = q.element_size() > 2
        self.sequences = self.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int32)
        self.chunks = lay_out(self.T, self.sequences, self.chunk, self.cu_seqlens)
        self.segments = lay_out(self.T, self.sequences, self._segment_size(), self.cu_seqlens)
        self.constants: dict[str, Any] = {
            "K": self.K, "C": self.chunk, "VARLEN": cu_seqlens is not None,
            "PRECISION": "tf32x3" if q.device.type == "cuda" else "ieee",
        }  # fmt: skip
        self.tile = min(tuned("tile", KEY_TILE), block(self.K))
        self.tiled = {
            **self.constants,
            "ROWS": self.tile,
            "LEVELS": self.chunk.bit_length() - 1,
            "PRECISE": self.precise,
        }
        # Where one product may do for a chunk, and where it does not.
        self.ways = (True,) if q.dtype == torch.float16 else (False, True)
        self.numbers = (self.T, self.H, self.chunks.per_sequence)

    def _segment_size(self) -> int:
        """Tokens in a segment, whole chunks: all of a sequence where programs are many, else fewer."""
        programs = self.HV * triton.cdiv(self.V, min(self.plan.forward.columns, block(self.V)))
        places = _device(self.q.device)[1] * RESIDENT
        size = tuned("segment", cut(self.T, self.sequences, programs, places, LEAST_SEGMENT))
        return int(triton.cdiv(size, self.chunk) * self.chunk)

    def totals(self) -> Tensor:
        """Room for what the threads of a program tell each other."""
        dtype = torch.float64 if self.precise else torch.float32
        return empty(self.q.shape, dtype, self.q.device)

    def prepare(self, log_decay: Tensor) -> Prepared:
        """What sweeps read of the chunks."""
        prepared = Prepared(*prepared_like(self.q, self.v, self.cu_seqlens))
        if False not in self.ways:
            prepared = replace(prepared, reach=derived(infinite, prepared.reach))
        totals = self.totals()
        for halved in self.ways:
            start_kernel(
                _gla_prepare_kernel, (self.chunks.count * self.H,),
                self.q, self.k, log_decay, prepared.seen, prepared.left, totals, prepared.scores,
                prepared.ends, prepared.reach,
                *self._chunk_table(), *strides(self.q, self.k, log_decay), *self.numbers, self.scale,
                HALVED=halved, **self.tiled, **self.plan.prepare.options(),
            )  # fmt: skip
        return prepared

    def sweep(
        self,
        prepared: Prepared,
        values: Tensor,
        given: Tensor | None,
        *,
        backward: bool = False,
        out: bool = True,
        keep: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs, the state at the end (backward, the beginning) of each sequence, and the states between chunks.

        `given` is the state to begin with; without `out` or `keep` these are not made.
        """
        sides = (prepared.seen, prepared.left) if not backward else (prepared.left, prepared.seen)
        device = self.q.device
        final = empty((self.sequences, self.HV, self.K, self.V), torch.float32, device)
        output = empty(self.v.shape if out else (0,), self.v.dtype, device)
        kept = (self.chunks.count, self.HV, self.K, self.V) if keep else (0,)
        states = empty(kept, self.q.dtype, device)
        starts, logs, offsets = self._carried(final)
        segments = self.segments
        table = final if segments.table is None else segments.table
        packed = final if self.cu_seqlens is None else self.cu_seqlens
        chunk_offsets = final if self.chunks.offsets is None else self.chunks.offsets

        def run(launch: Launch, **constants: bool) -> None:
            columns = min(launch.columns, block(self.V))
            start_kernel(
                _gla_sweep_kernel, (segments.count * self.HV * triton.cdiv(self.V, columns),),
                *sides, values, prepared.scores, prepared.ends, final if given is None else given,
                output, final, states, starts, logs, table, chunk_offsets, packed,
                *strides(values), *self.numbers, segments.per_sequence, segments.size, int(given is not None),
                V=self.V, ROWS=block(self.K), COLUMNS=columns, GROUP=self.HV // self.H, BACKWARD=backward,
                **constants, **self.constants,
                **launch.options(),
            )  # fmt: skip

        if segments.several:
            run(self.plan.summary, SEGMENTED=True, OUT=False, KEEP=False)
            grid = (self.sequences * self.HV, triton.cdiv(self.K * self.V, CARRY_BLOCK))
            start_kernel(
                _gla_carry_kernel, grid,
                starts, logs, final if given is None else given, offsets,
                self.HV, segments.per_sequence, int(given is not None),
                K=self.K, V=self.V, BLOCK=CARRY_BLOCK, BACKWARD=backward, VARLEN=self.constants["VARLEN"], num_warps=4,
            )  # fmt: skip
        launch = self.plan.backward if backward else self.plan.forward
        run(launch if out else self.plan.keep, SEGMENTED=segments.several, OUT=out, KEEP=keep)
        return output, final, states

    def _carried(self, final: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Room for what goes from segment to segment, and where those of a sequence begin."""
        segments = self.segments
        if not segments.several:
            return final, final, final
        logs_shape = (segments.count, self.HV, self.K)
        starts = empty((*logs_shape, self.V), torch.float32, final.device)
        logs = empty(logs_shape, torch.float32, final.device)
        return starts, logs, (final if segments.offsets is None else segments.offsets)

    def gradients(
        self,
        prepared: Prepared,
        d_out: Tensor,
        log_decay: Tensor,
        states: tuple[Tensor, Tensor],
        given: tuple[Tensor | None, Tensor | None],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and the log-decays, of the states between chunks and those given at the ends, and their gradients."""
        dq, dk = (empty(x.shape, x.dtype, x.device) for x in (self.q, self.k))
        d_log_decay = empty(dq.shape, torch.float32, dq.device)
        launch = self.plan.gradient
        programs = self.chunks.count * self.H * triton.cdiv(self.K, self.tile)
        totals = self.totals()
        for halved in self.ways:
            start_kernel(
                _gla_gradient_kernel, (programs,),
                self.q, self.k, self.v, d_out, log_decay, totals, *states,
                *(dq if x is None else x for x in given), dq, dk, d_log_decay, prepared.reach,
                *self._chunk_table(), *strides(self.q, self.k, self.v, d_out, log_decay), *self.numbers,
                *(int(x is not None) for x in given), self.scale,
                V=self.V, COLUMNS=min(launch.columns, block(self.V)), GROUP=self.HV // self.H, HALVED=halved,
                **self.tiled, **launch.options(),
            )  # fmt: skip
        return dq, dk, d_log_decay

    def _chunk_table(self) -> tuple[Tensor, Tensor]:
        """Table of the chunks, and `cu_seqlens`; anything where nothing is packed."""
        table, packed = self.chunks.table, self.cu_seqlens
        return (self.q if table is None else table), (self.q if packed is None else packed)


@replayed
def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    """Output, final state, and what the backward pass wants; arguments as those of the registered op."""
    K, V = q.shape[3], v.shape[3]
    found = with_room((q, k, log_decay), (v,), (initial_state,))
    if found is not None:
        (q, k, log_decay), (v,), (before,) = found
        out, final, *kept = launch_forward(q, k, v, log_decay, scale, before, cu_seqlens)
        return out[..., :V].contiguous(), final[..., :K, :V].contiguous(), *kept
    q, k, v, log_decay = (aligned(x) for x in (q, k, v, log_decay))
    call = _Call(q, k, v, scale, cu_seqlens)
    prepared = call.prepare(log_decay)
    out, final, _ = call.sweep(prepared, v, dense_state(initial_state))
    return out, final, *prepared.tensors()


@replayed
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
    *kept: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay and of the initial state; arguments as those of the registered op.

    What was `kept` is made again if it is empty.
    """
    K, V = q.shape[3], v.shape[3]
    found = with_room((q, k, log_decay), (v, d_out), (d_final, initial_state))
    if found is not None:
        (q, k, log_decay), (v, d_out), (after, before) = found
        wide = launch_backward(d_out, after, q, k, v, log_decay, scale, before, cu_seqlens, *kept)
        dq, dk, dv, d_gate, d_initial = wide
        cropped = (dq[..., :K], dk[..., :K], dv[..., :V], d_gate[..., :K], d_initial[..., :K, :V])
        first, second, third, fourth, fifth = (x.contiguous() for x in cropped)
        return first, second, third, fourth, fifth
    d_out, q, k, v, log_decay = (aligned(x) for x in (d_out.to(v.dtype), q, k, v, log_decay))
    call = _Call(q, k, v, scale, cu_seqlens)
    prepared = Prepared(*kept) if kept[0].numel() else call.prepare(log_decay)
    before, after = dense_state(initial_state), dense_state(d_final)
    _, _, states = call.sweep(prepared, v, before, out=False, keep=True)
    dv, d_initial, d_states = call.sweep(prepared, d_out, after, backward=True, keep=True)
    dq, dk, d_gate = call.gradients(prepared, d_out, log_decay, (states, d_states), (before, after))
    return dq, dk, dv, d_gate.to(log_decay.dtype), d_initial
