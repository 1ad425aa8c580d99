"""The delta rule: the op and its reference. Its kernels and its torch path are those of gated_delta_rule, without the gate.

Predicted cost for a token and value head: as `gated_delta_rule`.
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
from heddle.kernels.op import Inputs, Shape, Traits, in_dtype, normal, op, register_composite, wide_dtype

try:
    from heddle.kernels._gated_delta_rule_op import run_kernels, step_kernels

    HAS_KERNELS = True
except ImportError:
    HAS_KERNELS = False


def delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of `delta_rule`, token by token in float64; shares nothing with the fast path."""
    q, k = (heads_of_values(x, v) for x in (q, k))
    v, beta = v.double(), beta.double()
    identity = torch.eye(q.shape[3], dtype=torch.float64, device=q.device)

    def update(state: Tensor, key: Tensor, value: Tensor, rate: Tensor) -> Tensor:
        key, rate = key[..., None], rate[..., None, None]
        return (identity - rate * key * key.mT) @ state + rate * key * value[:, :, None, :]

    return walk(update, (q, k, v, beta), scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if delta_rule.choose(q.device, q.dtype, K=q.shape[-1], V=v.shape[-1]) == "triton":
        return run_kernels(q, k, v, None, beta, scale, initial_state, cu_seqlens)
    still = torch.zeros_like(beta)[..., None]
    return chunked(q, k, v, still, beta, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens)


def _step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    if delta_rule.choose(q.device, q.dtype, K=q.shape[-1], V=v.shape[-1]) == "triton":
        return step_kernels(q, k, v, None, beta, state, scale)  # type: ignore[no-any-return]
    return step(q, k, v, torch.zeros_like(beta)[..., None], beta, state, scale)


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor beta"
_forward_op = register_composite(
    "delta_rule",
    f"({_INPUTS}, float scale, Tensor? initial_state, Tensor? cu_seqlens) -> (Tensor, Tensor)",
    _forward,
)
_step_op = register_composite(
    "delta_rule_step", f"({_INPUTS}, Tensor state, float scale) -> (Tensor, Tensor)", _step
)


@out_of_autocast
def delta_rule_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One token of `delta_rule`: its output, and the state after it.

    Shapes:  q, k: [B, 1, H, K];  v, out: [B, 1, HV, V];  beta: [B, 1, HV];  state: [B, HV, K, V], float32

    Raises:
        HeddleError: "bad-argument" as `delta_rule`, or for more than one token.
    """
    check_one_token("delta_rule_step", q)
    check_inputs("delta_rule", q, k, v, {"beta": beta}, state=state)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    wide = wide_dtype(v.dtype)
    return _step_op(q, k, v, in_dtype(beta, wide), in_dtype(state, wide), scale)  # type: ignore[no-any-return]


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    B, T, H, K, V = (shape[letter] for letter in "BTHKV")
    HV = shape.get("HV", H)
    return {
        "q": F.normalize(normal(generator, B, T, H, K), dim=-1),
        "k": F.normalize(normal(generator, B, T, H, K), dim=-1),
        "v": normal(generator, B, T, HV, V),
        "beta": torch.sigmoid(normal(generator, B, T, HV)),
    }


def _draw_timed(shape: Shape, generator: torch.Generator) -> Inputs:
    """Inputs as flash-linear-attention's benchmark draws them."""
    size = (shape["B"], shape["T"], shape.get("HV", shape["H"]))
    uniform = torch.rand(size, generator=generator, device=generator.device, dtype=torch.float64)
    return {**_draw(shape, generator), "beta": torch.sigmoid(uniform)}


_WIDE = {"H": 16, "HV": 16, "K": 128, "V": 128}
_CASES = Traits(
    inputs=_draw,
    timed_inputs=_draw_timed,
    initial_state=draw_state,
    sequence=("q", "k", "v", "beta"),
    rounded=("q", "k", "v"),
    differentiable=("q", "k", "v", "beta"),
    output_like="v",
    test_shapes=({"B": 2, "H": 2, "HV": 4, "K": 16, "V": 16}, {"B": 1, "H": 2, "HV": 2, "K": 24, "V": 40}),
    bench_shapes=tuple({"B": B, "T": T, **_WIDE} for B, T in ((8, 4096), (1, 32768), (1, 131072))),
    decode_shapes=tuple({"B": B, "T": 1, **_WIDE} for B in (1, 32, 256)),
    work=work,
)


def _fits(shape: Shape) -> bool:
    return HAS_KERNELS and fits(shape)


@op(
    delta_rule_reference,
    _CASES,
    kernel=_fits,
    step=delta_rule_step,
    limits=LIMITS,
)
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear attention that corrects what it has stored, and its state at the end.

        S_t = S_(t-1) + beta_t k_t (v_t - S_(t-1)ᵀ k_t)ᵀ,   o_t = scale * S_tᵀ q_t        (arXiv 2102.11174, 2406.06484)

    q and k have length 1; beta lies between 0 and 2. Value head j reads key head j // (HV / H). `scale` defaults to K^-0.5.
    With `cu_seqlens` (B = 1) the time axis holds N packed sequences, each on its own.

    Shapes:  q, k: [B, T, H, K];  v, o: [B, T, HV, V], of one dtype;  beta: [B, T, HV]
             states: [B, HV, K, V] or [N, HV, K, V], float32 (float64 for float64);  cu_seqlens: [N + 1]

    Raises:
        HeddleError: "bad-argument" for shapes or dtypes that do not fit.
    """
    check_inputs("delta_rule", q, k, v, {"beta": beta}, state=initial_state, cu_seqlens=cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    wide = wide_dtype(v.dtype)
    initial_state = None if initial_state is None else initial_state.to(wide)
    return _forward_op(q, k, v, in_dtype(beta, wide), scale, initial_state, cu_seqlens)  # type: ignore[no-any-return]
