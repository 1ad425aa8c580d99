"""A memory of fast weights that learns while it reads (test-time training)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.cache import Call, RecurrentLayer, StateLayer
from heddle.compose.init import Initialised, fill, normal
from heddle.compose.modules.memory import MEMORY, filled_memory
from heddle.compose.modules.norm import RMSNorm, l2_norm
from heddle.compose.modules.precision import wide
from heddle.compose.modules.short_conv import ShortConv
from heddle.compose.modules.site import Site
from heddle.compose.modules.stretches import in_stretches
from heddle.kernels.ttt import shape_of, ttt


class TttModule(Initialised):
    """Fast weights W that are written by gradient descent after every chunk of tokens.        (arXiv 2602.13680)

        q, k, v = W_in x;   q, k = l2norm(silu(·)) of each head
        o = ttt(q, k, v, softplus(W_r x + softplus⁻¹(rate)), sigmoid(W_m x), W);   y = scale * W_o (rms(o))

    Rows of `qkv_proj` and channels of the convolution, which takes the place of silu, stand in the order q, k, v; those of
    `rate_proj` head by head, one rate for each matrix of W. A chunk counts real tokens. A token that is not written takes its
    place in a chunk and adds no gradient. Rates, gates and state are float32.

    Shapes:  x, y: [B, T, D];  `weight`: [H, N, M, d];  state: [B, H, F], as in `ttt`;  `heads_out` sees [B, T, H, d]
    """

    takes_packed = True

    def __init__(
        self,
        site: Site,
        *,
        heads: int,
        head_dim: int,
        memory: str,
        width: int,
        chunk: int,
        loss: str,
        rate: float,
        momentum: bool,
        normalise: str,
        short_conv: int | None,
        scale: float,
    ) -> None:
        super().__init__()
        self.heads, self.chunk, self.loss, self.normalise = heads, chunk, loss, normalise
        # softplus⁻¹, which loses nothing where the rate is small.
        self.rate_bias, self.first_scale = rate + math.log(-math.expm1(-rate)), scale
        count, inner = 1 if memory == "linear" else 3, heads * head_dim
        self.qkv_proj = nn.Linear(site.hidden_size, 3 * inner, bias=False)
        self.rate_proj = nn.Linear(site.hidden_size, heads * count, bias=False)
        self.momentum_proj = nn.Linear(site.hidden_size, heads, bias=False) if momentum else None
        self.conv = None if short_conv is None else ShortConv(3 * inner, short_conv)
        self.weight = nn.Parameter(torch.empty(heads, count, width, head_dim))
        self.norm = RMSNorm(head_dim, site.norm_eps)
        self.heads_out = nn.Identity()
        self.o_proj = nn.Linear(inner, site.hidden_size, bias=False)
        self.scale = nn.Parameter(torch.empty(site.hidden_size))

    def forward(self, x: Tensor, call: Call) -> Tensor:
        x = call.hide_padding(x)
        qkv = self.qkv_proj(x)
        qkv = qkv if self.conv is None else self.conv(qkv, call)
        q, k, v = (side.unflatten(-1, (self.heads, -1)) for side in qkv.chunk(3, dim=-1))
        q, k = (l2_norm(side) if self.conv is not None else self._activated(side) for side in (q, k))
        rates = F.softplus(wide(self.rate_proj(x)) + self.rate_bias).view(*x.shape[:2], self.heads, -1)
        gates = None if self.momentum_proj is None else torch.sigmoid(wide(self.momentum_proj(x)))
        o, memory = ttt(
            q,
            k,
            v,
            call.hide_unwritten(rates),
            gates,
            wide(self.weight),
            chunk=self.chunk,
            loss=self.loss,
            normalise=self.normalise,
            initial_state=call.state("memory"),
            cu_seqlens=call.cu_seqlens,
            real=call.padding,
        )
        call.keep(memory=memory)
        y: Tensor = self.o_proj(self.heads_out(call.gated(self.norm(o))).flatten(2))
        return y * self.scale.to(y.dtype)

    @staticmethod
    def _activated(x: Tensor) -> Tensor:
        """Training works the activations of long sequences out again."""
        o, _ = in_stretches(lambda _, part: (l2_norm(F.silu(part)), None), None, (x,))
        return o

    def initialise(self, std: float) -> None:  # noqa: ARG002 - a memory keeps the scale of what it reads
        _, count, width, size = self.weight.shape
        if count == 3:
            normal(self.weight[:, :2], size**-0.5)
        # The last matrix is held transposed, so its inputs are the features.
        normal(self.weight[:, -1], width**-0.5)
        fill(self.scale, torch.full_like(self.scale, self.first_scale))

    def new_cache(self) -> StateLayer:
        return RecurrentLayer()

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random states after `context` tokens, whose step repeats; its chunk has just begun."""
        numbers = (2 if self.momentum_proj is None else 3) * self.weight[0].numel() + 2
        made = filled_memory((batch, self.heads, numbers), context, like, conv=self.conv)
        made.states[MEMORY][..., -1] = 0.0
        return made

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:
        """The name of the code that does the mixing."""
        return ttt.path(device, dtype, **shape_of(self.weight))
