"""What torch knows of the kernels of landmark_attention: an opaque op with gradients, which keeps the log-sum-exp for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heddle.kernels._landmark_attention_launch import launch_backward, launch_forward
from heddle.kernels.op import register

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor landmarks, Tensor start, Tensor? real, Tensor? written"
_INPUTS = f"{_TENSORS}, float scale, int block, int? top"


def _like(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return v.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _gradients_like(
    d_out: Tensor,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmarks: Tensor,
    start: Tensor,  # noqa: ARG001
    real: Tensor | None,  # noqa: ARG001
    written: Tensor | None,
    *rest: Any,  # noqa: ARG001
) -> tuple[Tensor, ...]:
    given = (q, k, v, landmarks, written)
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in given)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, scale, block, top = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.numbers = (scale, block, top)


def _gradients(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG001
    *tensors, out, lse = ctx.saved_tensors
    dq, dk, dv, d_marks, d_written = _backward_kernels(d_out, *tensors, *ctx.numbers, out, lse)
    return dq, dk, dv, d_marks, None, None, None if tensors[6] is None else d_written, None, None, None


_backward_kernels = register(
    "landmark_attention_kernels_backward",
    f"(Tensor d_out, {_INPUTS}, Tensor out, Tensor lse) -> ({', '.join(['Tensor'] * 5)})",
    launch_backward,
    fake=_gradients_like,
)
kernels = register(
    "landmark_attention_kernels",
    f"({_INPUTS}) -> (Tensor, Tensor)",
    launch_forward,
    fake=_like,
    setup_context=_keep,
    backward=_gradients,
)
