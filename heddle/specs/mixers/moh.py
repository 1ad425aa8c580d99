"""Mixture-of-Head: a router weighs the heads of a mixer, and turns some of them off, for each token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.composite import CompositeMixer
from heddle.specs.kinds import HeadedMixer, Problem
from heddle.specs.layer import Site
from heddle.specs.mixers.attention import Attention

if TYPE_CHECKING:
    # The union of all kinds, this one among them; the catalogue fills it in.
    from heddle.specs.kinds import MixerSpec as Mixer


class Moh(CompositeMixer):
    """Any mixer with heads, whose head outputs a router weighs for each token (Mixture-of-Head, arXiv 2410.11842).

        y_t = sum_i g_(t,i) o_(t,i) W_i,   g = (a_0 Hs softmax(x W_s),  a_1 K topk(softmax(x W_g)) / sum),   a = 2 softmax(x W_h)

    The first Hs heads are always on, of the others K = `active`. Heads are those before the output projection: of grouped
    ones query heads, of a delta rule value heads. Costs are those of all heads: what is turned off is multiplied by 0, or
    left out where kernels can.

    With `router: norms` there are no weights: g is 1 for the shared heads and for the K longest queries, and else 0. Only
    softmax attention has a query for each head.
    """

    routes: ClassVar[bool] = True
    kind: Literal["moh"] = "moh"
    mixer: Annotated[
        Mixer,
        Field(discriminator="kind", description="The mixer whose heads are routed, a mapping with a kind."),
    ]
    shared_heads: Annotated[
        int, Field(ge=0, le=4096, description="Heads that are on for every token (a count), the first ones.")
    ]
    active: Annotated[
        int,
        Field(
            ge=0, le=4096, description="Of the other heads, how many are on for a token; 0 if there are none."
        ),
    ]
    router: Annotated[
        Literal["learned", "norms"],
        Field(
            description="What picks and weighs heads: learned projections of the input; or norms, the lengths of the queries, "
            "which turn heads of attention on and off and have no weights."
        ),
    ] = "learned"
    balance: Annotated[
        float,
        Field(
            ge=0,
            le=1e6,
            description="Factor, in the training loss, of each layer's loss that asks for all routed heads alike.",
        ),
    ] = 0.01

    def problems(self, site: Site) -> list[Problem]:
        found = super().problems(site)
        if not isinstance(self.mixer, HeadedMixer):
            found.append(
                Problem("mixer.kind", f"{self.mixer.kind} has no heads of its own", code="conflicting-fields")
            )
        elif self.router == "norms" and not isinstance(self.mixer, Attention):
            what = f"{self.mixer.kind} has no query of its own for each head"
            found.append(Problem("router", what, "router: learned, or kind: attention", "conflicting-fields"))
        if found:
            return found
        heads, routed = self._heads(site), self._routed(site)
        if routed < 0:
            what = f"{self.shared_heads} shared heads, and the mixer has {heads}"
            return [Problem("shared_heads", what, f"at most {heads}", "out-of-range")]
        if min(routed, 1) <= self.active <= routed:
            return []
        what = f"{self.active} active heads of the {routed} that are not shared"
        hint = f"from 1 to {routed}" if routed else "active: 0, or fewer shared heads"
        return [Problem("active", what, hint, "out-of-range")]

    def runtime(self, site: Site) -> dict[str, Any]:
        data = super().runtime(site) | {"routed_heads": self._routed(site)}
        # A later field of the language: at its default it is left out, as if it did not exist.
        return data if self.router == "norms" else {name: data[name] for name in data if name != "router"}

    def canonical(self, site: Site) -> dict[str, Any]:
        kept = {"router": self.router != "learned", "balance": self._routed(site) > 0}
        return {name: value for name, value in super().canonical(site).items() if kept.get(name, True)}

    def own_params(self, site: Site) -> int:
        routed, shared = self._routed(site), self.shared_heads
        if self.router == "norms":
            return 0
        return site.hidden_size * ((routed + 2 if routed > 0 else 0) + (shared if shared > 1 else 0))

    def own_flops(self, site: Site) -> int:
        return 2 * self.own_params(site)

    def _heads(self, site: Site) -> int:
        """Heads before the output projection."""
        mixer = self.mixer.resolved(site)
        return mixer.output_heads() if isinstance(mixer, HeadedMixer) else 0

    def _routed(self, site: Site) -> int:
        return self._heads(site) - self.shared_heads
