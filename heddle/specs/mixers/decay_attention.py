"""Linear attention with a fixed decay for each head, in the Lightning and the RetNet form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.cost import CHUNK, FLOAT32_BYTES, State
from heddle.specs.kinds import HeadedMixer, Problem, head_dim_of, heads_problems
from heddle.specs.layer import Site
from heddle.specs.sight import Sight


class DecayAttention(HeadedMixer):
    """A matrix state that fades at a fixed rate: no gate to compute, the cheapest of its family.

        S_t = exp(log_decay) S_{t-1} + k_t v_tᵀ,   o_t = scale · S_tᵀ q_t

    lightning: SiLU on q, k, v; scale 1; rates by head and layer; one norm over all heads; sigmoid gate (arXiv 2401.04658).
    retnet: RoPE on q, k; scale head_dim^-0.5; rates by head; a norm for each head; SiLU gate (arXiv 2307.08621).
    """

    ops: ClassVar[tuple[str, ...]] = ("decay_attention",)
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"heads": 4},
        {"heads": 4, "head_dim": 8, "form": "retnet"},
        {"heads": 2, "short_conv": 4},
    )
    kind: Literal["decay_attention"] = "decay_attention"
    heads: Annotated[int, Field(ge=1, le=4096, description="Heads (a count).")]
    head_dim: Annotated[
        int | None, Field(ge=1, le=65_536, description="Dimensions of a head; null: hidden_size / heads.")
    ] = None
    form: Annotated[
        Literal["lightning", "retnet"],
        Field(description="Which published layer: its decay rates, activation, norm and gate."),
    ] = "lightning"
    short_conv: Annotated[
        int | None,
        Field(ge=2, le=64, description="Taps of a causal convolution on q, k and v, in tokens; null: none."),
    ] = None

    def resolved(self, site: Site) -> DecayAttention:
        return self.model_copy(update={"head_dim": head_dim_of(self, site)})

    def problems(self, site: Site) -> list[Problem]:
        found = heads_problems(self, site)
        dim = head_dim_of(self, site)
        if not found and self.form == "retnet" and dim % 2:
            field = "heads" if self.head_dim is None else "head_dim"
            what = f"head_dim is {dim}, and RoPE turns pairs of dimensions"
            found.append(Problem(field, what, "an even head_dim, or form: lightning"))
        return found

    def kernels(self) -> tuple[str, ...]:
        return self.ops if self.short_conv is None else (*self.ops, "causal_conv1d")

    def params(self, site: Site) -> int:
        width = self._width(site)
        norm = width if self.form == "lightning" else head_dim_of(self, site)
        return 5 * site.hidden_size * width + (self.short_conv or 0) * 3 * width + norm

    def flops(self, site: Site, context: int) -> int:  # noqa: ARG002 - the state does not grow
        return self._outside(site) + 5 * self._width(site) * head_dim_of(self, site)

    def prefill_flops(self, site: Site, length: int) -> float:
        K, C = head_dim_of(self, site), min(CHUNK, length)
        # q kᵀ and P v: C K each; q S and kᵀ v: K² each.
        return self._outside(site) + self.heads * 2 * (2 * C * K + 2 * K * K)

    def sights(self, site: Site) -> tuple[Sight, ...]:
        if self.form == "retnet":
            return tuple(Sight(log_decay=math.log1p(-(2.0 ** (-5 - h)))) for h in range(self.heads))
        depth = 1.0 - site.layer_index / (site.layer_count - 1 + 1e-5) + 1e-5
        return tuple(
            Sight(log_decay=-(2.0 ** (-8 * (h + 1) / self.heads)) * depth) for h in range(self.heads)
        )

    def states(self, site: Site) -> tuple[State, ...]:
        K = head_dim_of(self, site)
        memory = State("memory", (self.heads, K, K), element=FLOAT32_BYTES)
        if self.short_conv is None:
            return (memory,)
        return memory, State("conv", (3 * self._width(site), self.short_conv - 1))

    def _width(self, site: Site) -> int:
        return self.heads * head_dim_of(self, site)

    def _outside(self, site: Site) -> int:
        width = self._width(site)
        return 2 * 5 * site.hidden_size * width + 2 * (self.short_conv or 0) * 3 * width
