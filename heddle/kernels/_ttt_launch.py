"""Launches the kernels of ttt, which are those of a linear memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from heddle.kernels._ttt_bwd import _ttt_backward_kernel, _ttt_token_kernel
from heddle.kernels._ttt_fwd import AFTER, BEFORE, LINE, _ttt_sweep_kernel
from heddle.kernels.common.layout import aligned, block, dense_state, padded, strides
from heddle.kernels.common.replay import empty, replayed, start_kernel
from heddle.kernels.common.tuning import tuned
from heddle.kernels.configs.launch import Launch
from heddle.kernels.configs.ttt import INTERPRETER, Family, Plan, family

# The most channels of a head.
WIDEST = 256
# Rows of the weights that the gradients of queries and keys take at a time.
ROW_TILE = 64
# Calls of no more tokens are steps.
FEW = 16
_WAYS = {"none": 0, "after": int(AFTER.value), "before": int(BEFORE.value)}


@functools.cache
def _family(device: torch.device) -> Family:
    return INTERPRETER if device.type != "cuda" else family(torch.cuda.get_device_capability(device))


def plan(device: torch.device, element: int, size: int) -> Plan:
    """The launches for tensors on `device`, elements of so many bytes and the head size; overrides come first."""
    table = _family(device).plan(element, block(size))
    names = ("forward", "keep", "backward", "tokens", "step")
    return replace(table, **{name: tuned(name, getattr(table, name)) for name in names})


@dataclass(frozen=True, slots=True)
class Kept:
    """What the sweep forward leaves for the backward pass.

    Shapes:  states: [slots, H, 2, D, D];  errors: [B, T, H, *];  means: [slots, H];  lines: [slots, 3]
    """

    states: Tensor
    errors: Tensor
    means: Tensor
    lines: Tensor


class _Call:
    """What all launches over the same inputs are told.  q, k and v have strides that are multiples of ALIGNMENT."""

    def __init__(
        self,
        sides: tuple[Tensor, Tensor, Tensor],
        scalars: tuple[Tensor, Tensor | None, Tensor],
        rule: tuple[int, str, str],
        given: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> None:
        self.q, self.k, self.v = sides
        self.chunk, loss, normalise = rule
        rates, gates, weight = scalars
        self.rates, self.gates, self.weight = (dense_state(x) for x in (rates, gates, weight))
        self.given, self.cu_seqlens = given, cu_seqlens
        self.B, self.T, self.H, self.width = self.q.shape
        self.D = weight.shape[-1]
        self.sequences = self.B if cu_seqlens is None else cu_seqlens.shape[0] - 1
        self.slots = self.B * self.T // self.chunk + 2 * self.sequences
        self.F = (2 if gates is None else 3) * self.D * self.D + 2
        self.plan = plan(self.q.device, self.q.element_size(), self.D)
        self.narrow = {
            "D": self.D, "MOMENTUM": gates is not None, "L2": loss == "l2",
            "PRECISION": "tf32x3" if self.q.device.type == "cuda" else "ieee",
        }  # fmt: skip
        self.swept = {**self.narrow, "NORMALISE": _WAYS[normalise], "VARLEN": cu_seqlens is not None}

    def room(self, *shape: int) -> Tensor:
        """Memory in float32."""
        return empty(shape, torch.float32, self.q.device)

    def like(self, x: Tensor) -> Tensor:
        """Dense memory for a tensor of heads."""
        return empty(x.shape, x.dtype, x.device)

    def forward(self, *, keep: bool) -> tuple[Tensor, Tensor, Kept]:
        """Output and final state; with `keep` what the backward pass wants, and no output."""
        out, final = self.like(self.v), self.room(self.sequences, self.H, self.F)
        kept = Kept(final, out, final, final)
        if keep:
            kept = Kept(
                self.room(self.slots, self.H, 2, self.D, self.D),
                out,
                self.room(self.slots, self.H),
                empty((self.slots, int(LINE.value)), torch.int32, out.device),
            )
        launch = self.plan.step if self.T <= FEW else self.plan.keep if keep else self.plan.forward
        _, programs, options = self._tiles(launch)
        start_kernel(
            _ttt_sweep_kernel, (programs,),
            self.q, self.k, self.v, self.rates, self.rates if self.gates is None else self.gates, self.weight,
            final if self.given is None else self.given, out, final,
            kept.states, kept.errors, kept.means, kept.lines, self.q if self.cu_seqlens is None else self.cu_seqlens,
            *strides(self.q, self.k, self.v, out), self.T, self.H, self.chunk, self.slots, self.sequences,
            int(self.given is not None),
            **self.swept, KEEP=keep, **options,
        )  # fmt: skip
        return out, final, kept

    def backward(self, d_out: Tensor, d_final: Tensor | None, kept: Kept) -> tuple[Tensor, ...]:
        """Gradients of q, k, v, the gates and the initial state; in parts those of the rates and of the mean of gates at the
        beginning; and those of the norms of the first weights."""
        launch = self.plan.step if self.T <= FEW else self.plan.backward
        parts, programs, options = self._tiles(launch)
        dq, dk, dv = self.like(self.q), self.like(self.k), self.like(self.v)
        d_rates, d_gates = self.room(parts, self.B, self.T, self.H), self.room(self.B, self.T, self.H)
        d_initial, d_before = (
            self.room(self.sequences, self.H, self.F),
            self.room(parts, self.sequences, self.H),
        )
        d_had = self.room(self.sequences, self.H, self.D)
        d_steps = empty((self.slots, self.H, self.D, self.D), self.q.dtype, self.q.device)
        d_means = self.room(parts, self.slots, self.H)
        start_kernel(
            _ttt_backward_kernel, (programs,),
            self.q, self.k, self.v, d_out, self.rates, self.weight, d_initial if self.given is None else self.given,
            d_initial if d_final is None else d_final, kept.states, kept.errors, kept.means,
            dv, d_rates, d_initial, d_before, d_had, d_steps, d_means,
            self.q if self.cu_seqlens is None else self.cu_seqlens,
            *strides(self.q, self.k, self.v, d_out, dv), self.T, self.H, self.chunk, self.slots, self.sequences,
            int(self.given is not None), int(d_final is not None), d_rates.stride(0),
            **self.swept, **options,
        )  # fmt: skip
        launch = self.plan.tokens
        C = self._tokens(launch)
        blocks = triton.cdiv(min(self.chunk, self.T), C)
        columns = min(launch.columns, block(self.D))
        start_kernel(
            _ttt_token_kernel, (self.slots * blocks * self.H * triton.cdiv(self.D, columns),),
            self.v, d_out, self.rates, kept.states, kept.errors, dv, dq, dk, d_gates, d_steps, d_means, kept.lines,
            *strides(self.v, d_out, dv), self.T, self.H, self.chunk, self.slots, blocks,
            C=C, ROWS=min(ROW_TILE, block(self.D)), COLUMNS=columns, PARTS=parts, **self.narrow, **launch.options(),
        )  # fmt: skip
        return dq, dk, dv, d_rates, d_gates, d_initial, d_before, d_had

    def _tokens(self, launch: Launch) -> int:
        """Tokens of a block, which never reaches over the end of a chunk."""
        return min(launch.chunk, block(min(self.chunk, self.T)))

    def _tiles(self, launch: Launch) -> tuple[int, int, dict[str, Any]]:
        """Into how many parts the columns of a head are cut, programs, and what a sweep is told of tiles."""
        columns = min(launch.columns, block(self.D))
        parts = triton.cdiv(self.D, columns)
        tiles = {"C": self._tokens(launch), "ROWS": block(self.D), "COLUMNS": columns}
        return parts, parts * self.H * self.sequences, {**tiles, **launch.options()}


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    momentum: Tensor | None,
    weight: Tensor,
    chunk: int,
    loss: str,
    normalise: str,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and final state; arguments as those of the registered op."""
    size = q.shape[-1]
    q, k, v = (padded(x, 3) for x in (q, k, v))
    given = (rates, momentum, weight, chunk, loss, normalise, initial_state, cu_seqlens)
    out, final = _run_forward(q, k, v, *given)
    return (out if size == out.shape[-1] else out[..., :size].contiguous()), final


