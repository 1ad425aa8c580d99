"""STILL: a few salient tokens of each chunk stay keys of softmax attention, a linear state takes the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from heddle.specs.attention_mixer import AttentionMixer
from heddle.specs.cost import FLOAT32_BYTES, State
from heddle.specs.kinds import Problem, head_dim_of
from heddle.specs.layer import Site
from heddle.specs.rope import Rope
from heddle.specs.sight import Sight


class Still(AttentionMixer):
    """STILL (arXiv 2602.02180), as its released code has it where that is consistent.

        p_t = the weight of token t on itself, by softmax over the last `chunk` tokens;   salient: the `keep` largest of a chunk
        E   = own chunk up to t, the chunk before it, and the salient tokens of all chunks before that;   F = the other tokens
        o_t = (sum_E e^(s_tj - m) v_j + g_t * sum_F φ(q_t)·φ(k_j) v_j) / (sum_E e^(s_tj - m) + sum_F φ(q_t)·φ(k_j))
        s_tj = q_t · k_j / sqrt(d),   m = max_E s_tj,   g = sigmoid(W_g x),   φ(x) = [softmax z, softmax -z]
        z   = |x| W x' / |W x'|,   x' = x - 2 u (u · x) / |u|²

    A chunk is sorted out when it leaves the two chunks in sight, so nothing that is read ever depends on later tokens.
    """

    ops: ClassVar[tuple[str, ...]] = ("token_split_attention",)
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"heads": 4, "chunk": 16, "keep": 2},
        {
            "heads": 4,
            "kv_heads": 2,
            "head_dim": 6,
            "rope": {"theta": 500.0},
            "qk_norm": True,
            "chunk": 7,
            "keep": 2,
            "features": 5,
            "chosen_by": "group",
        },
    )
    routes: ClassVar[bool] = True
    kind: Literal["still"] = "still"
    heads: Annotated[int, Field(ge=1, le=4096, description="Query heads (a count).")]
    kv_heads: Annotated[
        int | None, Field(ge=1, le=4096, description="Key and value heads (a count); null: as many as heads.")
    ] = None
    head_dim: Annotated[
        int | None, Field(ge=1, le=65_536, description="Dimensions of a head; null: hidden_size / heads.")
    ] = None
    rope: Annotated[
        Rope | None, Field(description="Rotary positions, of the features φ too; null: none.")
    ] = Field(default_factory=Rope)
    qk_norm: Annotated[
        bool, Field(description="RMSNorm of each head's query and key, before the rotation.")
    ] = False
    chunk: Annotated[
        int, Field(ge=1, le=65_536, description="Tokens of a chunk, and of the window that scores a token.")
    ] = 64
    keep: Annotated[
        int, Field(ge=0, le=65_536, description="Tokens of a chunk that stay keys (a count); at most chunk.")
    ] = 4
    features: Annotated[
        int | None,
        Field(ge=1, le=65_536, description="Features of z, half of those of φ (a count); null: head_dim."),
    ] = None
    chosen_by: Annotated[
        Literal["head", "group"],
        Field(
            description="Who chooses the tokens that stay: each query head, which then has keys, values and a state of its own, "
            "as published; or the query heads of a KV head together, by the mean of p."
        ),
    ] = "head"

    def resolved(self, site: Site) -> Self:
        return super().resolved(site).model_copy(update={"features": self._features(site)})

    def problems(self, site: Site) -> list[Problem]:
        found = super().problems(site)
        if self.keep > self.chunk:
            what = f"{self.keep} tokens cannot stay of a chunk of {self.chunk}"
            found.append(Problem("keep", what, f"at most {self.chunk}", "out-of-range"))
        return found

    def canonical(self, site: Site) -> dict[str, Any]:
        data = super().canonical(site)
        # A group of one head chooses as the head does.
        return {**data, "chosen_by": "head"} if data["kv_heads"] == self.heads else data

    def params(self, site: Site) -> int:
        dim, features = head_dim_of(self, site), self._features(site)
        maps = (self.heads + self._stores()) * dim * (1 + features)
        return self._attention().params(site) + maps + self._gate(site)

    def flops(self, site: Site, context: int) -> int:
        chunks, here = divmod(context, self.chunk)
        near = here + 1 + (self.chunk if chunks else 0)
        seen = near + self.keep * max(0, chunks - 1)
        return self._outside(site) + self._core(site) * seen

    def prefill_flops(self, site: Site, length: int) -> float:
        (full, rest), size = divmod(length, self.chunk), self.chunk
        near = full * size * (size + 1) / 2 + rest * (rest + 1) / 2
        before = max(0, full - 1) * size**2 + (rest * size if full else 0)
        chosen = self.keep * (size * max(0, full - 1) * (full - 2) / 2 + rest * max(0, full - 1))
        return self._outside(site) + self._core(site) * (near + before + chosen) / max(length, 1)

    def sights(self, site: Site) -> tuple[Sight, ...]:  # noqa: ARG002
        # All tokens through the state or as keys; as keys alone at least the chunk before.
        return (Sight(), Sight(self.chunk + 1))

    def states(self, site: Site) -> tuple[State, ...]:
        heads, dim, recent = self._stores(), head_dim_of(self, site), 2 * self.chunk - 1

        def kept(name: str, *shape: int, element: int | None = None) -> State:
            return State(name, shape, grows=True, every=self.chunk, late=1, element=element)

        return (
            State("keys", (heads, dim), grows=True, limit=recent),
            State("values", (heads, dim), grows=True, limit=recent),
            State("scores", (heads, 1), grows=True, limit=recent, element=FLOAT32_BYTES),
            kept("salient_keys", heads, self.keep, dim),
            kept("salient_values", heads, self.keep, dim),
            kept("salient_written", heads, self.keep, element=1),
            State("memory", (heads, 2 * self._features(site), dim + 1), element=FLOAT32_BYTES),
        )

    def _features(self, site: Site) -> int:
        return self.features or head_dim_of(self, site)

    def _stores(self) -> int:
        """Heads that have keys, values and a state of their own."""
        return self.heads if self.chosen_by == "head" else self.kv_heads or self.heads

    def _gate(self, site: Site) -> int:
        return site.hidden_size * self.heads * head_dim_of(self, site)

    def _core(self, site: Site) -> int:
        """FLOPs of one query against one key, and of that weight on its value."""
        return 4 * self.heads * head_dim_of(self, site)

    def _outside(self, site: Site) -> int:
        """Projections, φ of a query and a key, a read of the state and, as if every token went there, a write."""
        dim, features = head_dim_of(self, site), self._features(site)
        heads = 2 * self.heads + 2 * (self.kv_heads or self.heads)
        mapped = (self.heads + self._stores()) * (2 * dim * features + 4 * dim + 4 * features * (dim + 1))
        return 2 * (site.hidden_size * dim * heads + self._gate(site)) + mapped
