"""Softmax attention that fits a line where softmax takes a mean: local linear attention, its solver-free relative, and their
reference.

In plain torch, which solves by Cholesky, or by kernels, which solve by conjugate gradients. It has no state of its own: a
decode step is a call with one query and all keys. Necessary work for a query and key of size d, in FLOPs: 10 d + 2 d² with the
solve by Cholesky, 10 d + 6 d a step (10 d in half precision) with the other, 8 d without a solve.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from heddle.errors import HeddleError
from heddle.kernels._local_linear_torch import Form, Given, backward, forward
from heddle.kernels.common.layout import room
from heddle.kernels.common.varlen import check_packing, each_alone, known_lengths
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
    register,
)

try:
    from heddle.kernels._local_linear_launch import WIDEST, Slopes, launch_backward, launch_forward

    HAS_KERNELS = True
except ImportError:
    HAS_KERNELS, WIDEST = False, 0

# Of all rows, which stand on the second axis of grids: CUDA has no longer one.
MOST_HEADS = 65_535


def local_linear_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    slope: Tensor | None = None,
    ridge: float = 10.0,
    scale: float | None = None,
    window: int | None = None,
    real: Tensor | None = None,
    written: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`local_linear_attention` in float64 in the paper's uncentred form, with all weights at once; shares nothing with it."""
    group, (T, S), size = q.shape[1] // k.shape[1], (q.shape[2], k.shape[2]), q.shape[-1]
    q, k, v = q.double(), *(x.double().repeat_interleave(group, dim=1) for x in (k, v))
    place = torch.arange(S - T, S)[:, None] - torch.arange(S)
    seen = (place >= 0) & (place < (window or S))
    for limit in (real, written):
        seen = seen if limit is None else seen & (limit[:, None, None] > 0.5)
    if cu_seqlens is not None:
        sequence = (torch.arange(S)[:, None] >= cu_seqlens).sum(-1)
        seen = seen & (sequence[:, None] == sequence)
    logits = torch.einsum("bhtd,bhsd->bhts", q, k) * (size**-0.5 if scale is None else scale)
    if written is not None:
        # A bias of nothing, whose slope is that of a weight.
        logits = logits + ((written - written.detach())[:, None, None] * (place != 0))
    logits = logits.masked_fill(~(seen | (place == 0)), -torch.inf)
    weight = torch.exp(logits - logits.amax(-1, keepdim=True))
    total = weight.sum(-1)
    if slope is not None:
        p = weight / total[..., None]
        key, value = p @ k, p @ v
        both = torch.einsum("bhts,bhsv,bhsd->bhtvd", p, v, k) - value[..., None] * key[..., None, :]
        return value - torch.einsum("bhtvd,bhtd->bhtv", both, slope.double())
    z = k[:, :, None] - q[:, :, :, None]
    mean = torch.einsum("bhts,bhtsd->bhtd", weight, z)
    moment = torch.einsum("bhts,bhtsd,bhtse->bhtde", weight, z, z)
    moment = moment + ridge * total[..., None, None] * torch.eye(size, dtype=z.dtype)
    rho = torch.linalg.solve(moment, mean)
    share = weight * (1 - torch.einsum("bhtsd,bhtd->bhts", z, rho))
    out: Tensor = (share / (total - (mean * rho).sum(-1))[..., None]) @ v
    return out


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? slope, Tensor? real, Tensor? written"
_INPUTS = f"{_TENSORS}, float scale, float ridge, int? window"


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor | None,
    real: Tensor | None,
    written: Tensor | None,
    scale: float,
    ridge: float,
    window: int | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if local_linear_attention.choose(q.device, q.dtype, **_sizes(q, v)) == "triton":
        out, x = launch_forward(q, k, v, slope, _seen(real, written), (scale, ridge, window))
        return (out, x.parts, x.of_mean) if keep else (out, q.new_empty(0), q.new_empty(0))
    given = Given.of(q, k, v, slope, real, written)
    out = forward(given, Form(scale, ridge, window)).flatten(1, 2).to(v.dtype)
    return out, q.new_empty(0), q.new_empty(0)


def _sizes(q: Tensor, v: Tensor) -> dict[str, int]:
    """What decides between the kernels and plain torch."""
    return {"K": q.shape[3], "V": v.shape[3], "B": q.shape[0], "H": q.shape[1]}


def _seen(real: Tensor | None, written: Tensor | None) -> Tensor | None:
    """Which keys may be seen.  Shapes:  out: [1 or B, S] bool"""
    if written is None:
        return real
    return written > 0.5 if real is None else real & (written > 0.5)


