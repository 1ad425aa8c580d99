"""Linear attention with a decay for each token and head (simple GLA, Mamba-2 SSD): the op, its reference, its paths.

Predicted cost for a token and value head (K = V = 128, bfloat16, chunks of 64): 98 kFLOP and 1.0 KB forward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.kernels._decay_attention_torch import CHUNK
from heddle.kernels._simple_gla_torch import run_backward, run_forward, step
from heddle.kernels.common.autocast import out_of_autocast
from heddle.kernels.common.linear_op import (
    LIMITS,
    check_inputs,
    check_one_token,
    draw_state,
    fits,
    register_decaying,
)
from heddle.kernels.common.recurrence import heads_of_values, walk
from heddle.kernels.op import Inputs, Phase, Shape, Traits, Work, in_dtype, normal, op, wide_dtype

try:
    from heddle.kernels._simple_gla_bwd import launch_backward
    from heddle.kernels._simple_gla_fwd import launch_forward
    from heddle.kernels.common.decay_step import launch_step

    HAS_KERNELS = True
except ImportError:
    HAS_KERNELS = False


def simple_gla_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of `simple_gla`, token by token in float64; shares nothing with the fast paths."""
    q, k = (heads_of_values(x, v) for x in (q, k))
    v, decay = v.double(), log_decay.double().exp()

    def update(state: Tensor, key: Tensor, value: Tensor, fade: Tensor) -> Tensor:
        return fade[..., None, None] * state + torch.einsum("bhk,bhv->bhkv", key, value)

    return walk(update, (q, k, v, decay), scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    path = simple_gla.choose(q.device, q.dtype, K=q.shape[-1], V=v.shape[-1])
    run = launch_forward if path == "triton" else run_forward
    return run(q, k, v, log_decay, scale, initial_state, cu_seqlens)


def _backward(
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
    path = simple_gla.choose(q.device, q.dtype, K=q.shape[-1], V=v.shape[-1])
    run = launch_backward if path == "triton" else run_backward
    return run(d_out, d_final, q, k, v, log_decay, scale, initial_state, cu_seqlens)


def _step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    path = simple_gla.choose(q.device, q.dtype, K=q.shape[-1], V=v.shape[-1])
    run = launch_step if path == "triton" else step
    return run(q, k, v, log_decay, state, scale)


_forward_op, _step_op = register_decaying("simple_gla", _forward, _backward, _step, learned=True)


@out_of_autocast
def simple_gla_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token of `simple_gla`: its output, and the state after it.

    Shapes:  q, k: [B, 1, H, K];  v, out: [B, 1, HV, V];  log_decay: [B, 1, HV];  state: [B, HV, K, V], float32

    Raises:
        HeddleError: "bad-argument" as `simple_gla`, or for more than one token.
    """
    check_one_token("simple_gla_step", q)
    check_inputs("simple_gla", q, k, v, {"log_decay": log_decay}, state=state)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _step_op(q, k, v, log_decay, in_dtype(state, wide_dtype(q.dtype)), scale)  # type: ignore[no-any-return]


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    B, T, H, K, V = (shape[letter] for letter in "BTHKV")
    HV = shape.get("HV", H)
    return {
        "q": normal(generator, B, T, H, K),
        "k": F.normalize(normal(generator, B, T, H, K), dim=-1),
        "v": normal(generator, B, T, HV, V),
        # What an untrained gate gives, up to some hundred tokens of memory.
        "log_decay": F.logsigmoid(normal(generator, B, T, HV) + 4.0),
    }


def _work(shape: Shape, phase: Phase, element: int) -> Work:
    B, T, H, K, V = (shape[letter] for letter in "BTHKV")
    HV = shape.get("HV", H)
    if phase == "decode":
        return Work(5 * B * HV * K * V, B * (HV * 2 * 4 * K * V + 2 * (H * K + HV * V) * element))
    sweeps = 1 if phase == "fwd" else 4
    flops = sweeps * 2 * B * T * HV * (CHUNK * (K + V) + 2 * K * V)
    # Forward q, k, v, o and the gates; backward q, k, v, dO, dq, dk, dv, the gates and their gradient.
    rows = B * T * (2 * H * K + 2 * HV * V) * element + B * T * HV * 4
    if phase == "fwd":
        return Work(flops, rows)
    return Work(flops, rows + B * T * (4 * H * K + 3 * HV * V) * element + B * T * HV * 8)


_LENGTHS = ((8, 4096), (1, 32768), (1, 131072))
# One group of queries and keys, a state as large as that of 16 heads of 128 x 128.
_MAMBA2 = tuple({"B": B, "T": T, "H": 1, "HV": 32, "K": 128, "V": 64} for B, T in _LENGTHS[:2])
_CASES = Traits(
    inputs=_draw,
    initial_state=draw_state,
    sequence=("q", "k", "v", "log_decay"),
    rounded=("q", "k", "v"),
    differentiable=("q", "k", "v", "log_decay"),
    output_like="v",
    test_shapes=({"B": 2, "H": 2, "HV": 4, "K": 16, "V": 16}, {"B": 1, "H": 2, "HV": 2, "K": 24, "V": 40}),
    bench_shapes=tuple({"B": B, "T": T, "H": 16, "HV": 16, "K": 128, "V": 128} for B, T in _LENGTHS),
    decode_shapes=tuple({"B": B, "T": 1, "H": 16, "HV": 16, "K": 128, "V": 128} for B in (1, 64)),
    work=_work,
    variants={"mamba2": (_draw, _MAMBA2)},
)


def _fits(shape: Shape) -> bool:
    return HAS_KERNELS and fits(shape)


@op(simple_gla_reference, _CASES, kernel=_fits, step=simple_gla_step, limits=LIMITS)
def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal linear attention whose memory fades by a gate of each token and head, and its state at the end.

        S_t = exp(log_decay_t) S_(t-1) + k_t v_tᵀ,   o_t = scale * S_tᵀ q_t      (arXiv 2312.06635, 2405.21060)

    Value head j reads key head j // (HV / H). `scale` defaults to K^-0.5. With `cu_seqlens` (B = 1) the time axis holds
    N packed sequences, each on its own.

    Shapes:  q, k: [B, T, H, K];  v, o: [B, T, HV, V], of one dtype;  log_decay: [B, T, HV], at most 0
             states: [B, HV, K, V] or [N, HV, K, V], float32 (float64 for float64);  cu_seqlens: [N + 1]

    Raises:
        HeddleError: "bad-argument" for shapes or dtypes that do not fit.
    """
    check_inputs("simple_gla", q, k, v, {"log_decay": log_decay}, state=initial_state, cu_seqlens=cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    initial_state = None if initial_state is None else initial_state.to(wide_dtype(q.dtype))
    return _forward_op(q, k, v, log_decay, scale, initial_state, cu_seqlens)  # type: ignore[no-any-return]
