# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
"""One token of a Gated DeltaNet layer, from its projections to its gated heads: one kernel, a program for each value head.

The state is read once and written once. A program walks over tiles of V and keeps the head's output (V numbers) until the
sum of its squares is known, so the norm needs no second kernel. All value heads of a group mix the channels of their key head
again, and the first of them alone writes what the convolution remembers of these. New states go to new memory: what a
program reads was there before the launch, so no order of programs can show.

Bytes for a sequence and head, K = V = 128: 128 KiB of state, some 4 KiB else; 7 K V FLOP.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from heddle.kernels.common.layout import block
from heddle.kernels.common.tuning import tuned
from heddle.kernels.configs.gated_delta_layer import launch_of
from heddle.kernels.op import register

# Under the root of a key's or a query's length.
L2_EPS = tl.constexpr(1e-6)


@triton.jit
def _window(
    x_ptr, past_ptr, weight_ptr, channels, inside, W: tl.constexpr, TAPS: tl.constexpr, CONV: tl.constexpr
):
    """What the taps of these channels see, the token last, and the taps, [channels, TAPS]; the token alone without any."""
    x = tl.load(x_ptr + channels, mask=inside, other=0.0)
    if CONV:
        taps = tl.arange(0, TAPS)[None, :]
        earlier = inside[:, None] & (taps < W - 1)
        past = tl.load(past_ptr + channels[:, None] * (W - 1) + taps, mask=earlier, other=0.0)
        seen = tl.where(taps == W - 1, x[:, None], past)
        among = inside[:, None] & (taps < W)
        weight = tl.load(weight_ptr + channels[:, None] * W + taps, mask=among, other=0.0)
    else:
        seen, weight = x, x
    return seen, weight


@triton.jit
def _mixed(
    seen, weight, new_past_ptr, bias_ptr, channels, inside, writes,
    W: tl.constexpr, TAPS: tl.constexpr, CONV: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Channels after the convolution and its activation, 0 where there is none; `writes`: moves their window on."""
    y = seen.to(tl.float32)
    if CONV:
        taps = tl.arange(0, TAPS)[None, :]
        kept = (inside & writes)[:, None] & (taps > 0) & (taps < W)
        tl.store(new_past_ptr + channels[:, None] * (W - 1) + taps - 1, seen, mask=kept)
        y = tl.sum(y * weight.to(tl.float32), axis=1)
    if BIAS:
        y += tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        y *= tl.sigmoid(y)
    return y


@triton.jit
def _log_decay(a, A_log, dt_bias):
    """-exp(A_log) softplus(a + dt_bias)"""
    x = a + dt_bias
    small = tl.exp(-tl.abs(x))
    # log(1 + small), exact to the last bits also where 1 + small is rounded.
    one = 1.0 + small
    log = tl.where(one == 1.0, small, tl.log(one) * (small / tl.where(one == 1.0, 1.0, one - 1.0)))
    return -tl.exp(A_log) * (tl.maximum(x, 0.0) + log)


