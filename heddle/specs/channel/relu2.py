"""The squared-ReLU channel block."""

from __future__ import annotations

from typing import Any, Literal

from heddle.specs.kinds import ChannelSpec, Problem
from heddle.specs.layer import Site
from heddle.specs.width import Ratio, Width, width_of, width_problems


class ReLU2(ChannelSpec):
    """Two matrices with a squared ReLU between them: down(relu(up x)²) (arXiv 2109.08668). No biases."""

    kind: Literal["relu2"] = "relu2"
    ratio: Ratio = 4.0
    width: Width = None

    def resolved(self, site: Site) -> ReLU2:
        return self.model_copy(update={"width": width_of(self.ratio, self.width, site)})

    def problems(self, site: Site) -> list[Problem]:  # noqa: ARG002
        return width_problems(self, self.ratio, self.width)

    def runtime(self, site: Site) -> dict[str, Any]:
        return {"kind": self.kind, "width": width_of(self.ratio, self.width, site)}

    def params(self, site: Site) -> int:
        return 2 * site.hidden_size * width_of(self.ratio, self.width, site)

    def flops(self, site: Site) -> int:
        return 2 * self.params(site)
