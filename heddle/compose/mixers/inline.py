"""InLine attention: the mean of values, and their covariance with keys applied to the query."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heddle.compose.cache import Call, PreallocatedRecurrentLayer, RecurrentLayer, StateLayer, TokenCount
from heddle.compose.modules.local_kernel import LocalKernel
from heddle.compose.modules.norm import RMSNorm
from heddle.compose.modules.precision import wide, wide_dtype
from heddle.compose.modules.site import Site
from heddle.errors import HeddleError
from heddle.kernels.simple_gla import simple_gla, simple_gla_step

FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "exp": torch.exp,
}
# The gate is the sixteenth root of a sigmoid, so that it begins near 1 (arXiv 2312.06635).
ROOT = 16.0


class InlineModule(nn.Module):
    """Linear attention whose weights sum to one by subtraction.        (arXiv 2412.06590; the causal form is ours)

        o_t = v̄ + s cov(v, k) q_t,   s = 1 / sqrt(d),   means v̄, k̄ and covariance over all tokens or, causal, over those so far:
        n = γ n + 1,   S = γ S + [k; 1] vᵀ,   o_t = Sᵀ [s q_t; 1 - s q_t · k̄_t] / n
        y = W_o (o + Σ_j w_j v_(t-j)) + b,   w a kernel predicted from x (see `LocalKernel`)

    Without `causal` w is predicted once, from the mean of x, and the sum is Σ_j w_j v_(t + j - taps // 2). Padding and what is
    not written weighs nothing. Means, sums and states are float32.

    Shapes:  x, y: [B, T, D];  states: sums [B, H, 1, d + 1] of k and 1, memory [B, H, d + 1, d], local [B, taps - 1, H d];
             `heads_out` sees [B, T, H, d]

    Raises:
        HeddleError: "bad-argument" for a cache of earlier tokens without `causal`.
    """

    def __init__(
        self,
        site: Site,
        *,
        heads: int,
        head_dim: int,
        causal: bool,
        feature: str,
        qk_norm: bool,
        decay: str,
        local: int | None,
        bias: bool,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.causal, self.decay = heads, head_dim, causal, decay
        self.feature, width = feature, heads * head_dim
        self.qkv_proj = nn.Linear(site.hidden_size, 3 * width, bias=bias)
        self.q_norm, self.k_norm = (
            RMSNorm(head_dim, site.norm_eps) if qk_norm else nn.Identity() for _ in range(2)
        )
        self.decay_proj = nn.Linear(site.hidden_size, heads) if decay == "gate" else None
        self.local = None if local is None else LocalKernel(site.hidden_size, heads, head_dim, local)
        self.heads_out = nn.Identity()
        self.o_proj = nn.Linear(width, site.hidden_size)

    @property
    def takes_packed(self) -> bool:
        return self.causal

    def forward(self, x: Tensor, call: Call) -> Tensor:
        x = call.hide_padding(x)
        q, k, v = wide(self.qkv_proj(x)).view(*x.shape[:2], 3, self.heads, -1).unbind(2)
        phi = FEATURES[self.feature]
        q, k = phi(self.q_norm(q)) * self.head_dim**-0.5, phi(self.k_norm(k))
        weight = call.hide_unwritten(call.hide_padding(v.new_ones(*x.shape[:2], 1)))
        attend = partial(self._so_far, log_decay=self._log_decay(x)) if self.causal else self._of_all
        o = attend(q, k, v, weight, call)
        if self.local is not None:
            v = v * weight[..., None]
            o = o + (self._behind(x, v, call) if self.causal else self._around(x, v, weight))
        y: Tensor = self.o_proj(self.heads_out(call.gated(o.to(x.dtype))).flatten(2))
        return y

    def _of_all(self, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, call: Call) -> Tensor:
        """Shapes:  q (times s), k, v, out: [B, T, H, d];  weight: [B, T, 1]"""
        if call.cache is not None and call.cache.get_seq_length() > 0:
            raise HeddleError("bad-argument", "attention that sees later tokens cannot go on from a cache")
        share = (weight / _count(weight.sum(dim=1, keepdim=True)))[..., None]
        k = k - (share * k).sum(dim=1, keepdim=True)
        mean = (share * v).sum(dim=1, keepdim=True)
        covariance = torch.einsum("bthk,bthv->bhkv", share * k, v - mean)
        return mean + torch.einsum("bthk,bhkv->bthv", q, covariance)

    def _so_far(
        self, q: Tensor, k: Tensor, v: Tensor, weight: Tensor, call: Call, *, log_decay: Tensor
    ) -> Tensor:
        """Shapes:  as those of `_of_all`;  log_decay: [B, T, H]"""
        # A 1 beside the keys: its row of the memory is the sum of values.
        k = torch.cat((k, torch.ones_like(k[..., :1])), dim=-1) * weight[..., None]
        one = torch.ones_like(k[..., :1])
        sums, kept = _swept((one, one, k, log_decay), call, "sums")
        n = _count(sums[..., -1:])
        slope = q / n
        rest = (1.0 - (slope * sums[..., :-1]).sum(dim=-1, keepdim=True)) / n
        o, memory = _swept((torch.cat((slope, rest), dim=-1), k, v, log_decay), call, "memory")
        call.keep(sums=kept, memory=memory)
        return o

    def _log_decay(self, x: Tensor) -> Tensor:
        """Shapes:  out: [B, T, H], wide"""
        if self.decay_proj is not None:
            return F.logsigmoid(wide(self.decay_proj(x))) / ROOT
        zero = wide(x[..., :1]).new_zeros(*x.shape[:2], self.heads)
        if self.decay == "none":
            return zero
        head = torch.arange(self.heads, device=x.device, dtype=zero.dtype)
        return zero + torch.log1p(-torch.exp2(-5.0 - head))

    def _behind(self, x: Tensor, v: Tensor, call: Call) -> Tensor:
        """Each token's own kernel over itself and the tokens before.  Shapes:  v, out: [B, T, H, d]"""
        assert self.local is not None
        kernel, past, reach = wide(self.local(x)), call.state("local"), self.local.taps - 1
        past = (
            v.new_zeros(v.shape[0], reach, *v.shape[2:])
            if past is None
            else past.view(-1, reach, *v.shape[2:])
        )
        held = torch.cat((past.to(v.dtype), v), dim=1)
        # A view would keep all of a long prefill in memory.
        call.keep(local=held[:, held.shape[1] - reach :].flatten(2).to(x.dtype).clone())
        behind = [held[:, reach - tap : reach - tap + v.shape[1]] for tap in range(reach + 1)]
        if call.packing is not None:
            # What is further back than the own document begins is of another.
            place = call.packing.places()[..., None, None]
            behind = [one * (place >= tap).to(one.dtype) for tap, one in enumerate(behind)]
        return torch.stack([kernel[..., tap] * one for tap, one in enumerate(behind)]).sum(dim=0)

    def _around(self, x: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        """One kernel for a sequence, over the tokens on both sides.  Shapes:  as those of `_of_all`"""
        assert self.local is not None
        taps, share = self.local.taps, weight / _count(weight.sum(dim=1, keepdim=True))
        kernel = wide(self.local((share * x).sum(dim=1, keepdim=True).to(x.dtype)))
        held = F.pad(v, (0, 0, 0, 0, taps // 2, taps - 1 - taps // 2))
        terms = [kernel[..., tap] * held[:, tap : tap + v.shape[1]] for tap in range(taps)]
        return torch.stack(terms).sum(dim=0)

    def new_cache(self) -> StateLayer:
        return RecurrentLayer() if self.causal else TokenCount()

    def filled_cache(self, batch: int, context: int, like: Tensor) -> StateLayer:
        """A cache of random states after `context` tokens, whose step repeats."""
        states: dict[str, Tensor] = {}
        if self.causal:
            dtype, size = wide_dtype(like.dtype), self.head_dim
            states["sums"] = like.new_empty(batch, self.heads, 1, size + 1, dtype=dtype).uniform_(1.0, 2.0)
            states["memory"] = like.new_empty(batch, self.heads, size + 1, size, dtype=dtype).normal_()
            if self.local is not None:
                states["local"] = like.new_empty(batch, self.local.taps - 1, self.heads * size).normal_()
        return PreallocatedRecurrentLayer(states, context=context)

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:
        """The name of the code that does the mixing."""
        if not self.causal:
            return "torch"
        return simple_gla.path(device, wide_dtype(dtype), K=self.head_dim + 1, V=self.head_dim)


def _count(n: Tensor) -> Tensor:
    """What to divide a sum by; where there is nothing yet the sum is 0, and so is the mean."""
    return torch.where(n > 0, n, 1.0)


def _swept(sides: tuple[Tensor, Tensor, Tensor, Tensor], call: Call, state: str) -> tuple[Tensor, Tensor]:
    """Shapes:  sides: q, k [B, T, H, K], v [B, T, H, V], log_decay [B, T, H];  out: [B, T, H, V];  states: [B, H, K, V]"""
    past = call.state(state)
    if past is not None and sides[0].shape[1] == 1:
        return simple_gla_step(*sides, past, scale=1.0)
    return simple_gla(*sides, scale=1.0, initial_state=past, cu_seqlens=call.cu_seqlens)
