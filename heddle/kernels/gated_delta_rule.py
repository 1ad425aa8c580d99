"""The gated delta rule: the op and its reference.

On a GPU two kernels forward and two backward (`_gated_delta_rule_fwd`, `_gated_delta_rule_bwd`), elsewhere plain torch in
chunks. Predicted cost for a token and value head (K = V = 128, bfloat16, chunks of 64): forward 164 kFLOP and the
triangular inverse, 2.1 KB; backward 380 kFLOP and 5.1 KB, and 0.8 KB more forward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.kernels._gated_delta_rule_torch import CHUNK, chunked, step
from heddle.kernels.common.autocast import out_of_autocast
from heddle.kernels.common.linear_op import LIMITS, check_inputs, check_one_token, draw_state, fits
from heddle.kernels.common.recurrence import heads_of_values, walk
from heddle.kernels.op import (
    Inputs,
    Phase,
    Shape,
    Traits,
    Work,
    in_dtype,
    normal,
    op,
    register_composite,
    rows_together,
    wide_dtype,
)

try:
    from heddle.kernels._gated_delta_rule_op import run_kernels, step_kernels

    HAS_KERNELS = True
except ImportError:
    HAS_KERNELS = False


def gated_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of `gated_delta_rule`, token by token in float64; shares nothing with the fast path."""
    q, k = (heads_of_values(x, v) for x in (q, k))
    v, decay, beta = v.double(), log_decay.double().exp(), beta.double()

    def update(state: Tensor, key: Tensor, value: Tensor, fade: Tensor, rate: Tensor) -> Tensor:
        state = fade[..., None, None] * state
        wrong = value - torch.einsum("bhk,bhkv->bhv", key, state)
        return state + torch.einsum("bhk,bhv->bhkv", key, rate[..., None] * wrong)

    return walk(
        update, (q, k, v, decay, beta), scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens
    )


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    path = gated_delta_rule.choose(q.device, q.dtype, K=q.shape[-1], V=v.shape[-1])
    if path == "triton":
        return run_kernels(q, k, v, log_decay, beta, scale, initial_state, cu_seqlens)
    gate = log_decay[..., None]
    return chunked(q, k, v, gate, beta, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)


def _step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    path = gated_delta_rule.choose(q.device, q.dtype, K=q.shape[-1], V=v.shape[-1])
    if path == "triton":
        return step_kernels(q, k, v, log_decay, beta, state, scale)  # type: ignore[no-any-return]
    return step(q, k, v, log_decay[..., None], beta, state, scale)


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor beta"
_forward_op = register_composite(
    "gated_delta_rule",
    f"({_INPUTS}, float scale, Tensor? initial_state, Tensor? cu_seqlens) -> (Tensor, Tensor)",
    _forward,
    under_vmap=rows_together("gated_delta_rule"),
)
_step_op = register_composite(
    "gated_delta_rule_step", f"({_INPUTS}, Tensor state, float scale) -> (Tensor, Tensor)", _step
)


def _fits(shape: Shape) -> bool:
    return HAS_KERNELS and fits(shape)


@out_of_autocast
def gated_delta_rule_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `gated_delta_rule`: its output, and the state after it.

    Shapes:  q, k: [B, 1, H, K];  v, out: [B, 1, HV, V];  log_decay, beta: [B, 1, HV];  state: [B, HV, K, V], float32

    Raises:
        HeddleError: "bad-argument" as `gated_delta_rule`, or for more than one token.
    """
    check_one_token("gated_delta_rule_step", q)
    check_inputs("gated_delta_rule", q, k, v, {"log_decay": log_decay, "beta": beta}, state=state)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    wide = wide_dtype(v.dtype)
    log_decay, beta = in_dtype(log_decay, wide), in_dtype(beta, wide)
    return _step_op(q, k, v, log_decay, beta, in_dtype(state, wide), scale)  # type: ignore[no-any-return]


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    B, T, H, K, V = (shape[letter] for letter in "BTHKV")
    HV = shape.get("HV", H)
    return {
        "q": F.normalize(normal(generator, B, T, H, K), dim=-1),
        "k": F.normalize(normal(generator, B, T, H, K), dim=-1),
        "v": normal(generator, B, T, HV, V),
        "log_decay": -F.softplus(2.0 * normal(generator, B, T, HV) - 2.0),
        "beta": torch.sigmoid(normal(generator, B, T, HV)),
    }


def _draw_timed(shape: Shape, generator: torch.Generator) -> Inputs:
    """Inputs as flash-linear-attention's benchmark draws them."""
    B, T, HV = shape["B"], shape["T"], shape.get("HV", shape["H"])
    log_decay = F.logsigmoid(normal(generator, B, T, HV) + 4.0)
    uniform = torch.rand(B, T, HV, generator=generator, device=generator.device, dtype=torch.float64)
    return {**_draw(shape, generator), "log_decay": log_decay, "beta": torch.sigmoid(uniform)}


