"""Several mixers one after the other in one layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from heddle.compose.cache import Call
from heddle.compose.modules.composite import CompositeMixer
from heddle.compose.modules.documents import mixed
from heddle.compose.modules.norm import RMSNorm
from heddle.compose.modules.site import Site


class SequentialModule(CompositeMixer):
    """Each mixer sees what those before it gave, normed.

        residual:      u_i = u_(i-1) + mixer_i(norm_i(u_(i-1))),  u_0 = x,   y = sum_i mixer_i(norm_i(u_(i-1)))
        not residual:  u_i = mixer_i(norm_i(u_(i-1))),            u_0 = x,   y = u_n

    The first mixer takes x as it is, which the layer has normed. The layer adds its stream to y, so y leaves u_0 out.

    Shapes:  x, y, each u_i: [B, T, D]
    """

    takes_packed = True

    def __init__(self, site: Site, *, mixers: Sequence[nn.Module], residual: bool) -> None:
        super().__init__()
        self.mixers, self.residual = nn.ModuleList(mixers), residual
        self.norms = nn.ModuleList(RMSNorm(site.hidden_size, site.norm_eps) for _ in mixers[1:])

    def forward(self, x: Tensor, call: Call) -> Tensor:
        u = x
        outputs: list[Tensor] = []
        for path, mixer in self.parts().items():
            seen = self.norms[len(outputs) - 1](u) if outputs else u
            outputs.append(mixed(mixer, seen, call.part(path)))
            u = u + outputs[-1] if self.residual else outputs[-1]
        if not self.residual:
            return u
        # Not u - x, which would round off the small one of the two.
        y = outputs[0]
        for output in outputs[1:]:
            y = y + output
        return y
