"""A small network that looks at a whole prompt once and gives a few logits for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.cache import Call
from heddle.compose.init import Initialised, fill
from heddle.compose.modules.precision import wide

# The first choice begins at about 99 % (arXiv 2604.07394).
FIRST_BIAS = 4.5


class PromptRouter(Initialised):
    """Logits of a prompt from the mean of its ends.        (arXiv 2604.07394)

        h = mean of x over the first and last `pool` tokens; of a prompt of at most 2 `pool`, over all of it
        z = head(encoder(h)),  encoder: D → 8 r → 2 r,  head: 2 r → 4 r → r → choices,  SiLU between

    Padding is left out. At the start z = (4.5, 0, ...) for every prompt. r is `size`.

    Shapes:  x: [B, T, D];  z: [B, choices], at least float32
    """

    def __init__(self, width: int, *, size: int, pool: int, choices: int = 2) -> None:
        super().__init__()
        self.pool = pool
        self.encoder = nn.Sequential(nn.Linear(width, 8 * size), nn.SiLU(), nn.Linear(8 * size, 2 * size))
        self.head = nn.Sequential(
            nn.Linear(2 * size, 4 * size), nn.SiLU(), nn.Linear(4 * size, size), nn.SiLU()
        )
        # Not an nn.Linear: it begins at values of its own.
        self.last_weight = nn.Parameter(torch.empty(choices, size))
        self.last_bias = nn.Parameter(torch.empty(choices))

    def forward(self, x: Tensor, call: Call) -> Tensor:
        hidden = self.head(self.encoder(self.pooled(x, call.padding)))
        return wide(F.linear(hidden, self.last_weight.to(hidden.dtype), self.last_bias.to(hidden.dtype)))

    def pooled(self, x: Tensor, padding: Tensor | None) -> Tensor:
        """The mean over both ends of each row's real tokens.  Shapes:  padding: [B, T] bool;  out: [B, D]"""
        if padding is None:
            # Not a float32 copy of a long prompt.
            ends = (
                x
                if x.shape[1] <= 2 * self.pool
                else torch.cat((x[:, : self.pool], x[:, -self.pool :]), dim=1)
            )
            return wide(ends).mean(dim=1).to(x.dtype)
        rank, count = padding.cumsum(dim=1) - 1, padding.sum(dim=1, keepdim=True)
        ends = padding & ((rank < self.pool) | (rank >= count - self.pool))
        share = wide(ends.to(x.dtype)) / ends.sum(dim=1, keepdim=True).clamp(min=1)
        return (wide(x) * share[..., None]).sum(dim=1).to(x.dtype)

    def initialise(self, std: float) -> None:  # noqa: ARG002 - the start is the same whatever the prompt
        fill(self.last_weight, torch.zeros_like(self.last_weight))
        bias = torch.zeros_like(self.last_bias)
        bias[0] = FIRST_BIAS
        fill(self.last_bias, bias)