@triton.jit(do_not_specialize=["count"])
def _gated_delta_layer_step_kernel(
    x_ptr, z_ptr, a_ptr, b_ptr, A_log_ptr, dt_bias_ptr, norm_ptr, weight_ptr, bias_ptr,
    past_ptr, state_ptr, out_ptr, new_past_ptr, new_state_ptr,
    stride_xn, stride_zn, stride_an, stride_bn,
    H, HV, count, scale, eps, beta_max,
    K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROOM: tl.constexpr,
    GROUP: tl.constexpr, W: tl.constexpr, TAPS: tl.constexpr, CONV: tl.constexpr, BIAS: tl.constexpr,
    SILU: tl.constexpr, L2: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    n = place // HV
    head = (place % HV).to(tl.int32)
    x_ptr += n * stride_xn
    past = n * (2 * H * K + HV * V) * (W - 1)
    past_ptr += past
    new_past_ptr += past
    state_ptr += place * (K * V)
    new_state_ptr += place * (K * V)

    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    in_k = rows < K
    own = rows[:, None] * V + columns[None, :]
    first = head % GROUP == 0
    query = head // GROUP * K + rows
    key = H * K + query
    # All small loads are asked for before the state, which would hold them up.
    q_seen, q_weight = _window(x_ptr, past_ptr, weight_ptr, query, in_k, W, TAPS, CONV)
    k_seen, k_weight = _window(x_ptr, past_ptr, weight_ptr, key, in_k, W, TAPS, CONV)
    tiles = tl.arange(0, ROOM)
    spread = tiles[:, None] * COLUMNS + columns[None, :]
    z = tl.load(z_ptr + n * stride_zn + head * V + spread, mask=spread < V, other=0.0).to(tl.float32)
    norm = tl.load(norm_ptr + spread, mask=spread < V, other=0.0).to(tl.float32)
    a = tl.load(a_ptr + n * stride_an + head).to(tl.float32)
    b = tl.load(b_ptr + n * stride_bn + head).to(tl.float32)
    A_log = tl.load(A_log_ptr + head)
    dt_bias = tl.load(dt_bias_ptr + head)
    in_first = in_k[:, None] & (columns < V)[None, :]
    state = tl.load(state_ptr + own, mask=in_first, other=0.0)  # [ROWS, COLUMNS]

    beta = tl.sigmoid(b) * beta_max
    decay = tl.exp(_log_decay(a, A_log, dt_bias))
    q = _mixed(q_seen, q_weight, new_past_ptr, bias_ptr, query, in_k, first, W, TAPS, CONV, BIAS, SILU)
    k = _mixed(k_seen, k_weight, new_past_ptr, bias_ptr, key, in_k, first, W, TAPS, CONV, BIAS, SILU)
    if L2:
        q *= tl.rsqrt(tl.sum(q * q, axis=0) + L2_EPS)
        k *= tl.rsqrt(tl.sum(k * k, axis=0) + L2_EPS)
    met = tl.sum(q * k, axis=0)

    kept = tl.zeros([ROOM, COLUMNS], dtype=tl.float32)
    for tile in range(count):
        inside = tile * COLUMNS + columns < V
        coming = in_k[:, None] & ((tile + 1) * COLUMNS + columns < V)[None, :]
        if AHEAD:
            following = tl.load(state_ptr + (tile + 1) * COLUMNS + own, mask=coming, other=0.0)
        value = 2 * H * K + head * V + tile * COLUMNS + columns
        v_seen, v_weight = _window(x_ptr, past_ptr, weight_ptr, value, inside, W, TAPS, CONV)
        v = _mixed(v_seen, v_weight, new_past_ptr, bias_ptr, value, inside, True, W, TAPS, CONV, BIAS, SILU)
        state *= decay
        erased = tl.sum(k[:, None] * state, axis=0)
        seen = tl.sum(q[:, None] * state, axis=0)
        update = beta * (v - erased)
        new = state + k[:, None] * update[None, :]
        tl.store(new_state_ptr + tile * COLUMNS + own, new, mask=in_k[:, None] & inside[None, :])
        out = (seen + met * update) * scale
        kept = tl.where(tiles[:, None] == tile, out[None, :], kept)
        if not AHEAD:
            following = tl.load(state_ptr + (tile + 1) * COLUMNS + own, mask=coming, other=0.0)
        state = following
    square = tl.sum(tl.sum(kept * kept, axis=1), axis=0) / V
    y = kept * tl.rsqrt(square + eps) * norm * z * tl.sigmoid(z)
    tl.store(out_ptr + place * V + spread, y.to(out_ptr.dtype.element_ty), mask=spread < V)


def launch_step(
    qkv: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    state: Tensor,
    conv_state: Tensor | None,
    conv_weight: Tensor | None,
    conv_bias: Tensor | None,
    activation: str | None,
    qk_norm: str | None,
    beta_max: float,
    scale: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads, new state and what the convolution remembers (of no elements without one); arguments as of the op.

    Shapes:  qkv: [B, 1, C];  z: [B, 1, HV, V]
    """
    B, HV, K, V = state.shape
    H = (qkv.shape[2] - HV * V) // (2 * K)
    qkv, a, b = (x if x.stride(2) == 1 else x.contiguous() for x in (qkv, a, b))
    z = z if z.stride(3) == 1 and z.stride(2) == V else z.contiguous()
    A_log, dt_bias = (x.to(torch.float32).contiguous() for x in (A_log, dt_bias))
    state, norm_weight = state.contiguous(), norm_weight.contiguous()
    # What is not there is not read.
    past = qkv if conv_state is None else conv_state.contiguous()
    weight = qkv if conv_weight is None else conv_weight.contiguous()
    bias = qkv if conv_bias is None else conv_bias.contiguous()
    taps = 1 if conv_weight is None else weight.shape[1]
    out = torch.empty(B, 1, HV, V, dtype=qkv.dtype, device=qkv.device)
    new_state = torch.empty(state.shape, dtype=state.dtype, device=state.device)
    new_past = torch.empty(0 if conv_state is None else past.shape, dtype=qkv.dtype, device=qkv.device)
    launch = tuned("layer_step", launch_of(B * HV, block(K)))
    columns = min(launch.columns, block(V))
    _gated_delta_layer_step_kernel[(B * HV,)](
        qkv, z, a, b, A_log, dt_bias, norm_weight, weight, bias, past, state, out, new_past, new_state,
        qkv.stride(0), z.stride(0), a.stride(0), b.stride(0), H, HV, triton.cdiv(V, columns), scale, eps, beta_max,
        K=K, V=V, ROWS=block(K), COLUMNS=columns, ROOM=block(V) // columns, GROUP=HV // H,
        W=taps, TAPS=triton.next_power_of_2(taps), CONV=conv_weight is not None, BIAS=conv_bias is not None,
        SILU=activation == "silu", L2=qk_norm == "l2", AHEAD=launch.stages > 1,
        **launch.options(),
    )  # fmt: skip
    return out, new_state, new_past


def _like(
    qkv: Tensor, z: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, norm_weight: Tensor,  # noqa: ARG001
    state: Tensor, conv_state: Tensor | None, *rest: object,  # noqa: ARG001
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    past = qkv.new_empty(0 if conv_state is None else conv_state.shape)
    return qkv.new_empty(z.shape), state.new_empty(state.shape), past


INPUTS = (
    "Tensor qkv, Tensor z, Tensor a, Tensor b, Tensor A_log, Tensor dt_bias, Tensor norm_weight, Tensor state, "
    "Tensor? conv_state, Tensor? conv_weight, Tensor? conv_bias, str? activation, str? qk_norm, float beta_max, "
    "float scale, float eps"
)
step_kernel = register(
    "gated_delta_layer_step_kernel", f"({INPUTS}) -> (Tensor, Tensor, Tensor)", launch_step, fake=_like
)
