"""The parts of a spec that say on what and how a model is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from heddle.specs.base import Count, Schema


class DataSpec(Schema):
    """The text that the tasks `text` and `masked_bytes`, and `heddle train`, read."""

    source: Annotated[
        str,
        Field(
            min_length=1,
            max_length=4096,
            description="python-stdlib, or a text, JSONL or Parquet file or folder.",
        ),
    ] = "python-stdlib"
    text_field: Annotated[
        str,
        Field(
            min_length=1, max_length=256, description="Field of a JSONL or Parquet row that holds the text."
        ),
    ] = "text"
    sequence_length: Annotated[int, Field(ge=8, le=10**7, description="Tokens of a training sequence.")] = 256


class TrainSpec(Schema):
    """How every model is trained, where a task does not say otherwise."""

    tokens: Annotated[Count, Field(description="Tokens to train on: a count such as 400k or 20M.")] = (
        1_000_000
    )
    batch_tokens: Annotated[Count, Field(description="Tokens of a batch: a count.")] = 4096
    optimizer: Annotated[Literal["adamw"], Field(description="The optimizer.")] = "adamw"
    learning_rate: Annotated[
        float, Field(gt=0, le=10, description="Highest learning rate, reached after warmup.")
    ] = 3e-3
    weight_decay: Annotated[
        float, Field(ge=0, le=10, description="Decay of matrices per step, times the learning rate.")
    ] = 0.1
    warmup: Annotated[
        float, Field(ge=0, le=1, description="Share of the steps with a rising learning rate, 0 to 1.")
    ] = 0.1
    grad_clip: Annotated[float, Field(gt=0, le=1e6, description="Largest norm of the gradient.")] = 1.0
    seed: Annotated[int, Field(ge=0, le=2**31 - 1, description="Seed of the weights and batches.")] = 0
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Field(description="What training computes in; auto: bfloat16 on CUDA, float32 on a CPU."),
    ] = "auto"
