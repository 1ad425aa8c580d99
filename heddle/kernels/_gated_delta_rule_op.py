"""What torch knows of the kernels of gated_delta_rule, routed_delta_rule and delta_rule: opaque ops.

No `log_decay` means no decay; `routes` [chunks of the kernels, HV] are factors of what a chunk leaves to the next, None for 1.
Outputs after the first two are what the backward pass wants. They are empty unless `keep`; a backward pass that finds them empty
runs the forward pass again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heddle.kernels._gated_delta_rule_launch import Kept, kept_like, launch_backward, launch_forward, plan
from heddle.kernels._gated_delta_rule_step import launch_step
from heddle.kernels._gated_delta_rule_torch import padded_chunks
from heddle.kernels.common.layout import room
from heddle.kernels.common.replay import empty, replayed
from heddle.kernels.op import are_plain, register

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@replayed
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    routes: Tensor | None,
    keep: bool,
) -> Outputs:
    given = (q, k, v, log_decay, beta, scale, initial_state, cu_seqlens)
    out, final, kept = launch_forward(*given, keep=keep, routes=routes)
    return (out, final, *(kept.tensors() if keep else _nothing(q)))


@replayed
def _forward_alone(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    routes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `_forward`, without the empty tensors that torch's library wants for what is not kept."""
    given = (q, k, v, log_decay, beta, scale, initial_state, cu_seqlens)
    out, final, _ = launch_forward(*given, keep=False, routes=routes)
    return out, final