def _like(
    q: Tensor,
    k: Tensor,  # noqa: ARG001
    v: Tensor,
    slope: Tensor | None,  # noqa: ARG001
    real: Tensor | None,  # noqa: ARG001
    written: Tensor | None,  # noqa: ARG001
    scale: float,  # noqa: ARG001
    ridge: float,  # noqa: ARG001
    window: int | None,  # noqa: ARG001
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    out = v.new_empty(*q.shape[:3], v.shape[-1])
    if not keep or local_linear_attention.path(q.device, q.dtype, **_sizes(q, v)) == "torch":
        return out, q.new_empty(0), q.new_empty(0)
    parts = q.new_empty(2 if q.element_size() < 4 else 1, *q.shape[:3], room(q.shape[3], q.device))
    return out, parts, q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor | None,
    real: Tensor | None,
    written: Tensor | None,
    scale: float,
    ridge: float,
    window: int | None,
    parts: Tensor,
    of_mean: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if local_linear_attention.choose(q.device, q.dtype, **_sizes(q, v)) == "triton":
        call = ((q, k, v), slope, _seen(real, written), (scale, ridge, window))
        kept = Slopes(parts, of_mean) if parts.numel() else None
        dq, dk, dv, d_slope, d_seen = launch_backward(d_out, *call, kept)
        d_slope = q.new_empty(0) if d_slope is None else d_slope.to(q.dtype)
        return dq, dk, dv, d_slope, q.new_empty(0) if written is None else d_seen.to(written.dtype)
    given = Given.of(q, k, v, slope, real, written)
    g = d_out.to(given.v.dtype).view(*given.q.shape[:4], v.shape[-1])
    dq, dk, dv, d_slope, d_written = backward(g, given, Form(scale, ridge, window))
    dq, d_slope = dq.flatten(1, 2), d_slope if slope is None else d_slope.flatten(1, 2)
    d_written = d_written if written is None else d_written.to(written.dtype)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), d_slope.to(q.dtype), d_written


def _gradients_like(
    d_out: Tensor,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor | None,
    real: Tensor | None,  # noqa: ARG001
    written: Tensor | None,
    scale: float,  # noqa: ARG001
    ridge: float,  # noqa: ARG001
    window: int | None,  # noqa: ARG001
    parts: Tensor,  # noqa: ARG001
    of_mean: Tensor,  # noqa: ARG001
) -> tuple[Tensor, ...]:
    given = (q, k, v, slope, written)
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in given)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, scale, ridge, window, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.numbers = (scale, ridge, window)


