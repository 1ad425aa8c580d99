"""A whole spec, every choice made."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from heddle.specs.base import Schema
from heddle.specs.model import ModelSpec
from heddle.specs.recipe import DataSpec, TrainSpec
from heddle.specs.search import SearchSpec

VERSION = 1


class Spec(Schema):
    """What a spec file says: a model, and how it is trained and searched."""

    version: Annotated[Literal[1], Field(description="Version of the spec language.")] = 1
    name: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
            description="Name of the model and of its folders: letters, digits, '.', '_' and '-'.",
        ),
    ]
    model: Annotated[
        ModelSpec, Field(description="The model; inside it a value may be left open to the search.")
    ]
    tokenizer: Annotated[
        str,
        Field(min_length=1, max_length=4096, description="bytes, or the path of a Hugging Face tokenizer."),
    ] = "bytes"
    # By a factory, so that no validator is built while heddle.specs is imported.
    data: Annotated[DataSpec, Field(description="The text to train on.")] = Field(default_factory=DataSpec)
    train: Annotated[TrainSpec, Field(description="How models are trained.")] = Field(
        default_factory=TrainSpec
    )
    search: Annotated[SearchSpec | None, Field(description="What to search for; null: nothing.")] = None
