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
from heddle.kernels._gated_delta_rule_bwd_split import (
    _gated_delta_rule_bwd_gate_kernel,
    _gated_delta_rule_bwd_pair_kernel,
    _gated_delta_rule_bwd_token_kernel,
)
from heddle.kernels._gated_delta_rule_fwd import (
    _gated_delta_rule_carry_kernel,
    _gated_delta_rule_fwd_solve_kernel,
    _gated_delta_rule_fwd_state_kernel,
)
from heddle.kernels.common.layout import (
    ALIGNMENT,
    LEAST_HEAD,
    aligned,
    block,
    dense_state,
    room,
    strides,
    turned_state,
    with_room,
)
from heddle.kernels.common.replay import derived, empty, start_kernel
from heddle.kernels.common.segments import cut, lay_out
from heddle.kernels.common.tables import table_on
from heddle.kernels.common.tuning import tuned
from heddle.kernels.configs.gated_delta_rule import INTERPRETER, Family, Plan, family
from heddle.kernels.configs.launch import Launch

# Columns of the state that a program carries from segment to segment.
CARRY_COLUMNS = 32
# Value heads whose gates a program treats.
GATE_HEADS = 16
# Programs that share a multiprocessor, tokens of a segment at least, and segments of a sequence at least.
RESIDENT, LEAST_SEGMENT, FEWEST_SEGMENTS = 2, 512, 3


@functools.cache
def _family(device: torch.device) -> Family:
    return table_on(device, "gated_delta_rule", INTERPRETER, family)[0]


def plan(device: torch.device, element: int, rows: int, columns: int | None = None) -> Plan:
    """The launches for tensors on `device` with elements of so many bytes, K = `rows` and V = `columns`; overrides come first.

    Without `columns` those of tiles that hold as many tokens for any V, as routes of chunks want it.
    """
    found = _family(device)
    table = found.plan(element, block(rows))
    if columns is not None:
        table = found.of_heads(element, block(rows), block(columns))
    names = ("solve", "forward", "keep", "backward", "gradient")
    pairs = None
    if tuned("split", int(table.pairs is not None)):
        pairs = tuned("pairs", table.gradient if table.pairs is None else table.pairs)
    return replace(
        table,
        **{name: tuned(name, getattr(table, name)) for name in names},
        pairs=pairs,
        tile=tuned("tile", table.tile),
        ahead=bool(tuned("ahead", int(table.ahead))),
    )


@dataclass(frozen=True, slots=True)
class Kept:
    """What the forward pass leaves for the backward pass, with K and V padded; `summary` is empty for one segment a sequence.

    `last` is the state before the last chunk in full, `rest` what rounding takes from its n; neither is written without decays.

    Shapes:  pairs: [chunks, HV, 2, C, C];  gates: [chunks, HV, 3, C];  states: [chunks, HV, V, K];  new: [B, T, HV, V]
             last: [N, HV, V, K];  rest: [N, C, HV, V];  summary: [segments, HV, V + K, K]
    """

    pairs: Tensor
    gates: Tensor
    states: Tensor
    new: Tensor
    last: Tensor
    rest: Tensor
    summary: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.pairs, self.gates, self.states, self.new, self.last, self.rest, self.summary


def plan_of(q: Tensor, v: Tensor, *, routed: bool) -> Plan:
    """The launches for these inputs, with routes or without."""
    return plan(q.device, q.element_size(), q.shape[3], None if routed else v.shape[3])


def _least(launches: Plan) -> int:
    return ALIGNMENT if launches.narrow else LEAST_HEAD


