"""Channel blocks of matrices with an activation between them: what the kinds have in common."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from heddle.specs.kinds import ChannelSpec, Problem
from heddle.specs.layer import Site
from heddle.specs.width import Ratio, Width, width_of, width_problems


class FeedForward(ChannelSpec):
    """`matrices` of hidden_size × width. No biases."""

    matrices: ClassVar[int]
    ratio: Ratio
    width: Width = None

    def resolved(self, site: Site) -> Self:
        return self.model_copy(update={"width": width_of(self.ratio, self.width, site)})

    def problems(self, site: Site) -> list[Problem]:  # noqa: ARG002
        return width_problems(self, self.ratio, self.width)

    def runtime(self, site: Site) -> dict[str, Any]:
        return {"kind": self.kind, "width": width_of(self.ratio, self.width, site)}

    def params(self, site: Site) -> int:
        return self.matrices * site.hidden_size * width_of(self.ratio, self.width, site)

    def flops(self, site: Site) -> int:
        return 2 * self.params(site)
