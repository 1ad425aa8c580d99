"""How wide a channel block is: by a ratio to hidden_size, or as a number."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from heddle.specs.kinds import ChannelSpec, Problem
from heddle.specs.layer import Site

MULTIPLE = 8

Ratio = Annotated[
    float,
    Field(
        gt=0, le=64, description="Inner width over hidden_size; the width is rounded up to a multiple of 8."
    ),
]
Width = Annotated[
    int | None,
    Field(ge=1, le=10**6, description="Inner width, in features; null: by ratio."),
]


def width_problems(block: ChannelSpec, ratio: float, width: int | None) -> list[Problem]:
    """That not both a ratio and a width are given. A ratio at its default is as good as none: dumps of a block hold it."""
    if width is None or ratio == type(block).model_fields["ratio"].default:
        return []
    what = "ratio and width are both given, and each sets the width"
    return [Problem("ratio", what, "leave one of them out", "conflicting-fields")]


def width_of(ratio: float, width: int | None, site: Site) -> int:
    """`width`, or ratio · hidden_size rounded up to a multiple of 8."""
    # The hair below keeps 1.1 * 80 = 88.00000000000001 from becoming 96.
    return width or MULTIPLE * max(1, math.ceil(ratio * site.hidden_size / MULTIPLE - 1e-9))
