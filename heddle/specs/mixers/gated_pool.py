"""A running mean of values, each weighed by a number that its own token gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.cost import CHUNK, FLOAT32_BYTES, State
from heddle.specs.kinds import HeadedMixer, Problem, head_dim_of, heads_problems
from heddle.specs.layer import Site


class GatedPool(HeadedMixer):
    """Softmax over what each token thinks of itself: no query meets another token's key (arXiv 2510.11602, "Non-approximate").

        s_j = silu(q_j) · k_j / sqrt(d),   o_i = sum_{j <= i} e^(s_j) v_j / sum_{j <= i} e^(s_j)

    Positions would cancel in s, and there are none. Two numbers and a mean of values are remembered for each head.
    """

    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"heads": 4},
        {"heads": 3, "head_dim": 10, "qk_norm": True},
    )
    kind: Literal["gated_pool"] = "gated_pool"
    heads: Annotated[int, Field(ge=1, le=4096, description="Heads (a count).")]
    head_dim: Annotated[
        int | None, Field(ge=1, le=65_536, description="Dimensions of a head; null: hidden_size / heads.")
    ] = None
    qk_norm: Annotated[
        bool,
        Field(
            description="RMSNorm of each head's query and key; without it large models were seen to diverge."
        ),
    ] = False

    def resolved(self, site: Site) -> GatedPool:
        return self.model_copy(update={"head_dim": head_dim_of(self, site)})

    def problems(self, site: Site) -> list[Problem]:
        return heads_problems(self, site)

    def params(self, site: Site) -> int:
        return self._weights(site) + (2 * head_dim_of(self, site) if self.qk_norm else 0)

    def flops(self, site: Site, context: int) -> int:  # noqa: ARG002 - the state does not grow
        # q · k: 2 d; the mean fades and takes a value: 3 d.
        return 2 * self._weights(site) + 5 * self.heads * head_dim_of(self, site)

    def prefill_flops(self, site: Site, length: int) -> float:
        # q · k; weights of a chunk on its values; the mean before it: 2 d each.
        per_head = 2 * head_dim_of(self, site) * (2 + min(CHUNK, length))
        return 2 * self._weights(site) + self.heads * per_head

    def states(self, site: Site) -> tuple[State, ...]:
        return (State("memory", (self.heads, head_dim_of(self, site) + 2), element=FLOAT32_BYTES),)

    def _weights(self, site: Site) -> int:
        return 4 * site.hidden_size * self.heads * head_dim_of(self, site)
