"""Routing attention: a token attends to the latest tokens of its own cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.cost import FLOAT32_BYTES, State
from heddle.specs.kinds import HeadedMixer, Problem, head_dim_of, heads_problems
from heddle.specs.layer import Site
from heddle.specs.sight import Sight


class Routing(HeadedMixer):
    """The routing heads of the Routing Transformer (arXiv 2003.05997), in a form that sees no later token.

        r_t = layernorm(W_qk x_t),   z_t = argmax_c r_t · m_c
        o_t = softmax attention of r_t over r_j, v_j of the latest `members` - 1 tokens j < t with z_j = z_t; v_t if there is none

    Queries are keys. The paper takes the best tokens of the whole sequence for each cluster, so that later tokens decide what an
    earlier one sees; here a token joins the cluster of its nearest centroid. Centroids m are moving averages of their members'
    directions, by training alone.
    """

    ops: ClassVar[tuple[str, ...]] = ("span_attention",)
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = (
        {"heads": 4, "clusters": 3, "members": 9},
        {
            "heads": 3,
            "head_dim": 8,
            "clusters": 2,
            "members": 6,
            "decay": 0.9,
            "commitment": 0.1,
            "scale": 1.0,
        },
    )
    routes: ClassVar[bool] = True
    kind: Literal["routing"] = "routing"
    heads: Annotated[int, Field(ge=1, le=4096, description="Heads (a count).")]
    head_dim: Annotated[
        int | None, Field(ge=2, le=65_536, description="Dimensions of a head; null: hidden_size / heads.")
    ] = None
    clusters: Annotated[int, Field(ge=1, le=65_536, description="Clusters of each head (a count).")] = 64
    members: Annotated[
        int,
        Field(
            ge=2, le=65_536, description="Tokens of a cluster that a token sees, its own included (a count)."
        ),
    ] = 128
    decay: Annotated[
        float, Field(ge=0, lt=1, description="Share of a centroid that a step of training keeps.")
    ] = 0.999
    commitment: Annotated[
        float,
        Field(
            ge=0,
            le=1e6,
            description="Factor, in the training loss, of each layer's squared distance of tokens to their centroids.",
        ),
    ] = 1e-4

    scale: Annotated[
        float | None,
        Field(
            gt=0,
            le=1e6,
            description="Factor of the logits; null: 1 / sqrt(head_dim). The paper's released code has none, so 1.",
        ),
    ] = None

    def resolved(self, site: Site) -> Routing:
        dim = head_dim_of(self, site)
        return self.model_copy(update={"head_dim": dim, "scale": self.scale or dim**-0.5})

    def runtime(self, site: Site) -> dict[str, Any]:
        data = super().runtime(site)
        # A field that came later: at its default it is left out, as if it did not exist.
        if data["scale"] == data["head_dim"] ** -0.5:
            del data["scale"]
        return data

    def problems(self, site: Site) -> list[Problem]:
        found = heads_problems(self, site)
        if not found and head_dim_of(self, site) < 2:
            found.append(
                Problem("heads", "heads of one dimension have no direction", "fewer", "out-of-range")
            )
        return found

    def params(self, site: Site) -> int:
        return 3 * site.hidden_size * self._width(site)

    def frozen_params(self, site: Site) -> int:
        return self.clusters * self._width(site)

    def flops(self, site: Site, context: int) -> int:
        """FLOPs of decoding a token, as if all others were of its cluster."""
        seen = min(context, self.members - 1)
        return 2 * (self.params(site) + self.frozen_params(site)) + 4 * self._width(site) * seen

    def prefill_flops(self, site: Site, length: int) -> float:
        most = min(length, self.members - 1)
        seen = (most * (most - 1) / 2 + (length - most) * most) / max(length, 1)
        return 2 * (self.params(site) + self.frozen_params(site)) + 4 * self._width(site) * seen

    def sights(self, site: Site) -> tuple[Sight, ...]:  # noqa: ARG002
        return (Sight(1), Sight(is_certain=False))

    def states(self, site: Site) -> tuple[State, ...]:
        shape = (self.heads, self.clusters * (self.members - 1), head_dim_of(self, site))
        held = State("held", (self.heads, self.clusters), element=FLOAT32_BYTES)
        return State("keys", shape), State("values", shape), held

    def read_bytes(self, site: Site, context: int, element: int) -> int:
        """Keys and values of one cluster of each head, and how many it has."""
        rows = min(context, self.members - 1)
        return 2 * rows * self._width(site) * element + min(context, 1) * self.heads * FLOAT32_BYTES

    def _width(self, site: Site) -> int:
        return self.heads * head_dim_of(self, site)
