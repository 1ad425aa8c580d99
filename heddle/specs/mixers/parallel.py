"""Several mixers side by side in one layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from heddle.specs.composite import MAX_PARTS, CompositeMixer
from heddle.specs.kinds import Problem
from heddle.specs.layer import Site

if TYPE_CHECKING:
    # The union of all kinds, this one among them; the catalogue fills it in.
    from heddle.specs.kinds import MixerSpec as Mixer

Merge = Annotated[
    Literal["sum", "mean", "gate", "concat"],
    Field(
        description="sum, mean; gate: shares by a softmax over a projection of the input, for each token; "
        "concat: a projection of all outputs."
    ),
]


class Parallel(CompositeMixer):
    """Mixers that see the same input, their outputs merged (Hymba, arXiv 2411.13676; Falcon-H1, arXiv 2507.22448).

    y = merge_i(weight_i · norm_i(mixer_i(x)))
    """

    kind: Literal["parallel"] = "parallel"
    mixers: Annotated[
        list[Annotated[Mixer, Field(discriminator="kind")]],
        Field(min_length=2, max_length=MAX_PARTS, description="The mixers, each a mapping with a kind."),
    ]
    merge: Merge = "sum"
    norm: Annotated[bool, Field(description="RMSNorm of each mixer's output before the merge (Hymba).")] = (
        False
    )
    weights: Annotated[
        list[Annotated[float, Field(ge=-1e6, le=1e6)]] | None,
        Field(max_length=MAX_PARTS, description="A fixed factor for each mixer's output; null: 1 for all."),
    ] = None

    def problems(self, site: Site) -> list[Problem]:
        found = super().problems(site)
        if self.weights is not None and len(self.weights) != len(self.mixers):
            what = f"{len(self.weights)} weights for {len(self.mixers)} mixers"
            found.append(Problem("weights", what, "one for each mixer", "out-of-range"))
        return found

    def canonical(self, site: Site) -> dict[str, Any]:
        data = super().canonical(site)
        return data if set(self.weights or ()) - {1.0} else {**data, "weights": None}

    def own_params(self, site: Site) -> int:
        norms = len(self.mixers) * site.hidden_size if self.norm else 0
        return norms + self._merging(site)

    def own_flops(self, site: Site) -> int:
        return 2 * self._merging(site)

    def _merging(self, site: Site) -> int:
        """Weights of the merge."""
        inner = {"gate": 1, "concat": site.hidden_size}.get(self.merge, 0)
        return len(self.mixers) * site.hidden_size * inner
