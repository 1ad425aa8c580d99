"""RetNet: retention, linear attention with rotary positions and a decay fixed for each head or gated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.kinds import Problem, head_dim_of, heads_problems
from heddle.specs.layer import Site
from heddle.specs.memory_mixer import MemoryMixer
from heddle.specs.mixers.gla import GATE
from heddle.specs.rope import Rope
from heddle.specs.sight import Sight


class RetNet(MemoryMixer):
    """Multi-scale retention (arXiv 2307.08621): a memory that fades at a rate fixed for each head, read at rotary positions.

        S_t = γ_h S_{t-1} + k_t v_tᵀ,   o_t = S_tᵀ q_t / sqrt(K),   γ_h = 1 - 2^(-5-h),  h from 0
        y = W_o (rms of each head(o) * silu(W_g x))

    q and k turn by RoPE; with the decay this is the paper's xPos. K is head_dim, V is value_dim. No biases.
    With `decay: gate` (gated retention, arXiv 2405.05254) γ is a number for each token and head, sigmoid(W x_t)^(1/16).
    """

    ops: ClassVar[tuple[str, ...]] = ("decay_attention",)
    expand: ClassVar[int] = 2
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"heads": 4},
        {"heads": 3, "head_dim": 8, "value_dim": 12, "rope": None, "short_conv": 4},
        {"heads": 3, "head_dim": 8, "value_dim": 12, "decay": "gate", "short_conv": 3},
    )
    kind: Literal["retnet"] = "retnet"
    heads: Annotated[int, Field(ge=1, le=4096, description="Heads (a count).")]
    head_dim: Annotated[
        int | None,
        Field(ge=1, le=65_536, description="Dimensions of a query or key head; null: hidden_size / heads."),
    ] = None
    value_dim: Annotated[
        int | None, Field(ge=1, le=65_536, description="Dimensions of a value head; null: 2 · head_dim.")
    ] = None
    rope: Annotated[
        Rope | None,
        Field(description="Rotary positions of q and k; null: none, the decay alone tells the order."),
    ] = Field(default_factory=Rope)
    decay: Annotated[
        Literal["fixed", "gate"],
        Field(description="How a head fades: at a rate of its own, or by a gate for each token."),
    ] = "fixed"
    short_conv: Annotated[
        int | None,
        Field(
            ge=2,
            le=64,
            description="Taps of a causal convolution with SiLU on q, k and v, in tokens; null: none.",
        ),
    ] = None

    def kernels(self) -> tuple[str, ...]:
        first, *others = super().kernels()
        return ("simple_gla" if self.decay == "gate" else first, *others)

    def runtime(self, site: Site) -> dict[str, Any]:
        rope = None if self.rope is None else self.rope.runtime()
        data = {**self.resolved(site).model_dump(), "rope": rope}
        # Gates came later: nothing is said of them where decays are fixed, so that no older hash changes.
        return {name: value for name, value in data.items() if name != "decay" or value == "gate"}

    def canonical(self, site: Site) -> dict[str, Any]:
        data = self.runtime(site)
        if data["rope"] is not None:
            data["rope"]["dims"] = self._turned(site)
            del data["rope"]["fraction"]
        return data

    def problems(self, site: Site) -> list[Problem]:
        found = heads_problems(self, site)
        if found or self.rope is None:
            return found
        wrong = self.rope.problem()
        if wrong is not None:
            return [Problem(f"rope.{wrong[0]}", wrong[1], code="out-of-range")]
        turned, (K, _) = self._turned(site), self._sizes(site)
        if turned > 0 and turned % 2 == 0:
            return []
        field = (
            "rope.fraction" if self.rope.fraction != 1 else "heads" if self.head_dim is None else "head_dim"
        )
        what = f"{turned} of {K} dimensions of a head would turn, and RoPE turns pairs"
        return [Problem(field, what, "an even number of dimensions of at least 2, or rope: null")]

    def params(self, site: Site) -> int:
        _, V = self._sizes(site)
        return self._weights(site) + (self.short_conv or 0) * self._channels(site) + V

    def sights(self, site: Site) -> tuple[Sight, ...]:  # noqa: ARG002
        if self.decay == "gate":
            return (Sight(log_decay=-GATE),)
        return tuple(Sight(log_decay=math.log1p(-(2.0 ** (-5 - head)))) for head in range(self.heads))

    def _turned(self, site: Site) -> int:
        return 0 if self.rope is None else int(self.rope.fraction * head_dim_of(self, site))

    def _weights(self, site: Site) -> int:
        K, V = self._sizes(site)
        # q, k; v, gate, output; the decay.
        return site.hidden_size * self.heads * (2 * K + 3 * V + (self.decay == "gate"))