def work(shape: Shape, phase: Phase, element: int) -> Work:
    """What gated_delta_rule or delta_rule must do."""
    B, T, H, K, V = (shape[letter] for letter in "BTHKV")
    HV = shape.get("HV", H)
    if phase == "decode":
        return Work(7 * B * HV * K * V, B * HV * 2 * 4 * K * V)
    # Backward costs 2.7 times as much.
    flops = B * T * HV * (2 * CHUNK * (3 * K + 2 * V) + 6 * K * V)
    rows = B * T * (2 * H * K + 2 * HV * V) * element
    if phase == "fwd":
        return Work(flops, rows + B * T * HV * 8)
    return Work(round(3.7 * flops), rows + B * T * (4 * H * K + 3 * HV * V) * element + B * T * HV * 24)


_WIDE = {"H": 16, "HV": 16, "K": 128, "V": 128}
_CASES = Traits(
    inputs=_draw,
    timed_inputs=_draw_timed,
    initial_state=draw_state,
    sequence=("q", "k", "v", "log_decay", "beta"),
    rounded=("q", "k", "v"),
    differentiable=("q", "k", "v", "log_decay", "beta"),
    output_like="v",
    test_shapes=({"B": 2, "H": 2, "HV": 4, "K": 16, "V": 16}, {"B": 1, "H": 2, "HV": 2, "K": 24, "V": 40}),
    bench_shapes=(
        *({"B": B, "T": T, **_WIDE} for B, T in ((8, 4096), (1, 32768), (1, 131072))),
        {"B": 1, "T": 32768, **_WIDE, "H": 4},
    ),
    decode_shapes=tuple({"B": B, "T": 1, **_WIDE} for B in (1, 32, 256)),
    work=work,
)


@op(
    gated_delta_rule_reference,
    _CASES,
    kernel=_fits,
    step=gated_delta_rule_step,
    limits=LIMITS,
)
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear attention that fades by a gate and corrects what it has stored, and its state at the end.

        S'_t = exp(log_decay_t) S_(t-1),   S_t = S'_t + beta_t k_t (v_t - S'_tᵀ k_t)ᵀ,   o_t = scale * S_tᵀ q_t
                                                                                           (arXiv 2412.06464)

    q and k have length 1. Value head j reads key head j // (HV / H). `scale` defaults to K^-0.5. With `cu_seqlens`
    (B = 1) the time axis holds N packed sequences, each on its own.

    Shapes:  q, k: [B, T, H, K];  v, o: [B, T, HV, V], of one dtype;  log_decay (at most 0), beta: [B, T, HV]
             states: [B, HV, K, V] or [N, HV, K, V], float32 (float64 for float64);  cu_seqlens: [N + 1]

    Raises:
        HeddleError: "bad-argument" for shapes or dtypes that do not fit.
    """
    gates = {"log_decay": log_decay, "beta": beta}
    check_inputs("gated_delta_rule", q, k, v, gates, state=initial_state, cu_seqlens=cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    wide = wide_dtype(v.dtype)
    initial_state = None if initial_state is None else initial_state.to(wide)
    log_decay, beta = in_dtype(log_decay, wide), in_dtype(beta, wide)
    return _forward_op(q, k, v, log_decay, beta, scale, initial_state, cu_seqlens)  # type: ignore[no-any-return]
