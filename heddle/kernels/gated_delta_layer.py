"""One token of a whole Gated DeltaNet layer, from its projections to its gated heads: the op and its reference.

On a GPU one kernel (`_gated_delta_layer_step`); elsewhere, and where gradients may be asked for, the ops that a layer calls one
after the other. Predicted cost for a sequence and value head (K = V = 128): 128 KiB of state
and 7 K V FLOP, so the memory bounds it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.errors import HeddleError
from heddle.kernels.causal_conv1d import causal_conv1d
from heddle.kernels.common.linear_op import LIMITS, draw_state, fits
from heddle.kernels.gated_delta_rule import gated_delta_rule_step, work
from heddle.kernels.op import (
    Inputs,
    Phase,
    Shape,
    Traits,
    Work,
    check_shapes,
    check_tensors,
    normal,
    op,
    register_composite,
    wide_dtype,
)

try:
    from heddle.kernels._gated_delta_layer_step import step_kernel

    HAS_KERNELS = True
except ImportError:
    HAS_KERNELS = False

# Of the convolution, in the kernel.
MAX_TAPS = 8
# Under the root of a key's or a query's length.
L2_EPS = 1e-6


def gated_delta_layer_step_reference(
    qkv: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    state: Tensor,
    *,
    eps: float,
    conv_state: Tensor | None = None,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    activation: str | None = "silu",
    qk_norm: str | None = "l2",
    beta_max: float = 1.0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`gated_delta_layer_step` in float64, head by head; shares nothing with the fast path."""
    _, HV, K, V = state.shape
    x, past = qkv[:, 0].double(), None
    H = (x.shape[1] - HV * V) // (2 * K)
    if conv_weight is not None and conv_state is not None:
        window = torch.cat((conv_state.double(), x[:, :, None]), dim=2)
        x, past = (window * conv_weight.double()).sum(2), window[:, :, 1:]
    x = x if conv_bias is None else x + conv_bias.double()
    x = x / (1 + torch.exp(-x)) if activation == "silu" else x
    heads, states = [], []
    for j in range(HV):
        own = j // (HV // H)
        q, k = x[:, own * K : (own + 1) * K], x[:, (H + own) * K : (H + own + 1) * K]
        v = x[:, 2 * H * K + j * V : 2 * H * K + (j + 1) * V]
        if qk_norm == "l2":
            q, k = (side / torch.sqrt((side**2).sum(1, keepdim=True) + 1e-6) for side in (q, k))
        rate = torch.log1p(torch.exp(a[:, 0, j].double() + dt_bias[j].double()))
        faded = torch.exp(-torch.exp(A_log[j].double()) * rate)[:, None, None] * state[:, j].double()
        beta = beta_max / (1 + torch.exp(-b[:, 0, j].double()))
        wrong = v - torch.einsum("nk,nkv->nv", k, faded)
        states.append(faded + torch.einsum("n,nk,nv->nkv", beta, k, wrong))
        o = torch.einsum("nk,nkv->nv", q, states[-1]) * (K**-0.5 if scale is None else scale)
        o = o / torch.sqrt((o**2).mean(1, keepdim=True) + eps) * norm_weight.double()
        gate = z[:, 0, j].double()
        heads.append(o * gate / (1 + torch.exp(-gate)))
    return torch.stack(heads, 1)[:, None], torch.stack(states, 1), past


