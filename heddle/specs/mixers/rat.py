"""RAT: a gated recurrence inside chunks, softmax attention over what the chunks came to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.cost import FLOAT32_BYTES, State
from heddle.specs.kinds import HeadedMixer, Problem, divisors_near, head_dim_of, heads_problems
from heddle.specs.layer import Site
from heddle.specs.rope import Rope


class Rat(HeadedMixer):
    """Recurrence and attention (arXiv 2507.04416): cache and cost of attention divided by the length L of a chunk.

        k~_t = g_t * k~_{t-1} + (1 - g_t) * k_t,   x~_t = g_t * x~_{t-1} + (1 - g_t) * x_t,   from 0 in every chunk
        o_t = softmax over {last k~ of earlier chunks, k~_t} of (q_t · k~ / sqrt(d)) of the x~
        y = W_o (sigmoid(W_z u) * o),   g = sigmoid(W_g u + b)

    Each channel has its gate. q and k~ turn by RoPE at the number of their chunk. Head h reads group h mod `groups` of q and k.
    With L = 1 and g = 0 it is gated softmax attention, with L of the context's length a gated recurrence. No biases but b.
    """

    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"heads": 4},
        {"heads": 3, "head_dim": 8, "groups": 1, "chunk": 5, "rope": None},
    )
    kind: Literal["rat"] = "rat"
    heads: Annotated[int, Field(ge=1, le=4096, description="Heads (a count).")]
    head_dim: Annotated[
        int | None, Field(ge=1, le=65_536, description="Dimensions of a head; null: hidden_size / heads.")
    ] = None
    groups: Annotated[
        int,
        Field(
            ge=1, le=4096, description="Projections of q and k that the heads share (a count); divides heads."
        ),
    ] = 2
    chunk: Annotated[
        int,
        Field(
            ge=1,
            le=10**8,
            description="L: tokens of a chunk. 1: attention over all; the context's length: recurrence.",
        ),
    ] = 16
    rope: Annotated[
        Rope | None, Field(description="Rotary positions of q and k, the number of the chunk; null: none.")
    ] = Field(default_factory=Rope)

    def head_counts(self) -> dict[str, int]:
        return {"heads": self.heads, "groups": self.groups}

    def resolved(self, site: Site) -> Rat:
        return self.model_copy(update={"head_dim": head_dim_of(self, site)})

    def runtime(self, site: Site) -> dict[str, Any]:
        rope = None if self.rope is None else self.rope.runtime()
        return {**self.resolved(site).plain(), "rope": rope}

    def canonical(self, site: Site) -> dict[str, Any]:
        data = self.runtime(site)
        if data["rope"] is not None:
            data["rope"]["dims"] = self._turned(site)
            del data["rope"]["fraction"]
        return data

    def problems(self, site: Site) -> list[Problem]:
        found = heads_problems(self, site)
        if self.heads % self.groups:
            what = f"{self.groups} does not divide heads {self.heads}"
            found.append(Problem("groups", what, divisors_near(self.groups, self.heads)))
        if found or self.rope is None:
            return found
        wrong = self.rope.problem()
        if wrong is not None:
            return [Problem(f"rope.{wrong[0]}", wrong[1], code="out-of-range")]
        turned, dim = self._turned(site), head_dim_of(self, site)
        if turned > 0 and turned % 2 == 0:
            return []
        field = (
            "rope.fraction" if self.rope.fraction != 1 else "heads" if self.head_dim is None else "head_dim"
        )
        what = f"{turned} of {dim} dimensions of a head would turn, and RoPE turns pairs"
        return [Problem(field, what, "an even number of dimensions of at least 2, or rope: null")]

    def params(self, site: Site) -> int:
        return self._weights(site) + self._width(site)

    def flops(self, site: Site, context: int) -> int:
        return self._outside(site) + self._core(site) * (context // self.chunk + 1)

    def prefill_flops(self, site: Site, length: int) -> float:
        whole, rest = divmod(length, self.chunk)
        # The sum of t // chunk over t = 0 … length - 1.
        before = self.chunk * whole * (whole - 1) / 2 + rest * whole
        return self._outside(site) + self._core(site) * (before / max(length, 1) + 1)

    def states(self, site: Site) -> tuple[State, ...]:
        row = (self.heads, head_dim_of(self, site))
        summaries = (State(name, row, grows=True, every=self.chunk) for name in ("keys", "values"))
        return *summaries, State("running", (2, self._width(site)), element=FLOAT32_BYTES)

    def _turned(self, site: Site) -> int:
        return 0 if self.rope is None else int(self.rope.fraction * head_dim_of(self, site))

    def _width(self, site: Site) -> int:
        return self.heads * head_dim_of(self, site)

    def _weights(self, site: Site) -> int:
        # z, x, g and the output; q and k of each group.
        return site.hidden_size * (4 * self._width(site) + 2 * self.groups * head_dim_of(self, site))

    def _core(self, site: Site) -> int:
        """FLOPs of one query against one key, and of that weight on its value."""
        return 4 * self._width(site)

    def _outside(self, site: Site) -> int:
        # Each of the two recurrences takes three operations a channel.
        return 2 * self._weights(site) + 2 * 3 * self._width(site)
