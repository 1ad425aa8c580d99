"""Launches the kernels of dynamic_conv, and what torch knows of them: an opaque op with gradients, which keeps its inputs."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor

from heddle.kernels._dynamic_conv_kernels import _dynamic_conv_bwd_kernel, _dynamic_conv_fwd_kernel
from heddle.kernels.common.layout import dense
from heddle.kernels.common.replay import derived, empty, replayed, start_kernel
from heddle.kernels.common.tables import table_on
from heddle.kernels.common.tuning import tuned
from heddle.kernels.configs.dynamic_conv import INTERPRETER, Family, family
from heddle.kernels.configs.launch import Launch
from heddle.kernels.op import register

# Of a warp.
THREADS = 32
_INPUTS = "Tensor x, Tensor weight, Tensor? static, int? width"


@functools.cache
def _family(device: torch.device) -> Family:
    return table_on(device, "dynamic_conv", INTERPRETER, family)[0]


def plan(device: torch.device) -> Family:
    """The launches on `device`; overrides come first."""
    table = _family(device)
    return Family(
        tuned("dynamic_forward", table.forward),
        tuned("dynamic_inputs", table.inputs),
        tuned("dynamic_taps", table.taps),
    )


def _loaded(x: Tensor) -> Tensor:
    """As the kernels read it: channels, or taps, side by side."""
    return x if x.stride(3) == 1 else dense(x)


def sizes(size: int, taps: tuple[int, int], launch: Launch, *, is_grid: bool) -> dict[str, int | bool]:
    """What the kernels are compiled for: the size of heads, tiles of tokens, the sides of both sorts of taps."""
    columns = triton.next_power_of_2(size)
    own, fixed = (math.isqrt(count) if is_grid else count for count in taps)
    # With as many tokens as threads their taps would go through shared memory.
    rows = min(max(1, launch.columns // columns), THREADS * launch.warps // 2)
    return {
        "K": size, "ROWS": rows, "COLUMNS": columns,
        "SIDE": max(own, fixed), "TAPS": own, "STATIC": fixed, "GRID": is_grid,
    }  # fmt: skip


def _turned(static: Tensor) -> Tensor:
    """Taps before heads: channels side by side."""
    return static.permute(2, 0, 1).contiguous()


def _sum(sums: Tensor, static: Tensor) -> Tensor:
    return sums.sum(0).permute(1, 2, 0).to(static.dtype).contiguous()


def _counts(weight: Tensor, static: Tensor | None) -> tuple[int, int]:
    """Taps of tokens, and those that all of them share."""
    return weight.shape[3], 0 if static is None else static.shape[2]


def _convolved(
    read: Tensor, weight: Tensor, static: Tensor | None, width: int | None, *, length: int, backward: bool
) -> Tensor:
    """Outputs, or backward the gradient of x from theirs.  Shapes:  out: [B, length, H, d]"""
    chosen = plan(read.device)
    launch = chosen.inputs if backward else chosen.forward
    (B, S, H, K), read, weight = read.shape, _loaded(read), _loaded(weight)
    constants = sizes(K, _counts(weight, static), launch, is_grid=width is not None)
    tiles = -(-length // int(constants["ROWS"]))
    fixed = weight if static is None else derived(_turned, static)
    y = empty((B, length, H, K), read.dtype, read.device)
    start_kernel(
        _dynamic_conv_fwd_kernel, (B * tiles * H,), read, weight, fixed, y,
        *read.stride()[:3], *weight.stride()[:3], H, length, S, S - length, width or 0, tiles,
        **constants, BACKWARD=backward, **launch.options(),
    )  # fmt: skip
    return y


@replayed
def launch_forward(x: Tensor, weight: Tensor, static: Tensor | None, width: int | None) -> tuple[Tensor]:
    """The output; arguments as those of the registered op."""
    return (_convolved(x, weight, static, width, length=weight.shape[1], backward=False),)


@replayed
def launch_backward(
    d_out: Tensor, x: Tensor, weight: Tensor, static: Tensor | None, width: int | None
) -> tuple[Tensor, ...]:
    """Gradients of x, of weight and of static, where there is one; arguments as those of the registered op."""
    d_out, x = dense(d_out), _loaded(x)
    dx = _convolved(d_out, weight, static, width, length=x.shape[1], backward=True)
    (B, S, H, K), T, launch = x.shape, weight.shape[1], plan(x.device).taps
    constants = sizes(K, _counts(weight, static), launch, is_grid=width is not None)
    # Nothing is gained by more tiles where no sum goes over tokens.
    steps = 1 if static is None else launch.chunk
    tiles = -(-T // (int(constants["ROWS"]) * steps))
    d_weight = empty(weight.shape, weight.dtype, x.device)
    sums = d_weight
    if static is not None:
        sums = empty((B * tiles, static.shape[2], H, K), torch.float32, x.device)
    start_kernel(
        _dynamic_conv_bwd_kernel, (B * tiles * H,), d_out, x, d_weight, sums,
        *x.stride()[:3], H, T, S, S - T, width or 0, tiles, **constants, STEPS=steps, **launch.options(),
    )  # fmt: skip
    if static is None:
        return dx, d_weight, empty((0,), x.dtype, x.device)
    return dx, d_weight, derived(_sum, sums, static)


def _forward(x: Tensor, weight: Tensor, static: Tensor | None, width: int | None) -> Tensor:
    return launch_forward(x, weight, static, width)[0]


def _forward_fake(x: Tensor, weight: Tensor, static: Tensor | None, width: int | None) -> Tensor:  # noqa: ARG001
    return x.new_empty(*weight.shape[:3], x.shape[3])


def _backward(
    d_out: Tensor, x: Tensor, weight: Tensor, static: Tensor | None, width: int | None
) -> tuple[Tensor, ...]:
    return launch_backward(d_out, x, weight, static, width)


def _backward_fake(
    d_out: Tensor,  # noqa: ARG001
    x: Tensor,
    weight: Tensor,
    static: Tensor | None,
    width: int | None,  # noqa: ARG001
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(0) if one is None else one.new_empty(one.shape) for one in (x, weight, static))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *tensors, ctx.width = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, static = ctx.saved_tensors
    dx, d_weight, d_static = _backward_kernels(d_out, x, weight, static, ctx.width)
    return dx, d_weight, None if static is None else d_static, None


# Without a formula of its own: whoever asks for the gradient of a gradient is told so.
_backward_kernels = register(
    "dynamic_conv_kernels_backward",
    f"(Tensor d_out, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
kernels = register(
    "dynamic_conv_kernels",
    f"({_INPUTS}) -> Tensor",
    _forward,
    fake=_forward_fake,
    setup_context=_keep,
    backward=_gradients,
)
