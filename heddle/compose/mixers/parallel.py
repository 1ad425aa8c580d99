"""Several mixers side by side in one layer."""

from __future__ import annotations

from torch import Tensor

from heddle.compose.cache import Call
from heddle.compose.modules.documents import mixed
from heddle.compose.modules.merge import MergingMixer


class ParallelModule(MergingMixer):
    """y = merge_i(weight_i · norm_i(mixer_i(x)))        (arXiv 2411.13676, 2507.22448)

    Shapes:  x, y: [B, T, D]
    """

    takes_packed = True

    def forward(self, x: Tensor, call: Call) -> Tensor:
        return self.merged(x, [mixed(mixer, x, call.part(path)) for path, mixer in self.parts().items()])
