"""Launches the kernels of token_split_attention."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from heddle.kernels._token_split_attention_bwd import (
    _token_split_attention_bwd_key_kernel,
    _token_split_attention_bwd_query_kernel,
)
from heddle.kernels._token_split_attention_fwd import _token_split_attention_fwd_kernel
from heddle.kernels.common.layout import aligned, block, dense, strides
from heddle.kernels.common.tables import table_on
from heddle.kernels.common.tuning import tuned
from heddle.kernels.configs.launch import Launch
from heddle.kernels.configs.token_split_attention import INTERPRETER, Family, Plan, family

# Queries of the smallest tile.
FEW = 16


@functools.cache
def _table(device: torch.device) -> Family:
    return table_on(device, "token_split_attention", INTERPRETER, family)[0]


def plan(device: torch.device, element: int, size: int) -> Plan:
    """The launches for tensors on `device`, elements of so many bytes and the larger head size; overrides come first."""
    table = _table(device).plan(element, block(size))
    names = ("forward", "queries", "near", "far")
    return replace(table, **{name: tuned(name, getattr(table, name)) for name in names})


@dataclass(frozen=True, slots=True)
class Saved:
    """What the forward pass leaves for the backward pass. Shapes:  out, lost: [B, H, T, V];  the others: [B, H, T]"""

    out: Tensor
    lost: Tensor
    most: Tensor
    total: Tensor
    peak: Tensor


class Call:
    """What all launches over the same inputs are told.

    Shapes:  q: [B, H, T, K];  k: [B, N, S, K];  v: [B, N, S, V];  kept_k, kept_v: [B, N, E, *];  since: [B, N, E] int32
             told: [B, N, chunks, G, slots, V + 1] float32;  gate: [B, H, T, V] float32;  start: [B] int32;  written: [B, S]
    """

    def __init__(
        self,
        sides: tuple[Tensor, ...],
        told: tuple[Tensor, Tensor],
        places: tuple[Tensor, Tensor],
        written: Tensor | None,
        numbers: tuple[float, int, int, int],
    ) -> None:
        q, *keys = sides
        # Keys that come in float32 were half precision, and want gradients in float32.
        self.wanted = keys[0].dtype
        self.q, self.k, self.v, self.kept_k, self.kept_v = (aligned(x.to(q.dtype)) for x in (q, *keys))
        self.told, self.gate = dense(told[0]), aligned(told[1])
        self.since, self.start = (dense(x) for x in places)
        self.written = None if written is None else (written > 0.5).contiguous().view(torch.uint8)
        self.scale, self.chunk, keep, self.far = numbers
        # Where none stay nothing is divided by their number, but compilers may try.
        self.keep = max(keep, 1)
        (self.B, self.H, self.T, self.K), (self.N, self.S) = self.q.shape, self.k.shape[1:3]
        self.V, self.E, self.group = self.v.shape[3], self.kept_k.shape[2], self.H // self.N
        self.plan = plan(self.q.device, self.q.element_size(), max(self.K, self.V))

    def constants(self, launch: Launch) -> dict[str, Any]:
        """What all kernels are compiled for."""
        return {
            "K": self.K, "V": self.V, "ROWS_K": block(self.K), "ROWS_V": block(self.V),
            # Tiles of few sizes, so that few are compiled.
            "ROWS": launch.chunk if self.T > FEW else min(launch.chunk, FEW), "KEYS": launch.columns,
            "SEEN": self.written is not None,
            "PRECISION": "tf32x3" if self.q.device.type == "cuda" else "ieee",
        }  # fmt: skip

    @property
    def seen(self) -> Tensor:
        """A byte for each key; anything where all are seen."""
        return self.start if self.written is None else self.written

    def numbers(self, tiles: int) -> tuple[int | float, ...]:
        """What kernels of queries are told."""
        chunks, slots = self.told.shape[2], self.told.shape[4]
        return (
            self.T, self.S, self.E, self.far, slots, chunks, self.chunk, self.keep, tiles, self.N, self.group, self.scale
        )  # fmt: skip

    def tiles(self, rows: int) -> int:
        """Tiles that begin at multiples of `rows`, wherever the first query stands."""
        return -(-(self.T + rows - 1) // rows)

    def empty(self, like: Tensor, size: int, dtype: torch.dtype | None = None) -> Tensor:
        """Room for a tensor of heads, in memory with time before heads, as projections want them."""
        shape = (like.shape[0], like.shape[2], like.shape[1], size)
        return torch.empty(shape, dtype=dtype or like.dtype, device=like.device).transpose(1, 2)

    def forward(self, trains: bool) -> Saved:
        """The output, and what gradients want if there will be any."""
        constants, out = self.constants(self.plan.forward), self.empty(self.q, self.V)
        is_kept = trains and out.element_size() < 4
        lost = self.empty(self.q, self.V) if is_kept else out.new_empty(0)
        rows = self.q.shape[:3] if trains else (0,)
        most, total = (torch.empty(rows, dtype=torch.float32, device=out.device) for _ in range(2))
        peak = torch.empty(rows, dtype=torch.int32, device=out.device)
        place, tiles = lost if is_kept else out, self.tiles(constants["ROWS"])
        _token_split_attention_fwd_kernel[(self.B * self.H, tiles)](
            self.q, self.k, self.v, self.kept_k, self.kept_v, self.since, self.seen, self.start, self.told, self.gate,
            out, place, most, total, peak,
            *strides(self.q, self.k, self.v, self.kept_k, self.kept_v, self.gate, out, place),
            *self.numbers(tiles), KEPT=self.E > 0, TRAINS=trains, LOST=is_kept,
            **constants, **self.plan.forward.options(),
        )  # fmt: skip
        return Saved(out, lost, most, total, peak)

    def backward(self, d_out: Tensor, saved: Saved, is_marked: bool) -> tuple[Tensor, ...]:
        """Gradients of q, k, v, kept_k, kept_v, told and gate, and of a bias of the logits of k and of kept_k."""
        d_out, out = aligned(d_out), aligned(saved.out)
        lost = aligned(saved.lost) if saved.lost.numel() else out
        dq, d_gate = self.empty(self.q, self.K), self.empty(self.gate, self.V)
        # Slots without a query get nothing.
        d_told = torch.zeros_like(self.told)
        delta, d_most = torch.empty_like(saved.most), torch.empty_like(saved.most)
        constants = self.constants(self.plan.queries)
        tiles = self.tiles(constants["ROWS"])
        _token_split_attention_bwd_query_kernel[(self.B * self.H, tiles)](
            self.q, self.k, self.v, self.kept_k, self.kept_v, self.since, self.seen, self.start, self.told, self.gate,
            out, lost, d_out, saved.most, saved.total, saved.peak,
            dq, d_told, d_gate, delta, d_most,
            *strides(self.q, self.k, self.v, self.kept_k, self.kept_v, self.gate, out, lost, d_out, dq, d_gate),
            *self.numbers(tiles), KEPT=self.E > 0, LOST=saved.lost.numel() > 0,
            **constants, **self.plan.queries.options(),
        )  # fmt: skip
        rows = (d_out, saved.most, saved.total, saved.peak, delta, d_most)
        dk, dv, d_written = self._of_keys((self.k, self.v), rows, self.plan.near, self.written is not None)
        d_kept_k, d_kept_v, d_marks = self._of_keys(
            (self.kept_k, self.kept_v), rows, self.plan.far, is_marked, is_kept=True
        )
        return dq, dk, dv, d_kept_k, d_kept_v, d_told, d_gate, d_written, d_marks

    def _of_keys(
        self,
        keys: tuple[Tensor, Tensor],
        rows: tuple[Tensor, ...],
        launch: Launch,
        has_bias: bool,
        *,
        is_kept: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of keys, their values and a bias: 0 for keys that stand at no place."""
        dk, dv = (self.empty(x, x.shape[3], self.wanted).zero_() for x in keys)
        constants, count = self.constants(launch), dk.shape[2]
        d_bias = self.told.new_zeros(dk.shape[:3] if has_bias else (0,))
        tiles = triton.cdiv(count + (0 if is_kept else constants["KEYS"] - 1), constants["KEYS"])
        if count > 0:
            _token_split_attention_bwd_key_kernel[(self.B * self.N, tiles)](
                self.q, *keys, self.since, self.seen, self.start, *rows, dk, dv, d_bias,
                *strides(self.q, *keys, rows[0], dk, dv),
                self.T, self.S, self.E, self.far, self.chunk, self.keep, self.N, self.group, self.scale,
                KEPT=is_kept, BIAS=has_bias, **constants, **launch.options(),
            )  # fmt: skip
        return dk, dv, d_bias


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept_k: Tensor,
    kept_v: Tensor,
    told: Tensor,
    gate: Tensor,
    since: Tensor,
    start: Tensor,
    written: Tensor | None,
    marks: Tensor | None,  # noqa: ARG001
    scale: float,
    chunk: int,
    keep: int,
    far: int,
    trains: bool,
) -> tuple[Tensor, ...]:
    """The output and what the backward pass wants; arguments as those of the registered op."""
    numbers = (scale, chunk, keep, far)
    call = Call((q, k, v, kept_k, kept_v), (told, gate), (since, start), written, numbers)
    saved = call.forward(trains)
    return saved.out, saved.lost, saved.most, saved.total, saved.peak


def launch_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept_k: Tensor,
    kept_v: Tensor,
    told: Tensor,
    gate: Tensor,
    since: Tensor,
    start: Tensor,
    written: Tensor | None,
    marks: Tensor | None,
    scale: float,
    chunk: int,
    keep: int,
    far: int,
    *saved: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of all that has one, empty for what is not there; arguments as those of the registered op."""
    numbers = (scale, chunk, keep, far)
    call = Call((q, k, v, kept_k, kept_v), (told, gate), (since, start), written, numbers)
    *found, d_written, d_marks = call.backward(d_out.to(q.dtype), Saved(*saved), marks is not None)
    d_written = d_written if written is None else d_written.sum(1).to(written.dtype)
    return *found, d_written, d_marks if marks is None else d_marks.to(marks.dtype)
