"""Launches the kernels of rms_norm, and what torch knows of them: an opaque op with gradients, which keeps its inputs alone."""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import torch
import triton
from torch import Tensor

from heddle.kernels._rms_norm_kernels import _rms_norm_bwd_kernel, _rms_norm_fwd_kernel
from heddle.kernels.common.replay import derived, empty, replayed, start_kernel
from heddle.kernels.common.tables import table_on
from heddle.kernels.common.tuning import tuned
from heddle.kernels.configs.launch import Launch
from heddle.kernels.configs.rms_norm import INTERPRETER, Family, family
from heddle.kernels.op import register

_INPUTS = "Tensor x, Tensor? weight, Tensor? gate, bool silu, float eps, bool mean"


@functools.cache
def _family(device: torch.device) -> Family:
    return table_on(device, "rms_norm", INTERPRETER, family)[0]


def plan(device: torch.device) -> Family:
    """The launches on `device`; overrides come first."""
    table = _family(device)
    return Family(tuned("norm_forward", table.forward), tuned("norm_backward", table.backward))


def _dense(x: Tensor) -> Tensor:
    return x.contiguous()


def _as_rows(x: Tensor) -> tuple[Tensor, int, int]:
    """As the kernels read it, and how far apart tokens and their heads are: rows may lie apart, their numbers may not."""
    heads = x.stride(-2) if x.dim() > 1 else x.shape[-1]
    tokens = x.stride(-3) if x.dim() > 2 else x.shape[-2:].numel()
    # Axes before those of tokens and heads must go on from token to token.
    outer = [(x.shape[axis], x.stride(axis)) for axis in range(x.dim() - 2)]
    even = all(before[1] == after[0] * after[1] for before, after in pairwise(outer))
    if x.stride(-1) == 1 and even:
        return x, tokens, heads
    return derived(_dense, x), x.shape[-2:].numel(), x.shape[-1]


def _sizes(x: Tensor, launch: Launch) -> tuple[int, dict[str, int]]:
    """All rows, and what the kernels are compiled for."""
    heads = x.shape[-2] if x.dim() > 1 else 1
    columns = triton.next_power_of_2(x.shape[-1])
    rows = max(1, launch.columns // columns)
    return x.numel() // x.shape[-1], {"H": heads, "D": x.shape[-1], "COLUMNS": columns, "ROWS": rows}


@replayed
def launch_forward(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, silu: bool, eps: float, mean: bool
) -> tuple[Tensor]:
    """The normed rows; arguments as those of the registered op."""
    launch = plan(x.device).forward
    count, sizes = _sizes(x, launch)
    read, *strides = _as_rows(x)
    opened, *more = (read, 0, 0) if gate is None else _as_rows(gate)
    scale = read if weight is None else derived(_dense, weight)
    y = empty(x.shape, x.dtype, x.device)
    start_kernel(
        _rms_norm_fwd_kernel, (-(-count // sizes["ROWS"]),), read, scale, opened, y,
        *strides, *more, count, eps, 1.0 / x.shape[-1] if mean else 1.0,
        **sizes, HAS_WEIGHT=weight is not None, HAS_GATE=gate is not None, SILU=silu, **launch.options(),
    )  # fmt: skip
    return (y,)


@replayed
def launch_backward(
    d_out: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, silu: bool, eps: float, mean: bool
) -> tuple[Tensor, ...]:
    """Gradients of x, and of weight and gate, where there are such; arguments as those of the registered op."""
    launch = plan(x.device).backward
    count, sizes = _sizes(x, launch)
    d_out, (read, *strides) = derived(_dense, d_out), _as_rows(x)
    opened, *more = (read, 0, 0) if gate is None else _as_rows(gate)
    scale = read if weight is None else derived(_dense, weight)
    programs = -(-count // (sizes["ROWS"] * launch.chunk))
    dx, sums = empty(x.shape, x.dtype, x.device), empty((programs, x.shape[-1]), torch.float32, x.device)
    d_gate = dx if gate is None else empty(gate.shape, gate.dtype, x.device)
    start_kernel(
        _rms_norm_bwd_kernel, (programs,), d_out, read, scale, opened, dx, sums, d_gate,
        *strides, *more, count, eps, 1.0 / x.shape[-1] if mean else 1.0,
        **sizes, STEPS=launch.chunk, HAS_WEIGHT=weight is not None, HAS_GATE=gate is not None, SILU=silu, **launch.options(),
    )  # fmt: skip
    return dx, sums if weight is None else derived(_all_sums, sums, weight), d_gate


def _all_sums(sums: Tensor, weight: Tensor) -> Tensor:
    return sums.sum(0).to(weight.dtype)


def _forward(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, silu: bool, eps: float, mean: bool
) -> Tensor:
    return launch_forward(x, weight, gate, silu, eps, mean)[0]


def _forward_fake(x: Tensor, *rest: Any) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, weight, gate, silu, eps, mean = inputs
    ctx.save_for_backward(x, weight, gate)
    ctx.numbers = (silu, eps, mean)


def _gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, gate = ctx.saved_tensors
    dx, d_weight, d_gate = launch_backward(d_out, x, weight, gate, *ctx.numbers)
    return dx, None if weight is None else d_weight, None if gate is None else d_gate, None, None, None


kernels = register(
    "rms_norm_kernels",
    f"({_INPUTS}) -> Tensor",
    _forward,
    fake=_forward_fake,
    setup_context=_keep,
    backward=_gradients,
)
