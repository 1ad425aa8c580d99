"""Attention over chosen keys, drawn in each form that it is asked for in: what contracts of such ops share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.kernels.block_attention import block_attention, block_attention_reference
from heddle.kernels.dense_attention import dense_attention, dense_attention_reference
from heddle.kernels.landmark_attention import landmark_attention, landmark_attention_reference
from heddle.kernels.member_attention import member_attention, member_attention_reference
from heddle.kernels.span_attention import span_attention, span_attention_reference

# As in tests/kernels, so that a GPU compiles little anew.
H, N, D, V, BLOCK = 4, 2, 16, 16, 8
Given = dict[str, Any]
Draw = Callable[[int, torch.Generator], Given]


def grouped(length: int, generator: torch.Generator, keys: int = N) -> Given:
    sizes = {"q": (H, length, D), "k": (keys, length, D), "v": (keys, length, V)}
    return {
        name: torch.randn(1, *size, generator=generator, dtype=torch.float64) for name, size in sizes.items()
    }


def over_blocks(form: str, size: int = BLOCK) -> Draw:
    """The keys of chosen blocks, some of them not real and some not written."""

    def draw(length: int, generator: torch.Generator) -> Given:
        count = -(-length // size)
        read = torch.rand(1, N, length, count, generator=generator) > 0.4
        choice = {
            "listed": F.pad(torch.where(read, torch.arange(count), -1), (0, max(0, 4 - count)), value=-1),
            "chosen": read,
            "gates": read[:, :, :1].any(2).double(),
            "landmarks": torch.randn(1, N, count, D, generator=generator, dtype=torch.float64),
        }
        given = grouped(length, generator) | {"start": torch.zeros(1, dtype=torch.int64)}
        given |= {name: torch.rand(1, length, generator=generator) > 0.2 for name in ("real", "written")}
        given["written"] = given["written"].double()
        return given | ({form: choice[form]} if form in choice else {})

    return draw


def listed_keys(length: int, generator: torch.Generator) -> Given:
    """Entries may be none, keys may stand twice; the first query has none at all."""
    index = torch.randint(-2, length, (1, H, length, 3), generator=generator)
    index[:, :, 0] = -1
    return {**_with_own(length, generator), "index": index}


def spans_of_clusters(length: int, generator: torch.Generator) -> Given:
    """Earlier tokens of the same cluster, three at most."""
    z = torch.randint(3, (1, H, length), generator=generator)
    order = z.argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(length).expand_as(order))
    begin = (z[..., None, :] < z[..., None]).sum(-1)
    spans = {"order": order, "first": torch.maximum(begin, rank - 3), "last": rank, "queries": order}
    return {**_with_own(length, generator), **spans}


def spans_of_a_window(length: int, generator: torch.Generator) -> Given:
    """Both neighbours, in the order that is there."""
    place = torch.arange(length).expand(1, H, -1)
    spans = {"order": place, "first": (place - 1).clamp(min=0), "last": (place + 2).clamp(max=length)}
    return {**_with_own(length, generator), **spans}


def _with_own(length: int, generator: torch.Generator) -> Given:
    own = torch.randn(1, H, length, V, generator=generator, dtype=torch.float64)
    weight = torch.ones(1, length, dtype=torch.float64)
    return {**grouped(length, generator, H), "own": own, "weight": weight}


block = (block_attention, block_attention_reference)
landmark = (landmark_attention, landmark_attention_reference)
span = (span_attention, span_attention_reference)
# The op and its reference, what draws the arguments of one sequence, and those that are no tensors.
FORMS: dict[str, tuple[tuple[Any, Any], Draw, Given]] = {
    "all": (block, over_blocks("all"), {"block": BLOCK}),
    "listed": (block, over_blocks("listed"), {"block": BLOCK, "scale": 0.3}),
    "chosen": (block, over_blocks("chosen"), {"block": BLOCK}),
    "gates": (block, over_blocks("gates"), {"block": BLOCK}),
    "landmarks": (landmark, over_blocks("landmarks"), {"block": BLOCK, "scale": 0.3}),
    "best": (landmark, over_blocks("landmarks"), {"block": BLOCK, "top": 2}),
    "members": ((member_attention, member_attention_reference), listed_keys, {"scale": 0.3}),
    "clusters": (span, spans_of_clusters, {"width": 3}),
    "window": (span, spans_of_a_window, {"width": 3, "scale": 0.3}),
    "dense": ((dense_attention, dense_attention_reference), grouped, {"is_causal": True}),
}


def results(
    function: Callable[..., Tensor], given: Given, rest: Given, upstream: Tensor
) -> dict[str, Tensor]:
    """Output and every gradient."""
    leaves = {
        name: x.detach().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x
        for name, x in given.items()
    }
    wanted = [name for name, x in leaves.items() if x.requires_grad]
    out = function(**leaves, **rest)
    found = torch.autograd.grad(
        out, [leaves[name] for name in wanted], upstream.to(out), allow_unused=True, materialize_grads=True
    )
    return {"out": out.detach(), **dict(zip(wanted, found, strict=True))}


def dense_plainly(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False) -> Tensor:
    """Dense attention by products of the arguments' type, as one writes it."""
    k, v = (side.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for side in (k, v))
    later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
    logits = (q @ k.mT).float() * q.shape[-1] ** -0.5
    return F.softmax(logits.masked_fill(later & is_causal, -torch.inf), dim=-1).to(q.dtype) @ v


def gradient(tokens: int) -> Tensor:
    """What is sent back; of halves that are the same in every dtype."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(1, H, tokens, V, generator=generator).bfloat16().double()


def in_time(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.transpose(1, 2) if x.dim() == 4 else x for name, x in found.items()}
