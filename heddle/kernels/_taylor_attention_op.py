"""What torch knows of the kernels of taylor_attention: an opaque op with gradients, which keeps what outputs were divided by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heddle.kernels._taylor_attention_launch import FEATURES, launch_backward, launch_forward
from heddle.kernels.op import register

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? weight, float scale, Tensor? initial_state, Tensor? cu_seqlens"
)


def _state_like(v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    count = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.new_empty(count, v.shape[2], FEATURES, v.shape[3] + 1, dtype=torch.float32)


def _like(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    return v.new_empty(v.shape), _state_like(v, rest[-1]), v.new_empty(v.shape[:3], dtype=torch.float32)


def _gradients_like(
    d_out: Tensor,  # noqa: ARG001
    d_final: Tensor | None,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), _state_like(v, rest[3])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *sides, scale, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(*sides, initial_state, cu_seqlens, output[2])
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, d_out: Tensor | None, d_final: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    q, k, v, weight, initial_state, cu_seqlens, total = ctx.saved_tensors
    d_out = torch.zeros_like(v) if d_out is None else d_out
    given = (q, k, v, weight, ctx.scale, initial_state, cu_seqlens)
    dq, dk, dv, d_initial = _backward_kernels(d_out, d_final, *given, total)
    return dq, dk, dv, None, None, None if initial_state is None else d_initial, None


_backward_kernels = register(
    "taylor_attention_kernels_backward",
    f"(Tensor d_out, Tensor? d_final, {_INPUTS}, Tensor total) -> (Tensor, Tensor, Tensor, Tensor)",
    launch_backward,
    fake=_gradients_like,
)
kernels = register(
    "taylor_attention_kernels",
    f"({_INPUTS}) -> (Tensor, Tensor, Tensor)",
    launch_forward,
    fake=_like,
    setup_context=_keep,
    backward=_gradients,
    results=2,
)
