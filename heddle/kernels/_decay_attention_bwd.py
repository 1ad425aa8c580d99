"""Launches the three backward roles of decay_attention's sweep."""

from __future__ import annotations

import torch
from torch import Tensor

from heddle.kernels._decay_attention_fwd import Sweep
from heddle.kernels.common.layout import ALIGNMENT, padded
from heddle.kernels.common.replay import empty, replayed


@replayed
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the initial state; arguments as those of the registered op."""
    K, V = q.shape[3], v.shape[3]
    if K % ALIGNMENT or V % ALIGNMENT:
        d_out, q, k, v = (padded(x, -1) for x in (d_out, q, k, v))
        after, before = (None if x is None else padded(x, -1, -2) for x in (d_final, initial_state))
        dq, dk, dv, d_initial = launch_backward(d_out, after, q, k, v, log_decay, scale, before, cu_seqlens)
        found = (dq[..., :K], dk[..., :K], dv[..., :V], d_initial[..., :K, :V])
        first, second, third, fourth = (x.contiguous() for x in found)
        return first, second, third, fourth
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dq, dk, dv = (empty(x.shape, x.dtype, x.device) for x in (q, k, v))
    d_initial = empty((sequences, q.shape[2], K, V), torch.float32, v.device)
    sweep = Sweep(q, k, v, d_out.to(q.dtype), log_decay, scale)
    sweep.run((dq, dk, dv), d_initial, initial_state, d_final, cu_seqlens)
    return dq, dk, dv, d_initial
