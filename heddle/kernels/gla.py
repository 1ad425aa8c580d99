"""Gated linear attention, whose memory fades by a gate of each key channel: the op and its reference.

Predicted cost for a token and value head (K = V = 128, bfloat16, chunks of 64): 98 kFLOP and 1.5 KB forward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.kernels._gla_torch import CHUNK, chunked, step
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
    from heddle.kernels._gla_launch import KEPT, launch_backward, launch_forward, prepared_like
    from heddle.kernels.common.decay_step import launch_step

    forward_kernels, step_kernels = register_decaying(
        "gla_kernels",
        launch_forward,
        launch_backward,
        launch_step,
        learned=True,
        kept=KEPT,
        kept_like=prepared_like,
    )
    HAS_KERNELS = True
except ImportError:
    HAS_KERNELS = False


def gla_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of `gla`, token by token in float64; shares nothing with the fast path."""
    q, k, log_decay = (heads_of_values(x, v) for x in (q, k, log_decay))
    v, decay = v.double(), log_decay.exp()

    def update(state: Tensor, key: Tensor, value: Tensor, fade: Tensor) -> Tensor:
        return fade[..., None] * state + torch.einsum("bhk,bhv->bhkv", key, value)

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
    path = gla.choose(q.device, q.dtype, K=q.shape[-1], V=v.shape[-1])
    if path == "triton":
        out, final, *_ = forward_kernels(q, k, v, log_decay, scale, initial_state, cu_seqlens)
        return out, final
    return chunked(q, k, v, log_decay, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)


def _step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    path = gla.choose(q.device, q.dtype, K=q.shape[-1], V=v.shape[-1])
    if path == "triton":
        return step_kernels(q, k, v, log_decay, state, scale)  # type: ignore[no-any-return]
    return step(q, k, v, log_decay, state, scale)


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor log_decay"
_forward_op = register_composite(
    "gla",
    f"({_INPUTS}, float scale, Tensor? initial_state, Tensor? cu_seqlens) -> (Tensor, Tensor)",
    _forward,
)
_step_op = register_composite(
    "gla_step", f"({_INPUTS}, Tensor state, float scale) -> (Tensor, Tensor)", _step
)


@out_of_autocast
def gla_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token of `gla`: its output, and the state after it.

    Shapes:  q, k, log_decay: [B, 1, H, K];  v, out: [B, 1, HV, V];  state: [B, HV, K, V], float32

    Raises:
        HeddleError: "bad-argument" as `gla`, or for more than one token.
    """
    check_one_token("gla_step", q)
    _check(q, k, v, log_decay, state)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    wide = wide_dtype(v.dtype)
    return _step_op(q, k, v, in_dtype(log_decay, wide), in_dtype(state, wide), scale)  # type: ignore[no-any-return]


def _check(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, cu_seqlens: Tensor | None = None
) -> None:
    check_inputs("gla", q, k, v, {}, state=state, cu_seqlens=cu_seqlens, log_decay=log_decay)
    if log_decay.shape != q.shape:
        check_shapes("gla", {"log_decay": (log_decay, q.shape)})


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    B, T, H, K, V = (shape[letter] for letter in "BTHKV")
    return {
        "q": normal(generator, B, T, H, K),
        "k": F.normalize(normal(generator, B, T, H, K), dim=-1),
        "v": normal(generator, B, T, shape.get("HV", H), V),
        # From channels that forget at once to some that keep everything.
        "log_decay": -F.softplus(4.0 * normal(generator, B, T, H, K) - 4.0),
    }


def _draw_timed(shape: Shape, generator: torch.Generator) -> Inputs:
    """Inputs as flash-linear-attention's benchmark draws them."""
    B, T, H, K = (shape[letter] for letter in "BTHK")
    return {**_draw(shape, generator), "log_decay": F.logsigmoid(normal(generator, B, T, H, K) + 4.0)}


def _draw_hgrn2(shape: Shape, generator: torch.Generator) -> Inputs:
    # As its layer calls the op: keys are what the gates let go.
    inputs = _draw_timed(shape, generator)
    return {**inputs, "q": F.silu(inputs["q"]), "k": -torch.expm1(inputs["log_decay"])}


def _draw_hgrn2_first(shape: Shape, generator: torch.Generator) -> Inputs:
    # The first layer of an untrained model has no lower bound: a channel forgets half in a token.
    inputs = _draw_hgrn2(shape, generator)
    log_decay = F.logsigmoid(normal(generator, *inputs["log_decay"].shape))
    return {**inputs, "k": -torch.expm1(log_decay), "log_decay": log_decay}


def _work(shape: Shape, phase: Phase, element: int) -> Work:
    B, T, H, K, V = (shape[letter] for letter in "BTHKV")
    HV = shape.get("HV", H)
    if phase == "decode":
        return Work(5 * B * HV * K * V, B * HV * 2 * 4 * K * V)
    sweeps = 1 if phase == "fwd" else 4
    flops = sweeps * 2 * B * T * HV * (CHUNK * (K + V) + 2 * K * V)
    rows = B * T * (2 * H * K + 2 * HV * V) * element + B * T * H * K * 4
    if phase == "fwd":
        return Work(flops, rows)
    return Work(flops, rows + B * T * (4 * H * K + 3 * HV * V) * element + B * T * H * K * 8)


_WIDE = {"H": 16, "HV": 16, "K": 128, "V": 128}
_TIMED = tuple({"B": B, "T": T, **_WIDE} for B, T in ((8, 4096), (1, 32768)))
_CASES = Traits(
    inputs=_draw,
    timed_inputs=_draw_timed,
    initial_state=draw_state,
    sequence=("q", "k", "v", "log_decay"),
    rounded=("q", "k", "v"),
    differentiable=("q", "k", "v", "log_decay"),
    output_like="v",
    test_shapes=({"B": 2, "H": 2, "HV": 4, "K": 16, "V": 16}, {"B": 1, "H": 2, "HV": 2, "K": 24, "V": 40}),
    bench_shapes=_TIMED,
    decode_shapes=tuple({"B": B, "T": 1, **_WIDE} for B in (1, 64)),
    work=_work,
    variants={"hgrn2": (_draw_hgrn2, _TIMED), "hgrn2_first_layer": (_draw_hgrn2_first, _TIMED)},
)


def _fits(shape: Shape) -> bool:
    return HAS_KERNELS and fits(shape)


@op(gla_reference, _CASES, kernel=_fits, step=gla_step, limits=LIMITS)
def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal linear attention whose memory fades by a gate of each token and key channel, and its state at the end.

        S_t = diag(exp(log_decay_t)) S_(t-1) + k_t v_tᵀ,   o_t = scale * S_tᵀ q_t        (arXiv 2312.06635)

    Value head j reads key head j // (HV / H). `scale` defaults to K^-0.5. With `cu_seqlens` (B = 1) the time axis holds
    N packed sequences, each on its own. What later tokens of the same chunk say may change how an output is rounded.

    Shapes:  q, k, log_decay: [B, T, H, K];  v, o: [B, T, HV, V];  q, k, v of one dtype;  log_decay at most 0
             states: [B, HV, K, V] or [N, HV, K, V], float32 (float64 for float64);  cu_seqlens: [N + 1]

    Raises:
        HeddleError: "bad-argument" for shapes or dtypes that do not fit.
    """
    _check(q, k, v, log_decay, initial_state, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    wide = wide_dtype(v.dtype)
    initial_state = None if initial_state is None else initial_state.to(wide)
    return _forward_op(q, k, v, in_dtype(log_decay, wide), scale, initial_state, cu_seqlens)  # type: ignore[no-any-return]
