"""What a spec says of the token shift. Imports no torch."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from heddle.specs.cost import State
from heddle.specs.kinds import HeadedMixer, Problem, head_dim_of, heads_problems
from heddle.specs.layer import Site


class TokenShift(HeadedMixer):
    """Each head mixes a token with the one before it (RWKV, arXiv 2305.13048).

    v = W_v x,   o_t = v_t + mu (v_(t-1) - v_t),   y = W_o o,   with one learned mu for each feature of a head
    """

    module: ClassVar[str | None] = "heddle_example.module:TokenShiftModule"
    kind: Literal["token_shift"] = "token_shift"
    heads: Annotated[int, Field(ge=1, le=4096, description="Heads (a count).")]
    head_dim: Annotated[
        int | None, Field(ge=1, le=65_536, description="Dimensions of a head; null: hidden_size / heads.")
    ] = None

    def resolved(self, site: Site) -> TokenShift:
        return self.model_copy(update={"head_dim": head_dim_of(self, site)})

    def problems(self, site: Site) -> list[Problem]:
        return heads_problems(self, site)

    def params(self, site: Site) -> int:
        return self._width(site) * (2 * site.hidden_size + 1)

    def flops(self, site: Site, context: int) -> int:  # noqa: ARG002 - the state does not grow
        return 2 * self._width(site) * (2 * site.hidden_size + 1)

    def prefill_flops(self, site: Site, length: int) -> float:
        return self.flops(site, length)

    def states(self, site: Site) -> tuple[State, ...]:
        return (State("before", (self.heads, head_dim_of(self, site))),)

    def _width(self, site: Site) -> int:
        return self.heads * head_dim_of(self, site)
