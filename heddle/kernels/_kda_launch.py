"""Launches the kernels of kda."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from heddle.kernels._gated_delta_rule_fwd import _gated_delta_rule_carry_kernel
from heddle.kernels._kda_bwd import _kda_backward_kernel, _kda_gradient_kernel
from heddle.kernels._kda_bwd_split import _kda_far_kernel, _kda_near_kernel, _kda_pair_kernel
from heddle.kernels._kda_fwd import _kda_prepare_kernel, _kda_sweep_kernel
from heddle.kernels.common.layout import (
    ALIGNMENT,
    aligned,
    block,
    dense_state,
    infinite,
    strides,
    turned_state,
    with_room,
)
from heddle.kernels.common.replay import derived, empty, replayed, start_kernel
from heddle.kernels.common.segments import cut, lay_out
from heddle.kernels.common.tables import table_on
from heddle.kernels.common.tuning import tuned
from heddle.kernels.configs.kda import INTERPRETER, Family, Plan, family
from heddle.kernels.configs.launch import Launch

# Channels of keys treated at a time where all are independent: with more, registers would not do.
KEY_TILE = 64
# Warps at least of the kernel of gradients of chunks that fade far.
FAR_WARPS = 8
# Columns of the state that a program carries from segment to segment.
CARRY_COLUMNS = 32
# Programs that share a multiprocessor, tokens of a segment at least, and segments of a sequence at least.
RESIDENT, LEAST_SEGMENT, FEWEST_SEGMENTS = 2, 512, 3


@functools.cache
def _device(device: torch.device) -> tuple[Family, int]:
    """Configurations and multiprocessors."""
    return table_on(device, "kda", INTERPRETER, family)


def plan(device: torch.device, element: int, size: int) -> Plan:
    """The launches for tensors on `device`, elements of so many bytes and the larger head size; overrides come first."""
    table = _device(device)[0].plan(element, block(size))
    names = ("prepare", "forward", "keep", "backward", "gradient")
    pairs = None
    if tuned("split", int(table.pairs is not None)):
        pairs = tuned("pairs", table.gradient if table.pairs is None else table.pairs)
    return replace(table, **{name: tuned(name, getattr(table, name)) for name in names}, pairs=pairs)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `_kda_prepare_kernel` makes of queries, keys and gates; `keys` is empty unless a backward pass follows,
    and `totals` unless two kernels make its gradients.

    Shapes:  seen, read, left, totals: [B, T, HV, K];  pairs: [chunks, HV, 2, C, C];  keys: [chunks, HV, C, C]
             ends: [chunks, HV, K], in float16 [chunks, HV, 2, K];  reach: [chunks, HV];  beta: [B, T, HV]
    """

    seen: Tensor
    read: Tensor
    left: Tensor
    pairs: Tensor
    keys: Tensor
    ends: Tensor
    reach: Tensor
    beta: Tensor
    totals: Tensor


@dataclass(frozen=True, slots=True)
class Swept:
    """What `_kda_sweep_kernel` leaves: an output, or with `keep` what the backward pass wants.

    Shapes:  out, new: [B, T, HV, V];  states: [chunks, HV, V, K];  final: [N, HV, K, V];  summary: [segments, HV, V + K, K]
    """

    out: Tensor
    final: Tensor
    states: Tensor
    new: Tensor
    summary: Tensor


