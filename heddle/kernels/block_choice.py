"""Which blocks of keys a few queries read, by means of keys; and its reference.

The kernels read the means once, as they are. A decode step is a call with one query. Many queries are better served by
`mark_blocks`, some of them at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.errors import HeddleError
from heddle.kernels.common.autocast import out_of_autocast
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
    from heddle.kernels._block_choice_op import kernels as _kernels
    from heddle.kernels._block_choice_op import marks as _marks
    from heddle.kernels._block_choice_op import shares as _shares

    HAS_KERNELS = True
except ImportError:
    HAS_KERNELS = False

# Of the kernels: of a head, heads of a group, and blocks of which the best are looked for.
MAX_HEAD_SIZE, MAX_GROUP, MAX_CHOICE = 256, 64, 32_767
# Queries that torch scores by kernels at once, at least: on a GPU each part of them waits for the host.
LEAST_SCORED = 256


def block_choice_reference(
    q: Tensor,
    means: Tensor,
    *,
    start: Tensor,
    block: int,
    blocks: int,
    count: int,
    sink: int,
    recent: int,
    dense_length: int = 0,
    held: Tensor | None = None,
    kernels: bool = False,
    scale: float | None = None,
) -> Tensor:
    """`block_choice` in float64, query by query and mean by mean; shares nothing with it."""
    (B, H, T, d), N = q.shape, means.shape[1]
    length = min(blocks, max(count, -(-dense_length // block)))
    found = torch.full((B, N, T, length), -1, dtype=torch.int32)
    for b, n, t in ((b, n, t) for b in range(B) for n in range(N) for t in range(T)):
        place = int(start[b]) + t
        heads = q[b, n * H // N : (n + 1) * H // N, t].double()
        rows = means[b, n].double()
        if kernels:
            ends = [(i * block) // 4 + block // 2 for i in range(len(rows))]
            row = None if held is None else held[b if held.shape[0] > 1 else 0]
            seen = [i for i, end in enumerate(ends) if end <= place + 1 and (row is None or bool(row[i]))]
            factor = d**-0.5 if scale is None else scale
            weight = dict.fromkeys(seen, 0.0)
            for head in heads if seen else ():
                share = torch.softmax(torch.stack([factor * head @ rows[i] for i in seen]), dim=0)
                weight = {i: weight[i] + float(one) for i, one in zip(seen, share, strict=True)}
            worth = [
                max((weight[i] for i in seen if 4 * c - 2 < i < 4 * c + 4), default=0.0)
                for c in range(blocks)
            ]
        else:
            worth = [float(heads.mean(0) @ row) for row in rows]
        own = place // block
        always = {c for c in range(own + 1) if c < sink or c > own - recent}
        others = sorted((c for c in range(own) if c not in always), key=lambda c: (-worth[c], c))
        read = sorted([*always, *others][:count] if place >= dense_length else range(own + 1))
        found[b, n, t, : len(read)] = torch.tensor(read)
    return found


@out_of_autocast
def block_scores(
    q: Tensor,
    means: Tensor,
    place: Tensor,
    *,
    block: int,
    blocks: int,
    held: Tensor | None = None,
    kernels: bool = False,
    scale: float | None = None,
) -> Tensor:
    """What complete blocks are worth to queries at these places, by `block_choice`; of others nothing can be told.

    Shapes:  q, means, held: as in `block_choice`;  place: [B, T];  out: [B, N, T, blocks], at least float32
    """
    wide = wide_dtype(q.dtype)
    heads = q.to(wide).unflatten(1, (means.shape[1], -1))  # type: ignore[no-untyped-call]
    if not kernels:
        score = heads.mean(dim=2) @ means.to(wide).mT
        return F.pad(score, (0, blocks - score.shape[-1]))
    quarter, parts = block // 4, means.shape[2]
    ends = torch.arange(parts, device=q.device) * quarter + 2 * quarter
    seen = ends <= place[..., None] + 1
    seen = (seen if held is None else seen & held[:, None])[:, None, None]
    logits = (heads @ means.to(wide)[:, :, None].mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
    share = torch.softmax(logits, dim=-1).masked_fill(~seen, 0.0).sum(dim=2)
    # Five kernels overlap a block: one begins before it, one ends behind it.
    return F.pad(share, (1, 4 * blocks - parts)).unfold(-1, 5, 4).amax(dim=-1)


def _dispatch(
    q: Tensor,
    means: Tensor,
    start: Tensor,
    held: Tensor | None,
    scale: float,
    kernels: bool,
    block: int,
    blocks: int,
    count: int,
    sink: int,
    recent: int,
    dense_length: int,
) -> Tensor:
    sizes = {"K": q.shape[3], "G": q.shape[1] // means.shape[1], "choice": blocks}
    if block_choice.choose(q.device, q.dtype, **sizes) == "triton":
        numbers = (block, blocks, count, sink, recent, dense_length)
        return _kernels(q, means, start, held, scale, kernels, *numbers)  # type: ignore[no-any-return]
    place = start[:, None] + torch.arange(q.shape[2], device=q.device)
    score = block_scores(q, means, place, block=block, blocks=blocks, held=held, kernels=kernels, scale=scale)
    own = (place // block)[:, None, :, None]
    length = min(blocks, max(count, -(-dense_length // block)))
    best = _in_order(score, own, sink, recent)[..., :length]
    rank, dense = torch.arange(length, device=q.device), (place < dense_length)[:, None, :, None]
    best = best.masked_fill(((rank >= count) & ~dense) | (best > own), blocks).sort(dim=-1).values
    return best.masked_fill(best == blocks, -1).to(torch.int32)


def _in_order(score: Tensor, own: Tensor, sink: int, recent: int) -> Tensor:
    """Blocks by falling worth: first those that are always read, last those behind the own one.

    Shapes:  score, out: [B, N, T, blocks];  own: [B, 1, T, 1]
    """
    index = torch.arange(score.shape[-1], device=score.device)
    always = (index <= own) & ((index < sink) | (index > own - recent))
    score = score.masked_fill(always, torch.inf).masked_fill(index > own, -torch.inf)
    return score.sort(dim=-1, descending=True, stable=True).indices


_NUMBERS = "int block, int blocks, int count, int sink, int recent, int dense_length"
_op = register_composite(
    "block_choice",
    f"(Tensor q, Tensor means, Tensor start, Tensor? held, float scale, bool kernels, {_NUMBERS}) -> Tensor",
    _dispatch,
)


def _dispatch_marks(
    q: Tensor,
    means: Tensor,
    start: Tensor,
    held: Tensor | None,
    scale: float,
    kernels: bool,
    block: int,
    blocks: int,
    count: int,
    sink: int,
    recent: int,
    dense_length: int,
) -> Tensor:
    sizes = {"K": q.shape[3], "G": q.shape[1] // means.shape[1], "choice": blocks}
    runs = block_choice.choose(q.device, q.dtype, **sizes) == "triton"
    numbers = (block, blocks, count, sink, recent, dense_length)
    if runs and kernels:
        return _marks(_shares(q, means, start, held, scale, block), start, True, *numbers)  # type: ignore[no-any-return]
    # In torch every head has scores of its own.
    least = min(q.shape[2], LEAST_SCORED)
    length = max(least, q.shape[2] // sizes["G"]) if kernels else q.shape[2]
    found = []
    for first in range(0, q.shape[2], length):
        part, begin = q[:, :, first : first + length], start + first
        place = begin[:, None] + torch.arange(part.shape[2], device=q.device)
        score = block_scores(
            part, means, place, block=block, blocks=blocks, held=held, kernels=kernels, scale=scale
        )
        if runs:
            found.append(_marks(score, begin, False, *numbers))
            continue
        own, index = (place // block)[:, None, :, None], torch.arange(blocks, device=score.device)
        best = _in_order(score, own, sink, recent)[..., :count]
        marks = torch.zeros_like(score, dtype=torch.bool)
        marks = marks.scatter(-1, best, torch.ones_like(best, dtype=torch.bool))
        found.append((marks | (place < dense_length)[:, None, :, None]) & (index <= own))
    return found[0] if len(found) == 1 else torch.cat(found, dim=2)


_marks_op = register_composite(
    "mark_blocks",
    f"(Tensor q, Tensor means, Tensor start, Tensor? held, float scale, bool kernels, {_NUMBERS}) -> Tensor",
    _dispatch_marks,
)


def mark_blocks(
    q: Tensor,
    means: Tensor,
    *,
    start: Tensor,
    block: int,
    blocks: int,
    count: int,
    sink: int,
    recent: int,
    dense_length: int = 0,
    held: Tensor | None = None,
    kernels: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Marks of the blocks that `block_choice` lists, for many queries: its arguments, and its path.

    By means, scores are float32 products in torch on both paths. `blocks` numbers for each query and key head are in memory at
    once, by kernels four times as many; in torch, for a few hundred queries, as many for each query head.

    Shapes:  out: [B, N, T, blocks] bool
    """
    factor = q.shape[3] ** -0.5 if scale is None else scale
    numbers = (block, blocks, count, sink, recent, dense_length)
    return _marks_op(q, means, start, held, factor, kernels, *numbers)  # type: ignore[no-any-return]


