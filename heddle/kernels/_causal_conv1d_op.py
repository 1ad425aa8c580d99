"""What torch knows of the kernels of causal_conv1d: an opaque op with gradients, for which only the inputs are kept."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from heddle.kernels._causal_conv1d_launch import launch_backward, launch_forward
from heddle.kernels.op import register

_INPUTS = "Tensor x, Tensor weight, Tensor initial_state, bool silu, Tensor? cu_seqlens"


def _forward(
    x: Tensor, weight: Tensor, initial_state: Tensor, silu: bool, cu_seqlens: Tensor | None
) -> Tensor:
    return launch_forward(x, weight, initial_state, silu, cu_seqlens)[0]


def _forward_fake(
    x: Tensor,
    weight: Tensor,  # noqa: ARG001
    initial_state: Tensor,  # noqa: ARG001
    silu: bool,  # noqa: ARG001
    cu_seqlens: Tensor | None,  # noqa: ARG001
) -> Tensor:
    return x.new_empty(x.shape)


def _backward(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor,
    silu: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    return launch_backward(d_out, x, weight, initial_state, silu, cu_seqlens)


def _backward_fake(
    d_out: Tensor,  # noqa: ARG001
    x: Tensor,
    weight: Tensor,
    initial_state: Tensor,
    silu: bool,  # noqa: ARG001
    cu_seqlens: Tensor | None,  # noqa: ARG001
) -> tuple[Tensor, ...]:
    return tuple(one.new_empty(one.shape) for one in (x, weight, initial_state))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    x, weight, initial_state, silu, cu_seqlens = inputs
    ctx.save_for_backward(x, weight, initial_state, cu_seqlens)
    ctx.silu = silu


def _gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, initial_state, cu_seqlens = ctx.saved_tensors
    dx, d_weight, d_state = _backward_kernels(d_out, x, weight, initial_state, ctx.silu, cu_seqlens)
    return dx, d_weight, d_state, None, None


_backward_kernels = register(
    "causal_conv1d_kernels_backward",
    f"(Tensor d_out, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
kernels = register(
    "causal_conv1d_kernels",
    f"({_INPUTS}) -> Tensor",
    _forward,
    fake=_forward_fake,
    setup_context=_keep,
    backward=_gradients,
)
