# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""One token of decay_attention, simple_gla and gla: the state is read once and written once.

Bytes for a sequence and head, K = V = 128: 128 KiB, 5 K V FLOP; so the memory bounds it, and for few heads the launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from heddle.kernels.common.replay import empty, replayed, start_kernel

# Columns of the state that a program holds; the narrow choice spreads few heads over more multiprocessors.
COLUMNS, NARROW, MANY_HEADS = 32, 16, 128


@triton.jit
def _decay_step_kernel(
    q_ptr, k_ptr, v_ptr, log_decay_ptr, state_ptr, out_ptr, new_state_ptr,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_gn, stride_gh,
    H, group, scale,
    K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) // H).to(tl.int64)
    head = tl.program_id(0) % H
    shared = head // group
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_k = rows < K
    in_v = columns < V
    q = tl.load(q_ptr + n * stride_qn + shared * stride_qh + rows, mask=in_k, other=0.0).to(tl.float32)
    k = tl.load(k_ptr + n * stride_kn + shared * stride_kh + rows, mask=in_k, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + n * stride_vn + head * stride_vh + columns, mask=in_v, other=0.0).to(tl.float32)
    if CHANNELS:
        log_decay_ptr += n * stride_gn + shared * stride_gh
        log = tl.load(log_decay_ptr + rows, mask=in_k, other=0.0)[:, None]
    else:
        log = tl.load(log_decay_ptr + n * stride_gn + head * stride_gh)
    decay = tl.exp(log.to(tl.float32))
    own = (n * H + head) * (K * V) + rows[:, None] * V + columns[None, :]
    inside = in_k[:, None] & in_v[None, :]
    state = tl.load(state_ptr + own, mask=inside, other=0.0)  # [ROWS, COLUMNS]
    state = decay * state + k[:, None] * v[None, :]
    tl.store(new_state_ptr + own, state, mask=inside)
    out = tl.sum(q[:, None] * state, axis=0) * scale
    tl.store(out_ptr + (n * H + head) * V + columns, out.to(out_ptr.dtype.element_ty), mask=in_v)


@replayed
def launch_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and new state; arguments as those of the registered ops.

    Shapes:  q, k: [B, 1, H, K];  v, out: [B, 1, HV, V];  log_decay: [B, 1, HV], [HV] or [B, 1, H, K];  state: [B, HV, K, V]
    """
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    state = state.contiguous()
    B, H, K, V = state.shape
    channels = log_decay.dim() == 4
    log_decay = log_decay.contiguous() if channels else log_decay
    of_gates = log_decay.expand(B, 1, H).stride() if log_decay.dim() == 1 else log_decay.stride()
    out = empty((B, 1, H, V), v.dtype, v.device)
    new_state = empty(state.shape, state.dtype, state.device)
    rows = triton.next_power_of_2(K)
    columns = min(COLUMNS if B * H >= MANY_HEADS else NARROW, triton.next_power_of_2(V))
    strides = [stride for x in (q, k, v) for stride in (x.stride(0), x.stride(2))]
    start_kernel(
        _decay_step_kernel, (B * H, triton.cdiv(V, columns)),
        q, k, v, log_decay, state, out, new_state, *strides, of_gates[0], of_gates[2], H, H // q.shape[2], scale,
        K=K, V=V, ROWS=rows, COLUMNS=columns, CHANNELS=channels, num_warps=4,
    )  # fmt: skip
    return out, new_state
