"""Launches the kernels of rms_norm, and what torch knows of them: an opaque op with gradients, which keeps its inputs alone."""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import torch
import triton
from torch import Tensor

from heddle.kernels._rms_norm_kernels import _rms_norm_bwd_kernel, _rms_norm_fwd_kernel
from heddle.kernels.common.layout import dense
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
    backward = tuned("norm_backward", table.backward)
    few = table.few if backward is table.backward else backward
    return Family(tuned("norm_forward", table.forward), backward, few)


def _as_rows(x: Tensor) -> tuple[Tensor, int, int]:
    """As the kernels read it, and how far apart tokens and their heads are; 0 for heads where all rows are as far apart."""
    heads = x.stride(-2) if x.dim() > 1 else x.shape[-1]
    tokens = x.stride(-3) if x.dim() > 2 else x.shape[-2:].numel()
    # Axes before those of tokens and heads must go on from token to token.
    outer = [(x.shape[axis], x.stride(axis)) for axis in range(x.dim() - 2)]
    even = all(before[1] == after[0] * after[1] for before, after in pairwise(outer))
    if x.stride(-1) != 1 or not even:
        return dense(x), x.shape[-1], 0
    if x.dim() < 2 or x.shape[:-2].numel() == 1 or tokens == x.shape[-2] * heads:
        return x, heads, 0
    if x.shape[-2] == 1:
        return x, tokens, 0
    # A length must not be among what is compiled for: of three axes the last but one is time.
    return (x, tokens, heads) if x.dim() > 3 else (dense(x), x.shape[-1], 0)


def _sides(x: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor, int, list[int]]:
    """x and gate as they are read, heads of a token that their strides tell apart, and the strides of both."""
    read, *strides = _as_rows(x)
    if gate is None:
        return read, read, x.shape[-2] if strides[1] else 1, [*strides, 0, 0]
    opened, *more = _as_rows(gate)
    if not strides[1] and not more[1]:
        return read, opened, 1, [*strides, *more]
    heads = x.shape[-2]
    for one in (strides, more):
        if not one[1]:
            one[:] = [heads * one[0], one[0]]
    return read, opened, heads, [*strides, *more]


def _sizes(x: Tensor, launch: Launch) -> tuple[int, dict[str, int]]:
    """All rows, and what the kernels are compiled for."""
    columns = triton.next_power_of_2(x.shape[-1])
    return x.numel() // x.shape[-1], {
        "D": x.shape[-1],
        "COLUMNS": columns,
        "ROWS": max(1, launch.columns // columns),
    }


@replayed
def launch_forward(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, silu: bool, eps: float, mean: bool
) -> tuple[Tensor]:
    """The normed rows; arguments as those of the registered op."""
    launch = plan(x.device).forward
    count, sizes = _sizes(x, launch)
    read, opened, heads, strides = _sides(x, gate)
    scale = read if weight is None else dense(weight)
    y = empty(x.shape, x.dtype, x.device)
    start_kernel(
        _rms_norm_fwd_kernel, (-(-count // sizes["ROWS"]),), read, scale, opened, y,
        *strides, count, eps, 1.0 / x.shape[-1] if mean else 1.0,
        H=heads, **sizes, HAS_WEIGHT=weight is not None, HAS_GATE=gate is not None, SILU=silu, **launch.options(),
    )  # fmt: skip
    return (y,)


@replayed
def launch_backward(
    d_out: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, silu: bool, eps: float, mean: bool
) -> tuple[Tensor, ...]:
    """Gradients of x, and of weight and gate, where there are such; arguments as those of the registered op."""
    launch = plan(x.device).back(x.numel() // x.shape[-1], x.shape[-1])
    count, sizes = _sizes(x, launch)
    d_out, (read, opened, heads, strides) = dense(d_out), _sides(x, gate)
    scale = read if weight is None else dense(weight)
    programs = -(-count // (sizes["ROWS"] * launch.chunk))
    dx, sums = empty(x.shape, x.dtype, x.device), empty((programs, x.shape[-1]), torch.float32, x.device)
    d_gate = dx if gate is None else empty(gate.shape, gate.dtype, x.device)
    start_kernel(
        _rms_norm_bwd_kernel, (programs,), d_out, read, scale, opened, dx, sums, d_gate,
        *strides, count, eps, 1.0 / x.shape[-1] if mean else 1.0,
        H=heads, **sizes, STEPS=launch.chunk, HAS_WEIGHT=weight is not None, HAS_GATE=gate is not None, SILU=silu,
        **launch.options(),
    )  # fmt: skip
    d_weight = empty((0,), x.dtype, x.device) if weight is None else derived(_all_sums, sums, weight)
    return dx, d_weight, empty((0,), x.dtype, x.device) if gate is None else d_gate


def _all_sums(sums: Tensor, weight: Tensor) -> Tensor:
    return sums.sum(0).to(weight.dtype)


def _forward(
    x: Tensor, weight: Tensor | None, gate: Tensor | None, silu: bool, eps: float, mean: bool
) -> Tensor:
    return launch_forward(x, weight, gate, silu, eps, mean)[0]


def _forward_fake(x: Tensor, *rest: Any) -> Tensor:  # noqa: ARG001
    return x.new_empty(x.shape)


def _backward(
    d_out: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, silu: bool, eps: float, mean: bool
) -> tuple[Tensor, ...]:
    return launch_backward(d_out, x, weight, gate, silu, eps, mean)


def _backward_fake(
    d_out: Tensor,  # noqa: ARG001
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    *rest: Any,  # noqa: ARG001
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if one is None else one.new_empty(one.shape) for one in (x, weight, gate))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, weight, gate, silu, eps, mean = inputs
    ctx.save_for_backward(x, weight, gate)
    ctx.numbers = (silu, eps, mean)


def _gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, gate = ctx.saved_tensors
    dx, d_weight, d_gate = _backward_kernels(d_out, x, weight, gate, *ctx.numbers)
    return dx, None if weight is None else d_weight, None if gate is None else d_gate, None, None, None


# Without a formula of its own: whoever asks for the gradient of a gradient is told so.
_backward_kernels = register(
    "rms_norm_kernels_backward",
    f"(Tensor d_out, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
kernels = register(
    "rms_norm_kernels",
    f"({_INPUTS}) -> Tensor",
    _forward,
    fake=_forward_fake,
    setup_context=_keep,
    backward=_gradients,
)
