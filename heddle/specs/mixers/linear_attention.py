"""Linear attention: weights that are products of features, added up into a memory that never fades."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.cost import CHUNK, FLOAT32_BYTES, State
from heddle.specs.kinds import Problem
from heddle.specs.layer import Site
from heddle.specs.memory_mixer import MemoryMixer
from heddle.specs.mixers.attention import Attention
from heddle.specs.rope import Rope


class LinearAttention(MemoryMixer):
    """Linear attention with a feature map and weights that sum to one (arXiv 2006.16236).

        o_i = Σ_j φ(q_i) · φ(k_j) v_j / Σ_j φ(q_i) · φ(k_j),   j <= i
        taylor2: φ(q) · φ(k) = 1 + x + x² / 2,   x = q · k / sqrt(K)      (arXiv 2402.18668; 2510.11602, "Approximate")
        elu:     φ(u) = elu(u) + 1

    K is head_dim, V is value_dim. `taylor2` is exp to the second order and above 0 everywhere. It has F = (K + 1)(K + 2) / 2
    features, of the products of two dimensions each pair once; `elu` has F = K. A head remembers F (V + 1) numbers.
    """

    ops: ClassVar[tuple[str, ...]] = ("simple_gla",)
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"heads": 4, "head_dim": 4, "value_dim": 12},
        {"heads": 3, "head_dim": 6, "feature": "elu", "rope": None, "qk_norm": True, "short_conv": 3},
    )
    kind: Literal["linear_attention"] = "linear_attention"
    heads: Annotated[int, Field(ge=1, le=4096, description="Heads (a count).")]
    head_dim: Annotated[
        int | None,
        Field(ge=1, le=4096, description="Dimensions of a query or key head; null: hidden_size / heads."),
    ] = None
    value_dim: Annotated[
        int | None, Field(ge=1, le=65_536, description="Dimensions of a value head; null: as head_dim.")
    ] = None
    feature: Annotated[
        Literal["taylor2", "elu"],
        Field(description="The feature map: exp to the second order, or elu + 1."),
    ] = "taylor2"
    rope: Annotated[
        Rope | None, Field(description="Rotary positions of q and k, before the feature map; null: none.")
    ] = Field(default_factory=Rope)
    qk_norm: Annotated[
        bool, Field(description="RMSNorm of each head's query and key, before the rotation.")
    ] = False
    short_conv: Annotated[
        int | None,
        Field(
            ge=2,
            le=64,
            description="Taps of a causal convolution with SiLU on q, k and v, in tokens; null: none.",
        ),
    ] = None

    def kernels(self) -> tuple[str, ...]:
        own = ("taylor_attention",) if self.feature == "taylor2" else ()
        return (*own, *super().kernels())

    def runtime(self, site: Site) -> dict[str, Any]:
        rope = None if self.rope is None else self.rope.runtime()
        return {**self.resolved(site).plain(), "rope": rope}

    def canonical(self, site: Site) -> dict[str, Any]:
        return {**self.runtime(site), "rope": self._attention().canonical(site)["rope"]}

    def problems(self, site: Site) -> list[Problem]:
        return self._attention().problems(site)

    def params(self, site: Site) -> int:
        K, _ = self._sizes(site)
        norms = 2 * K if self.qk_norm else 0
        return self._weights(site) + (self.short_conv or 0) * self._channels(site) + norms

    def flops(self, site: Site, context: int) -> int:  # noqa: ARG002 - the state does not grow
        F, W = self._memory(site)
        return self._outside(site) + self.step_flops * self.heads * F * W

    def prefill_flops(self, site: Site, length: int) -> float:
        (F, W), C = self._memory(site), min(CHUNK, length)
        # φ(q) φ(k)ᵀ: C F; of that on values and 1: C W; φ(q) S and φ(k)ᵀ v: F W each.
        return self._outside(site) + self.heads * 2 * (C * (F + W) + 2 * F * W)

    def states(self, site: Site) -> tuple[State, ...]:
        memory = State("memory", (self.heads, *self._memory(site)), element=FLOAT32_BYTES)
        return (memory, *super().states(site)[1:])

    def _memory(self, site: Site) -> tuple[int, int]:
        """Features of a key, and numbers that each of them remembers: a value and the sum of weights."""
        K, V = self._sizes(site)
        return ((K + 1) * (K + 2) // 2 if self.feature == "taylor2" else K), V + 1

    def _weights(self, site: Site) -> int:
        K, V = self._sizes(site)
        # q, k; v, output.
        return site.hidden_size * self.heads * (2 * K + 2 * V)

    def _attention(self) -> Attention:
        """The attention whose queries and keys it has."""
        return Attention(heads=self.heads, head_dim=self.head_dim, rope=self.rope, qk_norm=self.qk_norm)