def _draw(shape: Shape, generator: torch.Generator) -> Inputs:
    """T queries at the last places of S keys, and means of the size that those of independent keys have."""
    B, H, N, T, S, K, block = (shape[name] for name in ("B", "H", "N", "T", "S", "K", "block"))
    parts = 4 * S // block - 1 if shape.get("kernels") else S // block
    return {
        "q": normal(generator, B, H, T, K),
        "means": normal(generator, B, N, parts, K) * block**-0.5,
        "start": torch.full((B,), S - T, device=generator.device),
    }


_MANY = {"block": 64, "blocks": 2049, "count": 64, "sink": 1, "recent": 2}
_WIDE = {"B": 32, "T": 1, "S": 131073, "H": 32, "N": 2, "K": 128, **_MANY}
_FEW = {"block": 8, "blocks": 9, "count": 4, "sink": 1, "recent": 2}
_CASES = Traits(
    inputs=_draw,
    # A choice has no state.
    initial_state=lambda shape, generator: normal(generator, 0),  # noqa: ARG005
    sequence=("q",),
    rounded=("q", "means"),
    differentiable=(),
    output_like="q",
    test_shapes=({"B": 2, "H": 4, "N": 2, "T": 3, "S": 69, "K": 16, **_FEW},),
    decode_shapes=(_WIDE, {**_WIDE, "kernels": 1}),
)


