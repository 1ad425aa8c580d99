"""Products of rounded operands, and of queries with keys between which something fades, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from heddle.kernels.op import wide_dtype

# Below the largest number of float16, 65504, by more than log2 may be out.
_NEAR_LARGEST = 14.0
_LEAST = 2.0**-100


def narrowed(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Matrices rounded to `dtype`, and what a product of them is to be multiplied with, if anything.

    Float16 ends at 6e-8, above what a strong decay leaves of a token: there each matrix is multiplied with a power of two first.

    Shapes:  x, first: [..., M, N];  second: [..., 1, 1]
    """
    if dtype != torch.float16 or x.numel() == 0:
        return x.to(dtype), None
    exponent = x.abs().amax((-2, -1), keepdim=True).float().clamp_min(_LEAST).log2().floor() - _NEAR_LARGEST
    return (x * torch.exp2(-exponent)).to(dtype), torch.exp2(exponent)


def scaled(found: Tensor, *factors: Tensor | None) -> Tensor:
    """`found` times those factors that there are."""
    for factor in factors:
        found = found if factor is None else found * factor
    return found


class _Product(torch.autograd.Function):
    """Matrix product of operands rounded to `dtype`, summed in their own; so are those of its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
        (x, of_x), (y, of_y) = narrowed(x, dtype), narrowed(y, dtype)
        ctx.save_for_backward(x, y, of_x, of_y)
        ctx.wide = wide_dtype(dtype)
        return scaled(x.to(ctx.wide) @ y.to(ctx.wide), of_x, of_y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        # Looked at once, as checkpoints demand.
        x, y, of_x, of_y = ctx.saved_tensors
        gradient, factor = narrowed(gradient, x.dtype)
        x, y, gradient = (side.to(ctx.wide) for side in (x, y, gradient))
        return scaled(gradient @ y.mT, factor, of_y), scaled(x.mT @ gradient, factor, of_x), None


def product(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrix product of operands rounded to `dtype`, summed in the wide dtype, which theirs is; batches agree."""
    if dtype == x.dtype:
        return x @ y
    found: Tensor = _Product.apply(x, y, dtype)  # type: ignore[no-untyped-call]
    return found


def until_end(log_decay: Tensor) -> Tensor:
    """The sums of the log-decays behind each token of a chunk, in float64, of no log-decay that it has not passed.

    Shapes:  log_decay, out: [..., C, *]
    """
    return F.pad(log_decay[..., 1:, :].double(), (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def decayed_scores(queries: Sequence[Tensor], k: Tensor, total: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """For each q: Σ_c q_ic k_jc exp(total_ic - total_jc) for j up to i, 0 above the diagonal. `total` falls along a chunk.

    With one decay for all channels it is a factor of the product. With one for each, a chunk is halved again and again: between
    its halves the decay is that up to the last token of the first times that from there on, and neither power is above 1.

    Shapes:  q, k: [..., C, K], C a power of two;  total: [..., C, 1 or K], float64;  out: [..., C, C]
    """
    size, wide = k.shape[-2], k.dtype
    if total.shape[-1] == 1:
        row = torch.arange(size, device=k.device)
        # Masked before exp: above the diagonal the difference is positive and could overflow. On it there is no decay, and no
        # gradient of one, which would be large beside that of a strong one.
        age = (total - total.mT).to(wide).tril(-1)
        within = torch.exp(age.masked_fill(row[:, None] < row, -torch.inf))
        return [product(q, k.mT, dtype) * within for q in queries]
    # One token each at first: nothing fades.
    narrow = k.to(dtype).to(wide)
    scores = [(q.to(dtype).to(wide) * narrow).sum(-1)[..., None, None] for q in queries]
    half = 1
    while half < size:
        first, second = _halves(total, half)
        between = first[..., -1:, :]
        since, until = (torch.exp(power.to(wide)) for power in (second - between, between - first))
        earlier = (_halves(k, half)[0] * until).mT
        corners = [product(_halves(q, half)[1] * since, earlier, dtype) for q in queries]
        scores = [_joined(inner, corner) for inner, corner in zip(scores, corners, strict=True)]
        half *= 2
    return [found.squeeze(-3) for found in scores]


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Shapes:  x: [..., C, *];  out: [..., C / (2 half), half, *]"""
    first, second = x.reshape(*x.shape[:-2], -1, 2, half, x.shape[-1]).unbind(-3)
    return first, second


def _joined(inner: Tensor, corner: Tensor) -> Tensor:
    """Triangles twice as large.  Shapes:  inner: [..., 2 n, h, h];  corner: [..., n, h, h];  out: [..., n, 2 h, 2 h]"""
    upper, lower = inner.reshape(*inner.shape[:-3], -1, 2, *inner.shape[-2:]).unbind(-3)
    rows = (torch.cat((upper, torch.zeros_like(corner)), -1), torch.cat((corner, lower), -1))
    return torch.cat(rows, dim=-2)
