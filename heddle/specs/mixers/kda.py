"""Kimi Delta Attention: the delta rule on a matrix state of which each key channel fades by a gate of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.cost import CHUNK, FLOAT32_BYTES, State
from heddle.specs.kinds import FROM_MIDDLE, Contract, HeadedMixer, Problem, head_dim_of, heads_problems
from heddle.specs.layer import Site
from heddle.specs.sight import Sight

# exp(A_log) and softplus(dt) in the middle of the ranges in which training begins: 8 and 1e-2.
GATE = 8.0 * 1e-2


class Kda(HeadedMixer):
    """Kimi Delta Attention (arXiv 2510.26692), of Kimi Linear and, with a bounded gate, of Ling 3.

        S'_t = diag(exp(g_t)) S_{t-1},   S_t = S'_t + beta_t k_t (v_t - S'_tᵀ k_t)ᵀ,   o_t = S_tᵀ q_t / sqrt(K)
        g_t = -exp(A) softplus(W_2 W_1 x_t + dt),  or  lower_bound sigmoid(exp(A) (W_2 W_1 x_t + dt))
        y = W_o (rms of each head(o) * sigmoid(W_4 W_3 x))

    q and k have length 1 and come, as v, from a short convolution. K is head_dim, V is value_dim. No other biases.

    On a GPU it is causal but for rounding, where equal bits are the rule: an output may move by rounding when a later token of
    its chunk (of at most 64) changes, since kernels take decays from the chunk's middle. Earlier chunks keep their bits.
    """

    rounded: ClassVar[Mapping[Contract, str]] = {"causality": FROM_MIDDLE}
    ops: ClassVar[tuple[str, ...]] = ("kda", "causal_conv1d")
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"heads": 2},
        {"heads": 3, "head_dim": 8, "value_dim": 12, "gate_rank": 4, "short_conv": 3, "lower_bound": -5.0},
    )
    kind: Literal["kda"] = "kda"
    heads: Annotated[int, Field(ge=1, le=4096, description="Heads (a count).")]
    head_dim: Annotated[
        int | None,
        Field(ge=1, le=65_536, description="Dimensions of a query or key head; null: hidden_size / heads."),
    ] = None
    value_dim: Annotated[
        int | None, Field(ge=1, le=65_536, description="Dimensions of a value head; null: as head_dim.")
    ] = None
    gate_rank: Annotated[
        int | None,
        Field(
            ge=1,
            le=65_536,
            description="Features between the two matrices of the decay, and of the output's gate; null: head_dim.",
        ),
    ] = None
    short_conv: Annotated[
        int, Field(ge=2, le=64, description="Taps of the causal convolution on q, k and v, in tokens.")
    ] = 4
    lower_bound: Annotated[
        float | None,
        Field(
            ge=-5.0,
            lt=0.0,
            description="The log-decay of a token that no gate can fall below, another function than without; null: none.",
            examples=[-5.0],
        ),
    ] = None

    def resolved(self, site: Site) -> Kda:
        K, V, rank = self._sizes(site)
        return self.model_copy(update={"head_dim": K, "value_dim": V, "gate_rank": rank})

    def problems(self, site: Site) -> list[Problem]:
        return heads_problems(self, site)

    def params(self, site: Site) -> int:
        K, V, _ = self._sizes(site)
        # Beside the matrices and the convolution: A_log of each head, dt_bias of each channel, and the norm's weight.
        return self._weights(site) + self.short_conv * self._channels(site) + self.heads * (1 + K) + V

    def flops(self, site: Site, context: int) -> int:  # noqa: ARG002 - the state does not grow
        K, V, _ = self._sizes(site)
        return self._outside(site) + 7 * self.heads * K * V

    def prefill_flops(self, site: Site, length: int) -> float:
        (K, V, _), C = self._sizes(site), min(CHUNK, length)
        # k kᵀ, q kᵀ: C K each; T x, P v: C V each; the inverse: C²; k S, q S, kᵀ v: K V each.
        return self._outside(site) + self.heads * 2 * (2 * C * (K + V) + C * C + 3 * K * V)

    def sights(self, site: Site) -> tuple[Sight, ...]:  # noqa: ARG002
        return (Sight(log_decay=-GATE),)

    def states(self, site: Site) -> tuple[State, ...]:
        K, V, _ = self._sizes(site)
        return (
            State("memory", (self.heads, K, V), element=FLOAT32_BYTES),
            State("conv", (self._channels(site), self.short_conv - 1)),
        )

    def _sizes(self, site: Site) -> tuple[int, int, int]:
        K = head_dim_of(self, site)
        return K, self.value_dim or K, self.gate_rank or K

    def _channels(self, site: Site) -> int:
        K, V, _ = self._sizes(site)
        return self.heads * (2 * K + V)

    def _weights(self, site: Site) -> int:
        (K, V, rank), D = self._sizes(site), site.hidden_size
        # q, k; v, output; beta. Then the decay and the output's gate, each of two matrices.
        return D * self.heads * (2 * K + 2 * V + 1) + rank * (2 * D + self.heads * (K + V))

    def _outside(self, site: Site) -> int:
        return 2 * self._weights(site) + 2 * self.short_conv * self._channels(site)
