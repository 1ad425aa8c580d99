"""What torch knows of the kernels of rat_scan: an opaque op with gradients, which keeps states inside long chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heddle.kernels._rat_scan_launch import launch_backward, launch_forward, parts
from heddle.kernels.op import register

RESULTS = 6
_SIDES = "Tensor k, Tensor x, Tensor gate, Tensor gate_bias, Tensor? cos, Tensor? sin, Tensor? past, Tensor? cu_seqlens"
_NUMBERS = "SymInt chunk, SymInt start"


def _like(
    q: Tensor,
    k: Tensor,  # noqa: ARG001
    x: Tensor,
    gate: Tensor,  # noqa: ARG001
    gate_bias: Tensor,
    cos: Tensor | None,  # noqa: ARG001
    sin: Tensor | None,  # noqa: ARG001
    past: Tensor | None,  # noqa: ARG001
    cu_seqlens: Tensor | None,
    chunk: int,
    start: int,
) -> tuple[Tensor, ...]:
    B, T, H, D = x.shape
    packed = cu_seqlens is not None
    sums = -(-T // chunk) if packed else (start + T) // chunk - start // chunk
    count = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    rows, states = (B, H, sums, D), (count, 2, H, D)
    return (
        q.new_empty(q.shape), x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(rows), x.new_empty(rows),
        gate_bias.new_empty(states, dtype=torch.float32), x.new_empty((B, parts(chunk, T), 2, H, D), dtype=torch.float32),
    )  # fmt: skip


def _gradients_like(
    d_turned: Tensor,
    d_key: Tensor,  # noqa: ARG001
    d_value: Tensor,  # noqa: ARG001
    d_keys: Tensor,  # noqa: ARG001
    d_values: Tensor,  # noqa: ARG001
    d_running: Tensor,  # noqa: ARG001
    k: Tensor,
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor,
    cos: Tensor | None,  # noqa: ARG001
    sin: Tensor | None,  # noqa: ARG001
    past: Tensor | None,
    *rest: Any,  # noqa: ARG001
) -> tuple[Tensor, ...]:
    made = (d_turned, k, x, gate, gate_bias, gate_bias if past is None else past)
    return tuple(each.new_empty(each.shape) for each in made)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, *sides, chunk, start = inputs
    ctx.save_for_backward(*sides, output[RESULTS])
    ctx.numbers = (chunk, start)


def _gradients(ctx: Any, *d_results: Tensor) -> tuple[Tensor | None, ...]:
    sides = ctx.saved_tensors
    *found, d_past = _backward_kernels(*d_results[:RESULTS], *sides, *ctx.numbers)
    return (*found, None, None, None if sides[6] is None else d_past, None, None, None)


_backward_kernels = register(
    "rat_scan_kernels_backward",
    "(Tensor d_turned, Tensor d_key, Tensor d_value, Tensor d_keys, Tensor d_values, Tensor d_running, "
    f"{_SIDES}, Tensor inner, {_NUMBERS}) -> ({', '.join(['Tensor'] * 6)})",
    launch_backward,
    fake=_gradients_like,
)
kernels = register(
    "rat_scan_kernels",
    f"(Tensor q, {_SIDES}, {_NUMBERS}) -> ({', '.join(['Tensor'] * 7)})",
    launch_forward,
    fake=_like,
    setup_context=_keep,
    backward=_gradients,
    results=RESULTS,
)
