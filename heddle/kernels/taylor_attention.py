"""Linear attention whose weights are exp to the second order (Based): the op, its reference, its paths.

Predicted cost for a token and head (K = 16, V = 128, bfloat16, segments of 512): 270 kFLOP and 0.6 KB forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.kernels._taylor_attention_torch import (
    feature_count,
    gathered,
    normed,
    remembered,
    spread,
    taylor2,
)
from heddle.kernels.common.autocast import out_of_autocast
from heddle.kernels.common.linear_op import check_inputs, check_one_token
from heddle.kernels.op import (
    Inputs,
    Phase,
    Shape,
    Traits,
    Work,
    check_shapes,
    check_tensors,
    in_dtype,
    normal,
    op,
    register_composite,
    wide_dtype,
)

try:
    from heddle.kernels._taylor_attention_launch import SIZE
    from heddle.kernels._taylor_attention_op import kernels

    HAS_KERNELS = True
except ImportError:
    HAS_KERNELS = False

__all__ = [
    "feature_count",
    "normed",
    "taylor2",
    "taylor_attention",
    "taylor_attention_reference",
    "taylor_attention_step",
]

# Dimensions of a query and of a value, in the kernels.
MOST_DIMENSIONS, MAX_VALUE_SIZE = 16, 256


def taylor_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    weight: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`taylor_attention` in float64, sequence by sequence with all weights at once; shares nothing with the fast paths."""
    q, k, v = (x.double() for x in (q, k, v))
    ends = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    written = torch.ones_like(q[:, :, 0, 0]) if weight is None else weight.double()
    outs, states = [], []
    for number, (begin, end) in enumerate(pairwise(ends)):
        rows = slice(None) if cu_seqlens is None else slice(number, number + 1)
        past = None if initial_state is None else initial_state[rows].double()
        out, state = _one_sequence([x[:, begin:end] for x in (q, k, v)], written[:, begin:end], past)
        outs.append(out)
        states.append(state)
    return torch.cat(outs, dim=1), torch.cat(states)


def _one_sequence(sides: Sequence[Tensor], written: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v = sides
    size = q.shape[-1]
    values = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1) * written[:, :, None, None]
    first, second = torch.triu_indices(size, size, device=q.device)
    root = (1.0 - 0.5 * (first == second).double()).sqrt() * size**-0.5

    def products(x: Tensor) -> Tensor:
        return torch.cat(
            (torch.ones_like(x[..., :1]), x * size**-0.25, root * x[..., first] * x[..., second]), -1
        )

    y = torch.einsum("bthk,bshk->bhts", q, k) * size**-0.5
    sums = torch.einsum("bhts,bshv->bthv", (1 + y + y**2 / 2).tril(), values)
    state = torch.einsum("bshf,bshv->bhfv", products(k), values)
    if past is not None:
        sums = sums + torch.einsum("bthf,bhfv->bthv", products(q), past)
        state = state + past
    # Where nothing is written yet both sums are 0.
    return sums[..., :-1] / (sums[..., -1:] + (sums[..., -1:] == 0).double()), state


def _dispatch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    size = q.shape[3]
    # Kernels make no gradient of weights.
    is_learned = weight is not None and weight.requires_grad and torch.is_grad_enabled()
    if is_learned or taylor_attention.choose(q.device, q.dtype, K=size, V=v.shape[3]) == "torch":
        return remembered(q, k, v, weight, initial_state, cu_seqlens)
    q, k = (F.pad(x, (0, SIZE - size)) if size < SIZE else x for x in (q, k))
    past = None if initial_state is None else spread(initial_state, size, SIZE)
    out, last = kernels(q, k, v, weight, size**-0.5, past, cu_seqlens)[:2]
    last = gathered(last, size, SIZE)
    if cu_seqlens is not None and initial_state is not None:
        # There and back is not the same to the bit.
        last = torch.where((cu_seqlens.diff() == 0)[:, None, None, None], initial_state, last)
    return out, last


_op = register_composite(
    "taylor_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? weight, Tensor? initial_state, Tensor? cu_seqlens) -> (Tensor, Tensor)",
    _dispatch,
)


