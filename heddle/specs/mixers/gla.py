"""Gated linear attention: a matrix state of which each key channel fades by a gate of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.cost import CHUNK, FLOAT32_BYTES, State
from heddle.specs.kinds import HeadedMixer, Problem, head_dim_of, heads_problems
from heddle.specs.layer import Site
from heddle.specs.sight import Sight

# A gate of 1/2, with which training begins, to the power of 1/16.
GATE = math.log(2.0) / 16.0


class Gla(HeadedMixer):
    """Gated linear attention (arXiv 2312.06635).

        S_t = diag(a_t) S_{t-1} + k_t v_tᵀ,   o_t = S_tᵀ q_t / sqrt(K),   a_t = sigmoid(W_2 W_1 x_t + b)^(1/16)
        y = W_o (rms of each head(o) * silu(W_g x))

    K is head_dim, V is value_dim. No biases but that of the gate.
    """

    ops: ClassVar[tuple[str, ...]] = ("gla",)
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"heads": 2},
        {"heads": 3, "head_dim": 8, "value_dim": 12, "gate_rank": 4, "short_conv": 3},
    )
    kind: Literal["gla"] = "gla"
    heads: Annotated[int, Field(ge=1, le=4096, description="Heads (a count).")]
    head_dim: Annotated[
        int | None,
        Field(ge=1, le=65_536, description="Dimensions of a query or key head; null: hidden_size / heads."),
    ] = None
    value_dim: Annotated[
        int | None, Field(ge=1, le=65_536, description="Dimensions of a value head; null: as head_dim.")
    ] = None
    gate_rank: Annotated[
        int, Field(ge=1, le=65_536, description="Features between the two matrices of the gate.")
    ] = 16
    short_conv: Annotated[
        int | None,
        Field(
            ge=2,
            le=64,
            description="Taps of a causal convolution with SiLU on q, k and v, in tokens; null: none.",
        ),
    ] = None

    def resolved(self, site: Site) -> Gla:
        K, V = self._sizes(site)
        return self.model_copy(update={"head_dim": K, "value_dim": V})

    def problems(self, site: Site) -> list[Problem]:
        return heads_problems(self, site)

    def kernels(self) -> tuple[str, ...]:
        return self.ops if self.short_conv is None else (*self.ops, "causal_conv1d")

    def params(self, site: Site) -> int:
        K, V = self._sizes(site)
        # Beside the matrices: the convolution, the bias of the gate and the norm's weight.
        return self._weights(site) + (self.short_conv or 0) * self._channels(site) + self.heads * K + V

    def flops(self, site: Site, context: int) -> int:  # noqa: ARG002 - the state does not grow
        K, V = self._sizes(site)
        return self._outside(site) + 5 * self.heads * K * V

    def prefill_flops(self, site: Site, length: int) -> float:
        (K, V), C = self._sizes(site), min(CHUNK, length)
        # q kᵀ: C K; P v: C V; q S and kᵀ v: K V each.
        return self._outside(site) + self.heads * 2 * (C * (K + V) + 2 * K * V)

    def sights(self, site: Site) -> tuple[Sight, ...]:  # noqa: ARG002
        return (Sight(log_decay=-GATE),)

    def states(self, site: Site) -> tuple[State, ...]:
        memory = State("memory", (self.heads, *self._sizes(site)), element=FLOAT32_BYTES)
        if self.short_conv is None:
            return (memory,)
        return memory, State("conv", (self._channels(site), self.short_conv - 1))

    def _sizes(self, site: Site) -> tuple[int, int]:
        K = head_dim_of(self, site)
        return K, self.value_dim or K

    def _channels(self, site: Site) -> int:
        K, V = self._sizes(site)
        return self.heads * (2 * K + V)

    def _weights(self, site: Site) -> int:
        K, V = self._sizes(site)
        # q, k; v, gate, output; the decay.
        decay = self.gate_rank * (site.hidden_size + self.heads * K)
        return site.hidden_size * self.heads * (2 * K + 3 * V) + decay

    def _outside(self, site: Site) -> int:
        return 2 * self._weights(site) + 2 * (self.short_conv or 0) * self._channels(site)
