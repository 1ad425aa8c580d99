"""The mixture of experts."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.kinds import ChannelSpec, Problem
from heddle.specs.layer import Site
from heddle.specs.width import Ratio, Width, width_of, width_problems

MATRICES = 3


class MoE(ChannelSpec):
    """A router sends each token to `active` of the SwiGLU `experts` (arXiv 2101.03961, 2401.04088, 2412.19437).

    No token is dropped. Several shared experts are one whose width is the sum of theirs.
    """

    routes: ClassVar[bool] = True
    kind: Literal["moe"] = "moe"
    experts: Annotated[int, Field(ge=2, le=4096, description="Routed experts.")]
    active: Annotated[int, Field(ge=1, le=4096, description="Experts that a token is sent to; at most all.")]
    ratio: Ratio = 2.67
    width: Width = None
    shared_width: Annotated[
        int | None,
        Field(
            ge=1,
            le=10**6,
            description="Inner width of the expert that every token sees; null: there is none.",
        ),
    ] = None
    shared_gate: Annotated[
        bool, Field(description="A sigmoid gate, one number a token, on the shared expert's output.")
    ] = False
    normalise: Annotated[bool, Field(description="The weights of a token's experts sum to 1.")] = True
    score: Annotated[
        Literal["softmax", "sigmoid"], Field(description="How the router's logits become scores.")
    ] = "softmax"
    scale: Annotated[float, Field(gt=0, le=1e3, description="Factor of the routed experts' sum.")] = 1.0
    correction_bias: Annotated[
        bool,
        Field(
            description="A bias of each expert that joins the choice alone, and that training moves towards an even load."
        ),
    ] = False
    balance: Annotated[float, Field(ge=0, le=1e3, description="Factor of the load-balance loss.")] = 0.01

    def resolved(self, site: Site) -> MoE:
        return self.model_copy(update={"width": width_of(self.ratio, self.width, site)})

    def problems(self, site: Site) -> list[Problem]:  # noqa: ARG002
        found = width_problems(self, self.ratio, self.width)
        if self.active > self.experts:
            what = f"{self.active} of {self.experts} experts cannot be chosen"
            found.append(Problem("active", what, f"at most {self.experts}", "out-of-range"))
        if self.active == 1 and self.normalise:
            what = "the weight of a single expert, normalised, is always 1, so that nothing teaches the router its choice"
            found.append(Problem("active", what, "normalise: false, or two experts", "conflicting-fields"))
        if self.shared_gate and self.shared_width is None:
            what = "a gate on the shared expert, and there is no shared expert"
            found.append(Problem("shared_gate", what, "give a shared_width", "conflicting-fields"))
        return found

    def runtime(self, site: Site) -> dict[str, Any]:
        return self.resolved(site).model_dump(exclude={"ratio"})

    def params(self, site: Site) -> int:
        return self._params(site, self.experts)

    def params_read(self, site: Site, tokens: int) -> int:
        """Those of the experts that `tokens` tokens meet on average where each is as likely: E (1 - (1 - k / E)^tokens)."""
        met = 1.0 - (1.0 - min(self.active / self.experts, 1.0)) ** tokens
        return self._params(site, round(self.experts * met))

    def active_params(self, site: Site) -> int:
        return self._params(site, min(self.active, self.experts))

    def _params(self, site: Site, experts: int) -> int:
        """Parameters of so many experts, and of what every token passes. The correction bias is a buffer, not one of them."""
        size = site.hidden_size
        inner = experts * width_of(self.ratio, self.width, site) + (self.shared_width or 0)
        return MATRICES * size * inner + self.experts * size + (size if self.shared_gate else 0)

    def flops(self, site: Site) -> int:
        return 2 * self.active_params(site)
