"""Launches the kernels of causal_conv1d."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from heddle.kernels._causal_conv1d_bwd import _causal_conv1d_bwd_kernel
from heddle.kernels._causal_conv1d_fwd import _causal_conv1d_fwd_kernel
from heddle.kernels.common.layout import dense
from heddle.kernels.common.replay import derived, empty, replayed, start_kernel
from heddle.kernels.common.segments import lay_out
from heddle.kernels.common.tables import table_on
from heddle.kernels.common.tuning import tuned
from heddle.kernels.configs.causal_conv1d import INTERPRETER, Family, family

# Of a program, at least: it begins with the tokens before its first.
FEWEST_TOKENS = 32


@functools.cache
def _family(device: torch.device) -> Family:
    return table_on(device, "causal_conv1d", INTERPRETER, family)[0]


def plan(device: torch.device) -> Family:
    """The launches on `device`; overrides come first."""
    table = _family(device)
    forward, backward = tuned("conv_forward", table.forward), tuned("conv_backward", table.backward)
    return Family(forward, backward, tuned("conv_tokens", table.tokens), table.programs)


def _loaded(x: Tensor) -> Tensor:
    """As the kernels read it: channels side by side."""
    return x if x.stride(2) == 1 else dense(x)


def _tiles(
    x: Tensor, cu_seqlens: Tensor | None, size: int, early: int
) -> tuple[int, int, tuple[Tensor, Tensor] | None]:
    """Programs along time, those of a sequence, and tables of packed ones; each has `early` tokens before its first."""
    B, T, _ = x.shape
    if cu_seqlens is None:
        each = -(-(T + early) // size)
        return B * each, each, None
    count = len(cu_seqlens) - 1
    spread = cu_seqlens + early * torch.arange(count + 1, device=x.device)
    laid = lay_out(T + early * count, count, size, spread)
    assert laid.table is not None
    return laid.count, laid.per_sequence, (laid.table, cu_seqlens.to(torch.int32))


def _blocks(channels: int, columns: int) -> tuple[int, int]:
    """Channels of a program, and how many programs that makes."""
    size = min(columns, triton.next_power_of_2(channels))
    return size, -(-channels // size)


def _steps(tokens: int, blocks: int, chunk: int, chosen: Family) -> int:
    """How often a program loads tokens."""
    share = tokens * blocks // chosen.programs
    return -(-min(chosen.tokens, max(FEWEST_TOKENS, share)) // chunk)


@replayed
def launch_forward(
    x: Tensor, weight: Tensor, initial_state: Tensor, silu: bool, cu_seqlens: Tensor | None
) -> tuple[Tensor]:
    """The output; arguments as those of the registered op."""
    x, weight, state = _loaded(x), dense(weight), dense(initial_state)
    chosen = plan(x.device)
    launch = chosen.forward
    (B, T, C), (size, blocks) = x.shape, _blocks(x.shape[2], launch.columns)
    steps = _steps(B * T, blocks, launch.chunk, chosen)
    count, each, tables = _tiles(x, cu_seqlens, launch.chunk * steps, 0)
    y = empty((B, T, C), x.dtype, x.device)
    start_kernel(
        _causal_conv1d_fwd_kernel, (count * blocks,), x, weight, state, y, *(tables or (weight, weight)),
        x.stride(0), x.stride(1), C, T, each, steps, W=weight.shape[1], ROWS=launch.chunk, COLUMNS=size,
        SILU=silu, VARLEN=tables is not None, **launch.options(),
    )  # fmt: skip
    return (y,)


@replayed
def launch_backward(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor,
    silu: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of x, weight and the state; arguments as those of the registered op."""
    x, d_out, filters, state = _loaded(x), dense(d_out), dense(weight), dense(initial_state)
    chosen = plan(x.device)
    launch, taps = chosen.backward, weight.shape[1]
    (B, T, C), (size, blocks) = x.shape, _blocks(x.shape[2], launch.columns)
    steps = _steps(B * T, blocks, launch.chunk, chosen)
    count, each, tables = _tiles(x, cu_seqlens, launch.chunk * steps, taps - 1)
    dx = empty((B, T, C), x.dtype, x.device)
    sums = empty((count, taps, C), torch.float32, x.device)
    d_state = empty(state.shape, state.dtype, x.device)
    constants: dict[str, Any] = {
        "W": taps, "ROWS": launch.chunk, "COLUMNS": size, "SILU": silu, "VARLEN": tables is not None,
    }  # fmt: skip
    start_kernel(
        _causal_conv1d_bwd_kernel, (count * blocks,), d_out, x, filters, state, dx, sums, d_state,
        *(tables or (filters, filters)), x.stride(0), x.stride(1), C, T, each, steps, **constants, **launch.options(),
    )  # fmt: skip
    return dx, derived(_all_sums, sums, weight), d_state


def _all_sums(sums: Tensor, weight: Tensor) -> Tensor:
    return sums.sum(0).mT.to(weight.dtype).contiguous()
