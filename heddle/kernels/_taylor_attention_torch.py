"""taylor_attention in plain torch: features of queries and keys, which a memory without decay takes; its state in two forms."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from heddle.kernels.op import are_plain, wide_dtype
from heddle.kernels.simple_gla import simple_gla, simple_gla_step


def taylor2(x: Tensor) -> Tensor:
    """φ with φ(q) · φ(k) = 1 + y + y² / 2,   y = q · k / sqrt(K):  exp(y) to the second order.        (arXiv 2402.18668)

    Of the products of two dimensions each pair stands once: the squares over sqrt(2), the others as they are.

    Shapes:  x: [..., K];  out: [..., (K + 1)(K + 2) / 2]
    """
    size = x.shape[-1]
    u = x * size**-0.25
    first, second = torch.triu_indices(size, size, device=x.device)
    factor = 1.0 - (1.0 - 0.5**0.5) * (first == second).to(x.dtype)
    return torch.cat((torch.ones_like(u[..., :1]), u, factor * u[..., first] * u[..., second]), dim=-1)


def feature_count(size: int) -> int:
    """Features of a head of `size` dimensions."""
    return (size + 1) * (size + 2) // 2


def remembered(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    one_token: bool = False,
) -> tuple[Tensor, Tensor]:
    """Output and final state, by `simple_gla` of features, in float32 at least; one token by its step."""
    wide = wide_dtype(v.dtype)
    q, k = (taylor2(x.to(wide)) for x in (q, k))
    values = torch.cat((v.to(wide), torch.ones_like(v[..., :1], dtype=wide)), dim=-1)
    if weight is not None:
        values = values * weight.to(wide)[:, :, None, None]
    still = torch.zeros_like(values[..., 0])
    if one_token and state is not None:
        sums, last = simple_gla_step(q, k, values, still, state, scale=1.0)
    else:
        sums, last = simple_gla(q, k, values, still, scale=1.0, initial_state=state, cu_seqlens=cu_seqlens)
    return normed(sums).to(v.dtype), last


def normed(sums: Tensor) -> Tensor:
    """Sums of values over those of weights, which stand last; 0 where nothing is written yet, as both sums are."""
    weights = sums[..., -1:]
    return sums[..., :-1] / torch.where(weights == 0, torch.ones_like(weights), weights)


def _places(state: Tensor, size: int, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # What a tracer makes is of its own kind, and must not be kept.
    find = _kept_places if are_plain((state,)) else _find_places
    return find(size, most, state.device)


def _find_places(size: int, most: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where rows of a state of `most` dimensions are in features of `size`, and back, and what they are multiplied with."""
    pair = torch.arange(most * most)
    i, j = pair // most, pair % most
    low, high = torch.minimum(i, j), torch.maximum(i, j)
    squares = low * size - low * (low - 1) // 2 + high - low + 1 + size
    known = (high < size).double()
    single = torch.arange(most)
    there = (single < size).double()
    at = torch.cat((squares * known.long(), (single + 1) * there.long(), torch.zeros(1, dtype=torch.int64)))
    of_pairs = (1.0 + (2.0**0.5 - 1.0) * (low == high).double()) * size**0.5 * known
    outward = torch.cat((of_pairs, size**0.25 * there, torch.ones(1, dtype=torch.float64)))
    first, second = torch.triu_indices(size, size)
    back = torch.cat(
        (torch.tensor([most * most + most]), most * most + torch.arange(size), first * most + second)
    )
    inward = torch.cat(
        (
            torch.ones(1, dtype=torch.float64),
            torch.full((size,), size**-0.25, dtype=torch.float64),
            (1.0 + (0.5**0.5 - 1.0) * (first == second).double()) * size**-0.5,
        )
    )
    return at.to(device), outward.to(device), back.to(device), inward.to(device)


@functools.cache
def _kept_places(size: int, most: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Whatever the first call is made under: what is kept stands in graphs of later ones.
    with torch.inference_mode(False), torch.device("cpu"):
        return _find_places(size, most, device)


def spread(state: Tensor, size: int, most: int) -> Tensor:
    """Sums over features of `size` dimensions as sums over products of pairs of `most`, in which each pair stands twice.

    Shapes:  state: [N, H, F, *];  out: [N, H, most² + most + 1, *]
    """
    at, factors, _, _ = _places(state, size, most)
    return state[:, :, at] * factors.to(state.dtype)[:, None]


def gathered(state: Tensor, size: int, most: int) -> Tensor:
    """The reverse of `spread`, of sums in which both of a pair are one number."""
    _, _, at, factors = _places(state, size, most)
    return state[:, :, at] * factors.to(state.dtype)[:, None]
