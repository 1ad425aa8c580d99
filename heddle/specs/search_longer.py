"""A longer training of the best trials at the end of a search."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from heddle.specs.base import Schema


class LongerSpec(Schema):
    """The best trials trained again for longer, and their placements of two kinds in reverse order."""

    best: Annotated[
        int, Field(ge=1, le=100, description="Trials, from the best on, the winner among them (a count).")
    ] = 3
    times: Annotated[
        float, Field(gt=1, le=1000, description="Times the tokens of each task of the search (a factor).")
    ] = 4.0
    seeds: Annotated[int, Field(ge=1, le=100, description="New seeds with which each is trained.")] = 1
