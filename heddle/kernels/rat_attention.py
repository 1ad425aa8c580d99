"""Causal softmax attention over what chunks of tokens came to, and over a key of each query's own; and its reference.

The kernels read the summaries before a tile of queries alone, so that the work is that of causal attention divided by the length
of a chunk. A decode step is a call with one query. `rat_scan` makes what is attended over.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from heddle.errors import HeddleError
from heddle.kernels._rat_torch import attend
from heddle.kernels.common.varlen import check_packing
from heddle.kernels.op import (
    Inputs,
    Phase,
    Shape,
    Traits,
    Work,
    check_shapes,
    check_tensors,
    heads_together,
    normal,
    op,
    register_composite,
)

try:
    from heddle.kernels._rat_attention_op import kernels

    HAS_KERNELS = True
except ImportError:
    HAS_KERNELS = False

# Of a head, in the kernels.
MAX_HEAD_SIZE = 256


def rat_attention_reference(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    keys: Tensor,
    values: Tensor,
    chunk: int,
    start: int = 0,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`rat_attention` in float64, query by query; shares nothing with it."""
    (B, T, H, d), G = key.shape, q.shape[2]
    factor = d**-0.5 if scale is None else scale
    bounds: list[int] = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    found: list[Tensor] = []
    for b, h in ((b, h) for b in range(B) for h in range(H)):
        queries, own_keys, own_values = (
            x[b, :, i].double().unbind() for x, i in ((q, h % G), (key, h), (value, h))
        )
        sum_keys, sum_values = keys[b, h].double(), values[b, h].double()
        for begin, end in pairwise(bounds):
            # Row t // chunk holds what ended with token t of a packed sequence.
            first = -(-begin // chunk)
            for t in range(begin, end):
                rows = slice(first, first + (start + t - begin) // chunk)
                ks = torch.cat((sum_keys[rows], own_keys[t][None]))
                vs = torch.cat((sum_values[rows], own_values[t][None]))
                found.append(torch.softmax(factor * (ks @ queries[t]), dim=0) @ vs)
    return torch.stack(found).view(B, H, T, d).transpose(1, 2)


def _dispatch(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    chunk: int,
    start: int,
) -> Tensor:
    given = (q, key, value, keys, values, cu_seqlens, scale, chunk, start)
    if rat_attention.choose(q.device, q.dtype, K=q.shape[3]) == "triton":
        return kernels(*given)[0]  # type: ignore[no-any-return]
    return attend(*given)


_op = register_composite(
    "rat_attention",
    "(Tensor q, Tensor key, Tensor value, Tensor keys, Tensor values, Tensor? cu_seqlens, float scale, SymInt chunk, "
    "SymInt start) -> Tensor",
    _dispatch,
    under_vmap=heads_together("rat_attention", (2, 2, 2, 1, 1, None, None, None, None), (2,)),
)


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    """T queries behind `start` others."""
    B, T, H, G, K = (shape[name] for name in ("B", "T", "H", "G", "K"))
    summaries = (shape.get("start", 0) + T) // shape["chunk"]
    own = {name: normal(generator, B, T, H, K) for name in ("key", "value")}
    rows = {name: normal(generator, B, H, summaries, K) for name in ("keys", "values")}
    return {"q": normal(generator, B, T, G, K), **own, **rows}


def _work(shape: Shape, phase: Phase, element: int) -> Work:
    """Two products of a query and what it sees; of the gradients' five, that of the logits is made anew."""
    B, T, H, K, L = (shape[name] for name in ("B", "T", "H", "K", "chunk"))
    start = shape.get("start", 0)
    whole, rest = divmod(start + T, L)
    before, after = divmod(start, L)
    # The sum of p // L over p = start … start + T - 1, and the own keys.
    seen = L * whole * (whole - 1) // 2 + rest * whole - L * before * (before - 1) // 2 - after * before + T
    tokens = B * T * (2 * H + shape["G"]) * K + 2 * B * H * K * ((start + T) // L)
    times, more = (3.5, 2) if phase == "fwdbwd" else (1.0, 0)
    return Work(
        int(times * 4 * B * H * K * seen), (tokens * (1 + more) + B * T * H * K * (1 + more)) * element
    )


_WIDE = {"H": 16, "G": 2, "K": 128, "chunk": 16}
_CASES = Traits(
    inputs=_draw,
    # Attention has no state.
    initial_state=lambda shape, generator: normal(generator, 0),  # noqa: ARG005
    sequence=("q", "key", "value"),
    rounded=("q", "key", "value", "keys", "values"),
    differentiable=("q", "key", "value", "keys", "values"),
    output_like="value",
    test_shapes=({"B": 2, "T": 37, "H": 4, "G": 2, "K": 16, "chunk": 5},),
    bench_shapes=tuple({"B": B, "T": T, **_WIDE} for B, T in ((8, 4096), (1, 102400))),
    decode_shapes=tuple({"B": B, "T": 1, "start": 4096, **_WIDE} for B in (1, 32, 256)),
    work=_work,
    numbers=lambda shape: {"chunk": shape["chunk"]},
)


def _fits(shape: Shape) -> bool:
    return HAS_KERNELS and shape["K"] <= MAX_HEAD_SIZE


@op(rat_attention_reference, _CASES, kernel=_fits, limits=f"K up to {MAX_HEAD_SIZE}")
def rat_attention(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    keys: Tensor,
    values: Tensor,
    chunk: int,
    start: int = 0,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal softmax attention of each query over the summaries of the chunks before its own, and over its own key.

        o_t = Σ_c p_tc values_c + p_t value_t,   p = softmax(scale q_t · {keys_c : c < floor(t / chunk)} ∪ {key_t})

    The attention of RAT (arXiv 2507.04416). The first query has `start` tokens before it; summaries are those of all chunks from
    the beginning on, and more than any query sees may be there. Head h reads group h mod G of q. With `cu_seqlens` the tokens are
    several sequences one behind the other, and the summary that ends with token t is row t // chunk, as `rat_scan` leaves it.
    `scale` defaults to d^-0.5.

    Shapes:  q: [B, T, G, d];  key, value, out: [B, T, H, d];  keys, values: [B, H, S, d];  of one dtype
             S at least (start + T - 1) // chunk (packed: T / chunk, rounded up);  cu_seqlens: [sequences + 1]

    Raises:
        HeddleError: "bad-argument" for shapes, dtypes or numbers that do not fit.
    """
    name = "rat_attention"
    if q.dim() != 4 or key.dim() != 4 or keys.dim() != 4 or q.shape[1] < 1:
        what = "q, key, value must be [B, T, heads, d], at least one token, and keys, values [B, heads, S, d]"
        raise HeddleError("bad-argument", f"{name}: {what}")
    (B, T, H, d), G, S = key.shape, q.shape[2], keys.shape[2]
    if H % G:
        raise HeddleError("bad-argument", f"{name}: {G} groups do not divide {H} heads")
    if chunk < 1 or start < 0 or (scale is not None and scale <= 0):
        what = f"chunk {chunk} and scale {scale} must be positive, start {start} not negative"
        raise HeddleError("bad-argument", f"{name}: {what}")
    if cu_seqlens is not None and start:
        raise HeddleError("bad-argument", f"{name}: packed sequences begin with their first token: no start")
    sides = {"q": q, "key": key, "value": value, "keys": keys, "values": values}
    check_tensors(name, sides, integers={"cu_seqlens": cu_seqlens})
    check_packing(name, B, T, cu_seqlens)
    least = (start + T - 1) // chunk if cu_seqlens is None else -(-T // chunk)
    if least > S:
        raise HeddleError("bad-argument", f"{name}: {S} summaries, and queries see up to {least}")
    own, rows = (B, T, H, d), (B, H, S, d)
    shapes = {"q": (q, (B, T, G, d)), "value": (value, own), "keys": (keys, rows), "values": (values, rows)}
    check_shapes(name, shapes)
    scale = d**-0.5 if scale is None else scale
    return _op(q, key, value, keys, values, cu_seqlens, scale, chunk, start)  # type: ignore[no-any-return]
