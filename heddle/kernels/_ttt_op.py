"""What torch knows of the kernels of ttt: an opaque op with gradients. The backward pass runs the forward pass again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heddle.kernels._ttt_launch import launch_backward, launch_forward
from heddle.kernels._ttt_torch import state_size
from heddle.kernels.op import register

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor rates, Tensor? momentum, Tensor weight, int chunk, str loss, str normalise, "
    "Tensor? initial_state, Tensor? cu_seqlens"
)


def _state_like(q: Tensor, momentum: Tensor | None, weight: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    count = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    size = state_size(weight, has_momentum=momentum is not None)
    return q.new_empty(count, q.shape[2], size, dtype=torch.float32)


def _like(
    q: Tensor,
    k: Tensor,  # noqa: ARG001
    v: Tensor,
    rates: Tensor,  # noqa: ARG001
    momentum: Tensor | None,
    weight: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), _state_like(q, momentum, weight, rest[-1])


def _gradients_like(
    d_out: Tensor,  # noqa: ARG001
    d_final: Tensor | None,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    momentum: Tensor | None,
    weight: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    dq, dk, dv, d_rates, d_weight = (x.new_empty(x.shape) for x in (q, k, v, rates, weight))
    d_gates = rates.new_empty(q.shape[:3])
    return dq, dk, dv, d_rates, d_gates, d_weight, _state_like(q, momentum, weight, rest[-1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ARG001
    *tensors, chunk, loss, normalise, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, initial_state, cu_seqlens)
    ctx.rule = (chunk, loss, normalise)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, rates, momentum, weight, initial_state, cu_seqlens = ctx.saved_tensors
    d_out = torch.zeros_like(v) if d_out is None else d_out
    given = (q, k, v, rates, momentum, weight, *ctx.rule, initial_state, cu_seqlens)
    dq, dk, dv, d_rates, d_gates, d_weight, d_initial = _backward_op(d_out, d_final, *given)
    d_gates = None if momentum is None else d_gates
    return (
        dq, dk, dv, d_rates, d_gates, d_weight, None, None, None,
        None if initial_state is None else d_initial, None,
    )  # fmt: skip


_backward_op = register(
    "ttt_kernels_backward",
    f"(Tensor d_out, Tensor? d_final, {_INPUTS}) -> ({', '.join(['Tensor'] * 7)})",
    launch_backward,
    fake=_gradients_like,
)
forward_kernels = register(
    "ttt_kernels",
    f"({_INPUTS}) -> (Tensor, Tensor)",
    launch_forward,
    fake=_like,
    setup_context=_keep,
    backward=_gradients,
)
