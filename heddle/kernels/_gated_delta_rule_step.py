# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""One token of gated_delta_rule, delta_rule or kda: the state is read once and written once.

The two sums over K, of the state with k and with q, are taken of the state as it is read, so that neither waits for the other:

    erased = Sᵀ k,   u = beta (v - d erased),   S' = d S + k uᵀ,   o = scale (d Sᵀ q + (q · k) u),   d = exp(log_decay)

Bytes for a sequence and head, K = V = 128: 128 KiB, 7 K V FLOP; so the memory bounds it, and for few heads the launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from heddle.kernels.common.layout import block
from heddle.kernels.common.replay import empty, replayed, start_kernel
from heddle.kernels.common.tuning import tuned
from heddle.kernels.configs.gated_delta_rule import STEP, STEP_FEW, STEP_MANY_HEADS


@triton.jit
def _gated_delta_rule_step_kernel(
    q_ptr, k_ptr, v_ptr, log_decay_ptr, beta_ptr, state_ptr, out_ptr, new_state_ptr,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh,
    HV, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    GATED: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    TILES: tl.constexpr = (V + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) % TILES
    place = (tl.program_id(0) // TILES).to(tl.int64)
    n = place // HV
    head = place % HV
    rows = tl.arange(0, ROWS)
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    in_k = rows < K
    in_v = columns < V
    own = place * (K * V) + rows[:, None] * V + columns[None, :]
    inside = in_k[:, None] & in_v[None, :]
    state = tl.load(state_ptr + own, mask=inside, other=0.0)  # [ROWS, COLUMNS]
    q = tl.load(q_ptr + n * stride_qn + head // GROUP * stride_qh + rows, mask=in_k, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + n * stride_kn + head // GROUP * stride_kh + rows, mask=in_k, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + n * stride_vn + head * stride_vh + columns, mask=in_v, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + place)
    if CHANNELS:
        state *= tl.exp(tl.load(log_decay_ptr + place * K + rows, mask=in_k, other=0.0))[:, None]
    elif GATED:
        state *= tl.exp(tl.load(log_decay_ptr + place))
    erased = tl.sum(k[:, None] * state, axis=0)
    seen = tl.sum(q[:, None] * state, axis=0)
    update = beta * (v - erased)
    tl.store(new_state_ptr + own, state + k[:, None] * update[None, :], mask=inside)
    out = (seen + tl.sum(q * k, axis=0) * update) * scale
    tl.store(out_ptr + place * V + columns, out.to(out_ptr.dtype.element_ty), mask=in_v)


@replayed
def launch_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor,
    state: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and new state; arguments as those of the registered ops.

    Shapes:  log_decay: [B, 1, HV], or [B, 1, HV, K] for one of each channel
    """
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    state, beta = state.contiguous(), beta.to(torch.float32).contiguous()
    gate = beta if log_decay is None else log_decay.to(torch.float32).contiguous()
    B, HV, K, V = state.shape
    out = empty((B, 1, HV, V), v.dtype, v.device)
    new_state = empty(state.shape, state.dtype, state.device)
    launch = tuned("step", STEP if B * HV >= STEP_MANY_HEADS else STEP_FEW)
    columns = min(launch.columns, block(V))
    strides = [stride for x in (q, k, v) for stride in (x.stride(0), x.stride(2))]
    start_kernel(
        _gated_delta_rule_step_kernel, (B * HV * triton.cdiv(V, columns),),
        q, k, v, gate, beta, state, out, new_state, *strides, HV, scale,
        K=K, V=V, ROWS=block(K), COLUMNS=columns, GROUP=HV // q.shape[2], GATED=log_decay is not None,
        CHANNELS=gate.dim() == 4,
        **launch.options(),
    )  # fmt: skip
    return out, new_state
