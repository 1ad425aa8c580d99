"""Mamba-2: a state space model with one decay for each token and head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.cost import CHUNK, FLOAT32_BYTES, State
from heddle.specs.kinds import HeadedMixer, Problem, divisors_near
from heddle.specs.layer import Site
from heddle.specs.sight import Sight

# How much wider than the stream the heads are together, where `head_dim` does not say.
EXPAND = 2
# exp(A_log) and softplus(dt) in the middle of the ranges in which training begins: 8 and 1e-2.
GATE = 8.0 * 1e-2


class Mamba2(HeadedMixer):
    """State space duality (arXiv 2405.21060): linear attention whose queries C, keys B and values x share one convolution.

        S_t = exp(-exp(A_log) dt_t) S_{t-1} + B_t (dt_t x_t)ᵀ,   o_t = S_tᵀ C_t + D x_t
        y = W_o rms(o * silu(z))

    dt is one number for each token and head, at least 0. B and C are shared by the heads of a group.
    """

    ops: ClassVar[tuple[str, ...]] = ("simple_gla", "causal_conv1d")
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"heads": 4, "state_dim": 16},
        {
            "heads": 6,
            "head_dim": 8,
            "state_dim": 12,
            "groups": 3,
            "short_conv": 3,
            "conv_bias": False,
            "bias": True,
            "norm": "before_gate",
        },
    )
    kind: Literal["mamba2"] = "mamba2"
    heads: Annotated[int, Field(ge=1, le=4096, description="Heads (a count).")]
    head_dim: Annotated[
        int | None, Field(ge=1, le=65_536, description="Dimensions of a head; null: 2 · hidden_size / heads.")
    ] = None
    state_dim: Annotated[
        int, Field(ge=1, le=65_536, description="Rows of each head's state: dimensions of B and C.")
    ] = 128
    groups: Annotated[
        int, Field(ge=1, le=4096, description="Groups of heads that share B and C (a count); divides heads.")
    ] = 1
    short_conv: Annotated[
        int, Field(ge=2, le=64, description="Taps of the causal convolution on x, B and C, in tokens.")
    ] = 4
    conv_bias: Annotated[bool, Field(description="A bias of the convolution.")] = True
    bias: Annotated[bool, Field(description="Biases of the projections in and out.")] = False
    norm: Annotated[
        Literal["after_gate", "before_gate", "none"],
        Field(description="Where the RMSNorm of each group's heads stands; none: there is none (Falcon-H1)."),
    ] = "after_gate"

    def head_counts(self) -> dict[str, int]:
        return {"heads": self.heads, "groups": self.groups}

    def resolved(self, site: Site) -> Mamba2:
        return self.model_copy(update={"head_dim": self._head_dim(site)})

    def problems(self, site: Site) -> list[Problem]:
        found, width = [], EXPAND * site.hidden_size
        if self.head_dim is None and width % self.heads:
            what = f"{self.heads} does not divide {EXPAND} · hidden_size = {width}"
            found.append(Problem("heads", what, f"{divisors_near(self.heads, width)}; or set head_dim"))
        if self.heads % self.groups:
            what = f"{self.groups} does not divide heads {self.heads}"
            found.append(Problem("groups", what, divisors_near(self.groups, self.heads)))
        return found

    def params(self, site: Site) -> int:
        width, channels = self._width(site), self._channels(site)
        biases = width + channels + self.heads + site.hidden_size if self.bias else 0
        conv = channels * (self.short_conv + self.conv_bias)
        # A_log, dt_bias and D of each head.
        return self._weights(site) + biases + conv + 3 * self.heads + (0 if self.norm == "none" else width)

    def flops(self, site: Site, context: int) -> int:  # noqa: ARG002 - the state does not grow
        return self._outside(site) + 5 * self._width(site) * self.state_dim

    def prefill_flops(self, site: Site, length: int) -> float:
        K, V, C = self.state_dim, self._head_dim(site), min(CHUNK, length)
        # q kᵀ: C K; P v: C V; q S and kᵀ v: K V each.
        return self._outside(site) + self.heads * 2 * (C * (K + V) + 2 * K * V)

    def sights(self, site: Site) -> tuple[Sight, ...]:  # noqa: ARG002
        return (Sight(log_decay=-GATE),)

    def states(self, site: Site) -> tuple[State, ...]:
        return (
            State("memory", (self.heads, self.state_dim, self._head_dim(site)), element=FLOAT32_BYTES),
            State("conv", (self._channels(site), self.short_conv - 1)),
        )

    def _head_dim(self, site: Site) -> int:
        return self.head_dim or max(1, EXPAND * site.hidden_size // self.heads)

    def _width(self, site: Site) -> int:
        return self.heads * self._head_dim(site)

    def _channels(self, site: Site) -> int:
        return self._width(site) + 2 * self.groups * self.state_dim

    def _weights(self, site: Site) -> int:
        # z; x, B and C; dt; and out.
        width = self._width(site)
        return site.hidden_size * (width + self._channels(site) + self.heads + width)

    def _outside(self, site: Site) -> int:
        return 2 * self._weights(site) + 2 * self.short_conv * self._channels(site)
