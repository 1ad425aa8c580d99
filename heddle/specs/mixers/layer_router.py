"""Two mixers for one layer, of which the prompt picks one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from heddle.specs.composite import CompositeMixer
from heddle.specs.cost import FLOAT32_BYTES, State
from heddle.specs.kinds import Contract
from heddle.specs.layer import Site
from heddle.specs.sight import Sight, of_either

if TYPE_CHECKING:
    # The union of all kinds, this one among them; the catalogue fills it in.
    from heddle.specs.kinds import MixerSpec as Mixer

LATER = ("single", "straight_through")
PROMPT = "the decision rests on the prompt as a whole; with the decision given it holds"


class LayerRouter(CompositeMixer):
    """A router that reads the ends of the prompt and picks one of two mixers for the whole sequence (arXiv 2604.07394).

        z = mlp(mean of x over the first and last `pool` tokens)
        training: y = sum_i softmax(z / temperature)_i mixers_i(x);   evaluation: y = mixers_(argmax z)(x)

    The first mixer is the full one and the second the cheap one; the router starts at the first. In training the prompt is
    the whole sequence, so the mix looks ahead by one number a layer. With `straight_through` training computes what evaluation
    does, and gradients are those of the mix, as in the released code.
    """

    exempt: ClassVar[Mapping[Contract, str]] = {"causality": PROMPT, "step": PROMPT, "chunks": PROMPT}
    routes: ClassVar[bool] = True
    kind: Literal["layer_router"] = "layer_router"
    mixers: Annotated[
        list[Annotated[Mixer, Field(discriminator="kind")]],
        Field(
            min_length=2,
            max_length=2,
            description="The full mixer, then the cheap one, each a mapping with a kind.",
        ),
    ]
    router_dim: Annotated[
        int,
        Field(
            ge=1,
            le=65_536,
            description="Width r of the router: hidden_size → 8 r → 2 r → 4 r → r → 2.",
        ),
    ] = 128
    pool: Annotated[
        int, Field(ge=1, le=1_048_576, description="Tokens at each end of the prompt that the router reads.")
    ] = 100
    temperature: Annotated[
        float, Field(ge=1e-3, le=1e3, description="Temperature of the soft mix in training.")
    ] = 1.0
    target: Annotated[
        float | None,
        Field(
            ge=0,
            le=1,
            description="Share (0 to 1) of the second mixer over all layers of this target, of what is chosen with "
            "straight_through, else of the mix, asked for by a loss (share - target)²; null: no such loss.",
        ),
    ] = None
    target_factor: Annotated[
        float, Field(ge=0, le=1e6, description="Factor of that loss in the training loss.")
    ] = 0.25
    single: Annotated[
        bool,
        Field(
            description="In evaluation compute and cache the picked mixer alone where all rows of a batch pick the same; "
            "costs are those of the first then. false: always both."
        ),
    ] = False

    straight_through: Annotated[
        bool,
        Field(description="In training too the likelier mixer answers, with the gradients of the soft mix."),
    ] = False

    def sights(self, site: Site) -> tuple[Sight, ...]:
        return of_either([part.sights(site) for part in self.parts().values()])

    def canonical(self, site: Site) -> dict[str, Any]:
        data = super().canonical(site) | ({"target_factor": None} if self.target is None else {})
        return self._told(data)

    def runtime(self, site: Site) -> dict[str, Any]:
        return self._told(super().runtime(site))

    def _told(self, data: dict[str, Any]) -> dict[str, Any]:
        # Later fields of the language: at their defaults they are left out, as if they did not exist.
        return {name: value for name, value in data.items() if name not in LATER or value}

    def computed(self, site: Site) -> Mapping[str, Mixer]:
        parts = super().computed(site)
        return {"mixers.0": parts["mixers.0"]} if self.single else parts

    def own_params(self, site: Site) -> int:
        # Beside the matrices a bias in each of the five layers.
        return self._weights(site) + (8 + 2 + 4 + 1) * self.router_dim + 2

    def prefill_flops(self, site: Site, length: int) -> float:
        """The router runs once for a prompt, mixers for every token."""
        return super().prefill_flops(site, length) + 2 * self._weights(site) / length

    def _weights(self, site: Site) -> int:
        r = self.router_dim
        return site.hidden_size * 8 * r + 8 * r * 2 * r + 2 * r * 4 * r + 4 * r * r + 2 * r

    def own_states(self, site: Site) -> tuple[State, ...]:  # noqa: ARG002
        return (State("route", (1, 2), element=FLOAT32_BYTES),)
