"""Feature maps of linear attention: φ(q) · φ(k) is the weight of a key."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


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


def elu(x: Tensor) -> Tensor:
    """elu(x) + 1, above 0 everywhere.        (arXiv 2006.16236)"""
    return F.elu(x) + 1.0


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {"taylor2": taylor2, "elu": elu}


def feature_count(feature: str, size: int) -> int:
    """How many features a head of `size` dimensions has."""
    return (size + 1) * (size + 2) // 2 if feature == "taylor2" else size
