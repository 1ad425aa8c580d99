"""The walk of every reference of linear attention: token by token, sequence by sequence. No fast path uses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def heads_of_values(x: Tensor, v: Tensor) -> Tensor:
    """What belongs to key heads, in float64, for each value head that reads them.

    Shapes:  x: [B, T, H, K];  v: [B, T, HV, V];  out: [B, T, HV, K]
    """
    return x.double().repeat_interleave(v.shape[2] // x.shape[2], dim=2)


def walk(
    update: Callable[..., Tensor],
    sides: Sequence[Tensor],
    *,
    scale: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs scale * S_tᵀ q_t, and the state at the end of each sequence, where S_t = update(S_(t-1), k_t, v_t, ...).

    Shapes:  sides: q, k [B, T, HV, K], v [B, T, HV, V] and what else a step takes, [B, T, ...], float64
             states: [B, HV, K, V], or [N, HV, K, V] with cu_seqlens [N + 1]
    """
    q, _, v, *_ = sides
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    ends = [q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()[1:]
    rows = q.shape[0] if cu_seqlens is None else 1
    # Cut up at once: of each part autograd makes a gradient as long as what it was cut from.
    steps = list(zip(*(x.unbind(1) for x in sides), strict=True))
    outputs, states, begin = [], [], 0
    for index, end in enumerate(ends):
        if initial_state is None:
            state = q.new_zeros(rows, *q.shape[2:], v.shape[3])
        else:
            state = initial_state.double()[index * rows : (index + 1) * rows]
        for query, *others in steps[begin:end]:
            state = update(state, *others)
            outputs.append(scale * torch.einsum("bhk,bhkv->bhv", query, state))
        states.append(state)
        begin = end
    return torch.stack(outputs, dim=1), torch.cat(states)