def _fits(shape: Shape) -> bool:
    fits = shape["K"] <= MAX_HEAD_SIZE and shape["G"] <= MAX_GROUP and shape["choice"] <= MAX_CHOICE
    return HAS_KERNELS and fits


_LIMITS = f"K up to {MAX_HEAD_SIZE}, G up to {MAX_GROUP}, up to {MAX_CHOICE} blocks"


@op(block_choice_reference, _CASES, kernel=_fits, limits=_LIMITS)
def block_choice(
    q: Tensor,
    means: Tensor,
    *,
    start: Tensor,
    block: int,
    blocks: int,
    count: int,
    sink: int,
    recent: int,
    dense_length: int = 0,
    held: Tensor | None = None,
    kernels: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The blocks that each query reads, one list for the query heads of a key head, in the order of the keys.

        means    worth_c = mean_{h in group} q_h · m_c,   m_c the mean of block c
        kernels  worth_c = max_{i overlaps c} sum_{h in group} softmax_i(scale · q_h · m_i)       (arXiv 2509.24663)

    Kernel i holds the quarters i and i + 1 of blocks; those that end at the query or before, and are `held`, count. Query t of
    row b stands at `start[b]` + t. It reads the `recent` last blocks, its own among them, the `sink` first, and of the others
    before it those of most worth, `count` in all; of equal ones the earlier. One with fewer than `dense_length` keys before it
    reads all blocks up to its own, one at a negative place none. Means are of blocks (kernels) that are complete: what stands
    for one that is not is never looked at. Products and sums are float32 at least, of means and queries as they are. There
    are no gradients.

    Shapes:  q: [B, H, T, d];  means: [B, N, n, d] of one dtype, n at least all complete blocks (kernels) and at most `blocks`
             (4 `blocks` - 1);  start: [B] int64;  held: [1 or B, n] bool
             out: [B, N, T, L] int32, -1 behind the last, L = min(blocks, max(count, ceil(dense_length / block)))

    Raises:
        HeddleError: "bad-argument" for shapes, dtypes or numbers that do not fit.
    """
    name = "block_choice"
    if q.dim() != 4 or means.dim() != 4 or q.shape[1] % means.shape[1]:
        what = f"q is {list(q.shape)} and means {list(means.shape)}, not [B, H, T, d] and [B, N, n, d], N dividing H"
        raise HeddleError("bad-argument", f"{name}: {what}")
    (B, _, _, d), (N, parts) = q.shape, means.shape[1:3]
    if block < 1 or count < sink + recent or recent < 1 or (kernels and block % 4):
        given = f"block {block}, count {count}, sink {sink}, recent {recent}"
        what = f"{given}: count is sink + recent at least, recent 1, and block of kernels a multiple of 4"
        raise HeddleError("bad-argument", f"{name}: {what}")
    if parts > (4 * blocks - 1 if kernels else blocks):
        raise HeddleError("bad-argument", f"{name}: {parts} means are more than {blocks} blocks have")
    check_tensors(name, {"q": q, "means": means}, integers={"start": start}, masks={"held": held})
    rows = B if held is None or held.shape[0] > 1 else 1
    check_shapes(
        name, {"means": (means, (B, N, parts, d)), "start": (start, (B,)), "held": (held, (rows, parts))}
    )
    factor = d**-0.5 if scale is None else scale
    numbers = (block, blocks, count, sink, recent, dense_length)
    return _op(q, means, start, held, factor, kernels, *numbers)  # type: ignore[no-any-return]
