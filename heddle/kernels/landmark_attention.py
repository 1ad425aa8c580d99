"""Softmax attention whose weights of blocks come from landmarks, and its reference.

The kernels hold a tile of queries of one head and walk over the blocks up to it; a step of a few queries reads the blocks
alone whose landmarks are best. In plain torch no table of all queries by all keys is made, but all products are, and
gradients are worked out again block by block. A decode step is a call with one query and all keys.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from heddle.errors import HeddleError
from heddle.kernels._block_attention_torch import Form, Given, backward, forward
from heddle.kernels.block_attention import own_sequence
from heddle.kernels.common.varlen import check_packing, each_alone, known_lengths
from heddle.kernels.configs.landmark_attention import STEP_QUERIES
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
    from heddle.kernels._landmark_attention_op import kernels

    HAS_KERNELS = True
except ImportError:
    HAS_KERNELS = False

# Of the kernels: of a key and of a value head, keys of a block (a program holds them all), heads of a group,
# and blocks of which the best are looked for.
MAX_HEAD_SIZE, MAX_BLOCK, MAX_GROUP, MAX_CHOICE = 256, 128, 64, 32_767
# Bytes of a block that have room on Hopper beside what tensor cores want of it.
MOST_BYTES = 1 << 16
# Blocks among which a GPU's choice was held to float64, and those of a step in half precision.
HELD_CHOICE, HELD_STEP_CHOICE = 32, 2048


def landmark_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmarks: Tensor,
    *,
    block: int,
    start: Tensor,
    top: int | None = None,
    real: Tensor | None = None,
    written: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """`landmark_attention` in float64, query by query, by the groups of the paper; shares nothing with it."""
    group, size = q.shape[1] // k.shape[1], q.shape[-1]
    factor = size**-0.5 if scale is None else scale
    ends = [] if cu_seqlens is None else cu_seqlens.tolist()
    # Sums in place would be one chain of all queries for autograd, at whose end torch's own stack does not suffice.
    found: list[Tensor] = []
    for b, h in ((b, h) for b in range(q.shape[0]) for h in range(q.shape[1])):
        n = h // group
        queries = q[b, h].double().unbind()
        ks, vs, marks = (one[b, n].double() for one in (k, v, landmarks))
        visible = [_is_seen(j, b, real, written) for j in range(k.shape[2])]
        for t, query in enumerate(queries):
            number, begin, before = own_sequence(t, b, ends, block)
            here = int(start[number]) + t
            seen = [j for j in range(begin, here + 1) if j == here or visible[j]]
            keys = torch.tensor(seen, dtype=torch.int64, device=k.device)
            s = factor * (ks[keys] @ query)
            if written is not None:
                bias = written[b, keys] - written[b, keys].detach()
                s = s + bias.masked_fill(keys == here, 0.0)
            at = before + (keys - begin) // block
            mates = {c: at == c for c in set(at.tolist())}
            own = mates.pop(before + (here - begin) // block, None)
            mark = {c: factor * (query @ marks[c]) for c in mates}
            worth = {c: (-float(mark[c].detach()), c) for c in mates}
            read = sorted(mates, key=worth.__getitem__)[:top]
            found.append(v.new_zeros(v.shape[-1], dtype=torch.float64))
            if own is None:
                continue
            logits = torch.cat((s[own], *(mark[c][None] for c in read)))
            gate, count = torch.softmax(logits, dim=0), len(logits) - len(read)
            found[-1] = gate[:count] @ vs[keys[own]]
            for share, c in zip(gate[count:], read, strict=True):
                found[-1] = found[-1] + share * (torch.softmax(s[mates[c]], dim=0) @ vs[keys[mates[c]]])
    return torch.stack(found).view(*q.shape[:3], -1)


def _is_seen(key: int, row: int, real: Tensor | None, written: Tensor | None) -> bool:
    held = real is None or bool(real[row if real.shape[0] > 1 else 0, key])
    return held and (written is None or bool(written[row, key].detach() > 0.5))


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor landmarks, Tensor start, Tensor? real, Tensor? written"
_INPUTS = f"{_TENSORS}, float scale, int block, int? top"


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmarks: Tensor,
    start: Tensor,
    real: Tensor | None,
    written: Tensor | None,
    scale: float,
    block: int,
    top: int | None,
) -> Tensor:
    given = Given.of((q, k, v), (landmarks, None, None), start, (real, written), block)
    return forward(given, Form(scale, block, top)).flatten(1, 2).to(v.dtype)


def _like(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:  # noqa: ARG001
    return v.new_empty(*q.shape[:3], v.shape[-1])


def _backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmarks: Tensor,
    start: Tensor,
    real: Tensor | None,
    written: Tensor | None,
    scale: float,
    block: int,
    top: int | None,
) -> tuple[Tensor, ...]:
    given = Given.of((q, k, v), (landmarks, None, None), start, (real, written), block)
    g = d_out.to(given.v.dtype).view(*given.q.shape[:4], v.shape[-1])
    dq, dk, dv, d_marks, _, d_bias = backward(g, given, Form(scale, block, top))
    d_written = q.new_zeros(0) if written is None else d_bias.to(written.dtype)
    dq, dk, dv = dq.flatten(1, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
    return dq, dk.contiguous(), dv.contiguous(), d_marks.to(landmarks.dtype), d_written.contiguous()


def _gradients_like(
    d_out: Tensor,  # noqa: ARG001
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmarks: Tensor,
    start: Tensor,  # noqa: ARG001
    real: Tensor | None,  # noqa: ARG001
    written: Tensor | None,
    *rest: Any,  # noqa: ARG001
) -> tuple[Tensor, ...]:
    given = (q, k, v, landmarks, written)
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in given)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    *tensors, scale, block, top = inputs
    ctx.save_for_backward(*tensors)
    ctx.numbers = (scale, block, top)


def _gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    dq, dk, dv, d_marks, d_written = _backward_op(d_out.contiguous(), *tensors, *ctx.numbers)
    return dq, dk, dv, d_marks, None, None, None if tensors[6] is None else d_written, None, None, None


_backward_op = register(
    "landmark_attention_torch_backward",
    f"(Tensor d_out, {_INPUTS}) -> ({', '.join(['Tensor'] * 5)})",
    _backward,
    fake=_gradients_like,
)
_torch_op = register(
    "landmark_attention_torch",
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
    landmarks: Tensor,
    start: Tensor,
    real: Tensor | None,
    written: Tensor | None,
    scale: float,
    block: int,
    top: int | None,
) -> Tensor:
    sizes = {"K": q.shape[3], "V": v.shape[3], "G": q.shape[1] // k.shape[1], "block": block}
    sizes["choice"] = 0 if top is None else landmarks.shape[2]
    sizes["half_step"] = int(q.element_size() == 2 and q.shape[2] <= STEP_QUERIES)
    sizes["room"] = int(_has_room(q.device, q.element_size(), max(sizes["K"], sizes["V"]), block))
    if landmark_attention.choose(q.device, q.dtype, **sizes) == "triton":
        return kernels(q, k, v, landmarks, start, real, written, scale, block, top)[0]  # type: ignore[no-any-return]
    return _torch_op(q, k, v, landmarks, start, real, written, scale, block, top)  # type: ignore[no-any-return]


_op = register_composite("landmark_attention", f"({_INPUTS}) -> Tensor", _dispatch)


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    """T queries at the last places of S keys."""
    B, H, N, T, S, K, V = (shape[name] for name in ("B", "H", "N", "T", "S", "K", "V"))
    return {
        "q": normal(generator, B, H, T, K),
        "k": normal(generator, B, N, S, K),
        "v": normal(generator, B, N, S, V),
        "landmarks": normal(generator, B, N, -(-S // shape["block"]), K),
        "start": torch.full((B,), S - T, device=generator.device),
    }


_WIDE = {"H": 32, "N": 8, "K": 128, "V": 128, "block": 64}
_CASES = Traits(
    inputs=_draw,
    # Attention has no state.
    initial_state=lambda shape, generator: normal(generator, 0),  # noqa: ARG005
    sequence=("q", "k", "v"),
    rounded=("q", "k", "v", "landmarks"),
    differentiable=("q", "k", "v", "landmarks"),
    output_like="q",
    test_shapes=({"B": 2, "H": 4, "N": 2, "T": 37, "S": 37, "K": 16, "V": 16, "block": 8},),
    bench_shapes=({"B": 8, "T": 4096, "S": 4096, **_WIDE}, {"B": 1, "T": 32768, "S": 32768, **_WIDE}),
    decode_shapes=tuple({"B": B, "T": 1, "S": 131072, **_WIDE, "top": 32} for B in (1, 16)),
)


@functools.cache
def _has_room(device: torch.device, element: int, size: int, block: int) -> bool:
    """Whether a block of such heads fits into shared memory, as compiled: before Hopper those of half precision up to 128."""
    if device.type != "cuda":
        return True
    if torch.cuda.get_device_capability(device) >= (9, 0):
        rows, columns = (1 << (count - 1).bit_length() for count in (block, size))
        return element * rows * columns <= MOST_BYTES
    return element == 2 and size <= 128


def _fits(shape: Shape) -> bool:
    return (
        HAS_KERNELS
        and max(shape["K"], shape["V"]) <= MAX_HEAD_SIZE
        and shape["block"] <= MAX_BLOCK
        and shape["G"] <= MAX_GROUP
        and shape["choice"] <= MAX_CHOICE
        and bool(shape.get("room", 1))
    )


def _is_unproven(shape: Shape) -> bool:
    """A choice among more blocks than were held."""
    return shape["choice"] > (HELD_STEP_CHOICE if shape.get("half_step", 0) else HELD_CHOICE)


_LIMITS = (
    f"K and V up to {MAX_HEAD_SIZE}, G up to {MAX_GROUP}, blocks of up to {MAX_BLOCK} with room in shared memory, "
    f"a choice among up to {MAX_CHOICE}"
)


@op(
    landmark_attention_reference,
    _CASES,
    kernel=_fits,
    unproven_shapes=_is_unproven,
    limits=_LIMITS,
)
def landmark_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    landmarks: Tensor,
    *,
    block: int,
    start: Tensor,
    top: int | None = None,
    real: Tensor | None = None,
    written: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Causal grouped softmax: over landmarks of earlier blocks and keys of the own one, and inside of each block.

        gate_i = softmax over {landmarks l_b of earlier blocks, keys k_j of the own block up to i}      (arXiv 2305.16300)
        o_i = sum_{j in own block} gate_i(j) v_j + sum_b gate_i(l_b) sum_{j in b} softmax_{j in b}(q_i · k_j) v_j

    With `top` only so many of the best landmarks count, for each query and head, the earlier one of equals; more than
    there are is all. The choice has no gradient; all logits have. Gradients have none of their own. Nothing of T x S stands in
    memory.

    Keys stand at the places 0 … S - 1 and block b holds the places from b `block` on. Query t of row b stands at
    `start[b]` + t, at most S - T + t, and sees keys at places up to its own that are `real` and `written`, its own always; one
    at a negative place sees nothing, and gives 0. A block of which it sees nothing has no landmark. `written` has the
    gradient of a bias of the logits of keys. Query head h reads key head h // (H / N). `scale` defaults to d^-0.5.

    With `cu_seqlens`, S = T tokens hold several sequences one behind the other, each as if it came alone. Places and blocks
    count from the own sequence's first token, so that a sequence begins a block of its own; `landmarks` are those of one
    sequence's blocks behind those of another, and `start` has one number for each, 0 where nothing of it is padding. Sequences
    are worked on one by one, for which the host waits for the device, and cannot be compiled.

    Shapes:  q: [B, H, T, d];  k: [B, N, S, d];  v: [B, N, S, V];  landmarks: [B, N, C, d], C = ceil(S / block), packed the
             sum over sequences;  out: [B, H, T, V];  of one dtype;  start: [B or sequences] int64;  real: [1 or B, S] bool
             written: [B, S] of 0 and 1;  cu_seqlens: [sequences + 1] integers, B = 1

    Raises:
        HeddleError: "bad-argument" for shapes, dtypes or numbers that do not fit.
    """
    name = "landmark_attention"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4 or not 1 <= q.shape[2] <= k.shape[2]:
        what = "q, k, v must be [B, heads, tokens, *], with at least one query and no more than keys"
        raise HeddleError("bad-argument", f"{name}: {what}")
    (B, H, T, d), (N, S) = q.shape, k.shape[1:3]
    if H % N:
        raise HeddleError("bad-argument", f"{name}: {N} key heads do not divide {H} query heads")
    if block < 1 or (top is not None and top < 1):
        raise HeddleError("bad-argument", f"{name}: block {block} and top {top} must be positive")
    sides, masks = {"q": q, "k": k, "v": v, "landmarks": landmarks}, {"real": real, "written": written}
    check_tensors(name, sides, integers={"start": start, "cu_seqlens": cu_seqlens}, masks=masks)
    check_packing(name, B, T, cu_seqlens, keys=S)
    lengths = [S] if cu_seqlens is None else known_lengths(name, cu_seqlens, T)
    counts = [-(-length // block) for length in lengths]
    rows, starts = B if real is None or real.shape[0] > 1 else 1, B if cu_seqlens is None else len(lengths)
    expected = {"k": (k, (B, N, S, d)), "v": (v, (B, N, S, v.shape[-1])), "start": (start, (starts,))}
    limits = {"real": (real, (rows, S)), "written": (written, (B, S))}
    check_shapes(name, {**expected, "landmarks": (landmarks, (B, N, sum(counts), d)), **limits})
    scale = d**-0.5 if scale is None else scale
    if cu_seqlens is not None:
        alone = functools.partial(landmark_attention, block=block, top=top, scale=scale)
        parts = {"start": [1] * len(lengths), "landmarks": counts}
        return each_alone(alone, {**sides, "start": start, **masks}, lengths, parts)
    return _op(q, k, v, landmarks, start, real, written, scale, block, top)  # type: ignore[no-any-return]
