"""A running mean of values, each weighed by a number that its own token gives."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.cache import Call, RecurrentLayer, StateLayer
from heddle.compose.modules.memory import MEMORY, filled_memory
from heddle.compose.modules.norm import RMSNorm
from heddle.compose.modules.precision import wide
from heddle.compose.modules.site import Site

# Tokens whose weights stand in memory at once, and a logit below all others that is still a number.
CHUNK = 64
LEAST = -1e30


class GatedPoolModule(nn.Module):
    """Softmax over what each token thinks of itself.        (arXiv 2510.11602, the form that keeps no similarity)

        s_j = silu(q_j) · k_j / sqrt(d),   o_i = sum_{j <= i} e^(s_j) v_j / sum_{j <= i} e^(s_j)

    Sums are kept as multiples of e^m, m the largest s so far, in at least float32. Padding and what is not written weighs 0.

    Shapes:  x, y: [B, T, D];  state: [B, H, d + 2], the sums of e^(s - m) v, of e^(s - m), and m;  `heads_out` sees [B, T, H, d]
    """

    def __init__(self, site: Site, *, heads: int, head_dim: int, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(site.hidden_size, heads * head_dim, bias=False) for _ in range(3)
        )
        self.q_norm = RMSNorm(head_dim, site.norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, site.norm_eps) if qk_norm else None
        self.heads_out = nn.Identity()
        self.o_proj = nn.Linear(heads * head_dim, site.hidden_size, bias=False)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        q, k, v = (
            wide(proj(x)).view(*x.shape[:2], self.heads, -1)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        scores = (F.silu(q) * k).sum(dim=-1) * self.head_dim**-0.5
        weights = call.hide_unwritten(call.hide_padding(torch.ones_like(scores)))
        scores = scores.masked_fill(weights <= 0.5, LEAST)
        state, outputs = call.state(MEMORY), []
        if state is None:
            state = F.pad(v.new_zeros(*v[:, 0, :, :1].shape), (self.head_dim, 0))
            state = F.pad(state, (0, 1), value=LEAST)
        chunks = (torch.split(side, CHUNK, dim=1) for side in (scores, weights, v))
        for s, w, values in zip(*chunks, strict=True):
            o, state = _pooled(s, w, values, state)
            outputs.append(o)
        call.keep(memory=state)
        o = torch.cat(outputs, dim=1).to(x.dtype)
        y: Tensor = self.o_proj(self.heads_out(call.gated(o)).flatten(2))
        return y

    def new_cache(self) -> StateLayer:
        return RecurrentLayer()

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random states after `context` tokens, whose step repeats."""
        cache = filled_memory((batch, self.heads, self.head_dim + 2), context, like)
        # The sum of weights, by which all else is divided.
        cache.states[MEMORY][..., -2].abs_().add_(1.0)
        return cache

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:  # noqa: ARG002
        """The name of the code that does the mixing."""
        return "torch"


def _pooled(scores: Tensor, weights: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The means at each token of a chunk, and the sums after it.

    Shapes:  scores, weights: [B, C, H];  v, out: [B, C, H, d];  state: [B, H, d + 2]
    """
    scores, weights = scores.mT, weights.mT
    sums, most = state[..., :-1], state[..., -1:]
    # A shift of all exponents changes nothing, so no gradient needs to pass it.
    top = torch.maximum(scores.detach().cummax(dim=-1).values, most.detach())
    # Masked first: later logits may be above the largest so far, and overflow.
    later = torch.ones(2 * scores.shape[-1:], dtype=torch.bool, device=v.device).triu(1)
    apart = (scores[:, :, None] - top[..., None]).masked_fill(later, -torch.inf)
    mixing = torch.exp(apart) * weights[:, :, None]
    beside = torch.cat((v, torch.ones_like(v[..., :1])), dim=-1).transpose(1, 2)
    sums = mixing @ beside + torch.exp(most - top)[..., None] * sums[:, :, None]
    total = sums[..., -1:].clamp(min=torch.finfo(v.dtype).tiny)
    after = torch.cat((sums[:, :, -1], top[..., -1:]), dim=-1)
    return (sums[..., :-1] / total).transpose(1, 2), after
