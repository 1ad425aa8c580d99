"""Linear attention with a fixed decay per head: the op, its reference and its path in plain torch.

Forward and backward are one computation, a *sweep* over time with operands in different roles:

    out_t = scale Σ_{s ≤ t} λ^(t-s) (a_t · b_s) c_s

    o  = sweep(q, k, v)                dq = sweep(dO, v, k)
    dk = sweep(v, dO, q), reversed     dv = sweep(k, q, dO), reversed

so one kernel does all four. Predicted cost for a token and head (K = V = 128, bfloat16, chunks of 64): 98 kFLOP and
1.0 KB forward, 295 kFLOP and 2.5 KB backward; where a sequence is cut into segments to fill the device, the first pass
over each segment adds 0.5 KB forward and 1 KB backward.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from heddle.errors import HeddleError
from heddle.kernels._decay_attention_torch import CHUNK, step, sweep
from heddle.kernels.common.autocast import out_of_autocast
from heddle.kernels.common.linear_op import (
    LIMITS,
    check_inputs,
    check_one_token,
    draw_state,
    fits,
    register_decaying,
)
from heddle.kernels.common.recurrence import walk
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
    wide_dtype,
)

try:
    from heddle.kernels._decay_attention_bwd import launch_backward
    from heddle.kernels._decay_attention_fwd import launch_forward
    from heddle.kernels.common.decay_step import launch_step

    HAS_KERNELS = True
except ImportError:
    HAS_KERNELS = False


def decay_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of `decay_attention`, token by token in float64; shares nothing with the fast paths."""
    q, k, v, decay = q.double(), k.double(), v.double(), log_decay.double().exp()

    def update(state: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return decay[:, None, None] * state + torch.einsum("bhk,bhv->bhkv", key, value)

    return walk(update, (q, k, v), scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    path = decay_attention.choose(q.device, q.dtype, K=q.shape[-1], V=v.shape[-1])
    if path == "triton":
        return launch_forward(q, k, v, log_decay, scale, initial_state, cu_seqlens)
    return sweep(q, k, v, log_decay, scale=scale, state=initial_state, cu_seqlens=cu_seqlens)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    path = decay_attention.choose(q.device, q.dtype, K=q.shape[-1], V=v.shape[-1])
    if path == "triton":
        return launch_backward(d_out, d_final, q, k, v, log_decay, scale, initial_state, cu_seqlens)
    run = functools.partial(sweep, log_decay=log_decay, scale=scale, cu_seqlens=cu_seqlens)
    d_out = d_out.to(q.dtype)
    before = None if initial_state is None else initial_state.mT
    after = None if d_final is None else d_final.mT
    dq, _ = run(d_out, v, k, state=before)
    dk, _ = run(v, d_out, q, state=after, reverse=True)
    dv, d_initial = run(k, q, d_out, state=d_final, reverse=True)
    return dq, dk, dv, d_initial


def _step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    path = decay_attention.choose(q.device, q.dtype, K=q.shape[-1], V=v.shape[-1])
    run = launch_step if path == "triton" else step
    return run(q, k, v, log_decay, state, scale)


_forward_op, _step_op = register_decaying("decay_attention", _forward, _backward, _step, learned=False)


def _check(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, cu_seqlens: Tensor | None = None
) -> None:
    check_inputs("decay_attention", q, k, v, {}, state=state, cu_seqlens=cu_seqlens, log_decay=log_decay)
    B, T, H, _ = q.shape
    if v.shape[2] != H or log_decay.shape != (H,):
        expected = {"v": (v, (B, T, H, v.shape[3])), "log_decay": (log_decay, (H,))}
        check_shapes("decay_attention", expected)
    if log_decay.requires_grad:
        raise HeddleError(
            "bad-argument",
            "decay_attention: log_decay is fixed and gets no gradient",
            hint="pass log_decay.detach(), or choose a mixer whose gates are learned",
        )


@out_of_autocast
def decay_attention_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token of `decay_attention`: its output, and the state after it.

    Shapes:  q, k: [B, 1, H, K];  v, out: [B, 1, H, V];  state: [B, H, K, V], float32

    Raises:
        HeddleError: "bad-argument" as `decay_attention`, or for more than one token.
    """
    check_one_token("decay_attention_step", q)
    _check(q, k, v, log_decay, state)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _step_op(q, k, v, log_decay, in_dtype(state, wide_dtype(q.dtype)), scale)  # type: ignore[no-any-return]


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    B, T, H, K, V = (shape[letter] for letter in "BTHKV")
    sizes = {"q": K, "k": K, "v": V}
    inputs = {name: normal(generator, B, T, H, size) for name, size in sizes.items()}
    # Lightning attention's geometric table: from a head that forgets within a few tokens to one that remembers for many.
    head = torch.arange(H, dtype=torch.float64, device=generator.device)
    return {**inputs, "log_decay": -torch.exp2(-8.0 * (head + 1.0) / H)}


def _draw_linear(shape: Shape, generator: torch.Generator) -> Inputs:
    # Lightning attention's other table, that of arXiv 2401.04658: the first head never forgets.
    H = shape["H"]
    head = torch.arange(H, dtype=torch.float64, device=generator.device)
    return {**_draw(shape, generator), "log_decay": -8.0 / H * head}


def _draw_retention(shape: Shape, generator: torch.Generator) -> Inputs:
    # The table of arXiv 2307.08621.
    head = torch.arange(shape["H"], dtype=torch.float64, device=generator.device)
    return {**_draw(shape, generator), "log_decay": torch.log1p(-torch.exp2(-5.0 - head))}


def _draw_lasting(shape: Shape, generator: torch.Generator) -> Inputs:
    # Nothing is forgotten, so nothing can be skipped.
    log_decay = torch.zeros(shape["H"], dtype=torch.float64, device=generator.device)
    return {**_draw(shape, generator), "log_decay": log_decay}


def _work(shape: Shape, phase: Phase, element: int) -> Work:
    B, T, H, K, V = (shape[letter] for letter in "BTHKV")
    if phase == "decode":
        return Work(5 * B * H * K * V, B * H * (2 * 4 * K * V + 2 * (K + V) * element))
    sweeps = 1 if phase == "fwd" else 4
    flops = sweeps * 2 * B * T * H * (CHUNK * (K + V) + 2 * K * V)
    # Forward q, k, v, o; backward q, k, v, dO, dq, dk, dv.
    elements = 2 * (K + V) if phase == "fwd" else 2 * (K + V) + 4 * K + 3 * V
    return Work(flops, B * T * H * elements * element)


_LENGTHS = ((1, 4096), (1, 16384), (1, 65536), (8, 4096), (8, 16384))
_LIGHTNING = tuple(
    {"B": B, "T": T, "H": 16, "K": 128, "V": 128} for B, T in ((8, 4096), (1, 32768), (1, 131072))
)
_CASES = Traits(
    inputs=_draw,
    initial_state=draw_state,
    sequence=("q", "k", "v"),
    rounded=("q", "k", "v"),
    differentiable=("q", "k", "v"),
    output_like="v",
    test_shapes=({"B": 2, "H": 3, "K": 16, "V": 16}, {"B": 1, "H": 2, "K": 24, "V": 40}),
    bench_shapes=tuple({"B": B, "T": T, "H": 16, "K": 128, "V": 128} for B, T in _LENGTHS),
    decode_shapes=tuple({"B": B, "T": 1, "H": 16, "K": 128, "V": 128} for B in (1, 64)),
    work=_work,
    variants={
        "lightning": (_draw, _LIGHTNING),
        "lightning_linear": (_draw_linear, _LIGHTNING),
        "retention": (_draw_retention, _LIGHTNING[:2]),
        "linear_attention": (_draw_lasting, _LIGHTNING),
    },
)


def _fits(shape: Shape) -> bool:
    return HAS_KERNELS and fits(shape)


@op(decay_attention_reference, _CASES, kernel=_fits, step=decay_attention_step, limits=LIMITS)
def decay_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal linear attention whose memory fades at a fixed rate per head, and its state at the end.

        S_t = exp(log_decay) S_(t-1) + k_t v_tᵀ,   o_t = scale * S_tᵀ q_t        (arXiv 2307.08621, 2401.04658)

    `scale` defaults to K^-0.5. With `cu_seqlens` (B = 1) the time axis holds N packed sequences, each on its own.

    Shapes:  q, k: [B, T, H, K];  v, o: [B, T, H, V], of one dtype;  log_decay: [H], at most 0, without gradient
             states: [B, H, K, V] or [N, H, K, V], float32 (float64 for float64);  cu_seqlens: [N + 1]

    Raises:
        HeddleError: "bad-argument" for shapes or dtypes that do not fit, or a `log_decay` that wants a gradient.
    """
    _check(q, k, v, log_decay, initial_state, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    initial_state = None if initial_state is None else initial_state.to(wide_dtype(q.dtype))
    return _forward_op(q, k, v, log_decay, scale, initial_state, cu_seqlens)  # type: ignore[no-any-return]