class _Call:
    """What all launches over the same inputs are told.  K and V have room: see `room`."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, cu_seqlens: Tensor | None) -> None:
        self.q, self.k, self.v, self.scale = q, k, v, scale
        self.B, self.T, self.H, self.K = q.shape
        self.HV, self.V = v.shape[2:]
        self.plan = plan(q.device, q.element_size(), max(self.K, self.V))
        self.chunk = self.plan.chunk
        self.precise = q.element_size() > 2
        self.on_gpu = q.device.type == "cuda"
        self.sequences = self.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int32)
        self.chunks = lay_out(self.T, self.sequences, self.chunk, self.cu_seqlens)
        self.segments = lay_out(self.T, self.sequences, self._segment_size(), self.cu_seqlens)
        self.constants: dict[str, Any] = {
            "K": self.K, "C": self.chunk, "VARLEN": cu_seqlens is not None,
            "PRECISION": "tf32x3" if self.on_gpu else "ieee",
        }  # fmt: skip
        self.tile = min(tuned("tile", KEY_TILE), block(self.K))
        self.tiled = {
            **self.constants, "ROWS": self.tile, "LEVELS": self.chunk.bit_length() - 1, "GROUP": self.HV // self.H,
            "PRECISE": self.precise,
        }  # fmt: skip
        # Where one product may do for a chunk, and where it does not.
        self.ways = (True,) if q.dtype == torch.float16 else (False, True)
        self.numbers = (self.T, self.HV, self.chunks.per_sequence)
        self.along = (*self.numbers, self.segments.per_sequence, self.segments.size)
        self.several = self.segments.several

    def _segment_size(self) -> int:
        """Tokens in a segment, whole chunks: all of a sequence where programs are many, else fewer."""
        programs = self.HV * triton.cdiv(self.V, min(self.plan.forward.columns, block(self.V)))
        places = _device(self.q.device)[1] * RESIDENT
        size = cut(self.T, self.sequences, programs, places, LEAST_SEGMENT)
        # Segments cost a pass more than they save where they are few.
        size = tuned("segment", size if triton.cdiv(self.T, size) >= FEWEST_SEGMENTS else self.T)
        return int(triton.cdiv(size, self.chunk) * self.chunk)

    def room(self, *shape: int, wide: bool = False) -> Tensor:
        """Memory, in float32 if `wide`."""
        return empty(shape, torch.float32 if wide else self.q.dtype, self.q.device)

    def totals(self) -> Tensor:
        """Room for what the threads of a program tell each other."""
        dtype = torch.float64 if self.precise else torch.float32
        return empty((self.B, self.T, self.HV, self.K), dtype, self.q.device)

    def prepare(self, log_decay: Tensor, beta: Tensor, *, keep: bool = False) -> Prepared:
        """What sweeps read of the chunks."""
        chunks, C = self.chunks.count, self.chunk
        seen, read, left = (self.room(self.B, self.T, self.HV, self.K) for _ in range(3))
        pairs = self.room(chunks, self.HV, 2, C, C)
        keys = self.room(chunks, self.HV, C, C) if keep else pairs
        sums = (2, self.K) if self.q.dtype == torch.float16 else (self.K,)
        ends, reach = self.room(chunks, self.HV, *sums, wide=True), self.room(chunks, self.HV, wide=True)
        if False not in self.ways:
            reach = derived(infinite, reach)
        totals, betas = self.totals(), beta.to(torch.float32).contiguous()
        prepared = Prepared(seen, read, left, pairs, keys, ends, reach, betas, totals)
        for halved in self.ways:
            start_kernel(
                _kda_prepare_kernel, (chunks * self.HV,),
                self.q, self.k, log_decay, prepared.beta, seen, read, left, totals, pairs, keys, ends, reach,
                *self._chunk_table(), *strides(self.q, self.k, log_decay), *self.numbers, self.scale,
                KEEP=keep, SUMS=keep and self.plan.pairs is not None, HALVED=halved,
                SOLVE=self.plan.inverse if self.on_gpu else "ieee",
                **self.tiled, **self.plan.prepare.options(),
            )  # fmt: skip
        return prepared

    def sweep(self, prepared: Prepared, given: Tensor | None, *, keep: bool = False) -> Swept:
        """Outputs, or with `keep` what the backward pass wants, and the state at the end of each sequence."""
        values = (self.B, self.T, self.HV, self.V)
        final = self.room(self.sequences, self.HV, self.K, self.V, wide=True)
        states = self.room(self.chunks.count, self.HV, self.V, self.K) if keep else final
        summary = final
        if self.several:
            summary = self.room(self.segments.count, self.HV, self.V + self.K, self.K, wide=True)
        results = self.room(*values)
        swept = Swept(results, final, states, results, summary)

        def run(starts: Tensor, launch: Launch, **constants: bool) -> None:
            options = self._tiles(launch)
            tiles = triton.cdiv(self.V, options["COLUMNS"])
            tiles += triton.cdiv(self.K, options["COLUMNS"]) if constants["SUMMARY"] else 0
            start_kernel(
                _kda_sweep_kernel, (self.segments.count * self.HV * tiles,),
                prepared.seen, prepared.read, prepared.left, self.v, prepared.beta, prepared.pairs, prepared.ends,
                final if given is None else given, results, final, states, results, summary, starts,
                *self._segment_table(), *strides(self.v), *self.along, int(given is not None),
                **constants, **self.constants, **options,
            )  # fmt: skip

        starts = final
        if self.several:
            run(final, self.plan.forward, KEEP=False, SEGMENTED=True, SUMMARY=True)
            starts = self.carry(summary, summary, given, backward=False)
        launch = self.plan.keep if keep else self.plan.forward
        run(starts, launch, KEEP=keep, SEGMENTED=self.several, SUMMARY=False)
        return swept

    def sweep_back(
        self, prepared: Prepared, swept: Swept, d_out: Tensor, given: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dx, the gradient of the initial state, and those of the states after each chunk."""
        same = (swept.new, swept.states, swept.final)
        dx, d_states, d_initial = (empty(x.shape, x.dtype, x.device) for x in same)
        options = self._tiles(self.plan.backward)
        programs = self.segments.count * self.HV * triton.cdiv(self.V, options["COLUMNS"])

        def run(starts: Tensor, summary: Tensor, **constants: bool) -> None:
            start_kernel(
                _kda_backward_kernel, (programs,),
                prepared.seen, prepared.read, prepared.left, d_out, prepared.beta, prepared.pairs, prepared.ends,
                d_initial if given is None else given, dx, d_initial, d_states, summary, starts,
                *self._segment_table(), *strides(d_out), *self.along, int(given is not None),
                **constants, **self.constants, **options,
            )  # fmt: skip

        starts = d_initial
        if self.several:
            added = self.room(self.segments.count, self.HV, self.V, self.K, wide=True)
            run(starts, added, SEGMENTED=True, SUMMARY=True)
            starts = self.carry(swept.summary, added, given, backward=True)
        run(starts, starts, SEGMENTED=self.several, SUMMARY=False)
        return dx, d_initial, d_states

    def gradients(
        self,
        prepared: Prepared,
        swept: Swept,
        log_decay: Tensor,
        outer: tuple[Tensor, Tensor, Tensor],
        given: tuple[Tensor | None, Tensor | None],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of q, k, v, the log-decays and beta, from `outer`: those of the output, of x and of the states.

        `given`: the initial state and the gradient of the final one, [N, HV, V, K].
        """
        d_out, dx, d_states = outer
        keys, shared = (self.B, self.T, self.HV, self.K), self.HV != self.H
        # Summed over the value heads that share a key head.
        dq, dk = (self.room(*keys, wide=shared) for _ in range(2))
        dv, d_log_decay = empty(dx.shape, dx.dtype, dx.device), self.room(*keys, wide=True)
        tiles = triton.cdiv(self.K, self.tile)
        d_beta = self.room(tiles, *keys[:3], wide=True)
        launch, totals = self.plan.gradient, self.totals()
        for halved in self.ways:
            start_kernel(
                _kda_gradient_kernel, (self.chunks.count * self.HV * tiles,),
                self.q, self.k, self.v, d_out, log_decay, prepared.beta, totals, dx, swept.new, prepared.keys,
                swept.states, d_states, *(d_log_decay if x is None else x for x in given),
                dq, dk, dv, d_log_decay, d_beta, prepared.reach, *self._chunk_table(),
                *strides(self.q, self.k, self.v, d_out, log_decay), d_beta.stride(0), *self.numbers,
                *(int(x is not None) for x in given), self.scale,
                V=self.V, COLUMNS=min(launch.columns, block(self.V)), HALVED=halved,
                **self.tiled, **launch.options(),
            )  # fmt: skip
        return dq, dk, dv, d_log_decay, d_beta

    def split_gradients(
        self,
        prepared: Prepared,
        swept: Swept,
        pairs: Launch,
        outer: tuple[Tensor, Tensor, Tensor],
        given: tuple[Tensor | None, Tensor | None],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As `gradients`, by two kernels; `pairs`: the launch of the first."""
        d_out, dx, d_states = outer
        keys, shared = (self.B, self.T, self.HV, self.K), self.HV != self.H
        dq, dk = (self.room(*keys, wide=shared) for _ in range(2))
        dv, d_log_decay = empty(dx.shape, dx.dtype, dx.device), self.room(*keys, wide=True)
        tiles = triton.cdiv(self.K, self.tile)
        # The last: what does not come through the state.
        d_beta = self.room(tiles + 1, *keys[:3], wide=True)
        products = self.room(self.chunks.count, self.HV, 2, self.chunk, self.chunk)
        same = self.room(*keys[:3], wide=True)
        start_kernel(
            _kda_pair_kernel, (self.chunks.count * self.HV,),
            self.v, d_out, prepared.beta, dx, swept.new, prepared.keys, dv, products, same, d_beta,
            *self._chunk_table(), *strides(self.v, d_out), d_beta.stride(0), *self.numbers, self.scale,
            V=self.V, COLUMNS=min(pairs.columns, block(self.V)), TILES=tiles, C=self.chunk,
            VARLEN=self.constants["VARLEN"], PRECISION=self.constants["PRECISION"], **pairs.options(),
        )  # fmt: skip
        launch, grid = self.plan.gradient, (self.chunks.count * self.HV * tiles,)
        common = (prepared.beta, prepared.totals, dx, swept.new, products)
        states = (swept.states, d_states, *(d_log_decay if x is None else x for x in given))
        results = (dq, dk, d_log_decay, d_beta, prepared.reach, *self._chunk_table())
        numbers = (d_beta.stride(0), *self.numbers, *(int(x is not None) for x in given), self.scale)
        constants = {"V": self.V, "COLUMNS": min(launch.columns, block(self.V)), **self.tiled}
        if False in self.ways:
            names = ("K", "V", "C", "ROWS", "COLUMNS", "VARLEN", "PRECISE", "PRECISION")
            start_kernel(
                _kda_near_kernel, grid, d_out, prepared.seen, prepared.read, prepared.left, *common, *states, *results,
                *strides(d_out), *numbers, **{name: constants[name] for name in names}, **launch.options(),
            )  # fmt: skip
        # By halves it takes more registers.
        launch = replace(launch, warps=max(launch.warps, FAR_WARPS))
        start_kernel(
            _kda_far_kernel, grid, self.q, self.k, d_out, *common, same, *states, *results,
            *strides(self.q, self.k, d_out), *numbers, **constants, **launch.options(),
        )  # fmt: skip
        return dq, dk, dv, d_log_decay, d_beta

    def carry(self, summary: Tensor, added: Tensor, given: Tensor | None, *, backward: bool) -> Tensor:
        """The state each segment starts from; backward, the gradient of the state each ends with."""
        starts = self.room(self.segments.count, self.HV, self.V, self.K, wide=True)
        offsets = starts if self.segments.offsets is None else self.segments.offsets
        columns = min(CARRY_COLUMNS, block(self.V))
        start_kernel(
            _gated_delta_rule_carry_kernel, (self.sequences * self.HV, triton.cdiv(self.V, columns)),
            summary, added, starts, starts if given is None else given, offsets,
            self.HV, self.segments.per_sequence, int(given is not None),
            K=self.K, V=self.V, ROWS=block(self.K), COLUMNS=columns, BLOCK=ALIGNMENT, BACKWARD=backward,
            VARLEN=self.constants["VARLEN"], PRECISION=self.constants["PRECISION"], num_warps=4, num_stages=1,
        )  # fmt: skip
        return starts

    def _tiles(self, launch: Launch) -> dict[str, Any]:
        columns = min(launch.columns, block(self.V))
        return {"V": self.V, "COLUMNS": columns, "ROWS": block(self.K), **launch.options()}

    def _chunk_table(self) -> tuple[Tensor, Tensor]:
        """Table of the chunks, and `cu_seqlens`; anything where nothing is packed."""
        table, packed = self.chunks.table, self.cu_seqlens
        return (self.q if table is None else table), (self.q if packed is None else packed)

    def _segment_table(self) -> tuple[Tensor, Tensor, Tensor]:
        """Table of the segments, offsets of the chunks, and `cu_seqlens`; anything where nothing is packed."""
        found = (self.segments.table, self.chunks.offsets, self.cu_seqlens)
        first, second, third = (self.q if x is None else x for x in found)
        return first, second, third


@replayed
def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and final state; arguments as those of the registered op."""
    K, V = q.shape[3], v.shape[3]
    found = with_room((q, k, log_decay), (v,), (initial_state,))
    if found is not None:
        (q, k, log_decay), (v,), (before,) = found
        out, final = launch_forward(q, k, v, log_decay, beta, scale, before, cu_seqlens)
        return out[..., :V].contiguous(), final[..., :K, :V].contiguous()
    q, k, v, log_decay = (aligned(x) for x in (q, k, v, log_decay.to(torch.float32)))
    call = _Call(q, k, v, scale, cu_seqlens)
    swept = call.sweep(call.prepare(log_decay, beta), dense_state(initial_state))
    return swept.out, swept.final


def launch_backward(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay, beta and the initial state; arguments as those of the registered op."""
    K, V = q.shape[3], v.shape[3]
    found = with_room((q, k, log_decay), (v, d_out), (d_final, initial_state))
    if found is not None:
        (q, k, log_decay), (v, d_out), (after, before) = found
        wide = launch_backward(d_out, after, q, k, v, log_decay, beta, scale, before, cu_seqlens)
        dq, dk, dv, d_gate, d_beta, d_initial = wide
        cropped = (dq[..., :K], dk[..., :K], dv[..., :V], d_gate[..., :K])
        first, second, third, fourth = (x.contiguous() for x in cropped)
        return first, second, third, fourth, d_beta, d_initial[..., :K, :V].contiguous()
    given = (q, k, v, log_decay, beta, scale, initial_state, cu_seqlens)
    dq, dk, dv, d_gate, d_beta, d_initial = _run_backward(d_out, d_final, *given)
    if v.shape[2] != q.shape[2]:
        apart = (*q.shape[:3], -1, K)
        dq, dk = (x.reshape(apart).sum(3).to(q.dtype) for x in (dq, dk))
    return dq, dk, dv, d_gate, d_beta.sum(0), d_initial


@replayed
def _run_backward(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `launch_backward`, where K and V have room; dq and dk for each value head, d_beta for each tile of keys."""
    d_out, q, k, v = (aligned(x) for x in (d_out.to(v.dtype), q, k, v))
    log_decay = aligned(log_decay.to(torch.float32))
    call = _Call(q, k, v, scale, cu_seqlens)
    prepared = call.prepare(log_decay, beta, keep=True)
    swept = call.sweep(prepared, dense_state(initial_state), keep=True)
    dx, d_initial, d_states = call.sweep_back(prepared, swept, d_out, dense_state(d_final))
    before, after = turned_state(initial_state), turned_state(d_final)
    outer, given = (d_out, dx, d_states), (before, after)
    if call.plan.pairs is None:
        dq, dk, dv, d_gate, d_beta = call.gradients(prepared, swept, log_decay, outer, given)
    else:
        dq, dk, dv, d_gate, d_beta = call.split_gradients(prepared, swept, call.plan.pairs, outer, given)
    return dq, dk, dv, d_gate, d_beta, d_initial