def _chain(
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
    """The same by one op after the other."""
    _, HV, K, V = state.shape
    wide, past, pending = wide_dtype(qkv.dtype), qkv.new_empty(0), activation
    x = qkv
    if conv_weight is not None:
        inside = activation if conv_bias is None else None
        x, past = causal_conv1d(x, conv_weight, initial_state=conv_state, activation=inside)
        pending = activation if inside is None else None
    x = x if conv_bias is None else x + conv_bias.to(x.dtype)
    x = F.silu(x) if pending == "silu" else x
    values = HV * V
    keys = (x.shape[2] - values) // 2
    sides = zip(torch.split(x, [keys, keys, values], dim=-1), (K, K, V), strict=True)
    q, k, v = (side.reshape(*side.shape[:2], -1, size) for side, size in sides)
    if qk_norm == "l2":
        q, k = (_unit(side) for side in (q, k))
    log_decay = -torch.exp(A_log.to(wide)) * F.softplus(a.to(wide) + dt_bias)
    beta = torch.sigmoid(b.to(wide)) * beta_max
    o, new_state = gated_delta_rule_step(q, k, v, log_decay, beta, state, scale=scale)
    y = o.to(wide)
    y = y * torch.rsqrt(y.square().mean(dim=-1, keepdim=True) + eps)
    return (y * norm_weight).to(o.dtype) * F.silu(z), new_state, past


def _unit(x: Tensor) -> Tensor:
    y = x.to(wide_dtype(x.dtype))
    return (y * torch.rsqrt(y.square().sum(dim=-1, keepdim=True) + L2_EPS)).to(x.dtype)


def _step(
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
    learned = (qkv, z, a, b, A_log, dt_bias, norm_weight, state, conv_state, conv_weight, conv_bias)
    given = (*learned, activation, qk_norm, beta_max, scale, eps)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in learned):
        return _chain(*given)
    taps = 0 if conv_weight is None else conv_weight.shape[1]
    sizes = {"K": state.shape[2], "V": state.shape[3], "W": taps}
    path = gated_delta_layer_step.choose(qkv.device, qkv.dtype, **sizes)
    return (step_kernel if path == "triton" else _chain)(*given)


_INPUTS = (
    "Tensor qkv, Tensor z, Tensor a, Tensor b, Tensor A_log, Tensor dt_bias, Tensor norm_weight, Tensor state, "
    "Tensor? conv_state, Tensor? conv_weight, Tensor? conv_bias"
)
_step_op = register_composite(
    "gated_delta_layer_step",
    f"({_INPUTS}, str? activation, str? qk_norm, float beta_max, float scale, float eps) -> (Tensor, Tensor, Tensor)",
    _step,
)


def _fits(shape: Shape) -> bool:
    return HAS_KERNELS and fits(shape) and shape["W"] <= MAX_TAPS


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    B, H, K, V, W = (shape[letter] for letter in "BHKVW")
    HV = shape.get("HV", H)
    channels = 2 * H * K + HV * V
    return {
        "qkv": normal(generator, B, 1, channels),
        "z": normal(generator, B, 1, HV, V),
        "a": normal(generator, B, 1, HV),
        "b": normal(generator, B, 1, HV),
        # exp(A_log) from 0.01 to 16, and steps from 1e-3 to 1 before `a` is added.
        "A_log": torch.linspace(-4.6, 2.8, HV, dtype=torch.float64, device=generator.device),
        "dt_bias": 3.0 * torch.rand(HV, generator=generator, device=generator.device).double() - 5.0,
        "norm_weight": 1.0 + 0.2 * normal(generator, V),
        "conv_state": normal(generator, B, channels, W - 1),
        "conv_weight": 0.5 * normal(generator, channels, W),
    }


def _work(shape: Shape, phase: Phase, element: int) -> Work:
    """What the rule must do for a token: all else is small beside the state."""
    B, H, K, V, W = (shape[letter] for letter in "BHKVW")
    HV = shape.get("HV", H)
    rule, channels = work(shape, phase, element), 2 * H * K + HV * V
    around = B * (channels * (1 + 2 * (W - 1)) + 2 * HV * V) + channels * W
    return Work(rule.flops + B * (2 * W * channels + 8 * HV * V), rule.bytes + around * element)


_CASES = Traits(
    inputs=_draw,
    initial_state=draw_state,
    sequence=(),
    rounded=("qkv", "z", "a", "b", "norm_weight", "conv_state", "conv_weight"),
    differentiable=("qkv", "z", "a", "b", "A_log", "dt_bias", "norm_weight", "conv_weight"),
    output_like="z",
    test_shapes=(
        {"B": 2, "H": 2, "HV": 4, "K": 16, "V": 16, "W": 4},
        {"B": 3, "H": 1, "HV": 3, "K": 24, "V": 40, "W": 3},
    ),
    decode_shapes=tuple(
        {"B": B, "T": 1, "H": 16, "HV": 16, "K": 128, "V": 128, "W": 4} for B in (1, 32, 256)
    ),
    work=_work,
    numbers=lambda _: {"eps": 1e-6},
)


def _check(qkv: Tensor, state: Tensor, given: dict[str, Tensor | None]) -> None:
    """Raises "bad-argument" for what does not fit; `given`: the other tensors by name."""
    name = "gated_delta_layer_step"
    if qkv.dim() != 3 or qkv.shape[1] != 1 or state.dim() != 4:
        found = f"{list(qkv.shape)} and {list(state.shape)}"
        raise HeddleError("bad-argument", f"{name}: qkv must be [B, 1, C], state [B, HV, K, V]; got {found}")
    (B, _, C), (_, HV, K, V) = qkv.shape, state.shape
    H, rest = divmod(C - HV * V, 2 * K)
    if H < 1 or rest or HV % H:
        what = f"{C} channels are not 2 H {K} + {HV} {V} with H that divides {HV}"
        raise HeddleError("bad-argument", f"{name}: qkv and state do not fit: {what}")
    weight, past = given["conv_weight"], given["conv_state"]
    if (weight is None) != (past is None):
        raise HeddleError("bad-argument", f"{name}: conv_state and conv_weight come together")
    taps = weight.shape[-1] if weight is not None else 1
    shapes = {
        "state": (state, (B, HV, K, V)),
        "z": (given["z"], (B, 1, HV, V)),
        **{one: (given[one], (B, 1, HV)) for one in ("a", "b")},
        **{one: (given[one], (HV,)) for one in ("A_log", "dt_bias")},
        "norm_weight": (given["norm_weight"], (V,)),
        "conv_weight": (weight, (C, taps)),
        "conv_state": (past, (B, C, taps - 1)),
        "conv_bias": (given["conv_bias"], (C,)),
    }
    check_shapes(name, shapes)
    floats = {argument: x for argument, x in given.items() if argument != "z"}
    check_tensors(name, {"qkv": qkv, "z": given["z"]}, floats={**floats, "state": state})


def _check_choices(activation: str | None, qk_norm: str | None) -> None:
    for argument, found, known in (("activation", activation, "silu"), ("qk_norm", qk_norm, "l2")):
        if found not in (None, known):
            what = f"gated_delta_layer_step: no {argument} {found!r}"
            raise HeddleError("bad-argument", what, hint=f'"{known}" or None')


@op(gated_delta_layer_step_reference, _CASES, kernel=_fits, limits=f"{LIMITS}, W up to {MAX_TAPS}")
def gated_delta_layer_step(
    qkv: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    state: Tensor,
    *,
    eps: float,
    conv_state: Tensor | None = None,
    conv_weight: Tensor | None = None,
    conv_bias: Tensor | None = None,
    activation: str | None = "silu",
    qk_norm: str | None = "l2",
    beta_max: float = 1.0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One token of a Gated DeltaNet layer: the gated heads, the state after it, and the convolution's state.

        q, k, v = activation(Σ_i weight_i x_(t-W+1+i) + bias), x = qkv;   q and k then of length 1
        S' = exp(-exp(A_log) softplus(a + dt_bias)) S,   S = S' + β k (v - S'ᵀ k)ᵀ,   β = beta_max sigmoid(b)
        o = scale Sᵀ q,   out = norm_weight * o / sqrt(mean(o²) + eps) * silu(z)                 (arXiv 2412.06464)

    Rows of `qkv` and of the convolution stand in the order q, k, v. Value head j reads key head j // (HV / H). Without
    `conv_weight` there is no convolution; `activation` and `qk_norm` may be None. `scale` defaults to K^-0.5. States come in
    new memory, what is given stays as it is. Where a gradient may be asked for, the ops of the layer run one by one.

    Shapes:  qkv: [B, 1, 2 H K + HV V];  z, out: [B, 1, HV, V], of one dtype;  a, b: [B, 1, HV];  A_log, dt_bias: [HV]
             norm_weight: [V];  state: [B, HV, K, V], float32 (float64 for float64)
             conv_state: [B, C, W-1], of the dtype of qkv, oldest first;  conv_weight: [C, W];  conv_bias: [C]

    Raises:
        HeddleError: "bad-argument" for shapes or dtypes that do not fit, more than one token, or an unknown choice.
    """
    others = {"z": z, "a": a, "b": b, "A_log": A_log, "dt_bias": dt_bias, "norm_weight": norm_weight}
    conv = {"conv_state": conv_state, "conv_weight": conv_weight, "conv_bias": conv_bias}
    _check(qkv, state, {**others, **conv})
    _check_choices(activation, qk_norm)
    scale = state.shape[2] ** -0.5 if scale is None else scale
    wide = wide_dtype(qkv.dtype)
    past = None if conv_state is None else conv_state.to(qkv.dtype)
    tensors = (qkv, z, a, b, A_log.to(wide), dt_bias.to(wide), norm_weight, state.to(wide), past)
    out, new_state, new_past = _step_op(
        *tensors, conv_weight, conv_bias, activation, qk_norm, beta_max, scale, eps
    )
    return out, new_state, None if conv_state is None else new_past
