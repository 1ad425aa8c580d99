"""Random-feature attention: queries and keys by projections that are drawn once and never trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.attention_mixer import AttentionMixer
from heddle.specs.cost import State
from heddle.specs.kinds import head_dim_of
from heddle.specs.layer import Site
from heddle.specs.mixers.attention import Attention
from heddle.specs.rope import Rope


class RfAttention(AttentionMixer):
    """Attention with frozen random queries and keys (arXiv 2307.11353, 2506.01115); values and output are trained.

        q = A_q x,   k = A_k x,   l_ij = τ_h · scale · q_i · k_j,   j <= i,   o_i = Σ_j p_ij v_j
        softmax: p = softmax_j(l)    relu: p = relu(l) / i, of i tokens so far    relu_norm: p = relu(l) / Σ_j relu(l)
        A_q = Z,   A_k = sqrt(1 - ξ²) Z + ξ Z',   Z, Z' from N(0, 1 / D) by `seed`, layer and head

    ξ is `key_noise`: at 1 logits have mean 0, below they favour tokens that are alike. The matrices are buffers: no parameters,
    and in the checkpoint. Not Random Feature Attention (arXiv 2103.02143), which is linear.
    """

    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {
            "heads": 3,
            "head_dim": 6,
            "score": "relu",
            "key_noise": 0.5,
            "scale": 2.0,
            "learned_scale": True,
            "rope": {"theta": 500.0},
            "detached": True,
            "seed": 3,
        },
    )
    kind: Literal["rf_attention"] = "rf_attention"
    heads: Annotated[int, Field(ge=1, le=4096, description="Heads (a count).")]
    head_dim: Annotated[
        int | None, Field(ge=1, le=65_536, description="Dimensions of a head; null: hidden_size / heads.")
    ] = None
    score: Annotated[
        Literal["softmax", "relu", "relu_norm"],
        Field(description="What makes weights of logits; relu divides by the count of tokens."),
    ] = "softmax"
    key_noise: Annotated[
        float,
        Field(ge=0, le=1, description="ξ: 0 gives keys the projection of queries, 1 an independent one."),
    ] = 1.0
    scale: Annotated[
        float | None, Field(gt=0, le=1e6, description="Factor of q · k; null: 1 / sqrt(head_dim).")
    ] = None
    learned_scale: Annotated[
        bool, Field(description="A learned factor of each head's logits, which begins at 1.")
    ] = False
    rope: Annotated[Rope | None, Field(description="Rotary positions; null: none.")] = None
    detached: Annotated[
        bool, Field(description="No gradient reaches the input through queries and keys.")
    ] = False
    seed: Annotated[
        int, Field(ge=0, le=2**31 - 1, description="What the matrices are drawn by, with layer and head.")
    ] = 0

    def resolved(self, site: Site) -> RfAttention:
        dim = head_dim_of(self, site)
        return self.model_copy(update={"head_dim": dim, "scale": self.scale or dim**-0.5})

    def params(self, site: Site) -> int:
        return self._trained(site) + (self.heads if self.learned_scale else 0)

    def frozen_params(self, site: Site) -> int:
        return self._trained(site)

    def flops(self, site: Site, context: int) -> int:
        return self._attention().flops(site, context)

    def prefill_flops(self, site: Site, length: int) -> float:
        return self._attention().prefill_flops(site, length)

    def states(self, site: Site) -> tuple[State, ...]:
        return self._attention().states(site)

    def _attention(self) -> Attention:
        """Attention that costs as much."""
        return Attention(heads=self.heads, head_dim=self.head_dim, rope=self.rope)

    def _trained(self, site: Site) -> int:
        # Values and output; as much is frozen.
        return 2 * site.hidden_size * self.heads * head_dim_of(self, site)
