"""Launches the three backward roles of simple_gla's sweep, and what makes the gradient of the log-decays of them."""

from __future__ import annotations

import torch
from torch import Tensor

from heddle.kernels._simple_gla_fwd import Given, Sweep
from heddle.kernels.common.layout import ALIGNMENT, dense_state, padded, turned_state
from heddle.kernels.common.replay import empty, replayed


def launch_backward(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay and of the initial state; arguments as those of the registered op."""
    K, V = q.shape[3], v.shape[3]
    if K % ALIGNMENT or V % ALIGNMENT:
        d_out, q, k, v = (padded(x, -1) for x in (d_out, q, k, v))
        after, before = (None if x is None else padded(x, -1, -2) for x in (d_final, initial_state))
        found = launch_backward(d_out, after, q, k, v, log_decay, scale, before, cu_seqlens)
        dq, dk, dv, d_gate, d_initial = found
        cropped = (dq[..., :K], dk[..., :K], dv[..., :V], d_gate, d_initial[..., :K, :V])
        first, second, third, fourth, fifth = (x.contiguous() for x in cropped)
        return first, second, third, fourth, fifth
    B, T, H, _ = q.shape
    heads = v.shape[2]
    given = (d_out, d_final, q, k, v, log_decay, scale, initial_state, cu_seqlens)
    dq, dk, dv, d_gate, d_initial = _sweep_back(*given)
    if heads > H:
        dq, dk = (x.view(B, T, H, heads // H, K).sum(3) for x in (dq, dk))
    return dq, dk, dv, d_gate.to(log_decay.dtype), d_initial


@replayed
def _sweep_back(
    d_out: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `launch_backward`, with gradients of q and k for each value head, and that of log_decay in float32."""
    (B, T, heads, V), K = v.shape, q.shape[3]
    sweep = Sweep(q, k, v, d_out.to(q.dtype), log_decay=log_decay, scale=scale, cu_seqlens=cu_seqlens)
    dq, dk = (empty((B, T, heads, K), q.dtype, q.device) for _ in range(2))
    dv = empty(v.shape, v.dtype, v.device)
    d_gate = empty((B, T, heads), torch.float32, q.device)
    d_initial = empty((sweep.sequences, heads, K, V), torch.float32, v.device)
    given = Given(turned_state(initial_state), dense_state(d_final), turned_state(d_final))
    sweep.run((dq, dk, dv), d_initial, given, d_gate)
    return dq, dk, dv, d_gate, d_initial
