"""Hierarchical self-attention: softmax attention between the blocks of a tree, for encoders."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from heddle.compose.cache import Call, PreallocatedRecurrentLayer, StateLayer, TokenCount
from heddle.compose.modules.hierarchy import hierarchical_attention
from heddle.compose.modules.norm import RMSNorm
from heddle.compose.modules.site import Site
from heddle.errors import HeddleError


class HierarchicalAttentionModule(nn.Module):
    """Weights tied between siblings of a tree over the tokens, nearest to those of softmax attention.        (arXiv 2509.15448)

        o = hierarchical_attention(rms(W_q x), rms(W_k x), W_v x);   y = W_o o

    The tree counts real tokens. It sees both sides: there is nothing to decode, and no cache.

    Shapes:  x, y: [B, T, D];  `heads_out` sees [B, T, H, d]

    Raises:
        HeddleError: "bad-argument" for a cache of earlier tokens.
    """

    def __init__(
        self, site: Site, *, heads: int, head_dim: int, branching: int, own: bool, qk_norm: bool
    ) -> None:
        super().__init__()
        self.heads, self.branching, self.own = heads, branching, own
        self.q_proj = nn.Linear(site.hidden_size, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(site.hidden_size, heads * head_dim, bias=False)
        self.v_proj = nn.Linear(site.hidden_size, heads * head_dim, bias=False)
        self.q_norm = RMSNorm(head_dim, site.norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, site.norm_eps) if qk_norm else None
        self.heads_out = nn.Identity()
        self.o_proj = nn.Linear(heads * head_dim, site.hidden_size, bias=False)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        if call.cache is not None and call.cache.get_seq_length() > 0:
            raise HeddleError("bad-argument", "attention that sees later tokens cannot go on from a cache")
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = q if self.q_norm is None else self.q_norm(q)
        k = k if self.k_norm is None else self.k_norm(k)
        q, k, v = (side.transpose(1, 2) for side in (q, k, v))
        o = hierarchical_attention(q, k, v, branching=self.branching, own=self.own, real=call.padding)
        y: Tensor = self.o_proj(self.heads_out(call.gated(o.transpose(1, 2))).flatten(2))
        return y

    def new_cache(self) -> StateLayer:
        return TokenCount()

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:  # noqa: ARG002
        """A cache after `context` tokens, which holds nothing."""
        return PreallocatedRecurrentLayer({}, context=context)

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:  # noqa: ARG002
        """The name of the code that does the mixing."""
        return "torch"
