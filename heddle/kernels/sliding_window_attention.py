"""Causal softmax attention over a window of keys, and over sinks; and its reference.

The kernels read the keys in view of a tile of queries alone, so that the work grows with length times window. So does that of
plain torch, which makes a copy of the keys for each block of queries. A decode step is a call with one query and the keys so far.
"""

from __future__ import annotations

from itertools import pairwise, product

import torch
from torch import Tensor

from heddle.errors import HeddleError
from heddle.kernels._sliding_window_attention_torch import attend
from heddle.kernels.common.varlen import check_packing
from heddle.kernels.op import (
    Inputs,
    Shape,
    Traits,
    check_shapes,
    check_tensors,
    normal,
    op,
    register_composite,
)

try:
    from heddle.kernels._sliding_window_attention_op import kernels

    HAS_KERNELS = True
except ImportError:
    HAS_KERNELS = False

# Of a key and of a value head, and heads of a group, in the kernels.
MAX_HEAD_SIZE, MAX_GROUP = 256, 64


def sliding_window_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int = 0,
    real: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`sliding_window_attention` in float64, query by query; shares nothing with it."""
    (B, H, T, d), S = q.shape, k.shape[2]
    factor, group = d**-0.5 if scale is None else scale, H // k.shape[1]
    bounds: list[int] = [0, S] if cu_seqlens is None else cu_seqlens.tolist()
    # Cut up at once: of each part autograd makes a gradient as long as what it was cut from.
    queries = [[one.unbind() for one in row] for row in q.double()]
    heads_k, heads_v = ([row.unbind() for row in x.double()] for x in (k, v))
    found: dict[tuple[int, int, int], Tensor] = {}
    for b, (begin, end) in ((b, one) for b in range(B) for one in pairwise(bounds)):
        for t in range(max(0, begin - (S - T)), end - (S - T)):
            here = t + S - T
            keys = [
                j
                for j in range(begin, here + 1)
                if (here - j < window or j - begin < sinks)
                and (j == here or real is None or bool(real[b if real.shape[0] > 1 else 0, j]))
            ]
            for h in range(H):
                ks, vs = heads_k[b][h // group][keys], heads_v[b][h // group][keys]
                found[b, h, t] = torch.softmax(factor * (ks @ queries[b][h][t]), dim=0) @ vs
    nothing = q.new_zeros(v.shape[3], dtype=torch.float64)
    places = product(range(B), range(H), range(T))
    return torch.stack([found.get(place, nothing) for place in places]).view(B, H, T, -1)


def _dispatch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    window: int,
    sinks: int,
) -> Tensor:
    sizes = {"K": q.shape[3], "V": v.shape[3], "G": q.shape[1] // k.shape[1]}
    if sliding_window_attention.choose(q.device, q.dtype, **sizes) == "triton":
        return kernels(q, k, v, real, cu_seqlens, scale, window, sinks)[0]  # type: ignore[no-any-return]
    if cu_seqlens is None:
        return attend(q, k, v, real, scale, window=window, sinks=sinks)
    # The host must know where sequences end, so a GPU is waited for.
    bounds: list[int] = cu_seqlens.tolist()
    parts = []
    for begin, end in (one for one in pairwise(bounds) if one[1] > one[0]):
        q_i, k_i, v_i = (x[:, :, begin:end] for x in (q, k, v))
        limit = None if real is None else real[:, begin:end]
        parts.append(attend(q_i, k_i, v_i, limit, scale, window=window, sinks=sinks))
    return torch.cat(parts, dim=2)


_op = register_composite(
    "sliding_window_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? real, Tensor? cu_seqlens, float scale, int window, int sinks) -> Tensor",
    _dispatch,
)


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    """T queries at the last places of S keys."""
    B, H, N, T, S, K, V = (shape[name] for name in ("B", "H", "N", "T", "S", "K", "V"))
    return {
        "q": normal(generator, B, H, T, K),
        "k": normal(generator, B, N, S, K),
        "v": normal(generator, B, N, S, V),
    }


_WIDE = {"H": 16, "N": 16, "K": 128, "V": 128}
_CASES = Traits(
    inputs=_draw,
    # Attention has no state.
    initial_state=lambda shape, generator: normal(generator, 0),  # noqa: ARG005
    sequence=("q", "k", "v"),
    rounded=("q", "k", "v"),
    differentiable=("q", "k", "v"),
    output_like="q",
    test_shapes=({"B": 2, "H": 4, "N": 2, "T": 37, "S": 37, "K": 16, "V": 24, "window": 9, "sinks": 2},),
    bench_shapes=tuple(
        {"B": B, "T": T, "S": T, **_WIDE, "window": window, "sinks": 0}
        for window in (512, 128, 4096)
        for B, T in ((8, 4096), (1, 131072))
        if window < T
    ),
    decode_shapes=({"B": 32, "T": 1, "S": 8192, **_WIDE, "N": 2, "window": 4096, "sinks": 4},),
)


def _fits(shape: Shape) -> bool:
    return HAS_KERNELS and max(shape["K"], shape["V"]) <= MAX_HEAD_SIZE and shape["G"] <= MAX_GROUP


_LIMITS = f"K and V up to {MAX_HEAD_SIZE}, G up to {MAX_GROUP}"


@op(sliding_window_attention_reference, _CASES, kernel=_fits, limits=_LIMITS)
def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int = 0,
    real: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal softmax attention of each query over its window of keys and over the first keys, the sinks.

        o_i = sum_j softmax_j(scale · q_i · k_j) v_j,   j <= i,   i - j < window or j < sinks

    Windows: arXiv 2004.05150; sinks: 2309.17453.

    Queries stand at the last T of the S places. A query sees the keys in view that are `real`, and its own always. With
    `cu_seqlens`, S = T tokens hold several sequences one behind the other, each with sinks of its own; plain torch then waits
    for the device and cannot be compiled. Query head h reads key head h // (H / N). `scale` defaults to d^-0.5. The kernels
    leave output and gradients in memory with time before heads.

    Shapes:  q: [B, H, T, d];  k: [B, N, S, d];  v: [B, N, S, V];  out: [B, H, T, V];  of one dtype
             real: [1 or B, S] bool;  cu_seqlens: [sequences + 1] integers, B = 1

    Raises:
        HeddleError: "bad-argument" for shapes, dtypes or numbers that do not fit.
    """
    name = "sliding_window_attention"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or not 1 <= q.shape[2] <= k.shape[2]:
        what = "q, k, v must be [B, heads, tokens, *], with at least one query and no more than keys"
        raise HeddleError("bad-argument", f"{name}: {what}")
    (B, H, T, d), (N, S) = q.shape, k.shape[1:3]
    if H % N:
        raise HeddleError("bad-argument", f"{name}: {N} key heads do not divide {H} query heads")
    if window < 1 or sinks < 0 or (scale is not None and scale <= 0):
        what = f"window {window} and scale {scale} must be positive, sinks {sinks} not negative"
        raise HeddleError("bad-argument", f"{name}: {what}")
    check_tensors(name, {"q": q, "k": k, "v": v}, integers={"cu_seqlens": cu_seqlens}, masks={"real": real})
    check_packing(name, B, T, cu_seqlens, keys=S)
    rows = B if real is None or real.shape[0] > 1 else 1
    check_shapes(name, {"k": (k, (B, N, S, d)), "v": (v, (B, N, S, v.shape[-1])), "real": (real, (rows, S))})
    scale = d**-0.5 if scale is None else scale
    return _op(q, k, v, real, cu_seqlens, scale, window, sinks)  # type: ignore[no-any-return]
