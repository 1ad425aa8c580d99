"""What torch knows of the kernels of rat_attention: an opaque op with gradients, which keeps the log-sum-exp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heddle.kernels._rat_attention_launch import launch_backward, launch_forward
from heddle.kernels.op import register

_INPUTS = (
    "Tensor q, Tensor key, Tensor value, Tensor keys, Tensor values, "
    "Tensor? cu_seqlens, float scale, SymInt chunk, SymInt start"
)


def _like(q: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    B, T, H, d = key.shape
    return key.new_empty((B, T, H, d)), q.new_empty((B, H, T), dtype=torch.float32)


def _gradients_like(d_out: Tensor, *sides: Any) -> tuple[Tensor, ...]:  # noqa: ARG001
    return tuple(side.new_empty(side.shape) for side in sides[:5])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale, chunk, start = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.numbers = (scale, chunk, start)


def _gradients(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG001
    *tensors, out, lse = ctx.saved_tensors
    found = _backward_kernels(d_out, *tensors, *ctx.numbers, out, lse)
    return (*found, None, None, None, None)


_backward_kernels = register(
    "rat_attention_kernels_backward",
    f"(Tensor d_out, {_INPUTS}, Tensor out, Tensor lse) -> ({', '.join(['Tensor'] * 5)})",
    launch_backward,
    fake=_gradients_like,
)
kernels = register(
    "rat_attention_kernels",
    f"({_INPUTS}) -> (Tensor, Tensor)",
    launch_forward,
    fake=_like,
    setup_context=_keep,
    backward=_gradients,
)
