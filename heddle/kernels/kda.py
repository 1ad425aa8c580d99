"""Kimi Delta Attention, the delta rule with a decay of each key channel: the op and its reference.

Its torch path is that of gated_delta_rule. Its kernels (`_kda_fwd`) were held to the reference by Triton's interpreter alone: on
a GPU they run when they are asked for, and torch otherwise. Predicted cost for a token and value head (K = V = 128, bfloat16,
chunks of 64): forward 164 kFLOP and the triangular inverse, 3.6 KB.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.kernels._gated_delta_rule_torch import chunked, step
from heddle.kernels.common.autocast import out_of_autocast
from heddle.kernels.common.linear_op import LIMITS, check_inputs, check_one_token, draw_state, fits
from heddle.kernels.common.recurrence import heads_of_values, walk
from heddle.kernels.gated_delta_rule import work
from heddle.kernels.op import (
    Inputs,
    Phase,
    Shape,
    Traits,
    Work,
    check_shapes,
    in_dtype,
    normal,
    op,
    register_composite,
    wide_dtype,
)

try:
    from heddle.kernels._kda_op import forward_kernels, step_kernels

    HAS_KERNELS = True
except ImportError:
    HAS_KERNELS = False


def kda_reference(
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
    """The recurrence of `kda`, token by token in float64; shares nothing with the fast path."""
    q, k = (heads_of_values(x, v) for x in (q, k))
    v, decay, beta = v.double(), log_decay.double().exp(), beta.double()

    def update(state: Tensor, key: Tensor, value: Tensor, fade: Tensor, rate: Tensor) -> Tensor:
        state = fade[..., None] * state
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
    if kda.choose(q.device, q.dtype, K=q.shape[-1], V=v.shape[-1]) == "triton":
        return forward_kernels(q, k, v, log_decay, beta, scale, initial_state, cu_seqlens)  # type: ignore[no-any-return]
    return chunked(q, k, v, log_decay, beta, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)


def _step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    if kda.choose(q.device, q.dtype, K=q.shape[-1], V=v.shape[-1]) == "triton":
        return step_kernels(q, k, v, log_decay, beta, state, scale)  # type: ignore[no-any-return]
    return step(q, k, v, log_decay, beta, state, scale)


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor log_decay, Tensor beta"
_forward_op = register_composite(
    "kda",
    f"({_INPUTS}, float scale, Tensor? initial_state, Tensor? cu_seqlens) -> (Tensor, Tensor)",
    _forward,
)
_step_op = register_composite(
    "kda_step", f"({_INPUTS}, Tensor state, float scale) -> (Tensor, Tensor)", _step
)


@out_of_autocast
def kda_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of `kda`: its output, and the state after it.

    Shapes:  q, k: [B, 1, H, K];  v, out: [B, 1, HV, V];  log_decay: [B, 1, HV, K];  beta: [B, 1, HV]
             state: [B, HV, K, V], float32

    Raises:
        HeddleError: "bad-argument" as `kda`, or for more than one token.
    """
    check_one_token("kda_step", q)
    _check(q, k, v, log_decay, beta, state=state)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    wide = wide_dtype(v.dtype)
    log_decay, beta = in_dtype(log_decay, wide), in_dtype(beta, wide)
    return _step_op(q, k, v, log_decay, beta, in_dtype(state, wide), scale)  # type: ignore[no-any-return]


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    state: Tensor | None,
    cu_seqlens: Tensor | None = None,
) -> None:
    gates = {"beta": beta}
    check_inputs("kda", q, k, v, gates, state=state, cu_seqlens=cu_seqlens, log_decay=log_decay)
    channels = (*v.shape[:3], q.shape[3])
    if log_decay.shape != channels:
        check_shapes("kda", {"log_decay": (log_decay, channels)})


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    B, T, H, K, V = (shape[letter] for letter in "BTHKV")
    HV = shape.get("HV", H)
    return {
        "q": F.normalize(normal(generator, B, T, H, K), dim=-1),
        "k": F.normalize(normal(generator, B, T, H, K), dim=-1),
        "v": normal(generator, B, T, HV, V),
        # From channels that forget at once to some that keep everything.
        "log_decay": -F.softplus(4.0 * normal(generator, B, T, HV, K) - 4.0),
        "beta": torch.sigmoid(normal(generator, B, T, HV)),
    }


def _draw_timed(shape: Shape, generator: torch.Generator) -> Inputs:
    """Inputs as flash-linear-attention's benchmark draws them."""
    size = (shape["B"], shape["T"], shape.get("HV", shape["H"]))
    log_decay = F.logsigmoid(normal(generator, *size, shape["K"]) + 4.0)
    uniform = torch.rand(size, generator=generator, device=generator.device, dtype=torch.float64)
    return {**_draw(shape, generator), "log_decay": log_decay, "beta": torch.sigmoid(uniform)}


def _work(shape: Shape, phase: Phase, element: int) -> Work:
    """What gated_delta_rule must do, with a decay of each channel."""
    least = work(shape, phase, element)
    decays = shape["B"] * shape["T"] * shape.get("HV", shape["H"]) * (shape["K"] - 1) * 4
    return Work(least.flops, least.bytes + decays * {"fwd": 1, "fwdbwd": 3}.get(phase, 1))


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
    bench_shapes=tuple({"B": B, "T": T, **_WIDE} for B, T in ((8, 4096), (1, 32768))),
    decode_shapes=tuple({"B": B, "T": 1, **_WIDE} for B in (1, 64)),
    work=_work,
)


def _fits(shape: Shape) -> bool:
    return HAS_KERNELS and fits(shape)


@op(kda_reference, _CASES, kernel=_fits, step=kda_step, limits=LIMITS)
def kda(
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
    """Linear attention that fades by a gate of each channel and corrects what it has stored, and its state at the end.

        S'_t = diag(exp(log_decay_t)) S_(t-1),   S_t = S'_t + beta_t k_t (v_t - S'_tᵀ k_t)ᵀ,   o_t = scale * S_tᵀ q_t
                                                                                           (arXiv 2510.26692)

    q and k have length 1. Value head j reads key head j // (HV / H). `scale` defaults to K^-0.5. With `cu_seqlens`
    (B = 1) the time axis holds N packed sequences, each on its own. What later tokens of the same chunk say may change how an
    output is rounded.

    Shapes:  q, k: [B, T, H, K];  v, o: [B, T, HV, V], of one dtype;  log_decay (at most 0): [B, T, HV, K];  beta: [B, T, HV]
             states: [B, HV, K, V] or [N, HV, K, V], float32 (float64 for float64);  cu_seqlens: [N + 1]

    Raises:
        HeddleError: "bad-argument" for shapes or dtypes that do not fit.
    """
    _check(q, k, v, log_decay, beta, state=initial_state, cu_seqlens=cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    wide = wide_dtype(v.dtype)
    initial_state = None if initial_state is None else initial_state.to(wide)
    log_decay, beta = in_dtype(log_decay, wide), in_dtype(beta, wide)
    return _forward_op(q, k, v, log_decay, beta, scale, initial_state, cu_seqlens)  # type: ignore[no-any-return]