def kept_like(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, *, keep: bool, routed: bool = False) -> Kept:
    """Memory for what is kept; without `keep` none for `states` and `new`."""
    (B, T, _, K), (HV, V) = q.shape, v.shape[2:]
    launches = plan_of(q, v, routed=routed)
    K, V = (room(size, q.device, _least(launches)) for size in (K, V))
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunk = launches.chunk
    size = segment_size(q.device, launches, (T, sequences, HV, V))
    chunks, segments = (
        count(T, sequences, tokens, packed=cu_seqlens is not None) for tokens in (chunk, size)
    )
    # Room for packed sequences is not filled to its end.
    make = empty if cu_seqlens is None else _zeros

    def narrow(*shape: int) -> Tensor:
        return make(shape, q.dtype, q.device)

    def wide(*shape: int) -> Tensor:
        return make(shape, torch.float32, q.device)

    pairs, gates = narrow(chunks, HV, 2, chunk, chunk), wide(chunks, HV, 3, chunk)
    nothing = wide(0)
    summary = wide(segments, HV, V + K, K) if size < T else nothing
    if not keep:
        return Kept(pairs, gates, nothing, nothing, nothing, nothing, summary)
    states, new = narrow(chunks, HV, V, K), narrow(B, T, HV, V)
    last, rest = wide(sequences, HV, V, K), narrow(sequences, chunk, HV, V)
    return Kept(pairs, gates, states, new, last, rest, summary)


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def count(length: int, sequences: int, size: int, *, packed: bool) -> int:
    """How many segments `lay_out` makes room for."""
    return length // size + sequences if packed else sequences * -(-length // size)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def segment_size(device: torch.device, launches: Plan, shape: tuple[int, int, int, int]) -> int:
    """Tokens in a segment, whole chunks: all of a sequence where programs are many, else fewer.

    Segments cost a pass more than they save where they are few.

    Shapes:  shape: (T, sequences, HV, V)
    """
    length, sequences, heads, V = shape
    programs = heads * triton.cdiv(V, min(launches.forward.columns, block(V)))
    size = cut(length, sequences, programs, _processors(device) * RESIDENT, LEAST_SEGMENT)
    size = tuned("segment", size if triton.cdiv(length, size) >= FEWEST_SEGMENTS else length)
    return int(triton.cdiv(size, launches.chunk) * launches.chunk)


