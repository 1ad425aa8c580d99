"""Two mixers for one layer, of which the prompt picks one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from heddle.compose.cache import (
    Call,
    CompositeLayer,
    PreallocatedRecurrentLayer,
    RecurrentLayer,
    StateLayer,
)
from heddle.compose.modules.composite import CompositeMixer
from heddle.compose.modules.precision import wide_dtype
from heddle.compose.modules.prompt_router import PromptRouter
from heddle.compose.modules.site import Site
from heddle.compose.modules.waiting import can_wait


class RoutedLayer(CompositeLayer):
    """What both mixers keep, or one: `single` is the one that every row has picked, whose states alone are there."""

    single: int | None = None

    def reset(self) -> None:
        super().reset()
        self.single = None


class LayerRouterModule(CompositeMixer):
    """One of two mixers for the whole of a sequence, as a router decides from its prompt.        (arXiv 2604.07394)

        training:    r = softmax(z / temperature),  y = r_0 mixers_0(x) + r_1 mixers_1(x)
        evaluation:  y = mixers_i(x),  i = argmax z

    With `straight_through` training computes the y of evaluation, with the gradient of r, and `target` asks for a share of its
    choices, with that gradient; else for a mean of r. What is told is the share of choices in either case.

    The paper's router reads queries before their rotation, and what a missed target costs is learned; here x and a fixed factor.

    z comes from the tokens of the first call (`PromptRouter`), one decision a row, which the cache keeps for all later
    calls. Both mixers are computed and both keep their states, so rows of a batch may disagree; with `single` the picked one
    alone where they agree, for which the host waits once a prompt. `routes_out` sees r, in evaluation a one-hot one.

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
        single: bool = False,
        straight_through: bool = False,
    ) -> None:
        super().__init__()
        self.single, self.straight_through = single, straight_through
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
        # Not `one_hot`, which asks the device for the largest index.
        chosen = torch.zeros_like(z).scatter(-1, z.argmax(dim=-1, keepdim=True), 1.0)
        if not self.training:
            return chosen[:, None]
        r = torch.softmax(z / self.temperature, dim=-1)
        # Computes what evaluation does: the bracket is exactly 0.
        hard = chosen + (r - r.detach())
        trained = hard if self.straight_through else r
        share = hard[:, 1].detach().mean()
        call.add_loss("layer_router_share", share, 0.0)
        if self.target is not None:
            call.add_target("layer_router", trained[:, 1].mean(), self.target, self.target_factor)
            call.add_target("layer_router_missed", share, self.target, 0.0)
        return trained[:, None]

    def answer(self, x: Tensor, call: Call, route: Tensor) -> Tensor:
        """The layer's output under given shares; in evaluation that of the larger share."""
        parts, picked = list(self.parts().items()), self._picked(call, route)
        if picked is not None:
            path, mixer = parts[picked]
            alone: Tensor = mixer(x, call.part(path))
            return alone
        first, second = (mixer(x, call.part(path)) for path, mixer in parts)
        if self.training:
            share = route.to(x.dtype)
            mixed: Tensor = share[..., :1] * first + share[..., 1:] * second
            return mixed
        return torch.where(route[..., :1] >= route[..., 1:], first, second)

    def _picked(self, call: Call, route: Tensor) -> int | None:
        """The mixer that all rows have picked, where it is to be computed alone."""
        if not self.single or self.training:
            return None
        cache = call.cache if isinstance(call.cache, RoutedLayer) else None
        # Who has begun with both goes on with both.
        if cache is not None and cache.get_seq_length() > 0:
            return cache.single
        if cache is not None:
            cache.single = None
        if not can_wait(route):
            return None
        first = (route[..., 0] >= route[..., 1]).flatten().tolist()
        picked = (0 if first[0] else 1) if len(set(first)) == 1 else None
        if cache is not None:
            cache.single = picked
        return picked

    def new_cache(self) -> StateLayer:
        made = RoutedLayer({path: part.new_cache() for path, part in self.parts().items()})
        # A prompt that is cut would have to be decided on again.
        made.is_croppable = False
        return made

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random contents after `context` tokens, whose step repeats: of the first mixer alone with `single`."""
        parts = {path: part.filled_cache(batch, context, like) for path, part in self.parts().items()}
        if self.single:
            parts["mixers.1"] = PreallocatedRecurrentLayer({}, context=context)
        made = RoutedLayer(parts, self.filled_states(batch, context, like))
        made.tokens, made.is_initialized, made.single = context, True, 0 if self.single else None
        return made

    def filled_states(self, batch: int, context: int, like: Tensor) -> RecurrentLayer | None:
        route = torch.zeros(batch, 1, 2, dtype=wide_dtype(like.dtype), device=like.device)
        route[..., 0] = 1.0
        return PreallocatedRecurrentLayer({"route": route}, context=context)
