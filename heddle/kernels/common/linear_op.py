"""What the ops of linear attention share: the check of what they are given, and what torch is told of those with a decay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from heddle.errors import HeddleError
from heddle.kernels.common.varlen import check_packing
from heddle.kernels.op import FLOATS, Shape, check_shapes, check_tensors, normal, register, wide_dtype

# Of a key and of a value head, in the kernels.
MAX_HEAD_SIZE = 256
LIMITS = f"K and V up to {MAX_HEAD_SIZE}"
_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor log_decay"
_INPUTS = f"{_TENSORS}, float scale, Tensor? initial_state, Tensor? cu_seqlens"


def check_inputs(
    name: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor],
    *,
    state: Tensor | None,
    cu_seqlens: Tensor | None = None,
    log_decay: Tensor | None = None,
) -> None:
    """Raises "bad-argument" for what an op of linear attention cannot take; the shape of a `log_decay` is not asked.

    Shapes:  q, k: [B, T, H, K];  v: [B, T, HV, V];  gates: [B, T, HV];  state: [B, HV, K, V] or [N, HV, K, V]
    """
    shape, of_values = q.shape, v.shape
    if len(shape) != 4 or len(of_values) != 4 or shape[1] < 1:
        raise HeddleError("bad-argument", f"{name}: q, k, v must be [B, T, heads, *] with at least one token")
    B, T, H, K = shape
    if cu_seqlens is not None:
        check_packing(name, B, T, cu_seqlens)
    rows, tokens, HV, V = of_values
    if HV % H:
        raise HeddleError("bad-argument", f"{name}: {H} key heads do not divide {HV} value heads")
    count = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    heads = (B, T, HV)
    dtype, device = q.dtype, q.device
    # Asked first, since all of it costs the host more than a launch.
    as_expected = (
        k.shape == shape
        and rows == B
        and tokens == T
        and k.dtype == v.dtype == dtype
        and dtype in FLOATS
        and k.device == v.device == device
        and (state is None or state.shape == (count, HV, K, V))
    )
    for x in gates.values():
        as_expected = as_expected and x.shape == heads
    for side in (state, log_decay, *gates.values()):
        as_expected = as_expected and (side is None or (side.dtype in FLOATS and side.device == device))
    if not as_expected or cu_seqlens is not None:
        expected = {"k": (k, (B, T, H, K)), "v": (v, (*heads, V)), "state": (state, (count, HV, K, V))}
        check_shapes(name, {**expected, **{gate: (x, heads) for gate, x in gates.items()}})
        floats = {"log_decay": log_decay, **gates, "state": state}
        check_tensors(name, {"q": q, "k": k, "v": v}, floats=floats, integers={"cu_seqlens": cu_seqlens})


def check_one_token(name: str, q: Tensor) -> None:
    """Raises "bad-argument" for a decode step of more than one token."""
    if q.dim() == 4 and q.shape[1] != 1:
        raise HeddleError("bad-argument", f"{name} takes one token, got {q.shape[1]}")


def fits(shape: Shape) -> bool:
    """Whether the kernels take these head sizes."""
    return max(shape["K"], shape["V"]) <= MAX_HEAD_SIZE


def draw_state(shape: Shape, generator: torch.Generator) -> Tensor:
    """A state of normally distributed numbers."""
    B, H, K, V = (shape[letter] for letter in "BHKV")
    return normal(generator, B, shape.get("HV", H), K, V)


def register_decaying(
    name: str,
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor, ...]],
    step: Callable[..., tuple[Tensor, Tensor]],
    *,
    learned: bool,
    kept: int = 0,
    kept_like: Callable[..., tuple[Tensor, ...]] = lambda *_: (),
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Makes an op and its decode step known to torch, with their gradients, and returns what calls them.

        forward(q, k, v, log_decay, scale, initial_state, cu_seqlens)  -> output, final state, what is kept
        backward(d_out, d_final, ... as forward, *what is kept)        -> gradients of q, k, v, log_decay, initial state
        step(q, k, v, log_decay, state, scale)                         -> output, state

    A `log_decay` that is not `learned` has no gradient: `backward` leaves it out. So many tensors are `kept` for the
    backward pass; `kept_like(q, v, cu_seqlens)` makes such. After a step, which keeps nothing, they are empty.
    """
    backward_op = register(
        f"{name}_backward",
        f"(Tensor d_out, Tensor? d_final, {_INPUTS}{''.join(f', Tensor kept_{n}' for n in range(kept))})"
        f" -> ({', '.join(['Tensor'] * (4 + learned))})",
        backward,
        fake=_gradients_like(learned=learned),
    )
    gradients = _gradients(backward_op, learned=learned)

    def step_gradients(ctx: Any, d_out: Tensor | None, d_state: Tensor | None) -> tuple[Tensor | None, ...]:
        dq, dk, dv, d_gate, _, d_before, _ = gradients(ctx, d_out, d_state)
        return dq, dk, dv, d_gate, d_before, None

    forward_op = register(
        name,
        f"({_INPUTS}) -> ({', '.join(['Tensor'] * (2 + kept))})",
        forward,
        fake=_results_like(kept_like),
        setup_context=_keep,
        backward=gradients,
        results=2,
    )
    step_op = register(
        f"{name}_step",
        f"({_TENSORS}, Tensor state, float scale) -> (Tensor, Tensor)",
        step,
        fake=_step_like,
        setup_context=_keep_step(kept),
        backward=step_gradients,
    )
    return forward_op, step_op


