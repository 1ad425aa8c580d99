"""No channel block: the layer is its mixer alone."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from heddle.specs.kinds import ChannelSpec
from heddle.specs.layer import Site


class NoChannel(ChannelSpec):
    """Nothing after the mixer, and no norm for it."""

    is_empty: ClassVar[bool] = True
    kind: Literal["none"] = "none"

    def resolved(self, site: Site) -> NoChannel:  # noqa: ARG002
        return self

    def runtime(self, site: Site) -> dict[str, Any]:  # noqa: ARG002
        return {"kind": self.kind}

    def params(self, site: Site) -> int:  # noqa: ARG002
        return 0

    def flops(self, site: Site) -> int:  # noqa: ARG002
        return 0
