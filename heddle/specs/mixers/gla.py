"""Gated linear attention: a matrix state of which each key channel, or the whole of each head, fades by a gate of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.kinds import FROM_MIDDLE, Contract, Problem
from heddle.specs.layer import Site
from heddle.specs.memory_mixer import MemoryMixer
from heddle.specs.sight import Sight

# A gate of 1/2, with which training begins, to the power of 1/16.
GATE = math.log(2.0) / 16.0


class Gla(MemoryMixer):
    """Gated linear attention (arXiv 2312.06635).

        S_t = diag(a_t) S_{t-1} + k_t v_tᵀ,   o_t = S_tᵀ q_t / sqrt(K),   a_t = sigmoid(W_2 W_1 x_t + b)^(1/16)
        y = W_o (rms of each head(o) * silu(W_g x))

    With `gate: head` (simple GLA) a_t is one number for each head, sigmoid(W x_t + b)^(1/16). K is head_dim, V is value_dim.
    No biases but that of the gate.

    With gates of channels it is causal but for rounding on a GPU, where equal bits are the rule: an output may move by rounding
    when a later token of its chunk (of at most 64) changes, since kernels take decays from the chunk's middle. Earlier chunks
    keep their bits.
    """

    rounded: ClassVar[Mapping[Contract, str]] = {"causality": FROM_MIDDLE}
    ops: ClassVar[tuple[str, ...]] = ("gla",)
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"heads": 2},
        {"heads": 3, "head_dim": 8, "value_dim": 12, "gate_rank": 4, "short_conv": 3},
        {"heads": 3, "head_dim": 8, "value_dim": 12, "gate": "head", "short_conv": 3},
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
    gate: Annotated[
        Literal["channel", "head"],
        Field(description="What fades by a gate of its own: each key channel, or each head as a whole."),
    ] = "channel"
    gate_rank: Annotated[
        int,
        Field(
            ge=1,
            le=65_536,
            description="Features between the two matrices of the gate of channels; that of heads is one matrix.",
        ),
    ] = 16
    short_conv: Annotated[
        int | None,
        Field(
            ge=2,
            le=64,
            description="Taps of a causal convolution with SiLU on q, k and v, in tokens; null: none.",
        ),
    ] = None

    def roundings(self) -> Mapping[Contract, str]:
        # One decay for a head has kernels of its own, which take it from a chunk's beginning.
        return {} if self.gate == "head" else self.rounded

    def kernels(self) -> tuple[str, ...]:
        first, *others = super().kernels()
        return ("simple_gla" if self.gate == "head" else first, *others)

    def problems(self, site: Site) -> list[Problem]:
        found = super().problems(site)
        if self.gate == "head" and self.gate_rank != type(self).model_fields["gate_rank"].default:
            what = "the gate of a head is made by one matrix, which has no rank"
            found.append(Problem("gate_rank", what, "leave it out, or gate: channel", "conflicting-fields"))
        return found

    def runtime(self, site: Site) -> dict[str, Any]:
        # Gates of heads came later: nothing is said of them where channels have gates, so that no older hash changes.
        unused = "gate" if self.gate == "channel" else "gate_rank"
        return {name: value for name, value in super().runtime(site).items() if name != unused}

    def params(self, site: Site) -> int:
        K, V = self._sizes(site)
        # Beside the matrices: the convolution, the bias of the gate and the norm's weight.
        gates = self.heads * (K if self.gate == "channel" else 1)
        return self._weights(site) + (self.short_conv or 0) * self._channels(site) + gates + V

    def sights(self, site: Site) -> tuple[Sight, ...]:  # noqa: ARG002
        return (Sight(log_decay=-GATE),)

    def _weights(self, site: Site) -> int:
        K, V = self._sizes(site)
        # q, k; v, gate, output; the decay.
        by_channel = self.gate_rank * (site.hidden_size + self.heads * K)
        decay = by_channel if self.gate == "channel" else site.hidden_size * self.heads
        return site.hidden_size * self.heads * (2 * K + 3 * V) + decay
