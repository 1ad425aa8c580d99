"""Gated DeltaNet: a matrix state that decays by a gate and is corrected by each write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.cost import CHUNK, FLOAT32_BYTES, State
from heddle.specs.kinds import HeadedMixer, Problem, head_dim_of, heads_problems
from heddle.specs.layer import Site
from heddle.specs.sight import Sight

# exp(A_log) and softplus(dt) in the middle of the ranges in which training begins: 8 and 1e-2.
GATE = 8.0 * 1e-2


class GatedDeltaNet(HeadedMixer):
    """The gated delta rule (arXiv 2412.06464).

        S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - exp(g_t) S_{t-1}ᵀ k_t)ᵀ,   o_t = S_tᵀ q_t / sqrt(K)

    q and k have length 1 and come, as v, from a short convolution. K is head_dim, V is value_dim. No biases.
    """

    ops: ClassVar[tuple[str, ...]] = ("gated_delta_rule", "causal_conv1d")
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"heads": 2},
        {
            "heads": 2,
            "value_heads": 4,
            "head_dim": 8,
            "value_dim": 12,
            "negative_eigenvalues": True,
            "short_conv": 3,
            "norm_eps": 1e-3,
        },
    )
    kind: Literal["gated_deltanet"] = "gated_deltanet"
    heads: Annotated[int, Field(ge=1, le=4096, description="Query and key heads (a count).")]
    value_heads: Annotated[
        int | None,
        Field(
            ge=1, le=4096, description="Value heads (a count), a multiple of heads; null: as many as heads."
        ),
    ] = None
    head_dim: Annotated[
        int | None,
        Field(ge=1, le=65_536, description="Dimensions of a query or key head; null: hidden_size / heads."),
    ] = None
    value_dim: Annotated[
        int | None, Field(ge=1, le=65_536, description="Dimensions of a value head; null: as head_dim.")
    ] = None
    short_conv: Annotated[
        int, Field(ge=2, le=64, description="Taps of the causal convolution on q, k and v, in tokens.")
    ] = 4
    negative_eigenvalues: Annotated[
        bool, Field(description="Let beta reach 2 instead of 1 (arXiv 2411.12537).")
    ] = False
    norm_eps: Annotated[
        float | None,
        Field(
            gt=0,
            le=0.1,
            description="Added under the root of the output norm; null: as the model's (Olmo Hybrid has 1e-5 here).",
        ),
    ] = None

    def resolved(self, site: Site) -> GatedDeltaNet:
        H, HV, K, V = self._sizes(site)
        sizes = {"heads": H, "value_heads": HV, "head_dim": K, "value_dim": V}
        # Unlike the model's or null: a later field, which changes no older hash.
        own = None if self.norm_eps == site.norm_eps else self.norm_eps
        return self.model_copy(update={**sizes, "norm_eps": own})

    def problems(self, site: Site) -> list[Problem]:
        found = heads_problems(self, site)
        if self.value_heads is not None and self.value_heads % self.heads:
            what = f"{self.value_heads} is not a multiple of heads {self.heads}"
            above = (self.value_heads // self.heads + 1) * self.heads
            hint = f"{above - self.heads} or {above} are" if above > self.heads else f"{above} is"
            found.append(Problem("value_heads", what, hint))
        return found

    def params(self, site: Site) -> int:
        _, HV, _, V = self._sizes(site)
        # Beside the matrices and the convolution: A_log and dt_bias of each value head, and the norm's weight.
        return self._weights(site) + self.short_conv * self._channels(site) + 2 * HV + V

    def flops(self, site: Site, context: int) -> int:  # noqa: ARG002 - the state does not grow
        _, HV, K, V = self._sizes(site)
        return self._outside(site) + 7 * HV * K * V

    def prefill_flops(self, site: Site, length: int) -> float:
        _, HV, K, V = self._sizes(site)
        C = min(CHUNK, length)
        # k kᵀ, q kᵀ: C K each; T x, P v: C V each; the inverse: C²; k S, q S, kᵀ v: K V each.
        return self._outside(site) + HV * 2 * (2 * C * (K + V) + C * C + 3 * K * V)

    def sights(self, site: Site) -> tuple[Sight, ...]:  # noqa: ARG002
        return (Sight(log_decay=-GATE),)

    def states(self, site: Site) -> tuple[State, ...]:
        _, HV, K, V = self._sizes(site)
        return (
            State("memory", (HV, K, V), element=FLOAT32_BYTES),
            State("conv", (self._channels(site), self.short_conv - 1)),
        )

    def _sizes(self, site: Site) -> tuple[int, int, int, int]:
        K = head_dim_of(self, site)
        return self.heads, self.value_heads or self.heads, K, self.value_dim or K

    def _channels(self, site: Site) -> int:
        H, HV, K, V = self._sizes(site)
        return 2 * H * K + HV * V

    def _weights(self, site: Site) -> int:
        H, HV, K, V = self._sizes(site)
        # q, k; v, gate, output; decay and beta.
        return site.hidden_size * (2 * H * K + 3 * HV * V + 2 * HV)

    def _outside(self, site: Site) -> int:
        return 2 * self._weights(site) + 2 * self.short_conv * self._channels(site)