@out_of_autocast
def taylor_attention_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token of `taylor_attention`: its output, and the state after it.

    Shapes:  q, k: [B, 1, H, K];  v, out: [B, 1, H, V];  weight: [B, 1];  state: [B, H, F, V + 1], float32

    Raises:
        HeddleError: "bad-argument" as `taylor_attention`, or for more than one token.
    """
    check_one_token("taylor_attention_step", q)
    _check(q, k, v, weight, state, None)
    return remembered(q, k, v, weight, in_dtype(state, wide_dtype(q.dtype)), None, one_token=True)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    name = "taylor_attention"
    check_inputs(name, q, k, v, {}, state=None, cu_seqlens=cu_seqlens)
    (B, T, H, K), V = q.shape, v.shape[3]
    count = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    features = (count, H, feature_count(K), V + 1)
    check_shapes(name, {"v": (v, (B, T, H, V)), "weight": (weight, (B, T)), "state": (state, features)})
    floats = {"weight": weight, "state": state}
    check_tensors(name, {"q": q, "k": k, "v": v}, floats=floats, integers={"cu_seqlens": cu_seqlens})


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    B, T, H, K, V = (shape[letter] for letter in "BTHKV")
    sides = {name: normal(generator, B, T, H, K) for name in ("q", "k")}
    return {**sides, "v": normal(generator, B, T, H, V)}


def _draw_state(shape: Shape, generator: torch.Generator) -> Tensor:
    """What some tokens leave, so that sums of weights are above 0."""
    drawn = _draw({**shape, "T": 5}, generator)
    none = {name: x for name, x in drawn.items() if name != "q"}
    return taylor_attention_reference(drawn["q"], **none)[1]


def _work(shape: Shape, phase: Phase, element: int) -> Work:
    """A memory of F x V that each token writes and reads, three times as much for gradients; inputs and outputs once."""
    B, T, H, K, V = (shape[letter] for letter in "BTHKV")
    state = feature_count(K) * (V + 1)
    if phase.startswith("decode"):
        return Work(4 * B * H * state, B * H * (8 * state + 2 * (K + V) * element))
    times, more = (3, 2) if phase == "fwdbwd" else (1, 0)
    return Work(times * 4 * B * T * H * state, (1 + more) * 2 * B * T * H * (K + V) * element)


# Sixteen dimensions are all that the chunks of flash-linear-attention take.
_SHAPES = tuple({"B": B, "T": T, "H": 16, "K": 16, "V": 128} for B, T in ((8, 4096), (1, 32768)))
_CASES = Traits(
    inputs=_draw,
    initial_state=_draw_state,
    sequence=("q", "k", "v"),
    rounded=("q", "k", "v"),
    differentiable=("q", "k", "v"),
    output_like="v",
    test_shapes=({"B": 2, "H": 2, "K": 16, "V": 24}, {"B": 1, "H": 2, "K": 9, "V": 16}),
    bench_shapes=_SHAPES,
    decode_shapes=tuple({**_SHAPES[1], "B": B, "T": 1} for B in (1, 64)),
    # Beside the other function for it that flash-linear-attention has.
    variants={"taylor_attention_chunks": (_draw, _SHAPES)},
    work=_work,
)


def _fits(shape: Shape) -> bool:
    return HAS_KERNELS and shape["K"] <= MOST_DIMENSIONS and shape["V"] <= MAX_VALUE_SIZE


_LIMITS = f"K up to {MOST_DIMENSIONS} and V up to {MAX_VALUE_SIZE}"


@op(
    taylor_attention_reference,
    _CASES,
    kernel=_fits,
    step=taylor_attention_step,
    # No GPU has held them since states have two parts in bfloat16, and float16 other launches.
    unproven=(torch.bfloat16, torch.float16, torch.float32),
    limits=_LIMITS,
)
def taylor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    weight: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal linear attention with the weights 1 + y + y² / 2, which sum to one, and its state at the end.

        o_t = Σ_(s ≤ t) f_ts w_s v_s / Σ_(s ≤ t) f_ts w_s,   f = 1 + y + y² / 2,   y = q · k / sqrt(K)      (arXiv 2402.18668)

    A state is S = Σ_s φ(k_s) w_s [v_s; 1]ᵀ over the features φ of `taylor2`. A token of `weight` w 0 is not there for later
    ones; where w wants a gradient, features run. An output without any weight is 0. With `cu_seqlens` (B = 1) the time axis
    holds N packed sequences.

    Shapes:  q, k: [B, T, H, K];  v, o: [B, T, H, V], of one dtype;  weight: [B, T];  cu_seqlens: [N + 1]
             states: [B, H, F, V + 1] or [N, H, F, V + 1], F = (K + 1)(K + 2) / 2, float32 (float64 for float64)

    Raises:
        HeddleError: "bad-argument" for shapes or dtypes that do not fit.
    """
    _check(q, k, v, weight, initial_state, cu_seqlens)
    initial_state = None if initial_state is None else initial_state.to(wide_dtype(q.dtype))
    return _op(q, k, v, weight, initial_state, cu_seqlens)  # type: ignore[no-any-return]
