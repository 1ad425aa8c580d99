"""Two mixers in one layer, and a router that says which of them remembers a token."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.composite import CompositeMixer
from heddle.specs.cost import FLOAT32_BYTES, State
from heddle.specs.kinds import Problem
from heddle.specs.layer import Site
from heddle.specs.sight import Sight, of_either

if TYPE_CHECKING:
    # The union of all kinds, this one among them; the catalogue fills it in.
    from heddle.specs.kinds import MixerSpec as Mixer

Merge = Annotated[
    Literal["sum", "mean", "gate"],
    Field(description="sum, mean; gate: shares by a softmax over a projection of the input, for each token."),
]


class TokenRouter(CompositeMixer):
    """A router that sends each token, or chunk of tokens, to the memory of one of two mixers; all tokens read both.

        m_t = onehot(argmax W x_s),  s the first token of t's chunk,   y = merge_i(norm_i(mixer_i(x, written=m_i)))

    The form of NAtS-L (arXiv 2602.03681) and STILL (arXiv 2602.02180). The gradient goes straight through to the softmax.
    """

    routes: ClassVar[bool] = True
    kind: Literal["token_router"] = "token_router"
    mixers: Annotated[
        list[Annotated[Mixer, Field(discriminator="kind")]],
        Field(min_length=2, max_length=2, description="The two mixers, each a mapping with a kind."),
    ]
    chunk: Annotated[
        int,
        Field(ge=1, le=65_536, description="Tokens that are sent together, where the first of them is sent."),
    ] = 1
    merge: Merge = "sum"
    norm: Annotated[bool, Field(description="RMSNorm of each mixer's output before the merge.")] = False
    budget: Annotated[
        float | None,
        Field(
            ge=0,
            le=1,
            description="Share of tokens (0 to 1) that the first mixer should remember, asked for by a loss "
            "(share - budget)²; null: no such loss.",
        ),
    ] = None
    budget_factor: Annotated[
        float, Field(ge=0, le=1e6, description="Factor of that loss in the training loss.")
    ] = 0.01
    dense_first: Annotated[
        float | None,
        Field(
            gt=0,
            le=1,
            description="Share of a training's steps (0 to 1), the first ones, in which the first mixer remembers all "
            "tokens; null: none.",
        ),
    ] = None

    def problems(self, site: Site) -> list[Problem]:
        return super().problems(site) + [
            Problem(
                path,
                f"{part.kind} can keep no token out of its memory, so none can be sent past it",
                code="conflicting-fields",
            )
            for path, part in self.parts().items()
            if "written" in part.exemptions()
        ]

    def sights(self, site: Site) -> tuple[Sight, ...]:
        return of_either([part.sights(site) for part in self.parts().values()])

    def canonical(self, site: Site) -> dict[str, Any]:
        return super().canonical(site) | ({"budget_factor": None} if self.budget is None else {})

    def own_params(self, site: Site) -> int:
        gate = 2 * site.hidden_size if self.merge == "gate" else 0
        norms = 2 * site.hidden_size if self.norm else 0
        return 2 * site.hidden_size + gate + norms

    def own_flops(self, site: Site) -> int:
        return 4 * site.hidden_size * (2 if self.merge == "gate" else 1)

    def own_states(self, site: Site) -> tuple[State, ...]:  # noqa: ARG002
        return () if self.chunk == 1 else (State("route", (1, 2), element=FLOAT32_BYTES),)

    def states(self, site: Site) -> tuple[State, ...]:
        """Beside keys a cache holds which of them were written, a byte a token."""
        held = super().states(site)
        known = {state.name for state in held}
        marks = [
            replace(state, name=f"{state.name.removesuffix('keys')}written", shape=(1, 1), element=1)
            for state in held
            if state.name.endswith(".keys")
        ]
        return (*held, *(mark for mark in marks if mark.name not in known))