def _nothing(like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    first, second, third, *others = (empty((0,), like.dtype, like.device) for _ in range(7))
    fourth, fifth, sixth, seventh = others
    return first, second, third, fourth, fifth, sixth, seventh


def _state_like(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    count = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_empty(count, v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)


def _forward_fake(
    q: Tensor,
    k: Tensor,  # noqa: ARG001
    v: Tensor,
    log_decay: Tensor | None,  # noqa: ARG001
    beta: Tensor,  # noqa: ARG001
    scale: float,  # noqa: ARG001
    initial_state: Tensor | None,  # noqa: ARG001
    cu_seqlens: Tensor | None,
    routes: Tensor | None,
    keep: bool,
) -> Outputs:
    found = v.new_empty(v.shape), _state_like(q, v, cu_seqlens)
    if not keep:
        return (*found, *_nothing(q))
    kept = kept_like(q, v, cu_seqlens, keep=True, routed=routes is not None)
    return (*found, *kept.tensors())


@replayed
def _backward(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    routes: Tensor | None,
    pairs: Tensor,
    gates: Tensor,
    states: Tensor,
    new: Tensor,
    last: Tensor,
    rest: Tensor,
    summary: Tensor,
) -> Gradients:
    kept = Kept(pairs, gates, states, new, last, rest, summary)
    given = (q, k, v, log_decay, beta, scale, initial_state, cu_seqlens)
    if pairs.numel() == 0:
        _, _, kept = launch_forward(*given, keep=True, routes=routes)
    return launch_backward(d_out, d_final, *given, kept, routes=routes)


def _backward_fake(
    d_out: Tensor,  # noqa: ARG001
    d_final: Tensor | None,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    scale: float,  # noqa: ARG001
    initial_state: Tensor | None,  # noqa: ARG001
    cu_seqlens: Tensor | None,
    routes: Tensor | None,
    pairs: Tensor,  # noqa: ARG001
    gates: Tensor,  # noqa: ARG001
    states: Tensor,  # noqa: ARG001
    new: Tensor,  # noqa: ARG001
    last: Tensor,  # noqa: ARG001
    rest: Tensor,  # noqa: ARG001
    summary: Tensor,  # noqa: ARG001
) -> Gradients:
    d_beta = beta.new_empty(beta.shape)
    d_log_decay = d_beta.new_empty(0) if log_decay is None else d_beta.new_empty(beta.shape)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    d_routes = d_beta.new_empty((0,) if routes is None else routes.shape)
    return dq, dk, dv, d_log_decay, d_beta, _state_like(q, v, cu_seqlens), d_routes


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    q, k, v, log_decay, beta, scale, initial_state, cu_seqlens, routes, _ = inputs
    ctx.save_for_backward(q, k, v, log_decay, beta, initial_state, cu_seqlens, routes, *output[2:])
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_out: Tensor | None, d_final: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, beta, initial_state, cu_seqlens, routes, *kept = ctx.saved_tensors
    d_out = torch.zeros_like(v) if d_out is None else d_out
    given = (q, k, v, log_decay, beta, ctx.scale, initial_state, cu_seqlens, routes)
    dq, dk, dv, d_log_decay, d_beta, d_initial, d_routes = _backward_op(d_out, d_final, *given, *kept)
    d_log_decay, d_initial, d_routes = (
        None if given is None else found
        for given, found in ((log_decay, d_log_decay), (initial_state, d_initial), (routes, d_routes))
    )
    return dq, dk, dv, d_log_decay, d_beta, None, d_initial, None, d_routes, None


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return launch_step(q, k, v, log_decay, beta, state, scale)


def _step_fake(
    q: Tensor,
    k: Tensor,  # noqa: ARG001
    v: Tensor,
    log_decay: Tensor | None,  # noqa: ARG001
    beta: Tensor,  # noqa: ARG001
    state: Tensor,  # noqa: ARG001
    scale: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), _state_like(q, v, None)


def _setup_step(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, log_decay, beta, state, scale = inputs
    _setup_forward(ctx, (q, k, v, log_decay, beta, scale, state, None, None, False), (*output, *_nothing(q)))


def _step_gradients(ctx: Any, d_out: Tensor | None, d_state: Tensor | None) -> tuple[Tensor | None, ...]:
    dq, dk, dv, d_log_decay, d_beta, _, d_before, *_ = _gradients(ctx, d_out, d_state)
    return dq, dk, dv, d_log_decay, d_beta, d_before, None


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor beta, float scale, Tensor? initial_state, "
    "Tensor? cu_seqlens, Tensor? routes"
)
_SEVEN = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_NINE = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_backward_op = register(
    "gated_delta_rule_kernels_backward",
    f"(Tensor d_out, Tensor? d_final, {_INPUTS}, Tensor pairs, Tensor gates, Tensor states, Tensor new, "
    f"Tensor last, Tensor rest, Tensor summary) -> {_SEVEN}",
    _backward,
    fake=_backward_fake,
)
forward_kernels = register(
    "gated_delta_rule_kernels",
    f"({_INPUTS}, bool keep) -> {_NINE}",
    _forward,
    fake=_forward_fake,
    setup_context=_setup_forward,
    backward=_gradients,
    results=2,
)
step_kernels = register(
    "gated_delta_rule_step_kernels",
    "(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor beta, Tensor state, float scale) -> (Tensor, Tensor)",
    _step,
    fake=_step_fake,
    setup_context=_setup_step,
    backward=_step_gradients,
)


def longest_chunk(device: torch.device, element: int, K: int) -> int:
    """Tokens of a tile of the kernels, for elements of so many bytes."""
    return plan(device, element, room(K, device)).chunk


def run_kernels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    routes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and final state; keeps what a backward pass wants only if there can be one."""
    sources = (q, k, v, log_decay, beta, initial_state, routes)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in sources)
    given = (q, k, v, log_decay, beta, scale, initial_state, cu_seqlens, routes)
    if not keep and are_plain(given):
        return _forward_alone(*given)
    found = forward_kernels(*given, keep)
    return found[0], found[1]


def run_routed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    routes: Tensor,
    chunk: int,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `run_kernels`, for `routed_delta_rule`: each chunk alone in a tile.  Shapes:  routes: [B, T / chunk, HV]"""
    size = longest_chunk(q.device, q.element_size(), q.shape[3])
    q, k, values, log_decay, beta = (padded_chunks(x, chunk, size) for x in (q, k, v, log_decay, beta))
    factors = routes.flatten(0, 1).contiguous()
    out, final = run_kernels(q, k, values, log_decay, beta, scale, initial_state, None, factors)
    out = out.view(len(v), -1, size, *v.shape[2:])[:, :, :chunk]
    return out.reshape(v.shape), final
