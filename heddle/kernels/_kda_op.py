"""What torch knows of the kernels of kda: opaque ops with gradients. The backward pass runs the forward pass again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heddle.kernels._gated_delta_rule_step import launch_step
from heddle.kernels._kda_launch import launch_backward, launch_forward
from heddle.kernels.op import register

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _state_like(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    count = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_empty(count, v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return launch_forward(q, k, v, log_decay, beta, scale, initial_state, cu_seqlens)


def _forward_fake(
    q: Tensor,
    k: Tensor,  # noqa: ARG001
    v: Tensor,
    log_decay: Tensor,  # noqa: ARG001
    beta: Tensor,  # noqa: ARG001
    scale: float,  # noqa: ARG001
    initial_state: Tensor | None,  # noqa: ARG001
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), _state_like(q, v, cu_seqlens)


def _backward(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Gradients:
    given = (q, k, v, log_decay, beta, scale, initial_state, cu_seqlens)
    return launch_backward(d_out, d_final, *given)


def _backward_fake(
    d_out: Tensor,  # noqa: ARG001
    d_final: Tensor | None,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    scale: float,  # noqa: ARG001
    initial_state: Tensor | None,  # noqa: ARG001
    cu_seqlens: Tensor | None,
) -> Gradients:
    dq, dk, dv, d_gate, d_beta = (x.new_empty(x.shape) for x in (q, k, v, log_decay, beta))
    return dq, dk, dv, d_gate, d_beta, _state_like(q, v, cu_seqlens)


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ARG001
    q, k, v, log_decay, beta, scale, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, log_decay, beta, initial_state, cu_seqlens)
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, beta, initial_state, cu_seqlens = ctx.saved_tensors
    d_out = torch.zeros_like(v) if d_out is None else d_out
    given = (q, k, v, log_decay, beta, ctx.scale, initial_state, cu_seqlens)
    dq, dk, dv, d_gate, d_beta, d_initial = _backward_op(d_out, d_final, *given)
    return dq, dk, dv, d_gate, d_beta, None, (None if initial_state is None else d_initial), None


def _step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return launch_step(q, k, v, log_decay, beta, state, scale)


def _step_fake(
    q: Tensor,
    k: Tensor,  # noqa: ARG001
    v: Tensor,
    log_decay: Tensor,  # noqa: ARG001
    beta: Tensor,  # noqa: ARG001
    state: Tensor,  # noqa: ARG001
    scale: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), _state_like(q, v, None)


def _setup_step(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, state, scale = inputs
    _setup_forward(ctx, (*tensors, scale, state, None), output)


def _step_gradients(ctx: Any, d_out: Tensor | None, d_state: Tensor | None) -> tuple[Tensor | None, ...]:
    dq, dk, dv, d_gate, d_beta, _, d_before, _ = _gradients(ctx, d_out, d_state)
    return dq, dk, dv, d_gate, d_beta, d_before, None


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor beta"
_INPUTS = f"{_TENSORS}, float scale, Tensor? initial_state, Tensor? cu_seqlens"
_backward_op = register(
    "kda_kernels_backward",
    f"(Tensor d_out, Tensor? d_final, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    fake=_backward_fake,
)
forward_kernels = register(
    "kda_kernels",
    f"({_INPUTS}) -> (Tensor, Tensor)",
    _forward,
    fake=_forward_fake,
    setup_context=_setup_forward,
    backward=_gradients,
)
step_kernels = register(
    "kda_step_kernels",
    f"({_TENSORS}, Tensor state, float scale) -> (Tensor, Tensor)",
    _step,
    fake=_step_fake,
    setup_context=_setup_step,
    backward=_step_gradients,
)
