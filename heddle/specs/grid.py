"""The tokens of an encoder as the rows of an image or the frames of a video, with a window along each axis."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field

from heddle.specs.base import Schema
from heddle.specs.kinds import Problem


class Grid(Schema):
    """Tokens row by row and frame by frame; a query sees the keys that are in its window on every axis (arXiv 2511.14712).

    There are as many rows, or with `height` frames, as the tokens fill. Of the last one tokens may be missing: they are not seen.
    """

    width: Annotated[int, Field(ge=1, le=10**6, description="Tokens of a row.")]
    height: Annotated[
        int | None,
        Field(
            ge=1, le=10**6, description="Rows of a frame; null: there are no frames, as many rows as come."
        ),
    ] = None
    column_window: Annotated[
        int | None,
        Field(ge=1, le=10**6, description="Columns a query sees on each side, its own included; null: all."),
    ] = None
    row_window: Annotated[
        int | None,
        Field(ge=1, le=10**6, description="Rows a query sees on each side, its own included; null: all."),
    ] = None
    frame_window: Annotated[
        int | None,
        Field(
            ge=1,
            le=10**6,
            description="Frames a query sees on each side, its own included; null: all (FreeSwim).",
        ),
    ] = None

    def runtime(self) -> dict[str, Any]:
        """Plain data for the module; a window that reaches all of an axis from anywhere is none."""
        data = self.plain()
        for name, size in (("column_window", self.width), ("row_window", self.height)):
            if size is not None and (data[name] or size) >= size:
                data[name] = None
        return data

    def problems(self, *, causal: bool, window: int | None, capped: bool) -> list[Problem]:
        """What the attention around it rules out; `capped`: it has a soft-cap or sinks."""
        one = "leave one of them out"
        rules = [
            (causal, "grid", "a grid has no order that could be causal", "causal: false"),
            (window is not None, "grid", "window counts along the line of tokens", "the windows of the grid"),
            (capped, "grid", "no logits of a grid are capped, and it has no sinks", one),
            (
                self.frame_window is not None and self.height is None,
                "grid.frame_window",
                "without height there are no frames",
                "height",
            ),
        ]
        return [
            Problem(field, what, hint, "conflicting-fields") for wrong, field, what, hint in rules if wrong
        ]

    def mean_keys_seen(self, length: int, *, slides: bool) -> float:
        """Keys that a query sees, the mean over a pass of `length` tokens; as if the last row, or frame, were full."""
        seen = (_mean_seen(size, window, slides=slides) for size, window, _ in self._axes(length))
        return min(float(length), math.prod(seen))

    def widest(self, *, slides: bool) -> int | None:
        """Tokens back along the line that a query may see, its own included; None: all."""
        (_, first, stride), *rest = self._axes(0)
        if first is None:
            return None
        far = _reach(first, slides=slides) * stride
        for size, window, step in rest:
            far += step * min(size - 1, size - 1 if window is None else _reach(window, slides=slides))
        return far + 1

    def _axes(self, length: int) -> list[tuple[int, int | None, int]]:
        """Size, window and tokens from one to the next of each axis, from the one that is as long as the tokens make it."""
        columns = (self.width, self.column_window, 1)
        if self.height is None:
            return [(-(-length // self.width), self.row_window, self.width), columns]
        frame = self.width * self.height
        rows = (self.height, self.row_window, self.width)
        return [(-(-length // frame), self.frame_window, frame), rows, columns]


def _reach(window: int, *, slides: bool) -> int:
    return 2 * window - 2 if slides else window - 1


def _mean_seen(size: int, window: int | None, *, slides: bool) -> float:
    """Places of an axis that a query sees, the mean over its places."""
    if window is None:
        return size
    if slides:
        return min(size, 2 * window - 1)
    seen = min(size, window)
    return 2 * (seen * (seen + 1) / 2 + (size - seen) * seen) / max(size, 1) - 1
