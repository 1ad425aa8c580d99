"""Positive features of queries and keys whose sharpness is the vector's own length."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.init import Initialised, fill, normal
from heddle.compose.modules.precision import wide


class NormPreservedMaps(Initialised):
    """The feature maps of queries and of keys, head by head.        (NP-Map, arXiv 2602.02180)

        φ(x) = [softmax z, softmax -z],   z = |x| W x' / |W x'|,   x' = x - 2 u (u · x) / |u|²

    The direction of z is learned, its length is that of x. Keys begin with the map of their first query head.

    Shapes:  queries: [B, H, T, d];  keys: [B, N, T, d];  out: [B, heads, T, 2 f], wide
    """

    def __init__(self, heads: tuple[int, int], size: int, features: int) -> None:
        super().__init__()
        self.q_reflection, self.k_reflection = (nn.Parameter(torch.empty(count, size)) for count in heads)
        self.q_weight, self.k_weight = (nn.Parameter(torch.empty(count, size, features)) for count in heads)

    def of_queries(self, x: Tensor) -> Tensor:
        return _mapped(wide(x), self.q_reflection, self.q_weight)

    def of_keys(self, x: Tensor) -> Tensor:
        return _mapped(wide(x), self.k_reflection, self.k_weight)

    def initialise(self, std: float) -> None:
        # Lengths say nothing here, directions alone.
        normal(self.q_reflection, 1.0)
        normal(self.q_weight, std)
        group = self.q_weight.shape[0] // self.k_weight.shape[0]
        fill(self.k_reflection, self.q_reflection.detach()[::group])
        fill(self.k_weight, self.q_weight.detach()[::group])


def _mapped(x: Tensor, reflection: Tensor, weight: Tensor) -> Tensor:
    u = F.normalize(reflection.to(x.dtype), dim=-1)[:, None]
    turned = x - 2.0 * u * (u * x).sum(dim=-1, keepdim=True)
    z = F.normalize(turned @ weight.to(x.dtype), dim=-1) * torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.cat((torch.softmax(z, dim=-1), torch.softmax(-z, dim=-1)), dim=-1)
