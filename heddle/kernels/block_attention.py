"""Softmax attention that reads some blocks of keys, those that are chosen; and its reference.

The kernels compute the products with the blocks that are read alone, for the heads of a group and a few neighbouring queries
together. In plain torch no table of all queries by all keys is made, but all products are: it saves memory and no work. So it
is without any choice on every device. A decode step is a call with one query and all keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from heddle.errors import HeddleError
from heddle.kernels._block_attention_torch import Form, Given, backward, forward
from heddle.kernels.common.varlen import check_packing, each_alone, known_lengths
from heddle.kernels.op import (
    Inputs,
    Shape,
    Traits,
    check_shapes,
    check_tensors,
    normal,
    op,
    register,
    register_composite,
)

try:
    from heddle.kernels._block_attention_op import kernels

    HAS_KERNELS = True
except ImportError:
    HAS_KERNELS = False

# Of a key and of a value head, and heads of a group, in the kernels.
MAX_HEAD_SIZE, MAX_GROUP = 256, 64
# More queries than these, of gates, are a tile of another kind.
FEW_QUERIES = 8
# What a call's choice is: none, lists or marks (or gates of few queries), gates.
NO_CHOICE, CHOSEN, GATED = range(3)


def block_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int,
    start: Tensor,
    listed: Tensor | None = None,
    chosen: Tensor | None = None,
    gates: Tensor | None = None,
    real: Tensor | None = None,
    written: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`block_attention` in float64, query by query; shares nothing with it."""
    group, size = q.shape[1] // k.shape[1], q.shape[-1]
    factor = size**-0.5 if scale is None else scale
    ends = [] if cu_seqlens is None else cu_seqlens.tolist()
    nothing = q.new_zeros(v.shape[-1], dtype=torch.float64)
    found: list[Tensor] = []
    for b, h in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[1])):
        n = h // group
        queries, ks, vs = q[b, h].double().unbind(), k[b, n].double(), v[b, n].double()
        visible = [_is_seen(j, b, real, written) for j in range(k.shape[2])]
        for t, query in enumerate(queries):
            number, begin, before = own_sequence(t, b, ends, block)
            here = int(start[number]) + t
            own = (here - begin) // block
            read = [j for j in range(begin, here + 1) if j == here or visible[j]]
            if chosen is not None:
                marks = chosen[b, n, t].tolist()
                read = [j for j in read if j == here or marks[(j - begin) // block]]
            if listed is not None:
                those = listed[b, n, t].tolist()
                read = [j for j in read if j == here or (j - begin) // block in those]
            if gates is not None:
                gate = gates[b, n, before:].detach().tolist()
                read = [j for j in read if (j - begin) // block == own or gate[(j - begin) // block] > 0.5]
            if not read:
                found.append(nothing)
                continue
            keys = torch.tensor(read, device=k.device)
            s = factor * (ks[keys] @ query)
            if written is not None:
                bias = written[b, keys] - written[b, keys].detach()
                s = s + bias.masked_fill(keys == here, 0.0)
            if gates is not None:
                at = (keys - begin) // block
                bias = gates[b, n, before + at] - gates[b, n, before + at].detach()
                s = s + bias.masked_fill(at == own, 0.0)
            found.append(torch.softmax(s, dim=0) @ vs[keys])
    return torch.stack(found).view(*q.shape[:3], -1)


def own_sequence(token: int, row: int, ends: Sequence[int], block: int) -> tuple[int, int, int]:
    """Of references: the number of a token's row or packed sequence, where that begins, and how many blocks are before it."""
    if not ends:
        return row, 0, 0
    number = max(number for number, begin in enumerate(ends) if begin <= token)
    before = sum(-(-(end - begin) // block) for begin, end in pairwise(ends[: number + 1]))
    return number, ends[number], before


def _is_seen(key: int, row: int, real: Tensor | None, written: Tensor | None) -> bool:
    held = real is None or bool(real[row if real.shape[0] > 1 else 0, key])
    return held and (written is None or bool(written[row, key].detach() > 0.5))


_CHOICE = "Tensor? chosen, Tensor? gates"
_TENSORS = f"Tensor q, Tensor k, Tensor v, Tensor start, {_CHOICE}, Tensor? real, Tensor? written"
_INPUTS = f"{_TENSORS}, float scale, int block"


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    chosen: Tensor | None,
    gates: Tensor | None,
    real: Tensor | None,
    written: Tensor | None,
    scale: float,
    block: int,
) -> Tensor:
    given = Given.of((q, k, v), (None, chosen, gates), start, (real, written), block)
    return forward(given, Form(scale, block, None)).flatten(1, 2).to(v.dtype)


def _like(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:  # noqa: ARG001
    return v.new_empty(*q.shape[:3], v.shape[-1])


def _backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    chosen: Tensor | None,
    gates: Tensor | None,
    real: Tensor | None,
    written: Tensor | None,
    scale: float,
    block: int,
) -> tuple[Tensor, ...]:
    given = Given.of((q, k, v), (None, chosen, gates), start, (real, written), block)
    g = d_out.to(given.v.dtype).view(*given.q.shape[:4], v.shape[-1])
    dq, dk, dv, _, d_gates, d_bias = backward(g, given, Form(scale, block, None))
    d_written = q.new_zeros(0) if written is None else d_bias.to(written.dtype)
    dq, dk, dv = dq.flatten(1, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
    d_gates = d_gates if gates is None else d_gates.to(gates.dtype)
    return dq, dk.contiguous(), dv.contiguous(), d_gates, d_written.contiguous()


def _gradients_like(
    d_out: Tensor,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,  # noqa: ARG001
    chosen: Tensor | None,  # noqa: ARG001
    gates: Tensor | None,
    real: Tensor | None,  # noqa: ARG001
    written: Tensor | None,
    *rest: Any,  # noqa: ARG001
) -> tuple[Tensor, ...]:
    given = (q, k, v, gates, written)
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in given)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *tensors, scale, block = inputs
    ctx.save_for_backward(*tensors)
    ctx.numbers = (scale, block)


def _gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    dq, dk, dv, *rest = _backward_op(d_out.contiguous(), *tensors, *ctx.numbers)
    asked = (tensors[5], tensors[7])
    d_gates, d_written = (None if given is None else found for given, found in zip(asked, rest, strict=True))
    return dq, dk, dv, None, None, d_gates, None, d_written, None, None


_backward_op = register(
    "block_attention_torch_backward",
    f"(Tensor d_out, {_INPUTS}) -> ({', '.join(['Tensor'] * 5)})",
    _backward,
    fake=_gradients_like,
)
_torch_op = register(
    "block_attention_torch",
    f"({_INPUTS}) -> Tensor",
    _forward,
    fake=_like,
    setup_context=_keep,
    backward=_gradients,
)


def _dispatch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor,
    listed: Tensor | None,
    chosen: Tensor | None,
    gates: Tensor | None,
    real: Tensor | None,
    written: Tensor | None,
    scale: float,
    block: int,
) -> Tensor:
    choice = CHOSEN if any(one is not None for one in (listed, chosen, gates)) else NO_CHOICE
    choice = GATED if gates is not None and q.shape[2] > FEW_QUERIES else choice
    sizes = {"K": q.shape[3], "V": v.shape[3], "G": q.shape[1] // k.shape[1], "choice": choice}
    if block_attention.choose(q.device, q.dtype, **sizes) == "triton":
        return kernels(q, k, v, start, listed, chosen, gates, real, written, scale, block)[0]  # type: ignore[no-any-return]
    chosen = chosen if listed is None else _as_chosen(listed, -(-k.shape[2] // block))
    return _torch_op(q, k, v, start, chosen, gates, real, written, scale, block)  # type: ignore[no-any-return]


def _as_chosen(listed: Tensor, count: int) -> Tensor:
    """Shapes:  listed: [B, N, T, L];  out: [B, N, T, count] bool"""
    # What is none goes behind the last block.
    index = torch.where(listed < 0, count, listed).to(torch.int64)
    table = torch.zeros(*listed.shape[:3], count + 1, dtype=torch.bool, device=listed.device)
    return table.scatter(-1, index, True)[..., :count]


def _packed(
    sides: Mapping[str, Tensor | None],
    lengths: Sequence[int],
    counts: Sequence[int],
    *,
    block: int,
    scale: float,
) -> Tensor:
    """Every packed sequence alone; `counts` are their blocks."""

    def alone(k: Tensor, chosen: Tensor | None, **own: Any) -> Tensor:
        read = None if chosen is None else chosen[..., : -(-k.shape[2] // block)]
        return block_attention(k=k, chosen=read, **own, block=block, scale=scale)

    return each_alone(alone, sides, lengths, {"start": [1] * len(lengths), "gates": counts})


_op = register_composite(
    "block_attention",
    f"({_INPUTS.replace('Tensor? chosen', 'Tensor? listed, Tensor? chosen')}) -> Tensor",
    _dispatch,
)


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    """T queries at the last places of S keys; each reads its own block and `L` - 1 earlier ones of `block` keys.

    So many neighbours as `shared` says (1 if nothing) read the same earlier blocks.
    """
    B, H, N, T, S, K, V = (shape[name] for name in ("B", "H", "N", "T", "S", "K", "V"))
    block, shared, device = shape["block"], shape.get("shared", 1), generator.device
    own = torch.arange(S - T, S, device=device)[:, None] // block
    worth = torch.rand(B, N, -(-T // shared), -(-S // block), generator=generator, device=device)
    worth.masked_fill_(torch.arange(worth.shape[-1], device=device) >= own[::shared], -1.0)
    best = worth.topk(min(shape["L"] - 1, worth.shape[-1]), dim=-1)
    others = torch.where(best.values < 0, -1, best.indices).repeat_interleave(shared, dim=2)[:, :, :T]
    return {
        "q": normal(generator, B, H, T, K),
        "k": normal(generator, B, N, S, K),
        "v": normal(generator, B, N, S, V),
        "start": torch.full((B,), S - T, device=device),
        "listed": torch.cat((own.expand(B, N, T, 1), others), dim=-1).to(torch.int32),
    }


_WIDE = {"H": 32, "N": 2, "K": 128, "V": 128, "block": 64}
_CASES = Traits(
    inputs=_draw,
    # Attention has no state.
    initial_state=lambda shape, generator: normal(generator, 0),  # noqa: ARG005
    sequence=("q", "k", "v", "listed"),
    rounded=("q", "k", "v"),
    differentiable=("q", "k", "v"),
    output_like="q",
    test_shapes=({"B": 2, "H": 4, "N": 2, "T": 37, "S": 37, "K": 16, "V": 16, "block": 8, "L": 3},),
    bench_shapes=tuple(
        {"B": 1, "T": T, "S": T, **_WIDE, "L": L, "shared": shared}
        for T, L in ((32768, 16), (65536, 64), (131072, 64))
        for shared in (64, 1)
    ),
    decode_shapes=({"B": 32, "T": 1, "S": 131072, **_WIDE, "L": 64},),
)


def _fits(shape: Shape) -> bool:
    return (
        HAS_KERNELS
        and max(shape["K"], shape["V"]) <= MAX_HEAD_SIZE
        and shape["G"] <= MAX_GROUP
        and bool(shape["choice"])
    )


_LIMITS = f"K and V up to {MAX_HEAD_SIZE}, G up to {MAX_GROUP}, and a choice of blocks"


@op(block_attention_reference, _CASES, kernel=_fits, limits=_LIMITS)
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block: int,
    start: Tensor,
    listed: Tensor | None = None,
    chosen: Tensor | None = None,
    gates: Tensor | None = None,
    real: Tensor | None = None,
    written: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention over blocks of keys.

        o_i = sum_j p_ij v_j,   p_i = softmax over the own key and those of the chosen blocks up to it

    What is chosen is `listed`, each block at most once and -1 for none, or marked in `chosen`: one set for the query heads of a
    key head. Without a choice all are. The choice has no gradient; all logits have. Gradients have none of their own. They are
    worked out again block by block: nothing of T x S stands in memory.

    With `gates`, of 0 and 1, the keys are those of the own block and of the earlier ones whose gate is 1; such a gate has the
    gradient of a bias of its block's logits in later blocks, one that is 0 has none.

    Keys stand at the places 0 … S - 1 and block b holds the places from b `block` on. Query t of row b stands at
    `start[b]` + t, at most S - T + t, and sees keys at places up to its own that are `real` and `written`, its own always; one
    at a negative place sees nothing, and gives 0. `written` has the gradient of a bias of the logits. Query head h reads key
    head h // (H / N). `scale` defaults to d^-0.5.

    With `cu_seqlens`, S = T tokens hold several sequences one behind the other, each as if it came alone. Places and blocks
    count from the own sequence's first token, so that a sequence begins a block of its own: so do the numbers in `listed` and
    the columns of `chosen`, as many as the longest sequence has blocks. `gates` are those of one sequence's blocks behind
    those of another, and `start` has one number for each, 0 where nothing of it is padding. Sequences are worked on one by
    one, for which the host waits for the device, and cannot be compiled.

    Shapes:  q: [B, H, T, d];  k: [B, N, S, d];  v: [B, N, S, V];  out: [B, H, T, V];  of one dtype
             start: [B or sequences] int64;  listed: [B, N, T, L] integers
             chosen: [B, N, T, C] bool, C = ceil(S / block), packed that of the longest sequence
             gates: [B, N, C], packed the sum over sequences
             real: [1 or B, S] bool;  written: [B, S] of 0 and 1;  cu_seqlens: [sequences + 1] integers, B = 1

    Raises:
        HeddleError: "bad-argument" for shapes, dtypes or numbers that do not fit.
    """
    name = "block_attention"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or not 1 <= q.shape[2] <= k.shape[2]:
        what = "q, k, v must be [B, heads, tokens, *], with at least one query and no more than keys"
        raise HeddleError("bad-argument", f"{name}: {what}")
    (B, H, T, d), (N, S) = q.shape, k.shape[1:3]
    if H % N:
        raise HeddleError("bad-argument", f"{name}: {N} key heads do not divide {H} query heads")
    if block < 1:
        raise HeddleError("bad-argument", f"{name}: block {block} must be positive")
    if sum(one is not None for one in (listed, chosen, gates)) > 1:
        raise HeddleError("bad-argument", f"{name}: only one of listed, chosen and gates may be given")
    sides, places = {"q": q, "k": k, "v": v}, {"start": start, "listed": listed}
    masks = {"real": real, "written": written, "chosen": chosen, "gates": gates}
    check_tensors(name, sides, integers={**places, "cu_seqlens": cu_seqlens}, masks=masks)
    check_packing(name, B, T, cu_seqlens, keys=S)
    lengths = [S] if cu_seqlens is None else known_lengths(name, cu_seqlens, T)
    counts = [-(-length // block) for length in lengths]
    rows, starts = B if real is None or real.shape[0] > 1 else 1, B if cu_seqlens is None else len(lengths)
    expected = {"k": (k, (B, N, S, d)), "v": (v, (B, N, S, v.shape[-1])), "start": (start, (starts,))}
    limits = {"real": (real, (rows, S)), "written": (written, (B, S)), "gates": (gates, (B, N, sum(counts)))}
    if listed is not None:
        limits["listed"] = (listed, (B, N, T, listed.shape[-1]))
    check_shapes(name, {**expected, **limits, "chosen": (chosen, (B, N, T, max(counts)))})
    scale = d**-0.5 if scale is None else scale
    if cu_seqlens is not None:
        return _packed({**sides, **places, **masks}, lengths, counts, block=block, scale=scale)
    return _op(q, k, v, start, listed, chosen, gates, real, written, scale, block)  # type: ignore[no-any-return]
