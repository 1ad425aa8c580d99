"""Softmax attention with grouped heads."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from heddle.specs.base import Schema
from heddle.specs.cost import State
from heddle.specs.kinds import HeadedMixer, Problem, divisors_near, head_dim_of, heads_problems
from heddle.specs.layer import Site
from heddle.specs.sight import Sight


class Rope(Schema):
    """Rotary position embedding, half-split ("NeoX") rotation (arXiv 2104.09864)."""

    theta: Annotated[float, Field(gt=1, le=1e12, description="Base of the wavelengths, in tokens.")] = (
        10_000.0
    )
    fraction: Annotated[
        float, Field(gt=0, le=1, description="Share of each head's dimensions that turn, 0 to 1.")
    ] = 1.0


class Attention(HeadedMixer):
    """Causal softmax attention.

        o_i = sum_j softmax_j(q_i · k_j / sqrt(head_dim)) v_j,   j <= i,   i - j < window

    Grouped heads: arXiv 2305.13245; output gate: arXiv 2505.06708. No biases.
    """

    kind: Literal["attention"] = "attention"
    heads: Annotated[int, Field(ge=1, le=4096, description="Query heads (a count).")]
    kv_heads: Annotated[
        int | None, Field(ge=1, le=4096, description="Key and value heads (a count); null: as many as heads.")
    ] = None
    head_dim: Annotated[
        int | None, Field(ge=1, le=65_536, description="Dimensions of a head; null: hidden_size / heads.")
    ] = None
    rope: Annotated[Rope | None, Field(description="Rotary positions; null: none (NoPE).")] = Rope()
    qk_norm: Annotated[
        bool, Field(description="RMSNorm of each head's query and key, before the rotation.")
    ] = False
    gate: Annotated[bool, Field(description="Sigmoid gate on each head's output.")] = False
    window: Annotated[
        int | None, Field(ge=1, le=10**8, description="Tokens a query sees, its own included; null: all.")
    ] = None

    def resolved(self, site: Site) -> Attention:
        return self.model_copy(
            update={"kv_heads": self.kv_heads or self.heads, "head_dim": head_dim_of(self, site)}
        )

    def sights(self, site: Site) -> tuple[Sight, ...]:  # noqa: ARG002
        return (Sight(self.window),)

    def canonical(self, site: Site) -> dict[str, Any]:
        data = self.runtime(site)
        if self.rope is not None:
            data["rope"] = {"theta": self.rope.theta, "dims": self._turned(site)}
        return data

    def problems(self, site: Site) -> list[Problem]:
        found = heads_problems(self, site)
        if self.kv_heads is not None and self.heads % self.kv_heads:
            what = f"{self.kv_heads} does not divide heads {self.heads}"
            found.append(Problem("kv_heads", what, divisors_near(self.kv_heads, self.heads)))
        return found if found or self.rope is None else self._rope_problems(self.rope, site)

    def _rope_problems(self, rope: Rope, site: Site) -> list[Problem]:
        dim, turned = head_dim_of(self, site), self._turned(site)
        if turned > 0 and turned % 2 == 0:
            return []
        if rope.fraction == 1:
            what = f"head_dim is {dim}, and RoPE turns pairs of dimensions"
            return [
                Problem(
                    "heads" if self.head_dim is None else "head_dim", what, "an even head_dim, or rope: null"
                )
            ]
        what = f"{rope.fraction:g} of head_dim {dim} is {turned} dimensions, and RoPE turns pairs"
        return [Problem("rope.fraction", what, "an even number of dimensions of at least 2, or rope: null")]

    def _turned(self, site: Site) -> int:
        return int(self.rope.fraction * head_dim_of(self, site)) if self.rope is not None else 0

    def params(self, site: Site) -> int:
        return self._weights(site) + (2 * head_dim_of(self, site) if self.qk_norm else 0)

    def flops(self, site: Site, context: int) -> int:
        return 2 * self._weights(site) + self._core(site) * self._visible(context + 1)

    def prefill_flops(self, site: Site, length: int) -> float:
        seen = self._visible(length)
        # The sum of min(t, window) over t = 1 … length, over length.
        mean = (seen * (seen + 1) / 2 + (length - seen) * seen) / max(length, 1)
        return 2 * self._weights(site) + self._core(site) * mean

    def states(self, site: Site) -> tuple[State, ...]:
        shape = (self.kv_heads or self.heads, head_dim_of(self, site))
        # The next token sees itself and what is held.
        limit = None if self.window is None else self.window - 1
        return tuple(State(name, shape, grows=True, limit=limit) for name in ("keys", "values"))

    def _weights(self, site: Site) -> int:
        queries, keys = self.heads * (2 if self.gate else 1), self.kv_heads or self.heads
        return site.hidden_size * head_dim_of(self, site) * (queries + 2 * keys + self.heads)

    def _core(self, site: Site) -> int:
        """FLOPs of one query against one key, and of that weight on its value."""
        return 4 * self.heads * head_dim_of(self, site)

    def _visible(self, tokens: int) -> int:
        return tokens if self.window is None else min(tokens, self.window)
