"""Mixture-of-Head: a router weighs the heads of a mixer, and turns some of them off, for each token."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from heddle.compose.cache import Call
from heddle.compose.modules.composite import CompositeMixer
from heddle.compose.modules.documents import takes_packed
from heddle.compose.modules.precision import wide, wide_dtype
from heddle.compose.modules.site import Site


class MohModule(CompositeMixer):
    """The heads of a mixer, each times a factor before the output projection.        (arXiv 2410.11842)

        p   = softmax(W_g x)  over the Hr routed heads,  M = 1 for the K largest of p (the first of equal ones)
        g_r = K p M / sum(p M)
        g_s = Hs softmax(W_s x)  of the Hs shared heads, which stand first
        a   = 2 softmax(W_h x)
        y   = mixer(x) with head factors (a_0 g_s, a_1 g_r)

    These are the factors of the released code: K, Hs and 2 make all of them 1 for a router that knows nothing. Keys and
    values are those of all heads. In training the layer adds  Hr sum_i mean_t(p_i) mean_t(M_i)  over the tokens that are no
    padding, as `moh_balance`, and tells `busiest_heads`, the share of the choices that fall on the K heads chosen most: 1 when
    the router has collapsed. On CUDA softmax attention leaves out what has the factor 0 (op `head_sparse_attention`); other
    mixers, and plain PyTorch, compute all heads.

    With `router` "norms" there are no weights (MoH-LLaMA3-8B):

        p   = softmax(n / std(n)),  n_i = |q_i| of the routed heads, before any norm or rotation; std is the unbiased one
        g_r = M,  g_s = 1

    Only p has a gradient, which M takes over (straight through), so that training asks all heads what they would give.

    Shapes:  x, y: [B, T, D];  what `gates_out` sees: [B, T, H], at least float32
    """

    def __init__(
        self,
        site: Site,
        *,
        mixer: nn.Module,
        shared_heads: int,
        routed_heads: int,
        active: int,
        balance: float,
        router: str = "learned",
    ) -> None:
        super().__init__()
        self.mixer, self.shared_heads, self.routed_heads = mixer, shared_heads, routed_heads
        self.active, self.balance, self.by_norms = active, balance, router == "norms"

        def projection(size: int, wanted: bool) -> nn.Linear | None:
            return nn.Linear(site.hidden_size, size, bias=False) if wanted and not self.by_norms else None

        self.routed_proj = projection(routed_heads, routed_heads > 0)
        self.split_proj = projection(2, routed_heads > 0)
        self.shared_proj = projection(shared_heads, shared_heads > 1)
        self.gates_out = nn.Identity()

    @property
    def takes_packed(self) -> bool:
        return takes_packed(self.mixer)

    def forward(self, x: Tensor, call: Call) -> Tensor:
        if self.by_norms:
            y: Tensor = self.mixer(x, call.part("mixer"), route=partial(self.norm_gates, call=call))
        else:
            y = self.mixer(x, call.part("mixer", head_gates=self.gates_out(self.gates(x, call))))
        return y

    def gates(self, x: Tensor, call: Call) -> Tensor:
        """The factor of each head."""
        if self.shared_proj is None:
            shared = x.new_ones(*x.shape[:2], self.shared_heads, dtype=wide_dtype(x.dtype))
        else:
            shared = self.shared_heads * torch.softmax(wide(self.shared_proj(x)), dim=-1)
        if self.routed_proj is None or self.split_proj is None:
            return shared
        a = 2.0 * torch.softmax(wide(self.split_proj(x)), dim=-1)
        routed = self._routed(torch.softmax(wide(self.routed_proj(x)), dim=-1), call)
        return torch.cat((a[..., :1] * shared, a[..., 1:] * routed), dim=-1)

    def norm_gates(self, q: Tensor, call: Call) -> Tensor:
        """The factor of each head by the length of its query.  Shapes:  q: [B, T, H, d];  out: [B, T, H]"""
        lengths = torch.linalg.vector_norm(wide(q), dim=-1)
        gates, routed = torch.ones_like(lengths[..., : self.shared_heads]), lengths[..., self.shared_heads :]
        if self.routed_heads > 1:
            # As good as the standard deviation, and of equal lengths, as all 0 at padding, with a gradient.
            variance = routed.var(dim=-1, keepdim=True) + torch.finfo(routed.dtype).eps ** 2
            routed = routed * variance.rsqrt()
        if self.routed_heads > 0:
            p = torch.softmax(routed, dim=-1)
            gates = torch.cat((gates, self._chosen(p, call) + (p - p.detach())), dim=-1)
        out: Tensor = self.gates_out(gates)
        return out

    def _chosen(self, p: Tensor, call: Call) -> Tensor:
        """1 for the K likeliest routed heads, else 0.  Shapes:  p, out: [B, T, Hr]"""
        # Not topk, which may take any of equal ones.
        first = p.argsort(dim=-1, descending=True, stable=True)[..., : self.active]
        chosen = torch.zeros_like(p).scatter(-1, first, 1.0)
        if self.training:
            self._account(p, chosen, call)
        return chosen

    def _routed(self, p: Tensor, call: Call) -> Tensor:
        """Factors of the routed heads, K of them above 0.  Shapes:  p, out: [B, T, Hr]"""
        kept = p * self._chosen(p, call)
        return self.active * kept / kept.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(p.dtype).eps)

    def _account(self, p: Tensor, chosen: Tensor, call: Call) -> None:
        """Asks for all routed heads alike, and tells how many choices the busiest take. Only the mean of p has a gradient.

        Shapes:  p, chosen: [B, T, Hr]"""
        if call.padding is None:
            wanted, load = p.mean(dim=(0, 1)), chosen.mean(dim=(0, 1))
        else:
            real = call.padding[..., None].to(p.dtype)
            count = real.sum().clamp(min=1.0)
            wanted, load = ((side * real).sum(dim=(0, 1)) / count for side in (p, chosen))
        call.add_loss("moh_balance", self.routed_heads * (wanted * load).sum(), self.balance)
        if 0 < self.active < self.routed_heads:
            call.add_loss("busiest_heads", load.topk(self.active).values.sum() / self.active, 0.0)

    def kernel_path(self, device: torch.device, dtype: torch.dtype) -> str:
        """The name of the code that does the mixing."""
        # Of mixers with heads, attention leaves out those that are not chosen.
        routed = getattr(self.mixer, "routed_path", None)
        return super().kernel_path(device, dtype) if routed is None else str(routed(device, dtype))
