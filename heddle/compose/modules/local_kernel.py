"""Short kernels over time that are predicted from the input, one for each channel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.init import Initialised, fill, normal


class LocalKernel(Initialised):
    """w = W_2 gelu(W_1 x + b_1) + b_2, head by head: from a head's part of x the taps of its channels.    (arXiv 2412.06590)

    Shapes:  x: [B, T, D], D a multiple of H;  w: [B, T, H, d, taps]
    """

    def __init__(self, hidden_size: int, heads: int, head_dim: int, taps: int) -> None:
        super().__init__()
        self.heads, self.taps = heads, taps
        self.first = nn.Parameter(torch.empty(heads, head_dim, hidden_size // heads))
        self.first_bias = nn.Parameter(torch.empty(heads, head_dim))
        self.second = nn.Parameter(torch.empty(heads, head_dim * taps, head_dim))
        self.second_bias = nn.Parameter(torch.empty(heads, head_dim * taps))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.view(*x.shape[:2], self.heads, -1)
        y = torch.einsum("bthi,hoi->btho", parts, self.first) + self.first_bias
        y = torch.einsum("bthi,hoi->btho", F.gelu(y), self.second) + self.second_bias
        return y.view(*y.shape[:3], -1, self.taps)

    def initialise(self, std: float) -> None:
        for weight in (self.first, self.second):
            normal(weight, std)
        for bias in (self.first_bias, self.second_bias):
            fill(bias, torch.zeros(bias.shape))
