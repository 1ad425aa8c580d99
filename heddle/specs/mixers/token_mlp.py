"""A feed-forward network in the place of a mixer: no token hears of another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.cost import State
from heddle.specs.kinds import Contract, MixerSpec, Problem
from heddle.specs.layer import Site
from heddle.specs.sight import Sight


class TokenMlp(MixerSpec):
    """A SwiGLU where a mixer would stand, with as many parameters as attention (arXiv 2510.11602, "MLP").

        y = W_down (silu(W_gate x) * W_up x)

    By default its width is 4/3 of hidden_size, to the nearest whole number: three matrices are the four of attention then.
    """

    exempt: ClassVar[Mapping[Contract, str]] = {
        "written": "it has no memory that a token could be kept out of"
    }
    cases: ClassVar[tuple[Mapping[str, Any], ...]] = ({}, {"width": 20})
    kind: Literal["token_mlp"] = "token_mlp"
    width: Annotated[
        int | None, Field(ge=1, le=10**6, description="Inner width, in features; null: 4/3 of hidden_size.")
    ] = None

    def resolved(self, site: Site) -> TokenMlp:
        return self.model_copy(update={"width": self._width(site)})

    def problems(self, site: Site) -> list[Problem]:  # noqa: ARG002 - any width fits
        return []

    def params(self, site: Site) -> int:
        return 3 * site.hidden_size * self._width(site)

    def flops(self, site: Site, context: int) -> int:  # noqa: ARG002 - no other token counts
        return 2 * self.params(site)

    def prefill_flops(self, site: Site, length: int) -> float:  # noqa: ARG002
        return 2 * self.params(site)

    def states(self, site: Site) -> tuple[State, ...]:  # noqa: ARG002
        return ()

    def sights(self, site: Site) -> tuple[Sight, ...]:  # noqa: ARG002
        return (Sight(1),)

    def _width(self, site: Site) -> int:
        return self.width or max(1, round(4 * site.hidden_size / 3))
