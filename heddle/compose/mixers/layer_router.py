"""Two mixers for one layer, of which the prompt picks one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from heddle.compose.cache import Call, PreallocatedRecurrentLayer, RecurrentLayer, StateLayer
from heddle.compose.modules.composite import CompositeMixer
from heddle.compose.modules.precision import wide_dtype
from heddle.compose.modules.prompt_router import PromptRouter
from heddle.compose.modules.site import Site


class LayerRouterModule(CompositeMixer):
    """One of two mixers for the whole of a sequence, as a router decides from its prompt.        (arXiv 2604.07394)

        training:    r = softmax(z / temperature),  y = r_0 mixers_0(x) + r_1 mixers_1(x)
        evaluation:  y = mixers_i(x),  i = argmax z

    z comes from the tokens of the first call (`PromptRouter`), one decision a row, which the cache keeps for all later
    calls. Both mixers are computed and both keep their states, so rows of a batch may disagree. `routes_out` sees r, in
    evaluation a one-hot one.

    Shapes:  x, y: [B, T, D];  z: [B, 2];  what `routes_out` sees: [B, 1, 2];  state: likewise
    """

    # Of its mixers the one whose share `target` asks for.
    asked = 1

    def __init__(
        self,
        site: Site,
        *,
        mixers: Sequence[nn.Module],
        router_dim: int,
        pool: int,
        temperature: float,
        target: float | None,
        target_factor: float,
    ) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(mixers)
        self.temperature, self.target, self.target_factor = temperature, target, target_factor
        self.router = PromptRouter(site.hidden_size, size=router_dim, pool=pool)
        self.routes_out = nn.Identity()

    def forward(self, x: Tensor, call: Call) -> Tensor:
        route = call.state("route")
        route = self.decide(x, call) if route is None else route
        call.keep(route=route)
        return self.answer(x, call, self.routes_out(route))

    def decide(self, x: Tensor, call: Call) -> Tensor:
        """The shares of both mixers, for each row.  Shapes:  out: [B, 1, 2], at least float32"""
        z = self.router(x, call)
        if not self.training:
            # Not `one_hot`, which asks the device for the largest index.
            return torch.zeros_like(z).scatter(-1, z.argmax(dim=-1, keepdim=True), 1.0)[:, None]
        r = torch.softmax(z / self.temperature, dim=-1)
        cheap = r[:, 1].mean()
        call.add_loss("layer_router_share", cheap.detach(), 0.0)
        if self.target is not None:
            call.add_target("layer_router", cheap, self.target, self.target_factor)
        return r[:, None]

    def answer(self, x: Tensor, call: Call, route: Tensor) -> Tensor:
        """The layer's output under given shares; in evaluation that of the larger share."""
        first, second = (mixer(x, call.part(path)) for path, mixer in self.parts().items())
        if self.training:
            share = route.to(x.dtype)
            mixed: Tensor = share[..., :1] * first + share[..., 1:] * second
            return mixed
        return torch.where(route[..., :1] >= route[..., 1:], first, second)

    def new_cache(self) -> StateLayer:
        made = super().new_cache()
        # A prompt that is cut would have to be decided on again.
        made.is_croppable = False
        return made

    def filled_states(self, batch: int, context: int, like: Tensor) -> RecurrentLayer | None:
        route = torch.zeros(batch, 1, 2, dtype=wide_dtype(like.dtype), device=like.device)
        route[..., 0] = 1.0
        return PreallocatedRecurrentLayer({"route": route}, context=context)
