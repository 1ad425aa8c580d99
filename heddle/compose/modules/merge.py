"""Mixers that run side by side in one layer, and how their outputs become one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from heddle.compose.modules.composite import CompositeMixer
from heddle.compose.modules.norm import RMSNorm
from heddle.compose.modules.precision import wide
from heddle.compose.modules.site import Site


class MergingMixer(CompositeMixer):
    """y = merge_i(weight_i · norm_i(y_i))        (arXiv 2411.13676, 2507.22448)

    `merge` is "sum", "mean", "gate" (shares by a softmax over a projection of x, for each token) or "concat" (a
    projection of all outputs).

    Shapes:  x, y, each y_i: [B, T, D]
    """

    def __init__(
        self,
        site: Site,
        *,
        mixers: Sequence[nn.Module],
        merge: str,
        norm: bool,
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.mixers, self.merge = nn.ModuleList(mixers), merge
        self.weights = list(weights or [1.0] * len(mixers))
        width, count = site.hidden_size, len(mixers)
        self.norms = nn.ModuleList(RMSNorm(width, site.norm_eps) for _ in mixers) if norm else None
        self.gate_proj = nn.Linear(width, count, bias=False) if merge == "gate" else None
        self.merge_proj = nn.Linear(count * width, width, bias=False) if merge == "concat" else None

    def merged(self, x: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """The outputs of the mixers, one for each, as one."""
        if self.norms is not None:
            outputs = [norm(y) for norm, y in zip(self.norms, outputs, strict=True)]
        outputs = [y if w == 1.0 else y * w for w, y in zip(self.weights, outputs, strict=True)]
        if self.merge_proj is not None:
            joined: Tensor = self.merge_proj(torch.cat(outputs, dim=-1))
            return joined
        if self.gate_proj is not None:
            shares = torch.softmax(wide(self.gate_proj(x)), dim=-1).to(x.dtype)
            outputs = [y * shares[..., index, None] for index, y in enumerate(outputs)]
        total = outputs[0]
        for y in outputs[1:]:
            total = total + y
        return total / len(outputs) if self.merge == "mean" else total