def _state_like(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    count = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_empty(count, v.shape[2], q.shape[3], v.shape[3], dtype=wide_dtype(q.dtype))


def _results_like(kept_like: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    def like(
        q: Tensor,
        k: Tensor,  # noqa: ARG001
        v: Tensor,
        log_decay: Tensor,  # noqa: ARG001
        scale: float,  # noqa: ARG001
        initial_state: Tensor | None,  # noqa: ARG001
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, ...]:
        return v.new_empty(v.shape), _state_like(q, v, cu_seqlens), *kept_like(q, v, cu_seqlens)

    return like


def _step_like(
    q: Tensor,
    k: Tensor,  # noqa: ARG001
    v: Tensor,
    log_decay: Tensor,  # noqa: ARG001
    state: Tensor,  # noqa: ARG001
    scale: float,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), _state_like(q, v, None)


def _gradients_like(*, learned: bool) -> Callable[..., tuple[Tensor, ...]]:
    def like(
        d_out: Tensor,  # noqa: ARG001
        d_final: Tensor | None,  # noqa: ARG001
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        scale: float,  # noqa: ARG001
        initial_state: Tensor | None,  # noqa: ARG001
        cu_seqlens: Tensor | None,
        *kept: Tensor,  # noqa: ARG001
    ) -> tuple[Tensor, ...]:
        sources = (q, k, v, log_decay) if learned else (q, k, v)
        return (*(x.new_empty(x.shape) for x in sources), _state_like(q, v, cu_seqlens))

    return like


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, log_decay, scale, initial_state, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, log_decay, initial_state, cu_seqlens, *output[2:])
    ctx.scale = scale
    ctx.set_materialize_grads(False)


def _keep_step(kept: int) -> Callable[[Any, tuple[Any, ...], tuple[Tensor, Tensor]], None]:
    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, state, scale = inputs
        nothing = (state.new_empty(0) for _ in range(kept))
        _keep(ctx, (*tensors, scale, state, None), (*output, *nothing))

    return keep


def _gradients(backward_op: Callable[..., Any], *, learned: bool) -> Callable[..., tuple[Tensor | None, ...]]:
    def gradients(
        ctx: Any, d_out: Tensor | None, d_final: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, initial_state, cu_seqlens, *kept = ctx.saved_tensors
        d_out = torch.zeros_like(v) if d_out is None else d_out
        given = (q, k, v, log_decay, ctx.scale, initial_state, cu_seqlens)
        dq, dk, dv, *d_gate, d_initial = backward_op(d_out, d_final, *given, *kept)
        d_initial = None if initial_state is None else d_initial
        return dq, dk, dv, (d_gate[0] if learned else None), None, d_initial, None

    return gradients
