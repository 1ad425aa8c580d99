"""Hierarchical self-attention: softmax attention between the blocks of a tree, for encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.cost import State
from heddle.specs.kinds import Contract, HeadedMixer, Problem, head_dim_of, heads_problems
from heddle.specs.layer import Site
from heddle.specs.sight import Sight

_BOTH_SIDES = "its queries and keys are means over blocks that hold later tokens, and nothing can be decoded"


class HierarchicalAttention(HeadedMixer):
    """Hierarchical self-attention (HSA, arXiv 2509.15448): weights tied between siblings of a tree, nearest to softmax's.

        D_B = e^-phi(B) + sum over siblings C of |C| e^(mean q_B · mean k_C / sqrt(d)),   -phi(A) = sum of |B|/|A| log D_B
        o_i = sum over the nodes B above i of mass(B) sum over siblings C of |C| e^(...) / D_B mean v_C;   y = W_o o

    The tree has `branching` children a node over the tokens in their order. It sees both sides. No positions, no biases.
    """

    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"heads": 4},
        {"heads": 3, "head_dim": 8, "branching": 4, "own": False, "qk_norm": False},
    )
    kind: Literal["hierarchical_attention"] = "hierarchical_attention"
    heads: Annotated[int, Field(ge=1, le=4096, description="Heads (a count).")]
    head_dim: Annotated[
        int | None, Field(ge=1, le=65_536, description="Dimensions of a head; null: hidden_size / heads.")
    ] = None
    branching: Annotated[
        int, Field(ge=2, le=10**6, description="Children of a node; as many as tokens: softmax attention.")
    ] = 16
    own: Annotated[bool, Field(description="Whether a token sees itself; as published it does not.")] = True
    qk_norm: Annotated[bool, Field(description="RMSNorm of each head of q and k.")] = True

    @property
    def is_causal(self) -> bool:
        return False

    def exemptions(self) -> Mapping[Contract, str]:
        forgets = "nothing is remembered, so there is nothing to leave out"
        return {**dict.fromkeys(("causality", "step", "chunks"), _BOTH_SIDES), "written": forgets}

    def resolved(self, site: Site) -> HierarchicalAttention:
        return self.model_copy(update={"head_dim": head_dim_of(self, site)})

    def problems(self, site: Site) -> list[Problem]:
        return heads_problems(self, site)

    def params(self, site: Site) -> int:
        return self._weights(site) + (2 * head_dim_of(self, site) if self.qk_norm else 0)

    def flops(self, site: Site, context: int) -> int:
        """FLOPs of a token in a pass over `context` others: nothing is decoded."""
        return round(self.prefill_flops(site, context + 1))

    def prefill_flops(self, site: Site, length: int) -> float:
        families, nodes = 0, max(length, 1)
        while nodes > 1 or families == 0:
            nodes = -(-nodes // self.branching)
            families += nodes
        # Queries against keys, and weights on values, of all pairs in a family.
        core = 4 * self.heads * head_dim_of(self, site) * self.branching**2
        return 2 * self._weights(site) + core * families / max(length, 1)

    def sights(self, site: Site) -> tuple[Sight, ...]:  # noqa: ARG002
        return (Sight(is_causal=False),)

    def states(self, site: Site) -> tuple[State, ...]:  # noqa: ARG002
        return ()

    def _weights(self, site: Site) -> int:
        return 4 * site.hidden_size * self.heads * head_dim_of(self, site)
