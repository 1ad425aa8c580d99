"""Feature maps of linear attention: φ(q) · φ(k) is the weight of a key."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from heddle.kernels.taylor_attention import feature_count as taylor2_count
from heddle.kernels.taylor_attention import taylor2


def elu(x: Tensor) -> Tensor:
    """elu(x) + 1, above 0 everywhere.        (arXiv 2006.16236)"""
    return F.elu(x) + 1.0


FEATURES: dict[str, Callable[[Tensor], Tensor]] = {"taylor2": taylor2, "elu": elu}


def feature_count(feature: str, size: int) -> int:
    """How many features a head of `size` dimensions has."""
    return taylor2_count(size) if feature == "taylor2" else size
