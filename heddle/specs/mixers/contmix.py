"""ContMix: short kernels over the last tokens, made for each token from what came before."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.cost import CHUNK, FLOAT32_BYTES, State
from heddle.specs.kinds import HeadedMixer, Problem, head_dim_of, heads_problems
from heddle.specs.layer import Site
from heddle.specs.sight import Sight


class ContMix(HeadedMixer):
    """OverLoCK's context-mixing dynamic convolution (arXiv 2502.20087), in a causal form in one dimension, which is ours.

        c_s = g_s c_s + (1 - g_s) W_k x,   g_s = 1 - 2^-s,   s = 1 … summaries
        a_s = q · c_s / sqrt(query_dim),   w = softmax over taps of (P a + r)
        y_t = W_o (silu(W_g x_t) * (sum_j (w_tj + u_j) v_(t-j)))

    P is one for all heads, r one number for each head and tap, u a kernel that is the same for every token. The paper's images
    have the means of 7 x 7 regions in the place of running means. What is further back than the kernels has a say
    in weights alone.
    """

    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"heads": 4},
        {"heads": 3, "head_dim": 10, "query_dim": 6, "taps": 5, "summaries": 3, "static_taps": 0},
    )
    kind: Literal["contmix"] = "contmix"
    heads: Annotated[int, Field(ge=1, le=4096, description="Heads, each with kernels of its own (a count).")]
    head_dim: Annotated[
        int | None, Field(ge=1, le=65_536, description="Channels of a head; null: hidden_size / heads.")
    ] = None
    query_dim: Annotated[
        int | None,
        Field(ge=1, le=65_536, description="Dimensions of a head's query and summaries; null: head_dim / 2."),
    ] = None
    taps: Annotated[
        int, Field(ge=1, le=1024, description="Tokens that a kernel mixes, the own one included.")
    ] = 16
    summaries: Annotated[
        int,
        Field(
            ge=1, le=32, description="Running means that kernels are made from, over some 2, 4, 8, … tokens."
        ),
    ] = 8
    static_taps: Annotated[
        int | None,
        Field(
            ge=0,
            le=1024,
            description="Tokens that the kernel beside them mixes, the same everywhere; null: as taps; 0: none.",
        ),
    ] = None

    def resolved(self, site: Site) -> ContMix:
        sizes = {
            "head_dim": head_dim_of(self, site),
            "query_dim": self._query(site),
            "static_taps": self._static,
        }
        return self.model_copy(update=sizes)

    def problems(self, site: Site) -> list[Problem]:
        return heads_problems(self, site)

    def params(self, site: Site) -> int:
        kernels = self.taps * (self.summaries + self.heads) + self._static * self._width(site)
        return self._weights(site) + kernels

    def flops(self, site: Site, context: int) -> int:  # noqa: ARG002 - the state does not grow
        # A mean fades and takes a key: 3; it meets the query: 2.
        return self._outside(site) + 5 * self.heads * self.summaries * self._query(site)

    def prefill_flops(self, site: Site, length: int) -> float:
        C, S, query = min(CHUNK, length), self.summaries, self._query(site)
        # Queries and keys of a chunk, what the means make of that, and the means at its ends.
        return self._outside(site) + 2 * self.heads * (C * (query + S) + 2 * S * query)

    def sights(self, site: Site) -> tuple[Sight, ...]:  # noqa: ARG002
        # Through the weights everything has a say, which fades.
        return (Sight(max(self.taps, self._static)), Sight(log_decay=math.log1p(-(2.0**-self.summaries))))

    def states(self, site: Site) -> tuple[State, ...]:
        means = State("means", (self.heads, self.summaries, self._query(site)), element=FLOAT32_BYTES)
        return means, State("values", (max(self.taps, self._static) - 1, self._width(site)))

    @property
    def _static(self) -> int:
        return self.taps if self.static_taps is None else self.static_taps

    def _query(self, site: Site) -> int:
        return self.query_dim or max(1, head_dim_of(self, site) // 2)

    def _width(self, site: Site) -> int:
        return self.heads * head_dim_of(self, site)

    def _weights(self, site: Site) -> int:
        return site.hidden_size * (2 * self.heads * self._query(site) + 3 * self._width(site))

    def _outside(self, site: Site) -> int:
        """Projections, weights of taps, and taps."""
        mixed = self.heads * self.summaries * self.taps + (self.taps + self._static) * self._width(site)
        return 2 * (self._weights(site) + mixed)
