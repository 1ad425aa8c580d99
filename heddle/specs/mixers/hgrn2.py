"""HGRN-2: a matrix state that takes in what a gate lets go, with a lower bound on the gate that rises from layer to layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.kinds import FROM_MIDDLE, Contract
from heddle.specs.layer import Site
from heddle.specs.memory_mixer import MemoryMixer
from heddle.specs.sight import Sight


class Hgrn2(MemoryMixer):
    """HGRN-2 (arXiv 2404.07904): the key is what the forget gate leaves, k = 1 - f.

        S_t = diag(f_t) S_{t-1} + (1 - f_t) i_tᵀ,   o_t = S_tᵀ silu(W_q x_t) / sqrt(K),   i_t = W_i x_t
        f_t = b_l + (1 - b_l) sigmoid(W_f x_t),   b_l = Σ_{0 < j ≤ l} softmax over layers(table)_j
        y = W_o rms over all heads(o)

    The table of bounds is the model's, a row for each of its layers, of whatever kind; b_0 = 0, and l / L before training.
    K is head_dim, V is value_dim. No biases.

    On a GPU it is causal but for rounding, where equal bits are the rule: an output may move by rounding when a later token of
    its chunk (of at most 64) changes, since kernels take decays from the chunk's middle. Earlier chunks keep their bits.
    """

    rounded: ClassVar[Mapping[Contract, str]] = {"causality": FROM_MIDDLE}
    ops: ClassVar[tuple[str, ...]] = ("gla",)
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"heads": 3, "head_dim": 8, "value_dim": 12, "short_conv": 3},
    )
    kind: Literal["hgrn2"] = "hgrn2"
    heads: Annotated[int, Field(ge=1, le=4096, description="Heads (a count).")]
    head_dim: Annotated[
        int | None,
        Field(ge=1, le=65_536, description="Dimensions of a query or gate head; null: hidden_size / heads."),
    ] = None
    value_dim: Annotated[
        int | None, Field(ge=1, le=65_536, description="Dimensions of a value head; null: as head_dim.")
    ] = None
    short_conv: Annotated[
        int | None,
        Field(
            ge=2,
            le=64,
            description="Taps of a causal convolution on query, gate and value, in tokens; null: none.",
        ),
    ] = None

    def bounds_width(self, site: Site) -> int:
        return self.heads * self._sizes(site)[0]

    def params(self, site: Site) -> int:
        _, V = self._sizes(site)
        # Beside the matrices: the convolution and the norm's weight.
        return self._weights(site) + (self.short_conv or 0) * self._channels(site) + self.heads * V

    def sights(self, site: Site) -> tuple[Sight, ...]:
        # As training begins: a sigmoid of 1/2 above a bound of l / L.
        bound = site.layer_index / site.layer_count
        return (Sight(log_decay=math.log((1.0 + bound) / 2.0)),)

    def _weights(self, site: Site) -> int:
        K, V = self._sizes(site)
        # Query, gate; value, output.
        return site.hidden_size * self.heads * 2 * (K + V)
