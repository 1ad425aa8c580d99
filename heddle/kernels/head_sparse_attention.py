"""Causal softmax attention of the heads that a token chose, each times its weight; and its reference.

The kernels gather the queries that chose a head and leave the others out, so that what is skipped costs no products. Plain torch
computes all heads and multiplies by 0. A decode step is a call with one query and the keys so far, and reads the keys of
chosen heads.
"""

from __future__ import annotations

from itertools import pairwise, product

import torch
from torch import Tensor

from heddle.errors import HeddleError
from heddle.kernels.common.varlen import check_packing
from heddle.kernels.dense_attention import dense_attention
from heddle.kernels.op import (
    Inputs,
    Shape,
    Traits,
    check_shapes,
    check_tensors,
    normal,
    op,
    register_composite,
    wide_dtype,
)

try:
    from heddle.kernels._head_sparse_attention_op import kernels

    HAS_KERNELS = True
except ImportError:
    HAS_KERNELS = False

# Of a key and of a value head, and heads of a group, in the kernels.
MAX_HEAD_SIZE, MAX_GROUP = 256, 64


def head_sparse_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    *,
    real: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`head_sparse_attention` in float64, query by query; shares nothing with it."""
    (B, H, T, d), S = q.shape, k.shape[2]
    factor, group = d**-0.5 if scale is None else scale, H // k.shape[1]
    bounds: list[int] = [0, S] if cu_seqlens is None else cu_seqlens.tolist()
    # Cut up at once: of each part autograd makes a gradient as long as what it was cut from.
    queries = [[one.unbind() for one in row] for row in q.double()]
    heads_k, heads_v, shares = ([row.unbind() for row in x.double()] for x in (k, v, weights))
    found: dict[tuple[int, int, int], Tensor] = {}
    for b, (begin, end) in ((b, one) for b in range(B) for one in pairwise(bounds)):
        for t in range(max(0, begin - (S - T)), end - (S - T)):
            here = t + S - T
            keys = [
                j
                for j in range(begin, here + 1)
                if j == here or real is None or bool(real[b if real.shape[0] > 1 else 0, j])
            ]
            for h in weights[b, t].nonzero()[:, 0].tolist():
                ks, vs = heads_k[b][h // group][keys], heads_v[b][h // group][keys]
                o = torch.softmax(factor * (ks @ queries[b][h][t]), dim=0) @ vs
                found[b, h, t] = shares[b][t][h] * o
    nothing = q.new_zeros(v.shape[3], dtype=torch.float64)
    places = product(range(B), range(H), range(T))
    return torch.stack([found.get(place, nothing) for place in places]).view(B, H, T, -1)


def _mask(q: Tensor, keys: int, real: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Which keys each query sees.  Shapes:  out: [1 or B, 1, T, S] bool"""
    key = torch.arange(keys, device=q.device)
    query = key[keys - q.shape[2] :, None]
    seen = (key <= query)[None]
    if cu_seqlens is not None:
        own = torch.searchsorted(cu_seqlens[1:], key, right=True)
        seen = seen & (own[:, None] == own)
    if real is not None:
        seen = seen & (real[:, None] | (key == query))
    return seen[:, None]