@replayed
def _run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    momentum: Tensor | None,
    weight: Tensor,
    chunk: int,
    loss: str,
    normalise: str,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `launch_forward`, with padded heads."""
    sides = (aligned(q), aligned(k), aligned(v))
    rule, given = (chunk, loss, normalise), dense_state(initial_state)
    out, final, _ = _Call(sides, (rates, momentum, weight), rule, given, cu_seqlens).forward(keep=False)
    return out, final


def launch_backward(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    momentum: Tensor | None,
    weight: Tensor,
    chunk: int,
    loss: str,
    normalise: str,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, rates, momentum, weight and the initial state; arguments as those of the registered op."""
    size, SIZE = q.shape[-1], weight.shape[-1] ** 2
    d_out = d_out.to(v.dtype)
    q, k, v, d_out = (padded(x, 3) for x in (q, k, v, d_out))
    given = (rates, momentum, weight, chunk, loss, normalise, initial_state, cu_seqlens)
    dq, dk, dv, d_rates, d_gates, d_initial, d_before, d_had = _run_backward(d_out, d_final, q, k, v, *given)
    if size != q.shape[-1]:
        dq, dk, dv = (x[..., :size].contiguous() for x in (dq, dk, dv))
    # The state holds what the weights have learned, so its gradient is that of the weights, less what it ended with.
    learned = d_initial[..., :SIZE].sum(0)
    learned = learned if d_final is None else learned - d_final[..., :SIZE].sum(0)
    d_weight = learned.view(weight.shape)
    if normalise != "none":
        norms = torch.linalg.vector_norm(weight, dim=-2, keepdim=True)
        share = d_had.sum(0)[:, None, None] / norms.clamp_min(torch.finfo(norms.dtype).tiny)
        d_weight = d_weight + share * weight
    d_initial[..., -2] = d_before.sum(0)
    return dq, dk, dv, d_rates.sum(0)[..., None], d_gates, d_weight, d_initial


@replayed
def _run_backward(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    momentum: Tensor | None,
    weight: Tensor,
    chunk: int,
    loss: str,
    normalise: str,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `launch_backward`, with padded heads and what programs leave in parts."""
    sides = (aligned(q), aligned(k), aligned(v))
    rule, given = (chunk, loss, normalise), dense_state(initial_state)
    call = _Call(sides, (rates, momentum, weight), rule, given, cu_seqlens)
    _, _, kept = call.forward(keep=True)
    dq, dk, dv, d_rates, d_gates, d_initial, d_before, d_had = call.backward(
        aligned(d_out), dense_state(d_final), kept
    )
    return dq, dk, dv, d_rates, d_gates, d_initial, d_before, d_had
