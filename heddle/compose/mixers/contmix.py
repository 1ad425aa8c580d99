"""ContMix: short kernels over the last tokens, made for each token from what came before."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.cache import Call, PreallocatedRecurrentLayer, RecurrentLayer, StateLayer
from heddle.compose.init import Initialised, fill, normal, uniform
from heddle.compose.modules.precision import wide, wide_dtype
from heddle.compose.modules.running_means import affinities
from heddle.compose.modules.site import Site


class ContMixModule(Initialised):
    """A convolution whose weights each token makes from running means.        (arXiv 2502.20087; the causal form is ours)

        a = affinities of q with the means of k, over sqrt(query_dim);   w = softmax_j (P a + r)_j
        y_t = W_o (silu(W_g x_t) * sum_j (w_tj + u_j) v_(t-j)),   v 0 before the first token

    Padding and what is not written is in no mean and in no later token's sum. Weights and means are float32.

    Shapes:  x, y: [B, T, D];  P: [taps, summaries];  r: [H, taps];  u: [H, d, static_taps];  `heads_out` sees [B, T, H, d]
             states: means: [B, H, summaries, query_dim];  values: [B, most taps - 1, H d]
    """

    def __init__(
        self,
        site: Site,
        *,
        heads: int,
        head_dim: int,
        query_dim: int,
        taps: int,
        summaries: int,
        static_taps: int,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.query_dim, self.summaries = heads, head_dim, query_dim, summaries
        self.reach = max(taps, static_taps) - 1
        self.q_proj, self.k_proj, self.v_proj, self.g_proj = (
            nn.Linear(site.hidden_size, heads * size, bias=False)
            for size in (query_dim, query_dim, head_dim, head_dim)
        )
        self.tap_weight = nn.Parameter(torch.empty(taps, summaries))
        self.tap_bias = nn.Parameter(torch.empty(heads, taps))
        self.static = nn.Parameter(torch.empty(heads, head_dim, static_taps)) if static_taps else None
        self.heads_out = nn.Identity()
        self.o_proj = nn.Linear(heads * head_dim, site.hidden_size, bias=False)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        x = call.hide_padding(x)
        q, k, v = (
            wide(proj(x)).view(*x.shape[:2], self.heads, -1)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        means = call.state("means")
        if means is None:
            means = q.new_zeros(len(x), self.heads, self.summaries, self.query_dim)
        a, means = affinities(q * self.query_dim**-0.5, call.hide_unwritten(k), means)
        call.keep(means=means)
        w = torch.softmax(F.linear(a, wide(self.tap_weight)) + wide(self.tap_bias), dim=-1)
        o = self._mixed(v, w, call).to(x.dtype)
        o = o * F.silu(self.g_proj(x)).view_as(o)
        y: Tensor = self.o_proj(self.heads_out(call.gated(o)).flatten(2))
        return y

    def _mixed(self, v: Tensor, w: Tensor, call: Call) -> Tensor:
        """Shapes:  v, out: [B, T, H, d];  w: [B, T, H, taps]"""
        past, written = call.state("values"), call.hide_unwritten(v)
        past = (
            v.new_zeros(len(v), self.reach, *v.shape[2:])
            if past is None
            else past.view(len(v), -1, *v.shape[2:])
        )
        held = torch.cat((past.to(v.dtype), written), dim=1)
        # A view would keep all of a long prefill in memory.
        kept = held[:, held.shape[1] - self.reach :].flatten(2).to(self.v_proj.weight.dtype)
        call.keep(values=kept.clone())
        o = torch.zeros_like(v)
        for tap in range(self.reach + 1):
            # A token hears itself, whether later ones will or not.
            row = v if tap == 0 else held[:, self.reach - tap : held.shape[1] - tap]
            if tap < w.shape[-1]:
                o = o + w[..., tap, None] * row
            if self.static is not None and tap < self.static.shape[-1]:
                o = o + wide(self.static[..., tap]) * row
        return o

    def initialise(self, std: float) -> None:
        normal(self.tap_weight, std)
        fill(self.tap_bias, torch.zeros(self.tap_bias.shape))
        if self.static is not None:
            bound = self.static.shape[-1] ** -0.5
            uniform(self.static, -bound, bound)

    def new_cache(self) -> StateLayer:
        return RecurrentLayer()

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random states after `context` tokens, whose step repeats."""
        means = (batch, self.heads, self.summaries, self.query_dim)
        states = {
            "means": like.new_empty(means, dtype=wide_dtype(like.dtype)).normal_(),
            "values": like.new_empty(batch, self.reach, self.heads * self.head_dim).normal_(),
        }
        return PreallocatedRecurrentLayer(states, context=context)

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:  # noqa: ARG002
        """The name of the code that does the mixing."""
        return "torch"