class _Layout:
    """What all launches over the same inputs are told.  K and V are multiples of ALIGNMENT."""

    def __init__(
        self, q: Tensor, v: Tensor, cu_seqlens: Tensor | None, *, gated: bool, routed: bool = False
    ) -> None:
        self.B, self.T, self.H, self.K = q.shape
        self.HV, self.V = v.shape[2:]
        self.plan = plan_of(q, v, routed=routed)
        self.chunk = self.plan.chunk
        self.sequences = self.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int32)
        self.chunks = lay_out(self.T, self.sequences, self.chunk, self.cu_seqlens)
        size = segment_size(q.device, self.plan, (self.T, self.sequences, self.HV, self.V))
        self.segments = lay_out(self.T, self.sequences, size, self.cu_seqlens)
        self.constants = {
            "K": self.K, "C": self.chunk, "ROWS": block(self.K), "GROUP": self.HV // self.H,
            "GATED": gated, "VARLEN": cu_seqlens is not None,
            "PRECISION": "tf32x3" if q.device.type == "cuda" else "ieee",
        }  # fmt: skip
        self.numbers = (self.T, self.H, self.chunks.per_sequence)
        self.along = (*self.numbers, self.segments.per_sequence, size)

    def chunk_table(self, otherwise: Tensor) -> tuple[Tensor, Tensor]:
        """Table of the chunks, and `cu_seqlens`; anything where nothing is packed."""
        found = (self.chunks.table, self.cu_seqlens)
        first, second = (otherwise if x is None else x for x in found)
        return first, second

    def segment_table(self, otherwise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Table of the segments, offsets of the chunks, and `cu_seqlens`; anything where nothing is packed."""
        found = (self.segments.table, self.chunks.offsets, self.cu_seqlens)
        first, second, third = (otherwise if x is None else x for x in found)
        return first, second, third

    def carry(self, kept: Kept, added: Tensor, given: Tensor | None, *, backward: bool) -> Tensor:
        """The state each segment starts from; backward, the gradient of the state each ends with."""
        shape = (self.segments.count, self.HV, self.V, self.K)
        starts = empty(shape, torch.float32, added.device)
        offsets = starts if self.segments.offsets is None else self.segments.offsets
        columns = min(CARRY_COLUMNS, block(self.V))
        start_kernel(
            _gated_delta_rule_carry_kernel, (self.sequences * self.HV, triton.cdiv(self.V, columns)),
            kept.summary, added, starts, starts if given is None else given, offsets,
            self.HV, self.segments.per_sequence, int(given is not None),
            K=self.K, V=self.V, ROWS=block(self.K), COLUMNS=columns, BLOCK=ALIGNMENT, BACKWARD=backward,
            VARLEN=self.constants["VARLEN"], PRECISION=self.constants["PRECISION"], num_warps=4, num_stages=1,
        )  # fmt: skip
        return starts

    def tiles(self, launch: Launch) -> dict[str, Any]:
        return {"V": self.V, "COLUMNS": min(launch.columns, block(self.V)), **launch.options()}


def _gates(log_decay: Tensor | None, beta: Tensor) -> tuple[Tensor, Tensor]:
    beta = beta.to(torch.float32).contiguous()
    return (beta if log_decay is None else log_decay.to(torch.float32).contiguous()), beta


def _solve(
    q: Tensor, k: Tensor, log_decay: Tensor | None, beta: Tensor, scale: float, kept: Kept, layout: _Layout
) -> None:
    """T, P and the gates of every chunk."""
    gate, beta = _gates(log_decay, beta)
    table, packed = layout.chunk_table(beta)
    exact = q.device.type == "cuda"
    start_kernel(
        _gated_delta_rule_fwd_solve_kernel, (layout.chunks.count * layout.HV,),
        q, k, gate, beta, kept.pairs, kept.gates, table, packed, *strides(q, k), *layout.numbers, scale,
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
    routes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Kept]:
    """Output, final state, and with `keep` what `launch_backward` wants; arguments as those of the registered op.

    `routes` [chunks of the launch, HV], without `cu_seqlens`, are factors of what each chunk leaves to the next.
    """
    K, V, routed = q.shape[3], v.shape[3], routes is not None
    found = with_room((q, k), (v,), (initial_state,), least=_least(plan_of(q, v, routed=routed)))
    if found is not None:
        (q, k), (v,), (before,) = found
        given = (q, k, v, log_decay, beta, scale, before, cu_seqlens)
        out, final, kept = launch_forward(*given, keep=keep, routes=routes)
        return out[..., :V].contiguous(), final[..., :K, :V].contiguous(), kept
    q, k, v = (aligned(x) for x in (q, k, v))
    layout = _Layout(q, v, cu_seqlens, gated=log_decay is not None, routed=routed)
    kept = kept_like(q, v, cu_seqlens, keep=keep, routed=routed)
    _solve(q, k, log_decay, beta, scale, kept, layout)
    out = empty(v.shape, v.dtype, v.device)
    final = empty((layout.sequences, layout.HV, K, V), torch.float32, v.device)
    walked = _with_routes(kept, routes)
    _run_forward_state(q, k, v, scale, dense_state(initial_state), walked, (out, final), layout)
    return out, final, kept


def _with_routes(kept: Kept, routes: Tensor | None) -> Kept:
    """What kernels that walk over a sequence read: routes are in the factors of what tokens write."""
    return kept if routes is None else replace(kept, gates=derived(_routed_gates, kept.gates, routes))


def _routed_gates(gates: Tensor, routes: Tensor) -> Tensor:
    beta, seen, left = gates.unbind(2)
    return torch.stack((beta, seen, left * routes[..., None]), dim=2)


def _run_forward_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    before: Tensor | None,
    kept: Kept,
    results: tuple[Tensor, Tensor],
    layout: _Layout,
) -> None:
    """Fills the output and the final state, and what is kept of the states."""
    out, final = results
    keep = kept.new.numel() > 0
    several, programs = layout.segments.several, layout.segments.count * layout.HV
    parts = keep and layout.constants["GATED"] and q.dtype != torch.float32
    # One pass over whole sequences has no registers for it.
    ahead = layout.plan.ahead and several

    def run(starts: Tensor, launch: Launch, **constants: bool) -> None:
        options = layout.tiles(launch)
        tiles = triton.cdiv(layout.V, options["COLUMNS"])
        tiles += triton.cdiv(layout.K, options["COLUMNS"]) if constants["SUMMARY"] else 0
        start_kernel(
            _gated_delta_rule_fwd_state_kernel, (programs * tiles,),
            q, k, v, kept.pairs, kept.gates, final if before is None else before, out, final,
            kept.states if keep else out, kept.new if keep else out, kept.last, kept.rest, kept.summary, starts,
            *layout.segment_table(final), *strides(q, k, v), *layout.along, int(before is not None), scale,
            PARTS=parts, AHEAD=ahead and not constants["KEEP"], **constants, **layout.constants, **options,
        )  # fmt: skip

    starts = final
    if several:
        run(final, layout.plan.forward, KEEP=False, SEGMENTED=True, SUMMARY=True)
        starts = layout.carry(kept, kept.summary, before, backward=False)
    launch = layout.plan.keep if keep else layout.plan.forward
    run(starts, launch, KEEP=keep, SEGMENTED=several, SUMMARY=False)


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
    *,
    routes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay (of nothing if there is none), beta, the initial state and the routes (the same)."""
    K, V, routed = q.shape[3], v.shape[3], routes is not None
    found = with_room(
        (q, k), (v, d_out), (d_final, initial_state), least=_least(plan_of(q, v, routed=routed))
    )
    if found is not None:
        (q, k), (v, d_out), (after, before) = found
        given = (q, k, v, log_decay, beta, scale, before, cu_seqlens, kept)
        dq, dk, dv, *gates, d_initial, d_routes = launch_backward(d_out, after, *given, routes=routes)
        dq, dk, dv = (x[..., :size].contiguous() for x, size in ((dq, K), (dk, K), (dv, V)))
        d_log_decay, d_beta = gates
        return dq, dk, dv, d_log_decay, d_beta, d_initial[..., :K, :V].contiguous(), d_routes
    d_out, q, k, v = (aligned(x) for x in (d_out.to(v.dtype), q, k, v))
    layout = _Layout(q, v, cu_seqlens, gated=log_decay is not None, routed=routed)
    walked = _with_routes(kept, routes)
    dx, d_initial, d_states = _run_backward_state(d_out, dense_state(d_final), q, k, scale, walked, layout)
    gate, beta = _gates(log_decay, beta)
    before, after = turned_state(initial_state), turned_state(d_final)
    outer = _Outer(d_out, dx, d_states, d_initial, before, after, routes)
    gradients = _gradients if layout.plan.pairs is None else _split_gradients
    dq, dk, dv, d_gate, d_beta, d_routes = gradients((q, k, v, gate, beta), kept, outer, layout, scale=scale)
    # Results of an op are tensors of their own.
    if log_decay is None:
        d_gate = empty((0,), d_beta.dtype, d_beta.device)
    if routes is None:
        d_routes = empty((0,), d_beta.dtype, d_beta.device)
    return dq, dk, dv, d_gate, d_beta, d_initial, d_routes


@dataclass(frozen=True, slots=True)
class _Outer:
    """What the kernels of gradients read beside the inputs and what was kept: gradients of the output, of x and of the
    states, and where there are such the initial state, the gradient of the final one and routes. `anything` stands for what
    is not.

    Shapes:  d_out, dx: [B, T, HV, V];  d_states: [chunks, HV, V, K];  before, after: [N, HV, V, K];  routes: [chunks, HV]
    """

    d_out: Tensor
    dx: Tensor
    d_states: Tensor
    anything: Tensor
    before: Tensor | None
    after: Tensor | None
    routes: Tensor | None

    def states(self, kept: Kept) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Before and after each chunk, and in full: the first, the last with what is left of n, the gradient of the final one."""
        before, after = (self.anything if x is None else x for x in (self.before, self.after))
        return kept.states, self.d_states, before, kept.last, kept.rest, after

    def known(self) -> tuple[int, int]:
        return int(self.before is not None), int(self.after is not None)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The routes, and memory for their gradient."""
        if self.routes is None:
            return self.anything, self.anything
        return self.routes, empty(self.routes.shape, self.routes.dtype, self.routes.device)


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _gradients(
    inputs: Inputs, kept: Kept, outer: _Outer, layout: _Layout, *, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the log-decays (anything without) and beta, `inputs`, by one kernel, that of v in the place of dx;
    and of the routes (anything without)."""
    q, k, v, gate, beta = inputs
    dq, dk, d_beta = (empty(x.shape, x.dtype, x.device) for x in (q, k, beta))
    d_gate = empty(gate.shape, gate.dtype, gate.device) if layout.constants["GATED"] else d_beta
    routes, d_routes = outer.factors()
    start_kernel(
        _gated_delta_rule_bwd_gradient_kernel, (layout.chunks.count * layout.H,),
        q, k, v, outer.d_out, gate, beta, kept.new, *outer.states(kept), routes, dq, dk, outer.dx, d_gate, d_beta, d_routes,
        *layout.chunk_table(beta), *strides(q, k, v, outer.d_out), *layout.numbers, *outer.known(), scale,
        ROUTED=outer.routes is not None, **layout.constants, **layout.tiles(layout.plan.gradient),
    )  # fmt: skip
    return dq, dk, outer.dx, d_gate, d_beta, d_routes


def _split_gradients(
    inputs: Inputs, kept: Kept, outer: _Outer, layout: _Layout, *, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `_gradients`, by two kernels, and a third one for what they leave of the gates."""
    q, k, v, gate, beta = inputs
    products = empty(kept.pairs.shape, kept.pairs.dtype, q.device)
    dq, dk, dv = (empty(x.shape, x.dtype, x.device) for x in (q, k, outer.dx))
    rows = min(layout.plan.tile, block(layout.K))
    tiles = triton.cdiv(layout.K, rows)
    pair_sums, sums = (empty((*many, *beta.shape), beta.dtype, beta.device) for many in ((2,), (tiles, 3)))
    passed = empty((layout.chunks.count, layout.HV, tiles), beta.dtype, beta.device)
    tables, numbers = layout.chunk_table(beta), (beta.numel(), *layout.numbers)
    routes, d_routes = outer.factors()
    routed = {"ROUTED": outer.routes is not None}
    start_kernel(
        _gated_delta_rule_bwd_pair_kernel, (layout.chunks.count * layout.HV,),
        q, k, v, outer.d_out, gate, beta, outer.dx, kept.new, dv, products, pair_sums, *tables,
        *strides(q, k, v, outer.d_out), *numbers, scale,
        **layout.constants, **layout.tiles(layout.plan.pairs or layout.plan.gradient),
    )  # fmt: skip
    constants = {**routed, **layout.constants, **layout.tiles(layout.plan.gradient), "ROWS": rows}
    start_kernel(
        _gated_delta_rule_bwd_token_kernel, (layout.chunks.count * layout.H * tiles,),
        q, k, outer.d_out, kept.gates, outer.dx, kept.new, products, *outer.states(kept), routes, dq, dk, sums, passed, *tables,
        *strides(q, k, outer.d_out), *numbers, *outer.known(), scale, **constants,
    )  # fmt: skip
    d_beta = empty(beta.shape, beta.dtype, beta.device)
    d_gate = empty(gate.shape, gate.dtype, gate.device) if layout.constants["GATED"] else d_beta
    start_kernel(
        _gated_delta_rule_bwd_gate_kernel, (layout.chunks.count * triton.cdiv(layout.HV, GATE_HEADS),),
        pair_sums, sums, passed, kept.gates, routes, d_gate, d_beta, d_routes, *tables,
        beta.numel(), layout.T, layout.chunks.per_sequence,
        HV=layout.HV, HEADS=GATE_HEADS, TILES=tiles, C=layout.chunk, GATED=layout.constants["GATED"], **routed,
        VARLEN=layout.constants["VARLEN"], num_warps=4, num_stages=1,
    )  # fmt: skip
    return dq, dk, dv, d_gate, d_beta, d_routes


def _run_backward_state(
    d_out: Tensor, after: Tensor | None, q: Tensor, k: Tensor, scale: float, kept: Kept, layout: _Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, the gradient of the initial state, and those of the states after each chunk."""
    dx = empty(d_out.shape, d_out.dtype, d_out.device)
    shape = (layout.sequences, layout.HV, layout.K, layout.V)
    d_initial = empty(shape, torch.float32, q.device)
    d_states = empty(kept.states.shape, kept.states.dtype, q.device)
    options = {**layout.constants, **layout.tiles(layout.plan.backward)}
    several = layout.segments.several
    grid = (layout.segments.count * layout.HV * triton.cdiv(layout.V, options["COLUMNS"]),)

    def run(ends: Tensor, summary: Tensor, **constants: bool) -> None:
        start_kernel(
            _gated_delta_rule_bwd_state_kernel, grid,
            q, k, d_out, kept.pairs, kept.gates, d_initial if after is None else after, dx, d_initial, d_states,
            summary, ends, *layout.segment_table(dx), *strides(q, k, d_out), *layout.along,
            int(after is not None), scale, **constants, **options,
        )  # fmt: skip

    ends = d_initial
    if several:
        summary = empty((layout.segments.count, layout.HV, layout.V, layout.K), torch.float32, q.device)
        run(ends, summary, SEGMENTED=True, SUMMARY=True)
        ends = layout.carry(kept, summary, after, backward=True)
    run(ends, ends, SEGMENTED=several, SUMMARY=False)
    return dx, d_initial, d_states
