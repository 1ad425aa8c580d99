"""Rungs before the last one of a search: shorter trainings, after each of which only the best go on."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from heddle.specs.base import Schema
from heddle.specs.tasks import TaskSpec


class RungSpec(Schema):
    """A shorter training: the tasks of the search with a share of their tokens, or tasks of its own."""

    share: Annotated[
        float | None,
        Field(gt=0, lt=1, description="Share of the tokens of each task of the search; null: `tasks` says."),
    ] = None
    tasks: list[TaskSpec] = Field(
        default_factory=list, max_length=16, description="Tasks of this rung alone, with their tokens."
    )


class RungsSpec(Schema):
    """Successive halving: what is not among the best at a rung is not trained any longer."""

    eta: Annotated[
        float,
        Field(gt=1, le=1000, description="The best 1 / eta of what was told at a rung go on (a factor)."),
    ] = 3.0
    before: Annotated[
        list[RungSpec],
        Field(min_length=1, max_length=8, description="The rungs before `search.tasks`, the shortest first."),
    ]