def _dispatch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    real: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> Tensor:
    sizes = {"K": q.shape[3], "V": v.shape[3], "G": q.shape[1] // k.shape[1]}
    if head_sparse_attention.choose(q.device, q.dtype, **sizes) == "triton":
        return kernels(q, k, v, weights, real, cu_seqlens, scale)[0]  # type: ignore[no-any-return]
    (T, S), wide = (q.shape[2], k.shape[2]), wide_dtype(q.dtype)
    if real is None and cu_seqlens is None and T in (1, S):
        o = dense_attention(q, k, v, is_causal=T > 1, scale=scale)
    else:
        o = dense_attention(q, k, v, _mask(q, S, real, cu_seqlens), scale=scale)
    # A weight of 0 is no head's, and has no gradient.
    chosen = weights.mT.to(wide) * (weights.mT != 0)
    return (o.to(wide) * chosen[..., None]).to(v.dtype)


_op = register_composite(
    "head_sparse_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor weights, Tensor? real, Tensor? cu_seqlens, float scale) -> Tensor",
    _dispatch,
)


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    """T queries at the last places of S keys; each chose `active` of H heads."""
    B, H, N, T, S, K, V = (shape[name] for name in ("B", "H", "N", "T", "S", "K", "V"))
    device = generator.device
    worth = torch.rand(B, T, H, generator=generator, device=device, dtype=torch.float64)
    first = worth.topk(shape["active"], dim=-1)
    return {
        "q": normal(generator, B, H, T, K),
        "k": normal(generator, B, N, S, K),
        "v": normal(generator, B, N, S, V),
        "weights": torch.zeros_like(worth).scatter(-1, first.indices, first.values + 0.5),
    }


_WIDE = {"H": 16, "N": 16, "K": 128, "V": 128, "active": 8}
_CASES = Traits(
    inputs=_draw,
    # Attention has no state.
    initial_state=lambda shape, generator: normal(generator, 0),  # noqa: ARG005
    sequence=("q", "k", "v", "weights"),
    rounded=("q", "k", "v"),
    differentiable=("q", "k", "v", "weights"),
    output_like="q",
    test_shapes=({"B": 2, "H": 4, "N": 2, "T": 37, "S": 37, "K": 16, "V": 24, "active": 2},),
    bench_shapes=tuple({"B": B, "T": T, "S": T, **_WIDE} for B, T in ((8, 4096), (1, 32768))),
    decode_shapes=({"B": 32, "T": 1, "S": 8192, **_WIDE}, {"B": 1, "T": 1, "S": 131072, **_WIDE}),
)


def _fits(shape: Shape) -> bool:
    return HAS_KERNELS and max(shape["K"], shape["V"]) <= MAX_HEAD_SIZE and shape["G"] <= MAX_GROUP


_LIMITS = f"K and V up to {MAX_HEAD_SIZE}, G up to {MAX_GROUP}"


@op(head_sparse_attention_reference, _CASES, kernel=_fits, limits=_LIMITS)
def head_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Tensor,
    *,
    real: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal softmax attention of each query in the heads that it chose, times their weights.

        o_(i,h) = w_(i,h) sum_(j <= i) softmax_j(scale · q_(i,h) · k_j) v_j   where w_(i,h) is not 0, else 0

    Mixture-of-Head: arXiv 2410.11842, whose code computes all heads. Keys and values of all tokens are there for all heads; a
    query may choose none or all of them, a head may be chosen by none or by all. A weight of 0 has the gradient 0, and so has
    its query.

    Queries stand at the last T of the S places. A query sees the keys up to its own that are `real`, and its own always. With
    `cu_seqlens`, S = T tokens hold several sequences one behind the other. Query head h reads key head h // (H / N). `scale`
    defaults to d^-0.5. Nothing waits for the device. The kernels take weights as float32, and leave output and gradients in
    memory with time before heads.

    Shapes:  q: [B, H, T, d];  k: [B, N, S, d];  v: [B, N, S, V];  out: [B, H, T, V];  of one dtype
             weights: [B, T, H], float;  real: [1 or B, S] bool;  cu_seqlens: [sequences + 1] integers, B = 1

    Raises:
        HeddleError: "bad-argument" for shapes, dtypes or numbers that do not fit.
    """
    name = "head_sparse_attention"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or not 1 <= q.shape[2] <= k.shape[2]:
        what = "q, k, v must be [B, heads, tokens, *], with at least one query and no more than keys"
        raise HeddleError("bad-argument", f"{name}: {what}")
    (B, H, T, d), (N, S) = q.shape, k.shape[1:3]
    if H % N:
        raise HeddleError("bad-argument", f"{name}: {N} key heads do not divide {H} query heads")
    if scale is not None and scale <= 0:
        raise HeddleError("bad-argument", f"{name}: scale {scale} must be positive")
    sides, limits = {"q": q, "k": k, "v": v}, {"cu_seqlens": cu_seqlens}
    check_tensors(name, sides, floats={"weights": weights}, integers=limits, masks={"real": real})
    check_packing(name, B, T, cu_seqlens, keys=S)
    rows = B if real is None or real.shape[0] > 1 else 1
    expected = {"k": (k, (B, N, S, d)), "v": (v, (B, N, S, v.shape[-1])), "weights": (weights, (B, T, H))}
    check_shapes(name, {**expected, "real": (real, (rows, S))})
    return _op(q, k, v, weights, real, cu_seqlens, d**-0.5 if scale is None else scale)  # type: ignore[no-any-return]
