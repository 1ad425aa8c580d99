"""Multi-head latent attention: softmax attention whose keys and values are made from a short vector, which alone is cached."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.cost import State
from heddle.specs.kinds import HeadedMixer, Problem
from heddle.specs.layer import Site
from heddle.specs.rope import Rope
from heddle.specs.sight import Sight

Size = Annotated[int, Field(ge=1, le=65_536)]


class Mla(HeadedMixer):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434; without positions Kimi Linear, 2510.26692).

        c_j = rms(W_c x_j),  r_j = rope(W_r x_j);   k_jh = (K_h c_j, r_j),  v_jh = V_h c_j;   q_ih = (W_qh x_i, rope(W_sh x_i))
        o_ih = sum_j softmax_j(scale · q_ih · k_jh) v_jh,   j <= i,   i - j < window

    Cached are c and r, one for all heads. With `q_lora_rank` the queries come from a vector of their own, rms(W x).
    """

    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"heads": 4, "kv_lora_rank": 6, "qk_nope_head_dim": 8},
        {
            "heads": 3, "q_lora_rank": 10, "kv_lora_rank": 16, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5,
            "rope": {"theta": 500.0}, "window": 7, "scale": 0.3, "norm_eps": 1e-5,
        },
    )  # fmt: skip
    kind: Literal["mla"] = "mla"
    # Queries and keys have two parts, each with a size of its own.
    head_dim: ClassVar[None] = None  # type: ignore[misc]
    heads: Annotated[int, Field(ge=1, le=4096, description="Heads (a count).")]
    q_lora_rank: Annotated[
        Size | None, Field(description="Features that queries are made of; null: of the input itself.")
    ] = None
    kv_lora_rank: Annotated[
        Size, Field(description="Features that the keys and values of all heads are made of; cached.")
    ]
    qk_nope_head_dim: Annotated[
        Size, Field(description="Dimensions of a query or key head that never turn, each head's own.")
    ]
    qk_rope_head_dim: Annotated[
        int,
        Field(
            ge=0,
            le=65_536,
            description="Further dimensions, whose keys all heads share; cached; they turn if rope says so.",
        ),
    ] = 0
    v_head_dim: Annotated[
        Size | None, Field(description="Dimensions of a value head; null: qk_nope_head_dim.")
    ] = None
    rope: Annotated[Rope | None, Field(description="Rotary positions of the shared part; null: none.")] = None
    window: Annotated[
        int | None, Field(ge=1, le=10**8, description="Tokens a query sees, its own included; null: all.")
    ] = None
    scale: Annotated[
        float | None,
        Field(
            gt=0,
            le=1e6,
            description="Factor of q · k; null: 1 / sqrt(qk_nope_head_dim + qk_rope_head_dim).",
        ),
    ] = None
    norm_eps: Annotated[
        float | None,
        Field(
            gt=0,
            le=0.1,
            description="Added under the root of the norms inside; null: as the model's (DeepSeek and Kimi Linear: 1e-6).",
        ),
    ] = None

    def resolved(self, site: Site) -> Mla:
        sizes = {
            "v_head_dim": self._value_dim(),
            "scale": self.scale or (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5,
            "norm_eps": self.norm_eps or site.norm_eps,
        }
        return self.model_copy(update=sizes)

    def problems(self, site: Site) -> list[Problem]:  # noqa: ARG002 - no size follows from another
        if self.rope is None:
            return []
        if self.qk_rope_head_dim == 0:
            what = "positions, and qk_rope_head_dim is 0: nothing turns"
            return [Problem("rope", what, "a qk_rope_head_dim, or rope: null", "conflicting-fields")]
        wrong = self.rope.problem()
        if wrong is not None:
            return [Problem(f"rope.{wrong[0]}", wrong[1], code="out-of-range")]
        turned = self._turned()
        if turned > 0 and turned % 2 == 0:
            return []
        field = "qk_rope_head_dim" if self.rope.fraction == 1 else "rope.fraction"
        what = f"{turned} of {self.qk_rope_head_dim} dimensions turn, and RoPE turns pairs"
        return [Problem(field, what, "an even number of dimensions of at least 2, or rope: null")]

    def runtime(self, site: Site) -> dict[str, Any]:
        rope = None if self.rope is None else self.rope.runtime()
        return {**self.resolved(site).plain(), "rope": rope}

    def canonical(self, site: Site) -> dict[str, Any]:
        data = self.runtime(site)
        if data["rope"] is not None:
            data["rope"]["dims"] = self._turned()
            del data["rope"]["fraction"]
        return data

    def sights(self, site: Site) -> tuple[Sight, ...]:  # noqa: ARG002
        return (Sight(self.window),)

    def params(self, site: Site) -> int:
        return self._weights(site) + self.kv_lora_rank + (self.q_lora_rank or 0)

    def flops(self, site: Site, context: int) -> int:
        seen = self._visible(context + 1)
        if self._absorbs(1, seen):
            return 2 * self._weights(site) + self._absorbed() * seen
        outside = self._weights(site) - self._expansion()
        return 2 * outside + (2 * self._expansion() + self._expanded()) * seen

    def prefill_flops(self, site: Site, length: int) -> float:
        seen = self._visible(length)
        # The sum of min(t, window) over t = 1 … length, over length.
        mean = (seen * (seen + 1) / 2 + (length - seen) * seen) / max(length, 1)
        core = self._absorbed() if self._absorbs(length, length) else self._expanded()
        return 2 * self._weights(site) + core * mean

    def states(self, site: Site) -> tuple[State, ...]:  # noqa: ARG002
        # The next token sees itself and what is held.
        limit = None if self.window is None else self.window - 1
        parts = {"keys": self.kv_lora_rank, "values": self.qk_rope_head_dim}
        return tuple(State(name, (size,), grows=True, limit=limit) for name, size in parts.items() if size)

    def _value_dim(self) -> int:
        return self.v_head_dim or self.qk_nope_head_dim

    def _turned(self) -> int:
        return 0 if self.rope is None else int(self.rope.fraction * self.qk_rope_head_dim)

    def _visible(self, tokens: int) -> int:
        return tokens if self.window is None else min(tokens, self.window)

    def _expansion(self) -> int:
        """Weights of the matrices that make keys and values of all heads of a latent."""
        return self.kv_lora_rank * self.heads * (self.qk_nope_head_dim + self._value_dim())

    def _weights(self, site: Site) -> int:
        D, size = site.hidden_size, self.heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        rank = self.q_lora_rank
        queries = D * size if rank is None else rank * (D + size)
        latents, output = D * (self.kv_lora_rank + self.qk_rope_head_dim), self.heads * self._value_dim() * D
        return queries + latents + self._expansion() + output

    def _absorbed(self) -> int:
        """FLOPs of one query against one latent, and of that weight on the latent, for all heads."""
        return 2 * self.heads * (2 * self.kv_lora_rank + self.qk_rope_head_dim)

    def _expanded(self) -> int:
        """FLOPs of one query against one key, and of that weight on its value, for all heads."""
        return 2 * self.heads * (self.qk_nope_head_dim + self.qk_rope_head_dim + self._value_dim())

    def _absorbs(self, queries: int, keys: int) -> bool:
        """Whether it is fewer FLOPs to bring queries to latents than latents to queries; the module decides the same."""
        both, rank = self.qk_nope_head_dim + self._value_dim(), self.kv_lora_rank
        return queries * keys * (2 * rank - both) < (keys - queries) * rank * both
