"""NAtS-L: each chunk of tokens is remembered by softmax attention or by Gated DeltaNet, head by head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.cost import FLOAT32_BYTES, State
from heddle.specs.kinds import HeadedMixer, Problem, divisors_near, head_dim_of, heads_problems
from heddle.specs.layer import Site
from heddle.specs.mixers.gated_deltanet import GATE, GatedDeltaNet
from heddle.specs.sight import Sight


class NatsL(HeadedMixer):
    """Neural attention search for linear attention (arXiv 2602.03681), as its released code has it.

        type_c = argmax W mean_{t in c} x_t, for each head:  a chunk that is complete is `softmax` or `linear`
        a_t = softmax attention over the own chunk and all earlier chunks of type softmax
        S   = Gated DeltaNet's state; after a chunk of type softmax what the chunk wrote is undone and its decay stays
        y   = W_o ((w_0 norm(S q) + w_1 norm(a)) * silu(W_g x)),   w = softmax(W_m q)

    Both share q, k, v and their convolution; attention splits each head into `split` smaller ones. A type changes nothing in its
    own chunk, so no later token is seen. The gradient goes straight through to the softmax over types, from the chosen one.
    """

    ops: ClassVar[tuple[str, ...]] = (
        "gated_delta_rule",
        "routed_delta_rule",
        "causal_conv1d",
        "block_attention",
    )
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"heads": 2},
        {
            "heads": 2,
            "head_dim": 6,
            "value_dim": 9,
            "split": 3,
            "chunk": 48,
            "short_conv": 3,
            "negative_eigenvalues": True,
            "budget": 0.25,
        },
        {"heads": 2, "budget": 0.5, "budget_factor": 0.1, "dense_first": 0.5},
    )
    routes: ClassVar[bool] = True
    kind: Literal["nats_l"] = "nats_l"
    heads: Annotated[int, Field(ge=1, le=4096, description="Heads of the recurrence (a count).")]
    head_dim: Annotated[
        int | None,
        Field(ge=1, le=65_536, description="Dimensions of a query or key head; null: hidden_size / heads."),
    ] = None
    value_dim: Annotated[
        int | None, Field(ge=1, le=65_536, description="Dimensions of a value head; null: as head_dim.")
    ] = None
    split: Annotated[
        int,
        Field(
            ge=1,
            le=4096,
            description="Heads of attention in each head of the recurrence (a count); divides head_dim and value_dim.",
        ),
    ] = 2
    chunk: Annotated[int, Field(ge=1, le=65_536, description="Tokens that have one type.")] = 64
    short_conv: Annotated[
        int, Field(ge=2, le=64, description="Taps of the causal convolution on q, k and v, in tokens.")
    ] = 4
    negative_eigenvalues: Annotated[
        bool, Field(description="Let beta reach 2 instead of 1 (arXiv 2411.12537).")
    ] = False
    budget: Annotated[
        float | None,
        Field(
            ge=0,
            le=1,
            description="Share of chunks (0 to 1) that attention should remember, asked for by a loss (share - budget)²; "
            "null: no such loss.",
        ),
    ] = None
    budget_factor: Annotated[
        float, Field(ge=0, le=1e6, description="Factor of that loss in the training loss.")
    ] = 0.01
    dense_first: Annotated[
        float | None,
        Field(
            gt=0,
            le=1,
            description="Share of a training's steps (0 to 1), the first ones, with all chunks of type softmax; null: none.",
        ),
    ] = None

    def output_heads(self) -> int:
        return self.heads * self.split

    def resolved(self, site: Site) -> NatsL:
        K = head_dim_of(self, site)
        return self.model_copy(update={"head_dim": K, "value_dim": self.value_dim or K})

    def problems(self, site: Site) -> list[Problem]:
        found = heads_problems(self, site)
        sizes = self.resolved(site)
        for field in ("head_dim", "value_dim"):
            size = getattr(sizes, field)
            if not found and size % self.split:
                what = f"{self.split} does not divide {field} {size}"
                found.append(Problem("split", what, divisors_near(self.split, size)))
        return found

    def canonical(self, site: Site) -> dict[str, Any]:
        return super().canonical(site) | ({"budget_factor": None} if self.budget is None else {})

    def params(self, site: Site) -> int:
        K, V = self._dims(site)
        # Beside Gated DeltaNet: types, shares, and norms of the smaller heads in the place of its own.
        more = 2 * self.heads * site.hidden_size + 2 * self.heads**2 * self.split * K
        return self._linear().params(site) - V + more + (2 * K + V) // self.split

    def flops(self, site: Site, context: int) -> int:
        """FLOPs of decoding a token, as if all chunks were of type softmax."""
        return self._linear().flops(site, context) + self._core(site) * (context + 1) + self._more(site)

    def prefill_flops(self, site: Site, length: int) -> float:
        seen = (length + 1) / 2
        return self._linear().prefill_flops(site, length) + self._core(site) * seen + self._more(site)

    def sights(self, site: Site) -> tuple[Sight, ...]:  # noqa: ARG002
        return (Sight(1), Sight(is_certain=False), Sight(log_decay=-GATE, is_certain=False))

    def states(self, site: Site) -> tuple[State, ...]:
        """As if all chunks were of type softmax: evaluation drops those that no head keeps."""
        (K, V), heads = self._dims(site), self.heads * self.split
        memory, conv = self._linear().states(site)
        return (
            State("keys", (heads, K // self.split), grows=True),
            State("values", (heads, V // self.split), grows=True),
            State("written", (1, 1), grows=True, element=1),
            State("types", (self.heads, 1), grows=True, every=self.chunk, element=FLOAT32_BYTES),
            memory,
            State("start", memory.shape, element=FLOAT32_BYTES),
            State("faded", (self.heads, 1), element=FLOAT32_BYTES),
            State("open", (1, site.hidden_size + 2), element=FLOAT32_BYTES),
            conv,
        )

    def _dims(self, site: Site) -> tuple[int, int]:
        K = head_dim_of(self, site)
        return K, self.value_dim or K

    def _linear(self) -> GatedDeltaNet:
        """The layer that it is where no chunk is of type softmax, but for shares and types."""
        names = ("heads", "head_dim", "value_dim", "short_conv", "negative_eigenvalues")
        return GatedDeltaNet(**{name: getattr(self, name) for name in names})

    def _core(self, site: Site) -> int:
        """FLOPs of one query against one key, and of that weight on its value."""
        return 2 * self.heads * sum(self._dims(site))

    def _more(self, site: Site) -> int:
        # Types are asked for once in a chunk, and counted for each token as a bound.
        return 4 * self.heads * (site.hidden_size + self.heads * self.split * self._dims(site)[0])
