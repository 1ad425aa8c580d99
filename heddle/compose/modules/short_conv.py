"""The short causal convolution before a recurrence."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.cache import Call
from heddle.compose.init import Initialised, uniform
from heddle.kernels.causal_conv1d import causal_conv1d


class ShortConv(Initialised):
    """Depthwise causal convolution over time, then the activation. The last tap multiplies the current token.

        y_t = activation(sum_i w_i * x_{t-W+1+i} [+ bias])

    Shapes:  x, y: [B, T, C];  weight: [C, W];  bias: [C];  cached state: [B, C, W-1]
    """

    def __init__(
        self, channels: int, taps: int, *, activation: str | None = "silu", bias: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.activation = activation

    def forward(self, x: Tensor, call: Call) -> Tensor:
        y, state = self.after(x, call.state("conv"), call.cu_seqlens)
        call.keep(conv=state)
        return y

    def after(
        self, x: Tensor, past: Tensor | None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The tokens behind a state, and the state behind them."""
        inside = self.activation if self.bias is None else None
        y, state = causal_conv1d(
            x, self.weight.to(x.dtype), initial_state=past, activation=inside, cu_seqlens=cu_seqlens
        )
        if self.bias is None:
            return y, state
        y = y + self.bias.to(x.dtype)
        return F.silu(y) if self.activation == "silu" else y, state

    def state_shape(self) -> tuple[int, int]:
        """Channels and earlier tokens of one sequence's state."""
        return self.weight.shape[0], self.weight.shape[1] - 1

    def initialise(self, std: float) -> None:  # noqa: ARG002 - the taps keep the scale of what they mix
        bound = 1.0 / math.sqrt(self.weight.shape[1])
        uniform(self.weight, -bound, bound)
