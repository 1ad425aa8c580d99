"""What torch knows of the kernels of grid_window_attention: an opaque op, which keeps more than its output for gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heddle.kernels._grid_window_attention_launch import launch_backward, launch_forward
from heddle.kernels.op import register

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? begin, Tensor? count, int height, int width, int frame_window, int row_window, "
    "int column_window, bool slides, float scale"
)
# Of them tensors, and numbers.
_TENSORS, _NUMBERS = 5, 7


def _turned(like: Tensor, size: int) -> Tensor:
    """As the kernels leave heads in memory: behind time."""
    return like.new_empty(like.shape[0], like.shape[2], like.shape[1], size).transpose(1, 2)


def _like(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    is_kept = rest[-1] and q.element_size() < 4
    lost = _turned(q, v.shape[-1]) if is_kept else q.new_empty(0)
    return _turned(q, v.shape[-1]), lost, q.new_empty(q.shape[:3], dtype=torch.float32)


def _gradients_like(
    d_out: Tensor,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:
    return _turned(q, q.shape[-1]), _turned(k, k.shape[-1]), _turned(v, v.shape[-1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], *output)
    ctx.numbers = inputs[_TENSORS:-1]


def _gradients(ctx: Any, d_out: Tensor, d_lost: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG001
    *tensors, out, lost, lse = ctx.saved_tensors
    found = _backward_kernels(d_out, *tensors, *ctx.numbers, out, lost, lse)
    # Of `trains` as well.
    return (*found, *(None,) * (_TENSORS - len(found) + _NUMBERS + 1))


_backward_kernels = register(
    "grid_window_attention_kernels_backward",
    f"(Tensor d_out, {_INPUTS}, Tensor out, Tensor lost, Tensor lse) -> (Tensor, Tensor, Tensor)",
    launch_backward,
    fake=_gradients_like,
)
kernels = register(
    "grid_window_attention_kernels",
    f"({_INPUTS}, bool trains) -> (Tensor, Tensor, Tensor)",
    launch_forward,
    fake=_like,
    setup_context=_keep,
    backward=_gradients,
)
