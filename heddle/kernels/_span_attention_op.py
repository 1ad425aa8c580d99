"""What torch knows of the kernels of span_attention: an opaque op with gradients, which keeps more than the output for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heddle.kernels._span_attention_launch import launch_backward, launch_forward
from heddle.kernels.op import register

_SIDES = "Tensor q, Tensor k, Tensor v, Tensor order, Tensor first, Tensor last, Tensor? queries"


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
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weight = rest[4]
    last = q.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    sides = (_turned(q, q.shape[-1]), _turned(k, k.shape[-1]), _turned(v, v.shape[-1]))
    return *sides, _turned(q, v.shape[-1]), last


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *sides, _, weight, scale, _ = inputs
    ctx.save_for_backward(*sides, weight, *output)
    ctx.scale = scale


def _gradients(ctx: Any, d_out: Tensor, d_lost: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG001
    *tensors, out, lost, lse = ctx.saved_tensors
    dq, dk, dv, d_own, d_weight = _backward_kernels(d_out, *tensors, ctx.scale, out, lost, lse)
    return dq, dk, dv, None, None, None, None, d_own, None if tensors[-1] is None else d_weight, None, None


_backward_kernels = register(
    "span_attention_kernels_backward",
    f"(Tensor d_out, {_SIDES}, Tensor? weight, float scale, Tensor out, Tensor lost, Tensor lse) -> "
    f"({', '.join(['Tensor'] * 5)})",
    launch_backward,
    fake=_gradients_like,
)
kernels = register(
    "span_attention_kernels",
    f"({_SIDES}, Tensor own, Tensor? weight, float scale, bool trains) -> (Tensor, Tensor, Tensor)",
    launch_forward,
    fake=_like,
    setup_context=_keep,
    backward=_gradients,
)
