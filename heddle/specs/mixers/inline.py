"""InLine attention: linear attention whose weights sum to one by subtraction, so that no two queries are confused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.cost import CHUNK, FLOAT32_BYTES, State
from heddle.specs.kinds import Contract, HeadedMixer, Problem, divisors_near, head_dim_of, heads_problems
from heddle.specs.layer import Site
from heddle.specs.sight import Sight

# A gate of 1/2, with which training begins, to the power of 1/16.
GATE = math.log(2.0) / 16.0
_BOTH_SIDES = "its means are over all tokens: every output depends on every token, and nothing can be decoded"


class Inline(HeadedMixer):
    """InLine attention (arXiv 2412.06590), non-causal as published or over the tokens so far.

        o_i = Σ_j w_ij v_j,   w_ij = (s q_i · (k_j - mean k) + 1) / N,   s = 1 / sqrt(d)
            = mean v + s cov(v, k) q_i;   plus a local residual, a short kernel over v predicted from x
        causal: means and covariance over j ≤ i, each weighed by γ_(j+1) … γ_i (ours: the paper has no causal form)

    q and k pass a feature map. As published, without `causal`, the kernel is predicted once from the mean of x and looks to both
    sides; with it, for each token and over earlier tokens. The paper's is 3 x 3 over the patches of an image.
    """

    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"heads": 4, "qk_norm": True, "decay": "gate", "local": 3},
        {"heads": 3, "head_dim": 6, "bias": True, "feature": "relu", "causal": False},
    )
    kind: Literal["inline"] = "inline"
    heads: Annotated[int, Field(ge=1, le=4096, description="Heads (a count).")]
    head_dim: Annotated[
        int | None, Field(ge=1, le=65_536, description="Dimensions of a head; null: hidden_size / heads.")
    ] = None
    causal: Annotated[
        bool, Field(description="false: means over all tokens, as published; for encoders, without a cache.")
    ] = True
    feature: Annotated[
        Literal["identity", "relu", "leaky_relu", "exp"],
        Field(description="What queries and keys pass before all else."),
    ] = "identity"
    qk_norm: Annotated[
        bool, Field(description="RMSNorm of each head's query and key, before the feature map.")
    ] = False
    decay: Annotated[
        Literal["none", "fixed", "gate"],
        Field(
            description="How earlier tokens fade: none, by 1 - 2^(-5-h) a token in head h, or by a gate of each token and head."
        ),
    ] = "none"
    local: Annotated[
        int | None,
        Field(ge=2, le=64, description="Taps of the predicted kernel over values, in tokens; null: none."),
    ] = None
    bias: Annotated[
        bool, Field(description="A bias of the projections of q, k and v; the output has one.")
    ] = False

    @property
    def is_causal(self) -> bool:
        return self.causal

    def exemptions(self) -> Mapping[Contract, str]:
        if self.causal:
            return self.exempt
        return {"causality": _BOTH_SIDES, "step": _BOTH_SIDES, "chunks": _BOTH_SIDES}

    def takes_heads(self, count: int) -> bool:
        # The kernel of a head is predicted from its part of x.
        return super().takes_heads(count) and (self.local is None or count == self.heads)

    def kernels(self) -> tuple[str, ...]:
        return ("simple_gla",) if self.causal else ()

    def resolved(self, site: Site) -> Inline:
        return self.model_copy(update={"head_dim": head_dim_of(self, site)})

    def problems(self, site: Site) -> list[Problem]:
        found, heads = heads_problems(self, site), self.heads
        if not found and self.local is not None and site.hidden_size % heads:
            what = f"{heads} does not divide hidden_size {site.hidden_size}, whose parts predict the kernels"
            found.append(Problem("heads", what, divisors_near(heads, site.hidden_size)))
        if not self.causal and self.decay != "none":
            what = "what sees both sides does not fade"
            found.append(Problem("decay", what, "decay: none, or causal: true", "conflicting-fields"))
        return found

    def params(self, site: Site) -> int:
        dim, width = head_dim_of(self, site), self._width(site)
        biases = site.hidden_size + (3 * width if self.bias else 0) + (self.heads if self._is_gated else 0)
        kernels = 0 if self.local is None else width * (1 + self.local)
        return (
            self._weights(site) + self._predictor(site) + biases + kernels + (2 * dim if self.qk_norm else 0)
        )

    def flops(self, site: Site, context: int) -> int:
        """FLOPs of decoding a token; without `causal`, which cannot decode, of a token in a pass over as many."""
        if not self.causal:
            return round(self.prefill_flops(site, context + 1))
        return self._outside(site) + 5 * self.heads * (head_dim_of(self, site) + 1) ** 2

    def prefill_flops(self, site: Site, length: int) -> float:
        d, C = head_dim_of(self, site), min(CHUNK, length)
        if not self.causal:
            # The covariance, and what it gives a query; the kernel is predicted once for all.
            once = 2 * self._predictor(site)
            return self._outside(site) - once + once / max(length, 1) + 4 * self.heads * d**2
        # Sums of keys and of 1, then the recurrence of keys that have a 1 beside them.
        sums, memory = C * (d + 2) + 2 * (d + 1), C * (2 * d + 1) + 2 * (d + 1) * d
        return self._outside(site) + 2 * self.heads * (sums + memory)

    def sights(self, site: Site) -> tuple[Sight, ...]:  # noqa: ARG002
        if self.decay == "fixed":
            return tuple(Sight(log_decay=math.log1p(-(2.0 ** (-5 - head)))) for head in range(self.heads))
        return (Sight(log_decay=-GATE if self._is_gated else 0.0, is_causal=self.causal),)

    def states(self, site: Site) -> tuple[State, ...]:
        if not self.causal:
            return ()
        d = head_dim_of(self, site)
        sums = State("sums", (self.heads, 1, d + 1), element=FLOAT32_BYTES)
        memory = State("memory", (self.heads, d + 1, d), element=FLOAT32_BYTES)
        if self.local is None:
            return sums, memory
        return sums, memory, State("local", (self.local - 1, self._width(site)))

    @property
    def _is_gated(self) -> bool:
        return self.decay == "gate"

    def _width(self, site: Site) -> int:
        return self.heads * head_dim_of(self, site)

    def _weights(self, site: Site) -> int:
        # q, k, v and the output; the gate.
        return site.hidden_size * (4 * self._width(site) + (self.heads if self._is_gated else 0))

    def _predictor(self, site: Site) -> int:
        """The weights that predict kernels, from a head's part of x to as many features as it has, and those to its taps."""
        if self.local is None:
            return 0
        d = head_dim_of(self, site)
        return site.hidden_size * d + self.local * self._width(site) * d

    def _outside(self, site: Site) -> int:
        taps = 2 * (self.local or 0) * self._width(site)
        return 2 * self._weights(site) + 2 * self._predictor(site) + taps
