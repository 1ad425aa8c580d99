"""Two mixers in one layer, and a router that says which of them remembers a token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from heddle.compose.cache import Call, PreallocatedRecurrentLayer, RecurrentLayer, StateLayer
from heddle.compose.modules.first_steps import first_steps, missed, routed
from heddle.compose.modules.merge import MergingMixer
from heddle.compose.modules.precision import wide, wide_dtype
from heddle.compose.modules.site import Site


class TokenRouterModule(MergingMixer):
    """Every token is remembered by one of two mixers and reads both.        (after arXiv 2602.03681, 2602.02180)

        p_t = softmax(W x_s),  s the first token of t's chunk
        m_t = onehot(argmax p_t) + p_t - stop(p_t)
        y   = merge_i(norm_i(mixer_i(x, written=m_i)))

    Chunks are counted from each row's position 0. The choice of a chunk rests on its first token, so no later one is
    seen. In the first steps of a training, where that is asked for, onehot is (1, 0). `routes_out` sees every m: its mean
    over time is the share of each mixer.

    Shapes:  x, y: [B, T, D];  m, p, and what `routes_out` sees: [B, T, 2], at least float32;  state: [B, 1, 2], the m of
             the open chunk
    """

    def __init__(
        self,
        site: Site,
        *,
        mixers: Sequence[nn.Module],
        chunk: int,
        merge: str,
        norm: bool,
        budget: float | None,
        budget_factor: float,
        dense_first: float | None = None,
    ) -> None:
        super().__init__(site, mixers=mixers, merge=merge, norm=norm)
        self.chunk, self.budget, self.budget_factor = chunk, budget, budget_factor
        self.router = nn.Linear(site.hidden_size, len(mixers), bias=False)
        self.routes_out, self.first = nn.Identity(), first_steps(dense_first)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        return self.answer(x, call, self.routes(x, call))

    def routes(self, x: Tensor, call: Call) -> Tensor:
        """Which mixer remembers each token: 1 for that one and 0 for the other, with the gradient of the softmax."""
        p = torch.softmax(wide(self.router(x)), dim=-1)
        chosen = routed(p, self.first if self.training else None)
        # The bracket is exactly 0, which chosen + p - p is not in floating point.
        m: Tensor = self.routes_out(self._of_chunks(chosen + (p - p.detach()), call))
        if self.training:
            self._account(m[..., 0], call)
        return m

    def answer(self, x: Tensor, call: Call, m: Tensor) -> Tensor:
        """The layer's output under given routes."""
        outputs = []
        for index, (path, mixer) in enumerate(self.parts().items()):
            # Inside another router, what is not remembered there is not remembered here either.
            outputs.append(mixer(x, call.part(path, written=call.hide_unwritten(m)[..., index])))
        return self.merged(x, outputs)

    def _of_chunks(self, m: Tensor, call: Call) -> Tensor:
        """Gives each token the m of its chunk's first one, which may lie in an earlier call."""
        if self.chunk == 1:
            return m
        batch, length, _ = m.shape
        first = torch.arange(length, device=m.device) - call.positions % self.chunk
        m = m.gather(1, first.clamp(min=0)[..., None].expand(batch, length, 2))
        past = call.state("route")
        if past is not None:
            m = torch.where((first < 0)[..., None], past.to(m.dtype), m)
        # A view would keep all of the call's routes in memory.
        call.keep(route=m[:, -1:].clone())
        return m

    def _account(self, first: Tensor, call: Call) -> None:
        """Tells the share of tokens that the first mixer remembers, and asks for the share that is wanted.

        Shapes:  first: [B, T]
        """
        real = torch.ones_like(first) if call.padding is None else call.padding.to(first.dtype)
        share = (first * real).sum() / real.sum().clamp(min=1.0)
        call.add_loss("router_share", share.detach(), 0.0)
        if self.budget is not None:
            call.add_loss("router_budget", missed(share, self.budget, self.first), self.budget_factor)

    def new_cache(self) -> StateLayer:
        made = super().new_cache()
        # The route of the open chunk cannot be taken back.
        made.is_croppable = made.is_croppable and self.chunk == 1
        return made

    def filled_states(self, batch: int, context: int, like: Tensor) -> RecurrentLayer | None:
        if self.chunk == 1:
            return None
        route = torch.zeros(batch, 1, 2, dtype=wide_dtype(like.dtype), device=like.device)
        route[..., 0] = 1.0
        return PreallocatedRecurrentLayer({"route": route}, context=context)
