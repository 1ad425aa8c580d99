"""A mixture of experts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from heddle.compose.cache import Call
from heddle.compose.channel.swiglu import SwiGLUModule
from heddle.compose.modules.experts import Correction, Experts, load_of, routed_logits
from heddle.compose.modules.site import Site

# Keeps the sum of sigmoids that are all 0 in floating point from being divided by.
TINY = 1e-20


class MoEModule(nn.Module):
    """y = scale · Σ_{e in top k} w_e expert_e(x)  [+ σ(W_g x) · shared(x)]        (arXiv 2101.03961, 2401.04088)

        s = softmax(W_r x), or sigmoid(W_r x);   the k experts of the largest s + b;   w_e = s_e  [/ Σ_{top k} s]
        expert(x) = W_down (silu(W_gate x) * W_up x)

    The router computes in at least float32, also under autocast (arXiv 2101.03961, section 2.4). b is there with
    `correction_bias` (arXiv 2412.19437): no gradient reaches it, `Correction.after_step` moves it.

    In training each layer adds `balance` · E Σ_e f_e P_e, 1 where the load is even: f_e is the share of the choices that fall
    on e, P_e the mean of s_e / Σ s, both over the tokens that are no padding. It is told as `load_balance`, and beside it
    `busiest_experts`, the share of the choices that fall on the k experts that are chosen most: 1 when the router has collapsed.

    Shapes:  x, y: [B, T, D];  W_r: [E, D];  s: [B T, E], at least float32
    """

    def __init__(
        self,
        site: Site,
        *,
        experts: int,
        active: int,
        width: int,
        shared_width: int | None,
        shared_gate: bool,
        normalise: bool,
        score: str,
        scale: float,
        correction_bias: bool,
        balance: float,
    ) -> None:
        super().__init__()
        self.active, self.normalise, self.score = active, normalise, score
        self.scale, self.balance = scale, balance
        self.gate = nn.Linear(site.hidden_size, experts, bias=False)
        self.experts = Experts(experts, site.hidden_size, width)
        self.correction = Correction(experts) if correction_bias else None
        self.shared_expert = None if shared_width is None else SwiGLUModule(site, width=shared_width)
        self.shared_expert_gate = nn.Linear(site.hidden_size, 1, bias=False) if shared_gate else None

    def forward(self, x: Tensor, call: Call) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        scores = self.scores(flat)
        chosen = self.choice(scores)
        if self.training:
            self._account(scores, chosen, call)
        y: Tensor = self.experts(flat, chosen, self.weights(scores, chosen)).reshape(x.shape)
        if self.shared_expert is None:
            return y
        shared: Tensor = self.shared_expert(x, call)
        if self.shared_expert_gate is not None:
            shared = torch.sigmoid(self.shared_expert_gate(x)) * shared
        return y + shared

    def scores(self, flat: Tensor) -> Tensor:
        """How well each expert suits each token."""
        logits = routed_logits(flat, self.gate.weight)
        return torch.softmax(logits, dim=-1) if self.score == "softmax" else torch.sigmoid(logits)

    def choice(self, scores: Tensor) -> Tensor:
        """The experts of each token, the best first.  Shapes:  out: [B T, k]"""
        held = scores.detach() if self.correction is None else scores.detach() + self.correction.bias
        return held.topk(self.active, dim=-1).indices

    def weights(self, scores: Tensor, chosen: Tensor) -> Tensor:
        """The factor of each chosen expert.  Shapes:  out: [B T, k]"""
        weights = scores.gather(-1, chosen)
        if self.normalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + TINY)
        return weights if self.scale == 1.0 else weights * self.scale

    def _account(self, scores: Tensor, chosen: Tensor, call: Call) -> None:
        """Tells how even the load is, and asks for an even one."""
        real = None if call.padding is None else call.padding.reshape(-1)
        load = load_of(chosen, scores.shape[-1], real)
        if self.correction is not None:
            call.loads.append(load)
        shares = load.to(scores.dtype) / load.sum().clamp(min=1)
        p = scores / (scores.sum(dim=-1, keepdim=True) + TINY)
        if real is not None:
            p = p * real[:, None] * (len(p) / real.sum().clamp(min=1))
        even = scores.shape[-1] * (shares * p.mean(dim=0)).sum()
        call.add_loss("load_balance", even if self.balance else even.detach(), self.balance)
        if self.active < scores.shape[-1]:
            call.add_loss("busiest_experts", shares.topk(self.active).values.sum(), 0.0)

    @torch.no_grad()
    def count(self, load: Tensor) -> None:
        """Adds the choices of a forward to those that move the bias.  Shapes:  load: [E] int64"""
        if self.correction is not None:
            self.correction.load += load
