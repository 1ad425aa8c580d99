"""DeltaNet: a matrix state that is corrected by each write and never fades."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.cost import CHUNK
from heddle.specs.layer import Site
from heddle.specs.memory_mixer import MemoryMixer
from heddle.specs.sight import Sight


class DeltaNet(MemoryMixer):
    """The delta rule (arXiv 2102.11174, in parallel 2406.06484).

        S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}ᵀ k_t)ᵀ,   o_t = S_tᵀ q_t / sqrt(K)
        y = W_o rms of each head(o)  [* silu(W_z x)]

    q and k have length 1 and come, as v, from a short convolution with SiLU. K is head_dim, V is value_dim. No biases.
    """

    ops: ClassVar[tuple[str, ...]] = ("delta_rule",)
    step_flops: ClassVar[int] = 6
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"heads": 2},
        {
            "heads": 3,
            "head_dim": 8,
            "value_dim": 12,
            "short_conv": None,
            "gate": True,
            "negative_eigenvalues": True,
        },
    )
    kind: Literal["deltanet"] = "deltanet"
    heads: Annotated[int, Field(ge=1, le=4096, description="Heads (a count).")]
    head_dim: Annotated[
        int | None,
        Field(ge=1, le=65_536, description="Dimensions of a query or key head; null: hidden_size / heads."),
    ] = None
    value_dim: Annotated[
        int | None, Field(ge=1, le=65_536, description="Dimensions of a value head; null: as head_dim.")
    ] = None
    short_conv: Annotated[
        int | None,
        Field(
            ge=2,
            le=64,
            description="Taps of the causal convolution on q, k and v, in tokens; null: none, and SiLU all the same.",
        ),
    ] = 4
    gate: Annotated[bool, Field(description="A SiLU gate on the output, as Gated DeltaNet has it.")] = False
    negative_eigenvalues: Annotated[
        bool, Field(description="Let beta reach 2 instead of 1 (arXiv 2411.12537).")
    ] = False

    def params(self, site: Site) -> int:
        _, V = self._sizes(site)
        return self._weights(site) + (self.short_conv or 0) * self._channels(site) + V

    def prefill_flops(self, site: Site, length: int) -> float:
        (K, V), C = self._sizes(site), min(CHUNK, length)
        # k kᵀ, q kᵀ: C K each; T x, P v: C V each; the inverse: C²; k S, q S, kᵀ v: K V each.
        return self._outside(site) + self.heads * 2 * (2 * C * (K + V) + C * C + 3 * K * V)

    def sights(self, site: Site) -> tuple[Sight, ...]:  # noqa: ARG002 - what is written fades by other writes alone
        return (Sight(),)

    def _weights(self, site: Site) -> int:
        K, V = self._sizes(site)
        # q, k; v, output, gate; beta.
        return site.hidden_size * self.heads * (2 * K + (2 + self.gate) * V + 1)