def _gradients(ctx: Any, d_out: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    q, k, v, slope, real, written, *kept = ctx.saved_tensors
    given = (q, k, v, slope, real, written, *ctx.numbers, *kept)
    dq, dk, dv, d_slope, d_written = _backward_op(d_out.contiguous(), *given)
    found = (None if slope is None else d_slope, None, None if written is None else d_written)
    return dq, dk, dv, *found, None, None, None, None


_backward_op = register(
    "local_linear_attention_backward",
    f"(Tensor d_out, {_INPUTS}, Tensor parts, Tensor of_mean) -> ({', '.join(['Tensor'] * 5)})",
    _backward,
    fake=_gradients_like,
)
_forward_op = register(
    "local_linear_attention",
    f"({_INPUTS}, bool keep) -> (Tensor, Tensor, Tensor)",
    _forward,
    fake=_like,
    setup_context=_keep,
    backward=_gradients,
    results=1,
)


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    """T queries at the last places of S keys."""
    B, H, N, T, S, K, V = (shape[name] for name in ("B", "H", "N", "T", "S", "K", "V"))
    return {
        "q": normal(generator, B, H, T, K),
        "k": normal(generator, B, N, S, K),
        "v": normal(generator, B, N, S, V),
    }


def _draw_sloped(shape: Shape, generator: torch.Generator) -> Inputs:
    """The same with a slope in place of the solve."""
    return {**_draw(shape, generator), "slope": normal(generator, *(shape[name] for name in "BHTK")) / 3}


def _work(shape: Shape, phase: Phase, element: int) -> Work:
    """Those two products of softmax attention that a call must have, and of the gradients' five that of the logits anew."""
    B, H, N, T, S, K, V = (shape[name] for name in ("B", "H", "N", "T", "S", "K", "V"))
    seen = T * S - T * (T - 1) // 2
    rows = B * (H * T + N * S) * (K + V) * element
    times, more = (3.5, 2) if phase == "fwdbwd" else (1.0, 0)
    return Work(int(times * 2 * B * H * seen * (K + V)), rows * (1 + more))


_SHAPES = tuple(
    {"B": B, "H": 16, "N": 16, "T": T, "S": T, "K": 128, "V": 128} for B, T in ((8, 4096), (1, 32768))
)
_CASES = Traits(
    inputs=_draw,
    # It has no state.
    initial_state=lambda shape, generator: normal(generator, 0),  # noqa: ARG005
    sequence=("q", "k", "v"),
    rounded=("q", "k", "v", "slope"),
    differentiable=("q", "k", "v", "slope"),
    output_like="q",
    test_shapes=({"B": 2, "H": 4, "N": 2, "T": 37, "S": 53, "K": 16, "V": 24},),
    bench_shapes=_SHAPES,
    work=_work,
    # fla's name for the form with a slope.
    variants={"parallax": (_draw_sloped, _SHAPES)},
)


def _fits(shape: Shape) -> bool:
    heads = shape.get("B", 1) * shape.get("H", 1)
    return HAS_KERNELS and max(shape["K"], shape["V"]) <= WIDEST and heads <= MOST_HEADS


@op(
    local_linear_attention_reference,
    _CASES,
    kernel=_fits,
    unproven=(torch.float32,),
    limits=f"K and V up to {WIDEST}, B times H up to {MOST_HEADS}",
)
def local_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    slope: Tensor | None = None,
    ridge: float = 10.0,
    scale: float | None = None,
    window: int | None = None,
    real: Tensor | None = None,
    written: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The value at the query of the line through the values, least squares weighted by softmax.        (arXiv 2510.01450)

        p_j = softmax_j(scale q · k_j),   kb = E_p[k],   x = (Cov_p(k) + ridge I)⁻¹ (q - kb)
        o = sum_j p_j (1 + (k_j - kb) · x) v_j

    A `slope` r takes the place of the solve, x = -r (Parallax, arXiv 2605.29157). This form divides by no difference; the
    matrix is solved by Cholesky, in float32 with a ridge of no less than rounding needs (4 d eps E_p|k - k_first|²). Gradients
    are those of the exact solution, worked out again block by block: nothing of T x S stands in memory, but d² numbers for
    each of 64 queries. The kernels hold no d² numbers: they go along conjugate gradients until the residual is small, at most
    2 d steps, and keep x for the gradients.

    The T queries stand at the last of the S keys and see those up to their own, `window` of them (None: all), that are `real`
    and `written`; their own always. `scale` defaults to d^-0.5. Query head h reads key head h // (H / N). `written` has the
    gradient of a bias of the logits. Gradients have none of their own. With `cu_seqlens`, S = T tokens hold several sequences
    one behind the other; they are worked on one by one, for which the host waits for the device, and cannot be compiled.

    Shapes:  q, slope: [B, H, T, d];  k: [B, N, S, d];  v: [B, N, S, V];  out: [B, H, T, V];  of one dtype
             real: [1 or B, S] bool;  written: [B, S] of 0 and 1;  cu_seqlens: [sequences + 1] integers, B = 1

    Raises:
        HeddleError: "bad-argument" for shapes, dtypes or numbers that do not fit.
    """
    name = "local_linear_attention"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or not 1 <= q.shape[2] <= k.shape[2]:
        what = "q, k, v must be [B, heads, tokens, *], with at least one query and no more than keys"
        raise HeddleError("bad-argument", f"{name}: {what}")
    (B, H, T, d), (N, S) = q.shape, k.shape[1:3]
    if H % N:
        raise HeddleError("bad-argument", f"{name}: {N} key heads do not divide {H} query heads")
    if ridge <= 0 or (window is not None and window < 1):
        raise HeddleError("bad-argument", f"{name}: ridge {ridge} and window {window} must be positive")
    sides = {"q": q, "k": k, "v": v, "slope": slope}
    check_tensors(name, sides, integers={"cu_seqlens": cu_seqlens}, masks={"real": real, "written": written})
    check_packing(name, B, T, cu_seqlens, keys=S)
    rows = B if real is None else real.shape[0] if real.shape[0] == 1 else B
    expected = {"k": (k, (B, N, S, d)), "v": (v, (B, N, S, v.shape[-1])), "slope": (slope, q.shape)}
    check_shapes(name, {**expected, "real": (real, (rows, S)), "written": (written, (B, S))})
    scale = d**-0.5 if scale is None else scale
    if cu_seqlens is not None:
        alone = functools.partial(local_linear_attention, ridge=ridge, scale=scale, window=window)
        return each_alone(
            alone, {**sides, "real": real, "written": written}, known_lengths(name, cu_seqlens, T)
        )
    graded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, written))
    # What kernels have solved is kept where a backward pass would solve it anew.
    keep = graded and slope is None
    out: Tensor = _forward_op(q, k, v, slope, real, written, scale, ridge, window, keep)[0]
    return out
