"""Local linear attention: softmax attention that fits a line where softmax takes a mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.attention_mixer import AttentionMixer
from heddle.specs.cost import State
from heddle.specs.kinds import head_dim_of
from heddle.specs.layer import Site
from heddle.specs.rope import Rope
from heddle.specs.sight import Sight


class LocalLinearAttention(AttentionMixer):
    """Local linear attention (arXiv 2510.01450), and its relative without a solve (Parallax, arXiv 2605.29157).

        p_j = softmax_j(q_i · k_j / sqrt(d)),   x_i = (Cov_p(k) + ridge I)⁻¹ (q_i - E_p[k]),   j <= i,   i - j < window
        o_i = sum_j p_j (1 + (k_j - E_p[k]) · x_i) v_j;   y = W_o o

    With `slope: learned` x_i = -W_r u_i, turned as q_i is. A great ridge, or a slope of 0, is softmax attention. No biases.
    """

    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"heads": 4, "kv_heads": 2, "ridge": 0.5},
        {
            **{"heads": 3, "head_dim": 8, "rope": {"theta": 500.0, "fraction": 0.5}, "qk_norm": False},
            **{"slope": "learned", "window": 40},
        },
    )
    of_attention: ClassVar[tuple[str, ...]] = ("heads", "kv_heads", "head_dim", "rope", "window")
    kind: Literal["local_linear_attention"] = "local_linear_attention"
    heads: Annotated[int, Field(ge=1, le=4096, description="Query heads (a count).")]
    kv_heads: Annotated[
        int | None, Field(ge=1, le=4096, description="Key and value heads (a count); null: as many as heads.")
    ] = None
    head_dim: Annotated[
        int | None, Field(ge=1, le=65_536, description="Dimensions of a head; null: hidden_size / heads.")
    ] = None
    rope: Annotated[Rope | None, Field(description="Rotary positions of q and k; null: none.")] = Field(
        default_factory=Rope
    )
    qk_norm: Annotated[bool, Field(description="RMSNorm of each head of q and k before the rotation.")] = True
    slope: Annotated[
        Literal["solved", "learned"],
        Field(description="solved: the line of least squares; learned: a projection of the input, no solve."),
    ] = "solved"
    ridge: Annotated[
        float,
        Field(
            ge=1e-4, le=1e12, description="Added to the covariance of keys that is solved; great: softmax."
        ),
    ] = 10.0
    window: Annotated[
        int | None,
        Field(ge=1, le=10**9, description="Tokens back that are seen, the own included; null: all."),
    ] = None

    def canonical(self, site: Site) -> dict[str, Any]:
        data = super().canonical(site)
        if self.slope == "learned":
            data["ridge"] = None
        return data

    def params(self, site: Site) -> int:
        return self._weights(site) + (2 * head_dim_of(self, site) if self.qk_norm else 0)

    def flops(self, site: Site, context: int) -> int:
        return self._own(site) + self._core(site) * self._visible(context + 1)

    def prefill_flops(self, site: Site, length: int) -> float:
        seen = self._visible(length)
        # The sum of min(t, window) over t = 1 … length, over length.
        mean = (seen * (seen + 1) / 2 + (length - seen) * seen) / max(length, 1)
        return self._own(site) + self._core(site) * mean

    def sights(self, site: Site) -> tuple[Sight, ...]:
        return self._attention().sights(site)

    def states(self, site: Site) -> tuple[State, ...]:
        return self._attention().states(site)

    def _weights(self, site: Site) -> int:
        # q and the output, keys and values, and the slope.
        shared = self.kv_heads or self.heads
        heads = 2 * self.heads + 2 * shared + (self.heads if self.slope == "learned" else 0)
        return site.hidden_size * head_dim_of(self, site) * heads

    def _own(self, site: Site) -> int:
        """FLOPs of a token whatever it sees: projections; where it is solved, Cholesky's factor and two triangles."""
        dim = head_dim_of(self, site)
        solve = dim**3 // 3 + 2 * dim**2 if self.slope == "solved" else 0
        return 2 * self._weights(site) + self.heads * solve

    def _core(self, site: Site) -> int:
        """FLOPs of one query against one key: q · k, x · k and p v; where it is solved, the moments p k and p k kᵀ."""
        dim = head_dim_of(self, site)
        return self.heads * (6 * dim if self.slope == "learned" else 8 * dim + 2 * dim**2)

    def _visible(self, tokens: int) -> int:
        return tokens if self.window is None else min(tokens, self.window)
