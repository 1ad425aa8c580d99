"""The place where a probe turns the attention of chosen heads to the own token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from heddle.errors import HeddleError


class HeadMix(nn.Module):
    """Brings the attention map of each head nearer to the identity.        (SoftPAG, arXiv 2506.10978)

        A_u = (1 - u) A + u I,   so   o = (1 - u) A v + u v

    A probe sets `share` to u, from 0, which changes no bit, to 1, where a head hands on each token's own value; its gradient
    where it is 0 tells the first order of what a head mixes. The identity sees no later token, its rows sum to 1, and no map is
    needed, so every attention kernel will do. None (so it begins): nothing is computed.

        mixer.head_mix.share = torch.tensor([0.0, 1.0, 0.0, 0.0])

    Shapes:  share: [H], or [B, H] for each row of a batch;  o, out: [B, H, T, V];  v: [B, KV heads, S, V], the last T those of o

    Raises:
        HeddleError: "bad-argument" for a share of another shape.
    """

    share: Tensor | None = None

    def forward(self, o: Tensor, v: Tensor) -> Tensor:
        if self.share is None:
            return o
        if self.share.shape not in ((o.shape[1],), tuple(o.shape[:2])):
            what = f"share is {list(self.share.shape)}, and there are {o.shape[0]} rows of {o.shape[1]} heads"
            raise HeddleError("bad-argument", f"head_mix: {what}", hint="[heads], or [rows, heads]")
        own = v[:, :, v.shape[2] - o.shape[2] :].repeat_interleave(o.shape[1] // v.shape[1], dim=1)
        return torch.lerp(o, own, self.share.to(o.device, o.dtype)[..., None, None])
